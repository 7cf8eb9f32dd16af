"""The samplers, functions of one form, and SAMPLERS, the table of them.

A sampler goes through a list of noise levels, from noise to an image. It evaluates the network
once at each level except the last and yields (t, x_t, x_0_pred) after each evaluation. So there are
as many steps as evaluations. The generator's return value, which `yield from` gives, is x at the
last level. Its arguments:

    predict(x_t, t, alpha_bar_t)   one evaluation of the network: (x_0_pred, eps_pred); t may be
                                   fractional, between two timesteps
    x                              (B, 3, H, W), x_t at the first level: at the start, noise
    levels                         `Level`s, each with less noise than the one before
    draw()                         noise of x's shape

A sampler may start and end at any level, and knows the image only through `predict`. So editing.py
can repair and vary images with any of them. To add one, write the function and enter it in
SAMPLERS.

DDPM: Ho et al. 2020. Respacing: Nichol and Dhariwal 2021. DDIM: Song et al. 2020. DPM-Solver++ 2M:
Lu et al. 2022.
"""

import math
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from system.errors import UsageError

SIGMA_MAX = 80.0  # where DPM-Solver++ starts: with more noise, x_t has nothing of the image left


class Level(NamedTuple):
    """How noisy x_t is."""

    t: float
    alpha_bar: float  # share of the image's variance that is left


IMAGE = Level(-1, 1.0)  # no noise: where every sampler ends

Predict = Callable[[Tensor, float, float], tuple[Tensor, Tensor]]
Draw = Callable[[], Tensor]
Moves = Generator[tuple[float, Tensor, Tensor], None, Tensor]


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0), Ho et al. 2020 eq. 6 and 7."""

    variance: Tensor  # 0 at the first timestep
    mean_coef1: Tensor  # of x_0
    mean_coef2: Tensor  # of x_t


def make_posterior(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Posterior:
    """The posterior of steps from one level to a less noisy one; both tables, or both numbers."""
    alpha = alpha_bar / alpha_bar_prev
    rest, rest_prev = 1 - alpha_bar, 1 - alpha_bar_prev
    return Posterior(
        variance=(1 - alpha) * rest_prev / rest,
        mean_coef1=(1 - alpha) * alpha_bar_prev**0.5 / rest,
        mean_coef2=rest_prev * alpha**0.5 / rest,
    )


# Levels ------------------------------------------------------------------------------------------


def even_timesteps(num_timesteps: int, steps: int) -> Tensor:
    """(steps,) int64: evenly spaced from 0 to T-1; T-1 alone for one step."""
    if steps == 1:
        return torch.tensor([num_timesteps - 1])
    return torch.linspace(0, num_timesteps - 1, steps, dtype=torch.float64).round().long()


def even_in_t(alphas_cumprod: Tensor, steps: int) -> list[Level]:
    """`steps` evenly spaced timesteps, the last one first, and the image.

    alphas_cumprod: (n,) float64, on the CPU: the noise schedule, or its first n timesteps."""
    timesteps = even_timesteps(len(alphas_cumprod), steps).flip(0)
    return [*map(Level, timesteps.tolist(), alphas_cumprod[timesteps].tolist()), IMAGE]


def even_in_log_sigma(alphas_cumprod: Tensor, steps: int) -> list[Level]:
    """The same, but evenly spaced in log sigma (so in log-SNR), from at most SIGMA_MAX to the
    smallest sigma of the schedule; x_t / sqrt(alpha_bar_t) = x_0 + sigma * eps."""
    log_sigmas = (1 / alphas_cumprod - 1).log().numpy() / 2  # increasing in t
    chosen = np.linspace(min(math.log(SIGMA_MAX), log_sigmas[-1]), log_sigmas[0], steps)
    timesteps = np.interp(chosen, log_sigmas, np.arange(len(alphas_cumprod)))
    return [*map(Level, timesteps.tolist(), (1 / (1 + np.exp(2 * chosen))).tolist()), IMAGE]


def put_noise(x_0: Tensor, level: Level, eps: Tensor) -> Tensor:
    """x_t at a level, from an image and noise: Ho et al. 2020 eq. 4."""
    return math.sqrt(level.alpha_bar) * x_0 + math.sqrt(1 - level.alpha_bar) * eps


# The samplers ------------------------------------------------------------------------------------


def ddpm(predict: Predict, x: Tensor, levels: Sequence[Level], draw: Draw) -> Moves:
    """Ho et al. 2020 algorithm 2, with the posterior's variance, on a subset of the timesteps."""
    for here, there in pairwise(levels):
        x_0_pred, _ = predict(x, *here)
        yield here.t, x, x_0_pred
        posterior = make_posterior(here.alpha_bar, there.alpha_bar)
        x = posterior.mean_coef1 * x_0_pred + posterior.mean_coef2 * x
        if posterior.variance > 0:
            x = x + math.sqrt(posterior.variance) * draw()
    return x


def ddim(
    predict: Predict, x: Tensor, levels: Sequence[Level], draw: Draw, eta: float = 0.0
) -> Moves:
    """Song et al. 2020 eq. 12. eta: the noise added, 0 none, 1 as much as by DDPM (eq. 16)."""
    for here, there in pairwise(levels):
        x_0_pred, eps_pred = predict(x, *here)
        yield here.t, x, x_0_pred
        sigma = eta * math.sqrt(make_posterior(here.alpha_bar, there.alpha_bar).variance)
        direction = math.sqrt(1 - there.alpha_bar - sigma**2) * eps_pred
        x = math.sqrt(there.alpha_bar) * x_0_pred + direction
        if sigma > 0:
            x = x + sigma * draw()
    return x


def dpm_solver(predict: Predict, x: Tensor, levels: Sequence[Level], draw: Draw) -> Moves:
    """DPM-Solver++ 2M (Lu et al. 2022), in y = x_t / sqrt(alpha_bar_t), at levels that are evenly
    spaced in log sigma.

    x_0 is extrapolated linearly in log sigma from the last two predictions, and dy / dlog(sigma) =
    y - x_0 is solved exactly (diffusers: solver_type="heun"). With few, wide steps this is better
    than a constant x_0 taken at the middle of the step."""
    y, x_0_before = x / math.sqrt(levels[0].alpha_bar), None
    for here, there in pairwise(levels):
        x_t = y * math.sqrt(here.alpha_bar)
        x_0_pred, _ = predict(x_t, *here)
        yield here.t, x_t, x_0_pred
        shrink = sigma_of(there) / sigma_of(here)
        y = shrink * y + (1 - shrink) * x_0_pred
        last = there == IMAGE  # its sigma is 0, the logarithm infinite
        if x_0_before is not None and not last:
            y = y + (1 + (1 - shrink) / math.log(shrink)) * (x_0_pred - x_0_before)
        x_0_before = x_0_pred
    return y * math.sqrt(levels[-1].alpha_bar)


def sigma_of(level: Level) -> float:
    """Standard deviation of the noise in x_t / sqrt(alpha_bar_t)."""
    return math.sqrt(1 / level.alpha_bar - 1)


# The table ---------------------------------------------------------------------------------------


class Sampler(NamedTuple):
    """A sampler and its properties."""

    function: Callable[..., Moves]
    levels: Callable[[Tensor, int], list[Level]] = even_in_t  # that it visits
    deterministic: bool = True  # with eta = 0 the same x_T gives the same image
    takes_eta: bool = False
    at_most_T: bool = False  # it visits each timestep once at most, so steps <= T

    def run(
        self, predict: Predict, x: Tensor, levels: Sequence[Level], draw: Draw, eta: float
    ) -> Moves:
        """Call the sampler; it gets `eta` only if it takes it."""
        return self.function(predict, x, levels, draw, **({"eta": eta} if self.takes_eta else {}))


SAMPLERS = {
    "ddpm": Sampler(ddpm, deterministic=False, at_most_T=True),
    "ddim": Sampler(ddim, takes_eta=True, at_most_T=True),
    "dpm++": Sampler(dpm_solver, even_in_log_sigma),
}


def check_sampler(
    sampler: str, steps: int, eta: float = 0.0, num_timesteps: int | None = None
) -> None:
    """Raise UsageError for what a sampler cannot do. num_timesteps: T, if it is known."""
    if sampler not in SAMPLERS:
        raise UsageError("--sampler", f"is {sampler!r}", f"choose from {', '.join(SAMPLERS)}")
    if steps < 1:
        raise UsageError("--steps", f"is {steps}", "give a whole number from 1")
    if num_timesteps and SAMPLERS[sampler].at_most_T and steps > num_timesteps:
        raise UsageError("--steps", f"is {steps}", f"give at most {num_timesteps} for {sampler}")
    if not 0 <= eta <= 1:
        raise UsageError("--eta", f"is {eta}", "give a number from 0 to 1")
    if eta and not SAMPLERS[sampler].takes_eta:
        takers = ", ".join(name for name, each in SAMPLERS.items() if each.takes_eta)
        raise UsageError("--eta", f"{sampler} does not take it", f"give 0, or --sampler {takers}")


def is_deterministic(sampler: str, eta: float = 0.0) -> bool:
    """Whether the same noise always gives the same image, as interpolation and inversion need."""
    return SAMPLERS[sampler].deterministic and eta == 0
