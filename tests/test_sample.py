"""Images from a checkpoint: which weights, which noise, which guide, which files."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_error, needs_posix, refuse, run_script, tensors_equal, tiny
from PIL import Image

from formats.weights import find_checkpoint
from generate import add_guide, generate, load_trained
from sample import SampleConfig, sample
from system.errors import CheckpointError, UsageError, UserError
from train import train
from unet import GroupNorm
from utils import checkpoint_path, list_checkpoints, load_checkpoint, sign

HALF_A_GREY_LEVEL = 1 / 255  # of images in [-1, 1]
EARLY = "run/checkpoints/step_00000003.pt"


def saved_images(**options) -> np.ndarray:
    """The pixels that `sample` saves, one image after another."""
    shutil.rmtree("out", ignore_errors=True)
    options = dict(checkpoint="run", steps=3, out="out", num_images=5) | options
    sample(SampleConfig(**options))
    return np.stack([np.asarray(Image.open(path)) for path in sorted(Path("out").iterdir())])


def change(path: Path, action) -> None:
    """Change what a checkpoint holds, and sign it as good."""
    state = torch.load(path, weights_only=True)
    action(state)
    torch.save(state, path)
    sign(path)


# The weights -------------------------------------------------------------------------------------


def test_command_prints_its_checkpoint_steps_and_guide(run):
    """A real start."""
    words = ["--num_images", "4", "--steps", "3", "--out", "faces.png"]
    result = run_script("sample.py", *words, new=True)
    assert result.returncode == 0, result.stderr
    checkpoint = "run/checkpoints/step_00000006.pt, trained for 6 steps"
    assert f"{checkpoint}, guided by {EARLY} (two networks; --guide none uses one)" in result.stdout
    assert "saved faces.png" in result.stdout and Image.open("faces.png").size == (22, 22)
    result = run_script("sample.py", "--guide", "none", *words)
    assert f"{checkpoint}\n" in result.stdout


def test_images_come_from_the_average_or_from_raw_weights(run):
    saved = load_checkpoint(find_checkpoint(run))
    averaged = dict(load_trained(run, half=False).model.state_dict())
    assert tensors_equal(averaged, saved["ema"]["model"])
    raw = dict(load_trained(run, raw=True, half=False).model.state_dict())
    assert tensors_equal(raw, saved["model"]) and not tensors_equal(raw, averaged)
    assert not np.array_equal(saved_images(), saved_images(raw=True))


def test_checkpoint_rebuilds_its_network_and_diffusion(here):
    changes = dict(num_timesteps=30, noise_schedule="linear", prediction="eps", channels=16)
    train(tiny(num_training_steps=1, **changes))
    trained = load_trained("run")
    assert trained.diffusion.num_timesteps == 30 and trained.diffusion.prediction == "eps"
    assert trained.diffusion.betas[-1] > 0.5 and trained.model.conv_in.out_channels == 16
    assert not trained.model.training and trained.img_size == 8 and trained.step == 1


def test_weights_are_cast_once_and_norms_stay_in_float32(run, monkeypatch):
    half = {"fp16": torch.bfloat16, "no": None}
    monkeypatch.setattr("generate.autocast_dtype", lambda precision, device: half[precision])
    trained, plain = load_trained(run), load_trained(run, half=False)
    for module in trained.model.modules():
        expected = torch.float32 if isinstance(module, GroupNorm) else torch.bfloat16
        assert all(weights.dtype == expected for weights in module.parameters(recurse=False))
    # Autocast over weights in float32 rounds them alike, at each evaluation.
    autocast = replace(plain, dtype=torch.bfloat16)
    images, same = (next(generate(each, range(4), steps=3)) for each in (trained, autocast))
    torch.testing.assert_close(same, images, rtol=0, atol=HALF_A_GREY_LEVEL)


@pytest.mark.parametrize(
    "action",
    [
        lambda state: state["settings"].pop("attributes"),
        lambda state: state["settings"].update(attributes=["Smiling"]),
        lambda state: state["settings"].update(img_size=16),
        lambda state: state["unet"].update(wings=2),
        lambda state: state["diffusion"].update(noise_schedule="sudden"),
        lambda state: state["ema"]["model"].popitem(),
        lambda state: state.pop("ema"),
    ],
)
def test_checkpoint_that_says_what_cannot_be_is_one_error(run, action):
    path = find_checkpoint(run)
    change(path, action)
    with pytest.raises(CheckpointError, match=f"{path.name}.*Fix: "):
        load_trained(path)


# Which run ---------------------------------------------------------------------------------------


def test_newest_run_is_taken_if_none_is_named(run):
    needs_posix()
    shutil.copytree(run, "other")
    for path in list_checkpoints(Path("other")):
        os.utime(path, (1e9, 1e9))
    dead = Path("gone/checkpoints/step_00000009.pt")  # a dead link is no run
    dead.parent.mkdir(parents=True)
    dead.symlink_to("nowhere.pt")
    assert load_trained(None).path == find_checkpoint("run") == checkpoint_path(run, 6)
    assert find_checkpoint("other/checkpoints").parts[0] == "other"


def test_damaged_checkpoint_gives_way_unless_it_is_named(run, capsys):
    newest = checkpoint_path(run, 6)
    newest.write_bytes(newest.read_bytes()[:-100])
    for given in (run, None, run / "checkpoints"):
        assert load_trained(given).path == checkpoint_path(run, 3)
        assert "taking step_00000003.pt" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=newest.name):
        load_trained(newest)


# The noise ---------------------------------------------------------------------------------------


def test_image_i_is_the_same_whatever_the_batch_size(run):
    trained, options = load_trained(run), dict(sampler="ddpm", steps=4)
    seven, three = (torch.cat(list(generate(trained, range(7), 3, n, **options))) for n in (7, 3))
    torch.testing.assert_close(seven, three, rtol=0, atol=HALF_A_GREY_LEVEL)
    alone = next(generate(trained, [5], 3, **options))
    torch.testing.assert_close(seven[5:6], alone, rtol=0, atol=HALF_A_GREY_LEVEL)
    assert seven.min() >= -1 and seven.max() <= 1


def test_seed_sampler_steps_and_eta_change_the_images(run):
    first = saved_images()
    np.testing.assert_array_equal(first, saved_images())
    for other in (dict(seed=1), dict(sampler="ddim"), dict(sampler="ddpm"), dict(steps=9)):
        assert not np.array_equal(first, saved_images(**other)), other
    a, b = saved_images(sampler="ddim"), saved_images(sampler="ddim", eta=1.0)
    assert not np.array_equal(a, b)


def test_interpolation_goes_from_one_image_to_the_other(run):
    ends = saved_images(num_images=4, steps=6)
    way = saved_images(interpolate=(1, 3), num_images=5, steps=6)
    for image, end in ((way[0], ends[1]), (way[-1], ends[3])):
        assert np.abs(image.astype(int) - end).max() <= 1
    assert len(way) == 5 and not np.array_equal(way[2], way[0])
    options = dict(num_images=5, steps=3, interpolate=(0, 1), out="between.gif")
    assert Image.open(sample(SampleConfig("run", **options))).n_frames == 5


# The guide ---------------------------------------------------------------------------------------


def test_guided_network_goes_from_its_early_self_through_itself_and_on(run):
    late, early = load_trained("run", half=False), load_trained(EARLY, half=False)
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 40])
    good, bad = late.model(x_t, t), early.model(x_t, t)
    assert not torch.equal(good, bad)
    for strength in (1.0, 1.5, 2.0):
        guided = add_guide(late, EARLY, strength)
        torch.testing.assert_close(guided.model(x_t, t), good + (strength - 1) * (good - bad))


def test_run_is_guided_by_its_own_early_checkpoint(run):
    assert np.array_equal(saved_images(), saved_images(guide=EARLY))
    plain = saved_images(guide="none")
    assert not np.array_equal(saved_images(), plain)
    assert np.array_equal(saved_images(autoguidance=1.0), plain)
    early = saved_images(checkpoint=EARLY)  # nothing earlier is left to guide it
    assert np.array_equal(early, saved_images(checkpoint=EARLY, guide="none"))
    shutil.copy(find_checkpoint(run), "alone.pt")  # without a run around it
    assert np.array_equal(saved_images(checkpoint="alone.pt"), plain)


def test_folder_of_weights_is_guided_by_the_folder_beside_it(there):
    assert add_guide(load_trained("folder")).guide is None
    shutil.copytree("folder", "folder_guide")
    assert add_guide(load_trained("folder")).guide.is_relative_to(there / "folder_guide")


def test_guide_of_another_run_s_kind_is_refused(run):
    change(Path(EARLY), lambda state: state["settings"].update(prediction="eps"))
    with pytest.raises(UsageError, match="^--guide: .*its prediction is eps, but .* has v"):
        saved_images()
    with pytest.raises(CheckpointError, match="nothing.pt"):
        saved_images(guide="nothing.pt")


# The files ---------------------------------------------------------------------------------------


def test_suffix_of_out_says_what_is_saved(run):
    grid = sample(SampleConfig("run", num_images=4, steps=3, out="a/grid.png"))
    cells, single = np.asarray(Image.open(grid)), saved_images(num_images=4, batch_size=3)
    assert cells.shape == (22, 22, 3) and single.shape == (4, 8, 8, 3)
    np.testing.assert_array_equal(cells[2:10, 12:20], single[1])
    assert Image.open(sample(SampleConfig("run", num_images=4, out="grid.jpg"))).format == "JPEG"
    way = Image.open(sample(SampleConfig("run", num_images=4, steps=6, out="way.gif")))
    assert way.format == "GIF" and 2 < way.n_frames <= 41 and way.width >= 256


def test_images_that_are_not_finite_numbers_are_not_saved(run):
    path = find_checkpoint(run)
    change(path, lambda state: [part.fill_(1e30) for part in state["ema"]["model"].values()])
    for out in ("faces.png", "way.gif", "faces"):
        with pytest.raises(CheckpointError, match="not finite"):
            sample(SampleConfig("run", num_images=2, steps=2, out=out))
        assert not os.path.exists(out) or not os.listdir(out)


def test_killed_sampler_leaves_no_partial_image(run, monkeypatch):
    def die(self, file, *_, **__):
        Path(file).write_bytes(b"\x89PNG half")
        raise KeyboardInterrupt

    before = set(Path().rglob("*.*"))
    for out in ("faces.png", "way.gif", "faces"):
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "save", die)
            with pytest.raises(KeyboardInterrupt):
                sample(SampleConfig("run", num_images=2, steps=2, out=out))
        assert set(Path().rglob("*.*")) == before


@pytest.mark.parametrize(
    "out, code",
    [
        ("folder.png", 2),  # is a folder
        ("file/faces.png", 2),
        ("file", 2),
        ("used", 2),  # holds images
        ("a" * 300 + ".png", 5),
        ("full", 5),
    ],
)
def test_place_that_cannot_be_written_is_found_before_generating(run, monkeypatch, out, code):
    os.mkdir("folder.png")
    open("file", "w").close()
    os.mkdir("used")
    open("used/000003.png", "w").close()
    if out == "full":
        monkeypatch.setattr(Path, "touch", refuse(errno.EROFS))
    monkeypatch.setattr("sample.generate", lambda *_, **__: pytest.fail("generates"))
    with pytest.raises(UserError, match="Fix: ") as error:
        sample(SampleConfig("run", num_images=2, steps=2, out=out))
    assert error.value.exit_code == code


# Mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, flag",
    [
        (dict(num_images=0), "num_images"),
        (dict(steps=51, sampler="ddim"), "steps"),
        (dict(eta=1.0), "eta"),
        (dict(out="faces.bmp"), "out"),
        (dict(out=""), "out"),
        (dict(sampler="euler"), "sampler"),
        (dict(interpolate=(1,)), "interpolate"),
        (dict(interpolate=(1, 2), sampler="ddpm"), "interpolate"),
        (dict(interpolate=(1, 2), sheet=True), "interpolate"),
        (dict(sheet=True, out="faces"), "out"),
        (dict(sheet=True), "sheet"),
        (dict(condition=("Smiling",)), "condition"),
        (dict(guidance=2.0), "guidance"),
        (dict(autoguidance=0.5), "autoguidance"),
    ],
)
def test_what_cannot_be_is_one_error_and_leaves_nothing(run, changes, flag):
    with pytest.raises(UsageError, match=f"^--{flag}: [^\n]*Fix: [^\n]*$"):
        sample(SampleConfig("run", **changes))
    assert not list(Path().glob("*.png"))


def test_mistakes_of_the_command_are_one_line(run):
    words = ["--checkpoint", "no.pt"]
    assert_error(run_script("sample.py", *words, "--steps", "0"), 2, "--steps: is 0")
    assert_error(run_script("sample.py", *words), 4, "no.pt", "does not exist")
    result = run_script("sample.py", "--num_images", str(10**12), timeout=500)
    assert_error(result, 5, "memory", "--num_images")
