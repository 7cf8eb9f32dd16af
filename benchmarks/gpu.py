"""What only a GPU can tell, by one command: whether the program is right there, and how fast.

    python benchmarks/gpu.py               # half an hour on an H100, by estimate
    python benchmarks/gpu.py --toy         # every part at a size for a CPU, and on it

Each part prints its result and a verdict, and writes them into <part>.json in --out. It has a
process of its own, which ends with this one and when --minutes are over. Linux only."""

import time

STARTED = time.monotonic()  # before the slow imports
import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import speed
from dataset import sources
from system import flags
from system.device import find_device
from system.files import save_json
from system.terminal import say
from train import DEMO, Config, train
from utils import list_checkpoints, load_checkpoint

FULL = dict(img_size=64, channels=128, channel_mults=(), batch_size=128, device="cuda")
TOY = dict(img_size=8, channels=64, channel_mults=(1,), batch_size=4, device="cpu")


def measure(toy: bool, *rows: str, what: str = "training") -> list[dict]:
    """The lines of speed.py for the default network, or at toy size."""
    size = TOY | dict(rounds=1, steps=(2,)) if toy else FULL | dict(steps_per_round=8)
    return speed.run(speed.SpeedConfig(what=what, rows=rows, **size), here=toy)


def run(toy: bool, name: str, steps: int, **changes) -> dict:
    """Train on the prepared faces. Returns the last checkpoint."""
    changes = FULL | changes | dict(experiment_name=f"runs/{name}", path_to_data="synthetic")
    changes |= dict(num_training_steps=steps, log_every=max(1, steps // 4), sample_every=10**6)
    if toy:
        sources.NUM_SYNTHETIC, changes = 100, changes | TOY
    return load_checkpoint(list_checkpoints(train(Config(**changes)))[0])


def tests(toy: bool) -> tuple:
    """The tests that need a GPU."""
    command = "-m pytest -q -o addopts= -p no:cacheprovider -m gpu tests/gpu -k"
    command = [sys.executable, *command.split(), "on_the_cpu" if toy else "test"]
    code = subprocess.run(command, cwd=ROOT).returncode
    return code == 0, f"pytest ends with {code}", None


def profile(toy: bool) -> tuple:
    """Where the time of a step goes."""
    rows = measure(toy, what="profile")
    return True, f"{sum(row['ms of a step'] for row in rows):.1f} ms on the device", rows


def training(toy: bool) -> tuple:
    """Training beside diffusers' example in half precision, and Muon beside AdamW."""
    rows = measure(toy, "ours", "ours-muon", "diffusers-half", "diffusers-advised")
    times, rate = [*rows[0].values()][-1], rows[0]["% of matrix rate"]
    verdict = f"{times:.2f} of 2.5 times diffusers, {rate:.0f} of 40 % of the matrix rate"
    cost = f"Muon takes {rows[0]['images/s'] / rows[1]['images/s']:.2f} times AdamW's time"
    return times >= 2.5 and rate >= 40, f"{verdict}; {cost}", rows


def full_size(toy: bool) -> tuple:
    """The defaults of train.py, as their user runs them."""
    history = run(toy, "full_size", 4 if toy else 200, warmup_steps=10)["history"]
    (_, first), (_, last), peak = history[0], history[-1], torch.cuda.max_memory_allocated() / 1e9
    return last < first, f"loss {first:.3f} to {last:.3f}, memory up to {peak:.1f} GB", history


def resume(toy: bool) -> tuple:
    """A resumed run with dropout and AdamW beside an unbroken one, both with --deterministic."""
    changes = DEMO | dict(batch_size=128, optimizer="adamw", dropout=0.1, attributes=())
    changes |= dict(img_size=64, learning_rate=1e-3, lr_schedule="constant", deterministic=True)
    steps = 4 if toy else 40
    whole = run(toy, "whole", steps, **changes)["model"]
    run(toy, "half", steps // 2, **changes)
    half = run(toy, "half", steps, resume=True, **changes)["model"]
    most = max(float((whole[name].double() - half[name]).abs().max()) for name in whole)
    return most == 0, f"the weights differ by {most:.2g}", None


def sampling(toy: bool) -> tuple:
    """Sampling beside diffusers."""
    rows = measure(toy, what="sampling")
    return True, f"{rows[-1]['x diffusers']:.2f} times as fast as diffusers", rows


PARTS = {part.__name__: part for part in (tests, profile, training, full_size, resume, sampling)}


@dataclass(frozen=True)
class GpuConfig:
    """What to find out."""

    parts: tuple[Literal[*PARTS], ...] = tuple(PARTS)  # what to find out, in this order
    minutes: float = 30.0  # from the start of the process to its end
    out: str = "gpu"  # folder of all that the parts write
    toy: bool = False  # every part at a size for a CPU, and on it


def do_part(config: GpuConfig, name: str) -> None:
    """What the process of a part does. It and all that it starts end with the parent."""
    os.setsid()
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: parent.join() or os.killpg(0, 9), daemon=True).start()
    os.chdir(config.out)
    shutil.rmtree("runs", ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path("compiled").resolve())
    save_json(Path(f"{name}.json"), {"verdict": "failed: not finished"})
    passed, verdict, result = PARTS[name](config.toy)
    verdict = ("passed: " if passed else "failed: ") + verdict
    save_json(Path(f"{name}.json"), {"verdict": verdict, "result": result})
    say(f"{name}: {verdict}")


def main() -> None:
    """The command line: GpuConfig's flags."""
    config = flags.parse(GpuConfig, sys.argv[1:], "What only a GPU can tell, in parts.")
    find_device("cpu" if config.toy else "cuda")  # raises UsageError if there is none
    os.makedirs(config.out, exist_ok=True)
    for name in config.parts:
        part = multiprocessing.get_context("spawn").Process(target=do_part, args=(config, name))
        part.start()
        part.join(max(0, config.minutes * 60 - (time.monotonic() - STARTED)))
        if part.exitcode != 0:
            say(f"{name}: failed: {part.exitcode or 'no time left'}")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(part.pid, 9)  # and what it has left behind
        part.kill()
        part.join()


if __name__ == "__main__":
    flags.run(main)
