"""What tests let a process of a run do at a given moment: die, wait for a signal, fail."""

import os
import signal
import time
from pathlib import Path

import torch.distributed as dist

from diffusion import Diffusion
from system.processes import Processes


def appears(path: str, seconds: float = 60) -> None:
    """Wait until a file is there."""
    end = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


def pause() -> None:
    """Say that this process is busy, and stay so until the test says `go`."""
    Path("busy").touch()
    appears("go")


def await_signal() -> None:
    """Say that this process is busy, and stay so until it gets a signal."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    Path("busy").touch()
    os.read(read, 1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_step(after: int, rank: int, act) -> None:
    """Let this process, if it has that rank, call `act` in the forward pass that follows a step."""
    step, real_stop, real_distribute = [0], Processes.stop_after, Processes.distribute

    def stop_after(self, now, received):
        step[0] = now
        return real_stop(self, now, received)

    def distribute(self, model):
        if self.rank == rank:
            model.register_forward_pre_hook(before)
        return real_distribute(self, model)

    def before(*_):
        if step[0] == after:
            act()

    Processes.stop_after, Processes.distribute = stop_after, distribute


def in_save(act) -> None:
    """Let this process call `act` when it gives a checkpoint its name."""
    real = os.replace

    def replace(source, target):
        if Path(target).name.startswith("step_") and Path(target).suffix == ".pt":
            act()
        real(source, target)

    os.replace = replace


def in_sampling(act) -> None:
    """Let this process call `act` when it samples, but not when it tries that out at the start."""
    real = Diffusion.sample_loop

    def sample_loop(self, *arguments, steps, **options):
        if steps > 1:
            act()
        return real(self, *arguments, steps=steps, **options)

    Diffusion.sample_loop = sample_loop


def in_exchange(number: int, act) -> list[int]:
    """Let this process call `act` before the exchange of that number; a forward pass, a gradient
    and the end count as exchanges. Returns their number so far, in a list."""
    count = [0]

    def counted(real=lambda *_: None):
        def call(*arguments, **options):
            if count[0] == number:
                act()
            count[0] += 1
            return real(*arguments, **options)

        return call

    kinds = "init_process_group new_group broadcast_object_list all_gather_object all_reduce"
    for name in (*kinds.split(), "destroy_process_group"):
        setattr(dist, name, counted(getattr(dist, name)))
    real = Processes.distribute

    def distribute(self, model):
        model.register_forward_pre_hook(counted())
        next(model.parameters()).register_hook(counted())
        return real(self, model)

    Processes.distribute = distribute
    return count
