"""How good a checkpoint is: its loss on held-out faces, how far its pictures are from real ones,
whether they are copies, and how many steps they need.

    python evaluate.py --checkpoint my_first_diffusion --path_to_data data
    python evaluate.py --samplers ddpm:1000 ddim:50 dpm++:10 dpm++:20 --num_images 256
    python evaluate.py --features my_features:load --feature_size 64    # instead of Inception's
    python evaluate.py --features none                                  # what needs no features
    accelerate launch evaluate.py --num_images 50000                    # several GPUs

Prints tables, and writes evaluation.json, nearest.png and samplers.png into <run>/evaluation. The
pictures drawn are kept there too: stopped in the middle, or asked for more, it goes on from them.
"""

import hashlib
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

import cli
from dataset import Faces, load_faces
from device import keep_freed_memory
from diffusion import SAMPLERS
from errors import DataError, UsageError
from files import save_json, write_atomically
from generate import Trained, generate, load_trained
from images import image_grid, save_image, to_uint8, to_x_0
from likelihood import held_out_loss
from log import say, table
from metrics import copies, find_features, measure_distances, nearest_features, nearest_pixels

NUM_SHOWN = 8  # faces in nearest.png and in each row of samplers.png


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and how."""

    checkpoint: str = ""  # a run's folder (its newest), a file in it; empty: the newest run here
    path_to_data: str = "data"  # the faces it was trained on, as for train.py
    num_images: int = 1000  # pictures drawn by each sampler, and real ones they stand beside
    num_reference: int = 0  # training faces they are compared with; 0: all that remain
    samplers: tuple[str, ...] = ("dpm++:20",)  # name:evaluations, each from the same noise
    features: str = "inception"  # for the distances; or module:callable, or none
    feature_size: int = 0  # pixels that pictures are resized to for them; 0: as they are
    loss_draws: int = 16  # held-out faces at each timestep; 0: leave the held-out loss out
    seed: int = 0  # picture i depends on (seed, i) alone
    batch_size: int = 64  # pictures drawn at a time
    raw: bool = False  # draw with the weights as trained, not with their average (EMA)


class Generated(NamedTuple):
    """What one sampler has drawn."""

    name: str  # as in --samplers
    images: np.ndarray  # (num_images, S, S, 3) uint8
    seconds: float  # that it took, over all processes


# The pictures ------------------------------------------------------------------------------------


def check_samplers(config: EvaluateConfig, num_timesteps: int) -> None:
    """Raise UsageError for one of --samplers that cannot be."""
    for text in config.samplers:
        name, _, steps = text.partition(":")
        if name not in SAMPLERS or not steps.isdecimal() or int(steps) < 1:
            fix = f"write name:evaluations, such as dpm++:20; names: {', '.join(SAMPLERS)}"
            raise UsageError("--samplers", f"{text!r} cannot be read", fix)
        if name != "dpm++" and int(steps) > num_timesteps:
            fix = f"give at most {num_timesteps} for {name}"
            raise UsageError("--samplers", f"{text!r} has too many evaluations", fix)


def source_digest(trained: Trained, faces: Faces) -> str:
    """What the pictures are drawn from, in a few letters: the checkpoint, the precision and, where
    the network is asked for their attributes, the faces."""
    with open(trained.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(str(trained.dtype).encode())
    digest.update(faces.fingerprint.encode() if trained.attributes else b"")
    return digest.hexdigest()[:12]


def generated_files(
    config: EvaluateConfig, folder: Path, digest: str, text: str
) -> list[tuple[range, Path]]:
    """The pictures of a sampler in parts of a batch: their numbers, and the file that keeps them.

    The folder's name says what else the pictures depend on, so that none is taken for another."""
    weights = "raw" if config.raw else "ema"
    name = f"{text.replace(':', '_')}_{weights}_seed{config.seed}_batch{config.batch_size}_{digest}"
    return batch_files(config.num_images, config.batch_size, folder / "generated" / name)


def batch_files(num_images: int, batch_size: int, folder: Path) -> list[tuple[range, Path]]:
    """The numbers of the pictures in each batch, and the file in `folder` that keeps them."""
    starts = range(0, num_images, batch_size)
    parts = [range(start, min(start + batch_size, num_images)) for start in starts]
    return [(part, folder / f"{part.start:06d}-{part.stop:06d}.npz") for part in parts]


def generate_missing(config, trained: Trained, faces: Faces, text: str, parts) -> None:
    """Draw the parts that are not there yet. A network that knows attributes is asked for those of
    training faces, drawn at random."""
    sampler, steps = text.split(":")
    asked = None
    if trained.attributes:
        picks = np.random.default_rng(config.seed).choice(faces.train, config.num_images)
        asked = torch.from_numpy(faces.attributes[picks])
    missing = [part for part in parts if not part[1].exists()]
    for numbers, path in tqdm(missing, f"drawing, {text}", disable=None):
        options = dict(sampler=sampler, steps=int(steps), batch_size=config.batch_size)
        if asked is not None:
            options["attributes"] = asked[numbers.start : numbers.stop]
        keep_generated(path, partial(next, generate(trained, numbers, config.seed, **options)))


def keep_generated(path: Path, draw: Callable[[], Tensor]) -> None:
    """Keep in a file the pictures, (N, 3, H, W) in [-1, 1], and the seconds that drawing takes."""
    started = time.perf_counter()
    pixels = to_uint8(draw()).permute(0, 2, 3, 1).numpy()
    seconds = time.perf_counter() - started

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            np.savez(file, images=pixels, seconds=seconds)

    write_atomically(path, write)


def read_generated(text: str, parts) -> Generated:
    """What lies in the files of one sampler. Raises DataError where one is damaged."""
    images, seconds = [], 0.0
    for _, path in parts:
        try:
            with np.load(path) as kept:
                images.append(kept["images"])
                seconds += float(kept["seconds"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            fix = "delete it, and it is drawn again"
            raise DataError(path, f"is damaged ({error})", fix) from error
    return Generated(text, np.concatenate(images), seconds)


# The measures ------------------------------------------------------------------------------------


def compare_held_out(config: EvaluateConfig, faces: Faces, raw: Trained, averaged: Trained) -> dict:
    """The loss in ten bands of t and the bits per dimension, of both sets of weights."""
    result = {}
    known = faces.images[faces.held_out], faces.attributes[faces.held_out]
    for name, trained in (("raw", raw), ("ema", averaged)):
        options = dict(draws=config.loss_draws, dtype=trained.dtype, show=sys.stderr.isatty())
        loss = held_out_loss(trained.model, trained.diffusion, *known, **options)
        bits, error = loss.bits_per_dim()
        result[name] = {"bands": loss.bands(), "loss": float(loss.loss.mean())}
        result[name] |= {"bits_per_dim": bits, "bits_per_dim_error": error}
    return result


def split_real(config: EvaluateConfig, faces: Faces) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of real faces that share none, as indices: `num_images` that stand where drawn ones
    do (held-out ones first, topped up from the training faces), and the reference. Raises
    DataError where there are not enough."""
    random = np.random.default_rng(0)
    order = np.concatenate([random.permutation(faces.held_out), random.permutation(faces.train)])
    floor, rest = order[: config.num_images], order[max(config.num_images, len(faces.held_out)) :]
    wanted = config.num_reference or len(rest)
    if len(rest) < max(wanted, 2):
        what = f"{config.num_images} of the {len(order):,} faces set aside leave {len(rest):,}"
        what += (
            f" for a reference of {wanted:,}" if config.num_reference else ", too few to compare"
        )
        raise DataError("--num_reference", what, "lower it, or --num_images")
    return floor, rest[:wanted]


# The report --------------------------------------------------------------------------------------


def report(config: EvaluateConfig, result: dict) -> None:
    """Print what was measured."""
    if held_out := result.get("held_out"):
        bands = len(held_out["ema"]["bands"])
        heads = [f"{100 * i // bands}-{100 * (i + 1) // bands} % of T" for i in range(bands)]
        rows = [
            [name, *(f"{x:.4f}" for x in values["bands"]), f"{values['loss']:.4f}"]
            + [f"{values['bits_per_dim']:.3f} ± {values['bits_per_dim_error']:.3f}"]
            for name, values in held_out.items()
        ]
        say("\n" + table(["held-out loss", *heads, "mean", "bits/dim"], rows))
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
    say("\n" + table([f"{config.num_images} pictures", "seconds", *distances], rows))
    rows = []
    for name, values in result["nearest"].items():
        shares = f"{values['copies']:.1%}", f"{values['median_ratio']:.3f}"
        rows.append([name, *shares, f"{values['median_distance']:.3f}"])
    say("\n" + table(["nearest training face", "d1/d2 < 1/3", "median d1/d2", "median d1"], rows))


def save_nearest_sheet(
    path: Path, images: np.ndarray, faces: Faces, found: list[np.ndarray]
) -> None:
    """Save a sheet: generated faces, and under each the nearest training faces. found: (N, 2)
    indices into the training faces, by pixels and by features where there are any."""
    shown = images[:NUM_SHOWN]
    rows, labels = [shown], ["generated"]
    for name, indices in zip(("pixels", "features"), found, strict=False):
        for k, place in enumerate(("nearest", "second")):
            rows.append(faces.images[faces.train[indices[: len(shown), k]]])
            labels.append(f"{place}, {name}")
    grid = image_grid(to_x_0(torch.from_numpy(np.concatenate(rows))), len(shown), labels)
    save_image(grid, path)


def save_sampler_sheet(path: Path, generated: list[Generated]) -> None:
    """Save a sheet: a row for each sampler, from the same noise."""
    rows = np.concatenate([one.images[:NUM_SHOWN] for one in generated])
    columns = min(NUM_SHOWN, len(generated[0].images))
    labels = [one.name for one in generated]
    save_image(image_grid(to_x_0(torch.from_numpy(rows)), columns, labels), path)


def check_config(config: EvaluateConfig) -> None:
    """Raise UsageError, naming the flag, for what cannot be, whatever the checkpoint."""
    least = dict(num_images=2, num_reference=0, feature_size=0, loss_draws=0, seed=0, batch_size=1)
    for name, smallest in least.items():
        if getattr(config, name) < smallest:
            what = f"is {getattr(config, name)}"
            raise UsageError(f"--{name}", what, f"give a whole number from {smallest}")
    if not config.samplers or len(set(config.samplers)) < len(config.samplers):
        raise UsageError("--samplers", "names none, or one twice", "give each once, as dpm++:20")


def generate_all(
    config, trained: Trained, faces: Faces, folder: Path, accelerator
) -> list[Generated]:
    """Let each sampler draw, each process its share; what lies there already is taken. The list is
    empty but in the main process."""
    digest = source_digest(trained, faces)
    files = {text: generated_files(config, folder, digest, text) for text in config.samplers}
    for text, parts in files.items():
        if accelerator.is_main_process:
            kept = sum(len(numbers) for numbers, path in parts if path.exists())
            say(
                f"{text}: drawing {config.num_images - kept:,} pictures, {kept:,} are there already"
            )
        share = parts[accelerator.process_index :: accelerator.num_processes]
        generate_missing(config, trained, faces, text, share)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return []
    return [read_generated(text, parts) for text, parts in files.items()]


def measure_pictures(
    config, faces, features, generated: list[Generated], real
) -> tuple[dict, list]:
    """The distances of all samplers' pictures, and the training faces nearest to the first one's.

    real: `split_real`'s. Returns what evaluation.json says of them, and the nearest places, (N, 2),
    in faces.train: by pixels and, where there are any, by features."""
    floor, reference = real
    samplers = {one.name: {"seconds": one.seconds} for one in generated}
    sets = {"generated": generated[0].images}
    if len(faces.held_out):
        sets["held out"] = faces.images[faces.held_out[: config.num_images]]
    near, found = {}, []
    for name, images in sets.items():
        places, distances = nearest_pixels(images, faces.images, faces.train)
        near[f"{name}, by pixels"] = copies(distances)
        found.append(places)
    found = found[:1]
    if features:
        chosen = np.concatenate([reference, floor])
        vectors = features.cached(faces.images, chosen, faces.key)
        first, rest = vectors[: len(reference)], vectors[len(reference) :]
        by_sampler = {one.name: features.of(one.images) for one in generated}
        by_sampler["real faces (the floor)"] = rest
        for name, values in measure_distances(first, by_sampler).items():
            samplers[name] = samplers.get(name, {}) | values
        trained_on = np.flatnonzero(np.isin(chosen, faces.train))
        for name, images in sets.items():
            rows, distances = nearest_features(images, features, vectors[trained_on])
            near[f"{name}, by features"] = copies(distances)
            if name == "generated":
                found.append(np.searchsorted(faces.train, chosen[trained_on][rows]))
    return {"samplers": samplers, "nearest": near}, found


def evaluate(config: EvaluateConfig) -> Path:
    """Measure what is wished. Returns the path of evaluation.json. Raises UserError."""
    check_config(config)
    keep_freed_memory()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    device = str(accelerator.device)
    averaged = load_trained(config.checkpoint or None, device=device)
    raw = load_trained(averaged.path, raw=True, device=device)
    trained, settings = raw if config.raw else averaged, averaged.settings
    check_samplers(config, trained.diffusion.num_timesteps)
    features = find_features(config.features, config.feature_size, device)
    with accelerator.main_process_first():
        data = (config.path_to_data, trained.img_size, settings["only"], settings["attributes"])
        faces = load_faces(*data)
    real = split_real(config, faces)
    if accelerator.is_main_process:
        say(f"{trained.path}, step {trained.step}, against {faces.description}")
        if faces.fingerprint != settings["faces"]:
            say(f"note: it was trained on other faces ({settings['faces']})")

    run = trained.path.parent.parent if trained.path.parent.name == "checkpoints" else Path()
    folder = run / "evaluation"
    generated = generate_all(config, trained, faces, folder, accelerator)
    if generated:
        result = {"checkpoint": str(trained.path), "step": trained.step, "flags": asdict(config)}
        result |= {"data": faces.key, "faces": faces.fingerprint, "num_reference": len(real[1])}
        if config.loss_draws and len(faces.held_out):
            result["held_out"] = compare_held_out(config, faces, raw, averaged)
        measured, found = measure_pictures(config, faces, features, generated, real)
        result |= measured
        save_nearest_sheet(folder / "nearest.png", generated[0].images, faces, found)
        save_sampler_sheet(folder / "samplers.png", generated)
        save_json(folder / "evaluation.json", result)
        report(config, result)
        say(f"\nwritten to {folder}")
    return folder / "evaluation.json"


def main() -> None:
    """The command line: EvaluateConfig's flags."""
    evaluate(cli.parse(EvaluateConfig, sys.argv[1:], "Measure how good a checkpoint is."))


if __name__ == "__main__":
    cli.run(main)
