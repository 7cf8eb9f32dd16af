"""Checkpoints: saved, checked, found, pruned. Images: tensors to and from pixels, grids, files.

A checkpoint is a file of `torch.save` with a SHA-256 of its contents at its end, so that one
flipped bit is noticed (`torch.load` notices none). It is written under a temporary name, synced,
read back, and only then renamed: the newest good checkpoint always survives.
"""

import contextlib
import hashlib
import io
import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from system.errors import (
    CheckpointError,
    DivergedError,
    FormatError,
    is_out_of_memory,
)
from system.files import sync, write_atomically
from system.terminal import warn

CHECKPOINT_FORMAT = 2
PARTS = {"step": int, "settings": dict, "unet": dict, "diffusion": dict, "history": list}
_DIGEST = b"sha256:"  # begins the archive's comment, its last bytes
_COMMENT_BYTES = len(_DIGEST) + 64


# Checkpoints -------------------------------------------------------------------------------------


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where a run's folder keeps the checkpoint of a step."""
    return folder / "checkpoints" / f"step_{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, newest first, by the step in their names."""
    found = (folder / "checkpoints").glob("step_*.pt")
    steps = {int(p.stem[5:]): p for p in found if re.fullmatch(r"step_\d+", p.stem)}
    return [steps[step] for step in sorted(steps, reverse=True)]


def tensors_in(state: object, name: str = "") -> Iterable[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries and lists, with its dotted name."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            yield from tensors_in(value, f"{name}.{i}")


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint that is whole or not there.

    state: nested dictionaries of tensors and plain values. Raises DivergedError where a number in
    it is not finite, ResourceError where the disk refuses, CheckpointError where the file would not
    load again; in each case the files already there are as they were."""
    for name, tensor in tensors_in(state):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            fix = "--resume from the last checkpoint in --mixed_precision bf16"
            raise DivergedError(name, "is not finite, so nothing was saved", fix)
    path = Path(path)

    def write(temporary: Path) -> None:
        """Write, sync and read back."""
        try:
            torch.save({"format": CHECKPOINT_FORMAT, **state}, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error).split("\n")[0]) from error
        sign(temporary)
        with open(temporary, "rb+") as file:
            sync(file.fileno())
        try:
            load_checkpoint(temporary)
        except CheckpointError as error:
            fix = "save only tensors, numbers, strings, lists and dictionaries"
            raise CheckpointError(path, f"would not load again ({error})", fix) from error

    needed = sum(tensor.nbytes for _, tensor in tensors_in(state))
    write_atomically(path, write, needed)


def sign(path: Path) -> None:
    """Append the SHA-256 of an archive to it, as the comment the zip format allows at its end."""
    with open(path, "rb+") as file:
        file.seek(-2, io.SEEK_END)  # the comment's length, 0 as torch.save writes it
        file.write(_COMMENT_BYTES.to_bytes(2, "little"))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, io.SEEK_END)
        file.write(_DIGEST + digest.encode())


def check_signature(path: Path) -> None:
    """Raise CheckpointError unless the file is, bit for bit, one that `save_checkpoint` wrote, and
    unpacks to no more than its own size."""

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(path, what, "give another checkpoint, or the folder of the run")

    size = path.stat().st_size
    if size == 0:
        raise damaged("is empty")
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            raise damaged("is not a checkpoint")
        digest = hashlib.sha256()
        file.seek(0)
        left = max(size - _COMMENT_BYTES, 0)
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        if file.read() != _DIGEST + digest.hexdigest().encode():
            raise damaged(
                "is damaged or was not written by this program (its SHA-256 does not fit)"
            )
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or sum(member.file_size for member in members) > size:
            raise damaged("would unpack to more than its size")


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint into memory, on the CPU, checked before a byte of it is unpickled, and
    unpickled as plain weights only.

    Raises CheckpointError: no such file, a folder, damaged, of a newer format, or not weights."""
    path, fix = Path(path), "give a checkpoint that train.py saved"
    try:
        if not path.exists():
            raise CheckpointError(path, "does not exist", "check the path, or train first")
        if path.is_dir():
            raise CheckpointError(path, "is a folder", "name a file in it, step_....pt")
        check_signature(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load and zipfile raise many kinds
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError):
            what = f"cannot be read: {error.strerror}"
            raise CheckpointError(path, what, "check the disk") from error
        reason = str(error).split("\n")[0].strip()
        raise CheckpointError(path, f"cannot be loaded as plain weights ({reason})", fix) from error
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise CheckpointError(path, "is not a checkpoint", fix)
    if state["format"] != CHECKPOINT_FORMAT:
        newer = state["format"] > CHECKPOINT_FORMAT
        what = f"has format {state['format']}, this program reads format {CHECKPOINT_FORMAT}"
        fix = "upgrade the program" if newer else "use the version of the program that wrote it"
        raise FormatError(path, what, fix)
    for name, kind in PARTS.items():
        part = state.get(name, kind())
        if not isinstance(part, kind) or name == "step" and part < 0:
            raise CheckpointError(path, f"{name} is {str(part)[:80]}", fix)
    return state


def load_newest_checkpoint(folder: Path, set_aside: bool = False) -> tuple[Path, dict] | None:
    """The newest good checkpoint of a run, or None where it has none at all. Damaged ones are named
    on stderr and the one before them is taken; raises CheckpointError where all are damaged.

    set_aside: rename those, which are newer than what is gone on from, to *.damaged."""
    damaged = []
    for path in list_checkpoints(folder):
        try:
            state = load_checkpoint(path)
        except CheckpointError as error:
            if isinstance(error, FormatError):  # sound: no older one may take its place
                raise
            damaged.append((path, error))
            continue
        for worse, error in damaged:
            warn(f"{error}; taking {path.name}")
            with contextlib.suppress(OSError):
                if set_aside:
                    worse.rename(worse.with_name(f"{worse.name}.damaged"))
        return path, state
    if damaged:
        raise damaged[-1][1]
    return None


def find_guide(folder: Path, num_training_steps: int) -> Path | None:
    """The checkpoint that guides a run's images (`generate.add_guide`): the first that was saved
    after a fifth of the steps."""
    paths = list_checkpoints(folder)
    late = [path for path in paths if int(path.stem[5:]) * 5 >= num_training_steps]
    return late[-1] if late else None


def prune_checkpoints(newest: Path, keep: int, num_training_steps: int) -> None:
    """Remove all but `keep` checkpoints, `newest`, the one just saved, and those before it, and the
    one that guides. Files of later steps are not of this run."""
    folder = newest.parent.parent
    paths, guide = list_checkpoints(folder), find_guide(folder, num_training_steps)
    for path in paths[paths.index(newest) :][keep:]:
        if path == guide:
            continue
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            warn(f"{path} cannot be removed ({error.strerror}); the training goes on")


@contextlib.contextmanager
def reading(path: Path, fix: str) -> Iterator[None]:
    """Turn what is missing or does not fit in a checkpoint's contents into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(path, f"lacks {error}", fix) from error
    except Exception as error:  # whatever stands in place of arguments and weights
        if is_out_of_memory(error):
            raise
        what = f"does not fit ({' '.join(str(error).split())[:300]})"
        raise CheckpointError(path, what, fix) from error


# Images -------------------------------------------------------------------------------------------


def to_x_0(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [-1, 1]."""
    pixels = pixels.permute(0, 3, 1, 2)
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [-1, 1] to (..., H, W, 3) uint8 in 0 ... 255, on the CPU."""
    pixels = (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return pixels.movedim(-3, -1).contiguous().cpu()


def image_grid(images: Tensor, columns: int = 0, labels: Sequence[str] = ()) -> Image.Image:
    """One image of many. images: (N, 3, H, W) in [-1, 1]; columns: 0 for as square as can be;
    labels: a text for each row, to the left of it, which makes the grid a sheet."""
    root = math.ceil(math.sqrt(len(images)))
    full = [count for count in range(root, 2 * root) if len(images) % count == 0]
    columns = columns or (full or [root])[0]  # without empty cells, if that is not too wide
    cells = to_uint8(images).movedim(-1, -3)
    grid = make_grid(cells, nrow=columns, padding=2, pad_value=255)
    grid = Image.fromarray(grid.permute(1, 2, 0).numpy())
    if not labels:
        return grid
    height = images.shape[-2] + 2
    font = ImageFont.load_default(size=max(9, min(16, height // 3)))
    labels = [label.replace(" ", "  ") for label in labels]  # the font's space is narrow
    margin = 8 + math.ceil(max(font.getlength(label) for label in labels))
    sheet = Image.new("RGB", (margin + grid.width, grid.height), "white")
    sheet.paste(grid, (margin, 0))
    canvas = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels):
        canvas.text((margin - 4, (row + 0.5) * height), label, "black", font, anchor="rm")
    return sheet


def save_image(image: Image.Image, path: Path, **options) -> None:
    """Save an image in the format of its suffix, whole or not at all."""
    format = Image.registered_extensions()[path.suffix.lower()]
    write_atomically(path, lambda temporary: image.save(temporary, format=format, **options))
