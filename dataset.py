"""Faces as one array, decoded once and mapped ever after; and the batch of a step.

    faces = load_faces("data", img_size=64)     # CelebA, any folder or zip of images, "synthetic"
    batches = Batches(faces, batch_size=128, device="cuda")
    x_0, attributes = batches(0)                # (B, 3, 64, 64) in [-1, 1]; (B, K) or None

Threads do the decoding, no processes: Pillow gives up the interpreter's lock for most of it.
"""

import errno
import hashlib
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import synthetic
from errors import DataError, ResourceError, UsageError
from images import to_x_0
from sources import Source, decode_all, find_source

PREPARED = Path("prepared")  # the decoded arrays, in the current folder; may be deleted
PREPARATION = 1  # part of every key: raise it when the crop or the decoding changes
NUM_SYNTHETIC = 20_000  # faces in the source "synthetic"


@dataclass(frozen=True)
class Faces:
    """What `load_faces` returns."""

    images: np.ndarray  # (N, img_size, img_size, 3) uint8, mapped: all the pictures of the source
    attributes: np.ndarray  # (N, K) float32, 1 (has it) or -1, in the order asked for
    train: np.ndarray  # int64 indices into images: the faces to train on
    held_out: np.ndarray  # int64 indices into images: kept for evaluation; of a few, none
    key: str  # names the prepared array: the listing of the source, the crop, the size
    description: str  # one line for the log

    @property
    def fingerprint(self) -> str:
        """The same for the same pictures in the same order, wherever they lie: a checksum of some
        pictures, of which ones are trained on, and of what is said of them."""
        some = self.images[np.linspace(0, len(self.images) - 1, 64).astype(int)]
        parts = (some, self.train, self.attributes)
        checksum = zlib.crc32(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
        return f"{len(self.train)} faces, checksum {checksum:08x}"


def parse_attributes(specs: Sequence[str], flag: str = "--only") -> dict[str, int]:
    """Read ["Smiling", "Male=-1", "Young=0"] as {"Smiling": 1, "Male": -1, "Young": 0}.
    1: has it, -1: has it not, 0: not said. Raises UsageError, naming `flag`, on anything else."""
    values = {}
    for spec in specs:
        name, equals, value = spec.partition("=")
        if not name or equals and value not in ("1", "-1", "0"):
            fix = "write Smiling, or Smiling=-1 for those without"
            raise UsageError(flag, f"{spec!r} is not of the form name or name=value", fix)
        values[name] = int(value) if equals else 1
    return values


def load_faces(
    path_to_data: str | Path,
    img_size: int,
    only: Sequence[str] = (),
    attributes: Sequence[str] = (),
) -> Faces:
    """Return the faces of a source, preparing its array when it is first asked for.

    path_to_data: a folder or zip that holds CelebA (sources.py lists the layouts) or any pictures;
    an absent or empty folder, into which CelebA is downloaded; or "synthetic" for synthetic.py.
    only: the faces to keep, as for `parse_attributes`. attributes: names of the columns to return.
    Held out are CelebA's validation and test faces, or every 20th picture where no list says.
    Of several processes, let one come here before the others.
    Raises UsageError (names), DataError (the source), ResourceError (no room for the array)."""
    kept = parse_attributes(only)
    if 0 in kept.values():
        raise UsageError("--only", "=0 would keep every face", "leave that attribute out")
    if str(path_to_data) == "synthetic":
        where = "synthetic"
        _check_names(kept, attributes, synthetic.ATTRIBUTES)
        key, images, table = _load_synthetic(img_size)
        labels = table[:, [synthetic.ATTRIBUTES.index(name) for name in (*kept, *attributes)]]
        held_out = _every_20th(len(images))
    else:
        source = find_source(Path(path_to_data))
        where = source.where
        labels = _read_labels(source, kept, attributes)  # before the minutes of preparing
        held_out = _read_held_out(source)
        key = _key(source, img_size)
        images = _prepare(key, len(labels), img_size, lambda: decode_all(source, img_size))

    keep = (labels[:, : len(kept)] == list(kept.values())).all(axis=1)
    train, aside = np.flatnonzero(keep & ~held_out), np.flatnonzero(keep & held_out)
    text = f"{len(train):,} faces ({len(aside):,} held out), {img_size}x{img_size}, from {where}"
    if kept:
        conditions = ", ".join(
            name if value == 1 else f"not {name}" for name, value in kept.items()
        )
        text += f": the {keep.sum():,} of {len(keep):,} with {conditions}"
        if len(train) == 0:
            raise DataError("--only", f"leaves {text}", "ask for less at a time")
    return Faces(images, labels[:, len(kept) :].astype(np.float32), train, aside, key, text)


def _check_names(only: Iterable[str], attributes: Iterable[str], known: Sequence[str]) -> None:
    for flag, names in (("--only", only), ("--attributes", attributes)):
        for name in names:
            if name not in known:
                raise UsageError(flag, f"no attribute {name}", f"choose of {', '.join(known)}")


def _read_labels(source: Source, only: Iterable[str], attributes: Iterable[str]) -> np.ndarray:
    """(N, K) int8 of 1 and -1: first the columns of `only`, then those of `attributes`."""
    asked = (*only, *attributes)
    if not asked:
        return np.empty((len(source.pictures), 0), np.int8)
    if source.attributes is None:
        fix = "put list_attr_celeba.txt or .csv beside CelebA's pictures, or use drawn"
        raise DataError(source.where, "has no attributes", fix)
    _check_names(only, attributes, source.attributes.columns)
    return source.attributes.values(source.stems, asked, known=(-1, 1))


def _every_20th(count: int) -> np.ndarray:
    return np.arange(count) % 20 == 19


def _read_held_out(source: Source) -> np.ndarray:
    """(N,) bool."""
    if source.partition is None:
        return _every_20th(len(source.pictures))
    columns = source.partition.columns
    return source.partition.values(source.stems, columns, known=(0, 1, 2))[:, 0] != 0


def _load_synthetic(img_size: int) -> tuple[str, np.ndarray, np.ndarray]:
    """Return key, images and attributes, (N, K) int8, of the synthetic faces."""
    code = Path(synthetic.__file__).read_bytes()  # another way to draw makes another array
    key = f"drawn_{img_size}_{NUM_SYNTHETIC}_{hashlib.sha256(code).hexdigest()[:16]}"
    labels, shape = [], (NUM_SYNTHETIC, len(synthetic.ATTRIBUTES))
    beside = PREPARED / f"{key}_attributes.npy"
    if load_array(beside, shape, np.int8) is None:
        (PREPARED / f"{key}.npy").unlink(missing_ok=True)  # of no use without them

    def draw() -> Iterator[np.ndarray]:
        """Yield the pictures in parts, (n, S, S, 3) uint8, and write their attributes."""
        for start in range(0, NUM_SYNTHETIC, 64):
            numbers = range(start, min(start + 64, NUM_SYNTHETIC))
            pixels, has = zip(*(synthetic.draw_face(i, img_size) for i in numbers), strict=True)
            labels.append(np.stack(has))
            yield np.stack(pixels)
        # This runs before the pictures are renamed: where they are, their attributes are too.
        save_array(f"{key}_attributes", shape, np.int8, labels)

    images = _prepare(key, NUM_SYNTHETIC, img_size, draw)
    return key, images, load_array(beside, shape, np.int8)


# ---- The prepared array: written once, whole or not at all ----


def _key(source: Source, img_size: int) -> str:
    text = f"{PREPARATION} {source.aligned} {source.stamp}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{source.where.absolute().stem}_{img_size}_{digest}"


def _prepare(
    key: str, count: int, img_size: int, make: Callable[[], Iterator[np.ndarray]]
) -> np.ndarray:
    """Map the array of this key, (count, S, S, 3) uint8; where it is not there, make it first."""
    path, shape = PREPARED / f"{key}.npy", (count, img_size, img_size, 3)
    if (images := load_array(path, shape)) is not None:
        return images

    def chunks() -> Iterator[np.ndarray]:
        terminal = sys.stderr.isatty()
        with tqdm(total=count, unit=" faces", desc="preparing", disable=not terminal) as bar:
            for chunk in make():
                yield chunk
                bar.update(len(chunk))

    print(f"preparing {count:,} faces once, for {path}", file=sys.stderr)
    save_array(key, shape, np.uint8, chunks())
    print(f"prepared {count:,} faces", file=sys.stderr)
    return load_array(path, shape)


def load_array(path: Path, shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray | None:
    """Return the array of a file, or None where that is not just what was once written."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    whole = path.stat().st_size == array.offset + array.nbytes
    return array if whole and array.shape == shape and array.dtype == dtype else None


def save_array(
    name: str, shape: tuple[int, ...], dtype: type, chunks: Iterable[np.ndarray]
) -> None:
    """Write an array, chunk by chunk, under a name of this process, and rename it once it is safe
    on the disk. Not through a map: there a full disk is a signal that kills."""
    path, aside = PREPARED / f"{name}.npy", PREPARED / f"{name}.{os.getpid()}.part"
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        PREPARED.mkdir(parents=True, exist_ok=True)
        _remove_stale()
        if shutil.disk_usage(PREPARED).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(aside, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        what = f"cannot hold the {size:,} bytes of {path.name} ({error.strerror})"
        fix = "make room there, or start from a folder on another disk"
        raise ResourceError(PREPARED.absolute(), what, fix) from error
    finally:
        with suppress(OSError):
            aside.unlink()


def _remove_stale() -> None:
    """Remove what killed processes have left half written."""
    for path in PREPARED.glob("*.part"):
        try:
            os.kill(int(path.suffixes[-2][1:]), 0)  # signal 0 asks whether the process lives
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (OSError, ValueError, IndexError):
            pass  # somebody else's


# ---- The batch of a step ----


class Batches:
    """The batches of one process, each a function of (seed, index, rank, world size) alone.

    An epoch is a permutation drawn from (seed, epoch); the processes take slices of it in turn.
    What is left over of it, fewer than a batch, has its turn in other epochs. Where the faces fit
    into a quarter of the free CUDA memory they live there; else a thread reads one batch ahead.
    Raises DataError where there are fewer faces than one batch of all processes."""

    def __init__(
        self,
        faces: Faces,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
    ):
        self.faces, self.batch_size, self.seed = faces, batch_size, seed
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.per_epoch = len(faces.train) // (batch_size * world_size)
        if self.per_epoch == 0:
            what = f"{batch_size} for each of {world_size} processes"
            what += f" is more than the {len(faces.train)} faces to train on"
            raise DataError("--batch_size", what, "lower it, or add pictures")
        self.attributes = torch.from_numpy(faces.attributes[faces.train]).to(self.device)
        self.cuda = self.device.type == "cuda"
        self.resident = self._move_to_device() if self.cuda else None
        self.epoch, self.order = -1, np.empty(0, np.int64)  # the permutation of one epoch
        self.thread, self.ahead = ThreadPoolExecutor(1), {}  # index -> Future of `_read`

    def __call__(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Return x_0, (B, 3, H, W) float32 in [-1, 1], half of it mirrored, and the attributes,
        (B, K) float32 or None where K is 0. index: step * accumulation steps + micro-batch."""
        if self.cuda and self.resident is None:
            batch = self.ahead.get(index) or self.thread.submit(self._read, index)
            self.ahead = {index + 1: self.thread.submit(self._read, index + 1)}
            picks, pixels = batch.result()
        else:
            picks, pixels = self._read(index)
        places, mirrored = picks.to(self.device, non_blocking=True)
        if self.resident is not None:
            pixels = self.resident[places]
        pixels = pixels.to(self.device, non_blocking=True)
        pixels = torch.where(mirrored.bool()[:, None, None, None], pixels.flip(2), pixels)
        return to_x_0(pixels), self.attributes[places] if self.attributes.shape[1] else None

    def _move_to_device(self) -> Tensor | None:
        images, train = self.faces.images, self.faces.train
        size = (len(train), *images.shape[1:])
        if math.prod(size) > torch.cuda.mem_get_info(self.device)[0] // 4:
            return None
        resident = torch.empty(size, dtype=torch.uint8, device=self.device)
        for start in range(0, len(train), 4096):  # in parts, for host memory's sake
            part = torch.from_numpy(images[train[start : start + 4096]])
            resident[start : start + len(part)] = part
        return resident

    def _read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Return which faces and whether mirrored, (2, B) int64, and their pixels, (B, H, W, 3)
        uint8, unless those are on the device; for CUDA in pinned memory, so as not to wait."""
        epoch, turn = divmod(index, self.per_epoch)
        if epoch != self.epoch:
            random = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order = epoch, random.permutation(len(self.faces.train))
        start = (turn * self.world_size + self.rank) * self.batch_size
        places = self.order[start : start + self.batch_size]
        # The 1 keeps these apart from the permutations: trailing zeros would not count.
        mirrored = np.random.default_rng([self.seed, index, self.rank, 1]).random(len(places)) < 0.5
        picks, pixels = torch.from_numpy(np.stack([places, mirrored])), None
        if self.resident is None:
            pixels = torch.from_numpy(self.faces.images[self.faces.train[places]])
        if self.cuda:
            picks, pixels = picks.pin_memory(), None if pixels is None else pixels.pin_memory()
        return picks, pixels


def drop_attributes(attributes: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Attributes with some of them set to 0, not said: all of a `share` of the faces (Ho and
    Salimans 2022), and of half of the others each by a coin toss, so that any can be asked for by
    itself. attributes: (B, K)."""
    options = dict(generator=generator, device=attributes.device)
    face = torch.rand(len(attributes), 1, **options)
    coin = torch.rand(attributes.shape, **options) < 0.5
    return attributes * ((face >= share) & (coin | (face >= (1 + share) / 2)))
