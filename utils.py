"""What a run leaves on disk: files that are whole or not there, checkpoints, pictures.

A checkpoint is a file of `torch.save` whose end names the SHA-256 of all before it, so that one
flipped bit is noticed (`torch.load` notices none). It is written aside, synced, read back, and only
then given its name: whatever happens, the newest good one stays.
"""

import contextlib
import ctypes
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from errors import CheckpointError, DivergedError, ResourceError

CHECKPOINT_FORMAT = 1
_DIGEST = b"sha256:"  # begins the archive's comment, its last bytes
_COMMENT_BYTES = len(_DIGEST) + 64


def seed_of(*numbers: int) -> int:
    """One seed, below 2**63, from several numbers: any of them changed gives an unrelated seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that are freed, for the next use. As it is, each tensor
    of a step is given back to the system and handed out anew page by page, a tenth of a CPU's
    step."""
    with contextlib.suppress(OSError, AttributeError):  # another system or C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def autocast_dtype(mixed_precision: str, device: torch.device) -> torch.dtype | None:
    """The half precision to compute in, or None for float32.

    mixed_precision: "fp16", "bf16" or "no". A CPU takes bf16 for either where it has the
    instructions for it, and else float32."""
    if mixed_precision == "no":
        return None
    if device.type == "cuda":
        return torch.float16 if mixed_precision == "fp16" else torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


# Files -------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], None], needed: int = 0) -> None:
    """Let `write` fill a file beside `path`, then give it that name: readers see all of it or none.

    needed: bytes, for the error. Raises ResourceError where the disk refuses."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(path, error, needed) from error
    finally:
        aside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a renaming in the folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_error(path: Path, error: OSError, needed: int = 0) -> ResourceError:
    """The line for a disk that refuses a write of `needed` bytes."""
    size = f" ({needed:,} bytes needed)" if needed else ""
    reason = error.strerror or str(error)
    return ResourceError(path, f"cannot be written{size}: {reason}", "free or choose another disk")


def save_json(path: Path, values: dict) -> None:
    """Write a dictionary as indented JSON."""
    write_atomically(path, lambda aside: aside.write_text(json.dumps(values, indent=2) + "\n"))


def free_bytes(folder: Path) -> int:
    """What the folder's disk can still take."""
    return shutil.disk_usage(folder).free


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left half written. Only for the run that holds the folder's lock."""
    for aside in folder.glob(".*.tmp"):
        aside.unlink(missing_ok=True)


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

    def write(aside: Path) -> None:
        """Write, sync and read back."""
        try:
            torch.save({"format": CHECKPOINT_FORMAT, **state}, aside)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error).split("\n")[0]) from error
        sign(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        try:
            load_checkpoint(aside)
        except CheckpointError as error:
            fix = "save only tensors, numbers, strings, lists and dictionaries"
            raise CheckpointError(path, f"would not load again ({error})", fix) from error

    needed = sum(tensor.nbytes for _, tensor in tensors_in(state))
    write_atomically(path, write, needed)


def sign(path: Path) -> None:
    """Append the SHA-256 of an archive to it, as the comment that the zip format allows at its
    end."""
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
    path = Path(path)
    if not path.exists():
        raise CheckpointError(path, "does not exist", "check the path, or train first")
    if path.is_dir():
        raise CheckpointError(path, "is a folder", "name a file in it, step_....pt")
    try:
        check_signature(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be read: {error.strerror}", "check the disk"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # torch.load and zipfile raise many kinds
        reason = str(error).split("\n")[0].strip()
        fix = "give a checkpoint that train.py saved"
        raise CheckpointError(path, f"cannot be loaded as plain weights ({reason})", fix) from error
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise CheckpointError(path, "is not a checkpoint", "give one that train.py saved")
    if state["format"] > CHECKPOINT_FORMAT:
        what = f"has format {state['format']}, this program reads up to {CHECKPOINT_FORMAT}"
        raise CheckpointError(path, what, "upgrade the program")
    return state


def load_newest_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """The newest good checkpoint of a run, or None where it has none at all. A damaged one is named
    on stderr and the one before it taken; raises CheckpointError where all are damaged."""
    paths = list_checkpoints(folder)
    for i, path in enumerate(paths):
        try:
            return path, load_checkpoint(path)
        except CheckpointError as error:
            if i == len(paths) - 1:
                raise
            print(f"warning: {error}; taking {paths[i + 1].name}", file=sys.stderr)
    return None


def find_checkpoint(path: str | Path | None) -> Path:
    """The file meant by a checkpoint file, a run's folder (its newest), or None (the newest run
    under the current folder). Raises CheckpointError where there is none."""
    if path is None:
        found = Path().glob("*/checkpoints/step_*.pt")
        newest = max(found, key=lambda p: (p.stat().st_mtime, p.name), default=None)
        if newest is None:
            fix = "train first, or name one"
            raise CheckpointError(
                "--checkpoint", "no */checkpoints/step_*.pt under this folder", fix
            )
        return newest
    path = Path(path)
    if not path.is_dir():
        return path
    folder = path.parent if path.name == "checkpoints" else path
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise CheckpointError(path, "holds no checkpoints/step_*.pt", "name the folder of a run")
    return checkpoints[0]


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in list_checkpoints(folder)[keep:]:
        path.unlink(missing_ok=True)


def plain_keys(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the prefixes that DistributedDataParallel and torch.compile add."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in weights.items()}


# Pictures ----------------------------------------------------------------------------------------


def to_uint8(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [-1, 1] to uint8 in 0 ... 255, on the CPU."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).cpu()


def image_grid(images: Tensor, columns: int = 0, labels: Sequence[str] = ()) -> Image.Image:
    """One picture of many. images: (N, 3, H, W) in [-1, 1]; columns: 0 for as square as can be;
    labels: a text for each row, to the left of it."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    grid = make_grid(to_uint8(images), nrow=columns, padding=2, pad_value=255)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    if not labels:
        return picture
    height = images.shape[-2] + 2
    font = ImageFont.load_default(size=max(9, min(16, height // 3)))
    labels = [label.replace(" ", "  ") for label in labels]  # its spaces are narrow
    margin = 8 + math.ceil(max(font.getlength(label) for label in labels))
    sheet = Image.new("RGB", (margin + picture.width, picture.height), "white")
    sheet.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels):
        draw.text((margin - 4, (row + 0.5) * height), label, "black", font, anchor="rm")
    return sheet


def save_image(image: Image.Image, path: Path, **options) -> None:
    """Save a picture in the format its name ends in, whole or not at all."""
    format = Image.registered_extensions()[path.suffix.lower()]
    write_atomically(path, lambda aside: image.save(aside, format=format, **options))
