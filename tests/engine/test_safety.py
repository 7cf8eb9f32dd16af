"""Signals: the step in which one comes is finished and saved, and the run ends with 128 plus its
number."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    STATE,
    TINY,
    as_flags,
    assert_same_state,
    in_fork,
    needs_posix,
    tiny,
)

import utils
from diffusion import Diffusion
from engine import log, session
from system.errors import Interrupted, UsageError
from train import train
from utils import list_checkpoints, load_checkpoint


@pytest.fixture(autouse=True)
def posix():
    needs_posix()


def send_at(monkeypatch, owner, name: str, call: int, numbers: list[int]) -> None:
    """Send this process signals before a call of `owner.name`."""
    real, calls = getattr(owner, name), iter(range(1, 10_000))

    def hooked(*arguments, **options):
        if next(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, hooked)


def steps() -> list[int]:
    return [int(path.stem[5:]) for path in list_checkpoints(Path("run"))]


PLACES = {
    "a step": (Diffusion, "loss", 2),
    "a save": (utils, "check_signature", 2),  # the first is the trial before step 1
    "the renaming of a save": (os, "replace", 3),
    "the sampling": (Diffusion, "x_0_and_eps", 4),
    "the log": (log.RunLog, "scalars", 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_signals_lose_no_completed_step(here, monkeypatch, unbroken, place):
    config = dict(save_every=2, sample_every=2, log_every=1)
    whole = unbroken(**config)
    session.load_faces("pictures", 8)  # so that the calls counted below are the run's own
    number = signal.SIGINT if place == "a step" else signal.SIGTERM
    with monkeypatch.context() as patch:
        send_at(patch, *PLACES[place], [number])
        with pytest.raises(Interrupted) as stop:
            train(tiny(**config))
    assert stop.value.exit_code == 128 + number
    assert 0 < steps()[0] < 6 and not list(Path("run").rglob("*.tmp"))
    train(tiny(resume=True, **config))
    assert_same_state(whole, load_checkpoint(list_checkpoints(Path("run"))[0]), (*STATE, "history"))


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGHUP, signal.SIGHUP],
        [signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM],
        [signal.SIGUSR2],
        [signal.SIGXCPU],
        [signal.SIGALRM],
    ],
)
def test_signals_that_announce_an_end_save_and_stop_however_often_they_come(
    here, monkeypatch, numbers
):
    send_at(monkeypatch, Diffusion, "loss", 2, numbers)

    def work():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is, and stays, ignored
        train(tiny(save_every=100))

    assert in_fork(work).returncode == 128 + numbers[0]
    assert steps() == [2]


def test_signal_before_the_first_step_ends_at_once(here, monkeypatch):
    send_at(monkeypatch, session, "load_faces", 1, [signal.SIGTERM])
    with pytest.raises(Interrupted):
        train(tiny())
    assert not Path("run").exists()


def start(*words: str) -> subprocess.Popen:
    """A real run of many steps that saves none of them, once it is past its third."""
    settings = {**TINY, "num_training_steps": 100_000, "save_every": 100_000, "log_every": 1}
    command = [sys.executable, str(ROOT / "train.py"), *as_flags(settings), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    for line in process.stdout:
        if line.startswith("step 3/"):
            return process
    raise AssertionError(process.stderr.read())


def test_real_process_saves_on_ctrl_c_and_exits(here):
    process = start()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors
    assert steps()[0] >= 3 and load_checkpoint(list_checkpoints(Path("run"))[0])


def test_ctrl_c_twice_ends_without_waiting_for_the_step(here, monkeypatch):
    real, pressed = Diffusion.loss, []

    def press_twice(*arguments):
        for _ in range(2):
            pressed.append(os.kill(os.getpid(), signal.SIGINT))
            time.sleep(0.11)  # a key that bounces counts once
        print("the step went on", flush=True)
        return real(*arguments)

    monkeypatch.setattr(Diffusion, "loss", press_twice)
    result = in_fork(lambda: train(tiny()))
    assert result.returncode == 130 and "went on" not in result.stdout and not steps()


def test_handlers_of_the_caller_are_given_back(here):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        train(tiny(num_training_steps=1))
        assert [signal.getsignal(number) for number in numbers] == handlers
        with pytest.raises(UsageError):
            train(tiny())
        assert [signal.getsignal(number) for number in numbers] == handlers
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
