"""JSON and safetensors, which may come from strangers: read without running code, and checked
before memory is taken."""

import json
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from system.errors import CheckpointError
from system.files import write_atomically

MAX_JSON = 1 << 20  # bytes of a JSON file; a header may have 16 times as many
DTYPES = ("F16", "BF16", "F32", "F64")


def save_weights(path: Path, weights: dict[str, Tensor], half: bool) -> None:
    """Write tensors as safetensors, in float16 or float32."""
    dtype = torch.float16 if half else torch.float32
    weights = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()
    }
    size = sum(tensor.nbytes for tensor in weights.values())
    metadata = {"format": "pt"}  # diffusers refuses a file without it

    def write(temporary: Path) -> None:
        try:
            save_file(weights, temporary, metadata)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from error

    write_atomically(path, write, size)


def read_json(path: Path) -> dict:
    """Read a small JSON file. Raises CheckpointError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_JSON:  # a pipe never ends
            raise ValueError(f"no file, or one of {status.st_size:,} bytes")
        values = json.loads(path.read_text("utf-8"))
        if not isinstance(values, dict):
            raise ValueError("holds no settings")
        return values
    except FileNotFoundError as error:
        raise CheckpointError(path, "does not exist", "take the whole folder") from error
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be read: {error.strerror}", "check the disk"
        ) from error
    except (ValueError, RecursionError) as error:
        what = f"is damaged ({str(error)[:200]})"
        raise CheckpointError(path, what, "take the folder anew from where it came") from error


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """The name and the shape of each tensor in a file of safetensors, from its header alone."""
    with open(path, "rb") as file:
        size = path.stat().st_size
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if length > min(size - 8, 16 * MAX_JSON):
            raise ValueError(f"its header has {length:,} bytes, the file {size:,}")
        header = json.loads(file.read(length))
    shapes = {}
    for name, about in header.items():
        if name != "__metadata__":
            if about["dtype"] not in DTYPES:
                raise ValueError(f"{name} is of type {about['dtype']}")
            shapes[name] = tuple(about["shape"])
    return shapes


def load_weights(
    path: Path, shapes: dict[str, tuple[int, ...]], rename: Callable[[str], str] = str
) -> dict[str, Tensor]:
    """Read tensors of exactly these names and shapes, as float32; memory is taken when all fit.

    rename: what a name in the file means. Raises CheckpointError where the file is missing, a
    pickle, damaged, or holds anything else."""
    if not path.is_file():
        if path.with_suffix(".bin").is_file():
            what = "is a pickle, which may run code when it is read"
            fix = "load it by diffusers and save it with safe_serialization=True"
            raise CheckpointError(path.with_suffix(".bin"), what, fix)
        raise CheckpointError(path, "does not exist", "take the whole folder")
    try:
        header = read_header(path)
        names = {rename(name): name for name in header}
        misfit = difference(shapes, {new: header[name] for new, name in names.items()})
        if not misfit:
            with safetensors.safe_open(path, framework="pt") as file:
                weights = {new: file.get_tensor(name).float() for new, name in names.items()}
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(path, f"cannot be read: {reason}", "check the disk") from error
    except (
        AttributeError,
        KeyError,
        RecursionError,
        TypeError,
        ValueError,
        SafetensorError,
    ) as error:
        fix = "take the folder anew from where it came"
        raise CheckpointError(path, f"is damaged ({str(error)[:200]})", fix) from error
    if misfit:
        raise CheckpointError(
            path, f"does not fit its configuration: {misfit}", "take another model"
        )
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(path, f"{name} is not finite", "take other weights")
    return weights


def difference(wanted: dict[str, tuple], found: dict[str, tuple]) -> str:
    """In a few words, how the names and shapes found differ from those wanted; "" where not."""
    lacks = [f"lacks {name}" for name in wanted if name not in found]
    holds = [f"holds {name}" for name in found if name not in wanted]
    shapes = [
        f"{name} has the shape {found[name]}, not {wanted[name]}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    all_of_them = [*lacks, *holds, *shapes]
    more = f" and {len(all_of_them) - 1} more" if len(all_of_them) > 1 else ""
    return all_of_them[0][:200] + more if all_of_them else ""
