"""What the machine computes with: memory that is kept, half precision that it has."""

import contextlib
import ctypes

import torch


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that are freed, for the next use. As it is, each tensor
    of a step is given back to the system and handed out anew page by page, a tenth of a CPU's
    step."""
    with contextlib.suppress(OSError, AttributeError):  # another system or C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def autocast_dtype(mixed_precision: str, device: torch.device) -> torch.dtype | None:
    """The half precision to compute in, or None for float32.

    mixed_precision: "fp16", "bf16" or "no". A CPU takes bf16 for either where it has the
    instructions for it, and else float32."""
    if mixed_precision == "no":
        return None
    if device.type == "cuda":
        return torch.float16 if mixed_precision == "fp16" else torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
