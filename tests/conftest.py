"""Small things to train on, and the real command line at a tiny size."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train import Config

ROOT = Path(__file__).resolve().parents[1]

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


def tiny(**changes) -> Config:
    """A run of seconds; `changes` are its other constants."""
    return Config(**{**TINY, **changes})


def needs_posix() -> None:
    """Skip a test of what Windows does not have: forks, signals to others, links, limits, pipes."""
    if os.name != "posix":
        pytest.skip("needs POSIX")


@pytest.fixture(autouse=True)
def few_threads():
    """Tiny tensors are slower on two threads than on one."""
    torch.set_num_threads(1)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder with `pictures/`: 22 small pictures, of which one is held out."""
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path, 22)
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
    """`pictures/` in a folder, with so many pictures of random pixels."""
    (folder / "pictures").mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i:03d}.png")


def flags(settings: dict) -> list[str]:
    """A Config's values as command-line flags."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, tuple | list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}", str(value)]
    return words


def run_script(script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run one of the repository's scripts as a user would, in the current folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    command = [sys.executable, str(ROOT / script), *arguments]
    options = {"timeout": 120, "capture_output": True, "text": True} | options
    return subprocess.run(command, env=environment, **options)


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
