"""Data sets by name: torchvision's, the Hugging Face Hub's, and local folders of parquet files.

Each is a `Files` whose images are read by their number. Classes become attributes.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset import celeba
from dataset.folders import Files
from system.errors import DataError, UsageError
from system.terminal import say

# The class in torchvision.datasets, the parts to train on, the parts to hold out. Of the flowers
# the smallest part is held out: the official one would leave 1,020 of 8,189 to train on.
TORCHVISION: dict[str, tuple[str, list[dict], list[dict]]] = {
    "cifar10": ("CIFAR10", [{"train": True}], [{"train": False}]),
    "mnist": ("MNIST", [{"train": True}], [{"train": False}]),
    "fashion_mnist": ("FashionMNIST", [{"train": True}], [{"train": False}]),
    "svhn": ("SVHN", [{"split": "train"}], [{"split": "test"}]),
    "flowers102": ("Flowers102", [{"split": "train"}, {"split": "test"}], [{"split": "val"}]),
    "stl10": ("STL10", [{"split": "train+unlabeled"}], [{"split": "test"}]),
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
        parts = [_open_part(kind, folder, options) for options in (*trained, *held_out)]
    except ModuleNotFoundError as error:
        fix = f"python -m pip install {error.name}"
        raise UsageError("--path_to_data", f"{name} needs the package {error.name}", fix) from error
    except Exception as error:  # torchvision, the network and damaged files raise nearly anything
        what = f"{name} could not be downloaded or read ({' '.join(str(error).split())[:200]})"
        raise DataError(folder, what, "check the network, or remove this folder") from error
    starts = np.cumsum([0, *map(len, parts)])

    def read(name: str) -> Any:
        part = np.searchsorted(starts, int(name), side="right") - 1
        return parts[part][int(name) - starts[part]][0]

    labels = np.concatenate([_labels(part) for part in parts]).astype(np.int64)
    # MNIST's are "7 - seven"; in a flag, spaces would need quotes.
    titles = getattr(parts[0], "classes", None) or range(labels.max() + 1)
    classes = [str(title).split(" - ")[0].replace(" ", "_") for title in titles]
    count, listing = int(starts[-1]), repr([name, _list_folder(folder)])
    split = np.arange(count) >= starts[len(trained)]
    names = [str(number) for number in range(count)]
    return Files(folder, names, read, listing, classes=classes, labels=labels, held_out=split)


def _open_part(kind: str, folder: Path, options: dict) -> Any:
    """One part of a data set of torchvision's, downloaded if it is not there."""
    from torchvision import datasets  # takes a second to import, which only these should cost

    make = getattr(datasets, kind)
    try:
        return make(folder, download=False, **options)
    except RuntimeError:  # "Dataset not found or corrupted", before anything is read
        say(f"{folder}: downloading {kind}")
        return make(folder, download=True, **options)


def _labels(part: Any) -> np.ndarray:
    """The class of each image of a data set of torchvision's: (N,); -1: not known."""
    names = ("targets", "labels", "_labels")
    return np.asarray(next(getattr(part, name) for name in names if hasattr(part, name)))


def _list_folder(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each file below a folder."""
    paths = [Path(base, name) for base, _, names in os.walk(folder) for name in names]
    files = [(str(path.relative_to(folder)), path.stat()) for path in sorted(paths)]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in files]


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
        fix = "python -m pip install datasets"
        raise UsageError("--path_to_data", f"{path} needs the package datasets", fix) from error
    name = path.removeprefix(HUB)
    if path != name:
        say(f"{path}: kept in {datasets.config.HF_DATASETS_CACHE}")
    try:
        splits = dict(datasets.load_dataset(name))
    except Exception as error:  # the library and the network raise nearly anything
        what = f"cannot be loaded ({' '.join(str(error).split())[:200]})"
        raise DataError(path, what, "check the name and the network") from error
    splits = dict(sorted(splits.items(), key=lambda split: split[0] in HELD_OUT))
    features = next(iter(splits.values())).features
    column = next((name for name, kind in features.items() if _holds_images(kind)), None)
    if column is None:
        raise DataError(
            path, f"has no column of images, only {', '.join(features)}", "choose another"
        )
    undecoded = datasets.Image(decode=False)
    images = [
        split.select_columns(column).cast_column(column, undecoded) for split in splits.values()
    ]
    data = datasets.concatenate_datasets(images)

    def read(name: str) -> bytes:
        cell = data[int(name)][column]
        return cell["bytes"] or Path(cell["path"]).read_bytes()

    trained = sum(len(split) for kind, split in splits.items() if kind not in HELD_OUT)
    held_out = np.arange(len(data)) >= trained if 0 < trained < len(data) else None
    classes, labels = _hub_classes(features, list(splits.values()))
    listing = repr([(kind, len(split), split._fingerprint) for kind, split in splits.items()])
    names = [str(number) for number in range(len(data))]
    about = dict(classes=classes, labels=labels, held_out=held_out)
    return Files(Path(path), names, read, listing, **about)


def _holds_images(kind: Any) -> bool:
    """Whether a column is one of images: so declared, or the bytes of files."""
    binary = getattr(kind, "dtype", "") in ("binary", "large_binary")
    return type(kind).__name__ == "Image" or binary or isinstance(kind, dict) and "bytes" in kind


def _hub_classes(features: Any, splits: Sequence[Any]) -> tuple[list[str], np.ndarray | None]:
    """The names of the classes, and the class of each image; none without a column of labels."""
    declared = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    column = next(iter([*declared, *(name for name in LABELS if name in features)]), None)
    if column is None:
        return [], None
    values = np.concatenate([np.asarray(split[column][:]) for split in splits])
    if declared:
        return [name.replace(" ", "_") for name in features[column].names], values
    classes, labels = np.unique(values, return_inverse=True)
    return [str(title).replace(" ", "_") for title in classes], labels
