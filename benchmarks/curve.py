"""How far the images of each checkpoint are from the faces that it was trained on.

    python benchmarks/curve.py --checkpoints celeba/checkpoints/* --path_to_data celeba \\
        --features my_features:load --feature_size 64                   # the curve of a run
    python benchmarks/curve.py --checkpoints celeba --steps 5 10 50 --autoguidance 1 1.3

Each checkpoint generates from the same noise, with every number of steps of `dpm++` and every
strength of its run's guide; a network that knows attributes gets those of training faces. The
reference is all faces of the training. The table shows the held-out loss and the share of copies by
pixels too. evaluate.py measures more of one checkpoint."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine
from dataset.faces import Faces, load_faces
from formats.features import Features, find_features
from generate import Trained, add_guide, generate, load_trained
from metrics import copies, frechet_distance, held_out_loss, nearest_pixels
from system import flags
from system.device import DEVICES, find_device
from system.errors import UsageError
from system.files import check_writable, save_json
from system.flags import check_ranges, constant
from system.terminal import say, table
from utils import to_uint8


@dataclass(frozen=True)
class CurveConfig:
    """What to measure, and how."""

    checkpoints: tuple[str, ...] = ("",)  # runs, files in them, weights' names; "": the newest run
    path_to_data: str = "data"  # the faces they were trained on, as for train.py
    num_images: int = constant(1000, least=20)  # images for each distance
    steps: tuple[int, ...] = constant((10,), least=1, most=1000)  # of dpm++ for an image
    autoguidance: tuple[float, ...] = constant((1.0,), least=1)  # strengths of the guide; 1: none
    loss_draws: int = constant(2, least=0)  # held-out faces at each t; 0: no held-out loss
    features: str = "inception"  # for the distances, as for evaluate.py
    feature_size: int = constant(0, least=0)  # pixels images are resized to first; 0: as they are
    seed: int = constant(0, least=0)  # image i depends on (seed, i) only
    out: str = "curve.json"  # what was measured
    device: Literal[*DEVICES] = "auto"  # auto: cuda if there is one, else cpu


def distance(reference: np.ndarray, vectors: np.ndarray, groups: int = 10) -> tuple[float, float]:
    """The Frechet distance of vectors (N, D) to those of the reference, and its standard error by
    the jackknife, from the distances without a tenth of them (Efron and Stein 1981)."""
    parts = np.array_split(np.arange(len(vectors)), groups)
    without = [frechet_distance(reference, np.delete(vectors, part, axis=0)) for part in parts]
    return frechet_distance(reference, vectors), float(np.std(without) * (groups - 1) ** 0.5)


def faces_of(trained: Trained, path_to_data: str) -> Faces:
    """The faces that a network was trained on. Prints a note if path_to_data has others."""
    settings = trained.settings
    faces = load_faces(path_to_data, trained.img_size, settings["only"], settings["attributes"])
    if faces.fingerprint != settings["faces"]:
        say(f"note: {trained.path} was trained on other faces ({settings['faces']})")
    return faces


def generated(
    trained: Trained,
    faces: Faces,
    num_images: int,
    steps: Iterable[int],
    autoguidance: Iterable[float],
    seed: int = 0,
) -> Iterator[tuple[str, np.ndarray]]:
    """A name and the images, (N, S, S, 3) uint8, for each number of steps and each strength of the
    run's guide."""
    options = {}
    if trained.attribute_names:
        asked = np.random.default_rng(seed).choice(faces.train, num_images)
        options["attributes"] = torch.from_numpy(faces.attributes[asked])
    for count, strength in product(steps, autoguidance):
        guided = trained if strength == 1 else add_guide(trained, strength=strength)
        parts = generate(guided, range(num_images), seed, steps=count, **options)
        name = f"{count} steps" + (f", guided at {strength:g}" if strength != 1 else "")
        yield name, torch.cat([to_uint8(part) for part in parts]).numpy()


def cells(distances: dict[str, tuple[float, float]]) -> list[str]:
    """Distances with their errors, as cells of a table."""
    return [f"{value:.3f} ± {error:.3f}" for value, error in distances.values()]


def features_of(spec: str, size: int, device: str) -> Features:
    """The features for the distances. Raises UsageError for "none"."""
    if (features := find_features(spec, size, device)) is None:
        raise UsageError("--features", "is none", "name some, as for evaluate.py")
    return features


def measure(config: CurveConfig) -> list[dict]:
    """Measure every checkpoint, write what was found, and print it. Raises UserError."""
    check_ranges(config)
    check_writable(Path(config.out), "--out")
    device, results = find_device(config.device), []
    networks = [load_trained(path or None, device=device) for path in config.checkpoints]
    features = features_of(config.features, config.feature_size, device.type)
    for trained in networks:
        faces = faces_of(trained, config.path_to_data)
        result = {"checkpoint": str(trained.path), "step": trained.step, "distances": {}}
        if config.loss_draws and len(faces.held_out):
            held_out = faces.images[faces.held_out], faces.attributes[faces.held_out]
            losses = held_out_loss(trained, trained.diffusion, *held_out, draws=config.loss_draws)
            result["held_out_loss"] = float(losses.mean())
        reference = features.cached(faces.images, faces.train, faces.key)
        wanted = (config.num_images, config.steps, config.autoguidance, config.seed)
        for name, images in generated(trained, faces, *wanted):
            result["distances"][name] = distance(reference, features.of(images))
        _, near = nearest_pixels(images, faces.images, faces.train, device.type)  # the last images
        result["copies"] = copies(near)["copies"]
        results.append(result)
        save_json(Path(config.out), {"config": asdict(config), "results": results})
    columns = ["checkpoint", "step", "held-out loss", "copies"]
    columns += [f"distance, {name}" for name in results[0]["distances"]]
    rows = []
    for one in results:
        loss = f"{one['held_out_loss']:.4f}" if "held_out_loss" in one else ""
        row = [one["checkpoint"], f"{one['step']:,}", loss, f"{one['copies']:.1%}"]
        rows.append([*row, *cells(one["distances"])])
    say(f"{table(columns, rows)}\n{machine(device)}")
    return results


def main() -> None:
    """The command line: CurveConfig's flags."""
    measure(flags.parse(CurveConfig, sys.argv[1:], "Measure one checkpoint after another."))


if __name__ == "__main__":
    flags.run(main)
