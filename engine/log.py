"""What a run tells its user: numbers gathered on the device, a progress bar, TensorBoard, plots."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from system.files import write_atomically
from system.terminal import say, warn
from utils import save_image


class Meter:
    """Gathers numbers on the device and reads them only when asked, so that no step waits for the
    device: `meter(loss=loss, grad_norm=grad_norm)`.

    Numbers that are not finite are left out of the means and counted instead."""

    def __init__(self, device: torch.device):
        self.device = device
        self.streaks: dict[str, Tensor] = {}  # calls in a row that were not finite, up to now
        self._start()

    def _start(self) -> None:
        self.sums: dict[str, Tensor] = {}  # of a name: total, count, longest streak

    def __call__(self, **values: Tensor | float) -> None:
        """Take note of one number for each name. Tensors are scalars."""
        zero = torch.zeros((), device=self.device)
        for name, value in values.items():
            if not isinstance(value, Tensor):  # filled on the device: a copy would wait for it
                value = torch.full((), value, device=self.device)
            value = value.detach().float()
            finite = torch.isfinite(value)
            streak = (self.streaks.get(name, zero) + 1) * ~finite
            total, count, longest = self.sums.get(name, (zero, zero, zero))
            self.streaks[name] = streak
            total = total + torch.where(finite, value, 0)
            self.sums[name] = total, count + finite, torch.maximum(longest, streak)

    def read(
        self, mean_over_processes: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The means since the last reading, and how often in a row each was not finite. All
        processes call it together, with the same names."""
        names = list(self.sums)
        if not names:
            return {}, {}
        rows = torch.stack([torch.stack(self.sums[name]) for name in names])
        self._start()
        rows = dict(zip(names, mean_over_processes(rows).tolist(), strict=True))
        means = {name: total / count for name, (total, count, _) in rows.items() if count}
        return means, {name: longest for name, (_, _, longest) in rows.items()}


class Progress:
    """How far a run is and how fast: a bar in a terminal, elsewhere a line at each log."""

    def __init__(self, step: int, total: int, images_per_step: int, show: bool = True):
        self.images_per_step, self.show = images_per_step, show
        self.terminal = sys.stderr.isatty()
        options = dict(initial=step, total=total, unit="step", dynamic_ncols=True)
        self.bar = tqdm(disable=not (show and self.terminal), **options)
        self.done, self.total = step, total
        self.first: tuple[int, float] | None = None  # the first completed step, and its time
        self.estimated = not show
        self.restart()

    def restart(self) -> None:
        """Restart the clock, after something that is not training."""
        self.since, self.started = self.done, time.monotonic()

    def step(self) -> None:
        """Count one more step."""
        self.done += 1
        self.bar.update()
        if not self.estimated:
            self._estimate(time.monotonic())

    def _estimate(self, now: float) -> None:
        """Say once how long the run will take, 5 seconds after the first step, which is slower."""
        if self.first is None:
            self.first = self.done, now
        elif now - self.first[1] >= 5:
            self.estimated = True
            pace = (now - self.first[1]) / (self.done - self.first[0])
            left = self.total - self.done
            minutes = left * pace / 60
            time_left = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
            text = f"about {time_left} for the remaining {left:,} steps on this machine"
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


class RunLog:
    """TensorBoard's file, samples/ and loss.png in a run's folder. If one of them cannot be written
    a warning says so once, and the training goes on.

    history: [[step, loss], ...], kept in the checkpoint so that loss.png shows the whole run;
    config: the run's constants, which TensorBoard shows as a text."""

    def __init__(self, folder: Path, step: int, history: list[list[float]], config: Any = None):
        self.folder, self.step, self.history, self.config = folder, step, history, config
        self.failed, self.writer = set(), None

    @contextlib.contextmanager
    def _may_fail(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk, a folder that was removed, a broken library
            if what not in self.failed:
                reason = " ".join(str(error).split())
                warn(f"{self.folder}: {what} is not written ({reason}); the training goes on")
            self.failed.add(what)

    def _to_tensorboard(self, write: Callable) -> None:
        """Let `write` add something to TensorBoard's file, which the first call opens."""
        with self._may_fail("TensorBoard's file"):
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter  # slow to import

                # purge_step hides what an interrupted run logged after the checkpoint.
                purge_step = self.step + 1 if self.step else None
                self.writer = SummaryWriter(str(self.folder), purge_step=purge_step)
                if self.config:
                    rows = [f"    {name}: {value}" for name, value in asdict(self.config).items()]
                    self.writer.add_text("constants", "\n".join(rows), self.step)
            write(self.writer)
            self.writer.flush()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log the numbers of a step."""

        def write(writer) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._to_tensorboard(write)

    def images(self, step: int, grid: Image.Image) -> None:
        """Log a grid, and save it as samples/step_XXXXXXXX.png."""
        with self._may_fail("samples/"):
            save_image(grid, self.folder / "samples" / f"step_{step:08d}.png")
        pixels = np.asarray(grid)
        self._to_tensorboard(
            lambda writer: writer.add_image("samples", pixels, step, dataformats="HWC")
        )

    def plot_loss(self) -> None:
        """Plot the losses so far as loss.png."""
        with self._may_fail("loss.png"):
            from matplotlib.figure import Figure

            figure = Figure(figsize=(7, 4), layout="constrained")
            axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
            if self.history:
                axes.plot(*zip(*self.history, strict=True))
            path = self.folder / "loss.png"
            write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))

    def close(self) -> None:
        """Close TensorBoard's file."""
        with self._may_fail("TensorBoard's file"):
            if self.writer is not None:
                self.writer.close()
