"""What the benchmarks share: the name of the machine, calls that alternate, processes."""

import contextlib
import multiprocessing
import os
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch

DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def machine(device: torch.device) -> str:
    """One line: the processor or GPU, cores, versions, date and the load. Call it before measuring,
    because the load shows what else the machine was doing."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif information.is_file():
        lines = [line for line in information.read_text().splitlines() if "model name" in line]
        name = lines[0].partition(":")[2].strip() if lines else name
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"machine: {name}, {threads}, torch {torch.__version__}, {date.today()}{load}"


def measure(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Make every call once in each round. Returns the answers of each call.

    The calls alternate, in one order and then in the other, so that whatever else the machine does
    slows all of them alike."""
    answers = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls) if i % 2 == 0 else reversed(list(calls)):
            answers[name].append(calls[name]())
    return answers


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median over the rounds of over / under."""
    return median(a / b for a, b in zip(over, under, strict=True))


def seconds_of(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """The seconds of a call until the device has finished: the mean of `times` calls in a row. Then
    it returns unused GPU memory, so that other processes can use it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    seconds = (time.perf_counter() - start) / times
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return seconds


class Worker:
    """An object in a process of its own, so that its memory and its settings of the process affect
    nothing else. Calling the worker calls a method of the object and waits for the answer, so only
    one of several workers computes at a time.

    make: the class, or a function that returns the object; it and its arguments must pickle. A
    context manager, which ends the process. Raises RuntimeError with the traceback of the process
    if it fails."""

    def __init__(self, make: Callable, *arguments):
        context = multiprocessing.get_context("spawn")
        self.name = make.__name__
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments))
        self.process.start()
        theirs.close()
        self._receive()

    def __call__(self, method: str, *arguments):
        self.pipe.send((method, arguments))
        return self._receive()

    def _receive(self):
        try:
            good, answer = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process of {self.name} died") from None
        if not good:
            raise RuntimeError(f"in the process of {self.name}:\n{answer}")
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.pipe.close()
        self.process.join()


class Local(contextlib.nullcontext):
    """A `Worker` without a process of its own, for tests."""

    def __init__(self, make: Callable, *arguments):
        self.made = make(*arguments)
        super().__init__(self)

    def __call__(self, method: str, *arguments):
        return getattr(self.made, method)(*arguments)


def _serve(pipe: Connection, make: Callable, arguments: tuple) -> None:
    """What the process of a worker does until the pipe is closed."""
    try:
        made = make(*arguments)
        answer = None
        while True:
            pipe.send((True, answer))
            method, arguments = pipe.recv()
            answer = getattr(made, method)(*arguments)
    except EOFError:
        pass
    except Exception:
        pipe.send((False, traceback.format_exc()))
