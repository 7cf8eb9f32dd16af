"""The fast paths of a CPU against PyTorch's own layers and float64."""

import pytest
import torch
import torch.nn.functional as F

from diffusion import Diffusion
from system.cpu import LargeGroupNorm, column_sums, group_norm
from unet import UNet


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def native(x, groups, weight, bias):
    return F.group_norm(x.contiguous(), groups, weight, bias)


def gradients(function, x, groups, weight, bias, grad):
    """The output, and the gradients of x, weight and bias."""
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x, weight, bias))
    y = function(x, groups, weight, bias)
    y.backward(grad.to(y.dtype))
    return [y.detach(), x.grad, weight.grad, bias.grad]


def ours(x, groups, weight, bias):
    return group_norm(x, groups, weight, bias, 1e-5)


@pytest.mark.parametrize("shape, groups", [((3, 8, 4, 4), 4), ((2, 6, 5, 3), 6), ((1, 4, 1, 7), 2)])
def test_equals_pytorch_in_float64_with_its_gradients(shape, groups):
    torch.manual_seed(0)
    x = channels_last(torch.randn(shape).double() * 3 + 1)
    weight, bias = torch.randn(shape[1]).double(), torch.randn(shape[1]).double()
    mine = gradients(lambda *a: LargeGroupNorm.apply(*a, 1e-5), x, groups, weight, bias, x.cos())
    theirs = gradients(native, x, groups, weight, bias, x.cos())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert mine[0].is_contiguous(memory_format=torch.channels_last)
    assert mine[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("offset", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("side, unit", [(16, 1e-6), (32, 2**-7)], ids=["small", "large"])
def test_rounding_in_bfloat16_is_that_of_pytorch_or_of_bfloat16(side, unit, offset):
    """Small images go through float32; the gradients of large ones are sums of products that are
    rounded to bfloat16, each by up to 2**-9."""
    torch.manual_seed(0)
    x = torch.randn(4, 64, side, side) * torch.rand(64, 1, 1) + offset * torch.randn(64, 1, 1)
    x, grad = channels_last(x.bfloat16()), channels_last(torch.randn(x.shape).bfloat16())
    weight, bias = torch.randn(64), torch.randn(64)
    exact = gradients(native, x.double(), 32, weight.double(), bias.double(), grad)
    mine = gradients(ours, x, 32, weight, bias, grad)
    theirs = gradients(native, x, 32, weight, bias, grad)
    for a, b, true in zip(mine, theirs, exact, strict=True):
        error, usual = ((t.double() - true).norm() / true.norm() for t in (a, b))
        assert error < max(2 * usual, unit)
    assert mine[0].dtype == mine[1].dtype == torch.bfloat16
    assert mine[2].dtype == mine[3].dtype == torch.float32


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("rows", [7, 1024])
def test_column_sums_are_rounded_less_than_one_product_would_be(dtype, tolerance, rows):
    torch.manual_seed(0)
    x = (torch.rand(3, rows, 5) + 0.5).to(dtype)
    exact = x.double().sum(1)
    assert column_sums(x).dtype == torch.float32
    torch.testing.assert_close(column_sums(x).double(), exact, rtol=2 * tolerance, atol=0)


@pytest.mark.parametrize("side", [4, 32], ids=["small", "large"])
def test_constant_images_give_finite_numbers(side):
    """Their variance is 0, and may come out negative."""
    x = channels_last(torch.full((2, 8, side, side), 1.7).bfloat16())
    y, dx, *_ = gradients(ours, x, 4, torch.ones(8), torch.zeros(8), x)
    assert torch.isfinite(y).all() and torch.isfinite(dx).all()


@pytest.mark.parametrize(
    "dtype, of_loss, of_gradient", [(None, 1e-5, 1e-4), (torch.bfloat16, 0.01, 0.05)]
)
def test_fast_step_has_the_loss_and_gradient_of_a_plain_one_in_float64(dtype, of_loss, of_gradient):
    torch.manual_seed(0)
    options = dict(img_size=32, channels=32, channel_mults=(1, 2), attn_resolutions=(16,))
    fast, plain = UNet(**options, dropout=0.0), UNet(**options, dropout=0.0)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    plain.load_state_dict(fast.state_dict())
    plain = plain.double()  # in which nothing takes a fast path
    x_0, t = torch.rand(8, 3, 32, 32) * 2 - 1, torch.arange(0, 1000, 125)
    eps = torch.randn_like(x_0)
    x_t = Diffusion().q_sample(x_0, t, eps)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = fast(x_t, t)
    loss = F.mse_loss(output.float(), eps)
    loss.backward()
    exact = F.mse_loss(plain(x_t.double(), t), eps.double())
    exact.backward()
    assert abs(loss.item() - exact.item()) < of_loss * exact.item()
    ours, theirs = (
        torch.cat([p.grad.double().flatten() for p in model.parameters()])
        for model in (fast, plain)
    )
    assert (ours - theirs).norm() < of_gradient * theirs.norm()
