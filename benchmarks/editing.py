"""How well a network repairs and changes the faces that were held out of its training.

    python benchmarks/editing.py --checkpoint celeba_64 --path_to_data celeba

Repairs: the root mean square difference from the true face in the hole, in grey levels, beside that
of the training face that is nearest in the rest. Changes: faces without an attribute are changed to
have it, each in turn. A classifier tells how many have it then, and which of the others stayed."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine
from benchmarks.curve import faces_of
from benchmarks.synthetic_features import Classifier, learn
from editing import edit_loop, encode
from generate import add_guide, generate, load_trained
from system import flags
from system.terminal import say, table
from utils import to_x_0

HOLES = {"right half": (0, 1, 0.5, 1), "eyes": (0.25, 0.5, 0.1, 0.9)}  # top, bottom, left, right


@dataclass(frozen=True)
class EditingConfig:
    """What to measure, and how."""

    checkpoint: str = ""  # as for sample.py
    path_to_data: str = "data"  # the faces it was trained on, as for train.py
    num_images: int = flags.constant(200, least=1)  # held-out faces
    steps: int = flags.constant(20, least=1)  # of the default sampler


def repair(edit: Callable, faces: torch.Tensor, known: torch.Tensor) -> None:
    """Print the table of repairs. edit: `generate`, for all faces; known: training faces."""
    rows, size = [], faces.shape[-1]
    for name, edges in HOLES.items():
        top, bottom, left, right = (round(share * size) for share in edges)
        mask = torch.zeros(1, 1, size, size, dtype=torch.bool)
        mask[..., top:bottom, left:right] = True
        nearest = torch.cdist((faces * ~mask).flatten(1), (known * ~mask).flatten(1)).argmin(1)
        options, fills = dict(loop=edit_loop, image=faces, mask=mask), [known[nearest]]
        fills += [torch.cat([*edit(resample=times, **options)]).cpu() for times in (1, 5)]
        errors = [(fill - faces)[..., top:bottom, left:right].square().mean() for fill in fills]
        rows.append([name, *(f"{127.5 * float(error) ** 0.5:.1f}" for error in errors)])
    say(table(["hole", "nearest face", "resample 1", "resample 5"], rows) + "\n")


def change(edit: Callable, faces: torch.Tensor, noise: torch.Tensor, judge: Classifier) -> None:
    """Print the table of changes. noise: from which the faces are generated."""
    had, rows = judge(faces) > 0, []
    ways = {f"strength {s}": dict(loop=edit_loop, image=faces, strength=s) for s in (0.6, 0.8)}
    ways["inversion"] = dict(x_T=noise)
    for name, options in ways.items():
        has, stayed = [], []
        for column, asked in enumerate(torch.eye(had.shape[1])):
            changed = edit(guidance=3.0, attributes=asked[None], **options)
            now, lacked = judge(torch.cat([*changed]).float().cpu()) > 0, ~had[:, column]
            has.append(now[lacked, column])
            stayed.append((now == had)[lacked][:, asked == 0].flatten())
        rows.append([name, *(f"{torch.cat(part).float().mean():.1%}" for part in (has, stayed))])
    say(table(["changed by", "has it", "others stayed"], rows))


def main() -> None:
    """The command line: EditingConfig's flags."""
    config = flags.parse(EditingConfig, sys.argv[1:], "How well does it repair and change faces?")
    flags.check_ranges(config)
    trained = add_guide(load_trained(config.checkpoint or None))
    data = faces_of(trained, config.path_to_data)
    parts = data.held_out[: config.num_images], data.train
    faces, known = (to_x_0(torch.from_numpy(data.images[part])) for part in parts)
    true, learned = (torch.from_numpy(data.attributes[part]) > 0 for part in parts)
    say(f"{trained.path}, {len(faces)} faces\n{machine(trained.diffusion.device)}\n")
    edit = partial(generate, trained, range(len(faces)), steps=config.steps)
    repair(edit, faces, known)
    judge = learn(known, learned.float())
    change(edit, faces, encode(trained, faces, config.steps), judge)
    say(f"\nthe classifier is right about {((judge(faces) > 0) == true).float().mean():.1%}")


if __name__ == "__main__":
    flags.run(main)
