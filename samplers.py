"""The samplers: functions of one form, and SAMPLERS, the table of what is true of each.

A sampler goes from noise, x at t = T-1, to an image, and yields (t, x_t, x_0_pred) after each move;
the last x_0_pred is the image. It is given

    predict(x_t, t, alpha_bar_t)   one evaluation of the network: (x_0_pred, eps_pred); t may be a
                                   fraction, between two timesteps
    x                              (B, C, H, W), the noise
    alphas_cumprod                 (T,) float64, on the CPU: the noise schedule
    steps                          evaluations of the network, exactly so many
    eta                            how much noise is added on the way: 0 none, 1 as much as by DDPM
    draw_noise()                   noise of x's shape

DDPM: Ho et al. 2020. Respacing: Nichol and Dhariwal 2021. DDIM: Song et al. 2020. DPM-Solver++ 2M:
Lu et al. 2022. To add one: write the function, enter it in SAMPLERS.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA_MAX = 80.0  # where DPM-Solver++ starts: with more noise x_t holds nothing of the image

Predict = Callable[[Tensor, float, float], tuple[Tensor, Tensor]]
Moves = Iterator[tuple[float, Tensor, Tensor]]


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0), Ho et al. 2020 eq. 6 and 7, at each of a sequence of timesteps."""

    variance: Tensor  # 0 at the first
    mean_coef1: Tensor  # of x_0
    mean_coef2: Tensor  # of x_t


def make_posterior(alphas_cumprod: Tensor) -> Posterior:
    """The posterior between neighbours in an increasing sequence of timesteps.

    alphas_cumprod: (n,) float64 at those timesteps; before the first one lies the image itself."""
    alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
    alphas = alphas_cumprod / alphas_cumprod_prev
    rest, rest_prev = 1 - alphas_cumprod, 1 - alphas_cumprod_prev
    return Posterior(
        variance=(1 - alphas) * rest_prev / rest,
        mean_coef1=(1 - alphas) * alphas_cumprod_prev.sqrt() / rest,
        mean_coef2=rest_prev * alphas.sqrt() / rest,
    )


def even_timesteps(num_timesteps: int, steps: int) -> Tensor:
    """(steps,) int64: evenly spaced from 0 to T-1; T-1 alone for one step."""
    if steps == 1:
        return torch.tensor([num_timesteps - 1])
    return torch.linspace(0, num_timesteps - 1, steps, dtype=torch.float64).round().long()


def ddpm(
    predict: Predict, x: Tensor, alphas_cumprod: Tensor, steps: int, eta: float, draw_noise
) -> Moves:
    """Ho et al. 2020 algorithm 2, with the posterior's variance, on a subset of the timesteps."""
    timesteps = even_timesteps(len(alphas_cumprod), steps)
    alphas_cumprod = alphas_cumprod[timesteps]
    posterior = make_posterior(alphas_cumprod)
    for i in reversed(range(steps)):
        t = int(timesteps[i])
        x_0_pred, _ = predict(x, t, float(alphas_cumprod[i]))
        yield t, x, x_0_pred
        if i > 0:
            mean = float(posterior.mean_coef1[i]) * x_0_pred + float(posterior.mean_coef2[i]) * x
            x = mean + math.sqrt(posterior.variance[i]) * draw_noise()


def ddim(
    predict: Predict, x: Tensor, alphas_cumprod: Tensor, steps: int, eta: float, draw_noise
) -> Moves:
    """Song et al. 2020 eq. 12, its sigma scaled by eta as in eq. 16."""
    timesteps = even_timesteps(len(alphas_cumprod), steps)
    for i in reversed(range(steps)):
        t = int(timesteps[i])
        alpha_bar = float(alphas_cumprod[t])
        x_0_pred, eps_pred = predict(x, t, alpha_bar)
        yield t, x, x_0_pred
        if i > 0:
            alpha_bar_prev = float(alphas_cumprod[timesteps[i - 1]])
            variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
            sigma = eta * math.sqrt(variance)
            direction = math.sqrt(1 - alpha_bar_prev - sigma**2) * eps_pred
            x = math.sqrt(alpha_bar_prev) * x_0_pred + direction
            if eta > 0:
                x = x + sigma * draw_noise()


def dpm_solver(
    predict: Predict, x: Tensor, alphas_cumprod: Tensor, steps: int, eta: float, draw_noise
) -> Moves:
    """Lu et al. 2022 algorithm 2 (2M), in y = x_t / sqrt(alpha_bar_t) = x_0 + sigma * eps, at noise
    levels evenly spaced in log sigma, so in log-SNR, from SIGMA_MAX to the schedule's smallest."""
    log_sigmas = (1 / alphas_cumprod - 1).log().numpy() / 2  # increasing in t
    start = min(math.log(SIGMA_MAX), log_sigmas[-1])
    levels = np.linspace(start, log_sigmas[0], steps)
    timesteps = np.interp(levels, log_sigmas, np.arange(len(alphas_cumprod)))
    y = x * math.sqrt(1 + math.exp(2 * start))
    x_0_before = None
    for i in range(steps):
        alpha_bar = 1 / (1 + math.exp(2 * levels[i]))
        x_t = y * math.sqrt(alpha_bar)
        x_0_pred, _ = predict(x_t, float(timesteps[i]), alpha_bar)
        yield float(timesteps[i]), x_t, x_0_pred
        if i < steps - 1:
            # Second order: extrapolate x_0 to the middle of the move; levels are evenly spaced.
            middle = x_0_pred if x_0_before is None else 1.5 * x_0_pred - 0.5 * x_0_before
            shrink = math.exp(levels[i + 1] - levels[i])
            y = shrink * y + (1 - shrink) * middle
            x_0_before = x_0_pred


class Sampler(NamedTuple):
    """A sampler, and what is true of it."""

    run: Callable[..., Moves]
    deterministic: bool = True  # with eta = 0 the same x_T gives the same image
    takes_eta: bool = False  # else eta is 0
    at_most_T: bool = False  # it visits each timestep once at most, so steps <= T


SAMPLERS = {
    "ddpm": Sampler(ddpm, deterministic=False, at_most_T=True),
    "ddim": Sampler(ddim, takes_eta=True, at_most_T=True),
    "dpm++": Sampler(dpm_solver),
}


class SamplerError(ValueError):
    """A sampler is asked for what it cannot do: which argument, what is wrong, what to do."""

    def __init__(self, argument: str, what: str, fix: str):
        super().__init__(f"{argument} {what}; {fix}")
        self.argument, self.what, self.fix = argument, what, fix


def check_sampler(
    sampler: str, steps: int, eta: float = 0.0, num_timesteps: int | None = None
) -> None:
    """Raise SamplerError for what a sampler cannot do; num_timesteps: T, where it is known."""
    if sampler not in SAMPLERS:
        raise SamplerError("sampler", f"is {sampler!r}", f"choose of {', '.join(SAMPLERS)}")
    if steps < 1:
        raise SamplerError("steps", f"is {steps}", "give a whole number from 1")
    if num_timesteps and SAMPLERS[sampler].at_most_T and steps > num_timesteps:
        raise SamplerError("steps", f"is {steps}", f"give at most {num_timesteps} for {sampler}")
    if not 0 <= eta <= 1:
        raise SamplerError("eta", f"is {eta}", "give a number from 0 to 1")
    if eta and not SAMPLERS[sampler].takes_eta:
        takers = ", ".join(name for name, each in SAMPLERS.items() if each.takes_eta)
        raise SamplerError(
            "eta", f"is {eta}, which {sampler} does not take", f"give 0, or {takers}"
        )


def is_deterministic(sampler: str, eta: float = 0.0) -> bool:
    """The same noise gives the same image, so that one can go from image to image by its noise."""
    return SAMPLERS[sampler].deterministic and eta == 0
