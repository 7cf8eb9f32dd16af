"""The samplers against diffusers' schedulers, against the exact network, and their table."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from exact import Gaussian
from torch import nn

from diffusion import Diffusion, image_generators
from samplers import SAMPLERS, SIGMA_MAX, check_sampler, even_timesteps, is_deterministic
from system.errors import UsageError

THEIRS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
SHAPE = (2, 3, 4, 4)


def make(schedule="cosine", num_timesteps=1000):
    return Diffusion(num_timesteps, schedule, "eps", dtype=torch.float64)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule, steps", [("linear", 11), ("cosine", 11), ("cosine", 41)])
@pytest.mark.parametrize(
    "sampler, T, eta", [("ddpm", 50, 0), *(("ddim", 41, eta) for eta in (0, 0.7, 1))]
)
def test_ddpm_and_ddim_equal_diffusers(sampler, T, eta, schedule, steps):
    """Also if the prediction is clipped, as it often is for images of such a deviation."""
    d = make(schedule, T)
    model = Gaussian(d, deviation=0.8)
    timesteps = [int(t) for t in reversed(even_timesteps(T, steps))]
    options = {}
    if sampler == "ddpm":
        theirs = DDPMScheduler(T, variance_type="fixed_small")
        theirs.one = torch.tensor(1.0).double()
        theirs.set_timesteps(timesteps=timesteps)
    else:
        theirs = DDIMScheduler(T)
        theirs.final_alpha_cumprod = torch.tensor(1.0).double()
        theirs.num_inference_steps = T // (timesteps[0] - timesteps[1])  # for our timesteps
        options = {"eta": eta, "use_clipped_model_output": True}
    theirs.alphas_cumprod = d.alphas_cumprod
    ours = d.sample(model, SHAPE, sampler=sampler, steps=steps, eta=eta, generator=seeded())
    g = seeded()
    x = torch.randn(*SHAPE, generator=g, dtype=torch.float64)
    for t in timesteps:
        out = theirs.step(model(x, torch.tensor([t])), t, x, generator=g, **options)
        x = out.prev_sample
    image = out.pred_original_sample
    assert image.abs().max() == 1
    torch.testing.assert_close(ours, image, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_dpm_solver_equals_diffusers(schedule, steps):
    d = make(schedule)
    model = Gaussian(d)
    noise = torch.randn(*SHAPE).double()
    states = list(d.sample_loop(model, SHAPE, sampler="dpm++", steps=steps, x_T=noise))
    theirs = DPMSolverMultistepScheduler(
        1000,
        beta_schedule=THEIRS[schedule],
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="heun",
        final_sigmas_type="zero",
        lower_order_final=False,
        euler_at_final=True,
    )
    theirs.set_timesteps(steps)
    log_sigmas = np.log(1 / d.schedule.numpy() - 1) / 2
    levels = np.linspace(min(math.log(SIGMA_MAX), log_sigmas[-1]), log_sigmas[0], steps)
    theirs.sigmas = torch.tensor(np.append(np.exp(levels), 0.0))
    theirs.timesteps = torch.arange(steps)
    x = noise
    for i in range(steps):
        torch.testing.assert_close(states[i][1], x, rtol=1e-5, atol=1e-5)
        x = theirs.step(model(x, torch.tensor([states[i][0]])), i, x).prev_sample
    torch.testing.assert_close(states[-1][2], x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler, steps", [("ddpm", 1000), ("ddim", 1000), ("dpm++", 25)])
def test_samplers_generate_the_distribution_of_the_exact_network(sampler, steps):
    d = make()
    x = d.sample(Gaussian(d), (3000, 1, 1, 1), sampler=sampler, steps=steps, eta=0.0)
    assert abs(x.mean() - 0.1) < 0.015 and abs(x.std() - 0.2) < 0.012


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_any_number_of_steps_gives_that_many_evaluations_from_noise_to_image(sampler, steps):
    d = make(num_timesteps=50)
    model = Gaussian(d)
    moves = [np.float32(t) for t, *_ in d.sample_loop(model, SHAPE, sampler=sampler, steps=steps)]
    assert len(model.times) == len(moves) == len(set(moves)) == steps
    assert model.times == sorted(model.times, reverse=True) == moves and model.times[0] > 45
    assert moves[0] == 49 or sampler == "dpm++"
    assert steps == 1 or moves[-1] == 0


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.scale = nn.Dropout(0.5), nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t):
        return self.drop(x) * self.scale


def test_sampling_is_without_dropout_and_gradients_and_leaves_the_mode_as_it_was():
    d, model = Diffusion(), Dropping()
    images = [d.sample(model, SHAPE, steps=5, generator=seeded()) for _ in range(2)]
    assert torch.equal(*images) and not images[0].requires_grad and model.training
    for _ in d.sample_loop(model, SHAPE, steps=3):
        assert model.training and torch.is_grad_enabled()  # also between two moves
    model.eval()
    d.sample(model, SHAPE, steps=2)
    assert not model.training


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_i_is_the_same_in_any_batch(sampler):
    d, model = Diffusion(), Dropping().eval()
    options = dict(sampler=sampler, steps=6, eta=1.0 if SAMPLERS[sampler].takes_eta else 0.0)
    together = d.sample(model, (5, 3, 4, 4), generator=image_generators(7, range(5)), **options)
    for i in range(5):
        alone = d.sample(model, (1, 3, 4, 4), generator=image_generators(7, [i]), **options)
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-6)
    assert not torch.equal(together[0], together[1])
    other = d.sample(model, (5, 3, 4, 4), generator=image_generators(8, range(5)), **options)
    assert not torch.equal(together, other)


# The table ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, eta", [*((name, 0.0) for name in SAMPLERS), ("ddim", 1.0)])
def test_same_noise_gives_the_same_image_where_the_table_says_so(sampler, eta):
    d = make(num_timesteps=50)
    options = dict(sampler=sampler, steps=8, eta=eta, x_T=torch.randn(*SHAPE))
    a, b = (d.sample(Gaussian(d), SHAPE, generator=seeded(s), **options) for s in (1, 2))
    assert torch.equal(a, b) == is_deterministic(sampler, eta)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("heun!", 20), "--sampler: is 'heun!'. Fix: choose from ddpm, ddim"),
        (("dpm++", 0), "--steps: is 0"),
        (("ddim", 51, 0.0, 50), "--steps: is 51. Fix: give at most 50 for ddim"),
        (("ddim", 20, 1.5), "--eta: is 1.5"),
        (("dpm++", 20, 0.5), "--eta: dpm.. does not take it"),
    ],
)
def test_what_a_sampler_cannot_do_is_refused(arguments, said):
    with pytest.raises(UsageError, match=said):
        check_sampler(*arguments)
    check_sampler("dpm++", 51, 0.0, 50)  # it may take more steps than there are timesteps
