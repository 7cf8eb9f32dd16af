"""A network that is known exactly, to compare samplers with."""

import math

import numpy as np
import torch
from torch import nn

from diffusion import Diffusion


def alpha_bar_at(diffusion: Diffusion, t: torch.Tensor) -> float:
    """The share of the image's variance at a t that may lie between two timesteps."""
    log_sigmas = (1 / diffusion.schedule - 1).log().numpy() / 2
    at = np.interp(float(t[0]), np.arange(len(log_sigmas)), log_sigmas)
    return 1 / (1 + math.exp(2 * at))


class Gaussian(nn.Module):
    """The exact network for images whose pixels are normal with this mean and deviation."""

    def __init__(self, diffusion: Diffusion, mean: float = 0.1, deviation: float = 0.2):
        super().__init__()
        self.diffusion, self.mean, self.deviation = diffusion, mean, deviation
        self.times = []  # of its evaluations

    def forward(self, x_t, t, attributes=None):
        self.times.append(float(t[0]))
        alpha_bar = alpha_bar_at(self.diffusion, t)
        gain = alpha_bar * self.deviation**2 / (alpha_bar * self.deviation**2 + 1 - alpha_bar)
        x_0 = self.mean + gain * (x_t / math.sqrt(alpha_bar) - self.mean)
        return (x_t - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)
