"""Distances between sets of images, nearest neighbours and the held-out loss, against closed forms
and searches of all pairs."""

import numpy as np
import pytest
import torch
from conftest import tiny

from diffusion import Diffusion
from engine.state import unet_arguments
from metrics import (
    copies,
    frechet_distance,
    held_out_loss,
    kernel_distance,
    nearest,
    nearest_pixels,
    nearest_vectors,
)
from samplers import even_timesteps
from unet import UNet


def vectors(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(6, 6))
    return (random.normal(shift, 1, (count, 6)) @ mix).astype(np.float32)


def random_images(count: int, seed: int = 0, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


# Distances ---------------------------------------------------------------------------------------


def test_frechet_distance_equals_its_closed_form():
    """If b is twice a, moved, then its covariance is four times C, and the traces leave one C."""
    a = vectors(200, 0)
    b = 2 * a + np.arange(6, dtype=np.float32)
    moved = (b - a).astype(np.float64).mean(0)
    expected = moved @ moved + np.trace(np.cov(a.astype(np.float64), rowvar=False))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert abs(frechet_distance(a, a)) < 1e-6


def closed_kernel(a: np.ndarray, b: np.ndarray) -> float:
    """Binkowski et al. 2018: k(x, y) = (x y / d + 1)^3, without the pairs of one with itself."""
    a, b = a.astype(np.float64), b.astype(np.float64)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * kernel(a, b).mean()


def test_kernel_distance_equals_its_closed_form():
    a, b = vectors(100, 0), vectors(100, 1, 0.3)
    mean, deviation = kernel_distance(a, b)  # each subset is the whole
    assert mean == pytest.approx(closed_kernel(a, b), rel=1e-9) and deviation < 1e-9 * abs(mean)


def test_kernel_distance_is_the_same_twice_and_leaves_the_random_state_alone():
    a, b = vectors(60, 0), vectors(50, 1)
    torch.manual_seed(5)
    first = kernel_distance(a, b, subset_size=20)
    following = torch.rand(())
    torch.manual_seed(6)
    assert kernel_distance(a, b, subset_size=20) == first and first[1] > 0
    torch.manual_seed(5)
    assert torch.rand(()) == following


# Nearest -----------------------------------------------------------------------------------------


def test_planted_image_is_found_at_distance_0_in_parts_of_the_search(monkeypatch):
    """So memory grows neither with the queries nor with the reference."""
    reference, queries, parts, search = random_images(5000), random_images(300, 1), [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b: parts.append((len(a), len(b))) or search(a, b))
    indices = np.arange(1, 5000)
    queries[2], queries[4] = reference[4500], reference[17][:, ::-1]  # one of them mirrored
    places, distances = nearest_pixels(queries, reference, indices)
    assert indices[places[2, 0]] == 4500 and indices[places[4, 0]] == 17
    assert distances[2, 0] == distances[4, 0] == 0 and (distances[[0, 1, 3, 5]] > 1).all()
    assert copies(distances)["copies"] == pytest.approx(2 / 300)
    assert max(parts) == (256, 4096)


def test_nearest_equals_a_search_of_all_pairs():
    queries, reference = vectors(7, 0), vectors(300, 1)
    mirrored = vectors(7, 2)
    blocks = torch.from_numpy(reference).split([100, 1, 199])
    both = [torch.from_numpy(each).split(3) for each in (queries, mirrored)]
    found, distances = nearest(zip(*both, strict=True), lambda: blocks)
    pairs = [
        np.linalg.norm(q[:, None].astype(float) - reference, axis=2) for q in (queries, mirrored)
    ]
    expected = np.minimum(*pairs)
    assert (found == expected.argsort(axis=1)[:, :2]).all()
    assert distances == pytest.approx(np.sort(expected, axis=1)[:, :2], rel=1e-6)


def test_nearest_by_vectors_finds_a_mirrored_image():
    reference, queries, mirrored = vectors(40, 0), vectors(3, 1), vectors(3, 2)
    mirrored[1] = reference[30]
    found, distances = nearest_vectors(queries, mirrored, reference)
    assert found[1, 0] == 30 and distances[1, 0] == 0 and distances[0, 0] > 0


def test_mirrored_images_count_only_if_training_mirrored():
    reference, queries = random_images(9), random_images(1, seed=1)
    queries[0] = reference[4][:, ::-1]
    indices = np.arange(9)
    assert nearest_pixels(queries, reference, indices)[1][0, 0] == 0
    assert nearest_pixels(queries, reference, indices, mirror=False)[1][0, 0] > 0


def test_share_of_copies_counts_those_far_nearer_than_the_second():
    distances = np.array([[1.0, 4.0], [1.0, 2.0], [0.0, 0.0], [3.0, 9.1]])
    said = copies(distances)
    assert said["copies"] == 0.75 and said["median_distance"] == 1.0


# The held-out loss -------------------------------------------------------------------------------

SPREAD = 0.25  # standard deviation of the pixels of a toy image, which are independent


def toy_images(count: int, side: int = 16) -> np.ndarray:
    pixels = np.random.default_rng(0).normal(127.5, 127.5 * SPREAD, (count, side, side, 3))
    return pixels.round().clip(0, 255).astype(np.uint8)


def no_attributes(images: np.ndarray) -> np.ndarray:
    return np.empty((len(images), 0), np.float32)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_loss_of_the_exact_network_equals_the_closed_form(prediction):
    diffusion, images = Diffusion(100, "cosine", prediction), toy_images(64)

    def network(x_t, t):  # the mean of what the output could be, given x_t
        alpha_bar = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_0 = alpha_bar.sqrt() * SPREAD**2 * x_t / (alpha_bar * SPREAD**2 + 1 - alpha_bar)
        eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0
        return eps if prediction == "eps" else v

    loss = held_out_loss(network, diffusion, images, no_attributes(images), draws=16)
    alpha_bar = diffusion.schedule
    error = SPREAD**2 * (1 - alpha_bar) / (alpha_bar * SPREAD**2 + 1 - alpha_bar)  # of x_0
    expected = error / (1 - alpha_bar) * (alpha_bar if prediction == "eps" else 1)
    assert loss.dtype == torch.float64
    assert loss.numpy() == pytest.approx(expected.numpy(), rel=0.1, abs=1e-5)


def network() -> UNet:
    torch.manual_seed(0)
    model = UNet(**unet_arguments(tiny(dropout=0.5)))
    for weights in model.parameters():
        weights.data.add_(torch.randn_like(weights) * 0.05)
    return model


def test_loss_is_the_same_twice_in_any_batch_size_and_leaves_the_mode_alone():
    diffusion, model, images = Diffusion(50), network(), toy_images(5, 8)
    options = dict(timesteps=even_timesteps(50, 7), draws=3)
    a, b, c = (
        held_out_loss(model, diffusion, images, no_attributes(images), batch_size=size, **options)
        for size in (64, 64, 4)
    )
    assert torch.equal(a, b) and torch.allclose(a, c, rtol=1e-4) and a.shape == (7,)
    assert model.training


def test_attributes_go_with_their_faces():
    """A network that is told each image's mean grey can use it; told another's, it cannot."""
    diffusion = Diffusion(50, prediction="eps")
    images = np.repeat(np.arange(0, 250, 50, np.uint8), 8 * 8 * 3).reshape(5, 8, 8, 3)
    greys = images[:, :1, 0, 0].astype(np.float32) / 127.5 - 1

    def told(x_t, t, attributes):
        signal, noise = diffusion.coefficients(t)
        return (x_t - signal * attributes[:, :1, None, None]) / noise

    right = held_out_loss(told, diffusion, images, greys, draws=3)
    wrong = held_out_loss(told, diffusion, images, greys[::-1].copy(), draws=3)
    assert right.max() < 1e-6 < wrong.mean()
