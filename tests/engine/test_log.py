"""What a run tells its user: the meter, the progress, TensorBoard's file."""

import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import in_fork, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils import tensorboard

import train as train_module
from engine import log as log_module
from engine.log import Meter, Progress, RunLog
from train import train

CPU = torch.device("cpu")


def test_meter_gives_the_means_of_what_is_finite_and_counts_the_rest():
    meter = Meter(CPU)
    for loss in (torch.nan, torch.inf, 1.0, torch.tensor(5.0), torch.nan):
        meter(loss=loss, other=2)
    means, streaks = meter.read(lambda rows: rows)
    assert means == {"loss": 3.0, "other": 2.0} and streaks == {"loss": 2.0, "other": 0.0}
    for _ in range(2):
        meter(loss=torch.nan)  # and the one before the reading
    assert meter.read(lambda rows: rows) == ({}, {"loss": 3.0})
    assert meter.read(lambda rows: rows) == ({}, {})


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the test moves it."""
    now = [100.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("show, terminal", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize(
    "seconds, text",
    [
        (32 / 150, "about 7 minutes for the remaining 1,975 steps on this machine, at 150 image"),
        (9.0, "about 5 hours for the remaining 1,998 steps on this machine, at 4 images/s"),
    ],
)
def test_run_says_once_how_long_it_will_take(
    clock, capsys, monkeypatch, seconds, text, show, terminal
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with Progress(0, 2000, 32, show=show) as progress:
        clock[0] += 5.0  # the first step is slower
        for _ in range(60):
            progress.step()
            clock[0] += seconds
        captured = capsys.readouterr()
    assert (captured.err if terminal else captured.out).count(text) == show


def test_line_of_a_log_has_step_loss_speed_and_time_left(clock, capsys):
    """No estimate stands before it in a run of less than a minute."""
    with Progress(0, 100, 32) as progress:
        for _ in range(20):
            clock[0] += 0.5
            progress.step()
        assert progress.log(0.123456) == pytest.approx(64)
    assert capsys.readouterr().out == "step 20/100  loss 0.1235  64 images/s  00:40 left\n"


def test_torch_s_summary_writer_writes_all_that_is_logged_and_the_constants(here, monkeypatch):
    """So what patches it, as wandb.init(sync_tensorboard=True) does, gets all, with what a user
    lets `train_step` return."""
    written, real = set(), train_module.train_step

    class Watched(tensorboard.SummaryWriter):
        def add_scalar(self, name, value, step):
            written.add((name, step))
            super().add_scalar(name, value, step)

    monkeypatch.setattr(tensorboard, "SummaryWriter", Watched)
    monkeypatch.setattr(train_module, "train_step", lambda run: real(run) | {"ones": 1.0})
    train(tiny(sample_every=6))
    assert written >= {("loss", 4), ("ones", 4), ("colour_drift/red", 6)}
    log = EventAccumulator("run").Reload()
    (text,) = (event for event in log.Tensors("constants/text_summary"))
    assert "    img_size: 8\n" in text.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("cut", [0, 5])
def test_tensorboard_shows_no_step_twice_after_a_kill(here, monkeypatch, cut):
    """Also if the kill cut the last record."""
    real = RunLog.scalars

    def scalars(self, step, values):
        real(self, step, values)
        if step == 5:
            os._exit(137)

    config = dict(log_every=1, num_training_steps=8)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "scalars", scalars)
        assert in_fork(lambda: train(tiny(**config))).returncode == 137
    events = next(Path("run").glob("events*"))
    os.truncate(events, events.stat().st_size - cut)
    # TensorBoard orders the files of a folder by the second in their names.
    events.rename(events.with_name("events.out.tfevents.0000000001.host"))
    losses = lambda: EventAccumulator("run").Reload().Scalars("loss")  # noqa: E731
    assert [event.step for event in losses()] == [1, 2, 3, 4, 5]
    train(tiny(**config, resume=True))
    assert [event.step for event in losses()] == [1, 2, 3, 4, 5, 6, 7, 8]
