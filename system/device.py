"""What the machine computes with: what is set for the whole process, the precision that a device
has, and whether this torch has anything for the device at all."""

import os
import re
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from system.cpu import keep_freed_memory
from system.errors import ResourceError, UsageError

# The last wheels of torch with kernels for GPUs before Turing.
OLD_GPUS = "install torch 2.10 to 2.14 in its build for CUDA 12.6"


DEVICES = ("auto", "cuda", "cpu", "mps")


def find_device(name: str = "auto") -> torch.device:
    """The device of that name, one of DEVICES. "auto" is a CUDA GPU where there is one, else the
    CPU; "mps", Apple's GPU, is for who asks for it. Raises UsageError where there is none."""
    has = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if has["cuda"] else "cpu"
    if not has.get(name):
        fix = f"leave the flag out, or choose of {', '.join(kind for kind in has if has[kind])}"
        raise UsageError("--device", f"torch finds no {name} here", fix)
    return torch.device(name)


def set_up_device(device: torch.device, deterministic: bool = False) -> None:
    """Set for this process what makes training on the device fast; called once, before anything is
    computed, by whatever trains.

    deterministic: the same numbers in every run on a GPU, at the cost of speed: kernels are neither
    chosen by their time nor add up in any order (on a CPU they never do). Raises ResourceError for
    a GPU that this torch was not built for."""
    keep_freed_memory()
    if device.type != "cuda":
        return
    check_gpu(device)
    torch.backends.cudnn.benchmark = not deterministic  # worth its time: the shapes stay the same
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    torch.use_deterministic_algorithms(deterministic)
    import torch._inductor.config as inductor  # slow to import, and of no use elsewhere

    if hasattr(inductor, "deterministic"):
        inductor.deterministic = deterministic  # what is compiled is not chosen by its time either
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any


def compile_network(network: nn.Module, loss: Callable[[], Tensor], **options) -> float:
    """Compile a network in place, and find out whether that works here: once forward and backward,
    which takes up to minutes. Weights, random states and gradients (None) stay as they are.

    loss: calls the network as the steps will, returns a scalar; options: of torch.compile. Returns
    the seconds it took. Raises ResourceError."""
    network.compile(**options)
    started, device = time.monotonic(), next(network.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            loss().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers raise many kinds
        what = f"failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        fix = "pass --no_compile, or install what it lacks, such as a C compiler"
        raise ResourceError("torch.compile", what, fix) from error
    finally:
        network.zero_grad(set_to_none=True)
    return time.monotonic() - started


def check_gpu(device: torch.device) -> None:
    """Raise ResourceError for a CUDA device that this torch has no kernels for. Without this the
    first kernel is a traceback."""
    built = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))
    if device.type != "cuda" or not built:  # AMD's have other names
        return
    has = torch.cuda.get_device_capability(device)
    for kind, major, minor in built:
        # Kernels run on what is newer of the same generation, intermediate code on all newer ones.
        least = int(major), int(minor)
        if least <= has and (kind == "compute" or least[0] == has[0]):
            return
    oldest = min((int(major), int(minor)) for _, major, minor in built)
    name, number = torch.cuda.get_device_name(device), ".".join(map(str, has))
    what = f"torch {torch.__version__} has no kernels for its compute capability, {number}"
    fix = OLD_GPUS if has < oldest else "install a newer torch"
    raise ResourceError(name, what, f"{fix}; or hide the GPU: CUDA_VISIBLE_DEVICES=''")


def autocast_dtype(mixed_precision: str, device: torch.device) -> torch.dtype | None:
    """The half precision to compute in, or None for float32.

    mixed_precision: "fp16", "bf16" or "no". A CPU takes bf16 for either where it has the
    instructions for it, and else float32, as Apple's GPU does. A CUDA GPU before Ampere takes fp16
    for either: it has no instructions for bf16, and torch.compile leaves networks in it alone."""
    if mixed_precision == "no":
        return None
    if device.type == "cuda":
        emulated = torch.cuda.get_device_capability(device) < (8, 0)
        return torch.float16 if mixed_precision == "fp16" or emulated else torch.bfloat16
    has_bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else None


def precision_note(mixed_precision: str, dtype: torch.dtype | None, device: torch.device) -> str:
    """What to say where `dtype` is not the precision that was asked for; nothing where it is."""
    asked, needs = {
        "fp16": (torch.float16, "a CUDA GPU"),
        "bf16": (torch.bfloat16, "a GPU from Ampere on, or a CPU with AVX512-BF16"),
        "no": (None, ""),
    }[mixed_precision]
    used = str(dtype or torch.float32).removeprefix("torch.")
    text = f"note: {mixed_precision} needs {needs}; training in {used} on the {device.type}"
    return "" if dtype == asked else text
