"""What a run leaves for its reader: TensorBoard's file, the sample grids, loss.png."""

import contextlib
import errno
import io
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from system.files import write_atomically
from system.terminal import warn
from utils import save_image


class EventFile:
    """A file that TensorBoard reads: an event is on the disk when `add` returns, or not at all."""

    def __init__(self, folder: Path, step: int):
        self.folder, self.step, self.file = folder, step, None

    def add(self, **event) -> None:
        """Append an event. event: Event's fields. Raises OSError where the disk refuses."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # slow to import
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self.file is None or os.fstat(self.file.fileno()).st_nlink == 0:  # or removed
            seconds, nanoseconds = divmod(time.time_ns(), 10**9)
            name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}"
            self.file = open(self.folder / name, "ab", buffering=0)
        end, events = os.fstat(self.file.fileno()).st_size, [event]
        if end == 0:  # START hides what an interrupted run logged after the step to go on from
            start = dict(step=self.step + 1, session_log=SessionLog(status=SessionLog.START))
            events = [dict(file_version="brain.Event:2"), *[start] * (self.step > 0), event]
        records = io.BytesIO()
        for each in events:
            message = Event(wall_time=time.time(), **each)
            RecordWriter(records).write(message.SerializeToString())
        try:
            if self.file.write(records.getbuffer()) < records.tell():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.truncate(self.file.fileno(), end)  # half a record would hide all that follows
            raise

    def close(self) -> None:
        """Close it, if ever it was opened."""
        if self.file:
            self.file.close()


class RunLog:
    """A run's numbers and images: TensorBoard in its folder, samples/, loss.png. None of these is
    worth a run: where one cannot be written a line says so, once, and the training goes on.

    history: [[step, loss]], kept in the checkpoint so that loss.png shows the whole run."""

    def __init__(self, folder: Path, step: int, history: list[list[float]]):
        self.folder, self.history = folder, history
        self.events, self.failed = EventFile(folder, step), set()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log a few numbers of a step."""
        with self._not_worth_a_run("TensorBoard's file"):
            from tensorboard.compat.proto.summary_pb2 import Summary

            numbers = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
            self.events.add(step=step, summary=Summary(value=numbers))

    def images(self, step: int, grid: Image.Image) -> None:
        """Log a grid, and save it as samples/step_XXXXXXXX.png."""
        with self._not_worth_a_run("samples/"):
            save_image(grid, self.folder / "samples" / f"step_{step:08d}.png")
        with self._not_worth_a_run("TensorBoard's file"):
            from tensorboard.compat.proto.summary_pb2 import Summary

            png = io.BytesIO()
            grid.save(png, "PNG")
            size = dict(width=grid.width, height=grid.height, colorspace=3)
            image = Summary.Image(**size, encoded_image_string=png.getvalue())
            value = Summary.Value(tag="samples", image=image)
            self.events.add(step=step, summary=Summary(value=[value]))

    def plot_loss(self) -> None:
        """Plot the losses so far as loss.png."""
        if not self.history:
            return
        with self._not_worth_a_run("loss.png"):
            from matplotlib.figure import Figure

            figure = Figure(figsize=(7, 4), layout="constrained")
            axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
            axes.plot(*zip(*self.history, strict=True))
            path = self.folder / "loss.png"
            write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))

    @contextlib.contextmanager
    def _not_worth_a_run(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk, a folder taken away, a broken library
            if what not in self.failed:
                reason = " ".join(str(error).split())
                warn(f"{self.folder}: {what} is not written ({reason}); the training goes on")
            self.failed.add(what)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.events.close()
