"""How good a checkpoint is: its loss on held-out faces, how far its images are from real ones,
whether they are copies, and how many steps they need.

    python evaluate.py --checkpoint my_first_diffusion --path_to_data data
    python evaluate.py --samplers ddpm:1000 ddim:50 dpm++:10 dpm++:20 --num_images 256
    python evaluate.py --features my_features:load --feature_size 64    # instead of Inception's
    python evaluate.py --features none                                  # what needs no features
    accelerate launch evaluate.py --num_images 50000                    # several GPUs

Prints tables, and writes evaluation.json, nearest.png and samplers.png into <run>/evaluation. The
generated images are kept there too: stopped in the middle, or asked for more, it goes on from them.
"""

import hashlib
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from dataset.faces import Faces, load_faces
from generate import (
    Generated,
    Trained,
    add_guide,
    batch_files,
    generate,
    keep_generated,
    load_trained,
    read_generated,
)
from metrics import find_features, loss_at_all_t, measure_images
from samplers import VERSION, SamplerError, check_sampler
from system import flags
from system.device import DEVICES, find_device, keep_freed_memory
from system.errors import DataError, UsageError
from system.files import check_writable, save_json
from system.flags import check_ranges, constant
from system.processes import Processes
from system.terminal import say, table
from utils import image_grid, reading, save_image, to_x_0

NUM_SHOWN = 8  # faces in nearest.png and in each row of samplers.png


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and how."""

    checkpoint: str = ""  # a run, a file in it, a folder of diffusers'; empty: the newest run here
    path_to_data: str = "data"  # the faces it was trained on, as for train.py
    num_images: int = constant(1000, least=2)  # images of each sampler, and real ones beside them
    num_reference: int = constant(0, least=0)  # training faces to compare with; 0: all others
    samplers: tuple[str, ...] = ("dpm++:10",)  # name:steps, each from the same noise
    features: str = ""  # for the distances: inception (default on a GPU), none, module:callable
    feature_size: int = constant(0, least=0)  # pixels images are resized to first; 0: as they are
    loss_draws: int = constant(2, least=0)  # held-out faces at each t; 0: no held-out loss
    seed: int = constant(0, least=0)  # image i depends on (seed, i) alone
    batch_size: int = constant(64, least=1)  # images generated at a time
    guide: str = "auto"  # an early checkpoint whose errors to avoid; auto: the run's own; none
    autoguidance: float = constant(1.3, least=1)  # how far it leads: 1 not at all, 2 far
    raw: bool = False  # generate with the weights as trained, not with their average (EMA)
    device: Literal[*DEVICES] = "auto"  # auto: cuda where there is one, else cpu; mps: untried


def evaluate(config: EvaluateConfig) -> Path:
    """Measure what the config says. Returns the path of evaluation.json. Raises UserError."""
    check_config(config)
    keep_freed_memory()
    with Processes(find_device(config.device)) as processes:
        return evaluate_with(config, processes)


def evaluate_with(config: EvaluateConfig, processes: Processes) -> Path:
    """What `evaluate` does, by these processes: each generates its share, rank 0 measures."""
    device = str(processes.device)
    averaged = load_trained(config.checkpoint or None, device=device)
    raw = load_trained(averaged.path, raw=True, device=device)
    trained, settings = raw if config.raw else averaged, averaged.settings
    check_samplers(config, trained.diffusion.num_timesteps)
    trained = add_guide(trained, config.guide, config.autoguidance)
    if not config.features:
        config = replace(config, features="none" if device == "cpu" else "inception")
        if device == "cpu":
            what = "no distances are measured without a GPU, where they take most of an hour"
            say(f"note: {what}; --features inception asks for them")
    features = find_features(config.features, config.feature_size, device)
    with processes.first_of_each_machine_first(), reading(trained.path, "take another checkpoint"):
        data = (config.path_to_data, trained.img_size, settings["only"], settings["attributes"])
        data += (settings.get("grey", False),)
        faces = load_faces(*data)
    real = split_real(config, faces)
    guided = f", guided by {trained.guide}," if trained.guide else ""
    say(f"{trained.path}, step {trained.step}{guided} against {faces.description}")
    if not faces.matches(settings["faces"]):
        say(f"note: it was trained on other faces ({settings['faces']})")

    run = trained.path.parent.parent if trained.path.parent.name == "checkpoints" else Path()
    folder = run / "evaluation"
    check_writable(folder / "evaluation.json", "--checkpoint")
    generated = generate_all(config, trained, faces, folder, processes)
    if generated:
        result = {"checkpoint": str(trained.path), "step": trained.step, "config": asdict(config)}
        result |= {"key": faces.key, "fingerprint": faces.fingerprint}
        result["num_reference"] = len(real[1])
        if config.loss_draws and len(faces.held_out):
            result["held_out"] = compare_held_out(config, faces, raw, averaged)
        near = device if device.startswith("cuda") else "cpu"  # float64, which mps lacks
        measured, found = measure_images(faces, features, generated, real, near)
        result |= measured
        save_nearest_sheet(folder / "nearest.png", generated[0].images, faces, found)
        save_sampler_sheet(folder / "samplers.png", generated)
        save_json(folder / "evaluation.json", result)
        report(config, result)
        say(f"\nwritten to {folder}")
    return folder / "evaluation.json"


def check_config(config: EvaluateConfig) -> None:
    """Raise UsageError, naming the flag, for what cannot be, whatever the checkpoint."""
    check_ranges(config)
    if not config.samplers or len(set(config.samplers)) < len(config.samplers):
        raise UsageError("--samplers", "names none, or one twice", "give each once, as dpm++:10")
    if config.loss_draws == 1:
        what = "is 1, which has no standard error"
        raise UsageError("--loss_draws", what, "give 0, or 2 or more")


def check_samplers(config: EvaluateConfig, num_timesteps: int) -> None:
    """Raise UsageError for one of --samplers that cannot be."""
    for text in config.samplers:
        sampler, _, steps = text.partition(":")
        if not steps.isdecimal() or len(steps) > 9:
            raise UsageError("--samplers", f"is {text!r}", "write name:steps, such as dpm++:10")
        try:
            check_sampler(sampler, int(steps), num_timesteps=num_timesteps)
        except SamplerError as error:
            what = f"of {text!r} the {error.argument} {error.what}"
            raise UsageError("--samplers", what, error.fix) from error


# The images ---------------------------------------------------------------------------------------


def generate_all(config, trained, faces, folder: Path, processes) -> list[Generated]:
    """Let each sampler generate what does not lie there already, each process as many batches as
    the others, or one more. The list is empty but in rank 0."""
    digest = source_digest(trained, faces)
    files = {text: generated_files(config, folder, digest, text) for text in config.samplers}
    every = [(text, *batch) for text, batches in files.items() for batch in batches]
    missing = processes.from_main(lambda: [one for one in every if not one[2].exists()])
    share = missing[processes.rank :: processes.world_size]
    for text in files:
        new = sum(len(numbers) for name, numbers, _ in missing if name == text)
        kept = config.num_images - new
        say(f"{text}: generating {new:,} images, {kept:,} are there already")
        ours = [each[1:] for each in share if each[0] == text]
        generate_missing(config, trained, faces, text, ours)
    processes.everyone()
    if not processes.is_main:
        return []
    for text, batches in files.items():  # where the disk is not a common one, rank 0 does it all
        generate_missing(config, trained, faces, text, batches)
    return [read_generated(text, batches) for text, batches in files.items()]


def source_digest(trained: Trained, faces: Faces) -> str:
    """The digest, in a few letters, of what the images follow from: the checkpoint, the precision,
    the samplers and, where the network is asked for the attributes of faces, the faces."""
    with open(trained.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(f"{trained.dtype}{trained.guided_by}{VERSION}".encode())
    digest.update(faces.fingerprint.encode() if trained.attribute_names else b"")
    return digest.hexdigest()[:12]


def generated_files(
    config: EvaluateConfig, folder: Path, digest: str, text: str
) -> list[tuple[range, Path]]:
    """The images of a sampler, batch by batch: their numbers, and the file that keeps them.

    The folder's name says what else the images depend on, so that none is taken for another."""
    weights = "raw" if config.raw else "ema"
    name = f"{text.replace(':', '_')}_{weights}_seed{config.seed}_batch{config.batch_size}_{digest}"
    return batch_files(config.num_images, config.batch_size, folder / "generated" / name)


def generate_missing(config, trained: Trained, faces: Faces, text: str, files) -> None:
    """Generate the batches that are not there yet. A network that knows attributes is asked for
    those of training faces, drawn at random."""
    sampler, steps = text.split(":")
    options = dict(sampler=sampler, steps=int(steps), batch_size=config.batch_size)
    attributes = None
    if trained.attribute_names:
        drawn = np.random.default_rng(config.seed).choice(faces.train, config.num_images)
        attributes = torch.from_numpy(faces.attributes[drawn])
    missing = [(numbers, path) for numbers, path in files if not path.exists()]
    count = sum(len(numbers) for numbers, _ in missing)
    with tqdm(total=count, desc=text, unit="image", disable=None) as bar:
        for numbers, path in missing:
            if attributes is not None:
                options["attributes"] = attributes[numbers.start : numbers.stop]
            images = generate(trained, numbers, config.seed, bar=bar, **options)
            keep_generated(path, partial(next, images))


# The measures -------------------------------------------------------------------------------------


def split_real(config: EvaluateConfig, faces: Faces) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of real faces that share none, as indices: `num_images` that stand where generated
    ones do (held-out ones first, topped up from the training faces), and the reference. Raises
    DataError where there are not enough."""
    random = np.random.default_rng(0)
    order = np.concatenate([random.permutation(faces.held_out), random.permutation(faces.train)])
    floor, rest = order[: config.num_images], order[max(config.num_images, len(faces.held_out)) :]
    wanted = config.num_reference or max(len(rest), 2)
    if len(rest) < wanted:
        what = f"{config.num_images} of the {len(order):,} faces, put first, leave {len(rest):,}"
        what += f" for a reference of {wanted:,}"
        raise DataError("--num_reference", what, "lower it, or --num_images")
    return floor, rest[:wanted]


def compare_held_out(config: EvaluateConfig, faces: Faces, raw: Trained, averaged: Trained) -> dict:
    """The loss in ten bands of t and the bits per dimension, of both sets of weights."""
    result = {}
    held_out = faces.images[faces.held_out], faces.attributes[faces.held_out]
    for name, trained in (("raw", raw), ("ema", averaged)):
        options = dict(draws=config.loss_draws, show=sys.stderr.isatty())
        loss = loss_at_all_t(trained, trained.diffusion, *held_out, **options)
        bits, error = loss.bits_per_dim()
        result[name] = {"bands": loss.bands(), "loss": float(loss.loss.mean())}
        result[name] |= {"bits_per_dim": bits, "bits_per_dim_error": error}
    return result


# The report ---------------------------------------------------------------------------------------


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
    say("\n" + table([f"{config.num_images} images", "seconds", *distances], rows))
    rows = []
    for name, values in result["nearest"].items():
        shares = f"{values['copies']:.1%}", f"{values['median_ratio']:.3f}"
        rows.append([name, *shares, f"{values['median_distance']:.3f}"])
    say("\n" + table(["nearest training face", "d1/d2 < 1/3", "median d1/d2", "median d1"], rows))


def save_nearest_sheet(path: Path, images: np.ndarray, faces: Faces, found: list) -> None:
    """Save a sheet: generated faces, and under each the nearest training faces. found: (N, 2)
    indices into the training faces, by pixels and by features where there are any."""
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
