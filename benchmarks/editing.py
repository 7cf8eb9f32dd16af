"""How well a network repairs and changes the faces that were held out of its training.

    python benchmarks/editing.py --checkpoint celeba_64 --path_to_data celeba

Repairs: the root mean square difference from the true face in the hole, in grey levels, beside the
training face that is nearest in the rest. Changes: faces without an attribute are changed to have
it, with a guidance of 3, each attribute in turn. A classifier, trained on the training faces, tells
how many have it then, and how many of their other attributes are as before."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine
from benchmarks.synthetic_features import Classifier, learn
from dataset.faces import load_faces
from editing import edit_loop, encode
from generate import add_guide, generate, load_trained
from system import flags
from system.terminal import say, table
from utils import to_x_0

# What is repaired: top, bottom, left, right, in shares of the side of the image.
HOLES = {"right half": (0, 1, 0.5, 1), "eyes": (0.25, 0.5, 0.1, 0.9)}


@dataclass(frozen=True)
class EditingConfig:
    """What to measure, and how."""

    checkpoint: str = ""  # as for sample.py
    path_to_data: str = "data"  # the faces it was trained on, as for train.py
    num_images: int = flags.constant(200, least=1)  # held-out faces
    steps: int = flags.constant(20, least=1)  # of the default sampler


def repair(edit: Callable, faces: Tensor, known: Tensor) -> None:
    """Print the table of repairs. edit: generates an answer for each face; known: the training
    faces, (N, 3, S, S) in [-1, 1] as the held-out ones."""
    rows, size = [], faces.shape[-1]
    for name, edges in HOLES.items():
        top, bottom, left, right = (round(share * size) for share in edges)
        mask = torch.zeros(1, 1, size, size, dtype=torch.bool)
        mask[..., top:bottom, left:right] = True
        nearest = torch.cdist((faces * ~mask).flatten(1), (known * ~mask).flatten(1)).argmin(1)
        options, fills = dict(loop=edit_loop, image=faces, mask=mask), [known[nearest]]
        fills += [edit(resample=times, **options) for times in (1, 5)]
        errors = [(fill - faces)[..., top:bottom, left:right].square().mean() for fill in fills]
        rows.append([name, *(f"{127.5 * float(error) ** 0.5:.1f}" for error in errors)])
    say(table(["hole", "nearest face", "resample 1", "resample 5"], rows))


def change(edit: Callable, faces: Tensor, noise: Tensor, judge: Classifier) -> None:
    """Print the table of changes. noise: from which the faces are generated."""
    had, rows = judge(faces) > 0, []
    ways = {f"strength {s}": dict(loop=edit_loop, image=faces, strength=s) for s in (0.6, 0.8)}
    ways["inversion"] = dict(x_T=noise)
    for name, options in ways.items():
        has, stayed = [], []
        for column, asked in enumerate(torch.eye(had.shape[1])):
            changed = edit(guidance=3.0, attributes=asked[None], **options)
            now, lacked = judge(changed.float()) > 0, ~had[:, column]
            has.append(now[lacked, column])
            stayed.append((now == had)[lacked][:, asked == 0].flatten())
        rows.append([name, *(f"{torch.cat(part).float().mean():.1%}" for part in (has, stayed))])
    say(table(["changed by", "has it", "others stayed"], rows))


def main() -> None:
    """The command line: EditingConfig's flags."""
    config = flags.parse(EditingConfig, sys.argv[1:], "How well does it repair and change faces?")
    flags.check_ranges(config)
    trained = add_guide(load_trained(config.checkpoint or None))
    about = trained.img_size, trained.settings["only"], trained.attribute_names
    data = load_faces(config.path_to_data, *about)
    held_out = data.held_out[: config.num_images]
    faces, known = (to_x_0(torch.from_numpy(data.images[part])) for part in (held_out, data.train))
    say(f"{trained.path}, {len(faces)} faces\n{machine(trained.diffusion.device)}\n")

    def edit(**options) -> Tensor:
        parts = generate(trained, range(len(faces)), steps=config.steps, **options)
        return torch.cat(list(parts)).cpu()

    repair(edit, faces, known)
    judge = learn(known, (torch.from_numpy(data.attributes[data.train]) > 0).float())
    change(edit, faces, encode(trained, faces, config.steps), judge)
    right = (judge(faces) > 0) == (torch.from_numpy(data.attributes[held_out]) > 0)
    say(f"the classifier is right about {right.float().mean():.1%} of their attributes")


if __name__ == "__main__":
    flags.run(main)
