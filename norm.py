"""Group normalisation and SiLU in one, for a CPU.

Convolutions on a CPU are fastest on channels_last pictures, where PyTorch's own group norm is many
times slower than on contiguous ones. Here the sums it needs are products with a row of ones, which
the matrix units do for next to nothing, and what is left is one pass over the pictures for each of
x * scale + shift, SiLU, and their derivatives.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def column_sums(rows: Tensor) -> Tensor:
    """Sum (B, N, C) over N: (B, C), float32 at least.

    A product in bfloat16 is rounded to 8 bits, so up to 16 parts are summed apart and added up in
    float32: the rounding errors average out."""
    b, n, c = rows.shape
    parts = math.gcd(n, 16)
    ones = rows.new_ones(1, 1, n // parts).expand(b * parts, 1, n // parts)
    sums = torch.bmm(ones, rows.reshape(b * parts, n // parts, c)).view(b, parts, c)
    return sums.to(torch.promote_types(rows.dtype, torch.float32)).sum(dim=1)


class GroupNormSiLU(torch.autograd.Function):
    """silu(group_norm(x)), or group_norm(x) alone, of channels_last pictures (Wu and He 2018)."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu):
        b, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(b, h * w, c)  # a view
        count = h * w * c // groups

        def group_mean(sums: Tensor) -> Tensor:  # (B, C) -> the mean of the group of each channel
            return sums.view(b, groups, -1).sum(2).div(count).repeat_interleave(c // groups, dim=1)

        mean = group_mean(column_sums(rows))
        variance = group_mean(column_sums(rows * rows)) - mean * mean
        rstd = (variance.clamp(min=0) + eps).rsqrt()
        scale = rstd * weight
        shift = bias - mean * scale
        z = torch.addcmul(shift[:, None].to(x.dtype), rows, scale[:, None].to(x.dtype))
        ctx.save_for_backward(rows, z, mean, rstd, weight)
        ctx.group_mean, ctx.silu = group_mean, silu
        y = F.silu(z) if silu else z
        return y.view(b, h, w, c).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, z, mean, rstd, weight = ctx.saved_tensors
        b, c, h, w = grad.shape
        dz = grad.permute(0, 2, 3, 1).reshape(b, h * w, c)
        if ctx.silu:
            dz = torch.ops.aten.silu_backward(dz, z)
        sum_dz = column_sums(dz)
        sum_dz_xhat = (column_sums(dz * rows) - mean * sum_dz) * rstd
        # dx = rstd * (weight * dz - mean of it - xhat * mean of (it * xhat)), gathered by factors.
        p, q = ctx.group_mean(weight * sum_dz), ctx.group_mean(weight * sum_dz_xhat)
        of_dz, of_x = rstd * weight, -rstd * rstd * q
        constant = -rstd * p - mean * of_x
        of_dz, of_x, constant = (f[:, None].to(dz.dtype) for f in (of_dz, of_x, constant))
        dx = torch.addcmul(constant, rows, of_x).addcmul_(dz, of_dz)
        dx = dx.view(b, h, w, c).permute(0, 3, 1, 2)
        return dx, sum_dz_xhat.sum(0), sum_dz.sum(0), None, None, None
