"""From the bytes of an image file to pixels: the crop, the decoding, many files at a time.

Threads do the decoding, no processes: Pillow gives up the interpreter's lock for most of it.
"""

import errno
import io
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from system.errors import DataError, ResourceError, UserError

BATCH = 64  # images that a thread decodes at a time
FORMATS = {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}  # what simplejpeg can make of them


def face_box(width: int, height: int, aligned: bool) -> tuple[int, int, int, int]:
    """Return the square of an image that is trained and evaluated on: left, top, right, bottom.

    aligned: of CelebA's 178x218, or that scaled, the 128x128 around (x=89, y=121): the crop of the
    published numbers (Song et al. 2020, "Denoising Diffusion Implicit Models", and others).
    Of anything else the largest centred square."""
    if aligned and width * 218 == height * 178:
        left, top, side = 25 * width // 178, 57 * height // 218, 128 * width // 178
    else:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def crop_face(image: Image.Image, img_size: int, aligned: bool = False) -> np.ndarray:
    """Return the `face_box` of an image, upright and in RGB: (img_size, img_size, 3) uint8.

    Transparency is laid on white. The filter is Pillow's bicubic, antialiased when it reduces, as
    FID needs it (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN
    Evaluation"). Raises ValueError on more than 8 bits a channel, which would be clipped."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"more than 8 bits a channel, mode {image.mode}")
    ImageOps.exif_transpose(image, in_place=True)
    # Cropped before it is resized, or the filter would reach for pixels outside the box.
    face = image.crop(face_box(*image.size, aligned))
    if face.has_transparency_data:
        face = face.convert("RGBA")
        face = Image.alpha_composite(Image.new("RGBA", face.size, "white"), face)
    if face.mode != "RGB":
        face = face.convert("RGB")
    if face.size != (img_size, img_size):
        face = face.resize((img_size, img_size), Image.Resampling.BICUBIC)
    return np.asarray(face)


def decode_face(data: bytes, img_size: int, aligned: bool = False) -> np.ndarray:
    """Return `crop_face` of a file's contents. Raises ValueError on a damaged JPEG, and what Pillow
    raises on other damage."""
    pixels = _plain_jpeg(data)
    if pixels is None:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "EPS":
                raise ValueError("EPS, which Pillow would have another program decode")
            return crop_face(image, img_size, aligned)
    left, top, right, bottom = face_box(pixels.shape[1], pixels.shape[0], aligned)
    face = pixels[top:bottom, left:right]
    return face if len(face) == img_size else crop_face(Image.fromarray(face), img_size)


def _plain_jpeg(data: bytes) -> np.ndarray | None:
    """The pixels of an upright JPEG in colour, (H, W, 3) uint8, or None for anything else, which
    Pillow decodes. The same library as Pillow's does it, in less time.

    Raises ValueError on any damaged JPEG: Pillow makes up what is missing and says nothing."""
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


def decode_all(
    where: Path,
    names: Sequence[str],
    read: Callable[[str], bytes],
    img_size: int,
    aligned: bool = False,
) -> Iterator[np.ndarray]:
    """Yield the images of these names in their order, (<= BATCH, S, S, 3) uint8 at a time.

    read: the bytes behind a name. Raises DataError, which names the file in `where`, and
    ResourceError where not the file is at fault."""

    def decode(name: str) -> np.ndarray:
        try:
            return decode_face(read(name), img_size, aligned)
        except Exception as error:  # on damaged data Pillow and zipfile raise nearly anything
            raise _image_error(f"{where}/{name}", error) from error

    def decode_batch(start: int) -> np.ndarray:
        return np.stack([decode(name) for name in names[start : start + BATCH]])

    workers = min(2 * (os.cpu_count() or 1), 16)  # two a core: one decodes while one waits its turn
    pool, pending = ThreadPoolExecutor(workers), deque()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for start in range(0, len(names), BATCH):
                pending.append(pool.submit(decode_batch, start))
                if len(pending) > 2 * workers:  # so that memory does not grow with the source
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _image_error(name: str, error: Exception) -> UserError:
    """The line for an image that could not be read or decoded."""
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
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, UnidentifiedImageError):  # its own words are of a buffer in memory
        reason = "in no format that Pillow knows"
    what = f"cannot be used as an image ({reason})"
    return DataError(name, what, "replace it or remove it")
