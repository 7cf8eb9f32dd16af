"""The U-Net against diffusers' UNet2DModel, and against closed forms."""

import math

import pytest
import torch
from diffusers import UNet2DModel

from formats.diffusers_folder import to_diffusers
from unet import Attention, UNet, sinusoidal_embedding

SMALL = dict(img_size=16, channels=64, channel_mults=(1, 2), attn_resolutions=(8,), head_dim=32)


def make_small(**changes):
    """A small network with all its weights at random: none of the layers that start at zero."""
    torch.manual_seed(0)
    model = UNet(**{**SMALL, "dropout": 0.0, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def make_theirs(ours):
    """diffusers' network with our weights; every one of its weights is set."""
    config, weights = to_diffusers(ours)
    theirs = UNet2DModel(**config)
    theirs.load_state_dict(weights, strict=True)
    return theirs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel_mults": (1, 2, 2), "num_res_blocks": 1, "attn_resolutions": (16, 4)},
        {"channels": 32, "channel_mults": (1, 2, 4), "norm_groups": 16, "attn_resolutions": ()},
    ],
)
def test_output_and_gradients_equal_diffusers(changes):
    shape = {**SMALL, "num_res_blocks": 2, **changes}
    ours = make_small(**shape).double()
    theirs = make_theirs(ours).double()
    x = torch.randn(3, 3, shape["img_size"], shape["img_size"], dtype=torch.float64)
    t = torch.tensor([0, 17, 999])
    # The embedding of t is float32 in both, and the two compute it in another order.
    a, b = ours(x, t), theirs(x, t).sample
    assert a.std() > 0.01
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    a.square().sum().backward()
    b.square().sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in ours.parameters()])
    assert sum(p.numel() for p in theirs.parameters()) == len(gradients)
    total = sum(p.grad.square().sum() for p in theirs.parameters()).sqrt()
    torch.testing.assert_close(gradients.norm(), total, rtol=1e-4, atol=0)
    ours, theirs = ours.conv_in.weight.grad, theirs.conv_in.weight.grad
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_embedding_has_its_closed_form_also_between_integers():
    times = (0, 1, 2.5, 500)
    for row, t in zip(sinusoidal_embedding(torch.tensor(times), 8), times, strict=True):
        angles = [t / 10_000 ** (i / 3) for i in range(4)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_output_of_a_fresh_network_is_zero():
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(UNet(**SMALL)(x, torch.tensor([3, 9])), torch.zeros_like(x))


@pytest.mark.parametrize("img_size", [32, 128, 192, 256])
def test_every_size_builds_with_attention_and_nothing_else_given(img_size):
    with torch.device("meta"):
        model = UNet(img_size)
        out = model(torch.zeros(2, 3, img_size, img_size), torch.zeros(2))
    assert out.shape == (2, 3, img_size, img_size)
    assert any(isinstance(each, Attention) for each in model.modules())


def test_published_network_has_its_number_of_weights():
    with torch.device("meta"):
        model = UNet(64, attn_resolutions=(16,))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(78.7e6, rel=0.002)


def test_dropout_acts_in_training_only():
    model = make_small(dropout=0.5)
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([5])
    assert not torch.equal(model(x, t), model(x, t))
    model.eval()
    assert torch.equal(model(x, t), model(x, t))


@pytest.mark.parametrize("channels", [4, 8, 12, 32, 48, 64, 96, 128])
def test_time_reaches_the_output_of_a_network_of_any_width(channels):
    """Not where a group of the norm is one channel: its mean, and so the time, is taken away."""
    model = make_small(channels=channels, head_dim=channels).eval()
    assert all(
        m.num_channels >= 2 * m.num_groups for m in model.modules() if hasattr(m, "num_groups")
    )
    x = torch.randn(1, 3, 16, 16).expand(2, -1, -1, -1)
    early, late = model(x, torch.tensor([10, 900]))
    assert (early - late).abs().max() > 1e-3 * early.abs().max()


def test_attributes_of_zero_are_the_unconditional_network():
    model = make_small(num_attributes=3)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 6])
    assert torch.equal(model(x, t, torch.zeros(2, 3)), model(x, t))
    assert not torch.allclose(model(x, t, torch.ones(2, 3)), model(x, t))
