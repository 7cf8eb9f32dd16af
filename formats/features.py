"""What `--features` may name: functions from images to vectors, whose distributions are compared.

features = find_features("inception")               # or "module:callable", or "none"
vectors = features.of(images)                       # (N, S, S, 3) uint8 -> (N, D) float32
"""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dataset.prepared import PREPARED, load_array, save_array
from system.errors import ResourceError, UsageError, is_out_of_memory
from system.terminal import warn

BATCH = 128  # images in a batch


@dataclass(frozen=True)
class Features:
    """A function from uint8 images (B, 3, S, S) to vectors (B, D)."""

    name: str
    function: Callable[[Tensor], Tensor]
    size: int = 0  # pixels to which images are resized first; 0: not at all

    def of(self, images: np.ndarray, indices: np.ndarray | None = None) -> np.ndarray:
        """The vectors (N, D) float32 of images (N, S, S, 3) uint8, or of those at `indices`. Raises
        UsageError if the function does not return a vector for each."""
        indices = np.arange(len(images)) if indices is None else indices
        vectors = []
        for start in tqdm(range(0, len(indices), BATCH), f"{self.name} features", disable=None):
            batch = torch.from_numpy(images[indices[start : start + BATCH]]).permute(0, 3, 1, 2)
            vectors.append(self._of_batch(batch.contiguous()))
            first, last = vectors[0].shape[1], vectors[-1].shape[1]
            if first != last:
                raise self._wrong(f"returns vectors of {first} numbers, then of {last}")
        return np.concatenate(vectors)

    def _of_batch(self, batch: Tensor) -> np.ndarray:
        if self.size and self.size != batch.shape[-1]:
            size = (self.size, self.size)
            batch = F.interpolate(batch.float(), size, mode="bilinear", antialias=True)
            batch = batch.round().clamp(0, 255).to(torch.uint8)
        try:
            with torch.no_grad():
                vectors = self.function(batch)
        except (Exception, SystemExit) as error:  # the user's code
            if is_out_of_memory(error):
                raise
            raise self._wrong(f"fails on uint8 {tuple(batch.shape)}: {_reason(error)}") from error
        shape = tuple(getattr(vectors, "shape", ()))
        if not isinstance(vectors, Tensor) or len(shape) != 2 or shape[0] != len(batch):
            raise self._wrong(f"returns {shape or type(vectors).__name__}, not ({len(batch)}, D)")
        if shape[1] == 0 or vectors.is_complex():
            raise self._wrong(f"returns {shape} of {vectors.dtype}")
        vectors = vectors.detach().float()
        if not torch.isfinite(vectors).all():
            raise self._wrong("returns numbers that are not finite in float32")
        return vectors.cpu().numpy()

    def _wrong(self, what: str) -> UsageError:
        fix = "give a function from (B, 3, S, S) uint8 to (B, D) float32"
        return UsageError("--features", f"{self.name} {what}", fix)

    def cached(self, images: np.ndarray, indices: np.ndarray, key: str) -> np.ndarray:
        """`of(images, indices)`, cached on disk beside the prepared faces. key: names `images`.

        The file's name depends on the key, the indices, the size and the function's output for a
        few fixed images, so that data, crops and networks are never confused."""
        random = np.random.default_rng(0)
        fixed = random.integers(0, 256, (4, *images.shape[1:]), dtype=np.uint8)
        probe = self._of_batch(torch.from_numpy(fixed).permute(0, 3, 1, 2).contiguous())
        text = " ".join(f"{value:.3g}" for value in probe.flatten())  # rounded: threads differ
        parts = (key, self.size, len(indices), text)
        digest = hashlib.sha256(repr(parts).encode() + indices.tobytes()).hexdigest()[:16]
        name = f"{digest}_features_{key}"
        shape = (len(indices), probe.shape[1])
        kept = load_array(PREPARED / f"{name}.npy", shape, np.float32)
        if kept is None:
            kept = self.of(images, indices)
            try:
                save_array(name, shape, np.float32, [kept])
            except ResourceError as error:  # a read-only disk
                warn(f"the features are not cached: {error}")
        return np.asarray(kept)


def find_features(spec: str, size: int = 0, device: str = "cpu") -> Features | None:
    """Return the named features: "inception" (FID's network, downloaded at first use), "none", or
    "module:callable", a function from uint8 (B, 3, S, S) to (B, D) or one without arguments that
    returns such a function.

    Raises UsageError if there is no such function, ResourceError if the download fails."""
    if spec == "none":
        return None
    if spec == "inception":
        return Features(spec, _inception(device), size)
    module_name, colon, name = spec.partition(":")
    fix = "give inception, none, or module:callable, such as my_features:load"
    if not (module_name and colon and name):
        raise UsageError("--features", f"is {spec!r}", fix)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), name)
        needed = inspect.signature(function).parameters.values()
        if all(
            p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in needed
        ):
            function = function()
    except (Exception, SystemExit) as error:  # the user's code
        raise UsageError("--features", f"{spec}: {_reason(error)}", fix) from error
    if not callable(function):
        raise UsageError("--features", f"{spec} is not a function", fix)
    return Features(spec, function, size)


def _reason(error: BaseException) -> str:
    """What went wrong in the user's code, in one line."""
    return f"{type(error).__name__} {' '.join(str(error).split())}".strip()


def _inception(device: str) -> Callable[[Tensor], Tensor]:
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        model = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except OSError as error:  # urllib's errors are of this kind
        what = f"Inception's weights cannot be downloaded ({error})"
        fix = "connect once, give --features module:callable, or skip distances by --features none"
        raise ResourceError("--features", what, fix) from error
    model = model.to(device)
    return lambda images: model(images.to(device))
