"""Schedules, noising, loss and samplers against closed forms and diffusers' schedulers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import nn

from diffusion import SAMPLERS, SIGMA_MAX, Diffusion, draw_noise, image_generators, make_betas

THEIRS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
SHAPE = (2, 3, 4, 4)


class Gaussian(nn.Module):
    """The exact network for pictures that are normal with mean 0.1 and deviation 0.2 per pixel."""

    def __init__(self, diffusion, mean=0.1, deviation=0.2):
        super().__init__()
        self.diffusion, self.mean, self.deviation = diffusion, mean, deviation
        self.times = []

    def forward(self, x_t, t):
        self.times.append(float(t[0]))
        alphas = self.diffusion._alphas_cumprod.numpy()
        log_sigmas = np.log(1 / alphas - 1) / 2
        sigma2 = math.exp(2 * np.interp(float(t[0]), np.arange(len(alphas)), log_sigmas))
        alpha_bar = 1 / (1 + sigma2)
        gain = alpha_bar * self.deviation**2 / (alpha_bar * self.deviation**2 + 1 - alpha_bar)
        x_0 = self.mean + gain * (x_t / math.sqrt(alpha_bar) - self.mean)
        return (x_t - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)


def make(schedule="cosine", num_timesteps=1000):
    return Diffusion(num_timesteps, schedule, dtype=torch.float64)


# Schedules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_equals_diffusers(schedule):
    ours, theirs = make(schedule), DDPMScheduler(1000, beta_schedule=THEIRS[schedule])
    torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-3, atol=1e-6
    )


def test_linear_schedule_of_another_length_destroys_as_much():
    ends = [make("linear", T).alphas_cumprod[-1].log().item() for T in (250, 1000, 4000)]
    assert max(ends) - min(ends) < 0.3


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_posterior_equals_its_closed_form_in_float64(schedule):
    d = make(schedule)
    betas = make_betas(schedule, 1000).numpy()
    bar = np.cumprod(1 - betas)
    prev = np.append(1.0, bar[:-1])
    variance = betas * (1 - prev) / (1 - bar)
    np.testing.assert_allclose(d.posterior_variance, variance, rtol=1e-12, atol=0)
    np.testing.assert_allclose(d.alphas_cumprod_prev, prev, rtol=1e-12)
    np.testing.assert_allclose(d.posterior_mean_coef1, betas * np.sqrt(prev) / (1 - bar), rtol=1e-9)
    expected = (1 - prev) * np.sqrt(1 - betas) / (1 - bar)
    np.testing.assert_allclose(d.posterior_mean_coef2, expected, rtol=1e-9)
    logs = np.log(np.append(variance[1], variance[1:]))
    np.testing.assert_allclose(d.posterior_log_variance_clipped, logs, rtol=1e-9)


def test_tables_are_float32_and_of_no_state_dict():
    d = Diffusion()
    tables = [
        v for v in vars(d).values() if isinstance(v, torch.Tensor) and v is not d._alphas_cumprod
    ]
    assert len(tables) == 9 and {t.dtype for t in tables} == {torch.float32}
    assert not isinstance(d, nn.Module)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="noise_schedule"):
        Diffusion(noise_schedule="quadratic")


# Noising and the loss ----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_q_sample_equals_diffusers(schedule):
    d, theirs = make(schedule), DDPMScheduler(1000, beta_schedule=THEIRS[schedule])
    theirs.alphas_cumprod = d.alphas_cumprod
    t = torch.tensor([0, 1, 500, 999])
    x_0, eps = torch.rand(4, 3, 5, 5).double() * 2 - 1, torch.randn(4, 3, 5, 5).double()
    torch.testing.assert_close(d.q_sample(x_0, t, eps), theirs.add_noise(x_0, eps, t))


def test_q_sample_has_the_moments_of_equation_4():
    d, t = make(), torch.full((20_000,), 300)
    x_t = d.q_sample(torch.full((20_000, 1, 1, 1), 0.5).double(), t, torch.randn(20_000, 1, 1, 1))
    alpha_bar = d.alphas_cumprod[300]
    torch.testing.assert_close(x_t.mean(), 0.5 * alpha_bar.sqrt(), rtol=0, atol=0.02)
    torch.testing.assert_close(x_t.var(), 1 - alpha_bar, rtol=0.05, atol=0)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_timesteps_are_uniform_over_all_of_them(batch_size):
    d = Diffusion(num_timesteps=20)
    g = torch.Generator().manual_seed(0)
    t = torch.cat([d.stratified_timesteps(batch_size, g) for _ in range(20_000 // batch_size)])
    counts = torch.bincount(t, minlength=20)
    assert len(counts) == 20 and counts.min() > 0.8 * 1000 and counts.max() < 1.2 * 1000


def test_each_batch_holds_every_noise_level():
    t = Diffusion().stratified_timesteps(10, torch.Generator().manual_seed(0))
    assert (t // 100).tolist() == list(range(10))


def test_loss_is_the_mean_squared_error_of_the_noise():
    d = make()
    x_0 = torch.rand(6, 3, 4, 4).double() * 2 - 1
    seen = {}

    def model(x_t, t):
        seen.update(x_t=x_t, t=t)
        return torch.zeros_like(x_t)

    loss = d.loss(model, x_0, torch.Generator().manual_seed(5))
    alpha_bar = d.alphas_cumprod[seen["t"]].view(-1, 1, 1, 1)
    eps = (seen["x_t"] - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
    torch.testing.assert_close(loss, eps.square().mean())
    assert 0.8 < loss < 1.2


def test_loss_depends_on_its_generator_alone():
    d, x_0 = Diffusion(), torch.rand(4, 3, 4, 4)
    losses = [d.loss(lambda x, t: x, x_0, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


# Samplers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [50, 11])
def test_ddpm_equals_diffusers(schedule, steps):
    d = make(schedule, 50)
    theirs = DDPMScheduler(50, beta_schedule=THEIRS[schedule], variance_type="fixed_small")
    theirs.alphas_cumprod, theirs.one = d.alphas_cumprod, torch.tensor(1.0).double()
    timesteps = [int(t) for t in reversed(d.timesteps(steps))]
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
    timesteps = [int(t) for t in reversed(d.timesteps(steps))]
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
        final_sigmas_type="zero",
        lower_order_final=False,
        euler_at_final=True,
    )
    theirs.set_timesteps(steps)
    log_sigmas = np.log(1 / d._alphas_cumprod.numpy() - 1) / 2
    levels = np.linspace(min(math.log(SIGMA_MAX), log_sigmas[-1]), log_sigmas[0], steps)
    theirs.sigmas = torch.tensor(np.append(np.exp(levels), 0.0))
    theirs.timesteps = torch.arange(steps)
    x = noise
    for i in range(steps):
        torch.testing.assert_close(states[i][1], x, rtol=1e-5, atol=1e-5)
        x = theirs.step(model(x, torch.tensor([states[i][0]])), i, x).prev_sample
    torch.testing.assert_close(states[-1][2], x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler, steps", [("ddpm", 1000), ("ddim", 1000), ("dpm++", 25)])
def test_samplers_draw_from_the_distribution_of_the_exact_network(sampler, steps):
    d = Diffusion()
    model = Gaussian(d)
    x = d.sample(model, (3000, 1, 1, 1), sampler=sampler, steps=steps, eta=0.0)
    assert abs(x.mean() - 0.1) < 0.015 and abs(x.std() - 0.2) < 0.012


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_any_number_of_steps_gives_that_many_evaluations_from_noise_to_picture(sampler, steps):
    d = make(num_timesteps=50)
    model = Gaussian(d)
    list(d.sample_loop(model, SHAPE, sampler=sampler, steps=steps))
    assert len(model.times) == steps
    assert model.times == sorted(model.times, reverse=True) and len(set(model.times)) == steps
    if sampler == "dpm++":
        assert model.times[0] > 45
    else:
        assert model.times[0] == 49
    if steps > 1:
        assert model.times[-1] == 0


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(ValueError, match="steps"):
        make(num_timesteps=50).sample(lambda x, t: x, SHAPE, sampler="ddim", steps=51)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exact_noise_gives_the_picture_back(sampler):
    d = make()
    x_0 = torch.rand(*SHAPE).double() * 2 - 1

    def model(x_t, t):
        log_sigmas = np.log(1 / d._alphas_cumprod.numpy() - 1) / 2
        sigma = math.exp(np.interp(float(t[0]), np.arange(1000), log_sigmas))
        alpha_bar = 1 / (1 + sigma**2)
        return (x_t - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)

    torch.testing.assert_close(d.sample(model, SHAPE, sampler=sampler, steps=10), x_0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_wild_network_stays_bounded_and_consistent(sampler):
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
    picture = d.sample(Gaussian(d), SHAPE, sampler=sampler, steps=10)
    assert picture.shape == last_x_0.shape == SHAPE
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
    draw = [
        d.sample(model, SHAPE, sampler=sampler, steps=5, generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    ]
    assert torch.equal(*draw) and not draw[0].requires_grad and model.training
    for _ in d.sample_loop(model, SHAPE, sampler=sampler, steps=3):
        assert model.training and torch.is_grad_enabled()  # also between two steps
    model.eval()
    d.sample(model, SHAPE, sampler=sampler, steps=2)
    assert not model.training


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 1.0), ("dpm++", 0.0)])
def test_picture_i_is_the_same_in_any_batch(sampler, eta):
    d, model = Diffusion(), Dropping().eval()
    options = dict(sampler=sampler, steps=6, eta=eta)
    together = d.sample(model, (5, 3, 4, 4), generator=image_generators(7, range(5)), **options)
    for i in range(5):
        alone = d.sample(model, (1, 3, 4, 4), generator=image_generators(7, [i]), **options)
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-6)
    assert not torch.equal(together[0], together[1])
    other = d.sample(model, (5, 3, 4, 4), generator=image_generators(8, range(5)), **options)
    assert not torch.equal(together, other)


def test_noise_from_a_list_needs_one_generator_for_each_image():
    with pytest.raises(AssertionError, match="generators"):
        draw_noise((3, 1, 2, 2), image_generators(0, range(2)), "cpu")


class Velocity(nn.Module):
    """The same network as `Gaussian`, answering v."""

    def __init__(self, diffusion):
        super().__init__()
        self.eps = Gaussian(diffusion)

    def forward(self, x_t, t):
        alphas = self.eps.diffusion._alphas_cumprod.numpy()
        log_sigmas = np.log(1 / alphas - 1) / 2
        alpha_bar = 1 / (1 + math.exp(2 * np.interp(float(t[0]), np.arange(1000), log_sigmas)))
        eps = self.eps(x_t, t)
        return (eps - math.sqrt(1 - alpha_bar) * x_t) / math.sqrt(alpha_bar)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_network_that_answers_v_draws_the_same_pictures(sampler):
    d, d_v = make(), Diffusion(prediction="v", dtype=torch.float64)
    pictures = [
        each.sample(model, SHAPE, sampler=sampler, steps=9, generator=image_generators(0, (0, 1)))
        for each, model in ((d, Gaussian(d)), (d_v, Velocity(d_v)))
    ]
    torch.testing.assert_close(*pictures, rtol=1e-5, atol=1e-5)


def test_loss_of_v_equals_diffusers_velocity():
    d, theirs = Diffusion(prediction="v", dtype=torch.float64), DDPMScheduler(1000)
    theirs.alphas_cumprod = d.alphas_cumprod
    x_0, seen = torch.rand(6, 3, 4, 4).double() * 2 - 1, {}

    def model(x_t, t):
        seen.update(x_t=x_t, t=t)
        return torch.zeros_like(x_t)

    loss = d.loss(model, x_0, torch.Generator().manual_seed(5))
    alpha_bar = d.alphas_cumprod[seen["t"]].view(-1, 1, 1, 1)
    eps = (seen["x_t"] - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
    torch.testing.assert_close(loss, theirs.get_velocity(x_0, eps, seen["t"]).square().mean())


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="prediction"):
        Diffusion(prediction="x_0")


# Conditions --------------------------------------------------------------------------------------


class Conditional(nn.Module):
    """eps is the first attribute, so that guidance can be read off."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, attributes):
        self.calls.append(len(x))
        return attributes[:, 0].view(-1, 1, 1, 1).expand_as(x) * 0.1 + 0.3


@pytest.mark.parametrize("guidance, expected", [(1.0, 0.4), (0.0, 0.3), (3.0, 0.6)])
def test_guidance_moves_from_the_unconditional_guess_through_the_conditional(guidance, expected):
    d, model = make(), Conditional()
    eps = d._evaluate(
        model, torch.zeros(2, 3, 4, 4).double(), 5, torch.ones(2, 1).double(), guidance
    )
    torch.testing.assert_close(eps, torch.full_like(eps, expected))
    assert model.calls == [2 if guidance == 1 else 4]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_guidance(sampler):
    d = make()
    options = dict(sampler=sampler, steps=5, x_T=torch.randn(*SHAPE), attributes=torch.ones(2, 1))
    a, b = (d.sample(Conditional(), SHAPE, guidance=g, **options) for g in (1.0, 2.0))
    generator = torch.Generator().manual_seed(0)
    assert sampler == "ddpm" or not torch.allclose(a, b)
    a, b = (
        d.sample(Conditional(), SHAPE, guidance=g, generator=generator.manual_seed(0), **options)
        for g in (1.0, 2.0)
    )
    assert not torch.allclose(a, b)
