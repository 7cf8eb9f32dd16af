"""One step of the training: the gradients, what is random, the learning rate, each constant."""

import math
from dataclasses import asdict

import pytest
import torch
from conftest import tensors_equal, tiny

from dataset import Batches, load_faces
from diffusion import Diffusion
from engine.run import Run
from engine.state import diffusion_arguments, make_state, unet_arguments
from train import LR_SCHEDULES, Config, learning_rate, loss_of, seed_of, train_step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """The faces of every step here: 8x8, with two attributes."""
    patch = pytest.MonkeyPatch()
    with patch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("faces"))
        patch.setattr("dataset.sources.NUM_SYNTHETIC", 40)
        yield load_faces("synthetic", 8, attributes=("Smiling", "Male"))


def make_run(faces, config: Config, rank: int = 0, world_size: int = 1) -> Run:
    """A run before its first step, its weights away from the zeros that last layers start at."""
    state = make_state(config, CPU, unet_arguments(config))
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in state.model.parameters():
            weights.add_(torch.randn_like(weights) * 0.1)
    flip = config.horizontal_flip
    batches = Batches(faces, config.batch_size, config.seed, horizontal_flip=flip)
    if not config.attributes:
        read = batches
        batches = lambda number: (read(number)[0], None)  # noqa: E731
    diffusion = Diffusion(**diffusion_arguments(config))
    return Run(config, state, diffusion, batches, state.model, None, rank, world_size)


def weights_of(run: Run) -> dict:
    return {name: weights.clone() for name, weights in run.state.model.state_dict().items()}


# The gradients -----------------------------------------------------------------------------------


def test_clipping_acts_on_true_gradients_under_a_loss_scale(faces, monkeypatch):
    config = tiny(max_grad_norm=1e-3, warmup_steps=0)
    plain = make_run(faces, config)
    monkeypatch.setattr("engine.state.autocast_dtype", lambda *_: torch.float16)
    scaled = make_run(faces, config)
    assert scaled.state.scaler.get_scale() == 2.0**16
    loss, norm = train_step(plain).values()
    scaled_loss, scaled_norm = train_step(scaled).values()
    assert loss == scaled_loss and norm > 10 * config.max_grad_norm
    torch.testing.assert_close(norm, scaled_norm, rtol=1e-4, atol=0)
    for name, weights in weights_of(plain).items():
        torch.testing.assert_close(weights, weights_of(scaled)[name], rtol=1e-4, atol=1e-6)
    # Adam's first moment holds 0.1 of the clipped gradient.
    moments = [moments["exp_avg"].norm() for moments in scaled.state.optimizer.state.values()]
    assert float(torch.stack(moments).norm() / 0.1) == pytest.approx(1e-3, rel=1e-3)


def test_accumulated_micro_batches_equal_their_mean_gradient(faces):
    config = tiny(gradient_accumulation_steps=4, dropout=0.0, max_grad_norm=1e9)
    run, other = make_run(faces, config), make_run(faces, config)
    loss, norm = train_step(run).values()
    assert run.state.ema.num_updates == run.state.step == 1  # one update, not four
    total = 0.0
    for micro in range(4):
        generator = torch.Generator().manual_seed(seed_of(config.seed, micro, 0, 2))
        x_0 = other.batches(micro)[0]
        total = total + other.diffusion.loss(other.state.model, x_0, generator) / 4
    total.backward()
    gradients = [weights.grad.norm() for weights in other.state.model.parameters()]
    torch.testing.assert_close(loss, total.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm, torch.stack(gradients).norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("fp16", [False, True])
def test_gradient_that_is_not_finite_never_reaches_the_weights(faces, monkeypatch, optimizer, fp16):
    if fp16:
        monkeypatch.setattr("engine.state.autocast_dtype", lambda *_: torch.float16)
    run = make_run(faces, tiny(optimizer=optimizer))
    before = weights_of(run)
    hook = run.state.model.conv_in.weight.register_hook(lambda grad: grad * math.inf)
    assert not math.isfinite(train_step(run)["grad_norm"])
    assert tensors_equal(weights_of(run), before)
    hook.remove()
    assert math.isfinite(train_step(run)["grad_norm"])
    assert not tensors_equal(weights_of(run), before)


def test_step_moves_the_average_towards_the_weights_and_keeps_them_apart(faces):
    run = make_run(faces, tiny())
    average = {name: w.clone() for name, w in run.state.ema.model.state_dict().items()}
    train_step(run)
    share = 1 - 1 / 10  # the decay of the first update is 1 / 10
    for name, weights in weights_of(run).items():
        expected = average[name] + share * (weights - average[name])
        torch.testing.assert_close(run.state.ema.model.state_dict()[name], expected)


@pytest.mark.parametrize("optimizer, rate", [("adamw", 5e-3), ("muon", 2e-2)])
def test_training_reduces_the_loss(faces, optimizer, rate):
    config = tiny(optimizer=optimizer, learning_rate=rate, lr_schedule="constant", dropout=0.0)
    run = make_run(faces, config)
    losses = [float(train_step(run)["loss"]) for _ in range(40)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


# What is random ----------------------------------------------------------------------------------


def test_dropout_and_noise_are_drawn_from_unrelated_streams(faces, monkeypatch):
    """With one seed for both, the masks would be made of the numbers that the noise is made of."""
    drawn = {}

    def loss(self, model, x_0, generator, attributes):
        drawn.update(noise=torch.rand(100, generator=generator), dropout=torch.rand(100))
        return sum(weights.square().sum() for weights in model.parameters())

    monkeypatch.setattr(Diffusion, "loss", loss)
    loss_of(make_run(faces, tiny()), 0)
    assert not set(drawn["noise"].tolist()) & set(drawn["dropout"].tolist())


def test_loss_follows_from_the_seed_and_the_number_of_the_micro_batch_alone(faces):
    run = make_run(faces, tiny(dropout=0.5))
    first = loss_of(run, 3).item()
    torch.rand(1)  # what else was drawn does not count
    assert loss_of(run, 3).item() == first
    assert loss_of(run, 4).item() != first
    assert loss_of(make_run(faces, tiny(dropout=0.5, seed=1)), 3).item() != first


def test_learning_rate_rises_in_the_warm_up_and_then_follows_its_schedule():
    halfway = {"constant": 1.0, "cosine": 0.5, "wsd": 1.0}
    assert halfway.keys() == LR_SCHEDULES.keys()
    for schedule, factor in halfway.items():
        config = tiny(num_training_steps=1000, warmup_steps=100, lr_schedule=schedule)
        rates = [learning_rate(config, step) / config.learning_rate for step in range(1000)]
        assert rates[0] == pytest.approx(0.01)
        assert all(a < b for a, b in zip(rates[:99], rates[1:100], strict=True))
        assert max(rates) == pytest.approx(1, rel=1e-4)
        assert all(a >= b for a, b in zip(rates[100:], rates[101:], strict=False))
        assert rates[550] == pytest.approx(factor, rel=1e-2)
        assert schedule == "constant" or rates[-1] < 0.01
        if schedule == "wsd":
            assert rates[819] == 1 and rates[910] == pytest.approx(0.5)


CHANGES = {
    "seed": 5,
    "batch_size": 5,
    "gradient_accumulation_steps": 2,
    "optimizer": "muon",
    "learning_rate": 3e-3,
    "lr_schedule": "constant",
    "warmup_steps": 5,
    "max_grad_norm": 1e-4,
    "ema_decay": 0.05,
    "channels": 16,
    "channel_mults": (1, 1),
    "num_res_blocks": 2,
    "attn_resolutions": (),
    "head_dim": 4,
    "dropout": 0.6,
    "norm_groups": 2,
    "num_timesteps": 20,
    "noise_schedule": "linear",
    "prediction": "eps",
    "num_training_steps": 5,
    "attributes": ("Smiling", "Male"),
    "attribute_dropout": 0.9,
    "horizontal_flip": False,
}
# These change where a run works, what it saves and says, or what it trains on: tested elsewhere.
ELSEWHERE = {"experiment_name", "path_to_data", "resume", "init_from", "img_size", "only"}
ELSEWHERE |= {"skip_damaged", "compile", "deterministic", "device", "mixed_precision"}
ELSEWHERE |= {"log_every", "sample_every", "num_samples", "save_every", "keep_checkpoints"}


def average_after(faces, steps: int, **changes) -> dict:
    run = make_run(faces, tiny(**changes))
    for _ in range(steps):
        train_step(run)
    return dict(run.state.ema.model.state_dict())


def test_every_constant_of_the_training_changes_the_result(faces):
    """A new constant needs a line in CHANGES, or a test of its own."""
    assert set(CHANGES) | ELSEWHERE == set(asdict(Config()))
    plain, named = average_after(faces, 4), average_after(faces, 4, attributes=("Smiling", "Male"))
    for name, value in CHANGES.items():
        attributes = {"attributes": ("Smiling", "Male")} if name == "attribute_dropout" else {}
        changed = average_after(faces, 4, **{name: value} | attributes)
        assert not tensors_equal(named if attributes else plain, changed), name
