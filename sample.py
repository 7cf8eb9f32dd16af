"""Generate images from a checkpoint.

python sample.py                                        # of the newest run: 64 faces, samples.png
python sample.py --checkpoint my_first_diffusion --num_images 64 --seed 0 --out faces.png
python sample.py --sampler ddpm --steps 1000 --out way.gif    # from noise to faces
python sample.py --num_images 5000 --out faces                # single images in a folder
python sample.py --image face.png --mask mask.png             # generates what the mask has white
python sample.py --image face.png --strength 0.4              # others like it
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataset.faces import parse_attributes
from editing import between, noise_of, read_image, read_mask
from generate import Trained, add_guide, generate, load_trained, sample_loop, sheet
from samplers import SAMPLERS, SamplerError, check_sampler, is_deterministic
from system import flags
from system.device import DEVICES, find_device, keep_freed_memory
from system.errors import UsageError
from system.files import check_writable
from system.flags import check_ranges, constant
from system.processes import Processes
from system.terminal import say
from utils import image_grid, save_image, to_uint8

GIF_FRAMES = 40  # at most, in the way from noise to faces


@dataclass(frozen=True)
class SampleConfig:
    """What to generate, and how."""

    checkpoint: str = ""  # a run, a file in it, a folder of diffusers'; empty: the newest run here
    num_images: int = constant(64, least=1)  # images to generate
    sampler: Literal[*SAMPLERS] = "dpm++"  # the default needs the fewest steps
    steps: int = constant(10, least=1)  # evaluations of the network for each image
    eta: float = constant(0.0, least=0, most=1)  # noise added on the way: 1 as much as ddpm
    seed: int = constant(0, least=0)  # image i depends on (seed, i) alone
    batch_size: int = constant(64, least=1)  # images generated at a time
    condition: tuple[str, ...] = ()  # attributes: Smiling Male=-1; none: those of training faces
    guidance: float = constant(1.0, least=0)  # how strongly: 1 as learned, 2 to 4 more so
    sheet: bool = False  # a row for each attribute on and off, num_images columns of the same noise
    image: str = ""  # an image of yours, to repair or to vary
    mask: str = ""  # of the image's size, white where it is generated anew; the rest is kept
    resample: int = constant(5, least=1)  # times that each part of a repair is gone through
    strength: float | None = constant(None, least=0, most=1)  # 0: --image itself, 1: nothing of it
    interpolate: tuple[int | str, ...] = constant((), least=0)  # between two: 3 8, or a.png b.png
    guide: str = "auto"  # an early checkpoint whose errors to avoid; auto: the run's own; none
    autoguidance: float = constant(1.3, least=1)  # how far it leads: 1 not at all, 2 far
    raw: bool = False  # generate with the weights as trained, not with their average (EMA)
    device: Literal[*DEVICES] = "auto"  # auto: cuda where there is one, else cpu; mps: untried
    out: str = "samples.png"  # .png: one grid; .gif: the way from noise to faces; else a folder


def sample(config: SampleConfig) -> Path:
    """Generate and save what the config says. Returns where it lies. Raises UserError."""
    check_config(config)
    keep_freed_memory()
    with Processes(find_device(config.device)) as processes:
        return sample_with(config, processes)


def sample_with(config: SampleConfig, processes: Processes) -> Path:
    """What `sample` does, by these processes, which take turns with the batches."""
    trained = load_trained(config.checkpoint or None, config.raw, processes.device)
    check_config(config, trained.diffusion.num_timesteps)
    trained = add_guide(trained, config.guide, config.autoguidance)
    attributes = read_condition(config, trained)
    out, numbers, columns, labels = Path(config.out), range(config.num_images), 0, []
    processes.from_main(lambda: check_out(out))  # before another's images lie there
    options = {name: getattr(config, name) for name in ("seed", "sampler", "steps", "eta")}
    options |= dict(attributes=attributes, guidance=config.guidance)
    options |= read_edit(config, trained)

    if config.interpolate:
        columns = config.num_images
        way = dict(steps=config.steps, attributes=attributes, guidance=config.guidance)
        ends = [noise_of(trained, end, config.seed, **way) for end in config.interpolate]
        options["x_T"] = between(*ends, columns)
    elif out.suffix == ".gif":
        if not processes.is_main:  # a way is not worth sharing
            return out
        save_gif(frames_from_noise(trained, numbers, **options), out)
        return done(config, trained)
    if config.sheet:
        columns = config.num_images
        labels, numbers, options["attributes"] = sheet(trained.attribute_names, columns, attributes)

    with tqdm(total=len(numbers), unit="image", disable=None) as bar:
        turn, turns, size = processes.rank, processes.world_size, config.batch_size
        options |= dict(batch_size=size, bar=bar, turn=turn, turns=turns)
        starts = range(turn * size, len(numbers), turns * size)
        batches = zip(starts, generate(trained, numbers, **options), strict=True)
        if not out.suffix:
            save_each(batches, out)
            processes.everyone()
            return done(config, trained)
        shape = (len(numbers), trained.image_channels, trained.img_size, trained.img_size)
        images = torch.zeros(shape)  # fits, or fails
        for start, batch in batches:
            images[start:][: len(batch)] = batch
    images = processes.sum(images)
    if not processes.is_main:
        return out
    if out.suffix == ".gif":
        save_gif([image_grid(image[None]) for image in images], out)
    else:
        save_image(image_grid(images, columns, labels), out)
    return done(config, trained)


def check_config(config: SampleConfig, num_timesteps: int | None = None) -> None:
    """Raise UsageError, naming the flag, for what cannot be. num_timesteps: T where it is known."""
    check_ranges(config)
    try:
        start = num_timesteps and round(share_of_T(config) * num_timesteps)
        check_sampler(config.sampler, config.steps, config.eta, start)
    except SamplerError as error:
        raise UsageError(f"--{error.argument}", error.what, error.fix) from error

    def check(good: bool, name: str, fix: str) -> None:
        if not good:
            raise UsageError(f"--{name}", f"is {getattr(config, name)!r}", f"give {fix}")

    suffix = Path(config.out).suffix
    check(config.out != "", "out", "a name ending in .png or .gif, or a folder")
    check(suffix in ("", ".png", ".gif"), "out", "a name ending in .png or .gif, or a folder")
    is_grid = suffix == ".png" or not config.sheet
    check(is_grid, "out", "a name ending in .png, as --sheet is a grid")
    if config.interpolate:
        fix = "two images: their numbers, such as 3 8, or their files"
        check(len(config.interpolate) == 2, "interpolate", fix)
        check(not config.sheet, "sheet", "either --sheet or --interpolate")
        check(not config.image, "image", "either --image or --interpolate")
        check(config.eta == 0, "eta", "0, so that the same noise makes the same image")
        names = " or ".join(name for name in SAMPLERS if is_deterministic(name))
        fix = f"{names}, by which the same noise makes the same image"
        check(is_deterministic(config.sampler), "sampler", fix)
        from_files = any(isinstance(end, str) for end in config.interpolate)
        check(config.steps > 1 or not from_files, "steps", "2 or more, 50 say, to find their noise")
    check_own_files(config, check)


def check_own_files(config: SampleConfig, check: Callable[[bool, str, str], None]) -> None:
    """`check_config`'s part on the user's own images: check(good, name of the flag, fix)."""
    is_changed = bool(config.mask) or config.strength is not None
    if config.image:
        check(is_changed, "image", "with it --mask to repair it, or --strength to vary it")
    else:
        check(not config.mask, "mask", "with it --image, of which it says what to generate")
        check(config.strength is None, "strength", "with it --image, which it changes")
    is_repair = bool(config.mask) or config.resample == SampleConfig.resample
    check(is_repair, "resample", "with it --image and --mask, which it helps to repair")
    files = [each for each in (config.image, config.mask, *config.interpolate) if each]
    paths = [os.path.realpath(each) for each in files if isinstance(each, str)]
    is_new = os.path.realpath(config.out) not in paths
    check(is_new, "out", "another name, or that image of yours would be lost")


def share_of_T(config: SampleConfig) -> float:
    """--strength, and 1, from noise alone, where nothing is said."""
    return 1.0 if config.strength is None else config.strength


def check_out(out: Path) -> None:
    """Find out now whether the images can be saved. Raises UsageError, ResourceError."""
    if out.suffix:
        return check_writable(out, "--out")
    if any(out.glob("[0-9]*.png")):
        fix = "choose another folder, or empty that one"
        raise UsageError("--out", f"{out} holds images already, which these would mix with", fix)
    check_writable(out / "000000.png", "--out")


def read_condition(config: SampleConfig, trained: Trained) -> Tensor | None:
    """The attributes that --condition asks for, (1, K) of 1, -1 and 0, or None where it asks for
    none. Raises UsageError for what the network has not learned."""
    condition = parse_attributes(config.condition, "--condition")
    names = trained.attribute_names
    for flag, given in (("--condition", condition), ("--sheet", config.sheet)):
        if given and not names:
            what = f"{trained.path} was trained without attributes"
            raise UsageError(flag, what, "train with --attributes, or take another checkpoint")
    unknown = [name for name in condition if name not in names]
    if unknown:
        what = f"{trained.path} has not learned {', '.join(unknown)}"
        raise UsageError("--condition", what, f"choose of {', '.join(names)}")
    if config.guidance != 1 and not any(condition.values()) and not config.sheet:
        raise UsageError("--guidance", "nothing is asked for", "add --condition, or --sheet")
    if not condition:
        return None
    return torch.tensor([[float(condition.get(name, 0)) for name in names]])


def read_edit(config: SampleConfig, trained: Trained) -> dict:
    """The options of `Diffusion.sample_loop` by which an image is repaired or varied. Raises
    DataError for files that cannot be."""
    if not config.image:
        return {}
    edit = dict(image=read_image(config.image, trained), strength=share_of_T(config))
    if config.mask:
        edit |= dict(mask=read_mask(config.mask, config.image, trained), resample=config.resample)
    return edit


def frames_from_noise(trained: Trained, numbers: Sequence[int], **options) -> list[Image.Image]:
    """The way from noise to faces: grids of x_t at up to GIF_FRAMES steps, and of the faces."""
    steps = options["steps"] * options.get("resample", 1)
    loop = tqdm(sample_loop(trained, numbers, **options), total=steps, unit="step", disable=None)
    frames = []
    for i, (x_t, x_0_pred) in enumerate(loop):
        faces = x_0_pred
        if i % max(1, steps // GIF_FRAMES) == 0:
            frames.append(image_grid(x_t))
    return [*frames, image_grid(faces)]


def save_gif(frames: list[Image.Image], path: Path) -> None:
    """Save frames as an animation that rests on the last one."""
    first, *rest = frames
    pauses = [80] * len(rest) + [2000]  # milliseconds
    save_image(first, path, save_all=True, append_images=rest, duration=pauses, loop=0)


def save_each(batches: Iterable[tuple[int, Tensor]], folder: Path) -> None:
    """Save the images as 000000.png, 000001.png, ..., as they come. batches: each with the place of
    its first image."""
    for start, batch in batches:
        for i, pixels in enumerate(to_uint8(batch).numpy(), start):
            save_image(Image.fromarray(pixels), folder / f"{i:06d}.png")


def done(config: SampleConfig, trained: Trained) -> Path:
    """Say what lies where."""
    guided = f", guided by {trained.guide}," if trained.guide else ""
    say(f"faces of {trained.path}{guided} in {config.out}")
    return Path(config.out)


def main() -> None:
    """The command line: SampleConfig's flags."""
    sample(flags.parse(SampleConfig, sys.argv[1:], "Generate images from a checkpoint."))


if __name__ == "__main__":
    flags.run(main, fix="lower --batch_size, --num_images or --steps")
