"""Where images come from: a folder or an archive, CelebA, a data set by its name, or the faces
that the program draws itself.

A new source is a function that returns a `Source`, and a name for it in SOURCES.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from dataset import celeba, named, synthetic
from dataset.decoding import Crop, decode_all
from dataset.folders import SUFFIXES, Files, open_files
from system.errors import DataError, UsageError

NUM_SYNTHETIC = 20_000  # faces in the source "synthetic"
SPLIT = re.compile(r"(.*?/)??(train|training|test|testing|val|valid|validation)/", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """Images, and what is known about them."""

    where: Path | str  # the folder or archive, or the built-in name
    count: int  # number of images
    listing: str  # changes if an image changes
    images: Callable[[int, bool], Iterator[np.ndarray]]  # img_size, skip_damaged -> (n, S, S, 3)
    attribute_names: Sequence[str] = ()
    attributes: Callable[[Sequence[str]], np.ndarray] | None = None  # names -> (N, K) int8
    held_out: np.ndarray | None = None  # (N,) bool, kept from training; None: every 20th
    remark: str = ""  # what else the log should say
    crop: Crop = "square"


def synthetic_faces() -> Source:
    """The faces of synthetic.py, the data that needs no download."""
    code = Path(synthetic.__file__).read_bytes()  # other code renders other images

    def images(img_size: int, skip_damaged: bool) -> Iterator[np.ndarray]:
        for start in range(0, NUM_SYNTHETIC, 64):
            indices = range(start, min(start + 64, NUM_SYNTHETIC))
            yield np.stack([synthetic.render_face(i, img_size)[0] for i in indices])

    def attributes(names: Sequence[str]) -> np.ndarray:
        columns = [synthetic.ATTRIBUTES.index(name) for name in names]
        return np.stack([synthetic.face_attributes(i) for i in range(NUM_SYNTHETIC)])[:, columns]

    listing = f"{NUM_SYNTHETIC} {hashlib.sha256(code).hexdigest()}"
    return Source("synthetic", NUM_SYNTHETIC, listing, images, synthetic.ATTRIBUTES, attributes)


def torchvision_images(name: str) -> Source:
    """One of torchvision's data sets, downloaded if it is not there."""
    return image_files(named.open_torchvision(name))


# The built-in sources: what --path_to_data knows by name. Everything else is a path.
SOURCES: dict[str, Callable[[], Source]] = {"synthetic": synthetic_faces}
SOURCES |= {name: partial(torchvision_images, name) for name in named.TORCHVISION}


def find_source(path_to_data: str | Path) -> Source:
    """Return the source with that name, or what a folder or zip holds. CelebA is downloaded into
    the folder `data` if that is absent or empty.

    Raises DataError, and ResourceError if there is no room for the download."""
    path = Path(path_to_data)
    if path_to_data == "":  # for Path this is the current folder
        raise UsageError("--path_to_data", "is empty", "give a path, or . for the current folder")
    if path_to_data in SOURCES:
        source = SOURCES[path_to_data]()
        other = f" (built in; the one in this folder is ./{path})" if os.path.exists(path) else ""
        return replace(source, remark=other + source.remark)
    if str(path_to_data).startswith(named.HUB):
        return image_files(named.open_hub(str(path_to_data)))
    if path.absolute() == celeba.FOLDER.absolute() and _is_empty(path):
        path = celeba.download(path, lambda found: image_files(open_files(found)))
    if not os.path.lexists(path):
        fix = f"check the path and its permissions, or give {celeba.FOLDER} for CelebA, downloaded"
        raise DataError(path, "is not there", f"{fix}; built in: {', '.join(SOURCES)}")
    files = open_files(path)
    if not any(map(celeba.is_list, files.names)) and named.is_parquet(files):
        files = named.open_hub(str(files.where))
    return image_files(files)


def _is_empty(folder: Path) -> bool:
    """Whether a folder is absent or holds nothing but data sets that are known by name."""
    try:
        return all(name.startswith(".") or name in SOURCES for name in os.listdir(folder))
    except FileNotFoundError:
        return True
    except OSError:  # a file, or it may not be read; opening it says so
        return False


def image_files(files: Files) -> Source:
    """Return the source of the images among some files. Their attributes and what is held out come
    from CelebA's lists, or else from the files' own classes and split, or from the names of their
    folders. Raises DataError."""
    names = [name for name in files.names if not celeba.is_list(name)]
    suffixes = (os.path.splitext(name)[1].lower() for name in files.others)
    kinds = Counter(suffix or "without suffix" for suffix in suffixes).most_common(8)
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
    if not names:
        what = f"holds no images{left_out and f', only {left_out}'}"
        raise DataError(files.where, what, f"put some there: {', '.join(SUFFIXES)}")
    attribute_table, partition_table, aligned = celeba.find_lists(*files[:3])
    stems, crop = [celeba.stem(name) for name in names], "aligned" if aligned else "square"

    attribute_names, attributes = (), None
    if attribute_table:
        attribute_names = attribute_table.columns
        attributes = partial(attribute_table.values, stems, allowed=(-1, 1))
    else:
        known = files.labels is not None
        classes, labels = (files.classes, files.labels) if known else find_classes(names)
        classes = [name.replace(" ", "_") for name in classes]  # easier to type as flags
        if len(classes) > 1:
            attribute_names, attributes = classes, partial(one_of, classes, labels)

    held_out, remark = files.held_out, ""
    if partition_table:
        values = partition_table.values(stems, partition_table.columns, allowed=(0, 1, 2))
        held_out = values[:, 0] != 0
    elif held_out is None:
        held_out = find_split(names)
        remark = "" if held_out is None else ", held out as its subfolders say"
    remark += f", left out: {left_out}" if left_out else ""

    def images(img_size: int, skip_damaged: bool) -> Iterator[np.ndarray]:
        return decode_all(files.where, names, files.read, img_size, crop, skip_damaged)

    # Other folders may hold files with the same names, sizes and times.
    listing = f"{aligned} {os.path.realpath(files.where)!r} {files.listing}"
    about = attribute_names, attributes, held_out, remark, crop
    return Source(files.where, len(names), listing, images, *about)


# ---- What the names of folders say ----


def find_split(names: Sequence[str]) -> np.ndarray | None:
    """Return which images are in a folder test, val or valid beside a folder train: (N,) bool.
    None if there is no such pair."""
    splits = [SPLIT.match(name) for name in names]
    trained = {split[1] for split in splits if split and split[2].lower().startswith("train")}
    held_out = np.array([
        bool(split) and split[1] in trained and not split[2].lower().startswith("train")
        for split in splits
    ])  # fmt: skip
    return held_out if held_out.any() else None


def find_classes(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the names of the folders, one for each class, that hold all the images, and the class
    of each image: (N,) int64. Folders of a split, and folders around all classes, are no classes.
    No names if some image is outside such a folder."""
    split = find_split(names) is not None
    paths = [SPLIT.sub(r"\1", name, count=1) if split else name for name in names]
    common = len(os.path.commonpath([f"/{path}" for path in paths]))
    parts = [path[common:].split("/") if common > 1 else path.split("/") for path in paths]
    if min(map(len, parts)) < 2:
        return [], np.zeros(len(names), np.int64)
    classes, labels = np.unique([part[0] for part in parts], return_inverse=True)
    return classes.tolist(), labels


def one_of(classes: Sequence[str], labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return the classes as attributes, (N, len(names)) int8: 1 (this class), -1 (another one) or
    0 (not known)."""
    columns = np.array([list(classes).index(name) for name in names])
    values = np.where(labels[:, None] == columns, 1, -1)
    return np.where(labels[:, None] < 0, 0, values).astype(np.int8)
