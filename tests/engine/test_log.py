"""What a run tells its user: the meter, the progress, TensorBoard's file."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_fork, tiny
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils import tensorboard

from engine import log as log_module
from engine.log import Meter, Progress, RunLog
from train import train

CPU = torch.device("cpu")


# The meter ---------------------------------------------------------------------------------------


def test_meter_gives_the_means_of_what_is_finite_and_counts_the_rest():
    meter = Meter(CPU)
    for loss in (1.0, torch.nan, torch.inf, torch.tensor(5.0)):
        meter(loss=loss, other=2)
    means, streaks = meter.read(lambda rows: rows)
    assert means == {"loss": 3.0, "other": 2.0} and streaks == {"loss": 2.0, "other": 0.0}
    meter(loss=torch.nan)
    assert meter.read(lambda rows: rows) == ({}, {"loss": 1.0})
    assert meter.read(lambda rows: rows) == ({}, {})


def test_streak_of_numbers_that_are_not_finite_goes_on_across_readings():
    meter = Meter(CPU)
    for calls in (2, 3):
        for _ in range(calls):
            meter(grad_norm=torch.inf)
        streak = meter.read(lambda rows: rows)[1]["grad_norm"]
    assert streak == 5


# The progress ------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the test moves it."""
    now = [100.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "seconds, text",
    [
        (32 / 150, "about 7 minutes for the remaining 1,975 steps on this machine, at 150 image"),
        (9.0, "about 5 hours for the remaining 1,998 steps on this machine, at 4 images/s"),
    ],
)
def test_run_says_once_how_long_it_will_take(clock, capsys, monkeypatch, seconds, text, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with Progress(0, 2000, 32) as progress:
        clock[0] += 5.0  # the first step is slower
        for _ in range(60):
            progress.step()
            clock[0] += seconds
        captured = capsys.readouterr()
    assert (captured.err if terminal else captured.out).count(text) == 1


def test_short_runs_and_other_processes_estimate_nothing(clock, capsys):
    for total, show in ((50, True), (2000, False)):
        with Progress(0, total, 32, show=show) as progress:
            for _ in range(50):
                clock[0] += 1.0
                progress.step()
            progress.log(0.5)
    assert "on this machine" not in capsys.readouterr().out


def test_line_of_a_log_has_step_loss_speed_and_time_left(clock, capsys):
    with Progress(0, 100, 32) as progress:
        for _ in range(10):
            clock[0] += 0.5
            progress.step()
        assert progress.log(0.123456) == pytest.approx(64)
    assert capsys.readouterr().out == "step 10/100  loss 0.1235  64 images/s  00:45 left\n"


# TensorBoard -------------------------------------------------------------------------------------


def steps_logged() -> list[int]:
    return [event.step for event in EventAccumulator("run").Reload().Scalars("loss")]


def test_torch_s_summary_writer_writes_the_log_and_the_constants_as_text(here, monkeypatch):
    """So what patches it, as wandb.init(sync_tensorboard=True) does, gets all that is logged."""
    written = []

    class Watched(tensorboard.SummaryWriter):
        def add_scalar(self, name, value, step):
            written.append((name, step))
            super().add_scalar(name, value, step)

    monkeypatch.setattr(tensorboard, "SummaryWriter", Watched)
    train(tiny(sample_every=6))
    assert ("loss", 4) in written and ("colour_drift/red", 6) in written
    log = EventAccumulator("run").Reload()
    (text,) = (event for event in log.Tensors("constants/text_summary"))
    assert "    img_size: 8\n" in text.tensor_proto.string_val[0].decode()


def name_as_older() -> None:
    """TensorBoard orders the files of a folder by the second in their names."""
    for path in Path("run").glob("events*"):
        path.rename(path.with_name("events.out.tfevents.0000000001.host"))


def test_tensorboard_shows_no_step_twice_after_a_kill(here, monkeypatch):
    real = RunLog.scalars

    def scalars(self, step, values):
        real(self, step, values)
        if step == 5:
            os._exit(137)

    config = dict(log_every=1, num_training_steps=8)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "scalars", scalars)
        assert in_fork(lambda: train(tiny(**config))).returncode == 137
    assert steps_logged() == [1, 2, 3, 4, 5]
    name_as_older()
    train(tiny(**config, resume=True))
    assert steps_logged() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_cut_record_of_tensorboard_is_survived(here):
    train(tiny(log_every=1, num_training_steps=3))
    events = next(Path("run").glob("events*"))
    os.truncate(events, events.stat().st_size - 5)
    name_as_older()
    train(tiny(log_every=1, resume=True))
    steps = steps_logged()
    assert sorted(set(steps)) == steps and steps[-3:] == [4, 5, 6]


def test_grid_is_saved_whole_and_the_history_is_plotted(tmp_path):
    log = RunLog(tmp_path, 0, [[1, 0.5], [2, 0.25]])
    log.images(2, Image.fromarray(np.full((4, 6, 3), 7, np.uint8)))
    log.plot_loss()
    log.close()
    assert Image.open(tmp_path / "samples" / "step_00000002.png").size == (6, 4)
    assert Image.open(tmp_path / "loss.png").width > 300 and not list(tmp_path.glob("*.tmp"))
