"""What the machine computes with: the device, its half precision, and what is set for a process."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from system.cpu import keep_freed_memory
from system.errors import ResourceError, UsageError, is_out_of_memory
from system.terminal import warn

DEVICES = ("auto", "cuda", "cpu", "mps")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")  # exists on Linux if a driver is loaded


def find_device(name: str = "auto") -> torch.device:
    """The device of that name, one of DEVICES. "auto" is a CUDA GPU if there is one, else the CPU;
    a warning names a GPU that torch cannot use. Raises UsageError if there is no such device."""
    has = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if has["cuda"] else "cpu"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if name == "cpu" and NVIDIA_DRIVER.exists() and not hidden:
            wants = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no GPU"
            what = f"torch {torch.__version__}, which is built for {wants}, cannot use the GPU here"
            fix = "update NVIDIA's driver, or install a torch that is built for it"
            warn(f"{what}, so the CPU computes. Fix: {fix}")
    if not has.get(name):
        fix = f"leave the flag out, or choose {' or '.join(kind for kind in has if has[kind])}"
        raise UsageError("--device", f"torch finds no {name} here", fix)
    return torch.device(name)


def set_up_device(device: torch.device, deterministic: bool = False) -> None:
    """Set for this process what makes training on the device fast; call it once, first.

    deterministic: the same numbers in every run on a GPU, but slower: kernels are not chosen by
    their time and add up in a fixed order, as on a CPU. Raises ResourceError for a GPU that this
    torch cannot use."""
    set_up_generation()
    if device.type != "cuda":
        return
    check_gpu(device)
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    torch.use_deterministic_algorithms(deterministic)
    import torch._inductor.config as inductor  # slow to import, and of no use elsewhere

    if hasattr(inductor, "deterministic"):
        inductor.deterministic = deterministic  # what is compiled is not chosen by its time either
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any


def set_up_generation() -> None:
    """Set for this process what makes generating images fast, without changing what is measured."""
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # a GPU times its convolutions: the shapes stay the same


def compile_network(network: nn.Module, loss: Callable[[], Tensor], **options) -> float | None:
    """Compile a network in place, and try it once forward and backward, which takes up to minutes.
    Weights, random states and gradients (None) stay as they are.

    loss: calls the network as the steps will, returns a scalar; options: of torch.compile. Returns
    the seconds it took, or, after a warning, None if the network stays uncompiled because a part of
    the compiler is missing or fails."""
    started, device = time.monotonic(), next(network.parameters()).device
    try:
        network.compile(**options)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            loss().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # compilers raise many kinds
        if is_out_of_memory(error):
            raise
        network._compiled_call_impl = None  # what `compile` has set
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        fix = "install what it lacks, such as Triton or a C compiler, or pass --no_compile"
        what = "the network is not compiled, so it is slower and needs more memory"
        warn(f"torch.compile failed ({reason}); {what}. Fix: {fix}")
        return None
    finally:
        network.zero_grad(set_to_none=True)
    return time.monotonic() - started


def check_gpu(device: torch.device) -> None:
    """Raise ResourceError for a CUDA device that this torch cannot compute on."""
    if device.type != "cuda":
        return
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        name, reason = torch.cuda.get_device_name(device), str(error).split("\n")[0]
        what = f"torch {torch.__version__} cannot compute on it ({reason})"
        fix = "install a torch that has kernels for it (before Turing: 2.10 to 2.14 for CUDA 12.6)"
        raise ResourceError(name, what, f"{fix}, or set CUDA_VISIBLE_DEVICES=''") from error


def autocast_dtype(mixed_precision: str, device: torch.device) -> torch.dtype | None:
    """The half precision to compute in, or None for float32.

    mixed_precision: "fp16", "bf16" or "no". A CPU takes bf16 for either if it has the instructions,
    else float32, as Apple's GPU does. A CUDA GPU before Ampere takes fp16 for either: it has no
    instructions for bf16, and torch.compile leaves networks in it alone."""
    if mixed_precision == "no":
        return None
    if device.type == "cuda":
        emulated = torch.cuda.get_device_capability(device) < (8, 0)
        return torch.float16 if mixed_precision == "fp16" or emulated else torch.bfloat16
    has_bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else None


def precision_note(mixed_precision: str, dtype: torch.dtype | None, device: torch.device) -> str:
    """What to say if `dtype` is not the precision that was asked for; nothing if it is."""
    asked, needs = {
        "fp16": (torch.float16, "a CUDA GPU"),
        "bf16": (torch.bfloat16, "a GPU from Ampere on, or a CPU with AVX512-BF16"),
        "no": (None, ""),
    }[mixed_precision]
    used = str(dtype or torch.float32).removeprefix("torch.")
    text = f"note: {mixed_precision} needs {needs}; training in {used} on the {device.type}"
    return "" if dtype == asked else text
