"""Images from a checkpoint: the network it holds, what that generates, and the files that keep it.

trained = load_trained("my_first_diffusion")
images = torch.cat(list(generate(trained, range(64))))      # (64, 3, H, W) in [-1, 1]
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from diffusion import Diffusion, image_generators
from formats.weights import open_weights
from system.device import autocast_dtype, check_gpu, find_device
from system.errors import CheckpointError, DataError, UsageError
from system.files import write_atomically
from unet import UNet
from utils import find_guide, image_grid, plain_keys, reading, to_uint8


@dataclass(frozen=True)
class Trained:
    """A network out of a checkpoint, with what was used to train it. Called, it is the network, run
    in its precision."""

    path: Path
    model: nn.Module  # a UNet, in eval mode, its weights in `dtype`
    diffusion: Diffusion
    dtype: torch.dtype | None  # half precision to run it in, or None
    settings: dict  # the constants of its run
    step: int
    guided_by: str = ""  # the digest of the guide and the strength, where there is one
    guide: Path | None = None  # its file

    @property
    def img_size(self) -> int:
        """Pixels of a side."""
        return self.settings["img_size"]

    @property
    def image_channels(self) -> int:
        """C: 3 of colour, 1 of grey images."""
        return self.settings.get("image_channels", 3)

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """The attributes that it has learned; none for an unconditional network."""
        return tuple(self.settings["attributes"])

    @property
    def usual_attributes(self) -> Tensor:
        """(M, K), 1 or -1: those of some of the faces that it was trained on; of older checkpoints,
        which do not tell, one row of 0, not said."""
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

    checkpoint: as in `open_weights`; raw: the weights in training, not their average; device:
    "cuda" where there is one, else "cpu"; half: in half precision where the device has it. Raises
    CheckpointError; ResourceError for a GPU that this torch has nothing for."""
    device = torch.device(device or find_device())
    check_gpu(device)
    path, saved = open_weights(checkpoint)
    with reading(path, "take another checkpoint"):
        model = UNet(**saved["unet"])
        weights = saved["model"] if raw else saved["ema"]["model"]
        model.load_state_dict(plain_keys(weights))
        diffusion = Diffusion(**saved["diffusion"], device=device)
        settings, step = {**saved["settings"]}, saved["step"]
        settings["image_channels"] = model.image_channels
        if saved["unet"].get("num_attributes", 0) != len(settings["attributes"]):
            raise ValueError("settings and network have other attributes")
        rows = settings.get("usual_attributes", [])
        if not all(re.fullmatch(f"[-+]{{{len(settings['attributes'])}}}", row) for row in rows):
            raise ValueError("settings and their usual_attributes do not fit")
        if settings["img_size"] != model.img_size:
            raise ValueError("settings and network have another img_size")
    model = model.eval().requires_grad_(False).to(device)
    # What was trained in bf16 need not fit into fp16's range.
    trained_in = "bf16" if settings.get("mixed_precision") == "bf16" else "fp16"
    dtype = autocast_dtype(trained_in if half else "no", device)
    if dtype is not None:
        cast_weights(model, dtype)
    return Trained(path, model, diffusion, dtype, settings, step)


class Autoguided(nn.Module):
    """A network led away from its own early self, whose errors are its own, only larger: Karras et
    al. 2024, "Guiding a diffusion model with a bad version of itself", eq. 3. Two evaluations."""

    def __init__(self, model: nn.Module, guide: nn.Module, strength: float):
        super().__init__()
        self.model, self.guide, self.strength = model, guide, strength

    def forward(self, x_t: Tensor, t: Tensor, attributes: Tensor | None = None) -> Tensor:
        """Arguments and result as of `UNet`; the result in x_t's precision."""
        condition = () if attributes is None else (attributes,)
        good = self.model(x_t, t, *condition).to(x_t.dtype)
        bad = self.guide(x_t, t, *condition).to(x_t.dtype)
        return bad + self.strength * (good - bad)


def own_guide(trained: Trained) -> Path | None:
    """What guides these weights where nothing is said: the early checkpoint that their run kept,
    if they have at least twice its steps; the folder `<name>_guide` beside a folder of weights."""
    folder, total = trained.path.absolute().parent, trained.settings.get("num_training_steps")
    if folder.name != "checkpoints":
        folder = folder.parent if folder.name == "unet" else folder
        beside = folder.with_name(f"{folder.name}_guide")
        return beside if beside.is_dir() else None
    guide = find_guide(trained.path.parent.parent, total) if total else None
    return guide if guide and int(guide.stem[5:]) * 2 <= trained.step else None


def add_guide(trained: Trained, checkpoint: str | Path = "auto", strength: float = 1.3) -> Trained:
    """The network guided by an earlier checkpoint of its run: "auto" takes `own_guide`'s, "none"
    none, and the network stays as it is. Raises UsageError where the checkpoint is of other images,
    CheckpointError where it cannot be loaded."""
    checkpoint = own_guide(trained) if checkpoint == "auto" else checkpoint
    if checkpoint in (None, "none"):
        return trained
    guide = load_trained(
        checkpoint, device=trained.diffusion.device, half=trained.dtype is not None
    )
    names = (
        "img_size",
        "image_channels",
        "attributes",
        "prediction",
        "noise_schedule",
        "num_timesteps",
    )
    for name in names:
        pair = guide.settings.get(name), trained.settings.get(name)
        if pair[0] != pair[1]:
            what = f"{guide.path}: its {name} is {pair[0]}, that of {trained.path} is {pair[1]}"
            raise UsageError("--guide", what, "name an earlier checkpoint of the same run")
    with open(guide.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    model = Autoguided(trained.model, guide.model, strength)
    return replace(trained, model=model, guided_by=f"{digest} {strength}", guide=guide.path)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast once what autocast would cast at each evaluation; norms stay in float32."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(dtype)


def usual_attributes(settings: dict) -> Tensor:
    """`Trained.usual_attributes`, out of the settings of a run."""
    rows = settings.get("usual_attributes") or ["0" * len(settings["attributes"])]
    return torch.tensor([["-0+".index(sign) - 1.0 for sign in row] for row in rows])


def draw_attributes(rows: Tensor, numbers: Sequence[int], seed: int = 0) -> Tensor:
    """Of `usual_attributes`, (M, K), a row drawn for the image of each number by (seed, number):
    (N, K)."""
    return rows[[int(np.random.default_rng((seed, i, 1)).integers(len(rows))) for i in numbers]]


def sample_loop(
    trained: Trained,
    numbers: Sequence[int],
    seed: int = 0,
    attributes: Tensor | None = None,
    **options,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`Diffusion.sample_loop` for the images of these numbers: yields (x_t, x_0_pred).

    Image i depends on (seed, i) alone. attributes: (N, K), or (1, K) for all; where nothing is said
    an image from noise alone gets those of a training face. Raises CheckpointError where the
    network leaves the finite numbers."""
    device = trained.diffusion.device
    if attributes is None and trained.attribute_names and not options.keys() & {"image", "x_T"}:
        attributes = draw_attributes(trained.usual_attributes, numbers, seed)
    if attributes is not None:
        attributes = attributes.to(device).expand(len(numbers), -1)
    for name in options.keys() & {"image", "mask"}:
        options[name] = options[name].to(device)
    options |= dict(generator=image_generators(seed, numbers), attributes=attributes)
    shape = (len(numbers), trained.image_channels, trained.img_size, trained.img_size)
    for _, x_t, x_0_pred in trained.diffusion.sample_loop(trained, shape, **options):
        yield x_t, x_0_pred
    if not torch.isfinite(x_0_pred).all():
        what = "generates images that are not finite numbers"
        raise CheckpointError(trained.path, what, "take another checkpoint")


def generate(
    trained: Trained,
    numbers: Sequence[int],
    seed: int = 0,
    batch_size: int = 64,
    steps: int = 10,
    bar: tqdm | None = None,
    turn: int = 0,
    turns: int = 1,
    **options,
) -> Iterator[Tensor]:
    """The images of these numbers, a batch at a time: yields (b, C, H, W) in [-1, 1].

    bar: shows how many images are done, after each step; turn, turns: of several processes that
    take turns with the batches; the rest as for `sample_loop` and `Diffusion.sample_loop`, which
    say what is raised; of what has a row for each image (or one for all) each gets its own."""
    of_each = {name: options.pop(name, None) for name in ("attributes", "x_T", "image", "mask")}
    of_each = {
        name: rows.expand(len(numbers), *rows.shape[1:])
        for name, rows in of_each.items()
        if rows is not None
    }
    moves = steps * options.get("resample", 1)
    for start in range(turn * batch_size, len(numbers), turns * batch_size):
        part = slice(start, start + batch_size)
        options |= {name: rows[part] for name, rows in of_each.items()}
        loop = sample_loop(trained, numbers[part], seed, steps=steps, **options)
        for i, (_, images) in enumerate(loop):
            if bar is not None:  # whole images' worth of what is done
                bar.update(len(images) * (i + 1) // moves - len(images) * i // moves)
        yield images


# Sheets ------------------------------------------------------------------------------------------


def sheet_rows(attribute_names: Sequence[str]) -> tuple[list[str], Tensor]:
    """What a sheet asks for: each attribute by itself, on and off. Returns a label for each row,
    and the rows, (2K, K) of 1, -1 and 0."""
    labels = [label for name in attribute_names for label in (name, f"not {name}")]
    one = torch.eye(len(attribute_names))
    return labels, torch.stack([one, -one], dim=1).flatten(0, 1)


def sheet(
    attribute_names: Sequence[str], columns: int, attributes: Tensor | None = None
) -> tuple[list[str], list[int], Tensor]:
    """The images of a sheet, row after row, each row from the same noise: the rows' labels, the
    images' numbers (N) and attributes (N, K). attributes: (1, K), what holds in every row."""
    labels, rows = sheet_rows(attribute_names)
    if attributes is not None:
        rows = torch.where(rows == 0, attributes, rows)
    return labels, list(range(columns)) * len(labels), rows.repeat_interleave(columns, dim=0)


def sample_grid(
    config, model, diffusion, dtype, attributes, stop, steps=10
) -> tuple[Image.Image, Tensor] | None:
    """A grid of faces, always from the same noise, by `sample.py`'s default sampler; of a network
    that knows attributes for those of training faces, drawn from `attributes`, (M, K). With it the
    faces' mean colour, (3,) in [-1, 1]. None where a signal came in between."""
    numbers, options = list(range(config.num_samples)), {"steps": steps}  # too many fail here
    if config.attributes:
        drawn = draw_attributes(attributes, numbers, config.seed)
        options["attributes"] = drawn.to(diffusion.device)
    options["generator"] = image_generators(config.seed, numbers)
    shape = (len(numbers), model.image_channels, config.img_size, config.img_size)
    with torch.autocast(diffusion.device.type, dtype, enabled=dtype is not None):
        for _, _, x_0_pred in diffusion.sample_loop(model, shape, **options):
            faces = x_0_pred
            if stop.received:
                return None
    return image_grid(faces), faces.mean(dim=(0, 2, 3)).expand(3).cpu()


# Kept images -------------------------------------------------------------------------------------


class Generated(NamedTuple):
    """What one sampler has generated."""

    name: str  # of the sampler
    images: np.ndarray  # (N, S, S, 3) uint8
    seconds: float  # that it took, over all processes


def batch_files(num_images: int, batch_size: int, folder: Path) -> list[tuple[range, Path]]:
    """The numbers of the images in each batch, and the file in `folder` that keeps them."""
    starts = range(0, num_images, batch_size)
    batches = [range(start, min(start + batch_size, num_images)) for start in starts]
    return [(each, folder / f"{each.start:06d}-{each.stop:06d}.npz") for each in batches]


def keep_generated(path: Path, make: Callable[[], Tensor]) -> None:
    """Keep in a file the images that `make` returns, (N, 3, H, W) in [-1, 1], and the seconds that
    it takes."""
    started = time.perf_counter()
    images = to_uint8(make()).numpy()
    seconds = time.perf_counter() - started

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, images=images, seconds=seconds)

    write_atomically(path, write)


def read_generated(name: str, files: Sequence[tuple[range, Path]]) -> Generated:
    """What lies in the files of one sampler. Raises DataError where one is damaged."""
    images, seconds = [], 0.0
    for numbers, path in files:
        try:
            with np.load(path) as kept:
                images.append(kept["images"])
                seconds += float(kept["seconds"])
            if images[-1].dtype != np.uint8 or images[-1].shape[:1] != (len(numbers),):
                raise ValueError(f"{images[-1].dtype} {images[-1].shape}")
        except Exception as error:  # numpy and zipfile raise many kinds
            fix = "delete it, and it is generated again"
            raise DataError(path, f"is damaged ({error})", fix) from error
    return Generated(name, np.concatenate(images), seconds)
