"""Where pictures come from and how they become pixels: folders, zips, CelebA and its download.

CelebA is Liu et al. 2015, "Deep Learning Face Attributes in the Wild": 202,599 aligned faces of
178x218 with 40 attributes each, for non-commercial research. Its layouts:

    img_align_celeba.zip, or a folder img_align_celeba/, with list_attr_celeba.txt beside it
    celeba/ with the same in it                     (torchvision)
    archive.zip, or its contents: img_align_celeba/img_align_celeba/, list_attr_celeba.csv  (Kaggle)

list_eval_partition.txt or .csv, where it is there, says which faces are kept out of training.
Archives are read in place: nothing is unpacked, so nothing is written outside a folder either.
"""

import errno
import io
import math
import os
import re
import shutil
import sys
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from errors import DataError, ResourceError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
ARCHIVES = ("img_align_celeba.zip", "archive.zip")  # as the authors and as Kaggle name it
DRIVE_FILES = ("img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
HIDDEN = re.compile(r"(^|/)(\.[^./]|__MACOSX/)")  # .git/, ._001.jpg; but not ../
CHUNK = 64  # pictures that a thread decodes at a time
KAGGLE = "jessicali9530/celeba-dataset"


class Table:
    """A list of CelebA's, .txt or Kaggle's .csv: a row for each picture, of attributes that are
    1 (has it) or -1, or of its partition: 0 (train), 1 (validation) or 2 (test)."""

    def __init__(self, where: str, read: Callable[[], bytes]):
        try:
            text = read().decode("utf-8-sig")
        except Exception as error:  # of the file system, of a damaged archive, of no text at all
            raise DataError(where, f"cannot be read ({error})", "get this list again") from error
        lines = [line for line in map(str.strip, text.replace(",", " ").splitlines()) if line]
        if "," in text.partition("\n")[0]:  # image_id,5_o_Clock_Shadow,...
            self.columns, lines = lines[0].split()[1:], lines[1:]
        elif len(lines) > 1 and lines[0].isdigit():  # the count, the names, the rows
            self.columns, lines = lines[1].split(), lines[2:]
        else:  # list_eval_partition.txt has no head
            self.columns = ["partition"]
        if not lines:
            raise DataError(where, "is empty", "get this list again")
        self.where = where
        self.row = {_stem(line.partition(" ")[0]): row for row, line in enumerate(lines)}
        self._numbers = " ".join([line.partition(" ")[2] for line in lines])

    def values(
        self, stems: Sequence[str], columns: Sequence[str], known: Sequence[int]
    ) -> np.ndarray:
        """Return (len(stems), len(columns)) int8. Raises DataError on missing or damaged rows, and
        on other values than the `known` ones."""
        try:
            table = np.fromstring(self._numbers, np.int8, sep=" ")
            table = table.reshape(len(self.row), len(self.columns))
            rows = [self.row[stem] for stem in stems]
        except ValueError:
            raise DataError(self.where, "is damaged", "get this list again") from None
        except KeyError as error:
            fix = "remove that picture, or get the whole list"
            raise DataError(self.where, f"has no row for picture {error}", fix) from None
        values = table[rows][:, [self.columns.index(name) for name in columns]]
        if not np.isin(values, known).all():
            raise DataError(self.where, f"holds other values than {known}", "get this list again")
        return values


@dataclass(frozen=True)
class Source:
    where: Path  # the folder or the archive
    pictures: list[str]  # their names in it, sorted
    stems: list[str]  # 000001 for img_align_celeba/000001.jpg: CelebA's lists know them by this
    read: Callable[[str], bytes]  # the file behind a name
    stamp: str  # another one as soon as a picture is another one
    aligned: bool  # whether this is CelebA, with faces where its authors aligned them
    attributes: Table | None
    partition: Table | None


def find_source(path: Path) -> Source:
    """Return what a folder or zip holds; an absent or empty folder first gets CelebA downloaded.
    Raises DataError, and ResourceError where there is no room for the download."""
    if path.is_file():
        return _open_archive(path)
    if path.suffix.lower() == ".zip":
        raise DataError(path, "is not there", "check the path")
    return _look_into(_download(path) if _is_empty(path) else path)


def _is_empty(folder: Path) -> bool:
    try:
        return all(name.startswith(".") for name in os.listdir(folder))
    except FileNotFoundError:
        return True
    except OSError:  # it may not be looked into; opening it says so
        return False


def _look_into(path: Path) -> Source:
    for base in (path, path / "celeba"):
        for name in ARCHIVES:
            if (base / name).is_file():
                return _open_archive(base / name)
        if (base / "img_align_celeba").is_dir():
            return _open_folder(base / "img_align_celeba")
    return _open_folder(path)


def _open_folder(root: Path) -> Source:
    found, folders = [], [""]
    try:
        while folders:
            below = folders.pop()
            with os.scandir(root / below) as entries:
                for entry in entries:
                    name = below + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{name}/")
                    elif _is_of_use(name):
                        stat = entry.stat()
                        found.append((name, stat.st_size, stat.st_mtime_ns))
    except OSError as error:
        what = f"cannot be listed ({error.strerror}: {error.filename})"
        raise DataError(root, what, "check the folder, its links and permissions") from error
    found.sort()
    stamp = repr([entry for entry in found if not _is_list(entry[0])])
    files = [name for name, _, _ in found]
    return _sort_files(root, files, lambda name: (root / name).read_bytes(), stamp)


def _open_archive(path: Path) -> Source:
    try:
        archive, stat = zipfile.ZipFile(path), path.stat()
    except (zipfile.BadZipFile, OSError) as error:
        fix = "get it again; often it is a web page, saved under the name of the archive"
        raise DataError(path, f"cannot be read as a zip archive ({error})", fix) from error
    # Not its members' dates and sizes: this is enough to know an archive by, and quick.
    stamp = repr((path.name, stat.st_size, stat.st_mtime_ns))
    files = sorted(filter(_is_of_use, set(archive.namelist())))
    return _sort_files(path, files, archive.read, stamp)


def _sort_files(where: Path, files: list[str], read: Callable[[str], bytes], stamp: str) -> Source:
    """Tell the pictures from the lists, which lie among the files or, of CelebA, beside them."""
    pictures = [name for name in files if not _is_list(name)]
    if not pictures:
        raise DataError(where, "holds no pictures", f"put some there: {', '.join(SUFFIXES)}")
    stems = [_stem(name) for name in pictures]
    celeba = "img_align_celeba" in f"{where.name}/{pictures[0]}"

    def table(title: str) -> Table | None:
        """The list of that name, from among the files or from beside CelebA's."""
        for name in (f"{title}.txt", f"{title}.csv"):
            inside = [file for file in files if file.rpartition("/")[2] == name]
            beside = where.parent / name
            if inside:
                return Table(f"{where}/{inside[0]}", partial(read, inside[0]))
            if celeba and beside.is_file():
                return Table(str(beside), beside.read_bytes)
        return None

    attributes, partition = table("list_attr_celeba"), table("list_eval_partition")
    if attributes:
        listed = attributes.row.keys()
        there = len(listed & set(stems))
        if there < len(listed):
            what = f"only {there:,} of the {len(listed):,} pictures listed here are in {where}"
            fix = "complete them, or remove the other rows or this list to train on these only"
            raise DataError(attributes.where, what, fix)
    aligned = celeba or attributes is not None
    return Source(where, pictures, stems, read, stamp, aligned, attributes, partition)


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]  # without .jpg, for CelebA also comes as .png


def _is_list(name: str) -> bool:
    return name.endswith((".txt", ".csv")) and name.rpartition("/")[2].startswith("list_")


def _is_of_use(name: str) -> bool:
    """Whether a path is that of a picture or a list, and neither hidden nor from a Mac's zip."""
    return (name.lower().endswith(SUFFIXES) or _is_list(name)) and not HIDDEN.search(name)


# ---- From files to pixels ----


def face_box(width: int, height: int, aligned: bool) -> tuple[int, int, int, int]:
    """Return the square of a picture that is trained and evaluated on: left, top, right, bottom.

    aligned: of CelebA's 178x218, or that scaled, the 128x128 around (x=89, y=121): the crop of the
    published numbers (Song et al. 2020, "Denoising Diffusion Implicit Models", and others).
    Of anything else the largest centred square."""
    if aligned and width * 218 == height * 178:
        left, top, side = 25 * width // 178, 57 * height // 218, 128 * width // 178
    else:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def crop_face(picture: Image.Image, img_size: int, aligned: bool = False) -> np.ndarray:
    """Return the `face_box` of a picture, upright and in RGB: (img_size, img_size, 3) uint8.

    Transparency is laid on white. The filter is Pillow's bicubic, antialiased when it reduces, as
    FID needs it (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN
    Evaluation"). Raises ValueError on more than 8 bits a channel, which would be clipped."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        raise ValueError(f"more than 8 bits a channel, mode {picture.mode}")
    ImageOps.exif_transpose(picture, in_place=True)
    # Cropped before it is resized, or the filter would reach for pixels outside the box.
    face = picture.crop(face_box(*picture.size, aligned))
    if face.has_transparency_data:
        face = face.convert("RGBA")
        face = Image.alpha_composite(Image.new("RGBA", face.size, "white"), face)
    if face.mode != "RGB":
        face = face.convert("RGB")
    if face.size != (img_size, img_size):
        face = face.resize((img_size, img_size), Image.Resampling.BICUBIC)
    return np.asarray(face)


def decode_face(data: bytes, img_size: int, aligned: bool = False) -> np.ndarray:
    """Return `crop_face` of a file's contents. Raises what Pillow raises on damaged data."""
    pixels = _plain_jpeg(data)
    if pixels is None:
        with Image.open(io.BytesIO(data)) as picture:
            return crop_face(picture, img_size, aligned)
    left, top, right, bottom = face_box(pixels.shape[1], pixels.shape[0], aligned)
    face = pixels[top:bottom, left:right]
    return face if len(face) == img_size else crop_face(Image.fromarray(face), img_size)


def _plain_jpeg(data: bytes) -> np.ndarray | None:
    """The pixels of a JPEG in colour and upright, (H, W, 3) uint8, by the library that Pillow uses
    too, without Pillow's detours; None for all else, which is left to Pillow."""
    if not data.startswith(b"\xff\xd8") or b"Exif\0\0" in data:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        plain = colours == "YCbCr" and height * width <= (Image.MAX_IMAGE_PIXELS or math.inf)
        return simplejpeg.decode_jpeg(data, "RGB") if plain else None
    except ValueError:  # damaged: Pillow has the better words
        return None


def decode_all(source: Source, img_size: int) -> Iterator[np.ndarray]:
    """Yield the pictures of a source in their order, (<= CHUNK, S, S, 3) uint8 at a time."""

    def decode(name: str) -> np.ndarray:
        try:
            return decode_face(source.read(name), img_size, source.aligned)
        except Exception as error:  # on damaged data Pillow and zipfile raise nearly anything
            what = f"cannot be used as a picture ({type(error).__name__}: {error})"
            raise DataError(f"{source.where}/{name}", what, "replace it or remove it") from error

    def decode_chunk(start: int) -> np.ndarray:
        return np.stack([decode(name) for name in source.pictures[start : start + CHUNK]])

    workers = min(2 * (os.cpu_count() or 1), 16)  # two a core: one decodes while one waits its turn
    pool, pending = ThreadPoolExecutor(workers), deque()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for start in range(0, len(source.pictures), CHUNK):
                pending.append(pool.submit(decode_chunk, start))
                if len(pending) > 2 * workers:  # so that memory does not grow with the source
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---- The download ----


def _download(folder: Path) -> Path:
    """Download CelebA into `folder`, from Kaggle or else Google Drive; return where it lies."""
    aside = folder / ".download"  # renamed at the end, so that half a download is never the data
    failures = []
    for site, fetch in (("Kaggle", _from_kaggle), ("Google Drive", _from_google_drive)):
        try:
            print(f"{folder}: no data, downloading CelebA, 1.4 GB, from {site}", file=sys.stderr)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            found = fetch(aside)
            _look_into(found)  # "quota exceeded" comes as a file, too
            return found.rename(folder / "celeba") if found.samefile(aside) else found
        except Exception as error:  # each of the libraries has its own, the network's among them
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                what = f"cannot hold CelebA, 3,000,000,000 bytes ({error.strerror})"
                raise ResourceError(folder, what, "give another --path_to_data") from error
            reason = str(error).partition(". Fix: ")[0]
            failures.append(f"{site}: {' '.join(reason.split())[:160]}")
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    what = f"holds no data, and CelebA could not be downloaded ({'; '.join(failures)})"
    page = f"https://www.kaggle.com/datasets/{KAGGLE}"
    raise DataError(folder, what, f"put the archive.zip of {page} there, or start with --demo")


def _from_kaggle(folder: Path) -> Path:
    import kagglehub  # here: a second that only a download should cost

    # On Kaggle's and Colab's own machines this returns a folder of theirs, not the one asked for.
    return Path(kagglehub.dataset_download(KAGGLE, output_dir=str(folder)))


def _from_google_drive(folder: Path) -> Path:
    from torchvision.datasets import CelebA, utils

    for file_id, md5, name in CelebA.file_list:
        if name in DRIVE_FILES:
            utils.download_file_from_google_drive(file_id, folder, name, md5)
    return folder
