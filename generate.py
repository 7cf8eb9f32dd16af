"""Images from a checkpoint: the network that it holds, and what it generates."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from device import autocast_dtype
from diffusion import Diffusion, image_generators
from errors import CheckpointError
from images import image_grid
from unet import UNet
from utils import find_checkpoint, load_checkpoint, plain_keys


@dataclass(frozen=True)
class Trained:
    """A network out of a checkpoint, with what was used to train it."""

    path: Path
    model: UNet
    diffusion: Diffusion
    dtype: torch.dtype | None  # half precision to run it in, or None
    settings: dict  # the constants of its run
    step: int

    @property
    def img_size(self) -> int:
        """Pixels of a side."""
        return self.settings["img_size"]

    @property
    def attributes(self) -> tuple[str, ...]:
        """The attributes that faces can be asked for by; empty for an unconditional network."""
        return tuple(self.settings["attributes"])

    def autocast(self) -> torch.autocast:
        """A context in which the network runs in `dtype`."""
        return torch.autocast(self.diffusion.device.type, self.dtype, self.dtype is not None)


def load_trained(checkpoint: str | Path | None, raw: bool = False, device: str = "") -> Trained:
    """Build the network that a checkpoint holds, in eval mode.

    checkpoint: as in `find_checkpoint`; raw: the weights in training, not their average; device:
    "cuda" where there is one, else "cpu". Raises CheckpointError."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = find_checkpoint(checkpoint)
    saved = load_checkpoint(path)
    try:
        model = UNet(**saved["unet"])
        weights = saved["model"] if raw else saved["ema"]["model"]
        model.load_state_dict(plain_keys(weights))
        diffusion = Diffusion(**saved["diffusion"], device=device)
        settings, step = saved["settings"], saved["step"]
    except KeyError as error:
        raise CheckpointError(path, f"lacks {error}", "take another checkpoint") from error
    except (RuntimeError, TypeError) as error:
        what = f"does not fit ({' '.join(str(error).split())[:300]})"
        raise CheckpointError(path, what, "take another checkpoint") from error
    model = model.eval().requires_grad_(False).to(device)
    return Trained(path, model, diffusion, autocast_dtype("fp16", device), settings, step)


def generate(
    trained: Trained,
    numbers: Sequence[int],
    seed: int = 0,
    batch_size: int = 64,
    attributes: Tensor | None = None,
    x_T: Tensor | None = None,
    **options,
) -> Iterator[Tensor]:
    """Draw the pictures of these numbers, a batch at a time: yields (b, 3, H, W) in [-1, 1].

    Picture i depends on (seed, i) alone, whatever the batch. attributes: (N, K), or (1, K) for all;
    x_T: (N, 3, H, W), the noise to start from; options: `Diffusion.sample_loop`'s."""
    size, device = trained.img_size, trained.diffusion.device
    if attributes is not None:
        attributes = attributes.to(device).expand(len(numbers), -1)
    for start in range(0, len(numbers), batch_size):
        part = slice(start, start + batch_size)
        noise = image_generators(seed, numbers[part])
        with trained.autocast():
            yield trained.diffusion.sample(
                trained.model,
                (len(noise), 3, size, size),
                generator=noise,
                attributes=None if attributes is None else attributes[part],
                x_T=None if x_T is None else x_T[part],
                **options,
            )


def sheet_rows(attributes: Sequence[str]) -> tuple[list[str], Tensor]:
    """What a sheet asks for: each attribute by itself, on and off. Returns a label for each row,
    and the rows, (2K, K) of 1, -1 and 0."""
    labels = [label for name in attributes for label in (name, f"not {name}")]
    one = torch.eye(len(attributes))
    return labels, torch.stack([one, -one], dim=1).flatten(0, 1)


def sample_grid(config, model, diffusion, dtype, stop, steps=20) -> Image.Image | None:
    """A grid of faces, from always the same noise and in `sample.py`'s default sampler; of a
    network that knows attributes a sheet that asks for each of them. None where a signal came in
    between."""
    rows, columns, labels, attributes = 1, config.num_samples, (), None
    if config.attributes:
        labels, asked = sheet_rows(config.attributes)
        rows, columns = len(labels), max(1, config.num_samples // len(labels))
        attributes = asked.repeat_interleave(columns, dim=0).to(diffusion.device)
    shape = (rows * columns, 3, config.img_size, config.img_size)
    noise = image_generators(config.seed, list(range(columns)) * rows)
    options = dict(steps=steps, generator=noise, attributes=attributes)
    with torch.autocast(diffusion.device.type, dtype, enabled=dtype is not None):
        for _, _, x_0 in diffusion.sample_loop(model, shape, **options):
            faces = x_0
            if stop.received:
                return None
    return image_grid(faces, columns if labels else 0, labels)
