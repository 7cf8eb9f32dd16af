"""Faces as one array, decoded once and mapped ever after; and the batch of a step.

    faces = load_faces("data", img_size=64)     # CelebA, any folder or zip of images, "synthetic"
    batches = Batches(faces, batch_size=128, device="cuda")
    x_0, attributes = batches(0)                # (B, 3, 64, 64) in [-1, 1]; (B, K) or None

Which faces a batch holds follows from (seed, index, rank, world size) alone.
"""

import hashlib
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.prepared import prepare
from dataset.sources import SOURCES, Source, find_source
from system.errors import DataError, UsageError
from utils import to_x_0

PREPARATION = 1  # part of every key: raise it when the crop or the decoding changes


@dataclass(frozen=True)
class Faces:
    """What `load_faces` returns."""

    images: np.ndarray  # (N, img_size, img_size, 3) uint8, mapped: all images of the source
    attributes: np.ndarray  # (N, K) float32, 1 (has it) or -1, in the order given
    train: np.ndarray  # int64 indices into images: the faces to train on
    held_out: np.ndarray  # int64 indices into images: kept for evaluation; of a few, none
    key: str  # the name of the prepared array: from the listing, the crop, the size
    description: str  # one line for the log
    checksum: int = 0  # CRC-32 of the whole array of images

    @property
    def fingerprint(self) -> str:
        """A checksum of the images, of which ones are trained on, and of their attributes: the
        same wherever the images are stored."""
        contents = self.checksum.to_bytes(4, "big") + self.train.tobytes()
        checksum = zlib.crc32(contents + self.attributes.tobytes())
        return f"{len(self.train)} faces, checksum of all {checksum:08x}"

    def usual_attributes(self, count: int = 500) -> list[str]:
        """The attributes of some faces that are trained on, a text of + (has it) and - for each."""
        some = self.train[np.linspace(0, len(self.train) - 1, count).astype(int)]
        return ["".join("+" if value > 0 else "-" for value in self.attributes[i]) for i in some]


def parse_attributes(specs: Sequence[str], flag: str = "--only") -> dict[str, int]:
    """Read ["Smiling", "Male=-1", "Young=0"] as {"Smiling": 1, "Male": -1, "Young": 0}.
    1: has it, -1: has it not, 0: not said. Raises UsageError, naming `flag`, on anything else."""
    values = {}
    for spec in specs:
        name, equals, value = spec.partition("=")
        if not name or equals and value not in ("1", "-1", "0"):
            fix = "write Smiling, or Smiling=-1 for those without"
            raise UsageError(flag, f"{spec!r} is not of the form name or name=value", fix)
        number = int(value) if equals else 1
        if values.setdefault(name, number) != number:
            raise UsageError(flag, f"{name} is {values[name]} and {number}", "give it once")
    return values


def load_faces(
    path_to_data: str | Path,
    img_size: int,
    only: Sequence[str] = (),
    attributes: Sequence[str] = (),
) -> Faces:
    """Return the faces of a source, preparing its array when it is first asked for.

    path_to_data: a name of SOURCES; a folder or zip that holds CelebA (celeba.py lists the layouts)
    or any images; or `data`, into which CelebA is downloaded where that is absent or empty.
    only: the faces to keep, as for `parse_attributes`. attributes: names of the columns to return.
    Held out are CelebA's validation and test faces, or every 20th image where no list says.
    Of several processes, let one come here before the others.
    Raises UsageError (names), DataError (the source), ResourceError (no room for the array)."""
    kept = parse_attributes(only)
    if 0 in kept.values():
        raise UsageError("--only", "=0 would keep every face", "leave that attribute out")
    source = find_source(path_to_data)
    _check_names(source, kept, attributes)
    names = (*kept, *attributes)
    values = source.attributes(names) if names else np.empty((source.count, 0), np.int8)
    held_out = source.held_out
    if held_out is None:
        held_out = np.arange(source.count) % 20 == 19
    key, shape = _key(source, img_size), (source.count, img_size, img_size, 3)
    images, checksum = prepare(key, shape, source.images(img_size))

    keep = (values[:, : len(kept)] == list(kept.values())).all(axis=1)
    train, held_out = np.flatnonzero(keep & ~held_out), np.flatnonzero(keep & held_out)
    text = f"{len(train):,} faces ({len(held_out):,} held out), {img_size}x{img_size}"
    text += f", from {source.where}{source.remark}"
    if kept:
        words = [name if value == 1 else f"not {name}" for name, value in kept.items()]
        text += f": the {keep.sum():,} of {len(keep):,} with {', '.join(words)}"
        if len(train) == 0:
            raise DataError("--only", f"leaves {text}", "ask for less at a time")
    values = values[:, len(kept) :].astype(np.float32)
    return Faces(images, values, train, held_out, key, text, checksum)


def _check_names(source: Source, only: Iterable[str], attributes: Sequence[str]) -> None:
    for flag, names in (("--only", only), ("--attributes", attributes)):
        for name in names:
            if source.attributes is None:
                fix = f"pass {flag} without names, put list_attr_celeba.txt or .csv beside CelebA's"
                fix += f" images, or give --path_to_data {' or '.join(SOURCES)}"
                raise DataError(source.where, "has no attributes", fix)
            if name not in source.attribute_names:
                fix = f"choose of {', '.join(source.attribute_names)}"
                raise UsageError(flag, f"no attribute {name}", fix)
    for name in attributes:
        if attributes.count(name) > 1:
            raise UsageError("--attributes", f"names {name} twice", "give it once")


def _key(source: Source, img_size: int) -> str:
    """The name of the prepared array of a source: for readers some of the source's, then a digest
    of all that the pixels depend on."""
    name = re.sub(r"[^\w.-]", "_", Path(source.where).absolute().stem)[:24]
    digest = hashlib.sha256(f"{PREPARATION} {source.listing}".encode()).hexdigest()[:16]
    return f"{name}_{img_size}_{digest}"


# ---- The batch of a step ----


class Batches:
    """The batches of a run, numbered 0, 1, ..., each a function of (seed, number) alone: a run is
    the same however its processes share them.

    An epoch is a permutation drawn from (seed, epoch), cut into batches. The fewer than a batch
    that are left over come up in other epochs. Where the faces fit into a quarter of the free CUDA
    memory they live there; else a thread reads one batch ahead. stride: from one batch of this
    process to its next. Raises DataError where there are fewer faces than a batch."""

    def __init__(
        self,
        faces: Faces,
        batch_size: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
        stride: int = 1,
    ):
        self.faces, self.batch_size, self.seed = faces, batch_size, seed
        self.device, self.stride = torch.device(device), stride
        self.per_epoch = len(faces.train) // batch_size
        if self.per_epoch == 0:
            what = f"{batch_size} is more than the {len(faces.train)} faces to train on"
            raise DataError("--batch_size", what, "lower it, or add images")
        self.attributes = torch.from_numpy(faces.attributes[faces.train]).to(self.device)
        self.cuda = self.device.type == "cuda"
        self.resident = self._move_to_device() if self.cuda else None
        self.epoch, self.order = -1, np.empty(0, np.int64)  # the permutation of one epoch
        self.thread, self.ahead = ThreadPoolExecutor(1), {}  # number -> Future of `_read`

    def __call__(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Return x_0, (B, 3, H, W) float32 in [-1, 1], half of it mirrored, and the attributes,
        (B, K) float32 or None where K is 0."""
        if self.cuda and self.resident is None:
            batch = self.ahead.get(number) or self.thread.submit(self._read, number)
            following = number + self.stride
            self.ahead = {following: self.thread.submit(self._read, following)}
            picks, pixels = batch.result()
        else:
            picks, pixels = self._read(number)
        places, mirrored = picks.to(self.device, non_blocking=True)
        if self.resident is not None:
            pixels = self.resident[places]
        pixels = pixels.to(self.device, non_blocking=True)
        pixels = torch.where(mirrored.bool()[:, None, None, None], pixels.flip(2), pixels)
        x_0 = to_x_0(pixels)
        return x_0, self.attributes[places] if self.attributes.shape[1] else None

    def _move_to_device(self) -> Tensor | None:
        images, train = self.faces.images, self.faces.train
        size = (len(train), *images.shape[1:])
        if math.prod(size) > torch.cuda.mem_get_info(self.device)[0] // 4:
            return None
        resident = torch.empty(size, dtype=torch.uint8, device=self.device)
        for start in range(0, len(train), 4096):  # a part at a time: host memory may be less
            part = torch.from_numpy(images[train[start : start + 4096]])
            resident[start : start + len(part)] = part
        return resident

    def _read(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Return which faces and whether they are mirrored, (2, B) int64, and their pixels,
        (B, H, W, 3) uint8, or None where the device has them. For CUDA both are in pinned memory,
        from which the copy does not block."""
        epoch, turn = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            random = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order = epoch, random.permutation(len(self.faces.train))
        places = self.order[turn * self.batch_size : (turn + 1) * self.batch_size]
        # The 1 keeps these apart from the permutations: trailing zeros would not count.
        mirrored = np.random.default_rng([self.seed, number, 0, 1]).random(len(places)) < 0.5
        picks, pixels = torch.from_numpy(np.stack([places, mirrored])), None
        if self.resident is None:
            pixels = torch.from_numpy(self.faces.images[self.faces.train[places]])
        if self.cuda:
            picks, pixels = picks.pin_memory(), None if pixels is None else pixels.pin_memory()
        return picks, pixels


def drop_attributes(attributes: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Set some attributes, (B, K), to 0 (not said): for a `share` of the faces all of them, so that
    the network also learns without (Ho and Salimans 2022), and for half of the other faces each
    with probability 1/2, so that any one can be given alone."""
    options = dict(generator=generator, device=attributes.device)
    face = torch.rand(len(attributes), 1, **options)
    coin = torch.rand(attributes.shape, **options) < 0.5
    return attributes * ((face >= share) & (coin | (face >= (1 + share) / 2)))
