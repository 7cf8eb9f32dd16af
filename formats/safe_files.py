"""JSON and safetensors files that may come from strangers: they are read without running code, and
checked before memory is used."""

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from system.errors import CheckpointError
from system.files import write_atomically

MAX_JSON = 1 << 20  # bytes


def save_weights(path: Path, weights: dict[str, Tensor], half: bool) -> None:
    """Write tensors as safetensors, in float16 or float32. Raises ResourceError."""
    dtype = torch.float16 if half else torch.float32
    weights = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()
    }
    size = sum(tensor.nbytes for tensor in weights.values())
    data = save(weights, {"format": "pt"})  # diffusers refuses a file without this
    write_atomically(path, lambda temporary: temporary.write_bytes(data), size)


def read_json(path: Path) -> dict:
    """Read the object in a small JSON file. Raises CheckpointError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_JSON:  # a pipe never ends
            raise ValueError(f"no file, or one of {status.st_size:,} bytes")
        values = json.loads(path.read_text("utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it has no settings")
        return values
    except FileNotFoundError as error:
        raise CheckpointError(path, "does not exist", "copy the whole folder") from error
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise CheckpointError(path, what, "check the disk") from error
    except (ValueError, RecursionError) as error:
        what = f"is damaged ({str(error)[:200]})"
        raise CheckpointError(path, what, "copy the folder again from its source") from error


def within(value: object, least: float, most: float) -> bool:
    """Whether it is a number in these bounds, a whole one if they are whole."""
    return type(value) in {int, type(most)} and least <= value <= most


def refuse(path: Path, config: dict, name: str, known: str) -> None:
    """Raise CheckpointError for the setting `name`; known: what it may be."""
    what = f"{name} is {str(config.get(name))[:100]}, only {known} can be read"
    raise CheckpointError(path, what, "take another model")


def load_weights(
    path: Path, shapes: dict[str, tuple[int, ...]], rename: Callable[[str], str] = str
) -> dict[str, Tensor]:
    """Read tensors of exactly these names and shapes, as float32. Names and shapes are compared
    before the tensors are read.

    rename: from a name in the file, without the prefixes of `plain_keys`, to one in `shapes`.
    Raises CheckpointError for a file that is missing, a pickle or damaged, and for other
    tensors."""
    if path.suffix == ".bin":
        what, fix = "is a pickle, which may run code when it is read", "save it as safetensors"
        raise CheckpointError(path, what, fix)
    if not path.is_file():
        raise CheckpointError(path, "does not exist", "copy the whole folder")
    try:
        with safe_open(path, framework="pt") as file:
            names = plain_keys({name: name for name in file.keys()})
            names = {rename(plain): name for plain, name in names.items()}
            found = {new: tuple(file.get_slice(n).get_shape()) for new, n in names.items()}
            if misfits := sorted(found.items() ^ shapes.items()):
                name = misfits[0][0]
                what = f"its {name} is {found.get(name, 'missing')}, "
                what += f"by config.json it is {shapes.get(name, 'absent')}"
                raise CheckpointError(path, what, "take weights and config.json of one model")
            weights = {new: file.get_tensor(name).float() for new, name in names.items()}
    except (OSError, SafetensorError) as error:
        what = f"is damaged or cannot be read ({str(error)[:200]})"
        raise CheckpointError(path, what, "copy the folder again from its source") from error
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(path, f"its {name} is not finite", "take other weights")
    return weights


def plain_keys(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the prefixes that DistributedDataParallel and torch.compile add."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in weights.items()}
