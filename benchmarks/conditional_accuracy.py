"""Do the faces have what was asked for? A classifier trained on other synthetic faces judges.

    python train.py --demo --experiment_name asked --num_training_steps 3000 \\
        --attributes Smiling Eyeglasses Blond_Hair Black_Hair
    python benchmarks/conditional_accuracy.py --checkpoint asked

For each attribute, on and off, the others not said: the share of generated faces that the
classifier says have it, or have it not, at each guidance; beside it the classifier's own accuracy
on faces that it has not seen, which no generator can be expected to pass."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cli
from benchmarks.synthetic_features import classifier
from device import keep_freed_memory
from generate import Trained, generate, load_trained
from settings import check_ranges, constant
from synthetic import ATTRIBUTES
from terminal import say, table


@dataclass(frozen=True)
class AccuracyConfig:
    """What to judge, and how."""

    checkpoint: str = ""  # a run on synthetic faces with --attributes; empty: the newest run here
    num_images: int = constant(128, least=1)  # faces for each attribute, on and off
    guidance: tuple[float, ...] = constant((1.0, 2.0, 4.0), least=0)  # each of these in turn
    steps: int = constant(20, least=1)  # of the default sampler


@torch.no_grad()
def share_as_asked(
    config: AccuracyConfig, trained: Trained, judge, column: int, value: int, guidance: float
) -> float:
    """The share of faces that have the network's attribute `column` (value 1), or have it not (-1),
    when asked for it."""
    attributes = torch.zeros(1, len(trained.attribute_names))
    attributes[0, column] = value
    options = dict(attributes=attributes, guidance=guidance, steps=config.steps)
    place = ATTRIBUTES.index(trained.attribute_names[column])
    batches = generate(trained, range(config.num_images), seed=column, **options)
    has = torch.cat([judge(faces.float().cpu())[:, place] > 0 for faces in batches])
    return float((has == (value == 1)).float().mean())


def main() -> None:
    """Print the table."""
    config = cli.parse(AccuracyConfig, sys.argv[1:], "Do the faces have what was asked for?")
    check_ranges(config)
    keep_freed_memory()
    trained = load_trained(config.checkpoint or None)
    judge, right = classifier()
    right = right[[ATTRIBUTES.index(name) for name in trained.attribute_names]]
    rows, totals = [], torch.zeros(len(config.guidance))
    for column, name in enumerate(trained.attribute_names):
        for value in (1, -1):
            face = (config, trained, judge, column, value)
            shares = [share_as_asked(*face, guidance) for guidance in config.guidance]
            totals += torch.tensor(shares) / (2 * len(trained.attribute_names))
            label = name if value == 1 else f"not {name}"
            rows.append([label, *(f"{share:.1%}" for share in shares), f"{right[column]:.1%}"])
    rows.append(["mean", *(f"{total:.1%}" for total in totals), f"{right.mean():.1%}"])
    heads = [f"guidance {guidance:g}" for guidance in config.guidance]
    say(table(["asked for", *heads, "classifier"], rows))


if __name__ == "__main__":
    cli.run(main)
