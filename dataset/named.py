"""Data sets by name: torchvision's, the Hugging Face Hub's, and local folders of parquet files.

Each is a `Files` whose images are read by their number. Classes become attributes.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset import celeba
from dataset.folders import Files
from system.errors import DataError, UsageError
from system.terminal import say

# The class in torchvision.datasets, the parts to train on, the part to hold out. Of the flowers
# the smallest part is held out: the official one would leave 1,020 of 8,189 to train on.
TORCHVISION: dict[str, tuple[str, list[dict], dict]] = {
    "cifar10": ("CIFAR10", [{"train": True}], {"train": False}),
    "mnist": ("MNIST", [{"train": True}], {"train": False}),
    "fashion_mnist": ("FashionMNIST", [{"train": True}], {"train": False}),
    "svhn": ("SVHN", [{"split": "train"}], {"split": "test"}),
    "flowers102": ("Flowers102", [{"split": "train"}, {"split": "test"}], {"split": "val"}),
    "stl10": ("STL10", [{"split": "train+unlabeled"}], {"split": "test"}),
}
HUB = "hf:"
HELD_OUT = ("test", "valid", "val", "validation")
LABELS = ("label", "labels", "class", "target", "fine_label", "y")


def open_torchvision(name: str) -> Files:
    """Return one of the data sets of TORCHVISION, downloaded into data/<name> if it is not there.

    Raises UsageError if a package is missing, DataError if the download fails."""
    kind, trained, held_out = TORCHVISION[name]
    folder = celeba.FOLDER / name
    try:
        parts = [_open_part(kind, folder, options) for options in (*trained, held_out)]
    except ModuleNotFoundError as error:
        raise _missing(name, error.name) from error
    except Exception as error:  # torchvision, the network and damaged files raise nearly anything
        what = f"{name} could not be downloaded or read ({' '.join(str(error).split())[:200]})"
        raise DataError(folder, what, "check the network, or remove this folder") from error
    fields = ("targets", "labels", "_labels")  # -1: not known
    labels = [next(getattr(part, x) for x in fields if hasattr(part, x)) for part in parts]
    labels = np.concatenate([np.asarray(each) for each in labels]).astype(np.int64)
    titles = getattr(parts[0], "classes", None) or range(labels.max() + 1)
    titles = [str(title).split(" - ")[0] for title in titles]  # MNIST's are "7 - seven"
    paths = [Path(base, file) for base, _, files in os.walk(folder) for file in files]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]
    first = len(labels) - len(parts[-1])
    return _number(folder, parts, lambda part, i: part[i][0], first, stats, (titles, labels))


def _open_part(kind: str, folder: Path, options: dict) -> Any:
    """One part of a data set of torchvision's, downloaded if it is not there."""
    from torchvision import datasets  # takes a second to import, which only these should cost

    make = getattr(datasets, kind)
    try:
        return make(folder, download=False, **options)
    except RuntimeError:  # "Dataset not found or corrupted", before anything is read
        say(f"{folder}: downloading {kind}")
        return make(folder, download=True, **options)


def _missing(name: str, package: str | None) -> UsageError:
    fix = f"python -m pip install {package}"
    return UsageError("--path_to_data", f"{name} needs the package {package}", fix)


def _number(
    where: Path, parts: Sequence, get: Callable, trained: int, listing: object, classes: tuple
) -> Files:
    """The files 0, 1, ... of all parts one after another, of which the first are trained on.

    get: an image of a part; classes: their names and the labels."""
    starts = np.cumsum([0, *map(len, parts)])
    numbers = np.arange(starts[-1])

    def read(name: str) -> Any:
        part = np.searchsorted(starts, int(name), side="right") - 1
        return get(parts[part], int(name) - int(starts[part]))

    held_out = numbers >= trained if 0 < trained < len(numbers) else None
    about = dict(classes=classes[0], labels=classes[1], held_out=held_out)
    return Files(where, [str(number) for number in numbers], read, repr(listing), **about)


# ---- The Hub, and parquet files ----


def is_parquet(files: Files) -> bool:
    """Whether parquet files are all that a folder holds."""
    found = any(name.endswith(".parquet") for name in files.others)
    return found and not files.names and os.path.isdir(files.where)


def open_hub(path: str) -> Files:
    """Return the images of "hf:owner/name", or of a folder of parquet files, with its column of
    labels as classes. The splits test and validation are held out.

    Raises UsageError if the package `datasets` is missing, DataError if there are no images."""
    try:
        import datasets
    except ImportError as error:
        raise _missing(path, "datasets") from error
    if path.startswith(HUB):
        say(f"{path}: kept in {datasets.config.HF_DATASETS_CACHE}")
    try:
        splits = datasets.load_dataset(path.removeprefix(HUB))
    except Exception as error:  # the library and the network raise nearly anything
        what = f"cannot be loaded ({' '.join(str(error).split())[:200]})"
        raise DataError(path, what, "check the name and the network") from error
    parts = sorted(splits.items(), key=lambda split: split[0] in HELD_OUT)  # these last
    trained = sum(len(part) for name, part in parts if name not in HELD_OUT)
    listing, parts = (
        [(name, part._fingerprint) for name, part in parts],
        [part for _, part in parts],
    )
    features = parts[0].features
    column = next((name for name, kind in features.items() if _holds_images(kind)), None)
    if column is None:
        what = f"has no column of images, only {', '.join(features)}"
        raise DataError(path, what, "choose another")
    encoded = datasets.Image(decode=False)  # as the bytes of a file
    images = [part.select_columns(column).cast_column(column, encoded) for part in parts]

    def get(part: Any, number: int) -> bytes:
        cell = part[number][column]
        return cell["bytes"] or Path(cell["path"]).read_bytes()

    return _number(Path(path), images, get, trained, listing, _find_labels(parts))


def _holds_images(kind: Any) -> bool:
    """Whether a column is one of images: so declared, or the bytes of files."""
    binary = getattr(kind, "dtype", "") in ("binary", "large_binary")
    return type(kind).__name__ == "Image" or binary or isinstance(kind, dict) and "bytes" in kind


def _find_labels(parts: Sequence[Any]) -> tuple[list[str], np.ndarray | None]:
    """The names of the classes, and the class of each image; none without a column of labels."""
    features = parts[0].features
    declared = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    column = next(iter([*declared, *(name for name in LABELS if name in features)]), None)
    if column is None or any(column not in part.features for part in parts):
        return [], None
    values = np.concatenate([np.asarray(part[column][:]) for part in parts])
    titles, labels = np.unique(values, return_inverse=True)
    if declared:
        titles, labels = features[column].names, values
    return [str(title) for title in titles], labels
