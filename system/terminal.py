"""Where text goes: a terminal, a file, a pipe, or nowhere. No run of days ends because nobody
listens: what cannot be written is dropped, what a terminal cannot show is escaped."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm


class _Patient(io.FileIO):
    """A file whose writes never fail: closed pipes and full disks swallow them."""

    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def open_streams() -> None:
    """Make stdout and stderr of a command such that no write to them fails, whatever they are."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get its number, and our words
            os.open(os.devnull, os.O_RDWR)
        if name == "stdin":
            continue
        # Python found it closed at its start: if it is open now, it is somebody's file.
        raw = _Patient(os.devnull if stream is None else number, "w", closefd=stream is None)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        setattr(sys, name, io.TextIOWrapper(raw, encoding, "backslashreplace", write_through=True))


def say(text: str, file=None) -> None:
    """Print a line where somebody may read it; on stdout only rank 0 of several processes does."""
    if file is None and os.environ.get("RANK", "0") != "0":
        return
    with contextlib.suppress(OSError, ValueError):
        print(text, file=file or sys.stdout, flush=True)


def warn(text: str) -> None:
    """Say on stderr what is not as it should be, though it ends nothing."""
    say(f"warning: {text}", sys.stderr)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's markdown: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(columns), line(rules), *map(line, rows)])


class Progress:
    """How far a run is and how fast: a bar in a terminal, a plain line at each log elsewhere."""

    def __init__(self, step: int, total: int, images_per_step: int, show: bool = True):
        self.images_per_step, self.show = images_per_step, show
        self.terminal = sys.stderr.isatty()
        options = dict(initial=step, total=total, unit="step", dynamic_ncols=True)
        self.bar = tqdm(disable=not (show and self.terminal), **options)
        self.done, self.total = step, total
        self.first: tuple[int, float] | None = None  # after which step, and when, it got going
        self.foretold = not show
        self.restart()

    def restart(self) -> None:
        """Begin to count the time anew, after something that is not training."""
        self.since, self.started = self.done, time.monotonic()

    def step(self) -> None:
        """One more step is done."""
        self.done += 1
        self.bar.update()
        if not self.foretold:
            self._foretell(time.monotonic())

    def _foretell(self, now: float) -> None:
        """Say once, 5 seconds after the first step, which is slower, how long the run will take."""
        if self.first is None:
            self.first = self.done, now
        elif now - self.first[1] >= 5:
            self.foretold = True
            pace = (now - self.first[1]) / (self.done - self.first[0])
            left = self.total - self.done
            minutes = left * pace / 60
            time_left = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
            text = f"about {time_left} on this machine for the {left:,} steps to go"
            text += f", at {self.images_per_step / pace:.0f} images/s"
            if minutes >= 1:
                self.bar.write(text, sys.stderr) if self.terminal else say(text)

    def log(self, loss: float) -> float:
        """Show the loss and the speed. Returns images per second since the last log."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        steps_per_second = (self.done - self.since) / seconds
        speed = steps_per_second * self.images_per_step
        if self.terminal:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s", refresh=False)
        elif self.show:
            left = (self.total - self.done) / max(steps_per_second, 1e-9)
            say(
                f"step {self.done}/{self.total}  loss {loss:.4f}  {speed:.0f} images/s"
                f"  {tqdm.format_interval(left)} left"
            )
        self.restart()
        return speed

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
