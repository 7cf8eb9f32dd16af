"""A core for each thread of a step, while a CPU trains.

The threads wait for each other a thousand times in a step, spinning. Beside another process the
system moves them about, often two of them onto one core, where one spins for what the other has no
core to compute: the training falls to far below its share. `benchmarks/busy_speed.py` measures it,
and what else can be set."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import torch

# Linux's; with the others the system places threads as it likes.
get_cores, set_cores = (getattr(os, f"sched_{verb}affinity", None) for verb in ("get", "set"))


def physical_cores() -> list[set[int]]:
    """The cores that this process may use: of each the numbers that it has for the system, several
    where it runs several threads at once. Empty where the system is not Linux."""
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


def place(cores: list[set[int]]) -> None:
    """Let each thread that computes for this one, itself the first, run on a core of the list only;
    where the library of the threads is another than GNU's on Linux, nothing is done."""
    with contextlib.suppress(OSError, StopIteration, AttributeError):
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        openmp = ctypes.CDLL(next(line.split(maxsplit=5)[5] for line in lines if "libgomp" in line))

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def place_me(_) -> None:
            with contextlib.suppress(OSError):
                set_cores(0, cores[openmp.omp_get_thread_num() % len(cores)])

        openmp.GOMP_parallel(place_me, None, 0, 0)  # calls it once in every thread


@contextlib.contextmanager
def a_core_each(device: torch.device) -> Iterator[None]:
    """While this lasts each of torch's threads has a core of its own, if the device is the CPU and
    they are as many as its cores: of fewer (OMP_NUM_THREADS, several processes) nobody knows which
    to leave to others."""
    cores = physical_cores() if device.type == "cpu" else []
    if len(cores) < 2 or len(cores) != torch.get_num_threads():
        yield
        return
    place(cores)
    try:
        yield
    finally:
        place([set().union(*cores)])
