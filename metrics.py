"""How good a network and its images are.

Distances between sets of feature vectors: Frechet distance (FID, Heusel et al. 2017), kernel
distance (KID, Binkowski et al. 2018). Nearest neighbours, to find copies (Yoon et al. 2023). The
loss on held-out faces, and the bits per dimension of the variational bound (Ho et al. 2020, eq. 5):

    L_T        KL(q(x_T | x_0) || N(0, 1)): what is left of the image at the end
    L_{t-1}    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), here the term of the code's t >= 1
    L_0        -log p(x_0 | x_1), in bins of one grey level (eq. 13), the term of the code's t = 0

The variance of p is the posterior's, the smaller of the paper's two choices.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

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


class HeldOutLoss(NamedTuple):
    """Losses by timestep; each tensor is (number of timesteps,) float64."""

    timesteps: Tensor  # int64
    loss: Tensor  # the training loss at that t, mean over the draws
    bits: Tensor  # bits per dimension of the bound's term at that t, mean over the draws
    bits_variance: Tensor  # of that mean
    prior_bits: float  # L_T

    def bits_per_dim(self) -> tuple[float, float]:
        """The bound and its standard error, if `timesteps` are all of them."""
        return float(self.bits.sum()) + self.prior_bits, float(self.bits_variance.sum().sqrt())

    def bands(self, count: int = 10) -> list[float]:
        """The mean loss in `count` equal parts of the timesteps, from little noise to much."""
        return [float(part.mean()) for part in self.loss.tensor_split(min(count, len(self.loss)))]


def float64(values: Tensor) -> Tensor:
    """Values in double precision; on the CPU if they are on Apple's GPU, which has none."""
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
    """The loss at each of `timesteps` (None: all), averaged over `draws` images each.

    images: (N, S, S, 3) uint8; attributes: (N, K), K may be 0; dtype: half precision to run in, or
    None; show: a progress bar. The image and the noise of a draw depend only on its number, so two
    networks are measured on the same draws."""
    device = diffusion.device
    timesteps = torch.arange(diffusion.num_timesteps) if timesteps is None else timesteps
    all_t = timesteps.repeat_interleave(draws)
    losses, bits = [], []
    for start in trange(0, len(all_t), batch_size, desc="held-out loss", disable=not show):
        t = all_t[start : start + batch_size].to(device)
        numbers = range(start, start + len(t))
        indices = np.arange(start, start + len(t)) % len(images)
        pixels = torch.from_numpy(images[indices])
        x_0 = to_x_0(pixels).to(device, diffusion.dtype)
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
    """`held_out_loss` at every t. The first hundredth, which has the least noise, gets 16 times as
    many draws, because it has nearly all of the variance of the bits per dimension."""
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
