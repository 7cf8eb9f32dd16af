"""Small things to train on, and the real commands at a tiny size."""

import contextlib
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# Tests are of the CPU, also on a machine with a GPU: forks and equal bits would fail there. Those
# for a GPU run alone: pytest -m gpu -n 0. The workers of pytest-xdist inherit what is set here.
if "gpu" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}

import numpy as np
import pytest
import torch
from PIL import Image

from convert import ConvertConfig, convert
from system import flags
from train import Config, train
from utils import checkpoint_path, list_checkpoints, load_checkpoint

# Autograd decides in its first backward whether the process may fork: of fake tensors, it may not.
torch.zeros((), requires_grad=True).backward()

ROOT = Path(__file__).resolve().parents[1]
STATE = ("step", "model", "ema", "optimizer", "scaler")

TINY = dict(
    experiment_name="run",
    path_to_data="pictures",
    img_size=8,
    channels=8,
    channel_mults=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(4,),
    head_dim=8,
    num_timesteps=50,
    num_training_steps=6,
    batch_size=4,
    learning_rate=1e-3,
    warmup_steps=2,
    ema_decay=0.9,
    mixed_precision="no",
    log_every=2,
    sample_every=100,
    num_samples=4,
    save_every=3,
)


# A network that diffusers has too: one number of groups, one of channels of a head.
WIDE = dict(channels=64, channel_mults=(1, 1), head_dim=64, num_timesteps=20)


def tiny(**changes) -> Config:
    """A run of a second; `changes` are its other constants."""
    return Config(**{**TINY, **changes})


def needs_posix() -> None:
    """Skip a test of what Windows does not have: forks, signals to others, links, limits, pipes."""
    if os.name != "posix":
        pytest.skip("needs POSIX")


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch):
    """Tiny tensors are slower on two threads than on one, and half of a tiny run would be spent on
    its held-out loss."""
    torch.set_num_threads(1)
    monkeypatch.setattr("engine.run.LOSS_TIMESTEPS", 2)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder with `pictures/`: 22 small images, of which one is held out."""
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path, 22)
    return tmp_path


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """unbroken(**changes): the newest checkpoint of the tiny run with these changes, trained once
    without interruption, to compare others with."""
    ends = {}

    def end(**changes) -> dict:
        config = tiny(**changes)
        if config not in ends:
            folder = tmp_path_factory.mktemp("unbroken")
            write_pictures(folder, 22)
            with contextlib.chdir(folder):
                train(config)
                ends[config] = final()
        return ends[config]

    return end


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished run of 6 steps, its checkpoints those of steps 3 and 6, beside its
    images. Only `run` and what copies it may use it."""
    folder = tmp_path_factory.mktemp("finished")
    write_pictures(folder, 22)
    with contextlib.chdir(folder):
        train(tiny(learning_rate=0.01))
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """The folder of a finished run, a copy; the current folder is around it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("run")


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """A folder with images, a run of WIDE, `run`, and its weights for diffusers, `folder`. No
    test may change it."""
    folder = tmp_path_factory.mktemp("converted")
    write_pictures(folder, 22)
    with contextlib.chdir(folder):
        train(tiny(**WIDE, num_training_steps=3))
        convert(ConvertConfig(checkpoint="run", out="folder"))
    return folder


@pytest.fixture
def there(converted, tmp_path, monkeypatch):
    """The current folder: a copy of `converted`."""
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fresh_imports():
    """What a test imports from its own folder is not there for the next one."""
    path = list(sys.path)
    sys.modules.pop("mine", None)
    yield
    sys.modules.pop("mine", None)
    sys.path[:] = path


def write_pictures(folder: Path, count: int) -> None:
    """Write `pictures/` into a folder: so many images of random pixels."""
    (folder / "pictures").mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i:03d}.png")


def as_flags(settings: dict) -> list[str]:
    """Constants as flags on the command line."""
    return shlex.split(flags.as_flags(settings))


def run_script(
    script: str, *arguments: str, new: bool = False, timeout: float = 120, **options
) -> subprocess.CompletedProcess:
    """Run one of the repository's scripts as a user would, in the current folder.

    It runs in a fork of this process, which saves the seconds of importing torch, if the system has
    forks; new, or options of `subprocess.run`: in an interpreter of its own."""
    path = str(ROOT / script)
    if not new and not options and hasattr(os, "fork"):
        work = lambda: runpy.run_path(path, run_name="__main__")  # noqa: E731
        return in_fork(work, [path, *arguments], timeout)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    options = {"timeout": timeout, "capture_output": True, "text": True} | options
    return subprocess.run([sys.executable, path, *arguments], env=environment, **options)


def in_fork(
    work: Callable, words: list[str] = sys.argv, timeout: float = 120
) -> subprocess.CompletedProcess:
    """Do `work` in a forked process, with these words as its command line and with streams of its
    own. Returns what `subprocess.run` would; -9 is the code of one killed after the timeout."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        pid, end = fork(work, out, errors, words), time.monotonic() + timeout
        while not (found := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return subprocess.CompletedProcess(words, os.waitstatus_to_exitcode(found[1]), *texts)


def fork(work: Callable, out: BinaryIO, errors: BinaryIO, words: list[str] = sys.argv) -> int:
    """Begin to do `work` in a forked process, with these words as its command line and these files
    as its stdout and stderr. Returns its number."""
    needs_posix()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, file in enumerate((open(os.devnull), out, errors)):
            os.dup2(file.fileno(), number)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            setattr(sys, name, open(number, "w" if number else "r", buffering=1, closefd=False))
        sys.argv = words
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException as error:
        code = getattr(error, "exit_code", 1)
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def final(name: str = "run", step: int | None = None) -> dict:
    """What the checkpoint of a step of a run holds, or its newest."""
    path = checkpoint_path(Path(name), step) if step else list_checkpoints(Path(name))[0]
    return load_checkpoint(path)


def saved_steps(name: str = "run") -> list[int]:
    """The steps of which a run has checkpoints, the newest first."""
    return [int(path.stem[5:]) for path in list_checkpoints(Path(name))]


def refuse(number: int, name: str | None = None) -> Callable:
    """A call that the system refuses with the error of that number, for the file of that name."""

    def call(*_, **__):
        raise OSError(number, os.strerror(number), name)

    return call


def assert_error(result: subprocess.CompletedProcess, code: int, *parts: str) -> None:
    """The script ended with this code and one line, `error: ...`, that holds the parts."""
    assert result.returncode == code, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    assert ". Fix: " in lines[0], lines[0]
    for part in parts:
        assert part in lines[0], lines[0]


def tensors_equal(a: object, b: object) -> bool:
    """Nested dictionaries and lists of tensors and values are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tensors_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(tensors_equal, a, b))
    return a == b


def assert_same_state(a: dict, b: dict, parts=STATE) -> None:
    """Two checkpoints hold the same state, bit for bit."""
    for part in parts:
        assert tensors_equal(a[part], b[part]), part
