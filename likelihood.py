"""How well a network fits faces that it has not seen: its loss at each noise level, and the bits
per dimension of the variational bound (Ho et al. 2020, eq. 5): no more than these a coder built on
the network needs for a colour value, on average.

    L_T        KL(q(x_T | x_0) || N(0, 1)): what is left of the image at the end
    L_{t-1}    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), here the term of the code's t >= 1
    L_0        -log p(x_0 | x_1), in bins of one grey level (eq. 13), the term of the code's t = 0

The variance of p is the posterior's, the smaller of the paper's two choices.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import trange

from diffusion import Diffusion, draw_noise, evaluate_model, evaluating, image_generators
from images import to_x_0


class HeldOutLoss(NamedTuple):
    """What `held_out_loss` returns; each tensor float64, (number of timesteps,)."""

    timesteps: Tensor  # int64
    loss: Tensor  # the training loss at that t, mean over the draws
    bits: Tensor  # bits per dimension of the bound's term at that t, mean over the draws
    bits_variance: Tensor  # of that mean
    prior_bits: float  # L_T

    def bits_per_dim(self) -> tuple[float, float]:
        """The bound and its standard error, where `timesteps` are all of them."""
        return float(self.bits.sum()) + self.prior_bits, float(self.bits_variance.sum().sqrt())

    def bands(self, count: int = 10) -> list[float]:
        """The mean loss in `count` equal parts of the timesteps, from little noise to much."""
        return [float(part.mean()) for part in self.loss.tensor_split(min(count, len(self.loss)))]


def float64(values: Tensor) -> Tensor:
    """Values in double precision; from Apple's GPU, which has none, on the CPU."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def decoder_bits(x_0: Tensor, mean: Tensor, sigma: float | Tensor) -> Tensor:
    """-log2 of the probability of the bin of one grey level around x_0 (Ho et al. 2020 eq. 13), for
    images in [-1, 1]; the outermost bins reach to infinity. Any shape."""

    def below(edge: Tensor) -> Tensor:  # the normal distribution function
        return 0.5 * (1 + torch.erf((edge - mean) / (sigma * math.sqrt(2))))

    x_0, mean = float64(x_0), float64(mean)
    upper = torch.where(x_0 > 0.999, 1.0, below(x_0 + 1 / 255))
    lower = torch.where(x_0 < -0.999, 0.0, below(x_0 - 1 / 255))
    return -(upper - lower).clamp(min=1e-12).log2()


def terms(
    model: Callable, diffusion: Diffusion, x_0: Tensor, t: Tensor, eps: Tensor, attributes=None
) -> tuple[Tensor, Tensor]:
    """The loss and the bound's term in bits per dimension of each image at its t, (B,) float64.

    x_0, eps: (B, C, H, W); t: (B,) int64; attributes: (B, K) or None."""
    x_t = diffusion.q_sample(x_0, t, eps)
    output = evaluate_model(model, x_t, t, attributes).to(x_t.dtype)
    loss = float64((output - diffusion.target(x_0, t, eps)).square()).mean((1, 2, 3))

    alpha_bar_t = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_0_pred, _ = diffusion.x_0_and_eps(output, x_t, alpha_bar_t)
    variance = float64(diffusion.posterior_log_variance_clipped[t]).exp()
    weight = float64(diffusion.posterior_mean_coef1[t]).square() / (2 * variance)
    kl = weight * float64((x_0 - x_0_pred).square()).mean((1, 2, 3)) / math.log(2)
    sigma = variance.sqrt().view(-1, 1, 1, 1)
    decoder = decoder_bits(x_0, x_0_pred, sigma).mean((1, 2, 3))
    return loss, torch.where(t.to(kl.device) == 0, decoder, kl)


def held_out_loss(
    model: Callable,
    diffusion: Diffusion,
    images: np.ndarray,
    attributes: np.ndarray,
    timesteps: Tensor | None = None,
    draws: int = 16,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    show: bool = False,
) -> HeldOutLoss:
    """The loss at each of `timesteps` (None: at all), over `draws` images each, taken in turn.

    images: (N, S, S, 3) uint8; attributes: (N, K), K may be 0; dtype: half precision to run in, or
    None; show: a progress bar. The image and the noise of a draw follow from its number alone: two
    calls agree bit for bit, and two networks are measured on the same."""
    device = diffusion.device
    timesteps = torch.arange(diffusion.num_timesteps) if timesteps is None else timesteps
    all_t = timesteps.repeat_interleave(draws)
    losses, bits = [], []
    for start in trange(0, len(all_t), batch_size, desc="held-out loss", disable=not show):
        t = all_t[start : start + batch_size].to(device)
        numbers = range(start, start + len(t))
        indices = np.arange(start, start + len(t)) % len(images)
        pixels = torch.from_numpy(images[indices])
        x_0 = to_x_0(pixels, getattr(model, "image_channels", 3)).to(device, diffusion.dtype)
        eps = draw_noise(x_0.shape, image_generators(0, numbers), device, x_0.dtype)
        chosen = torch.from_numpy(attributes[indices]).to(device) if attributes.shape[1] else None
        autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
        with torch.no_grad(), evaluating(model), autocast:
            batch = terms(model, diffusion, x_0, t, eps, chosen)
        losses.append(batch[0].cpu())
        bits.append(batch[1].cpu())
    loss, bits = (torch.cat(part).view(len(timesteps), draws) for part in (losses, bits))
    variance = bits.var(1) / draws if draws > 1 else torch.full((len(bits),), math.nan)
    return HeldOutLoss(
        timesteps, loss.mean(1), bits.mean(1), variance, prior_bits(diffusion, images)
    )


def loss_at_all_t(
    model: Callable,
    diffusion: Diffusion,
    images: np.ndarray,
    attributes: np.ndarray,
    draws: int,
    show: bool = False,
) -> HeldOutLoss:
    """`held_out_loss` at every t. The first hundredth of them, those with least noise, have 16
    times as many draws: nearly all of the variance of the bits per dimension is theirs."""
    T = diffusion.num_timesteps
    parts = torch.arange(T).tensor_split([max(1, T // 100)])
    options = dict(images=images, attributes=attributes, show=show)
    losses = [
        held_out_loss(model, diffusion, timesteps=part, draws=times * draws, **options)
        for part, times in zip(parts, (16, 1), strict=True)
    ]
    *tensors, prior_bits = zip(*losses, strict=True)
    return HeldOutLoss(*map(torch.cat, tensors), prior_bits[0])


def prior_bits(diffusion: Diffusion, images: np.ndarray) -> float:
    """L_T in bits per dimension, over the first 256 images."""
    alpha_bar = float(diffusion.alphas_cumprod[-1])
    x_0 = to_x_0(torch.from_numpy(np.array(images[:256]))).double()
    kl = alpha_bar * x_0.square().mean() - alpha_bar - math.log1p(-alpha_bar)
    return float(kl) / 2 / math.log(2)
