"""Do the faces have what was asked for? A classifier trained on other synthetic faces judges.

    python train.py --demo --experiment_name asked --num_training_steps 3000 \\
        --attributes Smiling Eyeglasses Blond_Hair Black_Hair
    python benchmarks/conditional_accuracy.py --checkpoint asked
    python benchmarks/conditional_accuracy.py --checkpoint asked --strengths 0.4 0.6 0.8

For each attribute, on and off, the others not said: the share of generated faces that the
classifier says have it, or have it not, at each guidance; beside it the classifier's own accuracy
on faces that it has not seen, which no generator can be expected to pass.

With --strengths faces that have not the attribute are varied to have it, each attribute in turn:
the share that has it then, how many of their other attributes stayed, and how far they went."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.editing import distance
from benchmarks.synthetic_features import FIRST, IMG_SIZE, NUM_FACES, classifier, render_faces
from dataset.synthetic import ATTRIBUTES, HAIRS
from generate import Trained, generate, load_trained
from system import flags
from system.device import keep_freed_memory
from system.errors import UsageError
from system.flags import check_ranges, constant
from system.terminal import say, table

NUM_UNSEEN = 2000  # faces to choose from that neither the network nor the classifier has seen


@dataclass(frozen=True)
class AccuracyConfig:
    """What to judge, and how."""

    checkpoint: str = ""  # a run on synthetic faces with --attributes; empty: the newest run here
    num_images: int = constant(128, least=1)  # faces for each attribute, on and off
    guidance: tuple[float, ...] = constant((1.0, 2.0, 4.0), least=0)  # each of these in turn
    steps: int = constant(20, least=1)  # of the default sampler
    strengths: tuple[float, ...] = constant((), least=0, most=1)  # of variations, each in turn


class Judge:
    """What a classifier says of the attributes that a network has learned."""

    def __init__(self, trained: Trained):
        self.names = trained.attribute_names
        shape = trained.image_channels, trained.img_size
        if not self.names or set(self.names) - set(ATTRIBUTES) or shape != (3, IMG_SIZE):
            what = f"{trained.path} is no network of synthetic faces with attributes"
            raise UsageError("--checkpoint", what, f"train one, in colours, at {IMG_SIZE} px")
        places = [ATTRIBUTES.index(name) for name in self.names]
        self.model, right = classifier()
        self.right, self.places = right[places], places  # accuracies, on unseen faces

    @torch.no_grad()
    def __call__(self, faces: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, K) bool: what they have."""
        return self.model(faces.float().cpu())[:, self.places] > 0

    def others(self, column: int) -> list[int]:
        """The columns of what may stay when one is changed: of hair colours there is one only."""
        group = HAIRS if self.names[column] in HAIRS else self.names[column : column + 1]
        return [i for i, name in enumerate(self.names) if name not in group]


def generate_asked(
    config: AccuracyConfig, trained: Trained, count: int, column: int, value: int, **options
) -> Tensor:
    """Faces asked to have the network's attribute `column` (value 1), or not to have it (-1)."""
    attributes = torch.zeros(1, len(trained.attribute_names))
    attributes[0, column] = value
    options |= dict(attributes=attributes, steps=config.steps)
    return torch.cat(list(generate(trained, range(count), seed=column, **options))).cpu()


def measure_generated(config: AccuracyConfig, trained: Trained, judge: Judge) -> None:
    """The table of what was asked for."""
    rows, totals = [], torch.zeros(len(config.guidance))
    for column, name in enumerate(judge.names):
        for value in (1, -1):
            shares = []
            for guidance in config.guidance:
                face = (config.num_images, column, value)
                faces = generate_asked(config, trained, *face, guidance=guidance)
                shares.append(float((judge(faces)[:, column] == (value == 1)).float().mean()))
            totals += torch.tensor(shares) / (2 * len(judge.names))
            label = name if value == 1 else f"not {name}"
            rows.append(
                [label, *(f"{share:.1%}" for share in shares), f"{judge.right[column]:.1%}"]
            )
    rows.append(["mean", *(f"{total:.1%}" for total in totals), f"{judge.right.mean():.1%}"])
    heads = [f"guidance {guidance:g}" for guidance in config.guidance]
    say(table(["asked for", *heads, "classifier"], rows))


def measure_varied(config: AccuracyConfig, trained: Trained, judge: Judge) -> None:
    """The table of faces that are varied to have what they have not."""
    faces, _ = render_faces(FIRST + NUM_FACES, NUM_UNSEEN)
    has, rows = judge(faces), []
    for strength in config.strengths:
        for guidance in config.guidance:
            got, stayed, images, originals = [], [], [], []
            for column in range(len(judge.names)):
                chosen = (~has[:, column]).nonzero()[: config.num_images, 0]
                options = dict(image=faces[chosen], strength=strength, guidance=guidance)
                varied = generate_asked(config, trained, len(chosen), column, 1, **options)
                now, others = judge(varied), judge.others(column)
                got.append(now[:, column])
                stayed.append((now == has[chosen])[:, others].flatten())
                images.append(varied)
                originals.append(faces[chosen])
            shares = [f"{torch.cat(each).float().mean():.1%}" for each in (got, stayed)]
            far = distance(torch.cat(images), torch.cat(originals))
            rows.append([f"{strength:g}", f"{guidance:g}", *shares, far])
    say(table(["strength", "guidance", "has it", "others stayed", "distance"], rows))


def main() -> None:
    """Print one of the tables."""
    config = flags.parse(AccuracyConfig, sys.argv[1:], "Do the faces have what was asked for?")
    check_ranges(config)
    keep_freed_memory()
    trained = load_trained(config.checkpoint or None)
    measure = measure_varied if config.strengths else measure_generated
    measure(config, trained, Judge(trained))


if __name__ == "__main__":
    flags.run(main)
