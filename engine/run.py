"""A run: what a training step works with, and what the loop does between two steps."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataset import Faces
from diffusion import Diffusion, image_generators
from engine.log import Meter, Progress, RunLog
from engine.safety import StopSignals
from engine.state import State
from generate import draw_attributes, usual_attributes
from metrics import held_out_loss
from samplers import even_timesteps
from system.errors import DivergedError, Interrupted
from system.files import FolderLock
from system.processes import Processes
from system.terminal import say
from utils import checkpoint_path, image_grid, prune_checkpoints, save_checkpoint

LOSS_TIMESTEPS = 50  # number of timesteps at which the held-out loss is computed
GRID_STEPS = 10  # evaluations of the network for an image of a grid


@dataclass
class Run:
    """What a training step works with. A test can build it without a folder; the loop of train.py
    gets a `Session`."""

    config: Any  # train.Config
    state: State
    diffusion: Diffusion
    batches: Callable[[int], tuple[Tensor, Tensor | None]]  # number -> x_0, attributes
    forward: nn.Module  # the network as the step calls it: compiled, distributed
    dtype: torch.dtype | None = None  # half precision to compute in, or None
    rank: int = 0
    world_size: int = 1


@dataclass
class Session(Run):
    """A run that writes its folder, as rank 0 does; `Worker` is that of the other processes.

    folder: of the run; about: what a checkpoint holds besides the state"""

    folder: Path = Path()
    about: dict = field(default_factory=dict)
    faces: Faces | None = None
    processes: Processes | None = None
    stop: StopSignals | None = None
    lock: FolderLock | None = None
    run_log: RunLog | None = None

    def __post_init__(self):
        self.meter = Meter(self.diffusion.device)
        self.patience = 20 if self.dtype == torch.float16 else 1  # skipped updates in a row
        self.finished, self.stopping = self.state.step, 0  # the last finished step; a signal
        self.save_seconds = 0.0  # that the last save took
        self.ends: list[float] = []  # when the session's first two steps ended
        micro_batches = self.config.gradient_accumulation_steps * self.world_size
        images, total = self.config.batch_size * micro_batches, self.config.num_training_steps
        self.progress = Progress(self.state.step, total, images, show=self.rank == 0)

    # The loop -------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Count the updates, from the next one to the last. Raises Interrupted, after the step in
        which a signal came was saved."""
        total = self.config.num_training_steps
        while self.state.step < total and not self.stopping:
            yield self.state.step + 1
        if self.stopping:
            say(f"stopped by a signal; step {self.state.step} is saved, --resume goes on from it")
            raise Interrupted(self.stopping)

    def due(self, every: int) -> bool:
        """Whether it is time for what is done every `every` steps. Also true at the last step, and
        when a signal stops the run. The first call after a step counts it."""
        self._finish_step()
        step = self.state.step
        return step % every == 0 or step == self.config.num_training_steps or bool(self.stopping)

    def _finish_step(self) -> None:
        """Count the step and ask whether a process got a signal, once for each step."""
        if self.finished < self.state.step:
            self.finished = self.state.step
            self.progress.step()
            self.stopping = self.processes.stop_after(self.finished, self.stop.received)
            if len(self.ends) < 2:
                self.ends.append(time.monotonic())
                if len(self.ends) == 2:  # the first step takes longer than all others
                    step_seconds = self.ends[1] - self.ends[0]
                    self.processes.check_grace(step_seconds + self.save_seconds)

    # What is due ----------------------------------------------------------------------------------

    def log(self) -> None:
        """Read the meter, and log it. Raises DivergedError if the numbers are no longer finite."""
        step = self.state.step
        values, streaks = self.meter.read(self.processes.mean)
        fix = "--resume with a lower --learning_rate, or with --mixed_precision bf16"
        if streaks["loss"]:
            raise DivergedError(f"step {step}", "the loss is not finite", fix)
        if streaks["grad_norm"] >= self.patience:
            what = f"the gradients of {streaks['grad_norm']:.0f} updates in a row are not finite"
            raise DivergedError(f"step {step}", what, fix)
        values["learning_rate"] = self.state.optimizer.param_groups[0]["lr"]
        values["images_per_second"] = self.progress.log(values["loss"])
        self.state.history.append([step, values["loss"]])
        self.run_log.scalars(step, values)

    def save(self) -> None:
        """Save a checkpoint, and remove old ones."""
        self.lock.check()
        path = checkpoint_path(self.folder, self.state.step)
        self.save_to(path)
        prune_checkpoints(path, self.config.keep_checkpoints, self.config.num_training_steps)
        self.wait()

    def measure(self) -> None:
        """Log the held-out loss of the averaged weights, and plot the loss."""
        if not self.stopping:
            self.run_log.scalars(self.state.step, self.held_out_loss())
        self.run_log.plot_loss()
        self.wait()

    def sample(self) -> None:
        """Log a grid sampled with the averaged weights, always from the same noise, and how far its
        mean colour is from the data's, in grey levels."""
        if not self.stopping and (images := self.grid(self.config.num_samples)) is not None:
            self.run_log.images(self.state.step, image_grid(images))
            drift = images.mean((0, 2, 3)).cpu() * 127.5 + 127.5 - self.mean_colour()
            names = [f"colour_drift/{colour}" for colour in ("red", "green", "blue")]
            self.run_log.scalars(self.state.step, dict(zip(names, drift.tolist(), strict=True)))
        self.wait()

    def wait(self) -> None:
        """Wait for all processes, so that none waits for rank 0 in an exchange of gradients."""
        self.processes.everyone()
        self.progress.restart()  # the clock counts training only

    # How ------------------------------------------------------------------------------------------

    def save_to(self, path: Path) -> None:
        """Write a checkpoint to a file."""
        started = time.monotonic()
        save_checkpoint(path, self.about | self.state.state_dict())
        self.save_seconds = time.monotonic() - started

    def held_out_loss(self) -> dict[str, float]:
        """The averaged weights' loss on held-out faces, always with the same noise; {} without."""
        some, batch_size = self.faces.held_out[:200], self.config.batch_size
        if len(some) == 0:
            return {}
        timesteps = even_timesteps(self.diffusion.num_timesteps, LOSS_TIMESTEPS)
        # All batches have one size, which fits if a batch fits in training.
        sizes = [size for size in (1, 2, 4, 5, 8, 10, 20, 25, 40, 50) if size <= batch_size]
        losses = held_out_loss(
            self.state.ema.model,
            self.diffusion,
            self.faces.images[some],
            self.faces.attributes[some],
            timesteps=timesteps,
            draws=4,
            dtype=self.dtype,
            batch_size=sizes[-1],
        )
        return {"held_out_loss": float(losses.mean())}

    def grid(self, num_images: int, steps: int = GRID_STEPS) -> Tensor | None:
        """Images of the averaged weights, (num_images, 3, H, W) in [-1, 1], with the attributes of
        training faces. None if a signal came in between."""
        config, batch_size = self.config, min(self.config.batch_size, 64)
        size = (3, config.img_size, config.img_size)
        images = torch.zeros(num_images, *size)  # allocate first: fail early
        for start in range(0, num_images, batch_size):
            numbers = range(start, min(start + batch_size, num_images))
            options = dict(steps=steps, generator=image_generators(config.seed, numbers))
            if config.attributes:
                rows = usual_attributes(self.about["settings"])
                drawn = draw_attributes(rows, numbers, config.seed)
                options["attributes"] = drawn.to(self.diffusion.device)
            shape = (len(numbers), *size)
            device = self.diffusion.device.type
            with torch.autocast(device, self.dtype, enabled=self.dtype is not None):
                loop = self.diffusion.sample_loop(self.state.ema.model, shape, **options)
                for _, _, x_0_pred in loop:
                    batch = x_0_pred
                    if self.stop.received:
                        return None
            images[start : numbers.stop] = batch.float().cpu()
        return images

    def mean_colour(self) -> Tensor:
        """The mean colour of 256 training faces, (3,) in grey levels."""
        train = self.faces.train
        some = train[np.linspace(0, len(train) - 1, 256).astype(int)]
        return torch.from_numpy(self.faces.images[some].mean((0, 1, 2)))


class Worker(Session):
    """A run as the processes other than rank 0 see it: they take steps and write nothing."""

    def save(self) -> None:
        """Wait while rank 0 saves."""
        self.wait()

    measure = save
    sample = save


class NoLog:
    """The log of a process that writes none."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log nothing."""

    def close(self) -> None:
        """Close nothing."""
