"""What a run says while it goes on: TensorBoard, loss.png, and a bar or lines for the terminal."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from files import write_atomically
from images import save_image


def say(text: str) -> None:
    """Print a line where somebody may read it; a closed pipe does not end a run of days."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's markdown: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(columns), line(rules), *map(line, rows)])


class RunLog:
    """A run's numbers and images: TensorBoard in its folder, loss.png.

    history: [[step, loss]], kept in the checkpoint so that loss.png shows the whole run."""

    def __init__(self, folder: Path, step: int, history: list[list[float]]):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, not needed to read

        self.folder, self.history = folder, history
        # What an interrupted run logged after the step to go on from, TensorBoard drops.
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log a few numbers of a step, "loss" among them."""
        self.history.append([step, values["loss"]])
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def images(self, step: int, grid: Image.Image) -> None:
        """Log a grid, and save it as samples/step_XXXXXXXX.png."""
        self.writer.add_image("samples", np.asarray(grid), step, dataformats="HWC")
        self.writer.flush()
        save_image(grid, self.folder / "samples" / f"step_{step:08d}.png")

    def plot_loss(self) -> None:
        """Plot the losses so far as loss.png."""
        if not self.history:
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
        axes.plot(*zip(*self.history, strict=True))
        path = self.folder / "loss.png"
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.writer.close()


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
