"""Signals: the step in which one comes is finished and saved, and the run ends with 128 plus its
number."""

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import STATE, assert_same_state, final, in_fork, needs_posix, saved_steps, tiny

import utils
from diffusion import Diffusion
from engine import log, session
from system import flags
from system.errors import Interrupted
from train import train


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
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        send_at(patch, *PLACES[place], [number])
        with pytest.raises(Interrupted) as stop:
            train(tiny(**config))
    assert stop.value.exit_code == 128 + number and signal.getsignal(number) == handler
    assert 0 < saved_steps()[0] < 6 and not list(Path("run").rglob("*.tmp"))
    train(tiny(resume=True, **config))
    assert_same_state(whole, final(), (*STATE, "history"))


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGINT],
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
        flags.run(lambda: train(tiny(save_every=100)))

    result = in_fork(work)
    assert result.returncode == 128 + numbers[0] and "Traceback" not in result.stderr
    assert saved_steps() == [2]


def test_signal_before_the_first_step_ends_at_once(here, monkeypatch):
    send_at(monkeypatch, session, "load_faces", 1, [signal.SIGTERM])
    with pytest.raises(Interrupted):
        train(tiny())
    assert not Path("run").exists()


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
    assert result.returncode == 130 and "went on" not in result.stdout and not saved_steps()
