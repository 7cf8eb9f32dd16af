"""What keeps a run of days safe: signals, checks before the first step, a watch over numbers."""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from system.errors import DivergedError, Interrupted, ResourceError
from system.files import disk_error, free_bytes, sync_folder
from utils import list_checkpoints

# What ends a process and can be waited for: Ctrl-C, a scheduler or the system, the terminal that
# goes away, and the warnings that schedulers send (SLURM's --signal). Windows has the first two.
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM")

# What a run that was killed leaves half written, in the folders that are its own.
LEFTOVER = re.compile(r"\.?(config\.json|loss\.png|preflight|step_\d+\.(pt|png))(\.\w+)*\.tmp")


class StopSignals:
    """The signals in STOPPING while a run is on: the first one asks it to stop. A second Ctrl-C
    ends it now; other signals come twice by themselves, to a process and to its group.

    As a context manager it takes the handlers over, and gives them back at the end. Until
    `deferred` is set a signal raises Interrupted where it finds the program; from then on it only
    sets `received`, for the loop to look at between steps.

    several: this process is one of several, whose launcher hands on what it gets: then a Ctrl-C
    counts as the second one only two seconds after the first."""

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
    folder: Path, needed: int, sample: Callable[[], object], save: Callable[[Path], object]
):
    """Find out before the first step what would fail at the five-thousandth.

    needed: bytes that the run's checkpoints will take; sample: generates an image; save: writes a
    checkpoint to a path. Raises ResourceError."""
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
    sample()
    trial = checkpoints / "preflight.tmp"
    try:
        save(trial)
    finally:
        with contextlib.suppress(OSError):  # the error says more
            trial.unlink(missing_ok=True)


class Watch:
    """Gathers the loss and the gradient norm on the device, and looks at them only when asked, so
    that no step waits for the one before it.

    patience: updates in a row that may be left out because a gradient was not finite (under a loss
    scale a few are normal; without one none is)."""

    def __init__(self, device: torch.device, patience: int):
        self.patience = patience
        self.skipped_in_a_row = torch.zeros((), device=device)
        self._start()

    def _start(self) -> None:
        zero = torch.zeros_like(self.skipped_in_a_row)
        self.loss, self.grad_norm, self.most_skipped, self.steps = zero, zero, zero, 0

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Take note of a step. loss, grad_norm: scalars on the device."""
        skipped = ~torch.isfinite(grad_norm)
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped
        self.most_skipped = torch.maximum(self.most_skipped, self.skipped_in_a_row)
        self.loss = self.loss + loss
        self.grad_norm = self.grad_norm + torch.where(skipped, 0, grad_norm)
        self.steps += 1

    def read(self, step: int, mean_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last reading, over all processes: {"loss", "grad_norm"}.

        Raises DivergedError where the loss was not finite or too many updates were left out."""
        totals = torch.stack([self.loss, self.grad_norm, self.most_skipped])
        loss, grad_norm, skipped = mean_over_processes(totals).tolist()
        steps = max(1, self.steps)
        self._start()
        fix = "--resume with a lower --learning_rate, or with --mixed_precision bf16"
        if loss != loss or abs(loss) == float("inf"):
            raise DivergedError(f"step {step}", "the loss is not finite", fix)
        if skipped >= self.patience:
            what = f"{skipped:.0f} updates in a row had gradients that are not finite"
            raise DivergedError(f"step {step}", what, fix)
        return {"loss": loss / steps, "grad_norm": grad_norm / steps}
