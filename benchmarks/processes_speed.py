"""How fast the demo trains in several processes on a CPU, beside one process of as many threads,
and what the exchange of the gradients takes of it.

    python benchmarks/processes_speed.py
    python benchmarks/processes_speed.py --processes 4 --batch_size 64

Both train on as many images in a step and in turn, round after round. The several start a turn
together, and it is over when the last of them is done. Run it where nothing else does.
"""

import os
import socket
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import Worker, machine, measure, ratio, seconds_of
from benchmarks.peers import Ours
from system import flags
from system.flags import check_ranges, constant
from system.processes import Processes
from system.terminal import table
from train import DEMO, Config, train_step

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ProcessesSpeedConfig:
    """What to train, in how many processes."""

    processes: int = constant(2, least=2)  # of one thread each
    batch_size: int = constant(DEMO["batch_size"], least=1)  # images in a step of all
    img_size: int = constant(DEMO["img_size"], least=8)  # pixels of a side
    rounds: int = constant(5, least=1)  # turns that each has
    steps: int = constant(10, least=1)  # in a turn


class Part(Ours):
    """One of several processes that train together; alone it is a run of its own."""

    def join(self) -> None:
        """Join the others."""
        self.processes = Processes(CPU)
        self.forward = self.processes.distribute(self.network)

    def time_steps(self, steps: int, exchange: bool) -> float:
        """Seconds for a step, with the gradients exchanged or not."""
        of_rank = self.dtype, self.processes.rank, self.processes.world_size

        def step() -> None:
            train_step(
                self.config, self.state, self.diffusion, self.batches, self.forward, *of_rank
            )

        with nullcontext() if exchange else self.forward.no_sync():
            step()
            return seconds_of(step, CPU, steps)


class Together:
    """Several workers that do the same thing at the same time."""

    def __init__(self, stack: ExitStack, config: Config, count: int):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            variables = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(found.getsockname()[1]))
        self.workers = []
        for rank in range(count):
            ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
            variables |= {name: str(value) for name, value in ranks.items()}
            with patch.dict(os.environ, variables, OMP_NUM_THREADS="1"):
                self.workers.append(stack.enter_context(Worker(Part, config, CPU)))
        self("join")

    def __call__(self, *method) -> list:
        for worker in self.workers:
            worker.send(*method)
        return [worker.receive() for worker in self.workers]

    def slowest(self, *method) -> float:
        """The largest of their answers."""
        return max(self(*method))


def compare(config: ProcessesSpeedConfig) -> str:
    """Measure, and return the table."""
    check_ranges(config)
    count = config.processes
    images = max(1, config.batch_size // count) * count
    of_demo = Config(**DEMO | dict(img_size=config.img_size, attributes=()))
    with ExitStack() as stack:
        with patch.dict(os.environ, OMP_NUM_THREADS=str(count)):
            one = stack.enter_context(Worker(Ours, replace(of_demo, batch_size=images), CPU))
        together = Together(stack, replace(of_demo, batch_size=images // count), count)
        weights = one("about")["weights"]
        rows = {
            f"1 process, {count} threads": partial(one, "time", config.steps),
            f"{count} processes": partial(together.slowest, "time_steps", config.steps, True),
            "without an exchange": partial(together.slowest, "time_steps", config.steps, False),
        }
        seconds = measure(rows, config.rounds)
    first, exchanging, without = seconds.values()
    cells = [
        [name, f"{median(images / s for s in turns):.1f}", f"{ratio(first, turns):.2f}"]
        for name, turns in seconds.items()
    ]
    takes = median(a - b for a, b in zip(exchanging, without, strict=True))
    share = 1 - ratio(without, exchanging)
    text = f"the exchange of {4 * weights / 1e6:.1f} MB takes {takes * 1e3:.1f} ms, {share:.1%}"
    return table(["row", "images/s", "x first row"], cells) + f"\n\n{text} of a step"


def main() -> None:
    """The command line: ProcessesSpeedConfig's flags."""
    description = "How fast the demo trains in several processes, beside one of several threads."
    config = flags.parse(ProcessesSpeedConfig, sys.argv[1:], description)
    about_machine = machine(CPU)
    print(f"\n{compare(config)}")
    print(f"{config.rounds} rounds of {config.steps} steps, medians")
    print(about_machine)


if __name__ == "__main__":
    flags.run(main)
