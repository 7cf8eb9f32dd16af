"""Group normalisation of bfloat16 images on a CPU, in channels_last.

Convolutions are fastest in that format, but PyTorch's own kernels of this norm are several times
slower in bfloat16 than in float32: backwards, and forwards too on images of fewer than 1,024
pixels. So small images pass through float32, and large ones get a backward of their own: sums over
the pixels, and two passes over the image.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.group_norm (Wu and He 2018), but faster.

    x: (B, C, H, W) bfloat16, channels_last, on a CPU; weight, bias: (C,). Returns x's shape."""
    if x.shape[2] * x.shape[3] < 1024:
        return F.group_norm(x.float(), groups, weight.float(), bias.float(), eps).to(x.dtype)
    return LargeGroupNorm.apply(x, groups, weight, bias, eps)


def column_sums(rows: Tensor) -> Tensor:
    """Sum (B, N, C) over N: (B, C), in float32 at least.

    A sum in bfloat16 is rounded to 8 bits: up to 16 parts are summed separately and added up in
    float32, so that the rounding errors average out."""
    parts = rows.unflatten(1, (math.gcd(rows.shape[1], 16), -1)).sum(2)
    return parts.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32))


class LargeGroupNorm(torch.autograd.Function):
    """PyTorch's forward, and a faster backward for large images."""

    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps):
        b, c, h, w = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, b, c, h * w, groups, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), where g = weight * dy, xhat = (x -
        mean) * rstd, and means are over a group; as of_dy * dy + of_x * x + constant."""
        x, mean, rstd, weight = ctx.saved_tensors
        b, c, h, w = x.shape
        dy, x = (t.permute(0, 2, 3, 1).reshape(b, h * w, c) for t in (grad, x))  # x's is a view
        # From here on values of a group are (B, groups, 1), of a channel (B, groups, C / groups).
        mean, rstd = mean[:, :, None], rstd[:, :, None]
        shape = (b, mean.shape[1], -1)
        sum_dy, sum_dy_x = column_sums(dy).view(shape), column_sums(dy * x).view(shape)
        sum_dy_xhat = (sum_dy_x - mean * sum_dy) * rstd
        weight = weight.view(1, *shape[1:])
        count = x.numel() // mean.numel()
        of_mean, of_xhat = (
            (weight * sums).sum(2, keepdim=True) / count for sums in (sum_dy, sum_dy_xhat)
        )
        of_x = -rstd * rstd * of_xhat
        constant = -rstd * of_mean - mean * of_x
        # In rows of several pixels: those of 48 channels, say, do not fill the vector registers.
        pixels = math.gcd(h * w, 16)
        of_dy, of_x, constant = (
            factor.expand(sum_dy.shape).reshape(b, 1, c).repeat(1, 1, pixels).to(x.dtype)
            for factor in (rstd * weight, of_x, constant)
        )
        dy, x = (t.view(b, -1, pixels * c) for t in (dy, x))
        dx = torch.addcmul(constant, x, of_x).addcmul_(dy, of_dy)
        dx = dx.view(b, h, w, c).permute(0, 3, 1, 2)
        return dx, None, sum_dy_xhat.sum(0).view(c), sum_dy.sum(0).view(c), None
