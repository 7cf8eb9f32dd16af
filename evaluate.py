"""Measure how good a checkpoint is: its loss on held-out faces, how far its images are from real
ones, whether they are copies of training faces, and how many steps they need.

    python evaluate.py --checkpoint my_first_diffusion
    python evaluate.py --samplers ddpm:1000 ddim:50 dpm++:10 dpm++:20 --num_images 256
    python evaluate.py --features my_features:load --feature_size 64    # instead of Inception's
    python evaluate.py --features none                                  # everything but distances
    accelerate launch evaluate.py --num_images 50000                    # several GPUs

Prints tables, and writes evaluation_<step>.json, nearest.png and samplers.png into
<run>/evaluation.
"""

import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dataset import Faces, load_faces
from formats.features import Features, find_features
from generate import Trained, add_guide, generate, load_trained
from metrics import copies, held_out_loss, measure_distances, nearest_pixels, nearest_vectors
from sample import describe
from samplers import check_sampler
from system import flags
from system.device import DEVICES, find_device, set_up_generation
from system.errors import DataError, UsageError
from system.files import check_writable, save_json
from system.flags import check_ranges, constant
from system.processes import Processes
from system.terminal import say, table
from utils import image_grid, reading, save_image, to_uint8, to_x_0

NUM_SHOWN = 8  # faces in nearest.png and in each row of samplers.png


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and how."""

    # What
    checkpoint: str = ""  # a run, a file in it, a diffusers folder, shipped weights; "": newest run
    path_to_data: str = ""  # the faces it was trained on, as for train.py; "": those of its run
    raw: bool = False  # use the trained weights instead of their average (EMA)
    guide: str = "auto"  # an early checkpoint whose errors to avoid; auto: the run's own; none
    autoguidance: float = constant(1.3, least=1)  # how strongly: 1 not at all, 2 a lot
    # How
    num_images: int = constant(1000, least=2)  # images of each sampler, and real ones beside them
    num_reference: int = constant(0, least=0)  # training faces to compare with; 0: all others
    samplers: tuple[str, ...] = ("dpm++:10",)  # name:steps, each from the same noise
    features: str = ""  # inception (default on a GPU), none (default on a CPU), module:callable
    feature_size: int = constant(0, least=0)  # pixels to which images are resized first; 0: not
    loss_draws: int = constant(2, least=0)  # held-out faces at each t; 0: no held-out loss
    seed: int = constant(0, least=0)  # image i depends on (seed, i) only
    # Machine
    batch_size: int = constant(64, least=1)  # images generated at a time
    device: Literal[*DEVICES] = "auto"  # auto: cuda if there is one, else cpu; mps is untried


def evaluate(config: EvaluateConfig) -> Path:
    """Measure what the config says. Returns the path of the JSON file. Raises UserError."""
    check_config(config)
    set_up_generation()
    with Processes(find_device(config.device)) as processes:
        return evaluate_with(config, processes)


def evaluate_with(config: EvaluateConfig, processes: Processes) -> Path:
    """Do what `evaluate` does: each of these processes generates its share, rank 0 measures."""
    device = str(processes.device)
    averaged = load_trained(config.checkpoint or None, device=device)
    raw = load_trained(averaged.path, raw=True, device=device)
    trained, settings = raw if config.raw else averaged, averaged.settings
    check_samplers(config, trained.diffusion.num_timesteps)
    trained = add_guide(trained, config.guide, config.autoguidance)
    if not config.features:
        config = replace(config, features="none" if device == "cpu" else "inception")
        if device == "cpu":
            say("note: distances take most of an hour on a CPU; --features inception asks for them")
    features = find_features(config.features, config.feature_size, device)
    source = config.path_to_data or settings.get("path_to_data", "data")
    with reading(trained.path, "use another checkpoint"):
        data = source, trained.img_size, settings["only"], settings["attributes"]
    with processes.first_of_each_machine_first():
        faces = load_faces(*data, skip_damaged=settings.get("skip_damaged", False))
    real = split_real(config, faces)
    say(f"{describe(trained)}\n{faces.description}")
    if faces.fingerprint != settings["faces"]:
        say(f"note: it was trained on other faces ({settings['faces']})")

    run = trained.path.parent.parent if trained.path.parent.name == "checkpoints" else Path()
    folder = run / "evaluation"
    path = folder / f"evaluation_{trained.step:08d}.json"
    check_writable(path, "--checkpoint")
    generated = generate_all(config, trained, faces, processes)
    if processes.is_main:
        result = {"checkpoint": str(trained.path), "step": trained.step, "config": asdict(config)}
        result |= {"key": faces.key, "fingerprint": faces.fingerprint}
        result["num_reference"] = len(real[1])
        if config.loss_draws and len(faces.held_out):
            result["held_out"] = compare_held_out(config, faces, raw, averaged)
        near = device if device.startswith("cuda") else "cpu"  # float64, which mps lacks
        mirror = settings.get("horizontal_flip", True)
        measured, found = measure_images(faces, features, generated, real, near, mirror)
        result |= measured
        save_nearest_sheet(folder / "nearest.png", generated[0].images, faces, found)
        save_sampler_sheet(folder / "samplers.png", generated)
        save_json(path, result)
        report(config, result)
        say(f"\nwritten to {path}")
    return path


def check_config(config: EvaluateConfig) -> None:
    """Raise UsageError, naming the flag, for what is not possible whatever the checkpoint."""
    check_ranges(config)
    if not config.samplers or len(set(config.samplers)) < len(config.samplers):
        raise UsageError(
            "--samplers", "names none, or one twice", "give each once, such as dpm++:10"
        )


def check_samplers(config: EvaluateConfig, num_timesteps: int) -> None:
    """Raise UsageError for one of --samplers that is not possible."""
    for text in config.samplers:
        sampler, _, steps = text.partition(":")
        if not steps.isdecimal() or len(steps) > 9:
            raise UsageError("--samplers", f"is {text!r}", "write name:steps, such as dpm++:10")
        try:
            check_sampler(sampler, int(steps), num_timesteps=num_timesteps)
        except UsageError as error:
            raise UsageError("--samplers", f"{text!r}: {error.what}", error.fix) from error


# The images ---------------------------------------------------------------------------------------


class Generated(NamedTuple):
    """What one sampler has generated."""

    name: str  # name:steps
    images: np.ndarray  # (N, S, S, 3) uint8
    seconds: float  # that it took


def generate_all(
    config: EvaluateConfig, trained: Trained, faces: Faces, processes: Processes
) -> list[Generated]:
    """Let each sampler generate the images, each process every world_size-th batch. A network that
    knows attributes gets those of random training faces."""
    rank, world_size, size = processes.rank, processes.world_size, config.batch_size
    numbers, generated = range(config.num_images), []
    options = dict(batch_size=size, rank=rank, world_size=world_size)
    if trained.attribute_names:
        drawn = np.random.default_rng(config.seed).choice(faces.train, config.num_images)
        options["attributes"] = torch.from_numpy(faces.attributes[drawn])
    for text in config.samplers:
        sampler, steps = text.split(":")
        started = time.perf_counter()
        shape = (config.num_images, trained.img_size, trained.img_size, 3)
        images = torch.zeros(shape, dtype=torch.uint8)
        starts = range(rank * size, len(numbers), world_size * size)
        with tqdm(total=len(numbers), desc=text, unit="image", disable=None) as bar:
            options |= dict(sampler=sampler, steps=int(steps), bar=bar)
            batches = generate(trained, numbers, config.seed, **options)
            for start, batch in zip(starts, batches, strict=True):
                images[start:][: len(batch)] = to_uint8(batch)
        images = processes.sum(images).numpy()
        generated.append(Generated(text, images, time.perf_counter() - started))
    return generated


# The measures -------------------------------------------------------------------------------------


def split_real(config: EvaluateConfig, faces: Faces) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint sets of real faces, as indices: `num_images` that are measured like generated
    ones (held-out faces first, then training faces), and the reference. Raises DataError if there
    are not enough."""
    random = np.random.default_rng(0)
    order = np.concatenate([random.permutation(faces.held_out), random.permutation(faces.train)])
    floor, rest = order[: config.num_images], order[max(config.num_images, len(faces.held_out)) :]
    wanted = config.num_reference or max(len(rest), 2)
    if len(rest) < wanted:
        what = f"{config.num_images} of the {len(order):,} faces are set aside, which leaves "
        what += f"{len(rest):,} for a reference of {wanted:,}"
        raise DataError("--num_reference", what, "lower it, or --num_images")
    return floor, rest[:wanted]


def compare_held_out(config: EvaluateConfig, faces: Faces, raw: Trained, averaged: Trained) -> dict:
    """The loss in ten equal parts of the timesteps and its mean, for both sets of weights."""
    result = {}
    held_out = faces.images[faces.held_out], faces.attributes[faces.held_out]
    for name, trained in (("raw", raw), ("ema", averaged)):
        options = dict(draws=config.loss_draws, show=sys.stderr.isatty())
        loss = held_out_loss(trained, trained.diffusion, *held_out, **options)
        bands = [float(part.mean()) for part in loss.tensor_split(min(10, len(loss)))]
        result[name] = {"bands": bands, "loss": float(loss.mean())}
    return result


def measure_images(
    faces: Faces,
    features: Features | None,
    generated: list[Generated],
    real: tuple[np.ndarray, np.ndarray],
    device: str = "cpu",
    mirror: bool = True,
) -> tuple[dict, list]:
    """Measure the distances of all samplers' images, and find the training faces nearest to the
    first sampler's.

    real: the two sets of `split_real`; mirror: whether mirrored neighbours count. Returns what the
    JSON file says, and the nearest places in faces.train, (N, 2): by pixels and, if there are any,
    by features."""
    floor, reference = real
    held_out = floor[np.isin(floor, faces.held_out)]
    samplers = {one.name: {"seconds": one.seconds} for one in generated}
    sets = {"generated": generated[0].images}
    if len(held_out):
        sets["held out"] = faces.images[held_out]
    near, found = {}, []
    for name, images in sets.items():
        places, distances = nearest_pixels(images, faces.images, faces.train, device, mirror)
        near[f"{name}, by pixels"] = copies(distances)
        found.append(places)
    found = found[:1]
    if features:
        chosen = np.concatenate([reference, floor])
        vectors = features.cached(faces.images, chosen, faces.key)
        first, rest = vectors[: len(reference)], vectors[len(reference) :]
        by_sampler = {one.name: features.of(one.images) for one in generated}
        by_set = {"generated": by_sampler[generated[0].name]}
        by_set["held out"] = rest[np.isin(floor, faces.held_out)]
        by_sampler["real faces (the floor)"] = rest
        for name, values in measure_distances(first, by_sampler).items():
            samplers[name] = samplers.get(name, {}) | values
        trained_on = np.flatnonzero(np.isin(chosen, faces.train))
        for name, images in sets.items():
            turned = features.of(images[:, :, ::-1]) if mirror else by_set[name]
            rows, distances = nearest_vectors(by_set[name], turned, vectors[trained_on], device)
            near[f"{name}, by features"] = copies(distances)
            if name == "generated":
                found.append(np.searchsorted(faces.train, chosen[trained_on][rows]))
    return {"samplers": samplers, "nearest": near}, found


# The report ---------------------------------------------------------------------------------------


def report(config: EvaluateConfig, result: dict) -> None:
    """Print what was measured."""
    if held_out := result.get("held_out"):
        bands = len(held_out["ema"]["bands"])
        heads = [f"{100 * i // bands}-{100 * (i + 1) // bands} % of T" for i in range(bands)]
        rows = [
            [name, *(f"{x:.4f}" for x in [*values["bands"], values["loss"]])]
            for name, values in held_out.items()
        ]
        say("\n" + table(["held-out loss", *heads, "mean"], rows))
    label = ["FID", "KID x 1000"] if config.features == "inception" else []
    label = label or ["Frechet distance", "kernel distance x 1000"]
    rows = []
    for name, values in result["samplers"].items():
        row = [name, f"{values['seconds']:.0f}" if "seconds" in values else ""]
        if "frechet" in values:
            spread = 1000 * values["kernel_deviation"]
            row += [f"{values['frechet']:.3f}", f"{1000 * values['kernel']:.3f} ± {spread:.3f}"]
        rows.append(row)
    distances = label if config.features != "none" else []
    say("\n" + table([f"{config.num_images} images", "seconds", *distances], rows))
    rows = []
    for name, values in result["nearest"].items():
        shares = f"{values['copies']:.1%}", f"{values['median_ratio']:.3f}"
        rows.append([name, *shares, f"{values['median_distance']:.3f}"])
    say("\n" + table(["nearest training face", "d1/d2 < 1/3", "median d1/d2", "median d1"], rows))


def save_nearest_sheet(path: Path, images: np.ndarray, faces: Faces, found: list) -> None:
    """Save a sheet: generated faces, and under each its nearest training faces. found: (N, 2)
    places in faces.train, by pixels and maybe by features."""
    shown = images[:NUM_SHOWN]
    rows, labels = [shown], ["generated"]
    for name, indices in zip(("pixels", "features"), found, strict=False):
        for k, place in enumerate(("nearest", "second")):
            rows.append(faces.images[faces.train[indices[: len(shown), k]]])
            labels.append(f"{place}, {name}")
    save_sheet(path, rows, labels)


def save_sampler_sheet(path: Path, generated: list[Generated]) -> None:
    """Save a sheet: a row for each sampler, from the same noise."""
    rows = [one.images[:NUM_SHOWN] for one in generated]
    save_sheet(path, rows, [one.name for one in generated])


def save_sheet(path: Path, rows: list[np.ndarray], labels: list[str]) -> None:
    """Save a sheet. rows: (n, S, S, 3) uint8 each."""
    images = to_x_0(torch.from_numpy(np.concatenate(rows)))
    save_image(image_grid(images, len(rows[0]), labels), path)


def main() -> None:
    """The command line: EvaluateConfig's flags."""
    evaluate(flags.parse(EvaluateConfig, sys.argv[1:], "Measure how good a checkpoint is."))


if __name__ == "__main__":
    flags.run(main, fix="lower --batch_size, --num_images, --num_reference or --loss_draws")
