"""What the loop does between two steps, and what it survives: numbers that are not finite, a disk
that refuses, a folder that is taken away, nobody who reads."""

import builtins
import errno
import io
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    as_flags,
    assert_error,
    assert_same_state,
    final,
    needs_posix,
    refuse,
    run_script,
    saved_steps,
    tiny,
)
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dataset import load_faces
from diffusion import Diffusion
from generate import load_trained
from system.errors import DivergedError, ResourceError
from train import learning_rate, train


def change_loss(monkeypatch, change, numbers=(4,)) -> None:
    """Let `change` make something else of the loss of these steps; the first is number 1."""
    real, calls = Diffusion.loss, iter(range(1, 10_000))

    def loss(*arguments):
        value = real(*arguments)
        return change(value) if next(calls) in numbers else value

    monkeypatch.setattr(Diffusion, "loss", loss)


# What a run leaves -------------------------------------------------------------------------------


def test_run_leaves_what_the_readme_says(here):
    train(tiny(sample_every=3))
    names = sorted(path.relative_to("run").as_posix() for path in Path("run").rglob("*.*"))
    events = [name for name in names if name.startswith("events.out.tfevents")]
    assert len(events) == 1 and [name for name in names if name not in events] == [
        "checkpoints/step_00000003.pt",
        "checkpoints/step_00000006.pt",
        "config.json",
        "loss.png",
        "samples/step_00000003.png",
        "samples/step_00000006.png",
    ]
    assert Image.open("run/samples/step_00000003.png").size == (2 * 10 + 2, 2 * 10 + 2)
    assert Image.open("run/loss.png").width > 300
    log = EventAccumulator("run").Reload()
    assert [event.step for event in log.Scalars("loss")] == [2, 3, 4, 6]
    assert [event.step for event in log.Scalars("held_out_loss")] == [3, 6]
    assert [event.step for event in log.Images("samples")] == [3, 6]
    assert {"grad_norm", "images_per_second"} <= set(log.Tags()["scalars"])
    rates = [event.value for event in log.Scalars("learning_rate")]
    assert rates == pytest.approx([learning_rate(tiny(), step - 1) for step in (2, 3, 4, 6)])


def test_colour_drift_is_that_of_the_grid_from_the_data(run):
    cells = np.asarray(Image.open("run/samples/step_00000006.png"), float)
    cells = np.stack([cells[y : y + 8, x : x + 8] for y in (2, 12) for x in (2, 12)])
    faces, log = load_faces("pictures", 8), EventAccumulator("run").Reload()
    some = faces.images[faces.train[np.linspace(0, len(faces.train) - 1, 256).astype(int)]]
    expected = cells.mean((0, 1, 2)) - some.mean((0, 1, 2))
    for name, drift in zip(("red", "green", "blue"), expected, strict=True):
        assert log.Scalars(f"colour_drift/{name}")[-1].value == pytest.approx(drift, abs=0.5)


def test_a_step_and_a_save_longer_than_torchrun_waits_are_noted_once(here, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    train(tiny())
    assert "longer than torchrun waits" not in capsys.readouterr().out
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0")
    train(tiny(experiment_name="slow"))
    assert capsys.readouterr().out.count("longer than torchrun waits") == 1


def test_logging_sampling_saving_and_a_clock_that_steps_back_change_nothing(
    here, monkeypatch, unbroken
):
    whole, times = unbroken(), iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    train(tiny(log_every=1, sample_every=1, save_every=1, keep_checkpoints=2))
    assert_same_state(whole, final())
    assert saved_steps() == [6, 5, 2]  # 2 guides


# Numbers that are not finite ---------------------------------------------------------------------


class Explode(torch.autograd.Function):
    """The value as it is, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda loss: loss * math.nan, "the loss is not finite"),
        (Explode.apply, "the gradients of 1 updates in a row are not finite"),
    ],
)
def test_nan_never_reaches_a_checkpoint(here, monkeypatch, change, said):
    change_loss(monkeypatch, change)
    with pytest.raises(DivergedError, match=f"^step 4: {said}.*Fix: --resume") as error:
        train(tiny())
    assert error.value.exit_code == 6 and saved_steps() == [3] and final()


def test_twenty_skipped_steps_in_a_row_end_the_run(here, monkeypatch):
    for module in ("session", "state"):
        monkeypatch.setattr(f"engine.{module}.autocast_dtype", lambda *_: torch.float16)
    change_loss(monkeypatch, Explode.apply, range(3, 22))
    train(tiny(num_training_steps=24, save_every=24))  # 19
    assert final()["scaler"]["scale"] == 2.0 ** (16 - 19)
    change_loss(monkeypatch, Explode.apply, range(3, 23))
    with pytest.raises(DivergedError, match="20 updates in a row"):
        train(tiny(num_training_steps=60, save_every=60, experiment_name="other"))
    assert not saved_steps("other")


# The disk and the folder -------------------------------------------------------------------------


def before_step(monkeypatch, action) -> None:
    """Call `action` in the fourth step."""
    change_loss(monkeypatch, lambda loss: (action(), loss)[1])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_logging_failures_never_stop_training(here, monkeypatch, capsys):
    (here / "run" / "loss.png" / "in_the_way").mkdir(parents=True)
    (here / "run" / "samples").write_text("a file")
    real = io.open

    def full(file, *arguments, **options):
        use = refuse(errno.ENOSPC) if "tfevents" in str(file) else real
        return use(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", full)
    monkeypatch.setattr(io, "open", full)
    train(tiny(log_every=1, sample_every=1))
    errors = capsys.readouterr().err
    assert saved_steps() == [6, 3]
    for what in ("TensorBoard's file", "loss.png", "samples/"):
        assert errors.count(f"{what} is not written") == 1, errors


def test_disk_that_turns_read_only_ends_the_run_and_is_named(here, monkeypatch):
    def turn():
        for call in ("os.replace", "os.unlink", "pathlib.Path.unlink"):
            monkeypatch.setattr(call, refuse(errno.EROFS))

    before_step(monkeypatch, turn)
    with pytest.raises(ResourceError, match="step_00000006.pt: cannot be written.*Read-only"):
        train(tiny())
    assert saved_steps() == [3] and final()


def remove():
    shutil.rmtree("run")


def replace():
    os.rename("run", "before")
    Path("run/checkpoints").mkdir(parents=True)
    for name in ("lock", "checkpoints/step_00000009.pt"):
        Path("run", name).write_text("of another run")


@pytest.mark.parametrize("action, left", [(remove, []), (replace, [9])])
def test_folder_removed_or_replaced_under_a_run_ends_it(here, monkeypatch, action, left):
    before_step(monkeypatch, action)
    result = run_script("train.py", *as_flags({**TINY, "keep_checkpoints": 1}))
    assert_error(result, 2, "--experiment_name: run was removed or replaced during the run")
    assert saved_steps() == left


# Who reads, and the surroundings -----------------------------------------------------------------


def test_command_without_a_terminal_prints_plain_lines_and_trains(here, unbroken):
    """A real start: leftover variables change nothing, what ASCII cannot show is escaped."""
    environment = {"MPLBACKEND": "bogus", "WORLD_SIZE": "1", "RANK": "0", "COLUMNS": "1"}
    environment |= {"ACCELERATE_DYNAMO_BACKEND": "inductor", "PYTHONIOENCODING": "ascii"}
    words = as_flags({**TINY, "resume": True, "experiment_name": "Läufe"})
    result = run_script("train.py", *words, env=environment)
    assert result.returncode == 0, result.stderr
    assert "nothing to resume in L\\xe4ufe" in result.stdout
    assert "step 6/6" in result.stdout and "\r" not in result.stdout + result.stderr
    assert "warning" not in result.stderr and Path("Läufe/loss.png").exists()
    assert_same_state(final("Läufe"), unbroken())


@pytest.mark.parametrize("where", [">&- 2>/dev/full", "2>&1 | true"])
def test_run_goes_on_if_nobody_reads(here, where):
    needs_posix()
    flags = as_flags({**TINY, "num_training_steps": 2, "log_every": 1})
    words = [sys.executable, str(ROOT / "train.py"), *flags]
    line = "set -o pipefail; " + " ".join(f"'{word}'" for word in words) + " " + where
    assert subprocess.run(["bash", "-c", line], timeout=120).returncode == 0
    assert saved_steps() == [2]


def test_run_may_have_a_name_that_is_not_utf_8(here):
    needs_posix()
    name = os.fsdecode(b"run\xff")
    train(tiny(experiment_name=name, num_training_steps=3))
    train(tiny(experiment_name=name, resume=True))
    assert saved_steps(name) == [6, 3] and load_trained(name).step == 6
