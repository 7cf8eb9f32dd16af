"""The samplers: functions of one form, and SAMPLERS, the table of what is true of each.

A sampler goes through a list of noise levels, from noise to an image. It evaluates the network at
each level but the last, which it leads to, yields (t, x_t, x_0_pred) after each evaluation, and
returns x at the last level. It is given

    predict(x_t, t, alpha_bar_t)   one evaluation of the network: (x_0_pred, eps_pred); t may be a
                                   fraction, between two timesteps
    x                              (B, C, H, W), x_t at the first level: noise, at the beginning
    levels                         `Level`s, each with less noise than the one before
    eta                            how much noise is added on the way: 0 none, 1 as much as by DDPM
    draw_noise()                   noise of x's shape

As it may begin and end at any level, and as all that it knows of the image comes from `predict`,
`resampled` and `keep_known` make a sampler that repairs images of any of them.

DDPM: Ho et al. 2020. Respacing: Nichol and Dhariwal 2021. DDIM: Song et al. 2020. DPM-Solver++ 2M:
Lu et al. 2022. Repair: Lugmayr et al. 2022, "RePaint". To add one: write the function, enter it in
SAMPLERS.
"""

import math
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

VERSION = 2  # raised where the same noise gives another image, so that evaluations do not mix them
SIGMA_MAX = 80.0  # where DPM-Solver++ starts: with more noise x_t holds nothing of the image


class Level(NamedTuple):
    """How much noise there is in x_t."""

    t: float
    alpha_bar: float  # the share of the image's variance that is left


IMAGE = Level(-1, 1.0)  # without noise: what all ways lead to

Predict = Callable[[Tensor, float, float], tuple[Tensor, Tensor]]
Moves = Generator[tuple[float, Tensor, Tensor], None, Tensor]


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0), Ho et al. 2020 eq. 6 and 7."""

    variance: Tensor  # 0 at the first timestep
    mean_coef1: Tensor  # of x_0
    mean_coef2: Tensor  # of x_t


def make_posterior(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Posterior:
    """The posterior of moves, each from a level to one with less noise: tables, or two numbers."""
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
    """The last of the timesteps, `steps` evenly spaced ones in all, and the image.

    alphas_cumprod: (n,) float64, on the CPU: the noise schedule, or its first n timesteps."""
    timesteps = even_timesteps(len(alphas_cumprod), steps).flip(0)
    return [*map(Level, timesteps.tolist(), alphas_cumprod[timesteps].tolist()), IMAGE]


def even_in_log_sigma(alphas_cumprod: Tensor, steps: int) -> list[Level]:
    """The same, evenly spaced in log sigma, so in log-SNR, from SIGMA_MAX at most to the schedule's
    smallest; sigma is the noise in x_t / sqrt(alpha_bar_t) = x_0 + sigma * eps."""
    log_sigmas = (1 / alphas_cumprod - 1).log().numpy() / 2  # increasing in t
    chosen = np.linspace(min(math.log(SIGMA_MAX), log_sigmas[-1]), log_sigmas[0], steps)
    timesteps = np.interp(chosen, log_sigmas, np.arange(len(alphas_cumprod)))
    return [*map(Level, timesteps.tolist(), (1 / (1 + np.exp(2 * chosen))).tolist()), IMAGE]


def put_noise(x_0: Tensor, level: Level, eps: Tensor) -> Tensor:
    """x_t at a level, of an image and this noise: Ho et al. 2020 eq. 4."""
    return math.sqrt(level.alpha_bar) * x_0 + math.sqrt(1 - level.alpha_bar) * eps


# The samplers ------------------------------------------------------------------------------------


def ddpm(predict: Predict, x: Tensor, levels: Sequence[Level], eta: float, draw_noise) -> Moves:
    """Ho et al. 2020 algorithm 2, with the posterior's variance, on a subset of the timesteps."""
    for here, there in pairwise(levels):
        x_0_pred, _ = predict(x, *here)
        yield here.t, x, x_0_pred
        posterior = make_posterior(here.alpha_bar, there.alpha_bar)
        x = posterior.mean_coef1 * x_0_pred + posterior.mean_coef2 * x
        if posterior.variance > 0:
            x = x + math.sqrt(posterior.variance) * draw_noise()
    return x


def ddim(predict: Predict, x: Tensor, levels: Sequence[Level], eta: float, draw_noise) -> Moves:
    """Song et al. 2020 eq. 12, its sigma scaled by eta as in eq. 16."""
    for here, there in pairwise(levels):
        x_0_pred, eps_pred = predict(x, *here)
        yield here.t, x, x_0_pred
        sigma = eta * math.sqrt(make_posterior(here.alpha_bar, there.alpha_bar).variance)
        direction = math.sqrt(1 - there.alpha_bar - sigma**2) * eps_pred
        x = math.sqrt(there.alpha_bar) * x_0_pred + direction
        if sigma > 0:
            x = x + sigma * draw_noise()
    return x


def dpm_solver(
    predict: Predict, x: Tensor, levels: Sequence[Level], eta: float, draw_noise
) -> Moves:
    """DPM-Solver++ 2M (Lu et al. 2022), in y = x_t / sqrt(alpha_bar_t), at levels that are evenly
    spaced in log sigma.

    From each level on x_0 is taken for the straight line in log sigma through the last two
    predictions, and dy / dlog(sigma) = y - x_0 is solved exactly (diffusers: solver_type="heun"):
    in few, wide moves better than a constant x_0, the one in the middle of the move."""
    y, x_0_before = x / math.sqrt(levels[0].alpha_bar), None
    for here, there in pairwise(levels):
        x_t = y * math.sqrt(here.alpha_bar)
        x_0_pred, _ = predict(x_t, *here)
        yield here.t, x_t, x_0_pred
        shrink = sigma_of(there) / sigma_of(here)
        y = shrink * y + (1 - shrink) * x_0_pred
        if x_0_before is not None and there != IMAGE:  # the move to the image has no width
            y = y + (1 + (1 - shrink) / math.log(shrink)) * (x_0_pred - x_0_before)
        x_0_before = x_0_pred
    return y * math.sqrt(levels[-1].alpha_bar)


def sigma_of(level: Level) -> float:
    """The noise in x_t / sqrt(alpha_bar_t)."""
    return math.sqrt(1 / level.alpha_bar - 1)


# Repair ------------------------------------------------------------------------------------------


def keep_known(predict: Predict, image: Tensor, mask: Tensor) -> Predict:
    """`predict`, but what is known of the image stands in x_0_pred: where mask, bool, is False.

    There x_t is then, by any sampler, the image with noise, as RePaint has it (eq. 8a), and the
    last x_0_pred is the image itself."""

    def predict_the_rest(x_t: Tensor, t: float, alpha_bar_t: float) -> tuple[Tensor, Tensor]:
        x_0_pred = torch.where(mask, predict(x_t, t, alpha_bar_t)[0], image)
        return x_0_pred, (x_t - math.sqrt(alpha_bar_t) * x_0_pred) / math.sqrt(1 - alpha_bar_t)

    return predict_the_rest


def resampled(
    run: Callable[..., Moves],
    predict: Predict,
    x: Tensor,
    levels: Sequence[Level],
    eta: float,
    draw_noise,
    times: int,
) -> Moves:
    """Go the way in short stretches, each of them `times` times: x is noised again in between, and
    so the generated part comes to fit the known one (RePaint, section 4.2 and algorithm 1).

    A stretch is a 25th of the steps, as the paper's 10 of 250; the whole way where times is 1."""
    steps = len(levels) - 1
    stretch = steps if times == 1 else max(1, round(steps / 25))
    for start in range(0, steps, stretch):
        part = levels[start : start + stretch + 1]
        for left in reversed(range(times)):
            x = yield from run(predict, x, part, eta, draw_noise)
            if left:
                kept = part[0].alpha_bar / part[-1].alpha_bar
                x = math.sqrt(kept) * x + math.sqrt(1 - kept) * draw_noise()
    return x


# The table ---------------------------------------------------------------------------------------


class Sampler(NamedTuple):
    """A sampler, and what is true of it."""

    run: Callable[..., Moves]
    levels: Callable[[Tensor, int], list[Level]] = even_in_t  # that it goes through
    deterministic: bool = True  # with eta = 0 the same x_T gives the same image
    takes_eta: bool = False  # else eta is 0
    at_most_T: bool = False  # it visits each timestep once at most, so steps <= T


SAMPLERS = {
    "ddpm": Sampler(ddpm, deterministic=False, at_most_T=True),
    "ddim": Sampler(ddim, takes_eta=True, at_most_T=True),
    "dpm++": Sampler(dpm_solver, even_in_log_sigma),
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
