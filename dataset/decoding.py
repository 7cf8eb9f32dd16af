"""From the bytes of an image file to pixels: the crop, the decoding, many files at a time.

An image is damaged if its decoder reports anything, even a warning. A JPEG with extraneous bytes
before its end is damaged too: most broken JPEGs say just that. Uncompressed and LZW files (BMP,
PPM, TIFF) have no checksum, so changed pixels go unnoticed there.

Threads do the decoding, not processes: Pillow releases the interpreter's lock for most of it.
"""

import errno
import io
import math
import os
import stat
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from system.errors import DataError, ResourceError, UserError
from system.terminal import warn

Crop = Literal["aligned", "square"]
BATCH = 64  # images that a thread decodes at a time
LARGEST = 1 << 28  # bytes of an image file, unpacked
SHOWN = 10  # damaged images that an error names
FORMATS = {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}  # what simplejpeg can make of them
TIFF_DEFLATE, TIFF_JPEG, TIFF_PLAIN = (8, 32946), 7, (1, 5, 32773)  # plain: none, LZW, PackBits


def face_box(width: int, height: int, crop: Crop) -> tuple[int, int, int, int]:
    """Return the square of an image that is trained and evaluated on: left, top, right, bottom.

    aligned: for CelebA's 178x218, at any scale, the 128x128 around (x=89, y=121): the crop of the
    published numbers (Song et al. 2020, "Denoising Diffusion Implicit Models", and others).
    square, and for any other shape: the largest centred square."""
    if crop == "aligned" and width * 218 == height * 178:
        left, top, side = 25 * width // 178, 57 * height // 218, 128 * width // 178
    else:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def crop_face(image: Image.Image, img_size: int, crop: Crop = "square") -> np.ndarray:
    """Return the `face_box` of an image, upright and in RGB: (img_size, img_size, 3) uint8.

    Transparent pixels become white. The filter is Pillow's bicubic, antialiased when it reduces, as
    FID needs it (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN
    Evaluation")."""
    ImageOps.exif_transpose(image, in_place=True)
    # Crop before resizing, or the filter would use pixels outside the box.
    face = image.crop(face_box(*image.size, crop))
    if face.has_transparency_data:
        face = face.convert("RGBA")
        face = Image.alpha_composite(Image.new("RGBA", face.size, "white"), face)
    if face.mode != "RGB":
        face = face.convert("RGB")
    if face.size != (img_size, img_size):
        face = face.resize((img_size, img_size), Image.Resampling.BICUBIC)
    return np.asarray(face)


def open_image(data: bytes) -> Image.Image:
    """Decode a file's contents, upright, in the file's own mode.

    Raises ValueError on a damaged JPEG and on more than 8 bits a channel, which would be clipped,
    and what Pillow raises on other damage."""
    pixels = _plain_jpeg(data)
    if pixels is not None:
        return Image.fromarray(pixels)
    image = Image.open(io.BytesIO(data))
    if image.format == "EPS":
        raise ValueError("EPS, which Pillow would have another program decode")
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"more than 8 bits a channel, mode {image.mode}")
    if image.format == "TIFF":
        _check_tiff(image, data)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def decode_face(data: bytes | Image.Image, img_size: int, crop: Crop = "square") -> np.ndarray:
    """Return `crop_face` of a file's contents or of an image. Raises as `open_image` does."""
    image = data if isinstance(data, Image.Image) else open_image(data)
    return crop_face(image, img_size, crop)


def open_file(path: str | Path) -> Image.Image:
    """Return `open_image` of one image file. Raises DataError, which names the file."""
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            return open_image(read_file(Path(path)))
    except Exception as error:  # Pillow raises nearly anything on damaged data
        raise image_error(str(path), error) from error


def _plain_jpeg(data: bytes) -> np.ndarray | None:
    """The pixels of an upright JPEG in colour, (H, W, 3) uint8, or None for anything else, which
    Pillow decodes. The same library as Pillow's does it, in less time.

    Raises ValueError on any damaged JPEG: Pillow invents the missing pixels without a word."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # Pillow's message says more
        return None
    if height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    plain = colours == "YCbCr" and b"Exif\0\0" not in data and b"tiff:Orientation" not in data
    pixels = simplejpeg.decode_jpeg(data, FORMATS.get(colours, "RGB"))
    return pixels if plain else None


def _check_tiff(image: Image.Image, data: bytes) -> None:
    """Raise if a TIFF is damaged: its decoder tolerates what zlib and simplejpeg report, and finds
    nothing wrong with most other damage, so that other compressions are refused."""
    tags = image.tag_v2
    compression, tables = tags.get(259, 1), tags.get(347, b"\xff\xd8\xff\xd9")
    offsets, sizes = tags.get(273) or tags.get(324), tags.get(279) or tags.get(325)
    if compression in TIFF_PLAIN:
        return
    if compression != TIFF_JPEG and compression not in TIFF_DEFLATE:
        name = image.info.get("compression", compression)
        raise ValueError(f"TIFF with {name} compression, in which damage goes unnoticed")
    for offset, size in zip(offsets, sizes, strict=True):
        part = data[offset : offset + size]
        if compression in TIFF_DEFLATE:
            zlib.decompress(part)  # up to its checksum
        else:
            part = tables[:-2] + part[2:]  # one JPEG file out of the shared tables and this part
            colours = simplejpeg.decode_jpeg_header(part)[2]
            simplejpeg.decode_jpeg(part, FORMATS.get(colours, "RGB"))


def read_file(path: Path) -> bytes:
    """Return a file's contents. Raises DataError if it is not a file, ValueError if too large."""
    check_size(file_status(path).st_size)
    return path.read_bytes()


def file_status(path: Path) -> os.stat_result:
    """Return the status of a file. Raises DataError if reading it could wait for ever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(path, "is not a file but a pipe or a device", "remove it")
    return status


def check_size(size: int) -> None:
    """Raise ValueError if an image file has too many bytes."""
    if size > LARGEST:
        raise ValueError(f"{size:,} bytes, more than the {LARGEST:,} that an image may have")


# ---- Many images ----


def decode_all(
    where: Path | str,
    names: Sequence[str],
    read: Callable[[str], bytes | Image.Image],
    img_size: int,
    crop: Crop = "square",
    skip_damaged: bool = False,
) -> Iterator[np.ndarray]:
    """Yield the images with these names in order, (<= BATCH, S, S, 3) uint8 at a time. A damaged
    image is yielded as `damage_mark`; in the end all of these are named, and raise DataError
    unless skip_damaged.

    read: what is behind a name. Raises ResourceError if memory or open files run out."""
    mark, damaged = damage_mark(img_size), {}

    def decode(name: str) -> np.ndarray:
        """The image, or the mark of a damaged one."""
        try:
            return decode_face(read(name), img_size, crop)
        except Exception as error:  # Pillow and zipfile raise nearly anything on damaged data
            wrong = image_error(f"{where}/{name}", error)
            if not isinstance(wrong, DamagedImage):
                raise wrong from error
            damaged[name] = wrong.reason
            return mark

    def decode_batch(start: int) -> np.ndarray:
        return np.stack([decode(name) for name in names[start : start + BATCH]])

    workers = min(2 * (os.cpu_count() or 1), 16)  # two a core: one decodes while one waits its turn
    pool, pending = ThreadPoolExecutor(workers), deque()
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            for start in range(0, len(names), BATCH):
                pending.append(pool.submit(decode_batch, start))
                if len(pending) > 2 * workers:  # so that memory does not grow with the source
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
    if damaged:
        what = f"{len(damaged):,} of {len(names):,} images cannot be used: {_some_of(damaged)}"
        if not skip_damaged:
            fix = "replace or remove them, or leave them out with --skip_damaged"
            raise DataError(where, what, fix)
        warn(f"{where}: {what}")


def _some_of(reasons: dict[str, str]) -> str:
    """The first names with their reasons, and how many more there are."""
    shown = [f"{name} ({reasons[name]})" for name in sorted(reasons)[:SHOWN]]
    more = len(reasons) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def damage_mark(img_size: int) -> np.ndarray:
    """Return the noise, (S, S, 3) uint8, that stands in a prepared array for a damaged image."""
    random = np.random.default_rng([*b"damaged"])
    return random.integers(0, 256, (img_size, img_size, 3), np.uint8)


def find_damaged(images: np.ndarray) -> np.ndarray:
    """Return which of the images, (N, S, S, 3) uint8, are the `damage_mark`: (N,) bool. Comparing
    their first rows is enough."""
    return (images[:, 0] == damage_mark(images.shape[1])[0]).all(axis=(1, 2))


class DamagedImage(DataError):
    """An image file whose contents cannot be used, for a `reason`."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, f"cannot be used as an image ({reason})", "replace it or remove it")
        self.reason = reason


def image_error(name: str, error: Exception) -> UserError:
    """Return the error for an image that could not be read or decoded."""
    if isinstance(error, UserError):
        return error
    number = getattr(error, "errno", None)
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return ResourceError(name, "does not fit in the memory that is left", "end other programs")
    if number in (errno.EMFILE, errno.ENFILE):
        fix = "raise the limit (ulimit -n), or end other programs"
        return ResourceError(name, "cannot be opened: too many files are open", fix)
    if number:
        fix = "check the disk, the file and its permissions"
        return DataError(name, f"cannot be read ({error.strerror})", fix)
    if isinstance(error, UnidentifiedImageError):  # its own words describe a buffer in memory
        return DamagedImage(name, "in no format that Pillow knows")
    return DamagedImage(name, f"{type(error).__name__}: {error}")
