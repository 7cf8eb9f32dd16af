"""Images from a checkpoint: which weights, which noise, which files."""

import contextlib
import errno
import inspect
import os
import re
import shutil
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_error, needs_posix, run_script, tensors_equal, tiny, write_pictures
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.conditional_accuracy import AccuracyConfig
from benchmarks.data_speed import DataSpeedConfig
from benchmarks.editing import EditingConfig
from benchmarks.quality import QualityConfig
from benchmarks.sample_speed import SampleSpeedConfig
from benchmarks.train_speed import TrainSpeedConfig
from convert import ConvertConfig, convert
from evaluate import EvaluateConfig
from formats.weights import find_checkpoint
from generate import add_guide, generate, load_trained
from sample import SampleConfig, main, sample
from samplers import SAMPLERS
from system import flags
from system.errors import CheckpointError, UsageError, UserError, is_out_of_memory
from train import Config, train
from unet import GroupNorm
from utils import (
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    sign,
)

HALF_A_GREY_LEVEL = 1 / 255  # of images in [-1, 1]; eps at the start is divided by 1 / 80


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled")
    write_pictures(folder, 22)
    with contextlib.chdir(folder):
        train(tiny(learning_rate=0.01))
    return folder


@pytest.fixture
def run(here, trained_once):
    shutil.copytree(trained_once, here, dirs_exist_ok=True)
    return Path("run")


def saved_images(**flags):
    """The pixels `sample` saves, one image after another."""
    shutil.rmtree("out", ignore_errors=True)
    sample(
        SampleConfig(**{"checkpoint": "run", "steps": 3, "out": "out", "num_images": 5, **flags})
    )
    names = sorted(os.listdir("out"))
    return np.stack([np.asarray(Image.open(os.path.join("out", name))) for name in names])


def test_images_come_from_the_average_and_from_raw_weights_with_a_flag(run):
    saved = load_checkpoint(find_checkpoint(run))
    averaged = dict(load_trained(run, half=False).model.state_dict())
    assert tensors_equal(averaged, saved["ema"]["model"])
    raw = dict(load_trained(run, raw=True, half=False).model.state_dict())
    assert tensors_equal(raw, saved["model"]) and not tensors_equal(raw, saved["ema"]["model"])
    assert not np.array_equal(saved_images(), saved_images(raw=True))


def test_network_and_diffusion_are_rebuilt_from_what_the_checkpoint_says(here):
    train(tiny(num_timesteps=30, noise_schedule="linear", prediction="v", channels=16))
    trained = load_trained("run")
    assert trained.diffusion.num_timesteps == 30 and trained.diffusion.prediction == "v"
    assert trained.diffusion.betas[-1] > 0.5 and trained.model.conv_in.out_channels == 16
    assert not trained.model.training and trained.img_size == 8 and trained.step == 6


class WeightCasts(TorchDispatchMode):
    """Counts the casts of a network's weights."""

    def __init__(self, model):
        super().__init__()
        self.count, self.places = 0, {p.data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.places:
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_weights_are_cast_once_and_norms_stay_in_float32(run, monkeypatch):
    half = {"fp16": torch.bfloat16, "no": None}
    monkeypatch.setattr("generate.autocast_dtype", lambda precision, device: half[precision])
    trained, plain = load_trained(run), load_trained(run, half=False)
    with WeightCasts(trained.model) as casts:
        images = next(generate(trained, range(4), steps=3))
    assert casts.count == 0
    for module in trained.model.modules():
        expected = torch.float32 if isinstance(module, GroupNorm) else torch.bfloat16
        assert all(weights.dtype == expected for weights in module.parameters(recurse=False))
    assert all(p.dtype == torch.float32 for p in plain.model.parameters())

    # Autocast over weights in float32 rounds them alike, at each evaluation.
    autocast = replace(plain, dtype=torch.bfloat16)
    with WeightCasts(autocast.model) as casts:
        torch.testing.assert_close(
            next(generate(autocast, range(4), steps=3)), images, rtol=0, atol=HALF_A_GREY_LEVEL
        )
    assert casts.count > 3 * 20


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_i_is_the_same_whatever_the_batch_size(run, sampler):
    trained = load_trained(run)
    each = [
        torch.cat(list(generate(trained, range(7), 3, size, sampler=sampler, steps=4)))
        for size in (7, 3, 1)
    ]
    for other in each[1:]:
        torch.testing.assert_close(each[0], other, rtol=0, atol=HALF_A_GREY_LEVEL)
    alone = next(generate(trained, [5], 3, sampler=sampler, steps=4))
    torch.testing.assert_close(each[0][5:6], alone, rtol=0, atol=HALF_A_GREY_LEVEL)
    assert each[0].min() >= -1 and each[0].max() <= 1


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_exactly_as_many_images_as_asked(run, count):
    assert len(saved_images(num_images=count, batch_size=4)) == count


def test_png_is_a_grid_gif_the_way_folder_single_images(run):
    grid = sample(SampleConfig(checkpoint="run", num_images=5, steps=4, out="a/grid.png"))
    assert Image.open(grid).size == (3 * 10 + 2, 2 * 10 + 2)
    way = Image.open(sample(SampleConfig(checkpoint="run", num_images=4, steps=6, out="way.gif")))
    assert way.format == "GIF" and way.n_frames == 7
    single = saved_images(num_images=4)
    assert single.shape == (4, 8, 8, 3)
    cells = np.asarray(
        Image.open(sample(SampleConfig("run", num_images=4, steps=3, out="four.png")))
    )
    np.testing.assert_array_equal(cells[2:10, 12:20], single[1])


def test_seed_sampler_steps_and_eta_change_the_images(run):
    first = saved_images()
    np.testing.assert_array_equal(first, saved_images())
    for change in (dict(seed=1), dict(sampler="ddim"), dict(sampler="ddpm"), dict(steps=9)):
        assert not np.array_equal(first, saved_images(**change)), change
    a, b = saved_images(sampler="ddim"), saved_images(sampler="ddim", eta=1.0)
    assert not np.array_equal(a, b)


def test_newest_run_is_taken_where_none_is_named(here):
    train(tiny(experiment_name="old"))
    train(tiny(experiment_name="new"))
    for i, name in enumerate(("new", "old")):
        for step in (3, 6):
            os.utime(checkpoint_path(here / name, step), (time.time() - 100 * i,) * 2)
    assert find_checkpoint(None).parts[0] == "new"
    assert load_trained(None).path == find_checkpoint("new")


def test_interpolation_goes_from_one_image_to_the_other(run):
    ends = saved_images(num_images=4, steps=6)
    way = saved_images(interpolate=(1, 3), num_images=5, steps=6)
    assert len(way) == 5
    assert np.abs(way[0].astype(int) - ends[1]).max() <= 1
    assert np.abs(way[-1].astype(int) - ends[3]).max() <= 1
    assert not np.array_equal(way[2], way[0]) and not np.array_equal(way[2], way[4])
    gif = Image.open(
        sample(SampleConfig("run", num_images=5, steps=3, interpolate=(0, 1), out="b.gif"))
    )
    assert gif.n_frames == 5


EARLY = "run/checkpoints/step_00000003.pt"


def test_guided_network_goes_from_its_early_self_through_itself_and_on(run):
    late, early = load_trained("run", half=False), load_trained(EARLY, half=False)
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 40])
    good, bad = late.model(x_t, t), early.model(x_t, t)
    assert not torch.equal(good, bad)
    for strength in (1.0, 1.5, 2.0):
        guided = add_guide(late, EARLY, strength)
        torch.testing.assert_close(guided.model(x_t, t), good + (strength - 1) * (good - bad))


def test_guide_changes_the_images_and_at_1_does_not(run):
    plain = saved_images(guide="none")
    assert np.array_equal(saved_images(guide=EARLY, autoguidance=1.0), plain)
    assert not np.array_equal(saved_images(guide=EARLY), plain)


def test_a_run_guides_its_images_by_the_checkpoint_it_kept_of_a_fifth_of_its_steps(here):
    train(tiny(num_training_steps=10, save_every=1, keep_checkpoints=2))
    assert [path.stem[-2:] for path in list_checkpoints(here / "run")] == ["10", "09", "02"]
    early = "run/checkpoints/step_00000002.pt"
    assert np.array_equal(saved_images(), saved_images(guide=early))
    plain = saved_images(checkpoint=early)  # nothing earlier is left to guide it
    assert np.array_equal(plain, saved_images(checkpoint=early, guide="none"))


def test_checkpoints_without_a_run_around_them_are_not_guided(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    plain = saved_images(guide="none")
    shutil.copy(find_checkpoint(run), "alone.pt")
    assert np.array_equal(saved_images(checkpoint="alone.pt"), plain)
    saved = load_checkpoint(find_checkpoint(run))
    del saved["settings"]["num_training_steps"]  # as in what diffusers trained
    save_checkpoint(checkpoint_path(Path("foreign"), 6), saved)
    assert np.array_equal(saved_images(checkpoint="foreign"), plain)


def test_weights_beside_which_a_guide_lies_are_guided_by_it(here):
    train(tiny(norm_groups=4))
    convert(ConvertConfig(to_diffusers="run", out="mine"))
    plain = saved_images(checkpoint="mine")
    convert(ConvertConfig(to_diffusers=EARLY, out="mine_guide"))
    assert not np.array_equal(saved_images(checkpoint="mine"), plain)
    assert np.array_equal(saved_images(checkpoint="mine", guide="none"), plain)


def test_guide_of_other_images_is_refused(run):
    other = train(tiny(experiment_name="other", prediction="eps"))
    with pytest.raises(UsageError, match="^--guide: .*prediction is eps, .* is v"):
        saved_images(guide=str(other))
    with pytest.raises(CheckpointError):
        saved_images(guide="nothing.pt")


@pytest.mark.parametrize(
    "words, part",
    [
        (["--num_images", "0"], "--num_images"),
        (["--steps", "51", "--sampler", "ddim"], "--steps"),
        (["--eta", "1"], "--eta"),
        (["--out", "faces.jpg"], "--out"),
        (["--sampler", "euler"], "--sampler"),
        (["--interpolate", "1"], "--interpolate"),
        (["--interpolate", "1", "2", "--sampler", "ddpm"], "--sampler"),
        (["--condition", "Smiling"], "--condition"),
        (["--guidance", "2"], "--guidance"),
        (["--autoguidance", "0.5"], "--autoguidance"),
        (["--sheet"], "--sheet"),
        (["--whatever"], "--whatever"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(run, monkeypatch, words, part):
    monkeypatch.setattr("sys.argv", ["sample.py", *words])
    with pytest.raises(UsageError, match=f"^{part}: .*Fix: [^\n]*$"):
        main()
    assert not list(run.parent.glob("*.png"))


COMMANDS = [Config, SampleConfig, EvaluateConfig, TrainSpeedConfig, SampleSpeedConfig]
COMMANDS += [DataSpeedConfig, QualityConfig, AccuracyConfig, EditingConfig]


@pytest.mark.parametrize("cls", COMMANDS)
def test_every_flag_has_a_help_text(cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        flags.parse(cls, ["--help"], "")
    shown = " ".join(re.sub("[^ -~]", " ", capsys.readouterr().out).split())
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.MULTILINE))
    for field in fields(cls):
        assert comments[field.name] in shown, f"--{field.name}"


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(here):
    assert_error(run_script("sample.py", "--steps", "0"), 2, "--steps: is 0")


def test_checkpoint_of_another_kind_is_refused(run):
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    with pytest.raises(CheckpointError):
        load_trained("other.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(settings={}),
        lambda state: state["settings"].pop("attributes"),
        lambda state: state["settings"].update(attributes=["Smiling"]),
        lambda state: state["settings"].update(img_size="large"),
        lambda state: state.update(settings=["img_size"]),
        lambda state: state.update(unet=None),
        lambda state: state["unet"].update(wings=2),
        lambda state: state["unet"].update(channels=-4),
        lambda state: state["unet"].update(img_size=7),
        lambda state: state["diffusion"].update(num_timesteps=0),
        lambda state: state["diffusion"].update(noise_schedule="sudden"),
        lambda state: state.update(ema=[]),
        lambda state: state["ema"].update(model=[1, 2]),
        lambda state: state["ema"]["model"].popitem(),
        lambda state: state.pop("step"),
    ],
)
def test_checkpoint_that_says_what_cannot_be_is_one_line(run, change):
    path = find_checkpoint(run)
    state = load_checkpoint(path)
    change(state)
    torch.save(state, path)
    sign(path)
    with pytest.raises(CheckpointError, match=path.name):
        load_trained(path)


def test_newest_good_checkpoint_of_a_run_is_taken_and_named(run, capsys):
    newest, before = checkpoint_path(run, 6), checkpoint_path(run, 3)
    newest.write_bytes(newest.read_bytes()[:-100])
    for given in (run, None, run / "checkpoints"):
        assert load_trained(given).path.resolve() == before.resolve()
        assert before.name in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=newest.name):  # it is asked for by name
        load_trained(newest)
    newest.unlink()
    newest.mkdir()
    assert load_trained(run).path == before


def test_dead_links_among_the_runs_are_no_runs(run, here):
    needs_posix()
    (here / "gone" / "checkpoints").mkdir(parents=True)
    (here / "gone" / "checkpoints" / "step_00000009.pt").symlink_to("nowhere.pt")
    assert load_trained(None).step == 6


def test_images_that_are_not_finite_numbers_are_not_saved(run):
    path = find_checkpoint(run)
    state = load_checkpoint(path)
    for weights in state["ema"]["model"].values():
        weights.fill_(1e30)
    save_checkpoint(path, state)
    for out in ("faces.png", "way.gif", "faces"):
        with pytest.raises(CheckpointError, match="not finite"):
            sample(SampleConfig("run", num_images=2, steps=2, out=out))
        assert not os.path.exists(out) or not os.listdir(out)


@pytest.mark.parametrize(
    "out, code",
    [
        ("", 2),
        ("folder.png", 2),  # is a folder
        ("file/faces.png", 2),
        ("file", 2),
        ("/dev/null/a.png", 2),
        ("a" * 300 + ".png", 5),
        ("a" * 300 + "/b.png", 5),
        ("full/faces.png", 5),
        ("full", 5),
    ],
)
def test_where_nothing_can_be_saved_is_found_before_generating(run, monkeypatch, out, code):
    os.mkdir("folder.png")
    open("file", "w").close()
    touch = Path.touch

    def read_only(path):
        if "full" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        touch(path)

    monkeypatch.setattr(Path, "touch", read_only)
    monkeypatch.setattr("sample.generate", lambda *_, **__: pytest.fail("generates"))
    with pytest.raises(UserError) as error:
        sample(SampleConfig("run", num_images=2, steps=2, out=out))
    assert error.value.exit_code == code and "Fix: " in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [dict(num_images=10**12), dict(num_images=10**12, interpolate=(0, 1)), dict(steps=10**12)],
)
def test_out_of_memory_is_known_as_such_before_generating(run, monkeypatch, changes):
    monkeypatch.setattr("generate.UNet.forward", lambda *_: pytest.fail("generates"))
    with pytest.raises(Exception) as error:
        sample(SampleConfig("run", **changes))
    assert is_out_of_memory(error.value)


def test_out_of_memory_is_one_line_that_names_what_to_lower(run):
    result = run_script("sample.py", "--num_images", str(10**12), timeout=500)
    assert_error(result, 5, "memory", "--num_images")


def test_images_of_two_commands_do_not_mix_in_a_folder(run):
    first = saved_images()
    with pytest.raises(UsageError, match="--out: out holds images already"):
        sample(SampleConfig("run", num_images=2, steps=2, seed=1, out="out"))
    assert len(os.listdir("out")) == len(first) == 5


def test_flags_are_checked_before_anything_is_loaded(here):
    with pytest.raises(UsageError, match="--steps"):
        sample(SampleConfig(checkpoint="not there", steps=0))
