"""Folders and zip archives of images, also archives inside them. Archives are read in place:
nothing is unpacked, so nothing is written outside a folder either.
"""

import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from dataset import celeba
from dataset.decoding import check_size, file_status, read_file
from system.errors import DataError

# What Pillow reads and people have. More than 8 bits, or another program's help, is no use here.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".jpx", ".jpf"),
    *(".pcx", ".qoi", ".psd", ".ico"),
)
HIDDEN = re.compile(r"(^|/)(\.[^./]|__MACOSX/)")  # .git/, ._001.jpg; but not ../


class Files(NamedTuple):
    """Images, and what their source says about them."""

    where: Path  # the folder or archive; for data sets by name, what errors call it
    names: list[str]  # images and CelebA's lists, sorted
    read: Callable[[str], bytes | Image.Image]  # what is behind a name
    listing: str  # changes if an image changes
    others: Sequence[str] = ()  # names of other files
    open: Callable[[str], tuple[BinaryIO, str]] | None = None  # one of these, and its listing
    classes: Sequence[str] = ()  # names of the classes
    labels: np.ndarray | None = None  # (N,) which class each image has; -1: not known
    held_out: np.ndarray | None = None  # (N,) bool, kept from training


def open_files(path: Path) -> Files:
    """Return the files of a folder or zip, or of the CelebA within it. Raises DataError."""
    path = celeba.locate(path)
    if os.path.isdir(path):
        return _open_inner(_open_folder(path))
    if not os.path.isfile(path):
        raise DataError(path, "is neither a folder nor a file", "check the path, its links")
    try:
        # The archive's own size and date, not its members': enough to recognise it, and quick.
        listing = repr((path.name, path.stat().st_size, path.stat().st_mtime_ns))
        file = open(path, "rb")
    except OSError as error:
        what = f"cannot be opened ({error.strerror})"
        raise DataError(path, what, "check its permissions") from error
    return _open_inner(_open_archive(path, file, listing))


def _open_folder(root: Path) -> Files:
    """The files in a folder and below it, also behind links, each once."""
    found, others, seen, folders, links = [], [], set(), [""], []
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
                if HIDDEN.search(f"{name}/"):
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(f"{name}/")
                elif is_of_use(name):
                    status = file_status(root / name)
                    found.append((name, status.st_size, status.st_mtime_ns))
                else:
                    others.append(name)
    except OSError as error:
        what = f"cannot be listed ({error.strerror}: {error.filename})"
        raise DataError(root, what, "check the folder, its links and permissions") from error
    found.sort()
    listing = repr([entry for entry in found if not celeba.is_list(entry[0])])

    def open_other(name: str) -> tuple[BinaryIO, str]:
        status = file_status(root / name)
        return open(root / name, "rb"), repr((name, status.st_size, status.st_mtime_ns))

    names = [name for name, _, _ in found]
    return Files(root, names, lambda name: read_file(root / name), listing, others, open_other)


def _open_archive(where: Path, file: BinaryIO, listing: str) -> Files:
    """The files in a zip. where: its path, for errors; listing: what to recognise it by."""
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # zipfile raises nearly anything on damaged archives
        fix = "give a folder or a zip; or get it again: often it is a web page under its name"
        raise DataError(where, f"cannot be read as a zip archive ({error})", fix) from error
    members = [name for name in set(archive.namelist()) if not HIDDEN.search(name)]
    names = sorted(filter(is_of_use, members))
    others = [name for name in members if not is_of_use(name) and not name.endswith("/")]

    def read(name: str) -> bytes:
        check_size(archive.getinfo(name).file_size)  # zipfile unpacks no more than that
        return archive.read(name)

    def unpack(name: str) -> tuple[BinaryIO, str]:
        """An archive inside this one: a compressed one could be read only from its beginning."""
        copy = tempfile.TemporaryFile()
        with archive.open(name) as member:
            shutil.copyfileobj(member, copy)
        return copy, name

    return Files(where, names, read, listing, others, unpack)


def _open_inner(files: Files) -> Files:
    """The same files; if no image is among them, also those of the archives among them."""
    archives = sorted(name for name in files.others if name.lower().endswith(".zip"))
    if not archives or not all(map(celeba.is_list, files.names)):
        return files
    inner = {}
    for name in archives:
        where = files.where / name
        try:
            inner[f"{name}/"] = _open_inner(_open_archive(where, *files.open(name)))
        except OSError as error:
            what = f"cannot be opened ({error.strerror})"
            raise DataError(where, what, "check it, and the disk for temporary files") from error

    def read(name: str) -> bytes:
        for outer, each in inner.items():
            if name.startswith(outer):
                return each.read(name.removeprefix(outer))
        return files.read(name)

    names = [outer + name for outer, each in inner.items() for name in each.names]
    others = [outer + name for outer, each in inner.items() for name in each.others]
    others += [name for name in files.others if name not in archives]
    listing = repr([files.listing, *(each.listing for each in inner.values())])
    return Files(files.where, sorted(files.names + names), read, listing, others)


def is_of_use(name: str) -> bool:
    """Whether a path is that of a photograph or a list."""
    return celeba.is_list(name) or name.lower().endswith(SUFFIXES) and celeba.HQ_MASKS not in name
