"""Draw pictures from a checkpoint.

python sample.py                                        # the newest run's, 64 faces, samples.png
python sample.py --checkpoint my_first_diffusion --num_images 64 --seed 0 --out faces.png
python sample.py --sampler ddpm --steps 1000 --out way.gif    # from noise to faces
python sample.py --num_images 5000 --out faces                # single pictures in a folder
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import cli
from diffusion import Diffusion, image_generators
from errors import CheckpointError, UsageError
from log import say
from unet import UNet
from utils import find_checkpoint, image_grid, load_checkpoint, plain_keys, save_image, to_uint8

GIF_FRAMES = 40  # at most, in the way from noise to faces


@dataclass(frozen=True)
class Sample:
    """What to draw, and how."""

    checkpoint: str = ""  # a run's folder (its newest), a file in it; empty: the newest run here
    num_images: int = 64  # pictures to draw
    sampler: Literal["ddpm", "ddim", "dpm++"] = "dpm++"  # dpm++ needs the fewest steps
    steps: int = 20  # evaluations of the network for each picture
    eta: float = 0.0  # noise that ddim adds: 0 none, 1 as much as ddpm
    seed: int = 0  # picture i depends on (seed, i) alone
    batch_size: int = 64  # pictures drawn at a time
    raw: bool = False  # draw from the weights as trained, not from their average (EMA)
    out: str = "samples.png"  # .png: one grid; .gif: the way from noise to faces; else a folder


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
    dtype = torch.float16 if device.type == "cuda" else None
    model = model.eval().requires_grad_(False).to(device)
    return Trained(path, model, diffusion, dtype, settings, step)


def generate(
    trained: Trained,
    num_images: int,
    seed: int = 0,
    batch_size: int = 64,
    first: int = 0,
    **options,
) -> Iterator[Tensor]:
    """Draw pictures first ... num_images - 1, a batch at a time: yields (b, 3, H, W) in [-1, 1].

    Picture i is the same whatever the batch size. options: `Diffusion.sample_loop`'s."""
    size = trained.img_size
    for start in range(first, num_images, batch_size):
        indices = range(start, min(start + batch_size, num_images))
        with torch.autocast(
            trained.diffusion.device.type, trained.dtype, trained.dtype is not None
        ):
            yield trained.diffusion.sample(
                trained.model,
                (len(indices), 3, size, size),
                generator=image_generators(seed, indices),
                **options,
            )


def draw_way(trained: Trained, num_images: int, seed: int, **options) -> list[Image.Image]:
    """The way from noise to faces: grids of x_t at up to GIF_FRAMES steps, and of the faces."""
    shape = (num_images, 3, trained.img_size, trained.img_size)
    noise = image_generators(seed, range(num_images))
    every = max(1, options["steps"] // GIF_FRAMES)
    frames = []
    loop = trained.diffusion.sample_loop(trained.model, shape, generator=noise, **options)
    for i, (_, x_t, x_0) in enumerate(
        tqdm(loop, total=options["steps"], unit="step", disable=None)
    ):
        if i % every == 0:
            frames.append(image_grid(x_t))
    return [*frames, image_grid(x_0)]


def check(wish: Sample, num_timesteps: int) -> None:
    """Raise UsageError, naming the flag, for what cannot be."""

    def check_one(good: bool, name: str, allowed: str) -> None:
        if not good:
            raise UsageError(f"--{name}", f"is {getattr(wish, name)!r}", f"give {allowed}")

    for name in ("num_images", "steps", "batch_size"):
        check_one(getattr(wish, name) >= 1, name, "a whole number from 1")
    check_one(wish.seed >= 0, "seed", "a whole number from 0")
    check_one(0 <= wish.eta <= 1, "eta", "a number from 0 to 1")
    check_one(wish.eta == 0 or wish.sampler == "ddim", "eta", "0, or --sampler ddim")
    if wish.sampler != "dpm++":
        check_one(
            wish.steps <= num_timesteps, "steps", f"at most {num_timesteps} for {wish.sampler}"
        )
    endings = ("", ".png", ".gif")
    check_one(Path(wish.out).suffix in endings, "out", "a name ending in .png or .gif, or a folder")


def sample(wish: Sample) -> Path:
    """Draw and save what is wished. Returns where it lies."""
    check(wish, num_timesteps=sys.maxsize)
    trained = load_trained(wish.checkpoint or None, wish.raw)
    check(wish, trained.diffusion.num_timesteps)
    out = Path(wish.out)
    options = dict(sampler=wish.sampler, steps=wish.steps, eta=wish.eta)
    if out.suffix == ".gif":
        first, *rest = draw_way(trained, wish.num_images, wish.seed, **options)
        pauses = [80] * len(rest) + [2000]  # milliseconds
        save_image(first, out, save_all=True, append_images=rest, duration=pauses, loop=0)
    else:
        kept, done = [], 0
        batches = generate(trained, wish.num_images, wish.seed, wish.batch_size, **options)
        with tqdm(total=wish.num_images, unit="image", disable=None) as bar:
            for images in batches:
                if out.suffix == ".png":
                    kept.append(images.cpu())
                else:
                    for i, pixels in enumerate(to_uint8(images).permute(0, 2, 3, 1).numpy(), done):
                        save_image(Image.fromarray(pixels), out / f"{i:06d}.png")
                done += len(images)
                bar.update(len(images))
        if kept:
            save_image(image_grid(torch.cat(kept)), out)
    say(f"{wish.num_images} faces of {trained.path} in {out}")
    return out


def main() -> None:
    """The command line: Sample's flags."""
    sample(cli.parse(Sample, sys.argv[1:], "Draw pictures from a checkpoint."))


if __name__ == "__main__":
    cli.run(main)
