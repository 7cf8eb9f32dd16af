"""What makes training on a CPU fast: operations in the form that is fastest there, memory that is
kept, and a core for each thread. On other devices the operations are PyTorch's own.
"""

import contextlib
import ctypes
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Linux only; other systems place threads themselves.
get_cores, set_cores = (getattr(os, f"sched_{verb}affinity", None) for verb in ("get", "set"))


# Operations of the network ------------------------------------------------------------------------


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.group_norm of (B, C, H, W), faster for bfloat16 in channels_last on a CPU.

    PyTorch's kernels are several times slower there in bfloat16 than in float32: backwards, and
    also forwards on images of fewer than 1,024 pixels. So small images pass through float32, and
    large ones get a backward of their own."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.bfloat16
    if not on_cpu or not x.is_contiguous(memory_format=torch.channels_last):
        return F.group_norm(x, groups, weight, bias, eps)
    if x.shape[2] * x.shape[3] < 1024:
        return F.group_norm(x.float(), groups, weight.float(), bias.float(), eps).to(x.dtype)
    return LargeGroupNorm.apply(x, groups, weight, bias, eps)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """F.scaled_dot_product_attention of (B, heads, N, head_dim), faster for bfloat16 on a CPU: the
    backward of the fused kernel is slow there, and plain products are twice as fast."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, N)
        return weights.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def upsample(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Repeat each pixel of (B, C, H, W) 2 x 2 times, then apply a 3x3 convolution.

    A 3x3 window on repeated pixels sees only 2 x 2 different ones. So both steps together are a
    transposed convolution with a 4x4 kernel: four products for a pixel instead of nine. That is
    faster for float32 on a CPU, and slower for bfloat16."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    weight = F.pad(conv.weight.flip(2, 3), (1, 1, 1, 1))
    weight = F.avg_pool2d(weight, 2, stride=1, divisor_override=1).transpose(0, 1)
    # The bias is added separately: inside, its gradient makes the backward 1.4 times as long.
    return F.conv_transpose2d(x, weight, stride=2, padding=1).add_(conv.bias[:, None, None])


def newton_schulz(matrices: Sequence[Tensor], a: float, b: float, c: float) -> list[Tensor]:
    """Five times x <- q x with q = a + b x x^T + c (x x^T)^2, of wide matrices in full precision.

    All q are polynomials of the first x x^T and commute: the next x x^T is q (x x^T) q, and only
    the product of all q meets x. These are far fewer products, and small ones, so those of all
    matrices with as many rows are one call. They must be exact, which a GPU's TF32 is not."""
    results = list(matrices)
    for rows in {len(x) for x in matrices}:
        places = [i for i, x in enumerate(matrices) if len(x) == rows]
        gram = torch.stack([matrices[i] @ matrices[i].T for i in places])  # (count, rows, rows)
        product = None
        for step in range(5):
            q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            q.diagonal(dim1=1, dim2=2).add_(a)
            product = q @ product if step else q
            gram = q @ gram @ q if step < 4 else gram
        for i, one in zip(places, product, strict=True):
            results[i] = one @ matrices[i]
    return results


def column_sums(rows: Tensor) -> Tensor:
    """Sum (B, N, C) over N: (B, C), in float32 at least.

    A sum in bfloat16 is rounded to 8 bits: up to 16 parts are summed separately and added in
    float32, so that rounding errors average out."""
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
        # Values of a group have the shape (B, groups, 1), of a channel (B, groups, C / groups).
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
        # Rows of several pixels, because the channels of one may not fill the vector registers.
        pixels = math.gcd(h * w, 16)
        of_dy, of_x, constant = (
            factor.expand(sum_dy.shape).reshape(b, 1, c).repeat(1, 1, pixels).to(x.dtype)
            for factor in (rstd * weight, of_x, constant)
        )
        dy, x = (t.view(b, -1, pixels * c) for t in (dy, x))
        dx = torch.addcmul(constant, x, of_x).addcmul_(dy, of_dy)
        dx = dx.view(b, h, w, c).permute(0, 3, 1, 2)
        return dx, None, sum_dy_xhat.sum(0).view(c), sum_dy.sum(0).view(c), None


# Memory and threads -------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next use. By default it returns the memory of
    each tensor to the system and asks for it again, which costs a tenth of a step on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another system or C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate block for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def physical_cores() -> list[set[int]]:
    """The cores that this process may use, each as the set of its hardware threads' numbers. Empty
    if the system is not Linux."""
    if get_cores is None:
        return []
    allowed, cores = get_cores(0), []
    for number in sorted(allowed):
        path = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        core = {number}
        with contextlib.suppress(OSError, ValueError):
            for span in path.read_text(encoding="utf-8").split(","):  # such as 0,64 or 0-1
                first, _, last = span.partition("-")
                core |= set(range(int(first), int(last or first) + 1)) & allowed
        if core not in cores:
            cores.append(core)
    return cores


def place_threads(cores: list[set[int]]) -> None:
    """Pin torch's OpenMP threads to one core each. Does nothing without GNU's libgomp."""
    with contextlib.suppress(OSError, StopIteration, AttributeError):
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        openmp = ctypes.CDLL(next(line.split(maxsplit=5)[5] for line in lines if "libgomp" in line))

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def place(_) -> None:
            with contextlib.suppress(OSError):
                set_cores(0, cores[openmp.omp_get_thread_num() % len(cores)])

        openmp.GOMP_parallel(place, None, 0, 0)  # calls it once in every thread


@contextlib.contextmanager
def pinned_threads(device: torch.device) -> Iterator[None]:
    """Pin each of torch's threads to its own core, if the device is the CPU and there are as many
    threads as cores.

    The threads wait for each other a thousand times in a step, spinning. Beside another process the
    system often moves two of them onto one core, where one spins while the other has no core."""
    cores = physical_cores() if device.type == "cpu" else []
    if len(cores) < 2 or len(cores) != torch.get_num_threads():
        yield
        return
    place_threads(cores)
    try:
        yield
    finally:
        place_threads([set().union(*cores)])
