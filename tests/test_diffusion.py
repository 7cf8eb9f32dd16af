"""Noise schedules, noising, loss and guidance, against closed forms and diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler

from diffusion import NOISE_SCHEDULES, PREDICTIONS, Diffusion, evaluate_model

THEIRS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


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
@pytest.mark.parametrize("num_timesteps", [2, 50, 1000])
def test_every_schedule_adds_noise_at_every_timestep_until_next_to_nothing_is_left(
    schedule, num_timesteps
):
    d = make(schedule, num_timesteps)
    assert d.betas.min() > 0 and d.betas.max() <= 0.999 and d.alphas_cumprod[-1] < 0.01


@pytest.mark.parametrize("argument", ["noise_schedule", "prediction"])
def test_unknown_choice_is_refused_with_the_known_ones(argument):
    known = {"noise_schedule": NOISE_SCHEDULES, "prediction": PREDICTIONS}[argument]
    with pytest.raises(ValueError, match=f"{argument} is 'x_0', not one of {', '.join(known)}"):
        Diffusion(**{argument: "x_0"})


# Noising and the loss ----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_q_sample_equals_diffusers(schedule):
    d, theirs = make(schedule), DDPMScheduler(1000, beta_schedule=THEIRS[schedule])
    theirs.alphas_cumprod = d.alphas_cumprod
    t = torch.tensor([0, 1, 500, 999])
    x_0, eps = torch.rand(4, 3, 5, 5).double() * 2 - 1, torch.randn(4, 3, 5, 5).double()
    torch.testing.assert_close(d.q_sample(x_0, t, eps), theirs.add_noise(x_0, eps, t))


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


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_is_the_mean_squared_error_of_the_noise_or_of_diffusers_velocity(prediction):
    d, theirs = Diffusion(prediction=prediction, dtype=torch.float64), DDPMScheduler(1000)
    theirs.alphas_cumprod = d.alphas_cumprod
    x_0, seen = torch.rand(6, 3, 4, 4).double() * 2 - 1, {}

    def model(x_t, t):
        seen.update(x_t=x_t, t=t)
        return torch.zeros_like(x_t)

    losses = [d.loss(model, x_0, torch.Generator().manual_seed(seed)) for seed in (6, 5, 5)]
    alpha_bar = d.alphas_cumprod[seen["t"]].view(-1, 1, 1, 1)
    eps = (seen["x_t"] - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
    target = eps if prediction == "eps" else theirs.get_velocity(x_0, eps, seen["t"])
    torch.testing.assert_close(losses[2], target.square().mean())
    assert losses[0] != losses[1] == losses[2] and 0.8 < eps.std() < 1.2


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x_0_and_eps_follow_from_the_output_that_is_the_target(prediction):
    d = Diffusion(prediction=prediction, dtype=torch.float64)
    x_0, eps = torch.rand(4, 3, 4, 4).double() * 2 - 1, torch.randn(4, 3, 4, 4).double()
    t = torch.tensor([0, 10, 500, 990])
    output, alpha_bar_t = d.target(x_0, t, eps), d.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_0_pred, eps_pred = d.x_0_and_eps(output, d.q_sample(x_0, t, eps), alpha_bar_t)
    torch.testing.assert_close(x_0_pred, x_0)
    torch.testing.assert_close(eps_pred, eps)


# Conditions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance, expected", [(1.0, 0.4), (0.0, 0.3), (3.0, 0.6)])
def test_guidance_moves_from_the_unconditional_output_through_the_conditional(guidance, expected):
    calls = []

    def model(x, t, attributes):
        calls.append(len(x))
        return attributes[:, 0].view(-1, 1, 1, 1).expand_as(x) * 0.1 + 0.3

    x_t, t = torch.zeros(2, 3, 4, 4), torch.tensor([5, 5])
    output = evaluate_model(model, x_t, t, torch.ones(2, 1), guidance)
    torch.testing.assert_close(output, torch.full_like(output, expected))
    assert calls == [2 if guidance == 1 else 4]
