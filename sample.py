"""Generate images from a checkpoint.

python sample.py                                        # the newest run: 64 images, samples.png
python sample.py --checkpoint my_first_diffusion --num_images 64 --seed 0 --out faces.png
python sample.py --sampler ddpm --steps 1000 --out way.gif    # from noise to faces
python sample.py --num_images 5000 --out faces                # single images in a folder
python sample.py --image face.png --mask mask.png             # generates what the mask has white
python sample.py --image face.png --mask 40:60,20:80          # a box: x, then y, in percent
python sample.py --image face.png --strength 0.4              # variations of an image
python sample.py --image face.png --condition Smiling --steps 50    # the same face, smiling
"""

import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataset.faces import match_names, parse_attributes
from editing import between, edit_loop, encode, noise_of, read_image, read_mask
from formats.weights import short
from generate import Trained, add_guide, check_finite, generate, load_trained, sample_loop
from samplers import SAMPLERS, check_sampler, is_deterministic
from system import flags
from system.device import DEVICES, find_device, set_up_generation
from system.errors import UsageError
from system.files import check_writable
from system.flags import check_ranges, constant
from system.processes import Processes
from system.terminal import say
from utils import image_grid, save_image, to_uint8

GRIDS = (".png", ".jpg", ".jpeg")  # suffixes of --out for one grid
GIF_FRAMES = 40  # at most, on the way from noise to faces
GIF_SIZE = 256  # pixels to which the frames are enlarged, at least


@dataclass(frozen=True)
class SampleConfig:
    """What to generate, and how."""

    # Images
    checkpoint: str = ""  # a run, a file in it, a diffusers folder, shipped weights; "": newest run
    num_images: int = constant(64, least=1)  # images to generate
    seed: int = constant(0, least=0)  # image i depends on (seed, i) only
    out: str = "samples.png"  # .png, .jpg: one grid; .gif: from noise to faces; else a folder
    # Sampler
    sampler: Literal[*SAMPLERS] = "dpm++"  # dpm++ needs the fewest steps
    steps: int = constant(10, least=1)  # evaluations of the network for each image
    eta: float = constant(0.0, least=0, most=1)  # noise that ddim adds: 1 as much as ddpm
    guide: str = "auto"  # an early checkpoint whose errors to avoid; auto: the run's own; none
    autoguidance: float = constant(1.3, least=1)  # how strongly: 1 not at all, 2 a lot
    raw: bool = False  # use the trained weights instead of their average (EMA)
    # Attributes
    condition: tuple[str, ...] = ()  # such as Smiling Male=-1; none: those of training faces
    guidance: float = constant(1.0, least=0)  # how strongly: 1 as learned, 2 to 4 more
    sheet: bool = False  # a row for each attribute, with and without, num_images columns
    # Editing
    image: str = ""  # an image of yours, to repair (mask), vary (strength) or change (condition)
    mask: str = ""  # what to generate anew: a file, white on black, or a box such as 40:60,20:80
    resample: int = constant(5, least=1)  # times that each part of a repair is repeated
    strength: float | None = constant(None, least=0, most=1)  # 0: --image itself, 1: nothing of it
    interpolate: tuple[int | str, ...] = constant((), least=0)  # between two: 3 8, or a.png b.png
    # Machine
    batch_size: int = constant(64, least=1)  # images generated at a time
    device: Literal[*DEVICES] = "auto"  # auto: cuda if there is one, else cpu; mps is untried


def sample(config: SampleConfig) -> Path:
    """Generate and save what the config says. Returns the path. Raises UserError."""
    check_config(config)
    set_up_generation()
    with Processes(find_device(config.device)) as processes:
        return sample_with(config, processes)


def sample_with(config: SampleConfig, processes: Processes) -> Path:
    """Do what `sample` does; these processes take the batches in turns."""
    trained = load_trained(config.checkpoint or None, config.raw, processes.device)
    check_steps(config, trained.diffusion.num_timesteps)
    trained = add_guide(trained, config.guide, config.autoguidance)
    say(describe(trained))
    attributes = read_condition(config, trained)
    out, numbers, columns, labels = Path(config.out), range(config.num_images), 0, []
    processes.from_main(lambda: check_out(out))  # before another process writes there
    options = {name: getattr(config, name) for name in ("seed", "sampler", "steps", "eta")}
    options |= dict(attributes=attributes, guidance=config.guidance)

    # What else is asked for.
    beside = []  # shown in front of the generated images
    if config.image:
        edit, beside = read_edit(config, trained, attributes)
        options |= edit
        numbers = numbers if "loop" in edit else range(1)  # inversion has one answer
    if config.interpolate:
        columns, options["x_T"] = config.num_images, noise_between(config, trained, attributes)
    elif config.sheet:
        columns, beside = config.num_images, []  # every row has its label
        labels, numbers, options["attributes"] = sheet(trained.attribute_names, columns, attributes)
    elif out.suffix == ".gif":
        if processes.is_main:
            save_gif(frames_from_noise(trained, numbers, **options), out)
        return done(out)

    # Generate and save.
    with tqdm(total=len(numbers), unit="image", disable=None) as bar:
        rank, world_size, size = processes.rank, processes.world_size, config.batch_size
        options |= dict(batch_size=size, bar=bar, rank=rank, world_size=world_size)
        starts = range(rank * size, len(numbers), world_size * size)
        batches = zip(starts, generate(trained, numbers, **options), strict=True)
        if not out.suffix:
            save_each(batches, out)
            processes.everyone()
            return done(out)
        images = torch.zeros(len(numbers), 3, trained.img_size, trained.img_size)  # fits, or fails
        for start, batch in batches:
            images[start:][: len(batch)] = batch
    images = processes.sum(images)
    if processes.is_main and out.suffix == ".gif":
        save_gif([image_grid(image[None]) for image in images], out)
    elif processes.is_main:
        save_image(image_grid(torch.cat([*beside, images]), columns, labels), out)
    return done(out)


def describe(trained: Trained) -> str:
    """Which weights are used, how long they were trained, and what guides them."""
    text = f"{short(trained.path)}, trained for {trained.step:,} steps"
    if trained.guide:
        text += f", guided by {short(trained.guide)} (two networks; --guide none uses one)"
    return text


def done(out: Path) -> Path:
    """Say where the images are."""
    say(f"saved {out}")
    return out


# Checks ------------------------------------------------------------------------------------------


def check_config(config: SampleConfig) -> None:
    """Raise UsageError, naming the flag, for what is not possible whatever the checkpoint."""
    check_ranges(config)
    check_sampler(config.sampler, config.steps, config.eta)
    suffix = Path(config.out).suffix
    if config.out == "" or suffix not in ("", ".gif", *GRIDS):
        fix = "give a name ending in .png, .jpg or .gif, or a folder"
        raise UsageError("--out", f"is {config.out!r}", fix)
    if config.sheet and suffix not in GRIDS:
        raise UsageError("--out", f"is {config.out!r}", "give a name ending in .png for --sheet")
    if config.interpolate:
        check_interpolation(config)
    if config.image and not (config.mask or config.condition) and config.strength is None:
        fix = "add --mask to repair it, --strength to vary it, or --condition to change it"
        raise UsageError("--image", "alone changes nothing", fix)
    if not config.image and (config.mask or config.strength is not None):
        flag = "--mask" if config.mask else "--strength"
        raise UsageError(flag, "there is no image", "add --image")
    if not config.mask and config.resample != SampleConfig.resample:
        raise UsageError("--resample", "there is no mask", "add --image and --mask")
    files = [each for each in (config.image, config.mask, *config.interpolate) if each]
    paths = [os.path.realpath(each) for each in files if isinstance(each, str)]
    if os.path.realpath(config.out) in paths:
        raise UsageError("--out", "would overwrite an image of yours", "give another name")


def check_interpolation(config: SampleConfig) -> None:
    """Raise UsageError if one cannot go from image to image like that."""
    if len(config.interpolate) != 2:
        fix = "give two images: their numbers, such as 3 8, or their files"
        raise UsageError("--interpolate", f"is {config.interpolate!r}", fix)
    if config.sheet or config.image:
        flag = "--sheet" if config.sheet else "--image"
        raise UsageError("--interpolate", f"does not go with {flag}", "give one of the two")
    if not is_deterministic(config.sampler, config.eta):
        names = " or ".join(name for name in SAMPLERS if is_deterministic(name))
        what = (
            f"needs a sampler that makes the same image from the same noise, not {config.sampler}"
        )
        raise UsageError("--interpolate", what, f"give --sampler {names}, and --eta 0")
    if config.steps == 1 and any(isinstance(end, str) for end in config.interpolate):
        fix = "give 2 or more, such as 50, to invert the images"
        raise UsageError("--steps", "is 1", fix)


def check_steps(config: SampleConfig, num_timesteps: int) -> None:
    """Raise UsageError if the sampler needs more timesteps than there are."""
    strength = 1.0 if config.strength is None else config.strength
    if start := round(strength * num_timesteps):
        check_sampler(config.sampler, config.steps, config.eta, start)


def check_out(out: Path) -> None:
    """Check that the images can be saved. Raises UsageError, ResourceError."""
    if out.suffix:
        return check_writable(out, "--out")
    if any(out.glob("[0-9]*.png")):
        fix = "choose another folder, or empty that one"
        raise UsageError("--out", f"{out} already holds images", fix)
    check_writable(out / "000000.png", "--out")


# What is asked for -------------------------------------------------------------------------------


def read_condition(config: SampleConfig, trained: Trained) -> Tensor | None:
    """The attributes of --condition, (1, K) of 1, -1 and 0, or None if there are none. Raises
    UsageError for what the network has not learned."""
    condition = parse_attributes(config.condition, "--condition")
    names = trained.attribute_names
    for flag, given in (("--condition", condition), ("--sheet", config.sheet)):
        if given and not names:
            what = f"{trained.path} was trained without attributes"
            raise UsageError(flag, what, "train with --attributes, or use another checkpoint")
    matched = match_names("--condition", list(condition), names)
    condition = dict(zip(matched, condition.values(), strict=True))
    if config.guidance != 1 and not any(condition.values()) and not config.sheet:
        raise UsageError("--guidance", "there is no condition", "add --condition, or --sheet")
    if not condition:
        return None
    return torch.tensor([[float(condition.get(name, 0)) for name in names]])


def sheet(
    attribute_names: Sequence[str], columns: int, attributes: Tensor | None = None
) -> tuple[list[str], list[int], Tensor]:
    """A sheet has a row for each attribute, with and without it, and the same noise in every row.

    attributes: (1, K), what holds in every row. Returns the rows' labels, and the images' numbers
    (N) and attributes (N, K), row after row."""
    labels = [label for name in attribute_names for label in (name, f"not {name}")]
    one = torch.eye(len(attribute_names))
    rows = torch.stack([one, -one], dim=1).flatten(0, 1)  # (2K, K)
    if attributes is not None:
        rows = torch.where(rows == 0, attributes, rows)
    return labels, list(range(columns)) * len(labels), rows.repeat_interleave(columns, dim=0)


def read_edit(
    config: SampleConfig, trained: Trained, attributes: Tensor | None
) -> tuple[dict, list[Tensor]]:
    """The options of `generate` that repair, vary or change an image, and the images to show in
    front of the answers: the image, and the image with the hole. Raises DataError for bad files."""
    image = read_image(config.image, trained)
    if not config.mask and config.strength is None:
        return dict(x_T=encode(trained, image, config.steps)), [image]
    edit, beside = dict(loop=edit_loop, image=image), [image]
    edit["strength"] = 1.0 if config.strength is None else config.strength
    if config.mask:
        edit["mask"] = read_mask(config.mask, config.image, trained)
        edit["resample"] = config.resample
        beside.append(torch.where(edit["mask"], 0.0, image))
    return edit, beside


def noise_between(config: SampleConfig, trained: Trained, attributes: Tensor | None) -> Tensor:
    """The noise, (num_images, 3, H, W), on the way between the two ends of --interpolate. Raises
    DataError for bad files."""
    way = dict(steps=config.steps, attributes=attributes, guidance=config.guidance)
    ends = [noise_of(trained, end, config.seed, **way) for end in config.interpolate]
    return between(*ends, config.num_images)


# Saving ------------------------------------------------------------------------------------------


def frames_from_noise(
    trained: Trained, numbers: Sequence[int], loop=sample_loop, **options
) -> list[Image.Image]:
    """The way from noise to the images: up to GIF_FRAMES grids of x_t, which come nearer to the
    images by equal parts, and the images."""
    if (attributes := options["attributes"]) is not None:
        options["attributes"] = attributes.expand(len(numbers), -1)
    steps = options["steps"] * options.get("resample", 1)
    moves = tqdm(loop(trained, numbers, **options), total=steps, unit="step", disable=None)
    way = []
    for i, (x_t, x_0_pred) in enumerate(moves):
        images = x_0_pred
        if i % max(1, steps // 200) == 0:
            way.append(to_uint8(x_t))
    check_finite(trained, images)
    last = to_uint8(images).float()
    left = torch.stack([(pixels.float() - last).square().mean().sqrt() for pixels in way])
    parts = torch.linspace(float(left[0]), 0, GIF_FRAMES)
    chosen = sorted({int((left - part).abs().argmin()) for part in parts})
    frames = [way[i].movedim(-1, -3) / 127.5 - 1 for i in chosen]
    return [image_grid(frame) for frame in [*frames, images]]


def save_gif(frames: list[Image.Image], path: Path) -> None:
    """Save frames as an animation that rests on the last one, enlarged if they are small."""
    scale = math.ceil(GIF_SIZE / frames[0].width)
    size = frames[0].width * scale, frames[0].height * scale
    first, *rest = [frame.resize(size, Image.Resampling.NEAREST) for frame in frames]
    pauses = [80] * len(rest) + [2000]  # milliseconds
    save_image(first, path, save_all=True, append_images=rest, duration=pauses, loop=0)


def save_each(batches: Iterable[tuple[int, Tensor]], folder: Path) -> None:
    """Save images as 000000.png, 000001.png, ... batches: (number of the first image, images)."""
    for start, batch in batches:
        for i, pixels in enumerate(to_uint8(batch).numpy(), start):
            save_image(Image.fromarray(pixels), folder / f"{i:06d}.png")


def main() -> None:
    """The command line: SampleConfig's flags."""
    sample(flags.parse(SampleConfig, sys.argv[1:], "Generate images from a checkpoint."))


if __name__ == "__main__":
    flags.run(main, fix="lower --batch_size, --num_images or --steps")
