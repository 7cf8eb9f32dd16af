"""The samplers against diffusers' schedulers, against the exact network, and their table."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import nn

from diffusion import Diffusion, image_generators
from samplers import SAMPLERS, SIGMA_MAX, check_sampler, even_timesteps, is_deterministic
from system.errors import UsageError

THEIRS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
SHAPE = (2, 3, 4, 4)


def alpha_bar_at(diffusion: Diffusion, t: torch.Tensor) -> float:
    """The share of the image's variance at a t that may lie between two timesteps."""
    log_sigmas = (1 / diffusion.schedule - 1).log().numpy() / 2
    at = np.interp(float(t[0]), np.arange(len(log_sigmas)), log_sigmas)
    return 1 / (1 + math.exp(2 * at))


class Gaussian(nn.Module):
    """The exact network for images that are normal with mean 0.1 and deviation 0.2 per pixel."""

    def __init__(self, diffusion, mean=0.1, deviation=0.2):
        super().__init__()
        self.diffusion, self.mean, self.deviation = diffusion, mean, deviation
        self.times = []

    def forward(self, x_t, t):
        self.times.append(float(t[0]))
        alpha_bar = alpha_bar_at(self.diffusion, t)
        gain = alpha_bar * self.deviation**2 / (alpha_bar * self.deviation**2 + 1 - alpha_bar)
        x_0 = self.mean + gain * (x_t / math.sqrt(alpha_bar) - self.mean)
        return (x_t - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)


def make(schedule="cosine", num_timesteps=1000):
    return Diffusion(num_timesteps, schedule, "eps", dtype=torch.float64)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [50, 11])
def test_ddpm_equals_diffusers(schedule, steps):
    d = make(schedule, 50)
    theirs = DDPMScheduler(50, beta_schedule=THEIRS[schedule], variance_type="fixed_small")
    theirs.alphas_cumprod, theirs.one = d.alphas_cumprod, torch.tensor(1.0).double()
    timesteps = [int(t) for t in reversed(even_timesteps(d.num_timesteps, steps))]
    theirs.set_timesteps(timesteps=timesteps)
    model = Gaussian(d)
    ours = d.sample(
        model, SHAPE, sampler="ddpm", steps=steps, generator=torch.Generator().manual_seed(3)
    )
    g = torch.Generator().manual_seed(3)
    x = torch.randn(*SHAPE, generator=g, dtype=torch.float64)
    for t in timesteps:
        x = theirs.step(model(x, torch.tensor([t])), t, x, generator=g).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "schedule, T, steps", [("linear", 41, 11), ("cosine", 41, 11), ("cosine", 30, 30)]
)
def test_ddim_equals_diffusers(schedule, T, steps, eta):
    d = make(schedule, T)
    theirs = DDIMScheduler(T, beta_schedule=THEIRS[schedule], clip_sample=True)
    theirs.alphas_cumprod = d.alphas_cumprod
    theirs.final_alpha_cumprod = torch.tensor(1.0).double()
    timesteps = [int(t) for t in reversed(even_timesteps(d.num_timesteps, steps))]
    stride = timesteps[0] - timesteps[1]
    theirs.num_inference_steps = T // stride  # so that its previous timestep is ours
    model = Gaussian(d)
    g = torch.Generator().manual_seed(3)
    ours = d.sample(model, SHAPE, sampler="ddim", steps=steps, eta=eta, generator=g)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(*SHAPE, generator=g, dtype=torch.float64)
    for t in timesteps:
        out = theirs.step(
            model(x, torch.tensor([t])), t, x, eta=eta, generator=g, use_clipped_model_output=True
        )
        x = out.prev_sample
    torch.testing.assert_close(
        ours, x if eta == 0 else out.pred_original_sample, rtol=1e-6, atol=1e-6
    )


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
    model = Gaussian(d)
    x = d.sample(model, (3000, 1, 1, 1), sampler=sampler, steps=steps, eta=0.0)
    assert abs(x.mean() - 0.1) < 0.015 and abs(x.std() - 0.2) < 0.012


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_any_number_of_steps_gives_that_many_evaluations_from_noise_to_image(sampler, steps):
    d = make(num_timesteps=50)
    model = Gaussian(d)
    moves = [np.float32(t) for t, *_ in d.sample_loop(model, SHAPE, sampler=sampler, steps=steps)]
    assert len(model.times) == steps
    assert model.times == sorted(model.times, reverse=True) and model.times[0] > 45
    assert moves == sorted(set(moves), reverse=True) and set(moves) <= set(model.times)
    assert len(moves) == steps and (moves[0] == 49 or sampler == "dpm++")
    assert steps == 1 or model.times[-1] == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exact_noise_gives_the_image_back(sampler):
    d = make()
    x_0 = torch.rand(*SHAPE).double() * 2 - 1

    def model(x_t, t):
        alpha_bar = alpha_bar_at(d, t)
        return (x_t - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)

    torch.testing.assert_close(d.sample(model, SHAPE, sampler=sampler, steps=10), x_0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_of_a_wild_network_stay_bounded_and_consistent(sampler):
    d = make()
    torch.manual_seed(0)

    def wild(x, t):
        return 50 * torch.randn_like(x)

    states = list(d.sample_loop(wild, SHAPE, sampler=sampler, steps=10))
    for _, x_t, x_0 in states:
        assert x_0.abs().max() <= 1 and x_t.abs().max() < 20
    if sampler == "ddim":  # each x_t is made of the clipped x_0 and the eps that fits it
        for (t, x_t, x_0), (t_next, x_next, _) in zip(states, states[1:], strict=False):
            a, b = d.alphas_cumprod[t], d.alphas_cumprod[t_next]
            eps = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
            torch.testing.assert_close(x_next, b.sqrt() * x_0 + (1 - b).sqrt() * eps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_last_step_adds_no_noise(sampler):
    d = make(num_timesteps=50)
    *_, (_, _, last_x_0) = d.sample_loop(Gaussian(d), SHAPE, sampler=sampler, steps=10)
    image = d.sample(Gaussian(d), SHAPE, sampler=sampler, steps=10)
    assert image.shape == last_x_0.shape == SHAPE
    again = [
        d.sample(
            Gaussian(d), SHAPE, sampler=sampler, steps=1, generator=torch.Generator().manual_seed(1)
        )
        for _ in range(2)
    ]
    x_T = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alone = d.sample(Gaussian(d), SHAPE, sampler=sampler, steps=1, x_T=x_T)
    assert torch.equal(again[0], again[1]) and torch.equal(again[0], alone)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.scale = nn.Dropout(0.5), nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t):
        return self.drop(x) * self.scale


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_is_without_dropout_and_gradients_and_leaves_the_mode_as_it_was(sampler):
    d, model = Diffusion(), Dropping()
    images = [
        d.sample(model, SHAPE, sampler=sampler, steps=5, generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    ]
    assert torch.equal(*images) and not images[0].requires_grad and model.training
    for _ in d.sample_loop(model, SHAPE, sampler=sampler, steps=3):
        assert model.training and torch.is_grad_enabled()  # also between two moves
    model.eval()
    d.sample(model, SHAPE, sampler=sampler, steps=2)
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


class Velocity(nn.Module):
    """The same network as `Gaussian`, putting out v."""

    def __init__(self, diffusion):
        super().__init__()
        self.eps = Gaussian(diffusion)

    def forward(self, x_t, t):
        alpha_bar = alpha_bar_at(self.eps.diffusion, t)
        eps = self.eps(x_t, t)
        return (eps - math.sqrt(1 - alpha_bar) * x_t) / math.sqrt(alpha_bar)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_network_that_puts_out_v_generates_the_same_images(sampler):
    d, d_v = make(), Diffusion(prediction="v", dtype=torch.float64)
    images = [
        each.sample(model, SHAPE, sampler=sampler, steps=9, generator=image_generators(0, (0, 1)))
        for each, model in ((d, Gaussian(d)), (d_v, Velocity(d_v)))
    ]
    torch.testing.assert_close(*images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_guidance(sampler):
    def conditional(x, t, attributes):
        return x * (0.95 - 0.05 * attributes.view(-1, 1, 1, 1))

    options = dict(sampler=sampler, steps=5, attributes=torch.ones(2, 1))
    a, b = (
        make().sample_loop(
            conditional, SHAPE, guidance=g, generator=image_generators(0, (0, 1)), **options
        )
        for g in (1.0, 2.0)
    )
    pairs = [(x_t, other) for (_, x_t, _), (_, other, _) in zip(a, b, strict=True)]
    assert torch.equal(*pairs[0]) and not all(torch.allclose(*pair) for pair in pairs)


# The table ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_same_noise_gives_the_same_image_where_the_table_says_so(sampler, eta):
    if eta and not SAMPLERS[sampler].takes_eta:
        return
    d, x_T = make(num_timesteps=50), torch.randn(*SHAPE)
    options = dict(sampler=sampler, steps=8, eta=eta, x_T=x_T)
    a, b = (
        d.sample(Gaussian(d), SHAPE, generator=torch.Generator().manual_seed(seed), **options)
        for seed in (1, 2)
    )
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


def test_what_a_sampler_can_do_is_accepted():
    for name, sampler in SAMPLERS.items():
        check_sampler(name, 50, 0.5 if sampler.takes_eta else 0.0, 50)
        if not sampler.at_most_T:
            check_sampler(name, 51, num_timesteps=50)
