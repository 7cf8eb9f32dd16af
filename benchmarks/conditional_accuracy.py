"""Do the faces have what was asked for? A classifier trained on other drawn faces judges.

    python train.py --demo --experiment_name asked --attributes Smiling Eyeglasses Blond_Hair
    Black_Hair python benchmarks/conditional_accuracy.py --checkpoint asked

For each attribute, on and off, the others not said: the share of generated faces that the
classifier says have it, or have it not, at each guidance; beside it the classifier's own accuracy
on faces that it has not seen, which no generator can be expected to pass."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cli
from dataset import to_x_0
from drawn_faces import ATTRIBUTES, draw_face
from sample import generate, load_trained
from utils import keep_freed_memory

FIRST = 1_000_000  # the classifier's faces begin here, far from those that are trained on


@dataclass(frozen=True)
class Accuracy:
    """What to judge, and how."""

    checkpoint: str = ""  # a run on drawn faces with --attributes; empty: the newest run here
    num_images: int = 128  # faces for each attribute, on and off
    guidance: tuple[float, ...] = (1.0, 2.0)  # each of these in turn
    steps: int = 20  # evaluations of the network, by dpm++
    num_faces: int = 12_000  # drawn faces that the classifier learns from
    epochs: int = 4  # of the classifier


def draw(first: int, count: int, img_size: int) -> tuple[Tensor, Tensor]:
    """Drawn faces (count, 3, S, S) in [-1, 1], and what they have, (count, all) of 1 and 0."""
    faces = [draw_face(i, img_size) for i in trange(first, first + count, disable=None)]
    pixels = torch.stack([torch.from_numpy(pixels) for pixels, _ in faces])
    has = torch.stack([torch.from_numpy(values) for _, values in faces])
    return to_x_0(pixels), (has > 0).float()


def make_classifier(outputs: int) -> nn.Module:
    """Three convolutions that halve the picture, and one layer for all attributes."""
    layers, width = [], 3
    for channels in (32, 64, 128):
        layers += [nn.Conv2d(width, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        width = channels
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, outputs)
    )


def train_classifier(wish: Accuracy, img_size: int, columns: list[int]) -> tuple[nn.Module, Tensor]:
    """A classifier of these attributes, and its accuracy for each on faces it has not seen."""
    torch.manual_seed(0)
    faces, has = draw(FIRST, wish.num_faces, img_size)
    model = make_classifier(len(columns))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps = wish.epochs * wish.num_faces // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        picks = torch.randint(0, wish.num_faces, (64,))
        loss = F.binary_cross_entropy_with_logits(model(faces[picks]), has[picks][:, columns])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    faces, has = draw(FIRST + wish.num_faces, 2000, img_size)
    with torch.no_grad():
        right = ((model(faces) > 0) == (has[:, columns] > 0)).float().mean(0)
    return model, right


@torch.no_grad()
def share_as_asked(wish: Accuracy, trained, classifier, column: int, value: int, guidance) -> float:
    """The share of faces that have attribute `column` (value 1), or have it not (-1), when
    asked."""
    asked = torch.zeros(1, len(trained.attributes))
    asked[0, column] = value
    options = dict(attributes=asked, guidance=guidance, steps=wish.steps)
    batches = generate(trained, range(wish.num_images), seed=column, **options)
    has = torch.cat([classifier(faces.float().cpu())[:, column] > 0 for faces in batches])
    return float((has == (value == 1)).float().mean())


def main() -> None:
    """Print the table."""
    wish = cli.parse(Accuracy, sys.argv[1:], "Do the faces have what was asked for?")
    keep_freed_memory()
    trained = load_trained(wish.checkpoint or None)
    columns = [ATTRIBUTES.index(name) for name in trained.attributes]
    classifier, right = train_classifier(wish, trained.img_size, columns)
    heads = [f"guidance {guidance:g}" for guidance in wish.guidance]
    print(f"| asked for | {' | '.join(heads)} | classifier |")
    print("| --- |" + " --- |" * (len(heads) + 1))
    totals = torch.zeros(len(heads))
    for column, name in enumerate(trained.attributes):
        for value in (1, -1):
            judge = (trained, classifier, column, value)
            shares = [share_as_asked(wish, *judge, guidance) for guidance in wish.guidance]
            totals += torch.tensor(shares) / (2 * len(columns))
            cells = [f"{share:.1%}" for share in shares]
            label = name if value == 1 else f"not {name}"
            print(f"| {label} | {' | '.join(cells)} | {right[column]:.1%} |", flush=True)
    print(f"| mean | {' | '.join(f'{t:.1%}' for t in totals)} | {right.mean():.1%} |")


if __name__ == "__main__":
    cli.run(main)
