"""The diffusion: how noise is put into pictures, how the network learns to find it, and how
pictures are drawn by taking it out again. No network and no optimiser live here: the model is an
argument.

    paper             name here                        shape   meaning
    T                 num_timesteps                    ()      steps of the forward process
    t = 1 ... T       t = 0 ... T-1                    (B,)    the code's t is the paper's t - 1
    beta_t            betas                            (T,)    variance of the noise added at t
    alpha-bar_t       alphas_cumprod                   (T,)    share of x_0's variance left in x_t
    alpha-bar_{t-1}   alphas_cumprod_prev              (T,)    the same one step earlier, 1 at t = 0
    beta-tilde_t      posterior_variance               (T,)    variance of q(x_{t-1} | x_t, x_0)
    eq. 7             posterior_mean_coef1, ..._coef2  (T,)    weights of x_0 and x_t in its mean
    epsilon           eps                              as x_0  the noise, normal with unit variance
                      v                                as x_0  sqrt(abar) eps - sqrt(1 - abar) x_0

DDPM: Ho et al. 2020. Cosine schedule, respacing: Nichol and Dhariwal 2021. DDIM: Song et al. 2020.
v: Salimans and Ho 2022. DPM-Solver++ 2M: Lu et al. 2022. Classifier-free guidance: Ho and Salimans
2022."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Generators = (
    torch.Generator | Sequence[torch.Generator] | None
)  # one for all images, or one for each

SAMPLERS = ("ddpm", "ddim", "dpm++")
NOISE_SCHEDULES = ("linear", "cosine")
PREDICTIONS = ("eps", "v")
SIGMA_MAX = 80.0  # where DPM-Solver++ starts: beyond it x_t holds nothing of the picture


def make_betas(noise_schedule: str, num_timesteps: int) -> Tensor:
    """The variances beta_t, (T,) float64: "linear" (Ho et al. 2020, 1e-4 to 0.02 at T = 1000,
    scaled to other T) or "cosine" (Nichol and Dhariwal 2021, eq. 17)."""
    if noise_schedule == "linear":
        scale = 1000 / num_timesteps
        betas = torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)
    elif noise_schedule == "cosine":
        steps = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        f = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - f[1:] / f[:-1]
    else:
        raise ValueError(f"noise_schedule is {noise_schedule!r}, not one of {NOISE_SCHEDULES}")
    return betas.clamp(max=0.999)


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0), Ho et al. 2020 eq. 6 and 7, at each of a sequence of t."""

    variance: Tensor  # 0 at the first
    mean_coef1: Tensor  # of x_0
    mean_coef2: Tensor  # of x_t


def make_posterior(alphas_cumprod: Tensor) -> Posterior:
    """The posterior between neighbours of any increasing sequence of timesteps.

    alphas_cumprod: (n,) float64 at those timesteps; before the first one lies the picture
    itself."""
    alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
    alphas = alphas_cumprod / alphas_cumprod_prev
    rest, rest_prev = 1 - alphas_cumprod, 1 - alphas_cumprod_prev
    return Posterior(
        variance=(1 - alphas) * rest_prev / rest,
        mean_coef1=(1 - alphas) * alphas_cumprod_prev.sqrt() / rest,
        mean_coef2=rest_prev * alphas.sqrt() / rest,
    )


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """A generator for each image, seeded by (seed, its index), so that image i is the same picture
    in a batch of any size and on any device: they draw on the CPU."""
    seeds = (np.random.SeedSequence((seed, i)).generate_state(1, np.uint64) for i in indices)
    return [torch.Generator().manual_seed(int(s[0])) for s in seeds]


def draw_noise(shape: Sequence[int], generator: Generators, device, dtype=torch.float32) -> Tensor:
    """Normal noise of `shape`, from one generator or one for each image, moved to `device`."""
    if generator is None or isinstance(generator, torch.Generator):
        source = generator.device if generator is not None else device
        return torch.randn(*shape, generator=generator, device=source, dtype=dtype).to(device)
    assert len(generator) == shape[0], f"{len(generator)} generators for {shape[0]} images"
    noise = [torch.randn(*shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator]
    return torch.stack(noise).to(device)


@contextmanager
def evaluating(model: Callable):
    """The model without dropout, and as it was afterwards."""
    training = model.training if isinstance(model, nn.Module) else False
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


class Diffusion:
    """The forward process, its loss and its samplers.

    num_timesteps: T; noise_schedule: "linear" or "cosine"; prediction: what the network is taught
    to answer, "eps", or "v", which learns the colours of whole pictures much sooner; device,
    dtype: of the tables and of the pictures drawn. The tables are computed in float64; they belong
    to no state dict."""

    def __init__(
        self,
        num_timesteps: int = 1000,
        noise_schedule: str = "cosine",
        prediction: str = "eps",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        assert num_timesteps > 1, f"num_timesteps is {num_timesteps}"
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {prediction!r}, not one of {PREDICTIONS}")
        self.num_timesteps, self.prediction = num_timesteps, prediction
        self.device, self.dtype = torch.device(device), dtype
        betas = make_betas(noise_schedule, num_timesteps)
        self._alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # float64, on the CPU, for samplers
        posterior = make_posterior(self._alphas_cumprod)
        # At t = 0 the posterior's variance is 0: the next one's logarithm stands in.
        log_variance = torch.cat([posterior.variance[1:2], posterior.variance[1:]]).log()

        def table(values: Tensor) -> Tensor:
            return values.to(self.device, dtype)

        self.betas = table(betas)
        self.alphas_cumprod = table(self._alphas_cumprod)
        self.alphas_cumprod_prev = table(F.pad(self._alphas_cumprod[:-1], (1, 0), value=1.0))
        self.sqrt_alphas_cumprod = table(self._alphas_cumprod.sqrt())
        self.sqrt_one_minus_alphas_cumprod = table((1 - self._alphas_cumprod).sqrt())
        self.posterior_variance = table(posterior.variance)
        self.posterior_log_variance_clipped = table(log_variance)
        self.posterior_mean_coef1 = table(posterior.mean_coef1)
        self.posterior_mean_coef2 = table(posterior.mean_coef2)

    # Training ------------------------------------------------------------------------------------

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_0), Ho et al. 2020 eq. 4.

        x_0: (B, C, H, W) in [-1, 1]; t: (B,) int64 in [0, T); eps: x_0's shape. Returns x_0's
        shape."""
        signal = self.sqrt_alphas_cumprod[t].view(-1, 1, 1, 1)
        noise = self.sqrt_one_minus_alphas_cumprod[t].view(-1, 1, 1, 1)
        return signal * x_0 + noise * eps

    def stratified_timesteps(self, batch_size: int, generator=None) -> Tensor:
        """(B,) int64: one t drawn from each of B equal parts of [0, T). Each t is as likely as with
        independent draws, but every batch sees all noise levels, so the loss is less noisy."""
        u = torch.rand(batch_size, generator=generator, device=self.device)
        parts = torch.arange(batch_size, device=self.device)
        t = ((parts + u) * (self.num_timesteps / batch_size)).long()
        return t.clamp(max=self.num_timesteps - 1)  # float32 can round (B - 1) + 0.9999999 up to B

    def loss(self, model, x_0: Tensor, generator=None, attributes: Tensor | None = None) -> Tensor:
        """The mean squared error of the noise (or v) guessed, Ho et al. 2020 eq. 14. A scalar.

        x_0: (B, C, H, W) in [-1, 1]; generator: on this diffusion's device; attributes: (B, K)."""
        t = self.stratified_timesteps(len(x_0), generator)
        eps = draw_noise(x_0.shape, generator, self.device, x_0.dtype)
        x_t = self.q_sample(x_0, t, eps)
        guess = model(x_t, t) if attributes is None else model(x_t, t, attributes)
        target = self.target(x_0, t, eps)
        return F.mse_loss(guess.to(target.dtype), target)

    def target(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network is to answer at x_t: the noise, or v. Shapes as in `q_sample`."""
        if self.prediction == "eps":
            return eps
        signal = self.sqrt_alphas_cumprod[t].view(-1, 1, 1, 1)
        noise = self.sqrt_one_minus_alphas_cumprod[t].view(-1, 1, 1, 1)
        return signal * eps - noise * x_0

    # Sampling ------------------------------------------------------------------------------------

    def sample(self, model, shape: Sequence[int], **options) -> Tensor:
        """Draw pictures, `shape` = (B, C, H, W), in [-1, 1]. The options are `sample_loop`'s."""
        ((_, _, x_0),) = deque(self.sample_loop(model, shape, **options), maxlen=1)
        return x_0

    def sample_loop(
        self,
        model: Callable,
        shape: Sequence[int],
        sampler: str = "dpm++",
        steps: int = 20,
        generator: Generators = None,
        attributes: Tensor | None = None,
        guidance: float = 1.0,
        eta: float = 0.0,
        x_T: Tensor | None = None,
    ) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Draw pictures step by step: yields (t, x_t, x_0_pred) after each of `steps` evaluations
        of the network; the last x_0_pred is the picture.

        sampler: "ddpm" (ancestral), "ddim" (eta = 0 deterministic, 1 as noisy as DDPM) or "dpm++"
        (DPM-Solver++ 2M); steps: evaluations, for ddpm and ddim at most T; generator: one, or a
        list with one for each image; attributes: (B, K), with guidance > 1 the more followed, at
        two evaluations a step; x_T: the noise to start from, else drawn."""
        assert sampler in SAMPLERS, f"sampler is {sampler!r}, not one of {SAMPLERS}"
        assert steps > 0, f"steps is {steps}"
        if sampler != "dpm++" and steps > self.num_timesteps:
            raise ValueError(f"steps is {steps}; {sampler} takes at most {self.num_timesteps}")

        def noise() -> Tensor:
            return draw_noise(shape, generator, self.device, self.dtype)

        def guess(x_t: Tensor, t: float, alpha_bar: float) -> tuple[Tensor, Tensor]:
            output = self._evaluate(model, x_t, t, attributes, guidance)
            return self.split(output, x_t, alpha_bar)

        x = noise() if x_T is None else x_T.to(self.device, self.dtype)
        if sampler == "dpm++":
            loop = self._dpm_solver(guess, x, steps)
        elif sampler == "ddim":
            loop = self._ddim(guess, x, steps, eta, noise)
        else:
            loop = self._ddpm(guess, x, steps, noise)
        while True:
            # The caller may keep training between two steps: modes are changed only inside one.
            with torch.no_grad(), evaluating(model):
                state = next(loop, None)
            if state is None:
                return
            yield state

    def _evaluate(self, model, x_t: Tensor, t: float, attributes: Tensor | None, guidance: float):
        """The network's answer, with classifier-free guidance: f_0 + guidance * (f_c - f_0)."""
        times = torch.full((len(x_t),), t, device=self.device)
        if attributes is None:
            return model(x_t, times).to(x_t.dtype)
        if guidance == 1:
            return model(x_t, times, attributes).to(x_t.dtype)
        both = torch.cat([attributes, torch.zeros_like(attributes)])
        answers = model(x_t.repeat(2, 1, 1, 1), times.repeat(2), both).to(x_t.dtype)
        with_condition, without = answers.chunk(2)
        return without + guidance * (with_condition - without)

    def split(
        self, output: Tensor, x_t: Tensor, alpha_bar: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """(x_0, eps) of x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps as the network's output
        says, x_0 held in [-1, 1] and eps made to fit it. alpha_bar: one, or (B, 1, 1, 1)."""
        signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.prediction == "v":
            x_0 = signal * x_t - noise * output
        else:
            x_0 = (x_t - noise * output) / signal
        x_0 = x_0.clamp(-1, 1)
        return x_0, (x_t - signal * x_0) / noise

    def timesteps(self, steps: int) -> Tensor:
        """(steps,) int64: evenly spaced from 0 to T-1; T-1 alone for one step."""
        if steps == 1:
            return torch.tensor([self.num_timesteps - 1])
        return torch.linspace(0, self.num_timesteps - 1, steps, dtype=torch.float64).round().long()

    def _ddpm(self, guess, x: Tensor, steps: int, noise):
        """Ho et al. 2020 algorithm 2, with the posterior variance, on a subset of the timesteps."""
        timesteps = self.timesteps(steps)
        alphas_cumprod = self._alphas_cumprod[timesteps]
        posterior = make_posterior(alphas_cumprod)
        for i in reversed(range(steps)):
            t = int(timesteps[i])
            x_0, _ = guess(x, t, float(alphas_cumprod[i]))
            yield t, x, x_0
            if i > 0:
                mean = float(posterior.mean_coef1[i]) * x_0 + float(posterior.mean_coef2[i]) * x
                x = mean + math.sqrt(posterior.variance[i]) * noise()

    def _ddim(self, guess, x: Tensor, steps: int, eta: float, noise):
        """Song et al. 2020 eq. 12, sigma scaled by eta as in eq. 16."""
        timesteps = self.timesteps(steps)
        for i in reversed(range(steps)):
            t = int(timesteps[i])
            alpha_bar = float(self._alphas_cumprod[t])
            x_0, eps = guess(x, t, alpha_bar)
            yield t, x, x_0
            if i > 0:
                alpha_bar_prev = float(self._alphas_cumprod[timesteps[i - 1]])
                variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
                sigma = eta * math.sqrt(variance)
                x = math.sqrt(alpha_bar_prev) * x_0 + math.sqrt(1 - alpha_bar_prev - sigma**2) * eps
                if eta > 0:
                    x = x + sigma * noise()

    def _dpm_solver(self, guess, x: Tensor, steps: int):
        """Lu et al. 2022 algorithm 2 (2M), in x / sqrt(alpha_bar) = x_0 + sigma * eps, at noise
        levels evenly spaced in log sigma, so in log-SNR, from SIGMA_MAX to the schedule's
        smallest."""
        log_sigmas = (1 / self._alphas_cumprod - 1).log().numpy() / 2  # increasing in t
        start = min(math.log(SIGMA_MAX), log_sigmas[-1])
        levels = np.linspace(start, log_sigmas[0], steps)
        times = np.interp(levels, log_sigmas, np.arange(self.num_timesteps))
        y = x * math.sqrt(1 + math.exp(2 * start))  # y = x_t / sqrt(alpha_bar_t)
        x_0_before = None
        for i in range(steps):
            alpha_bar = 1 / (1 + math.exp(2 * levels[i]))
            x_t = y * math.sqrt(alpha_bar)
            x_0, _ = guess(x_t, float(times[i]), alpha_bar)
            yield float(times[i]), x_t, x_0
            if i < steps - 1:
                # Second order: extrapolate x_0 to the middle of the step; levels are equally
                # spaced.
                direction = x_0 if x_0_before is None else 1.5 * x_0 - 0.5 * x_0_before
                shrink = math.exp(levels[i + 1] - levels[i])
                y = shrink * y + (1 - shrink) * direction
                x_0_before = x_0
