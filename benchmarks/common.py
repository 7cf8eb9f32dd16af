"""What the benchmarks share: the machine's name, tables, rounds taken in turn, and rows that live
in processes of their own."""

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

import psutil
import torch


def find_device(name: str) -> torch.device:
    """The device of that name; of none, the GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def machine(device: torch.device) -> str:
    """One line: the processor or the GPU, cores, versions, date; and how busy it has been by now,
    so ask before measuring: what else it does then is in the numbers."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = [line for line in information.read_text().splitlines() if "model name" in line]
        cpu = lines[0].partition(":")[2].strip() if lines else cpu
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"
    versions = f"torch {torch.__version__}, {date.today()}"
    return f"machine: {name}, {threads}, {versions}, load before {psutil.getloadavg()[0]:.1f}"


def read_tables(text: str) -> list[dict[str, dict[str, str]]]:
    """The markdown tables in a text: row name -> column -> cell."""
    tables, columns = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = cells
            tables.append({})
        elif set(line) - set("|-: "):
            row = dict(zip(columns, cells, strict=True))
            tables[-1][" ".join(cells[: 2 if columns[1] == "steps" else 1])] = row
    return tables


def measure(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Make every call once a round, and return what each of them answered in each round.

    The calls alternate, in one order and then in the other, so that all of them share what the
    machine does besides."""
    answers = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls) if i % 2 == 0 else reversed(list(calls)):
            answers[name].append(calls[name]())
    return answers


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median over the rounds of over / under."""
    return median(a / b for a, b in zip(over, under, strict=True))


def seconds_of(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """How long a call takes, until the device is done with it; the mean of `times` in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / times


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Leave the GPU's memory to the other processes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held: of the GPU's memory, or on a CPU of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset
    # Not getrusage's where it can be helped: there a process inherits its parent's.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # which Windows lacks

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else most * 1024


class Worker:
    """An object in a process of its own, so that its memory and what it sets for the whole process
    are its own too. Calling the worker calls a method there and waits for the answer, so of several
    workers only one computes at a time.

    make: the class, or a function that returns the object; it and the arguments must pickle. As a
    context manager it ends the process."""

    def __init__(self, make: Callable, *arguments):
        context = multiprocessing.get_context("spawn")
        self.name = make.__name__
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments))
        self.process.start()
        theirs.close()
        self.receive()

    def __call__(self, method: str, *arguments):
        self.send(method, *arguments)
        return self.receive()

    def send(self, method: str, *arguments) -> None:
        """Let it begin with a method."""
        self.pipe.send((method, arguments))

    def receive(self):
        """Wait for the answer."""
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


def _serve(pipe: Connection, make: Callable, arguments: tuple) -> None:
    """What the process of a worker does, until the pipe is closed."""
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
