"""The held-out loss and the bits per dimension, against closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import nn

from diffusion import Diffusion, draw_noise, image_generators
from engine.state import unet_arguments
from metrics import HeldOutLoss, decoder_bits, held_out_loss, prior_bits, terms
from train import Config
from unet import UNet
from utils import to_x_0

SPREAD = 0.25  # standard deviation of the pixels of a toy image, which are independent


def toy_images(count: int, side: int = 16) -> np.ndarray:
    pixels = np.random.default_rng(0).normal(127.5, 127.5 * SPREAD, (count, side, side, 3))
    return pixels.round().clip(0, 255).astype(np.uint8)


def exact_network(diffusion: Diffusion):
    """The best output there is for toy images: the mean of what it could be, given x_t."""

    def network(x_t, t):
        alpha_bar = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_0 = alpha_bar.sqrt() * SPREAD**2 * x_t / (alpha_bar * SPREAD**2 + 1 - alpha_bar)
        eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        if diffusion.prediction == "eps":
            return eps
        return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0

    return network


def no_attributes(images: np.ndarray) -> np.ndarray:
    return np.empty((len(images), 0), np.float32)


def normal_below(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + torch.erf(torch.from_numpy(x) / math.sqrt(2)).numpy())


def closed_form_bits(diffusion: Diffusion) -> np.ndarray:
    """Each term of the bound for toy images and the exact network, by integrals in float64."""
    alpha_bar = diffusion._alphas_cumprod.numpy()
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    error = SPREAD**2 * (1 - alpha_bar) / (alpha_bar * SPREAD**2 + 1 - alpha_bar)  # of x_0
    variance = beta * (1 - before) / (1 - alpha_bar)
    weight = (beta * np.sqrt(before) / (1 - alpha_bar)) ** 2
    bits = np.empty(len(alpha_bar))
    bits[1:] = (weight * error)[1:] / (2 * variance[1:]) / math.log(2)
    # The decoder: over the grey levels and, by quadrature, over the noise.
    levels = np.arange(256) / 127.5 - 1
    share = np.diff(normal_below((np.arange(257) - 0.5 - 127.5) / 127.5 / SPREAD))
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    a = alpha_bar[0]
    x_1 = math.sqrt(a) * levels[:, None] + math.sqrt(1 - a) * nodes
    mean = math.sqrt(a) * SPREAD**2 * x_1 / (a * SPREAD**2 + 1 - a)
    sigma = math.sqrt(variance[1])
    upper = normal_below((levels[:, None] + 1 / 255 - mean) / sigma)
    lower = normal_below((levels[:, None] - 1 / 255 - mean) / sigma)
    cost = -np.log2(np.maximum(upper - lower, 1e-12))
    bits[0] = (share[:, None] * cost * weights / weights.sum()).sum() / share.sum()
    return bits


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("noise_schedule", ["linear", "cosine"])
def test_bits_per_dim_of_a_gaussian_toy_equal_the_closed_form(prediction, noise_schedule):
    diffusion = Diffusion(100, noise_schedule, prediction)
    images = toy_images(64)
    loss = held_out_loss(exact_network(diffusion), diffusion, images, no_attributes(images))
    expected = closed_form_bits(diffusion)
    assert loss.bits.numpy() == pytest.approx(expected, rel=0.1, abs=1e-4)  # each, as sampled
    bits, error = loss.bits_per_dim()
    assert bits == pytest.approx(expected.sum() + loss.prior_bits, rel=0.01)
    assert 0 < error < 0.03 and abs(bits - expected.sum() - loss.prior_bits) < 4 * error


def test_loss_of_a_gaussian_toy_equals_the_closed_form():
    diffusion = Diffusion(100, "cosine")
    images = toy_images(64)
    loss = held_out_loss(exact_network(diffusion), diffusion, images, no_attributes(images))
    alpha_bar = diffusion.alphas_cumprod.double()
    expected = alpha_bar * SPREAD**2 / (alpha_bar * SPREAD**2 + 1 - alpha_bar)
    assert loss.loss.numpy() == pytest.approx(expected.numpy(), rel=0.1, abs=1e-5)
    assert loss.bands(10)[0] == pytest.approx(float(expected[:10].mean()), rel=0.03)


def test_prior_bits_are_the_divergence_from_the_normal_distribution():
    diffusion = Diffusion(100, "linear")
    images = toy_images(256)
    alpha_bar = float(diffusion._alphas_cumprod[-1])
    q = torch.distributions.Normal(
        math.sqrt(alpha_bar) * to_x_0(torch.from_numpy(images)).double(), math.sqrt(1 - alpha_bar)
    )
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    assert prior_bits(diffusion, images) == pytest.approx(float(kl.mean()) / math.log(2), rel=1e-3)


@pytest.mark.parametrize("mean,sigma", [(0.0, 0.01), (0.3, 0.3), (-0.99, 0.05), (1.0, 0.002)])
def test_bins_of_the_decoder_add_up_to_one(mean, sigma):
    levels = torch.arange(256).double() / 127.5 - 1
    bits = decoder_bits(levels, torch.full((256,), mean), sigma)
    assert float((2.0**-bits).sum()) == pytest.approx(1, abs=1e-6)


def test_terms_hold_the_training_loss():
    diffusion = Diffusion(50, "cosine", "v")
    model = nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
    x_0, eps = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    t = torch.tensor([0, 30])
    loss, _ = terms(lambda x, t: model(x), diffusion, x_0, t, eps)
    output = model(diffusion.q_sample(x_0, t, eps))
    expected = F.mse_loss(output, diffusion.target(x_0, t, eps), reduction="none").mean((1, 2, 3))
    assert torch.allclose(loss, expected.double())


def network() -> UNet:
    torch.manual_seed(0)
    model = UNet(**unet_arguments(Config(**TINY, dropout=0.5)))
    for weights in model.parameters():
        weights.data.add_(torch.randn_like(weights) * 0.05)
    return model


def test_two_calls_agree_bit_for_bit_and_leave_the_mode_alone():
    diffusion, model, images = Diffusion(50), network(), toy_images(5, 8)
    options = dict(timesteps=diffusion.timesteps(7), draws=3)
    a, b = (
        held_out_loss(model, diffusion, images, no_attributes(images), **options) for _ in range(2)
    )
    assert torch.equal(a.loss, b.loss) and torch.equal(a.bits, b.bits)
    assert model.training and a.loss.shape == (7,) and isinstance(a, HeldOutLoss)


def test_batch_size_does_not_matter():
    diffusion, model, images = Diffusion(50), network(), toy_images(5, 8)
    sizes = (4, 64)
    a, b = (
        held_out_loss(model, diffusion, images, no_attributes(images), draws=2, batch_size=size)
        for size in sizes
    )
    assert torch.allclose(a.loss, b.loss, rtol=1e-4) and torch.allclose(a.bits, b.bits, rtol=1e-4)


def test_attributes_go_with_their_faces():
    """A network that is told each image's mean grey can use it; told another's, it cannot."""
    diffusion = Diffusion(50)
    images = np.repeat(np.arange(0, 250, 50, np.uint8), 8 * 8 * 3).reshape(5, 8, 8, 3)
    greys = images[:, :1, 0, 0].astype(np.float32) / 127.5 - 1

    def told(x_t, t, attributes):
        signal = diffusion.sqrt_alphas_cumprod[t].view(-1, 1, 1, 1)
        noise = diffusion.sqrt_one_minus_alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x_t - signal * attributes[:, :1, None, None]) / noise

    right = held_out_loss(told, diffusion, images, greys, draws=3)
    wrong = held_out_loss(told, diffusion, images, greys[::-1].copy(), draws=3)
    assert right.loss.max() < 1e-6 < wrong.loss.mean()


def test_worse_network_needs_more_bits():
    diffusion, images = Diffusion(100), toy_images(16)
    best = held_out_loss(exact_network(diffusion), diffusion, images, no_attributes(images))
    none = held_out_loss(lambda x, t: torch.zeros_like(x), diffusion, images, no_attributes(images))
    assert none.bits_per_dim()[0] > best.bits_per_dim()[0] + 1
    assert none.loss.numpy() == pytest.approx(1, abs=0.1)


def test_noise_of_a_draw_follows_from_its_number():
    images = toy_images(3, 8)
    diffusion, seen = Diffusion(50), []

    def spy(x_t, t):
        seen.append(x_t)
        return x_t

    held_out_loss(spy, diffusion, images, no_attributes(images), torch.tensor([20, 40]), draws=2)
    x_0 = to_x_0(torch.from_numpy(images[[0, 1, 2, 0]]))
    eps = draw_noise(x_0.shape, image_generators(0, range(4)), "cpu")
    assert torch.equal(seen[0], diffusion.q_sample(x_0, torch.tensor([20, 20, 40, 40]), eps))
