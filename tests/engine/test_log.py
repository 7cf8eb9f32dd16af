"""What a run says while it goes on."""

import sys

import pytest

from system import terminal as terminal_module
from system.terminal import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what the test adds."""
    now = [100.0]
    monkeypatch.setattr(terminal_module.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "seconds, text",
    [
        (32 / 150, "about 7 minutes on this machine for the 1,975 steps to go, at 150 images/s"),
        (32 / 31, "about 34 minutes on this machine for the 1,994 steps to go, at 31 images/s"),
        (9.0, "about 5 hours on this machine for the 1,998 steps to go, at 4 images/s"),
    ],
)
def test_the_demo_says_within_20_seconds_how_long_it_takes_on_this_machine(
    clock, capsys, monkeypatch, seconds, text, terminal
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with Progress(0, 2000, 32) as progress:
        clock[0] += 5.0  # the first step is slower
        progress.step()
        while clock[0] < 120.0 - seconds:
            clock[0] += seconds
            progress.step()
        captured = capsys.readouterr()
    assert (captured.err if terminal else captured.out).count(text) == 1


def test_a_run_of_less_than_a_minute_is_not_foretold(clock, capsys):
    with Progress(0, 50, 32) as progress:
        for _ in range(50):
            clock[0] += 1.0
            progress.step()
    assert "on this machine" not in capsys.readouterr().out


def test_only_the_process_that_shows_its_progress_foretells(clock, capsys):
    with Progress(0, 2000, 32, show=False) as progress:
        for _ in range(50):
            clock[0] += 1.0
            progress.step()
    assert "on this machine" not in capsys.readouterr().out
