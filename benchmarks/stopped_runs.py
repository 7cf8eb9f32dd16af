"""Runs of train.py, in one process or several, stopped by SIGTERM and resumed: a part of what
`gpu.py` finds out."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from system.terminal import say
from utils import list_checkpoints

ROOT = Path(__file__).resolve().parents[1]


def stopped(commands: list[list[str]], environments: list[dict], folder: Path) -> list[int]:
    """Start the processes of a run, send SIGTERM to all when a line tells of the first steps.
    Returns their exit codes."""
    log = open(folder.with_suffix(".log"), "w")
    processes = [
        subprocess.Popen(command, env=os.environ | extra, stdout=log, stderr=log)
        for command, extra in zip(commands, environments, strict=True)
    ]
    while all(process.poll() is None for process in processes):
        time.sleep(0.2)
        if "step " in Path(log.name).read_text():
            for process in processes:
                process.send_signal(signal.SIGTERM)
            break
    codes = [process.wait() for process in processes]
    log.close()
    say(Path(log.name).read_text())
    return codes


# Two processes on one GPU, which NCCL refuses: gloo exchanges the gradients instead.
RANK = """
import sys, functools
sys.path.insert(0, {root!r})
import accelerate, cli, train
options = accelerate.InitProcessGroupKwargs
accelerate.InitProcessGroupKwargs = functools.partial(options, backend="gloo")
flags.run(train.main)
"""


def stop_and_resume(name: str, ranks: int, flags: list[str]) -> dict:
    """A run as its user starts it, in so many processes, stopped by SIGTERM, resumed. Returns what
    came of it, in the form of `gpu_parts.py`."""
    extra = [{}]
    if ranks > 1:
        port = str(20000 + os.getpid() % 20000)
        every = dict(WORLD_SIZE=str(ranks), LOCAL_RANK="0", MASTER_ADDR="localhost")
        extra = [dict(every, MASTER_PORT=port, RANK=str(rank)) for rank in range(ranks)]
    command = [sys.executable, "-c", RANK.format(root=str(ROOT)), "--experiment_name", name, *flags]
    codes = stopped([command] * ranks, extra, Path(name))
    saved = list_checkpoints(Path(name))
    facts = {"exit codes after SIGTERM": str(codes), "wanted": "143", "saved": str(len(saved))}
    if saved:
        steps = str(int(saved[0].stem[5:]) + 2)
        end = [*command, "--resume", "--num_training_steps", steps]
        facts["exit codes of the resumed run"] = str(
            [p.wait() for p in [subprocess.Popen(end, env=os.environ | e) for e in extra]]
        )
        facts["steps"] = f"stopped at {int(saved[0].stem[5:])}, ended at {steps}"
    return {"tables": [], "facts": facts}
