"""Images as one array, decoded once and then mapped; and the batch of a step.

    faces = load_faces("data", img_size=64)     # CelebA, any folder or zip of images, "synthetic"
    batches = Batches(faces, batch_size=128, device="cuda")
    x_0, attributes = batches(0)                # (B, 3, 64, 64) in [-1, 1]; (B, K) or None

The images of a batch follow from (seed, index, rank, world size) alone.
"""

import hashlib
import math
import re
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.decoding import Crop, find_damaged
from dataset.prepared import PREPARED, prepare
from dataset.sources import SOURCES, Source, find_source
from system.errors import DataError, UsageError
from utils import to_x_0

PREPARATION = 1  # part of every key: raise it when the crop or the decoding changes
CROPS = {"aligned": "CelebA's crop", "square": "centred squares"}  # for the log


@dataclass(frozen=True)
class Faces:
    """What `load_faces` returns."""

    images: np.ndarray  # (N, img_size, img_size, 3) uint8, mapped: all images of the source
    attributes: np.ndarray  # (N, K) float32: 1 (has it), -1 (has it not), 0 (not known)
    train: np.ndarray  # int64 indices into images: the ones to train on
    held_out: np.ndarray  # int64 indices into images: kept for evaluation; none if there are few
    key: str  # the name of the prepared array: from the listing, the crop, the size
    description: str  # one line for the log
    checksum: int = 0  # CRC-32 of the whole array of images
    attribute_names: tuple[str, ...] = ()  # K names, as the source spells them
    crop: Crop = "square"  # how the images were cropped, for other images of the same kind

    @property
    def fingerprint(self) -> str:
        """A checksum of the images, of which ones are trained on, and of their attributes: the
        same wherever the images are stored."""
        contents = self.checksum.to_bytes(4, "big") + self.train.tobytes()
        checksum = zlib.crc32(contents + self.attributes.tobytes())
        return f"{len(self.train)} faces, checksum of all {checksum:08x}"

    def usual_attributes(self, count: int = 500) -> list[str]:
        """The attributes of some images that are trained on, a text of + (has it) and - for each.
        Images whose attributes are not known are passed over."""
        known = self.train[self.attributes[self.train].any(axis=1)]
        some = known[np.linspace(0, len(known) - 1, count).astype(int)]
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


def match_names(flag: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the names as `known` spells them, whatever their case. Raises UsageError, naming the
    flag, on one that is not known and on one given twice."""
    spelling = {name.lower(): name for name in known} | {name: name for name in known}
    matched = [spelling.get(name) or spelling.get(name.lower()) for name in names]
    for name, match in zip(names, matched, strict=True):
        if match is None:
            raise UsageError(flag, f"no attribute {name}", f"choose from {', '.join(known)}")
        if matched.count(match) > 1:
            raise UsageError(flag, f"names {match} twice", "give it once")
    return matched


def load_faces(
    path_to_data: str | Path,
    img_size: int,
    only: Sequence[str] = (),
    attributes: Sequence[str] = (),
    *,
    skip_damaged: bool = False,
) -> Faces:
    """Return the images of a source, preparing its array when it is first asked for.

    path_to_data: a name of SOURCES; a folder or zip that holds CelebA (celeba.py lists the layouts)
    or any images; `hf:owner/name`; or `data`, into which CelebA is downloaded if that is absent or
    empty. only: the images to keep, as for `parse_attributes`. attributes: names of the columns to
    return, or ("all",). skip_damaged: leave out images that cannot be used.
    Held out are the images that the source's own split says, or every 20th one.
    Of several processes, let one come here before the others.
    Raises UsageError (names), DataError (the source), ResourceError (no room for the array)."""
    wanted = parse_attributes(only)
    if 0 in wanted.values():
        raise UsageError("--only", "=0 would keep every image", "leave that attribute out")
    source = find_source(path_to_data)
    kept = dict(zip(_find_names("--only", [*wanted], source), wanted.values(), strict=True))
    every = [*attributes] == ["all"] and source.attributes
    names = _find_names("--attributes", source.attribute_names if every else attributes, source)
    columns = [*kept, *names]
    values = source.attributes(columns) if columns else np.empty((source.count, 0), np.int8)
    key, shape = _key(source, img_size), (source.count, img_size, img_size, 3)
    images, checksum = prepare(key, shape, source.images(img_size, skip_damaged))
    damaged = find_damaged(images)
    if damaged.any() and not skip_damaged:
        what = f"holds {damaged.sum():,} damaged images, as an earlier start found"
        fix = f"add --skip_damaged, or delete {PREPARED / key}.npy to see them named"
        raise DataError(source.where, what, fix)

    fits = (values[:, : len(kept)] == [*kept.values()]).all(axis=1)
    held_out = source.held_out
    if held_out is None:
        held_out = np.arange(source.count) % 20 == 19
    train = np.flatnonzero(fits & ~damaged & ~held_out)
    held_out = np.flatnonzero(fits & ~damaged & held_out)
    text = f"{len(train):,} faces ({len(held_out):,} held out), {img_size}x{img_size}"
    text += f", {CROPS[source.crop]}, from {source.where}{source.remark}"
    text += f", left out: {damaged.sum():,} damaged" if damaged.any() else ""
    if kept:
        words = [name if value == 1 else f"not {name}" for name, value in kept.items()]
        text += f": the {fits.sum():,} of {len(fits):,} with {', '.join(words)}"
        if len(train) == 0:
            raise DataError("--only", f"leaves {text}", "ask for less at a time")
    values = values[:, len(kept) :].astype(np.float32)
    about = checksum, tuple(names), source.crop
    return Faces(images, values, train, held_out, key, text, *about)


def _find_names(flag: str, names: Sequence[str], source: Source) -> list[str]:
    """`match_names` among the attributes of a source. Raises DataError if that has none."""
    if names and source.attributes is None:
        fix = f"pass {flag} without names, put the images of each class in a folder of its own,"
        fix += " put list_attr_celeba.txt or .csv beside CelebA's images,"
        fix += f" or give --path_to_data {' or '.join(SOURCES)}"
        raise DataError(source.where, "has no attributes", fix)
    return match_names(flag, names, source.attribute_names)


def _key(source: Source, img_size: int) -> str:
    """The name of the prepared array of a source: part of the source's name, for readers, then a
    digest of all that the pixels depend on."""
    name = re.sub(r"[^\w.-]", "_", Path(source.where).absolute().stem)[:24]
    digest = hashlib.sha256(f"{PREPARATION} {source.listing}".encode()).hexdigest()[:16]
    return f"{name}_{img_size}_{digest}"


# ---- The batch of a step ----


class Batches:
    """The batches of a run, numbered 0, 1, ..., each a function of (seed, number) alone: a run is
    the same however its processes share them.

    An epoch is a permutation drawn from (seed, epoch), cut into batches. The images that are left
    over, fewer than a batch, come up in other epochs. If the images fit into a quarter of the free
    CUDA memory they stay there; otherwise a thread reads one batch ahead. stride: from one batch of
    this process to its next; horizontal_flip: mirror half of the images. Raises DataError if there
    are fewer images than a batch."""

    def __init__(
        self,
        faces: Faces,
        batch_size: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
        stride: int = 1,
        horizontal_flip: bool = True,
    ):
        self.faces, self.batch_size, self.seed = faces, batch_size, seed
        self.device, self.stride = torch.device(device), stride
        self.horizontal_flip = horizontal_flip
        self.per_epoch = len(faces.train) // batch_size
        if self.per_epoch == 0:
            what = f"{batch_size} is more than the {len(faces.train)} faces to train on"
            raise DataError("--batch_size", what, "lower it, or add images")
        self.attributes = torch.from_numpy(faces.attributes[faces.train]).to(self.device)
        self.cuda = self.device.type == "cuda"
        self.resident = self._move_to_device() if self.cuda else None
        self.epoch, self.order = -1, np.empty(0, np.int64)  # the permutation of one epoch
        self.thread, self.ahead = ThreadPoolExecutor(1), {}  # number -> Future of `_read`

    @property
    def description(self) -> str:
        """One line for the log: the images, and whether they are mirrored."""
        mirrored = "half of them mirrored" if self.horizontal_flip else "none mirrored"
        return f"{self.faces.description}, {mirrored}"

    def __call__(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Return x_0, (B, 3, H, W) float32 in [-1, 1], and the attributes, (B, K) float32, or None
        if K is 0."""
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
        """Return which images and whether they are mirrored, (2, B) int64, and their pixels,
        (B, H, W, 3) uint8, or None if the device has them. For CUDA both are in pinned memory, so
        that the copy does not block."""
        epoch, turn = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            random = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order = epoch, random.permutation(len(self.faces.train))
        places = self.order[turn * self.batch_size : (turn + 1) * self.batch_size]
        # The 1 keeps these apart from the permutations: trailing zeros would not count.
        mirrored = np.random.default_rng([self.seed, number, 0, 1]).random(len(places)) < 0.5
        mirrored &= self.horizontal_flip
        picks, pixels = torch.from_numpy(np.stack([places, mirrored])), None
        if self.resident is None:
            pixels = torch.from_numpy(self.faces.images[self.faces.train[places]])
        if self.cuda:
            picks, pixels = picks.pin_memory(), None if pixels is None else pixels.pin_memory()
        return picks, pixels


def drop_attributes(attributes: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Set some attributes, (B, K), to 0 (not said): for a `share` of the images all of them, so
    that the network also learns without (Ho and Salimans 2022), and for half of the other images
    each with probability 1/2, so that any one can be given alone."""
    options = dict(generator=generator, device=attributes.device)
    face = torch.rand(len(attributes), 1, **options)
    coin = torch.rand(attributes.shape, **options) < 0.5
    return attributes * ((face >= share) & (coin | (face >= (1 + share) / 2)))
