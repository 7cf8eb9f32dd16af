"""Where images come from: folders, zips, CelebA, and the built-in sources.

Anything that yields uint8 images can be a source: a function that returns a `Source`, and a name
for it in SOURCES. Archives are read in place: nothing is unpacked, and nothing is written outside
a folder either.
"""

import hashlib
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset import celeba, synthetic
from dataset.decoding import decode_all
from system.errors import DataError, UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
HIDDEN = re.compile(r"(^|/)(\.[^./]|__MACOSX/)")  # .git/, ._001.jpg; but not ../
LARGEST = 1 << 28  # bytes of an image file, unpacked
NUM_SYNTHETIC = 20_000  # faces in the source "synthetic"


@dataclass(frozen=True)
class Source:
    """Images, and what is known of them."""

    where: Path | str  # the folder or archive, or the built-in name
    count: int  # of the images
    listing: str  # another one as soon as an image is another one
    images: Callable[[int], Iterator[np.ndarray]]  # img_size -> (n, S, S, 3) uint8 at a time
    attribute_names: Sequence[str] = ()
    attributes: Callable[[Sequence[str]], np.ndarray] | None = None  # names -> (N, K) int8, 1 or -1
    held_out: np.ndarray | None = None  # (N,) bool, kept from training; None: every 20th
    remark: str = ""  # what else the log should say, behind the name


def synthetic_faces() -> Source:
    """The faces of synthetic.py, the data that needs no download."""
    code = Path(synthetic.__file__).read_bytes()  # other code renders other images

    def images(img_size: int) -> Iterator[np.ndarray]:
        for start in range(0, NUM_SYNTHETIC, 64):
            indices = range(start, min(start + 64, NUM_SYNTHETIC))
            yield np.stack([synthetic.render_face(i, img_size)[0] for i in indices])

    def attributes(names: Sequence[str]) -> np.ndarray:
        columns = [synthetic.ATTRIBUTES.index(name) for name in names]
        return np.stack([synthetic.face_attributes(i) for i in range(NUM_SYNTHETIC)])[:, columns]

    listing = f"{NUM_SYNTHETIC} {hashlib.sha256(code).hexdigest()}"
    return Source("synthetic", NUM_SYNTHETIC, listing, images, synthetic.ATTRIBUTES, attributes)


# The built-in sources: what --path_to_data knows by name. Everything else is a path.
SOURCES: dict[str, Callable[[], Source]] = {"synthetic": synthetic_faces}


def find_source(path_to_data: str | Path) -> Source:
    """Return the built-in source of that name, or what a folder or zip holds. CelebA is downloaded
    into the folder `data` where that is absent or empty.

    Raises DataError, and ResourceError where there is no room for the download."""
    path = Path(path_to_data)
    if path_to_data == "":  # for Path this is the current folder
        raise UsageError("--path_to_data", "is empty", "give a path, or . for the current folder")
    if path_to_data in SOURCES:
        other = f" (built in; the one in this folder is ./{path})" if os.path.exists(path) else ""
        return replace(SOURCES[path_to_data](), remark=other)
    if path.absolute() == celeba.FOLDER.absolute() and _is_empty(path):
        path = celeba.download(path, lambda found: image_files(open_files(found)))
    if not os.path.lexists(path):
        fix = f"check the path and its permissions, or give {celeba.FOLDER} for CelebA, downloaded"
        raise DataError(path, "is not there", f"{fix}; built in: {', '.join(SOURCES)}")
    return image_files(open_files(path))


def _is_empty(folder: Path) -> bool:
    try:
        return all(name.startswith(".") for name in os.listdir(folder))
    except FileNotFoundError:
        return True
    except OSError:  # a file, or it may not be looked into; opening it says so
        return False


# ---- Folders and archives ----


class Files(NamedTuple):
    """What a folder or an archive holds."""

    where: Path
    names: list[str]  # of images and of CelebA's lists, sorted
    read: Callable[[str], bytes]  # what is behind a name
    listing: str  # another one as soon as an image is another one


def open_files(path: Path) -> Files:
    """Return the files of a folder or zip, or of the CelebA within it. Raises DataError."""
    path = celeba.locate(path)
    if os.path.isdir(path):
        return _open_folder(path)
    if not os.path.isfile(path):
        raise DataError(path, "is neither a folder nor a file", "check the path, its links")
    return _open_archive(path)


def image_files(files: Files) -> Source:
    """Return the source of the images among some files, with what CelebA's lists say of them."""
    names = [name for name in files.names if not celeba.is_list(name)]
    if not names:
        raise DataError(files.where, "holds no images", f"put some there: {', '.join(SUFFIXES)}")
    stems = [celeba.stem(name) for name in names]
    attribute_table, partition_table, aligned = celeba.find_lists(*files[:3])
    attribute_names, attributes, held_out = (), None, None
    if attribute_table:
        attribute_names = attribute_table.columns
        attributes = partial(attribute_table.values, stems, allowed=(-1, 1))
    if partition_table:
        values = partition_table.values(stems, partition_table.columns, allowed=(0, 1, 2))
        held_out = values[:, 0] != 0

    def images(img_size: int) -> Iterator[np.ndarray]:
        return decode_all(files.where, names, files.read, img_size, aligned)

    # Other folders may hold files of the same names, sizes and times. The crop is by `aligned`.
    listing = f"{aligned} {os.path.realpath(files.where)!r} {files.listing}"
    about = attribute_names, attributes, held_out
    return Source(files.where, len(names), listing, images, *about)


def _open_folder(root: Path) -> Files:
    """The files in a folder and below it, also behind links, each once."""
    found, seen, folders, links = [], set(), [""], []
    try:
        while folders or links:
            below = folders.pop() if folders else links.pop()
            status = os.stat(root / below)
            if (status.st_dev, status.st_ino) in seen:  # a link to what is listed already
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / below) as scan:
                entries = sorted(scan, key=lambda entry: entry.name, reverse=True)
            for entry in entries:
                name = below + entry.name
                if entry.is_dir():
                    hidden = HIDDEN.search(f"{name}/")
                    into = links if entry.is_symlink() else folders
                    into += [] if hidden else [f"{name}/"]
                elif _is_of_use(name):
                    found.append((name, *_size_and_time(root / name)))
    except OSError as error:
        what = f"cannot be listed ({error.strerror}: {error.filename})"
        raise DataError(root, what, "check the folder, its links and permissions") from error
    found.sort()
    listing = repr([entry for entry in found if not celeba.is_list(entry[0])])

    def read(name: str) -> bytes:
        _check_size(_size_and_time(root / name)[0])
        return (root / name).read_bytes()

    return Files(root, [name for name, _, _ in found], read, listing)


def _size_and_time(path: Path) -> tuple[int, int]:
    """Of a file, or of what a link leads to. Raises DataError where reading could take for ever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(path, "is no file but a pipe or a device", "remove it")
    return status.st_size, status.st_mtime_ns


def _open_archive(path: Path) -> Files:
    try:
        archive, status = zipfile.ZipFile(path), path.stat()
    except Exception as error:  # on damaged archives zipfile raises nearly anything
        fix = "give a folder or a zip; or get it again: often it is a web page under its name"
        raise DataError(path, f"cannot be read as a zip archive ({error})", fix) from error
    # Not its members' dates and sizes: this is enough to know an archive by, and quick.
    listing = repr((path.name, status.st_size, status.st_mtime_ns))

    def read(name: str) -> bytes:
        _check_size(archive.getinfo(name).file_size)  # zipfile unpacks no more than that
        return archive.read(name)

    names = sorted(filter(_is_of_use, set(archive.namelist())))
    return Files(path, names, read, listing)


def _check_size(size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"{size:,} bytes, more than the {LARGEST:,} that an image may have")


def _is_of_use(name: str) -> bool:
    """Whether a path is that of an image or a list, and neither hidden nor from a Mac's zip."""
    useful = name.lower().endswith(SUFFIXES) or celeba.is_list(name)
    return useful and not HIDDEN.search(name)
