"""Images as vectors, and the distances between sets of vectors: Frechet distance (FID, Heusel et
al. 2017), kernel distance (KID, Binkowski et al. 2018), nearest neighbours (Yoon et al. 2023).

    features = find_features("inception")               # or "module:callable", or "none"
    vectors = features.of(images)                       # (N, S, S, 3) uint8 -> (N, D) float32
    frechet_distance(vectors, others), kernel_distance(vectors, others)
"""

import hashlib
import importlib
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm, trange

from dataset.prepared import PREPARED, load_array, save_array
from diffusion import Diffusion, draw_noise, evaluate_model, evaluating, image_generators
from system.errors import ResourceError, UsageError, is_out_of_memory
from system.terminal import warn
from utils import to_x_0

BATCH = 128  # images at a time, for the network
QUERIES = 256  # images at a time, to look for their nearest
BLOCK = 4096  # reference images at a time
COPY = 1 / 3  # nearest by this much nearer than the second nearest: as good as a copy


@dataclass(frozen=True)
class Features:
    """A function from uint8 images (B, 3, S, S) to vectors (B, D), and its name."""

    name: str
    function: Callable[[Tensor], Tensor]
    size: int = 0  # pixels that the images are resized to first; 0: as they are

    def of(self, images: np.ndarray, indices: np.ndarray | None = None) -> np.ndarray:
        """(N, D) float32 of images (N, S, S, 3) uint8, or of those at `indices`. Raises UsageError
        where the function does not give a vector for each."""
        indices = np.arange(len(images)) if indices is None else indices
        vectors = []
        for start in tqdm(range(0, len(indices), BATCH), f"{self.name} features", disable=None):
            batch = torch.from_numpy(images[indices[start : start + BATCH]]).permute(0, 3, 1, 2)
            vectors.append(self._of_batch(batch.contiguous()))
            first, last = vectors[0].shape[1], vectors[-1].shape[1]
            if first != last:
                raise self._wrong(f"gives vectors of {first} numbers, then of {last}")
        return np.concatenate(vectors)

    def _of_batch(self, batch: Tensor) -> np.ndarray:
        if self.size and self.size != batch.shape[-1]:
            size = (self.size, self.size)
            batch = F.interpolate(batch.float(), size, mode="bilinear", antialias=True)
            batch = batch.round().clamp(0, 255).to(torch.uint8)
        try:
            with torch.no_grad():
                vectors = self.function(batch)
        except (Exception, SystemExit) as error:  # somebody else's code
            if is_out_of_memory(error):
                raise
            raise self._wrong(f"fails on uint8 {tuple(batch.shape)}: {_reason(error)}") from error
        shape = tuple(getattr(vectors, "shape", ()))
        if not isinstance(vectors, Tensor) or len(shape) != 2 or shape[0] != len(batch):
            raise self._wrong(f"gives {shape or type(vectors).__name__}, not ({len(batch)}, D)")
        if shape[1] == 0 or vectors.is_complex():
            raise self._wrong(f"gives {shape} of {vectors.dtype}")
        vectors = vectors.detach().float()
        if not torch.isfinite(vectors).all():
            raise self._wrong("gives numbers that are not finite in float32")
        return vectors.cpu().numpy()

    def _wrong(self, what: str) -> UsageError:
        fix = "give a function from (B, 3, S, S) uint8 to (B, D) float32"
        return UsageError("--features", f"{self.name} {what}", fix)

    def cached(self, images: np.ndarray, indices: np.ndarray, key: str) -> np.ndarray:
        """`of(images, indices)`, kept on disk beside the prepared faces. key: names `images`.

        The file's name follows from the key, the indices, the size and what the function makes of
        a few fixed images, so that no other data, crop or network is ever mixed up with it."""
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
            except ResourceError as error:  # on a disk that is read-only they are for this time
                warn(f"the features are not kept: {error}")
        return np.asarray(kept)


def find_features(spec: str, size: int = 0, device: str = "cpu") -> Features | None:
    """The features of this name: "inception" (FID's network, whose weights are fetched on first
    use), "none", or "module:callable", a function from uint8 (B, 3, S, S) to (B, D), or one without
    arguments that returns such a function.

    Raises UsageError where there is no such function, ResourceError where the weights cannot be
    had."""
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
    except (Exception, SystemExit) as error:  # somebody else's code
        raise UsageError("--features", f"{spec}: {_reason(error)}", fix) from error
    if not callable(function):
        raise UsageError("--features", f"{spec} is no function", fix)
    return Features(spec, function, size)


def _reason(error: BaseException) -> str:
    """What went wrong in somebody else's code, in one line."""
    return f"{type(error).__name__} {' '.join(str(error).split())}".strip()


def _inception(device: str) -> Callable[[Tensor], Tensor]:
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        model = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except OSError as error:  # urllib's errors are of this kind
        what = f"Inception's weights could not be fetched ({error})"
        fix = "connect once, or give --features module:callable, or --features none for the rest"
        raise ResourceError("--features", what, fix) from error
    model = model.to(device)
    return lambda images: model(images.to(device))


# Distances ---------------------------------------------------------------------------------------


class _Vectors(nn.Module):
    """Stands where torchmetrics expects a network: the vectors are there already. The main process
    measures alone, so the metrics are told not to ask the others."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors


def _measure(metric: nn.Module, a: np.ndarray, b: np.ndarray):
    metric.update(torch.tensor(a, dtype=torch.float64), real=True)  # copies: kept ones are mapped
    metric.update(torch.tensor(b, dtype=torch.float64), real=False)
    return metric.compute()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between the normal distributions fitted to vectors a (N, D) and b (M, D), in float64; FID
    where they are Inception's (Heusel et al. 2017 eq. 6)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    return float(
        _measure(FrechetInceptionDistance(_Vectors(a.shape[1]), sync_on_compute=False), a, b)
    )


def kernel_distance(a: np.ndarray, b: np.ndarray, subset_size: int = 1000) -> tuple[float, float]:
    """The squared maximum mean discrepancy of vectors a (N, D) and b (M, D) under the cubic kernel,
    unbiased: mean and standard deviation over 100 random subsets (Binkowski et al. 2018)."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, len(a), len(b))
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # that it keeps the vectors, which are small
        metric = KernelInceptionDistance(
            _Vectors(a.shape[1]), subsets=100, subset_size=size, sync_on_compute=False
        )
        torch.manual_seed(0)
        mean, deviation = _measure(metric, a, b)
    return float(mean), float(deviation)


def measure_distances(reference: np.ndarray, sets: dict[str, np.ndarray]) -> dict:
    """The distances of each set of vectors to the reference."""
    result = {}
    for name, vectors in tqdm(sets.items(), "distances", disable=None):
        kernel, deviation = kernel_distance(reference, vectors)
        frechet = frechet_distance(reference, vectors)
        result[name] = {"frechet": frechet, "kernel": kernel, "kernel_deviation": deviation}
    return result


def nearest(
    queries: Iterable[tuple[Tensor, Tensor]], blocks: Callable[[], Iterable[Tensor]], keep: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """The `keep` vectors nearest to each query or to its mirror image: indices and Euclidean
    distances, (Q, keep), nearest first.

    queries: batches of vectors and of their mirror images, (q, D) float32 each; blocks: returns the
    vectors to search, (n, D) float32 at a time. No more than a batch and a block are held."""
    results = [_nearest_of_batch(both, blocks(), keep) for both in queries]
    indices, distances = (torch.cat(each).cpu().numpy() for each in zip(*results, strict=True))
    return indices, distances


def _nearest_of_batch(
    both: tuple[Tensor, Tensor], blocks: Iterable[Tensor], keep: int
) -> tuple[Tensor, Tensor]:
    best = torch.empty((len(both[0]), 0), dtype=torch.float64, device=both[0].device)
    found = torch.empty_like(best, dtype=torch.int64)
    first = 0
    for block in blocks:
        rough = torch.minimum(*(torch.cdist(vectors, block) for vectors in both))
        # The product behind cdist rounds: a few more than asked for, then exactly.
        picks = rough.topk(min(keep + 2, len(block)), largest=False).indices
        for pick in picks.unbind(1):
            exact = [(vectors - block[pick]).double().norm(dim=1) for vectors in both]
            best = torch.cat([best, torch.minimum(*exact)[:, None]], dim=1)
        found = torch.cat([found, picks + first], dim=1)
        best, order = best.sort(dim=1)
        best, found = best[:, :keep], found.gather(1, order)[:, :keep]
        first += len(block)
    return found, best


def nearest_pixels(
    images: np.ndarray, reference: np.ndarray, indices: np.ndarray, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` of images, (N, S, S, 3) uint8, among reference images at `indices`, by their pixels
    in [-1, 1]; what is found are places in `indices`."""

    def flat(images: np.ndarray) -> Tensor:
        return to_x_0(torch.from_numpy(np.ascontiguousarray(images)).to(device)).flatten(1)

    def blocks() -> Iterator[Tensor]:
        for start in range(0, len(indices), BLOCK):
            yield flat(reference[indices[start : start + BLOCK]])

    starts = tqdm(range(0, len(images), QUERIES), "nearest by pixels", disable=None)
    batches = (images[start : start + QUERIES] for start in starts)
    return nearest(((flat(batch), flat(batch[:, :, ::-1])) for batch in batches), blocks)


def nearest_vectors(
    vectors: np.ndarray, mirrored: np.ndarray, reference: np.ndarray, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` of vectors (N, D), or of those of the mirrored images, among reference ones (M, D),
    each float32."""

    def batches(vectors: np.ndarray, size: int) -> Iterator[Tensor]:
        for start in range(0, len(vectors), size):
            yield torch.from_numpy(vectors[start : start + size]).to(device)

    both = zip(batches(vectors, QUERIES), batches(mirrored, QUERIES), strict=True)
    queries = tqdm(both, "nearest by features", -(-len(vectors) // QUERIES), disable=None)
    return nearest(queries, lambda: batches(reference, BLOCK))


def copies(distances: np.ndarray) -> dict[str, float]:
    """What the distances to the nearest and the second nearest, (N, 2), say: the share of copies,
    whose nearest is less than a third as far as the second; medians of the ratio and the first."""
    ratio = distances[:, 0] / np.maximum(distances[:, 1], 1e-12)
    return {
        "copies": float((ratio < COPY).mean()),
        "median_ratio": float(np.median(ratio)),
        "median_distance": float(np.median(distances[:, 0])),
    }


def measure_images(faces, features, generated, real, device: str = "cpu") -> tuple[dict, list]:
    """The distances of all samplers' images, and the training faces nearest to the first one's.

    generated: `Generated` each; real: `evaluate.split_real`'s. Returns what evaluation.json says of
    them, and the nearest places, (N, 2), in faces.train: by pixels and, where there are any, by
    features."""
    floor, reference = real
    held_out = floor[np.isin(floor, faces.held_out)]
    samplers = {one.name: {"seconds": one.seconds} for one in generated}
    sets = {"generated": generated[0].images}
    if len(held_out):
        sets["held out"] = faces.images[held_out]
    near, found = {}, []
    for name, images in sets.items():
        places, distances = nearest_pixels(images, faces.images, faces.train, device)
        near[f"{name}, by pixels"] = copies(distances)
        found.append(places)
    found = found[:1]
    if features:
        chosen = np.concatenate([reference, floor])
        vectors = features.cached(faces.images, chosen, faces.key)
        first, rest = vectors[: len(reference)], vectors[len(reference) :]
        by_sampler = {one.name: features.of(one.images) for one in generated}
        by_set = {"generated": by_sampler[generated[0].name]}
        by_set["held out"] = rest[np.isin(floor, faces.held_out)]
        by_sampler["real faces (the floor)"] = rest
        for name, values in measure_distances(first, by_sampler).items():
            samplers[name] = samplers.get(name, {}) | values
        trained_on = np.flatnonzero(np.isin(chosen, faces.train))
        for name, images in sets.items():
            mirrored = features.of(images[:, :, ::-1])
            rows, distances = nearest_vectors(by_set[name], mirrored, vectors[trained_on], device)
            near[f"{name}, by features"] = copies(distances)
            if name == "generated":
                found.append(np.searchsorted(faces.train, chosen[trained_on][rows]))
    return {"samplers": samplers, "nearest": near}, found


# The held-out loss --------------------------------------------------------------------------------


class HeldOutLoss(NamedTuple):
    """What `held_out_loss` returns; each tensor float64, (number of timesteps,)."""

    timesteps: Tensor  # int64
    loss: Tensor  # the training loss at that t, mean over the draws
    bits: Tensor  # bits per dimension of the bound's term at that t, mean over the draws
    bits_variance: Tensor  # of that mean
    prior_bits: float  # L_T

    def bits_per_dim(self) -> tuple[float, float]:
        """The bound and its standard error, where `timesteps` are all of them."""
        return float(self.bits.sum()) + self.prior_bits, float(self.bits_variance.sum().sqrt())

    def bands(self, count: int = 10) -> list[float]:
        """The mean loss in `count` equal parts of the timesteps, from little noise to much."""
        return [float(part.mean()) for part in self.loss.tensor_split(min(count, len(self.loss)))]


def float64(values: Tensor) -> Tensor:
    """Values in double precision; from Apple's GPU, which has none, on the CPU."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def decoder_bits(x_0: Tensor, mean: Tensor, sigma: float | Tensor) -> Tensor:
    """-log2 of the probability of the bin of one grey level around x_0 (Ho et al. 2020 eq. 13), for
    images in [-1, 1]; the outermost bins reach to infinity. Any shape."""

    def below(edge: Tensor) -> Tensor:  # the normal distribution function
        return 0.5 * (1 + torch.erf((edge - mean) / (sigma * math.sqrt(2))))

    x_0, mean = float64(x_0), float64(mean)
    upper = torch.where(x_0 > 0.999, 1.0, below(x_0 + 1 / 255))
    lower = torch.where(x_0 < -0.999, 0.0, below(x_0 - 1 / 255))
    return -(upper - lower).clamp(min=1e-12).log2()


def terms(
    model: Callable, diffusion: Diffusion, x_0: Tensor, t: Tensor, eps: Tensor, attributes=None
) -> tuple[Tensor, Tensor]:
    """The loss and the bound's term in bits per dimension of each image at its t, (B,) float64.

    x_0, eps: (B, C, H, W); t: (B,) int64; attributes: (B, K) or None."""
    x_t = diffusion.q_sample(x_0, t, eps)
    output = evaluate_model(model, x_t, t, attributes).to(x_t.dtype)
    loss = float64((output - diffusion.target(x_0, t, eps)).square()).mean((1, 2, 3))

    alpha_bar_t = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_0_pred, _ = diffusion.x_0_and_eps(output, x_t, alpha_bar_t)
    variance = float64(diffusion.posterior_log_variance_clipped[t]).exp()
    weight = float64(diffusion.posterior_mean_coef1[t]).square() / (2 * variance)
    kl = weight * float64((x_0 - x_0_pred).square()).mean((1, 2, 3)) / math.log(2)
    sigma = variance.sqrt().view(-1, 1, 1, 1)
    decoder = decoder_bits(x_0, x_0_pred, sigma).mean((1, 2, 3))
    return loss, torch.where(t.to(kl.device) == 0, decoder, kl)


def held_out_loss(
    model: Callable,
    diffusion: Diffusion,
    images: np.ndarray,
    attributes: np.ndarray,
    timesteps: Tensor | None = None,
    draws: int = 16,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    show: bool = False,
) -> HeldOutLoss:
    """The loss at each of `timesteps` (None: at all), over `draws` images each, taken in turn.

    images: (N, S, S, 3) uint8; attributes: (N, K), K may be 0; dtype: half precision to run in, or
    None; show: a progress bar. The image and the noise of a draw follow from its number alone: two
    calls agree bit for bit, and two networks are measured on the same."""
    device = diffusion.device
    timesteps = torch.arange(diffusion.num_timesteps) if timesteps is None else timesteps
    all_t = timesteps.repeat_interleave(draws)
    losses, bits = [], []
    for start in trange(0, len(all_t), batch_size, desc="held-out loss", disable=not show):
        t = all_t[start : start + batch_size].to(device)
        numbers = range(start, start + len(t))
        indices = np.arange(start, start + len(t)) % len(images)
        pixels = torch.from_numpy(images[indices])
        x_0 = to_x_0(pixels, getattr(model, "image_channels", 3)).to(device, diffusion.dtype)
        eps = draw_noise(x_0.shape, image_generators(0, numbers), device, x_0.dtype)
        chosen = torch.from_numpy(attributes[indices]).to(device) if attributes.shape[1] else None
        autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
        with torch.no_grad(), evaluating(model), autocast:
            batch = terms(model, diffusion, x_0, t, eps, chosen)
        losses.append(batch[0].cpu())
        bits.append(batch[1].cpu())
    loss, bits = (torch.cat(part).view(len(timesteps), draws) for part in (losses, bits))
    variance = bits.var(1) / draws if draws > 1 else torch.full((len(bits),), math.nan)
    return HeldOutLoss(
        timesteps, loss.mean(1), bits.mean(1), variance, prior_bits(diffusion, images)
    )


def loss_at_all_t(
    model: Callable,
    diffusion: Diffusion,
    images: np.ndarray,
    attributes: np.ndarray,
    draws: int,
    show: bool = False,
) -> HeldOutLoss:
    """`held_out_loss` at every t. The first hundredth of them, those with least noise, have 16
    times as many draws: nearly all of the variance of the bits per dimension is theirs."""
    T = diffusion.num_timesteps
    parts = torch.arange(T).tensor_split([max(1, T // 100)])
    options = dict(images=images, attributes=attributes, show=show)
    losses = [
        held_out_loss(model, diffusion, timesteps=part, draws=times * draws, **options)
        for part, times in zip(parts, (16, 1), strict=True)
    ]
    *tensors, prior_bits = zip(*losses, strict=True)
    return HeldOutLoss(*map(torch.cat, tensors), prior_bits[0])


def prior_bits(diffusion: Diffusion, images: np.ndarray) -> float:
    """L_T in bits per dimension, over the first 256 images."""
    alpha_bar = float(diffusion.alphas_cumprod[-1])
    x_0 = to_x_0(torch.from_numpy(np.array(images[:256]))).double()
    kl = alpha_bar * x_0.square().mean() - alpha_bar - math.log1p(-alpha_bar)
    return float(kl) / 2 / math.log(2)
