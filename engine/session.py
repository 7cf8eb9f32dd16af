"""What a run works with: set up from its constants or its newest checkpoint, and tried out before
the first step."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dataset.faces import Batches, Faces, load_faces
from diffusion import Diffusion
from engine.safety import StopSignals, preflight
from engine.state import (
    State,
    check_split,
    diffusion_arguments,
    fill_config,
    make_state,
    open_run,
    take_up,
    unet_arguments,
)
from formats.weights import open_weights, start_from
from generate import sample_grid, usual_attributes
from metrics import held_out_loss
from system.device import autocast_dtype, compile_network, precision_note
from system.errors import UsageError
from system.files import save_json
from system.processes import Processes
from system.terminal import say
from utils import reading, save_checkpoint

LOSS_TIMESTEPS = 50  # at which the held-out loss is taken at each save


class Run(NamedTuple):
    """What a run works with, once it is set up."""

    config: Any  # train.Config
    folder: Path
    faces: Faces
    batches: Batches
    diffusion: Diffusion
    dtype: torch.dtype | None  # half precision to compute in, or None
    state: State
    about: dict  # what a checkpoint holds besides the state

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        save_checkpoint(path, self.about | self.state.state_dict())

    def sample(
        self, stop: StopSignals, num_samples: int, steps: int = 10
    ) -> tuple[Image.Image, dict[str, float]] | None:
        """A grid from the averaged weights and, to log, its mean colour beside the data's, in grey
        levels; None where a signal came in between."""
        config = replace(self.config, num_samples=num_samples)
        model = self.state.ema.model
        attributes = usual_attributes(self.about["settings"])
        sampled = sample_grid(config, model, self.diffusion, self.dtype, attributes, stop, steps)
        if sampled is None:
            return None
        grid, mean = sampled
        some = self.faces.train[np.linspace(0, len(self.faces.train) - 1, 256).astype(int)]
        means = {"samples": mean * 127.5 + 127.5, "data": self.faces.images[some].mean((0, 1, 2))}
        return grid, {
            f"mean_{colour}/{name}": float(value)
            for name, values in means.items()
            for colour, value in zip(("red", "green", "blue"), values, strict=True)
        }

    def held_out_loss(self) -> dict[str, float]:
        """The averaged weights' loss on held-out faces, always with the same noise; {} of none."""
        some = self.faces.held_out[:200]
        if len(some) == 0:
            return {}
        images, attributes = self.faces.images[some], self.faces.attributes[some]
        timesteps = self.diffusion.timesteps(LOSS_TIMESTEPS)
        options = dict(timesteps=timesteps, draws=4, dtype=self.dtype)
        options |= dict(batch_size=min(self.config.batch_size, 64))  # what fits in training fits
        model = self.state.ema.model
        losses = held_out_loss(model, self.diffusion, images, attributes, **options).loss
        return {"held_out_loss": float(losses.mean())}


def set_up(config, processes: Processes) -> Run:
    """The faces, the network, and where the run stood: rank 0 knows, the others learn it from it.
    Raises UserError, by kind."""
    folder, device = Path(config.experiment_name), processes.device
    found = processes.share(open_run(folder, config.resume) if processes.is_main else None)
    if found:
        config = fill_config(config, *found)
    origin = None
    if config.init_from and not found:
        origin = processes.share(open_weights(config.init_from) if processes.is_main else None)
    base = (found or origin or (None, {}))[1].get("unet")
    with processes.first_of_each_machine_first():
        faces = load_faces(
            config.path_to_data, config.img_size, config.only, config.attributes, config.grey
        )
    channels = image_channels(config, faces, base, (found or origin or ("",))[0])
    base = {**(base or {}), "image_channels": 1} if channels == 1 else base
    split = dict(stride=processes.world_size, channels=channels)
    batches = Batches(faces, config.batch_size, config.seed, device, **split)
    diffusion = Diffusion(**diffusion_arguments(config), device=device)
    dtype = autocast_dtype(config.mixed_precision, device)
    state = make_state(config, device, dtype == torch.float16, base)
    facts = {"faces": faces.fingerprint}
    networks = {"unet": unet_arguments(config, base), "diffusion": diffusion_arguments(config)}
    split = {"world_size": processes.world_size}
    split["micro_batches"] = config.gradient_accumulation_steps * processes.world_size
    usual = {"usual_attributes": faces.usual_attributes()} if config.attributes else {}
    about = {"settings": asdict(config) | facts | split | usual, **networks}
    if found:
        with reading(found[0], "resume from another checkpoint"):
            was = found[1]["settings"]
            if faces.matches(was.get("faces", "")):  # maybe by an older kind of checksum
                was["faces"] = faces.fingerprint
            check_split(*found, split)
            take_up(state, *found, config, facts)
    elif origin:
        start_from(state, *origin, config)
    own = ("experiment_name", "path_to_data", "resume")  # may differ from machine to machine
    shared = {name: value for name, value in about["settings"].items() if name not in own}
    processes.agree({"step": state.step} | shared)
    return Run(config, folder, faces, batches, diffusion, dtype, state, about)


def image_channels(config, faces: Faces, base: dict | None, path: Path | str) -> int:
    """C: that of the weights it begins with, else 1 where all images are grey. Raises UsageError
    where the weights, of `path`, are of others than the images."""
    channels = base.get("image_channels", 3) if base else 1 if faces.grey else 3
    if channels == 3 and config.grey:
        fix = "leave it out, or begin without these weights"
        raise UsageError("--grey", f"{path} is of colour images", fix)
    if channels == 1 and not faces.grey:
        raise UsageError(path, "is of grey images, these have colours", "add --grey")
    return channels


def rehearse(run: Run, processes: Processes, stop: StopSignals) -> None:
    """Say what is trained on what; find out now what would fail later."""
    config, device, model = run.config, processes.device, run.state.model
    used = str(run.dtype or torch.float32).removeprefix("torch.")
    if note := precision_note(config.mixed_precision, run.dtype, device):
        say(note)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(run.faces.description)
    if run.batches.channels == 1:
        say("all images are grey, so the network has one channel")
    say(f"{millions:.1f} M weights in {used} on {processes.world_size} x {device.type}")
    size = sum(p.nbytes for p in model.parameters())
    needed = (config.keep_checkpoints + 2) * size * 4  # weights, EMA, two moments of Adam's
    sample = partial(run.sample, stop, config.num_samples, steps=1)  # as large as it will be
    preflight(run.folder, needed, sample, run.save)
    save_json(run.folder / "config.json", asdict(config))


def prepare_network(
    run: Run, processes: Processes, loss: Callable[[nn.Module], Tensor]
) -> nn.Module:
    """The network as the step calls it: distributed, on a GPU compiled.

    loss: of the first batch, by the network it is given. Raises ResourceError."""
    forward = processes.distribute(run.state.model)
    if run.config.compile and processes.device.type == "cuda":
        say("compiling the network, a minute or two; --no_compile does without")
        seconds = compile_network(forward, lambda: loss(forward))
        say(f"compiled in {seconds:.0f} s")
    elif processes.world_size > 1:
        # After the first exchange DDP orders the gradients anew, and in another order several add
        # up to other roundings: let that be over, or a resumed run would differ in one step.
        loss(forward).backward()
        forward.zero_grad()
    return forward
