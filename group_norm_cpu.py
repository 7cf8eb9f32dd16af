"""Group normalisation of bfloat16 pictures on a CPU, in channels_last, where convolutions are
fastest.

There PyTorch's own kernels are fast in float32, but in bfloat16 several times slower: backwards,
and forwards too on pictures of fewer than 1,024 pixels. So small pictures pass through float32, and
large ones have a backward of their own, which is sums over the pixels and two passes over the
picture.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """What F.group_norm returns (Wu and He 2018), sooner.

    x: (B, C, H, W) bfloat16, channels_last, on a CPU; weight, bias: (C,)"""
    if x.shape[2] * x.shape[3] < 1024:
        return F.group_norm(x.float(), groups, weight.float(), bias.float(), eps).to(x.dtype)
    return GroupNorm.apply(x, groups, weight, bias, eps)


def column_sums(rows: Tensor) -> Tensor:
    """Sum (B, N, C) over N: (B, C), float32 at least.

    A sum in bfloat16 is rounded to 8 bits, so up to 16 parts are summed apart and added up in
    float32: the rounding errors average out."""
    parts = rows.unflatten(1, (math.gcd(rows.shape[1], 16), -1)).sum(2)
    return parts.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32))


class GroupNorm(torch.autograd.Function):
    """PyTorch's forward, and a backward for large pictures."""

    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps):
        b, c, h, w = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, b, c, h * w, groups, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """dx = rstd * (weight * dy - mean of it - xhat * mean of (it * xhat)), gathered by its
        factors of dy and of x; means are taken over a group."""
        x, mean, rstd, weight = ctx.saved_tensors
        b, c, h, w = x.shape
        dy, x = (t.permute(0, 2, 3, 1).reshape(b, h * w, c) for t in (grad, x))  # x's is a view
        # From here on a number of a group is (B, groups, 1), of a channel (B, groups, C / groups).
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
        of_dy, of_x, constant = (
            factor.expand(sum_dy.shape).reshape(b, 1, c).to(x.dtype)
            for factor in (rstd * weight, of_x, constant)
        )
        dx = torch.addcmul(constant, x, of_x).addcmul_(dy, of_dy)
        dx = dx.view(b, h, w, c).permute(0, 3, 1, 2)
        return dx, None, sum_dy_xhat.sum(0).view(c), sum_dy.sum(0).view(c), None
