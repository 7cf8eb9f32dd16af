"""Muon against the published iteration and rule."""

import math

import pytest
import torch
from torch import nn

from optimizers import MOMENTUM, OPTIMIZERS, Muon, newton_schulz, orthogonal, split_parameters
from unet import UNet


def small_network():
    """A network of few weights, none of them zero."""
    torch.manual_seed(0)
    model = UNet(8, 8, (1, 2), 1, (4,), 8, dropout=0.0, norm_groups=4, num_attributes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def give_gradients(model, seed):
    """A gradient from random numbers to each weight."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(96, 864), (864, 96), (128, 128)])
@pytest.mark.parametrize("rank, smallest", [(96, 1e-6), (3, 1.0), (1, 1.0)])
def test_orthogonal_is_the_iteration_as_it_is_written(shape, rank, smallest):
    """Also if singular values are alike, tiny or zero, as for a batch of few images; on a CPU, in
    the form for full precision, and in the form for GPUs, in which equal shapes are one stack."""
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(side, rank, generator=generator).double() for side in shape]
    u, v = (torch.linalg.qr(side).Q for side in sides)
    matrix = u * torch.logspace(0, math.log10(smallest), rank, dtype=torch.float64) @ v.T
    wide = matrix if shape[0] <= shape[1] else matrix.T
    x = wide / wide.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    for batched in newton_schulz([wide, wide * 7], torch.float64):
        torch.testing.assert_close(batched, x, rtol=0, atol=1e-6)  # of the 1e-7 beside the norm
    expected = x if shape[0] <= shape[1] else x.T
    found = orthogonal([matrix.float() * 1e-4])[0].double()
    assert (found - expected).norm() < 1e-2 * expected.norm()
    assert (orthogonal([matrix * 1e-4])[0] - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_are_made_orthogonal_each_by_itself(dtype):
    shapes = [(8, 20), (5, 5), (20, 8), (8, 9), (30, 5)]  # some have as many rows, or columns
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    for together, matrix in zip(orthogonal(matrices, dtype), matrices, strict=True):
        (alone,), (exact,) = orthogonal([matrix], dtype), orthogonal([matrix])
        assert together.shape == matrix.shape and together.dtype == torch.float32
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
        assert float((together - exact).norm() / exact.norm()) < 0.05
    assert torch.equal(orthogonal([torch.zeros(4, 36)], dtype)[0], torch.zeros(4, 36))


def test_every_weight_is_learned_by_one_of_the_two():
    model = small_network()
    matrices, others = split_parameters(model)
    both = [id(p) for p in [*matrices, *others]]
    assert sorted(both) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.ndim >= 2 for p in matrices)
    ends = {"conv_in.weight", "conv_out.weight"}
    assert {names[id(p)] for p in others if p.ndim >= 2} == ends


def test_steps_are_those_of_the_published_rule():
    weight = nn.Parameter(torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
    before, momentum = weight.detach().clone().double(), torch.zeros(6, 18).double()
    optimizer = Muon([weight], [nn.Parameter(torch.zeros(1))], lr=0.01)
    for step in range(3):
        gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step + 1))
        weight.grad = gradient.clone()
        optimizer.step()
        flat = gradient.flatten(1).double()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * flat
        nesterov = MOMENTUM * momentum + (1 - MOMENTUM) * flat
        (update,) = orthogonal([nesterov], torch.float64)
        before -= 0.01 * 0.2 * 18**0.5 * update.view(weight.shape)
    torch.testing.assert_close(weight.detach(), before.float(), rtol=0, atol=1e-6)


def test_vectors_and_ends_are_learned_as_by_adamw():
    models = [small_network(), small_network()]
    optimizers = [
        OPTIMIZERS[name](model, 1e-3, torch.float32)
        for name, model in zip(("muon", "adamw"), models, strict=True)
    ]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            give_gradients(model, step)
            optimizer.step()
    matrices, _ = split_parameters(models[0])
    learned_by_muon = {id(p) for p in matrices}
    named = models[0].named_parameters()
    for (name, ours), theirs in zip(named, models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs) != (id(ours) in learned_by_muon), name


def test_a_gpu_skips_an_update_without_being_asked():
    """What is not finite is known to the device only, so the step is computed, and is zero."""
    models = [small_network(), small_network()]
    first, second = (OPTIMIZERS["muon"](model, 1e-3, torch.float32) for model in models)
    with torch.no_grad():
        for step, found in enumerate([0.0, 1.0, 0.0]):
            for model in models:
                give_gradients(model, step)
            if found:
                models[1].middle_block1.conv1.weight.grad.fill_(torch.nan)
            else:
                first._step_matrices(first.param_groups[1], None)
            second._step_matrices(second.param_groups[1], torch.tensor(found))
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
