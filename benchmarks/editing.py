"""How well a network repairs, varies and finds again the faces that were kept from its training.

    python benchmarks/editing.py --checkpoint celeba_32 --path_to_data celeba

Distances are root mean squares over pixels and colours, in grey levels of 0 ... 255. A repair is
measured in its hole, beside two fills: by the mean colour of what is known of the face, and by the
training face that is nearest in what is known. Prints the tables, and saves a sheet of examples."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine
from dataset.faces import Faces, load_faces
from editing import encode
from generate import Trained, generate, load_trained
from system import flags
from system.device import keep_freed_memory
from system.errors import DataError
from system.files import check_writable
from system.flags import check_ranges, constant
from system.terminal import say, table
from utils import image_grid, save_image, to_x_0

NUM_SHOWN = 6  # faces in a row of the sheet

# What is generated: top, bottom, left, right, in shares of the image's side.
HOLES = {
    "right half": (0, 1, 0.5, 1),
    "eyes": (0.25, 0.5, 0.1, 0.9),
    "middle": (0.3, 0.7, 0.3, 0.7),
}


@dataclass(frozen=True)
class EditingConfig:
    """What to measure, and how."""

    checkpoint: str = "celeba_32"  # as for sample.py
    path_to_data: str = "data"  # the faces it was trained on, as for train.py
    num_images: int = constant(200, least=1)  # held-out faces
    steps: int = constant(20, least=1)  # of the default sampler, for repairs and variations
    resample: tuple[int, ...] = constant((1, 5), least=1)  # of repairs, each in turn
    strengths: tuple[float, ...] = constant((0.2, 0.4, 0.6, 0.8, 1.0), least=0, most=1)  # each
    encode_steps: tuple[int, ...] = constant((20, 50, 250), least=2)  # there and back, each
    out: str = "editing.png"  # the sheet of examples


def distance(images: Tensor, others: Tensor, mask: Tensor | None = None) -> str:
    """The root mean square over all images, in grey levels; mask: where it is looked at."""
    squares = (images - others).square().mean(dim=1, keepdim=True)
    mask = torch.ones_like(squares) if mask is None else mask.expand_as(squares).float()
    return f"{127.5 * float((squares * mask).sum() / mask.sum()) ** 0.5:.1f}"


def hole_mask(name: str, size: int) -> Tensor:
    """(1, 1, size, size) bool, True in one of HOLES."""
    top, bottom, left, right = (round(share * size) for share in HOLES[name])
    mask = torch.zeros(1, 1, size, size, dtype=torch.bool)
    mask[..., top:bottom, left:right] = True
    return mask


def fill_with_mean(faces: Tensor, mask: Tensor) -> Tensor:
    """Each face, the mean colour of what is known of it in the hole."""
    mean = (faces * ~mask).sum(dim=(2, 3), keepdim=True) / (~mask).sum()
    return torch.where(mask, mean, faces)


def fill_with_nearest(faces: Tensor, mask: Tensor, others: Tensor) -> Tensor:
    """Each face, in the hole the one of the others that is nearest in what is known."""
    nearest = torch.cdist((faces * ~mask).flatten(1), (others * ~mask).flatten(1)).argmin(dim=1)
    return torch.where(mask, others[nearest], faces)


def all_of(trained: Trained, faces: Tensor, **options) -> Tensor:
    """One image for each face."""
    return torch.cat(list(generate(trained, range(len(faces)), **options))).cpu()


def measure_repair(config: EditingConfig, trained: Trained, faces: Tensor, others: Tensor):
    """The table of repairs, and rows for the sheet."""
    rows, shown = [], {}
    for name in HOLES:
        mask = hole_mask(name, trained.img_size)
        fills = [fill_with_mean(faces, mask), fill_with_nearest(faces, mask, others)]
        for times in config.resample:
            options = dict(image=faces, mask=mask, steps=config.steps, resample=times)
            fills.append(all_of(trained, faces, **options))
        rows.append([name, *(distance(fill, faces, mask) for fill in fills)])
        shown[name] = torch.where(mask, torch.ones(()), faces)
        shown[f"{name}, generated"] = fills[-1]
    heads = [f"repaired, resample {times}" for times in config.resample]
    say(table(["hole", "mean colour", "nearest face", *heads], rows))
    return shown


def measure_variation(config: EditingConfig, trained: Trained, faces: Tensor):
    """The table of strengths, and rows for the sheet."""
    varied = {
        f"strength {strength:g}": all_of(
            trained, faces, image=faces, strength=strength, steps=config.steps
        )
        for strength in config.strengths
    }
    rows = [["distance", *(distance(images, faces) for images in varied.values())]]
    say("\n" + table(["", *varied], rows))
    return varied


def measure_encoding(config: EditingConfig, trained: Trained, faces: Tensor) -> None:
    """The table of faces encoded and generated again."""
    row = ["distance"]
    for steps in config.encode_steps:
        noise = encode(trained, faces, steps)
        row.append(distance(all_of(trained, faces, x_T=noise, steps=steps), faces))
    say("\n" + table(["encoded and back", *(f"{n} steps" for n in config.encode_steps)], [row]))


def held_out(config: EditingConfig, trained: Trained, faces: Faces) -> Tensor:
    """The first held-out faces, (num_images, C, H, W). Raises DataError of too few."""
    if len(faces.held_out) < config.num_images:
        what = f"{config.num_images} is more than the {len(faces.held_out)} held-out faces"
        raise DataError("--num_images", what, "lower it")
    images = torch.from_numpy(faces.images[faces.held_out[: config.num_images]])
    return to_x_0(images, trained.image_channels)


def main() -> None:
    """Print the tables."""
    config = flags.parse(EditingConfig, sys.argv[1:], "How well does it repair and vary faces?")
    check_ranges(config)
    check_writable(Path(config.out), "--out")
    keep_freed_memory()
    trained = load_trained(config.checkpoint or None)
    grey = trained.settings.get("grey", False)
    data = load_faces(config.path_to_data, trained.img_size, trained.settings["only"], grey=grey)
    faces = held_out(config, trained, data)
    others = to_x_0(torch.from_numpy(data.images[data.train]), trained.image_channels)
    say(f"{trained.path}, {len(faces)} held-out faces\n{machine(trained.diffusion.device)}\n")
    shown = {"held-out face": faces} | measure_repair(config, trained, faces, others)
    shown |= measure_variation(config, trained, faces)
    measure_encoding(config, trained, faces)
    cells = torch.cat([images[:NUM_SHOWN] for images in shown.values()])
    save_image(image_grid(cells, min(NUM_SHOWN, len(faces)), list(shown)), Path(config.out))


if __name__ == "__main__":
    flags.run(main)
