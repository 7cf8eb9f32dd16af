"""CelebA: its lists, the layouts in which it is distributed, and its download.

Liu et al. 2015, "Deep Learning Face Attributes in the Wild": 202,599 aligned faces of 178x218 with
40 attributes each, for non-commercial research. Its layouts:

    img_align_celeba.zip, or a folder img_align_celeba/, with list_attr_celeba.txt beside it
    celeba/ with the same in it                     (torchvision)
    archive.zip, or its contents: img_align_celeba/img_align_celeba/, list_attr_celeba.csv  (Kaggle)

If list_eval_partition.txt or .csv is there, it says which faces are kept out of training. Of
CelebAMask-HQ (Lee et al. 2020) the photographs are taken, not the masks, with its own list.
"""

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from system.errors import DataError, ResourceError
from system.terminal import say

FOLDER = Path("data")  # CelebA is downloaded here if it is absent or empty, and nowhere else
ARCHIVES = ("img_align_celeba.zip", "archive.zip")  # the authors' name and Kaggle's
KAGGLE = "jessicali9530/celeba-dataset"
HQ_LIST, HQ_MASKS = "CelebAMask-HQ-attribute-anno.txt", "CelebAMask-HQ-mask-anno/"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def locate(path: Path) -> Path:
    """Return the archive or folder of CelebA's images within a folder, or else the folder."""
    for base in (path, path / "celeba"):
        for name in ARCHIVES:
            if os.path.isfile(base / name):
                return base / name
        if os.path.isdir(base / "img_align_celeba"):
            return base / "img_align_celeba"
    return path


# ---- The lists ----


class Table:
    """A list of CelebA's, .txt or Kaggle's .csv, with one row for each image: its attributes, 1
    (has it) or -1, or its partition, 0 (train), 1 (validation) or 2 (test)."""

    def __init__(self, where: str, read: Callable[[], bytes]):
        try:
            text = read().decode("utf-8-sig")
        except Exception as error:  # from the file system, a damaged archive, or bytes of no text
            raise DataError(where, f"cannot be read ({error})", "get this list again") from error
        lines = [line for line in map(str.strip, text.splitlines()) if line]
        comma = "," if lines and "," in lines[0] else None  # Kaggle's; else white space
        if comma:  # image_id,5_o_Clock_Shadow,...
            self.columns, lines = lines[0].split(comma)[1:], lines[1:]
        elif len(lines) > 1 and lines[0].isdigit():  # the count, the names, the rows
            self.columns, lines = lines[1].split(), lines[2:]
        else:  # list_eval_partition.txt has no header
            self.columns = ["partition"]
        if not lines:
            raise DataError(where, "is empty", "get this list again")
        self.where, rows = where, [line.split(comma, 1) for line in lines]
        self.row = {stem(row[0]): i for i, row in enumerate(rows)}
        self._numbers = [row[-1].replace(",", " ") for row in rows]

    def values(
        self, stems: Sequence[str], columns: Sequence[str], allowed: Sequence[int]
    ) -> np.ndarray:
        """Return (len(stems), len(columns)) int8. Raises DataError on missing or damaged rows, and
        on values that are not `allowed`."""
        if len(set(stems)) < len(stems):
            twice = next(name for name in stems if stems.count(name) > 1)
            fix = "give every image its own name"
            raise DataError(self.where, f"has one row for several images named {twice}", fix)
        try:
            if any(len(row.split()) != len(self.columns) for row in self._numbers):
                raise ValueError
            table = np.fromstring(" ".join(self._numbers), np.int64, sep=" ")
            table = table.reshape(len(self.row), len(self.columns))
            rows = [self.row[name] for name in stems]
        except ValueError:
            raise DataError(self.where, "is damaged", "get this list again") from None
        except KeyError as error:
            fix = "remove that image, or get the complete list"
            raise DataError(self.where, f"has no row for image {error}", fix) from None
        values = table[rows][:, [self.columns.index(name) for name in columns]]
        if not np.isin(values, allowed).all():
            what = f"contains values other than {allowed}"
            raise DataError(self.where, what, "get this list again")
        return values.astype(np.int8)


def is_list(name: str) -> bool:
    """Whether a path is that of one of CelebA's lists."""
    name = name.rpartition("/")[2]
    return name == HQ_LIST or name.startswith("list_") and name.endswith((".txt", ".csv"))


def stem(name: str) -> str:
    """Return 000001 for img_align_celeba/000001.jpg. The lists say .jpg; PNG copies exist."""
    return os.path.splitext(name.rpartition("/")[2])[0]


def find_lists(
    where: Path, files: Sequence[str], read: Callable[[str], bytes]
) -> tuple[Table | None, Table | None, bool]:
    """Return the tables of attributes and of the partition, and whether the images are aligned:
    if all of them are in a folder or archive img_align_celeba, or if CelebA's list names them.

    where: a folder or archive; files: its images and lists. Raises DataError if listed images are
    missing."""
    images = [name for name in files if not is_list(name)]
    celeba = all("img_align_celeba" in f"{where.name}/{name}" for name in images)

    def table(*names: str) -> Table | None:
        """The first of these lists that is among the files or, for CelebA, beside them."""
        for name in names:
            inside = [file for file in files if file.rpartition("/")[2] == name]
            beside = where.parent / name
            if inside:
                return Table(f"{where}/{inside[0]}", partial(read, inside[0]))
            if celeba and beside.is_file():
                return Table(str(beside), beside.read_bytes)
        return None

    attributes = table("list_attr_celeba.txt", "list_attr_celeba.csv")
    partition = table("list_eval_partition.txt", "list_eval_partition.csv")
    aligned = celeba or attributes is not None
    attributes = attributes or table(HQ_LIST)
    if attributes:
        listed = attributes.row.keys()
        there = len(listed & set(map(stem, images)))
        if there < len(listed):
            what = f"only {there:,} of the {len(listed):,} images listed here are in {where}"
            fix = "add the missing images, or remove their rows or this list"
            raise DataError(attributes.where, what, fix)
    return attributes, partition, aligned


# ---- The download ----


def download(folder: Path, check: Callable[[Path], object]) -> Path:
    """Download CelebA from Kaggle into `folder`; return the path of the data.

    check: called with the folder, raises if that has no usable data. Raises DataError if the
    download fails, ResourceError if the disk has no room for it."""
    import kagglehub  # takes a second to import, which only a download should cost

    temporary = folder / ".download"  # renamed at the end: half a download is never the data
    say(f"{folder}: no data, downloading CelebA, 1.4 GB, from Kaggle")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # Kaggle's and Colab's own machines return a folder of theirs, not the one asked for.
        found = Path(kagglehub.dataset_download(KAGGLE, output_dir=str(temporary)))
        check(found)
        return found.rename(folder / "celeba") if found.samefile(temporary) else found
    except Exception as error:  # kagglehub and the network raise nearly anything
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            what = f"cannot hold CelebA, 3,000,000,000 bytes ({error.strerror})"
            fix = f"make room, or let {folder} be a link to a folder on another disk"
            raise ResourceError(folder, what, fix) from error
        reason = " ".join(str(error).partition(". Fix: ")[0].split())[:160]
        what = f"holds no data, and CelebA could not be downloaded from Kaggle ({reason})"
        page = f"https://www.kaggle.com/datasets/{KAGGLE}"
        fix = f"put the archive.zip of {page} there, or start with --demo"
        raise DataError(folder, what, fix) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
