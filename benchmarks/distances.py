"""How far the images of one checkpoint after another are from the faces it was trained on.

    python benchmarks/distances.py --checkpoints celeba/checkpoints/* --path_to_data celeba \\
        --features face_features:load --feature_size 64               # a run's curve
    python benchmarks/distances.py --checkpoints celeba_32 --steps 5 10 50 --autoguidance 1 1.3

Each is sampled by every number of `dpm++`'s steps and every strength of its run's guide, from the
same noise, a network that knows attributes for those of training faces; the reference is all faces
trained on. The held-out loss stands beside them. evaluate.py measures one checkpoint, and more."""

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine
from dataset.faces import Faces, load_faces
from generate import Trained, add_guide, generate, load_trained
from metrics import Features, find_features, frechet_distance, loss_at_all_t
from system import flags
from system.errors import UsageError
from system.files import check_writable, save_json
from system.flags import check_ranges, constant
from system.terminal import say, table
from utils import to_uint8


@dataclass(frozen=True)
class DistancesConfig:
    """What to measure, and how."""

    checkpoints: tuple[str, ...] = ("",)  # runs, files in them, weights' names; "": the newest run
    path_to_data: str = "data"  # the faces they were trained on, as for train.py
    num_images: int = constant(1000, least=20)  # images for each distance
    steps: tuple[int, ...] = constant((10,), least=1, most=1000)  # of dpm++ for an image
    autoguidance: tuple[float, ...] = constant((1.0,), least=1)  # strengths of the guide; 1: none
    loss_draws: int = constant(2, least=0)  # held-out faces at each t; 0: no held-out loss
    features: str = "inception"  # for the distances, as for evaluate.py
    feature_size: int = constant(0, least=0)  # pixels images are resized to first; 0: as they are
    seed: int = constant(0, least=0)  # image i depends on (seed, i) alone
    out: str = "distances.json"  # what was measured


def distance(reference: np.ndarray, vectors: np.ndarray, groups: int = 10) -> tuple[float, float]:
    """The Frechet distance of vectors (N, D) to those of the reference, and its standard error by
    the jackknife, from the distances without a tenth of them (Efron and Stein 1981)."""
    parts = np.array_split(np.arange(len(vectors)), groups)
    without = [frechet_distance(reference, np.delete(vectors, part, axis=0)) for part in parts]
    return frechet_distance(reference, vectors), float(np.std(without) * (groups - 1) ** 0.5)


def distances(
    trained: Trained,
    faces: Faces,
    features: Features,
    num_images: int,
    steps: Iterable[int],
    autoguidance: Iterable[float],
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Of a network's images to the faces for training, with its error, by steps and by strength of
    the run's guide."""
    reference = features.cached(faces.images, faces.train, faces.key)
    options, measured = {}, {}
    if trained.attribute_names:
        asked = np.random.default_rng(seed).choice(faces.train, num_images)
        options["attributes"] = torch.from_numpy(faces.attributes[asked])
    for count, strength in product(steps, autoguidance):
        guided = trained if strength == 1 else add_guide(trained, strength=strength)
        parts = generate(guided, range(num_images), seed, steps=count, **options)
        pixels = torch.cat([to_uint8(part) for part in parts]).numpy()
        name = f"{count} steps" + (f", guided at {strength:g}" if strength != 1 else "")
        measured[name] = distance(reference, features.of(pixels))
    return measured


def cells(measured: dict[str, tuple[float, float]]) -> list[str]:
    """A row's cells."""
    return [f"{value:.3f} ± {error:.3f}" for value, error in measured.values()]


def measure(config: DistancesConfig) -> list[dict]:
    """Measure every checkpoint, keep what was found, and print it. Raises UserError."""
    check_ranges(config)
    check_writable(Path(config.out), "--out")
    networks = [load_trained(checkpoint or None) for checkpoint in config.checkpoints]
    features = find_features(config.features, config.feature_size)
    if features is None:
        raise UsageError("--features", "is none", "name some, as for evaluate.py")
    results = []
    for trained in networks:
        settings = trained.settings
        data = (config.path_to_data, trained.img_size, settings["only"], settings["attributes"])
        faces = load_faces(*data)
        if faces.fingerprint != settings["faces"]:
            say(f"note: {trained.path} was trained on other faces ({settings['faces']})")
        result = {"checkpoint": str(trained.path), "step": trained.step}
        if config.loss_draws and len(faces.held_out):
            held_out = faces.images[faces.held_out], faces.attributes[faces.held_out]
            loss = loss_at_all_t(trained, trained.diffusion, *held_out, draws=config.loss_draws)
            result["held_out_loss"] = float(loss.loss.mean())
        wanted = (config.num_images, config.steps, config.autoguidance, config.seed)
        result["distances"] = distances(trained, faces, features, *wanted)
        results.append(result)
        save_json(Path(config.out), {"config": asdict(config), "results": results})
    columns = ["checkpoint", "step", "held-out loss"]
    columns += [f"distance, {name}" for name in results[0]["distances"]]
    rows = []
    for one in results:
        loss = f"{one['held_out_loss']:.4f}" if "held_out_loss" in one else ""
        rows.append([one["checkpoint"], f"{one['step']:,}", loss, *cells(one["distances"])])
    say(table(columns, rows))
    return results


def main() -> None:
    """The command line: DistancesConfig's flags."""
    config = flags.parse(DistancesConfig, sys.argv[1:], "Measure one checkpoint after another.")
    here = machine(torch.device("cpu"))
    measure(config)
    say(here)


if __name__ == "__main__":
    flags.run(main)
