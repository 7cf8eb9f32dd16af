"""How good a network and its images are.

Distances between sets of feature vectors: Frechet distance (FID, Heusel et al. 2017), kernel
distance (KID, Binkowski et al. 2018). Nearest neighbours, to find copies (Yoon et al. 2023). The
loss on held-out faces.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm, trange

from diffusion import Diffusion, draw_noise, evaluate_model, evaluating, image_generators
from utils import to_x_0

QUERIES = {"cpu": 256, "cuda": 8192}  # images whose neighbours are searched at a time
BLOCK = 4096  # reference images at a time
COPY = 1 / 3  # an image is a copy if its nearest is that much nearer than its second nearest


# Distances ---------------------------------------------------------------------------------------


class _Vectors(nn.Module):
    """Takes the place of torchmetrics' network, because the vectors are computed already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors


def _measure(metric: nn.Module, a: np.ndarray, b: np.ndarray):
    metric.update(torch.tensor(a, dtype=torch.float64), real=True)  # copies: cached ones are mapped
    metric.update(torch.tensor(b, dtype=torch.float64), real=False)
    return metric.compute()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The distance between the normal distributions fitted to vectors a (N, D) and b (M, D), in
    float64; for Inception's features it is FID (Heusel et al. 2017 eq. 6)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    # Rank 0 measures alone, so the metric must not wait for the other processes.
    metric = FrechetInceptionDistance(_Vectors(a.shape[1]), sync_on_compute=False)
    return float(_measure(metric, a, b))


def kernel_distance(a: np.ndarray, b: np.ndarray, subset_size: int = 1000) -> tuple[float, float]:
    """The squared maximum mean discrepancy of vectors a (N, D) and b (M, D) under the cubic kernel,
    unbiased: mean and standard deviation over 100 random subsets (Binkowski et al. 2018)."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, len(a), len(b))
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # it keeps all vectors, which are small
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
    """The `keep` vectors nearest to each query or its mirror image, nearest first: indices and
    Euclidean distances, (Q, keep).

    queries: batches of vectors and of their mirror images, (q, D) float32 each; blocks: returns the
    vectors to search, in parts of (n, D) float32. Memory holds one batch and one part."""
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
        # cdist rounds, so take a few more candidates and compute their distances exactly.
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
    images: np.ndarray,
    reference: np.ndarray,
    indices: np.ndarray,
    device: str = "cpu",
    mirror: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` of images, (N, S, S, 3) uint8, among the reference images at `indices`, by pixels
    in [-1, 1]. mirror: or of their mirror images. Returns places in `indices`."""

    def flat(images: np.ndarray) -> Tensor:
        return to_x_0(torch.from_numpy(np.ascontiguousarray(images)).to(device)).flatten(1)

    def blocks() -> Iterator[Tensor]:
        for start in range(0, len(indices), BLOCK):
            yield flat(reference[indices[start : start + BLOCK]])

    size = QUERIES[torch.device(device).type]
    starts = tqdm(range(0, len(images), size), "nearest by pixels", disable=None)
    batches = (images[start : start + size] for start in starts)
    pairs = ((flat(batch), flat(batch[:, :, ::-1] if mirror else batch)) for batch in batches)
    return nearest(pairs, blocks)


def nearest_vectors(
    vectors: np.ndarray, mirrored: np.ndarray, reference: np.ndarray, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` of vectors (N, D), and those of the mirrored images, among reference vectors
    (M, D), all float32."""

    def batches(vectors: np.ndarray, size: int) -> Iterator[Tensor]:
        for start in range(0, len(vectors), size):
            yield torch.from_numpy(vectors[start : start + size]).to(device)

    size = QUERIES[torch.device(device).type]
    both = zip(batches(vectors, size), batches(mirrored, size), strict=True)
    queries = tqdm(both, "nearest by features", math.ceil(len(vectors) / size), disable=None)
    return nearest(queries, lambda: batches(reference, BLOCK))


def copies(distances: np.ndarray) -> dict[str, float]:
    """From the distances to the nearest and the second nearest, (N, 2): the share of copies (the
    nearest is less than a third as far as the second), and medians of the ratio and the nearest."""
    ratio = distances[:, 0] / np.maximum(distances[:, 1], 1e-12)
    return {
        "copies": float((ratio < COPY).mean()),
        "median_ratio": float(np.median(ratio)),
        "median_distance": float(np.median(distances[:, 0])),
    }


# The held-out loss --------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(
    model: Callable,
    diffusion: Diffusion,
    images: np.ndarray,
    attributes: np.ndarray,
    timesteps: Tensor | None = None,
    draws: int = 2,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    show: bool = False,
) -> Tensor:
    """The training loss at each of `timesteps` (None: all), averaged over `draws` images each.

    images: (N, S, S, 3) uint8; attributes: (N, K), K may be 0; dtype: half precision to run in, or
    None; show: a progress bar. The image and the noise of a draw depend only on its number, so two
    networks are measured on the same draws. Returns (number of timesteps,) float64."""
    device = diffusion.device
    timesteps = torch.arange(diffusion.num_timesteps) if timesteps is None else timesteps
    all_t = timesteps.repeat_interleave(draws)
    losses = []
    for start in trange(0, len(all_t), batch_size, desc="held-out loss", disable=not show):
        t = all_t[start : start + batch_size].to(device)
        numbers = range(start, start + len(t))
        indices = np.arange(start, start + len(t)) % len(images)
        x_0 = to_x_0(torch.from_numpy(images[indices])).to(device, diffusion.dtype)
        eps = draw_noise(x_0.shape, image_generators(0, numbers), device, x_0.dtype)
        chosen = torch.from_numpy(attributes[indices]).to(device) if attributes.shape[1] else None
        with evaluating(model), torch.autocast(device.type, dtype, enabled=dtype is not None):
            output = evaluate_model(model, diffusion.q_sample(x_0, t, eps), t, chosen)
        error = output.to(x_0.dtype) - diffusion.target(x_0, t, eps)
        losses.append(error.square().mean((1, 2, 3)).cpu().double())
    return torch.cat(losses).view(len(timesteps), draws).mean(1)
