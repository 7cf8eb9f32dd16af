"""What keeps a run of days safe: signals, and checks before the first step."""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from system.errors import Interrupted, ResourceError
from system.files import disk_error, free_bytes, sync_folder
from utils import list_checkpoints

# The signals that ask a process to end: Ctrl-C, a scheduler or the system, a closed terminal, and
# the warnings of schedulers (SLURM's --signal). Windows has the first two.
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM")

# What a killed run leaves half written in its own folders.
LEFTOVER = re.compile(r"\.?(config\.json|loss\.png|preflight|step_\d+\.(pt|png))(\.\w+)*\.tmp")


class StopSignals:
    """Catches the signals in STOPPING while a run is on. The first one asks the run to stop, a
    second Ctrl-C ends the process at once. (Other signals come twice by themselves, to a process
    and to its group.)

    A context manager. Until `deferred` is set a signal raises Interrupted; after that it only sets
    `received`, which the loop looks at between two steps.

    several: this process is one of several. Their launcher forwards the signals that it gets, so a
    Ctrl-C counts as the second one only two seconds after the first."""

    def __init__(self, several: bool = False):
        self.several = several
        self.received = 0
        self.since = 0.0  # when it came
        self.deferred = False
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in (getattr(signal, name) for name in STOPPING if hasattr(signal, name)):
                hup = number == getattr(signal, "SIGHUP", None)
                if not hup or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        now = time.monotonic()
        if self.received:
            if number == signal.SIGINT and now - self.since > (2 if self.several else 0.1):
                os._exit(128 + number)
            return
        self.received, self.since = number, now
        if not self.deferred:
            raise Interrupted(number)


def preflight(
    folder: Path, needed: int, try_out: Callable[[], object], save: Callable[[Path], object]
):
    """Find out before the first step what would fail at the five-thousandth.

    needed: bytes that the run's checkpoints will take; try_out: does what the run does with its
    memory between steps; save: writes a checkpoint to a path. Raises ResourceError."""
    checkpoints = folder / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        sync_folder(checkpoints)
    except OSError as error:
        raise disk_error(checkpoints, error) from error
    for part in (folder, checkpoints, folder / "samples"):
        for path in (path for path in part.glob("*.tmp") if LEFTOVER.fullmatch(path.name)):
            with contextlib.suppress(OSError):
                path.unlink()
    free = free_bytes(checkpoints)
    written = sum(path.stat().st_size for path in list_checkpoints(folder))
    if free < needed - written:
        what = f"the disk has {free:,} bytes left and the checkpoints need {needed - written:,}"
        raise ResourceError(checkpoints, what, "free space, or lower --keep_checkpoints")
    try_out()
    trial = checkpoints / "preflight.tmp"
    try:
        save(trial)
    finally:
        with contextlib.suppress(OSError):  # the error says more
            trial.unlink(missing_ok=True)
