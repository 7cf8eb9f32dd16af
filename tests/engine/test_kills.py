"""A run is killed wherever a kill can matter, resumed, and compared with one that never stopped:
weights, average, optimizer and loss scale are equal, bit for bit.

A kill leaves the files as they are, and nothing else. So it suffices to copy a run's folder before
each of its effects on files and in the middle of each write, and to resume each copy. `watch` finds
all of them, because Python's own version of `open`, in `_pyio`, calls a function of `os` for each.
"""

import _pyio
import builtins
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import STATE, assert_same_state, final, in_fork, tiny
from matplotlib.figure import Figure

import engine
import train as train_module
import utils
from system import files, processes
from train import Config, train

STEPS = 3  # the second checkpoint is removed when the third is saved; the first one guides
SHORT = dict(num_training_steps=STEPS, log_every=STEPS, save_every=1, sample_every=STEPS)
SHORT |= dict(keep_checkpoints=1, dropout=0.5, gradient_accumulation_steps=2, resume=True)
SHORT |= dict(channels=4, head_dim=4, channel_mults=(1,), attn_resolutions=(), num_samples=1)


@pytest.fixture
def quick(here, monkeypatch):
    """The curve is a file like any other, but drawing it takes half of the time. A kill, unlike a
    power cut, loses nothing that was not synced."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: path.write_bytes(b"a curve"))
    monkeypatch.setattr(Figure, "add_subplot", lambda self, **_: Figure())
    monkeypatch.setattr(Figure, "plot", lambda self, *_: None, raising=False)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# At each effect on a file ------------------------------------------------------------------------


def watch(before) -> None:
    """Call `before(kind)` before each effect of this process on a file, and in the middle of each
    write, until the process ends. The effects of `before` itself do not count."""
    lock, inside, names = threading.RLock(), [], ("replace", "rename", "unlink", "remove", "mkdir")
    real = {name: getattr(os, name) for name in (*names, "rmdir", "fsync", "open", "write")}
    save_to_memory = torch.save

    def effect(kind: str) -> None:
        with lock:  # TensorBoard writes in a thread of its own
            if not inside:
                inside.append(kind)
                before(kind)
                inside.pop()

    def watched(kind):
        def call(*arguments, **options):
            effect(kind)
            return real[kind](*arguments, **options)

        return call

    def watched_open(path, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR):
            effect("open")
        return real["open"](path, flags, *arguments, **options)

    def watched_write(handle, data):
        effect("write")
        done = real["write"](handle, data[: len(data) // 2])
        effect("half a write")
        return done + real["write"](handle, data[done:])

    def save(state, path):  # torch writes files in C++
        whole = io.BytesIO()
        save_to_memory(state, whole)
        with open(path, "wb") as file:
            file.write(whole.getvalue())

    for kind in real:
        setattr(os, kind, watched(kind))
    os.open, os.write, torch.save = watched_open, watched_write, save
    builtins.open = io.open = _pyio.open


def contents(folder: Path) -> str:
    """A digest of a folder's names and bytes, without what is random or a time in the names."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(re.sub(r"\.\w{8}\.tmp|tfevents.*", "", path.name).encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def left_by_kills(config: Config) -> tuple[dict[str, int], list[str]]:
    """Train. Returns the effects on files, counted by kind, and copies of the folder as a kill at
    each of them would leave it, each that differs once."""
    folder, copies = Path(config.experiment_name), Path(f"{config.experiment_name}_copies")

    def work():
        seen, kinds = set(), Counter()

        def before(kind):
            kinds[kind] += 1
            if folder.is_dir() and (digest := contents(folder)) not in seen:
                shutil.copytree(folder, copies / f"{len(seen):03d}")
                seen.add(digest)

        watch(before)
        train(config)
        print(json.dumps(kinds))

    result = in_fork(work)
    assert result.returncode == 0, result.stderr
    kinds = json.loads(result.stdout.splitlines()[-1])
    return kinds, sorted(map(str, copies.iterdir()))


def assert_resumes_to(whole: dict, folder: str, config: Config) -> None:
    """What a kill has left in the folder resumes to the state of the whole run."""
    train(replace(config, experiment_name=folder))
    assert_same_state(whole, final(folder), (*STATE, "history"))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "optimizer, stride", [("adamw", 1), ("muon", 4), pytest.param("muon", 1, marks=SLOW)]
)
def test_a_run_killed_at_any_effect_on_a_file_resumes_to_the_same_end(quick, optimizer, stride):
    config = tiny(**SHORT, optimizer=optimizer)
    kinds, copies = left_by_kills(config)
    assert {"mkdir", "open", "write", "half a write", "fsync", "replace", "unlink"} <= set(kinds)
    assert sum(kinds.values()) > 120 and len(copies) > 60
    for folder in copies[::stride]:
        assert_resumes_to(final(), folder, config)


@pytest.mark.parametrize("stride", [30, pytest.param(3, marks=SLOW)])
def test_a_run_killed_again_while_it_resumes_comes_to_the_same_end(quick, stride):
    config = tiny(**SHORT, optimizer="muon")
    for first in left_by_kills(config)[1][stride // 3 :: stride]:
        _, again = left_by_kills(replace(config, experiment_name=first))
        assert_resumes_to(final(), again[len(again) // 2], config)


# At each line, and at any time -------------------------------------------------------------------

KILLED = 137
ROUNDS = 6  # a loop over tensors touches no file: its first six rounds count
TRACED = {module.__file__ for module in (train_module, utils, files, processes)}
TRACED |= {str(path) for path in Path(engine.__path__[0]).glob("*.py")}


def kill_at_line(point: int, config: Config) -> None:
    """Train, and die at the point-th line of the loop, of what it calls, and of utils.py."""
    points, seen = itertools.count(1), Counter()

    def trace(frame, kind, _):
        if frame.f_code.co_filename not in TRACED:
            return None
        if kind == "line":
            line = (frame.f_code.co_filename, frame.f_lineno)
            seen[line] += 1
            if seen[line] <= ROUNDS and next(points) == point:
                os._exit(KILLED)
        return trace

    sys.settrace(trace)
    train(config)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.slow
def test_a_run_killed_at_any_line_resumes_to_the_same_end(quick, optimizer):
    train(tiny(**SHORT, optimizer=optimizer, experiment_name="whole"))
    config = tiny(**SHORT, optimizer=optimizer)
    for point in itertools.count(1):
        shutil.rmtree("run", ignore_errors=True)
        code = in_fork(lambda point=point: kill_at_line(point, config)).returncode
        if code == 0:  # it ended before that line
            break
        assert code == KILLED, point
        assert_resumes_to(final("whole"), "run", config)
    assert point > 800


@pytest.mark.parametrize("times, steps", [(3, 8), pytest.param(40, 40, marks=SLOW)])
def test_a_process_killed_at_random_times_comes_to_the_same_end(here, times, steps):
    config = tiny(**SHORT | {"num_training_steps": steps, "log_every": 1})
    started = time.monotonic()
    train(replace(config, experiment_name="whole"))
    seconds = time.monotonic() - started
    kills, draw = 0, random.Random(0)
    while kills < times:
        code = in_fork(lambda: train(config), timeout=seconds * draw.random()).returncode
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if code == 0:  # it had finished: start over
            shutil.rmtree("run")
    assert_resumes_to(final("whole"), "run", config)
