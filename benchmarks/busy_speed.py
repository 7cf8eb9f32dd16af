"""How fast the demo trains on a CPU that is quiet, and on one where another process is busy.

    python benchmarks/busy_speed.py
    python benchmarks/busy_speed.py --settings "" GOMP_SPINCOUNT=300000 GOMP_SPINCOUNT=3000

The first row is train.py's, each thread on a core of its own (`threads.py`). The others are without
that, by other settings of the threads (variables of the environment, several joined by commas; ""
is the first row's). Each has a process of its own, and all of them train in turn, round after
round: first alone, then beside processes that this script starts and that only compute. Run it
where nothing else does.
"""

import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import Worker, machine, measure, ratio
from benchmarks.peers import Ours, Row
from system import flags
from system.errors import UsageError
from system.flags import check_ranges, constant
from system.terminal import table
from train import DEMO, Config

SPIN = "GOMP_SPINCOUNT="
AS_TRAIN = ""  # as train.py has it
AS_IT_COMES = SPIN + "300000"  # what the library takes where nothing is said
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class BusySpeedConfig:
    """Which settings, and beside what."""

    settings: tuple[str, ...] = (  # variables of the environment; the first is compared with
        AS_TRAIN,
        AS_IT_COMES,
        SPIN + "30000",
        SPIN + "1000",
        "OMP_WAIT_POLICY=PASSIVE",
        "OMP_PROC_BIND=true",
    )
    processes: int = constant(1, least=1)  # that are busy
    rounds: int = constant(3, least=1)  # turns that every setting has
    steps: int = constant(20, least=1)  # in a turn
    img_size: int = constant(DEMO["img_size"], least=8)  # pixels of a side


class Free(Ours):
    """As train.py's step, but the threads go where the system puts them."""

    time = Row.time


def start(config: BusySpeedConfig, setting: str) -> Worker:
    """A process that trains the demo under this setting, on random images."""
    variables = dict(part.partition("=")[::2] for part in setting.split(",") if part)
    if not set(variables) <= set(VARIABLES):
        fix = f"give such as {AS_IT_COMES}; the variables are {', '.join(VARIABLES)}"
        raise UsageError("--settings", f"{setting!r} cannot be read", fix)
    before = {name: os.environ.pop(name, None) for name in VARIABLES}
    kept = {name: value for name, value in before.items() if name == "OMP_NUM_THREADS" and value}
    try:
        os.environ.update(kept | variables)
        demo = Config(**DEMO | dict(img_size=config.img_size, attributes=()))
        return Worker(Free if setting else Ours, demo, torch.device("cpu"))
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def compare(config: BusySpeedConfig) -> str:
    """Measure, and return the table."""
    check_ranges(config)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(start(config, name)) for name in config.settings}
        calls = {name: partial(worker, "time", config.steps) for name, worker in workers.items()}
        quiet = measure(calls, config.rounds)
        command = [sys.executable, "-c", "while True: pass"]
        for _ in range(config.processes):
            other = stack.enter_context(subprocess.Popen(command))
            stack.callback(other.kill)
        busy = measure(calls, config.rounds)
    first = config.settings[0]
    rows = []
    for name in config.settings:
        speeds = [median(DEMO["batch_size"] / s for s in turns[name]) for turns in (quiet, busy)]
        of_first = ratio(quiet[first], quiet[name])
        rows.append(
            [name or "train.py's", f"{speeds[0]:.1f}", f"{of_first:.1%}", f"{speeds[1]:.1f}"]
        )
    beside = f"beside {config.processes} busy"
    return table(["images/s", "quiet", "of the first row", beside], rows)


def main() -> None:
    """The command line: BusySpeedConfig's flags."""
    description = "How fast the demo trains on a CPU, alone and beside a busy process."
    config = flags.parse(BusySpeedConfig, sys.argv[1:], description)
    about_machine = machine(torch.device("cpu"))
    print(f"\n{compare(config)}\n")
    print(f"{config.rounds} rounds of {config.steps} steps, medians")
    print(about_machine)


if __name__ == "__main__":
    flags.run(main)
