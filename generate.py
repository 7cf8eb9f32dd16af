"""Images from a checkpoint.

trained = load_trained("my_first_diffusion")
images = torch.cat(list(generate(trained, range(64))))      # (64, 3, H, W) in [-1, 1]
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffusion import Autoguided, Diffusion, image_generators
from formats.weights import open_weights
from system.device import autocast_dtype, check_gpu, find_device
from system.errors import CheckpointError, UsageError
from unet import UNet
from utils import find_guide, reading

Moves = Iterator[tuple[Tensor, Tensor]]  # (x_t, x_0_pred) at each step


# The network -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A network from a checkpoint. Calling it runs the network in its precision."""

    path: Path  # the file it was read from
    model: nn.Module  # a UNet, in eval mode, its weights in `dtype`
    diffusion: Diffusion
    dtype: torch.dtype | None  # half precision to run it in, or None
    settings: dict  # the constants of its run
    step: int
    guide: Path | None = None  # the early checkpoint that guides it, if any
    autoguidance: float = 1.0  # how strongly

    @property
    def img_size(self) -> int:
        """Pixels of a side."""
        return self.settings["img_size"]

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """The attributes that it has learned; () for an unconditional network."""
        return tuple(self.settings["attributes"])

    @property
    def usual_attributes(self) -> Tensor:
        """(M, K) of 1 and -1: the attributes of some of the faces that it was trained on."""
        return usual_attributes(self.settings)

    def __call__(self, x_t: Tensor, t: Tensor, attributes: Tensor | None = None) -> Tensor:
        """The network's output, computed in `dtype`."""
        with torch.autocast(self.diffusion.device.type, self.dtype, self.dtype is not None):
            return self.model(x_t, t, attributes)


def load_trained(
    checkpoint: str | Path | None,
    raw: bool = False,
    device: str | torch.device = "",
    half: bool = True,
) -> Trained:
    """Build the network that a checkpoint holds, in eval mode.

    checkpoint: see `open_weights`; raw: the trained weights instead of their average; device: by
    default "cuda" if there is one, else "cpu"; half: use half precision if the device has it.
    Raises CheckpointError; ResourceError for a GPU that this torch does not support."""
    device = torch.device(device or find_device())
    check_gpu(device)
    saved = open_weights(checkpoint)
    settings = saved.settings
    with reading(saved.path, "use another checkpoint"):
        model = UNet(**saved.unet)
        model.load_state_dict(saved.model if raw else saved.ema)
        diffusion = Diffusion(**saved.diffusion, device=device)
        names, rows = settings["attributes"], settings.get("usual_attributes", [])
        if saved.unet.get("num_attributes", 0) != len(names):
            raise ValueError("settings and network have different attributes")
        if not all(re.fullmatch(f"[-+]{{{len(names)}}}", row) for row in rows):
            raise ValueError("settings and their usual_attributes do not match")
        if settings["img_size"] != model.img_size:
            raise ValueError("settings and network have different img_size")
    model = model.eval().requires_grad_(False).to(device)
    # Weights trained in bf16 may not fit into fp16's range.
    trained_in = "bf16" if settings.get("mixed_precision") == "bf16" else "fp16"
    dtype = autocast_dtype(trained_in if half else "no", device)
    if dtype is not None:
        cast_weights(model, dtype)
    return Trained(saved.path, model, diffusion, dtype, settings, saved.step)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast once what autocast would cast at each evaluation; norms stay in float32."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(dtype)


# Autoguidance ------------------------------------------------------------------------------------


def own_guide(trained: Trained) -> Path | None:
    """The default guide: the early checkpoint that the run kept, if the weights have at least twice
    its steps; for a folder of weights the folder `<name>_guide` beside it."""
    folder, total = trained.path.absolute().parent, trained.settings.get("num_training_steps")
    if folder.name != "checkpoints":
        folder = folder.parent if folder.name == "unet" else folder
        beside = folder.with_name(f"{folder.name}_guide")
        return beside if beside.is_dir() else None
    guide = find_guide(folder.parent, total) if total else None
    return guide if guide and int(guide.stem[5:]) * 2 <= trained.step else None


def add_guide(trained: Trained, checkpoint: str | Path = "auto", strength: float = 1.3) -> Trained:
    """The network guided by an earlier checkpoint of its run, at twice the cost (`Autoguided`).

    checkpoint: "auto" is `own_guide`, "none" leaves the network as it is. Raises UsageError if the
    checkpoint is from another kind of run, CheckpointError if it cannot be loaded."""
    checkpoint = own_guide(trained) if checkpoint == "auto" else checkpoint
    if checkpoint in (None, "none"):
        return trained
    half = trained.dtype is not None
    guide = load_trained(checkpoint, device=trained.diffusion.device, half=half)
    for name in ("img_size", "attributes", "prediction", "noise_schedule", "num_timesteps"):
        theirs, ours = guide.settings.get(name), trained.settings.get(name)
        if theirs != ours:
            what = f"{guide.path}: its {name} is {theirs}, but {trained.path} has {ours}"
            raise UsageError("--guide", what, "name an earlier checkpoint of the same run")
    model = Autoguided(trained.model, guide.model, strength)
    return replace(trained, model=model, guide=guide.path, autoguidance=strength)


# Attributes --------------------------------------------------------------------------------------


def usual_attributes(settings: dict) -> Tensor:
    """`Trained.usual_attributes` from the settings of a run; one row of 0 (open) if it has none."""
    rows = settings.get("usual_attributes") or ["0" * len(settings["attributes"])]
    return torch.tensor([["-0+".index(sign) - 1.0 for sign in row] for row in rows])


def draw_attributes(rows: Tensor, numbers: Sequence[int], seed: int = 0) -> Tensor:
    """A row of `usual_attributes`, (M, K), for each image, drawn by (seed, its number): (N, K)."""
    return rows[[int(np.random.default_rng((seed, i, 1)).integers(len(rows))) for i in numbers]]


# Images ------------------------------------------------------------------------------------------


def sample_loop(
    trained: Trained,
    numbers: Sequence[int],
    seed: int = 0,
    attributes: Tensor | None = None,
    **options,
) -> Moves:
    """Generate the images of these numbers step by step: yields (x_t, x_0_pred).

    Image i depends on (seed, i) only. attributes: (N, K); without them each image gets the
    attributes of some training face. options: those of `Diffusion.sample_loop`."""
    if attributes is None and trained.attribute_names and options.get("x_T") is None:
        attributes = draw_attributes(trained.usual_attributes, numbers, seed)
    if attributes is not None:
        options["attributes"] = attributes.to(trained.diffusion.device)
    shape = (len(numbers), 3, trained.img_size, trained.img_size)
    options["generator"] = image_generators(seed, numbers)
    for _, x_t, x_0_pred in trained.diffusion.sample_loop(trained, shape, **options):
        yield x_t, x_0_pred


def generate(
    trained: Trained,
    numbers: Sequence[int],
    seed: int = 0,
    batch_size: int = 64,
    steps: int = 10,
    bar: tqdm | None = None,
    rank: int = 0,
    world_size: int = 1,
    loop: Callable[..., Moves] = sample_loop,
    **options,
) -> Iterator[Tensor]:
    """Generate the images of these numbers in batches: yields (b, 3, H, W) in [-1, 1].

    bar: is advanced by whole images; rank, world_size: this process takes every world_size-th
    batch; loop: `sample_loop`, or one of editing.py; options: those of the loop. Options that are
    tensors have a row for each image, or one for all. Raises CheckpointError if the network's
    output is not finite."""
    tensors = {name: rows for name, rows in options.items() if isinstance(rows, Tensor)}
    tensors = {name: rows.expand(len(numbers), *rows.shape[1:]) for name, rows in tensors.items()}
    moves = steps * options.get("resample", 1)
    for start in range(rank * batch_size, len(numbers), world_size * batch_size):
        part = slice(start, start + batch_size)
        options |= {name: rows[part] for name, rows in tensors.items()}
        for i, (_, images) in enumerate(loop(trained, numbers[part], seed, steps=steps, **options)):
            if bar is not None:
                bar.update(len(images) * (i + 1) // moves - len(images) * i // moves)
        check_finite(trained, images)
        yield images


def check_finite(trained: Trained, images: Tensor) -> None:
    """Raise CheckpointError if the network generated something else than finite numbers."""
    if not torch.isfinite(images).all():
        what = "generates images that are not finite numbers"
        raise CheckpointError(trained.path, what, "use another checkpoint")
