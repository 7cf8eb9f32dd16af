"""The loop: what a step does, what a run leaves, and that a resumed run equals an unbroken one."""

import json
import math
from dataclasses import asdict, fields, make_dataclass, replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, as_flags, assert_error, run_script, tensors_equal, tiny
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train as train_module
from dataset.faces import Batches, load_faces
from diffusion import Diffusion
from engine.state import diffusion_arguments, make_state, unet_arguments
from generate import load_trained
from sample import SampleConfig, sample
from system.errors import UsageError
from system.flags import before, fill, fixed, parse
from system.processes import Processes
from train import DEMO, Config, check_config, learning_rate, train, train_step
from unet import UNet
from utils import checkpoint_path, list_checkpoints, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
STATE = ("step", "model", "ema", "optimizer", "scaler", "history")


def checkpoint(step, name="run"):
    return load_checkpoint(checkpoint_path(Path(name), step))


def assert_same_state(a: dict, b: dict, parts=STATE) -> None:
    for part in parts:
        assert tensors_equal(a[part], b[part]), part


# Exact resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 3, "lr_schedule": "cosine"},
        {"mixed_precision": "bf16", "dropout": 0.5},
    ],
)
def test_resumed_run_equals_uninterrupted_run(here, unbroken, changes):
    whole = unbroken(**changes)
    # The number of steps shapes a cosine, so the first half is stopped, not shortened.
    half = tiny(experiment_name="halves", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "stop_after", lambda self, step, received: 15 * (step == 3))
        with pytest.raises(train_module.Interrupted):
            train(half)
    assert [p.name for p in list_checkpoints(here / "halves")] == ["step_00000003.pt"]
    train(replace(half, resume=True))
    assert_same_state(whole, checkpoint(6, "halves"))


def test_run_of_n_and_n_more_steps_equals_run_of_2n(here, unbroken):
    train(tiny(num_training_steps=3))
    train(tiny(num_training_steps=6, resume=True))
    assert_same_state(unbroken(), checkpoint(6))


def test_sampling_and_logging_in_between_change_nothing(here):
    train(tiny(experiment_name="often", sample_every=1, log_every=1))
    train(tiny(experiment_name="seldom", log_every=100))
    a, b = checkpoint(6, "often"), checkpoint(6, "seldom")
    assert_same_state(a, b, ("model", "ema", "optimizer"))


def test_finished_run_resumed_touches_nothing(here):
    folder = train(tiny())
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != "lock"}
    train(tiny(resume=True))
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != "lock"}


def test_resume_without_checkpoints_starts_fresh(here):
    train(tiny(resume=True))
    assert checkpoint(6)["step"] == 6


def test_new_run_in_a_used_folder_is_refused(here):
    train(tiny())
    before = checkpoint_path(here / "run", 6).read_bytes()
    with pytest.raises(UsageError, match="--resume"):
        train(tiny())
    assert checkpoint_path(here / "run", 6).read_bytes() == before


# One step ----------------------------------------------------------------------------------------


def step_once(config, before=None, fp16=False):
    """State after one step of `config`, with its loss and gradient norm."""
    diffusion = Diffusion(config.num_timesteps, config.noise_schedule)
    state = make_state(config, CPU, fp16=fp16)
    batches = Batches(load_faces("pictures", config.img_size), config.batch_size, config.seed)
    if before:
        before(state)
    start = {k: v.clone() for k, v in state.model.state_dict().items()}
    loss, norm = train_step(config, state, diffusion, batches, state.model, None)
    return state, start, float(loss), float(norm)


def shake(state):
    """Weights away from the zeros that the last layers start at."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in state.model.parameters():
            p.add_(torch.randn_like(p) * 0.1)


def test_clipping_acts_on_true_gradients_under_a_loss_scale(here):
    config = tiny(max_grad_norm=1e-3, warmup_steps=0)
    plain, _, loss, norm = step_once(config, shake)
    scaled, _, scaled_loss, scaled_norm = step_once(config, shake, fp16=True)
    assert scaled.scaler.get_scale() == 2.0**16 and norm > 10 * config.max_grad_norm
    assert loss == scaled_loss and norm == pytest.approx(scaled_norm, rel=1e-4)
    for a, b in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # Adam's first moment holds 0.1 of the clipped gradient.
    moments = [s["exp_avg"] for s in scaled.optimizer.state.values()]
    length = torch.stack([m.norm() for m in moments]).norm() / 0.1
    assert float(length) == pytest.approx(config.max_grad_norm, rel=1e-3)


def test_accumulated_micro_batches_equal_their_mean_gradient(here):
    config = tiny(gradient_accumulation_steps=4, dropout=0.0, max_grad_norm=1e9)
    state, _, loss, norm = step_once(config, shake)
    assert state.ema.num_updates == state.step == 1  # one update, not four
    # The same by hand, in one go.
    diffusion, other = Diffusion(50), make_state(config, CPU, fp16=False)
    shake(other)
    batches = Batches(load_faces("pictures", 8), 4, config.seed)
    total = 0.0
    for micro in range(4):
        generator = torch.Generator().manual_seed(train_module.seed_of(config.seed, micro, 0, 2))
        total = total + diffusion.loss(other.model, batches(micro)[0], generator) / 4
    total.backward()
    gradients = torch.stack([p.grad.norm() for p in other.model.parameters()]).norm()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    assert norm == pytest.approx(gradients.item(), rel=1e-4)


def test_a_step_after_sampling_leaves_the_drawn_average_alone(here):
    config = tiny()
    state, *_ = step_once(config)
    diffusion = Diffusion(50)
    diffusion.sample(state.ema.model, (2, 3, 8, 8), steps=3)
    before = {k: v.clone() for k, v in state.ema.model.state_dict().items()}
    with torch.no_grad():
        for p in state.model.parameters():
            p.add_(1.0)
    assert tensors_equal(before, dict(state.ema.model.state_dict()))


def test_infinite_gradient_leaves_the_weights_as_they_were(here):
    def poison(state):
        shake(state)
        state.model.conv_in.weight.register_hook(lambda grad: grad * math.inf)

    for fp16 in (False, True):
        state, start, _, norm = step_once(tiny(), poison, fp16)
        assert not math.isfinite(norm)
        assert tensors_equal(start, dict(state.model.state_dict()))


def test_training_reduces_the_loss(here):
    often = dict(log_every=10, save_every=150)
    folder = train(tiny(num_training_steps=150, learning_rate=5e-3, prediction="eps", **often))
    history = load_checkpoint(checkpoint_path(folder, 150))["history"]
    assert history[-1][1] < 0.8 * history[0][1]


def test_dropout_and_noise_are_drawn_from_unrelated_streams(here, monkeypatch):
    """With one seed for both, the masks would be made of the numbers the noise is made of."""
    drawn = {}

    def loss(self, model, x_0, generator, attributes):
        drawn["noise"] = torch.rand(100, generator=generator)
        drawn["dropout"] = torch.rand(100)
        return sum(p.square().sum() for p in model.parameters())

    monkeypatch.setattr(Diffusion, "loss", loss)
    step_once(tiny())
    assert not set(drawn["noise"].tolist()) & set(drawn["dropout"].tolist())


def test_different_seeds_and_ranks_see_different_noise(here):
    losses = {step_once(tiny(seed=seed), shake)[2] for seed in (0, 1)}
    config = tiny()
    for rank in (0, 1):
        state = make_state(config, CPU, fp16=False)
        shake(state)
        batches = Batches(load_faces("pictures", 8), 4, 0)
        losses.add(
            float(train_step(config, state, Diffusion(50), batches, state.model, None, rank)[0])
        )
    assert len(losses) == 3  # rank 0 of seed 0 came twice


# The learning rate -------------------------------------------------------------------------------


def test_learning_rate_rises_in_the_warm_up_and_then_stays_or_falls_to_zero():
    for schedule in ("constant", "cosine"):
        config = tiny(num_training_steps=1000, warmup_steps=100, lr_schedule=schedule)
        rates = [learning_rate(config, step) for step in range(1000)]
        assert rates[0] == pytest.approx(config.learning_rate / 100)
        assert all(a < b for a, b in zip(rates[:99], rates[1:100], strict=True))
        assert max(rates) == pytest.approx(config.learning_rate, rel=1e-4)
        pairs = list(zip(rates[100:], rates[101:], strict=False))
        if schedule == "constant":
            assert all(a == b for a, b in pairs)
        else:
            assert all(a > b for a, b in pairs) and rates[-1] < 1e-4 * config.learning_rate
            assert rates[550] == pytest.approx(config.learning_rate / 2, rel=1e-2)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_resumed_longer_run_goes_on_with_the_longer_runs_learning_rate(here, schedule):
    """The curve that TensorBoard shows: a cosine that had come down goes up to the longer one."""
    config = tiny(log_every=1, lr_schedule=schedule, warmup_steps=3, num_training_steps=8)
    longer = replace(config, num_training_steps=16, resume=True)
    folder = train(config)
    train(longer)
    logged = EventAccumulator(str(folder)).Reload().Scalars("learning_rate")
    expected = [learning_rate(config, step) for step in range(8)]
    expected += [learning_rate(longer, step) for step in range(8, 16)]
    assert [event.step for event in logged] == list(range(1, 17))
    assert [event.value for event in logged] == pytest.approx(expected, rel=1e-5)
    peak = config.learning_rate
    assert expected[2] == pytest.approx(peak) and all(rate <= peak for rate in expected)
    if schedule == "cosine":
        assert expected[7] < 0.1 * peak < 0.5 * peak < expected[8] and expected[15] < 0.05 * peak
    else:
        assert expected[2:] == [peak] * 14


# What a run leaves -------------------------------------------------------------------------------


def test_run_leaves_what_the_design_says(here):
    folder = train(tiny(sample_every=3))
    assert json.loads((folder / "config.json").read_text())["batch_size"] == 4
    assert [p.stem for p in list_checkpoints(folder)] == ["step_00000006", "step_00000003"]
    grids = sorted(p.name for p in (folder / "samples").iterdir())
    assert grids == ["step_00000003.png", "step_00000006.png"]
    assert Image.open(folder / "samples" / grids[0]).size == (2 * 10 + 2, 2 * 10 + 2)
    assert Image.open(folder / "loss.png").size[0] > 300
    events = EventAccumulator(str(folder)).Reload()
    scalars = {"loss", "learning_rate", "grad_norm", "images_per_second", "held_out_loss"}
    means = {f"mean_{c}/{of}" for c in ("red", "green", "blue") for of in ("samples", "data")}
    assert set(events.Tags()["scalars"]) == scalars | means and events.Tags()["images"] == [
        "samples"
    ]
    assert [e.step for e in events.Scalars("loss")] == [2, 3, 4, 6]
    assert [e.step for e in events.Scalars("held_out_loss")] == [3, 6]
    cells = np.asarray(Image.open(folder / "samples" / grids[1]), float)
    cells = np.stack([cells[y : y + 8, x : x + 8] for y in (2, 12) for x in (2, 12)])
    some = load_faces("pictures", 8)
    faces = some.images[some.train[np.linspace(0, len(some.train) - 1, 256).astype(int)]]
    for i, colour in enumerate(("red", "green", "blue")):
        logged = {of: events.Scalars(f"mean_{colour}/{of}")[-1] for of in ("samples", "data")}
        assert logged["samples"].step == 6
        assert logged["samples"].value == pytest.approx(cells[..., i].mean(), abs=0.5)
        assert logged["data"].value == pytest.approx(faces[..., i].mean(), abs=0.01)
    config = tiny(num_training_steps=6, log_every=2, save_every=3)
    rates = {e.step: e.value for e in events.Scalars("learning_rate")}
    assert rates[2] == pytest.approx(learning_rate(config, 1))


def test_only_the_newest_checkpoints_and_the_guide_are_kept(here):
    folder = train(tiny(save_every=1, keep_checkpoints=2))
    assert [int(p.stem[5:]) for p in list_checkpoints(folder)] == [6, 5, 2]  # 2 guides


def test_checkpoint_rebuilds_networks_without_train(here):
    saved = load_checkpoint(checkpoint_path(train(tiny()), 6))
    UNet(**saved["unet"]).load_state_dict(saved["ema"]["model"])
    assert Diffusion(**saved["diffusion"]).num_timesteps == 50


def test_no_checkpoint_key_has_a_prefix(here):
    saved = load_checkpoint(checkpoint_path(train(tiny()), 6))
    keys = [*saved["model"], *saved["ema"]["model"]]
    assert not [key for key in keys if key.startswith(("module.", "_orig_mod."))]


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", 5),
        ("batch_size", 5),
        ("gradient_accumulation_steps", 2),
        ("optimizer", "muon"),
        ("learning_rate", 3e-3),
        ("lr_schedule", "constant"),
        ("warmup_steps", 5),
        ("max_grad_norm", 1e-4),
        ("ema_decay", 0.05),
        ("channels", 16),
        ("channel_mults", (1, 1)),
        ("num_res_blocks", 2),
        ("attn_resolutions", ()),
        ("head_dim", 4),
        ("dropout", 0.6),
        ("norm_groups", 2),
        ("num_timesteps", 20),
        ("noise_schedule", "linear"),
        ("prediction", "eps"),
        ("mixed_precision", "bf16"),
        ("num_training_steps", 5),
    ],
)
def test_every_constant_of_the_training_changes_the_result(here, unbroken, name, value):
    folder = train(tiny(**{"num_training_steps": 4, name: value}))
    a, b = unbroken(num_training_steps=4), load_checkpoint(list_checkpoints(folder)[0])
    # Without the instructions for bfloat16 it is float32 either way, and a line says so.
    in_vain = value == "bf16" and not torch.cpu._is_avx512_bf16_supported()
    assert tensors_equal(a["ema"], b["ema"]) == in_vain


# The command line --------------------------------------------------------------------------------


def test_config_is_covered_by_the_tests_of_its_constants():
    """A new constant needs a test: name it here when it has one."""
    tested = {
        "experiment_name",
        "path_to_data",
        "resume",
        "init_from",  # test_pretrained.py
        "img_size",
        "only",
        "compile",
        "deterministic",
        "log_every",
        "device",  # test_systems.py
    }
    tested |= {"attributes", "attribute_dropout"}  # test_conditional.py
    tested |= {"grey"}  # test_grey.py
    tested |= {"sample_every", "num_samples", "save_every", "keep_checkpoints"}
    marks = test_every_constant_of_the_training_changes_the_result.pytestmark
    tested |= {case[0] for mark in marks for case in mark.args[1]}
    assert tested == set(asdict(Config()))


def test_help_lists_every_constant_with_its_default_and_meaning(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run_script("train.py", "--help").stdout
    for name, value in asdict(Config()).items():
        assert f"--{name}" in text, name
        if isinstance(value, float | int) and not isinstance(value, bool):
            assert f"(default: {value})" in text, name
    assert "optimiser updates" in text and "pixels" in text


def test_command_line_trains_resumes_and_samples(here, unbroken):
    settings = {**TINY, "num_training_steps": 3}
    result = run_script("train.py", *as_flags(settings), new=True)
    assert result.returncode == 0, result.stderr
    assert "step 3/3" in result.stdout and "\r" not in result.stdout + result.stderr
    result = run_script("train.py", *as_flags({**TINY, "resume": True}))
    assert result.returncode == 0 and "resumed run/checkpoints/step_00000003.pt" in result.stdout
    words = ["--num_images", "4", "--steps", "3", "--out", "faces.png"]
    result = run_script("sample.py", *words, new=True)
    assert result.returncode == 0, result.stderr
    assert Image.open("faces.png").size == (22, 22)
    assert_same_state(unbroken(), checkpoint(6), ("model", "ema", "optimizer"))


def test_hyphens_work_as_well_as_underscores(here):
    words = [w.replace("_", "-") if w.startswith("--") else w for w in as_flags(TINY)]
    assert run_script("train.py", *words, "--num-training-steps", "1").returncode == 0


def test_flag_beside_demo_wins():
    default = replace(Config(), **DEMO)
    assert parse(Config, ["--batch_size", "7"], "", default).batch_size == 7
    assert parse(Config, [], "", default) == default


def test_demo_is_a_config_that_can_be():
    check_config(replace(Config(), **DEMO))
    check_config(Config())


@pytest.mark.parametrize(
    "words, part",
    [
        (["--batch_size", "many"], "--batch_size"),
        (["--img_size", "63"], "--img_size"),
        (["--no_such_flag", "1"], "--no_such_flag"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(here, words, part):
    assert_error(run_script("train.py", *words), 2, part)
    assert sorted(p.name for p in here.iterdir()) == ["pictures"]


@pytest.mark.parametrize("word", ["noise_schedule", "lr_schedule", "prediction", "mixed_precision"])
def test_a_choice_that_there_is_not_names_the_flag(word):
    with pytest.raises(UsageError, match=f"^--{word}: .*Fix: "):
        parse(Config, [f"--{word}", "square"], "")


@pytest.mark.parametrize(
    "changes",
    [
        {"img_size": 63},
        {"img_size": 0},
        {"batch_size": -1},
        {"num_training_steps": 0},
        {"learning_rate": math.nan},
        {"ema_decay": 2.0},
        {"channels": 6},
        {"norm_groups": 3},
        {"norm_groups": 8},  # a group for each channel
        {"optimizer": "sgd"},
        {"head_dim": 12, "channels": 40},
        {"dropout": 1.0},
        {"max_grad_norm": 0.0},
        {"seed": -1},
        {"num_timesteps": 1},
        {"warmup_steps": -1},
        {"keep_checkpoints": 0},
        {"channel_mults": (0, 1)},
        {"experiment_name": ""},
    ],
)
def test_constants_out_of_range_name_the_flag(changes):
    with pytest.raises(UsageError, match=f"--{list(changes)[0]}: is"):
        check_config(tiny(**changes))


# Older checkpoints -------------------------------------------------------------------------------

# Written by commit 4762fd4 from 22 images, at step 3, and at step 6 of the resumed run.
OLD = {step: ROOT / "tests" / "data" / f"format_1_step_{step}.pt" for step in (3, 6)}
OLD_NETWORK = dict(channels=4, head_dim=4)


def take(step: int, change=lambda saved: None) -> dict:
    """Lay the old checkpoint of a step, changed, into `run`. Returns what it holds."""
    path = checkpoint_path(Path("run"), step)
    path.parent.mkdir(parents=True)
    saved = load_checkpoint(OLD[step])
    change(saved)
    save_checkpoint(path, saved)
    return saved


def assert_close(a: dict, b: dict) -> None:
    """The states are equal but for what another processor rounds differently."""
    assert a["step"] == b["step"] and a["scaler"] == b["scaler"]
    for part in ("model", "ema", "optimizer", "history"):
        for (name, x), (other, y) in zip(numbers_in(a[part]), numbers_in(b[part]), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=f"{part}.{name}")
            assert name == other


def numbers_in(state: object, name: str = "") -> list[tuple[str, torch.Tensor]]:
    if isinstance(state, dict):
        pairs = state.items()
    elif isinstance(state, list | tuple):
        pairs = enumerate(state)
    else:
        return [(name, torch.as_tensor(state))] if state is not None else []
    return [pair for key, value in pairs for pair in numbers_in(value, f"{name}.{key}")]


def test_an_old_checkpoint_resumes_to_what_the_code_of_its_time_gave(here):
    take(3)
    train(tiny(resume=True, **OLD_NETWORK))
    now, then = checkpoint(6), load_checkpoint(OLD[6])
    assert_close(now, then)
    # Where the processor is the one that wrote it, nothing differs at all.
    print("bit for bit:", all(tensors_equal(now[part], then[part]) for part in STATE))


def with_constants(*new):
    """A Config with further constants: (name, type, field)."""
    return make_dataclass("Later", new, bases=(Config,), frozen=True)


def test_a_checkpoint_that_lacks_a_constant_goes_on_as_it_was_before_the_constant(here, capsys):
    def forget_prediction(saved):
        del saved["settings"]["prediction"], saved["diffusion"]["prediction"]

    take(3, forget_prediction)
    # Later the default is another one, and a constant is new altogether.
    Later = with_constants(
        ("prediction", str, fixed("v", before="eps")), ("new", int, fixed(1, before=0))
    )
    words = {**TINY, **OLD_NETWORK, "resume": True}
    train(Later(**words))
    assert_close(checkpoint(6), load_checkpoint(OLD[6]))
    settings = checkpoint(6)["settings"]
    assert settings["prediction"] == "eps" and settings["new"] == 0
    text = capsys.readouterr().out
    assert "note: prediction is eps, lr_schedule is constant, new is 0, as in run" in text
    assert load_trained("run").diffusion.prediction == "eps"
    train(Later(**{**words, "num_training_steps": 7}))  # and again, from what that wrote
    assert checkpoint(7)["settings"]["new"] == 0
    with pytest.raises(UsageError, match="new was 0, is 2"):
        train(Later(**{**words, "new": 2, "num_training_steps": 9}))


def test_a_run_of_older_defaults_goes_on_with_them():
    old = dict(prediction="eps", lr_schedule="constant", num_training_steps=500_000)
    config, filled = fill(Config(), old)
    assert filled == old and {name: getattr(config, name) for name in old} == old
    longer, filled = fill(Config(num_training_steps=600_000), old)
    assert longer.num_training_steps == 600_000 and "num_training_steps" not in filled
    assert fill(Config(), asdict(Config())) == (Config(), {})


def test_the_networks_defaults_are_what_a_checkpoint_means_that_lacks_an_argument():
    """So that sample.py rebuilds older networks from what they hold."""
    for cls, arguments in ((UNet, unet_arguments), (Diffusion, diffusion_arguments)):
        parameters = signature(cls).parameters
        for about in fields(Config):
            if about.name in arguments(Config()):
                assert parameters[about.name].default == before(about), about.name


def test_an_old_checkpoint_samples_what_it_did(here):
    """The same weights give the same grid: of the state resumed by today's code, or of the old."""
    take(3)
    train(tiny(resume=True, **OLD_NETWORK))
    grids = []
    for checkpoint in ("run", OLD[6]):
        options = SampleConfig(str(checkpoint), num_images=4, guide="none", out="grid.png")
        grids.append(np.asarray(Image.open(sample(options))).astype(int))
    assert np.abs(grids[0] - grids[1]).max() <= 1
