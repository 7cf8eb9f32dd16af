"""Weights from anywhere: sampled from, converted by the command, and started from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_flags, assert_error, run_script, tensors_equal, tiny
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from convert import ConvertConfig, convert
from engine.state import diffusion_arguments, make_state, unet_arguments
from evaluate import EvaluateConfig, evaluate
from formats import weights as pretrained
from formats.weights import open_weights, start_from
from generate import generate, load_trained
from sample import SampleConfig, sample
from system.errors import CheckpointError, UsageError, UserError
from train import train
from utils import list_checkpoints, load_checkpoint

# A network that diffusers has too: one number of groups, one of channels of a head.
WIDE = dict(channels=64, channel_mults=(1, 1), head_dim=64, num_timesteps=20)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run, `run`, and the same for diffusers, `folder`."""
    patch = pytest.MonkeyPatch()
    patch.chdir(tmp_path_factory.mktemp("made"))
    Path("pictures").mkdir()
    random = np.random.default_rng(0)
    for i in range(22):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pictures/{i:03d}.png")
    train(tiny(**WIDE, num_training_steps=3))
    convert(ConvertConfig(to_diffusers="run", out="folder"))
    yield Path().resolve()
    patch.undo()


@pytest.fixture
def there(made, tmp_path, monkeypatch):
    """A folder of the test's own with the images, the run and its folder for diffusers."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def images_of(checkpoint, **options):
    return torch.cat(list(generate(load_trained(checkpoint), range(3), steps=4, **options)))


def newest(folder):
    return load_checkpoint(list_checkpoints(Path(folder))[0])


# Where weights lie -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", ["folder", "folder/unet/diffusion_pytorch_model.safetensors", Path("folder")]
)
def test_folder_of_diffusers_is_sampled_from_as_the_run_is(there, given):
    assert torch.equal(images_of(given), images_of("run"))
    trained = load_trained(given)
    assert trained.step == 3 and trained.img_size == 8 and trained.path.is_file()


def test_nothing_given_means_the_newest_run_or_what_is_shipped(there, monkeypatch):
    monkeypatch.setattr(pretrained, "SHIPPED", there / "weights")
    (there / "weights").mkdir()
    shutil.move("folder", there / "weights" / pretrained.DEFAULT)
    assert open_weights(None)[0].parent.parent.name == "run"
    shutil.rmtree("run")
    path, saved = open_weights(None)
    assert path.is_relative_to(there / "weights") and saved["step"] == 3
    assert open_weights(pretrained.DEFAULT)[0] == path
    with pytest.raises(CheckpointError, match=r"^\.: "):  # no name of weights
        open_weights(".")
    (there / pretrained.DEFAULT).mkdir()  # of a run of that name, before it has a checkpoint
    assert open_weights(pretrained.DEFAULT)[0] == path
    shutil.rmtree("weights")
    with pytest.raises(CheckpointError, match="train first"):
        open_weights(None)


@pytest.mark.parametrize("folder", sorted(pretrained.SHIPPED.glob("*/unet")))
def test_weights_that_come_with_the_program_are_small_and_loaded_by_diffusers_too(folder):
    folder = folder.parent
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 10_000_000
    ours = load_trained(folder.name, half=False, device="cpu").model
    theirs = DDPMPipeline.from_pretrained(folder).unet
    x, t = torch.randn(2, 3, ours.img_size, ours.img_size), torch.tensor([0, 500])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs(x, t).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", ["nothing", "pictures", "pictures/000.png"])
def test_what_holds_no_weights_is_one_line(there, given):
    with pytest.raises(CheckpointError, match=given):
        open_weights(given)


def test_run_is_taken_for_a_run_though_it_has_a_config_json(there):
    assert (there / "run" / "config.json").exists()
    assert open_weights("run")[0].suffix == ".pt"


def test_folder_of_diffusers_is_evaluated(there):
    config = EvaluateConfig(checkpoint="folder", path_to_data="pictures", samplers=("ddim:2",))
    options = dict(num_images=4, num_reference=4, features="none", loss_draws=2)
    path = evaluate(EvaluateConfig(**{**vars(config), **options}))
    assert json.loads(path.read_text())["step"] == 3


# The command -------------------------------------------------------------------------------------


def test_command_converts_there_and_back(there):
    result = run_script("convert.py", "--to_diffusers", "run", "--out", "there", "--half", new=True)
    assert result.returncode == 0 and "there" in result.stdout, result.stderr
    result = run_script("convert.py", "--from_diffusers", "folder", "--out", "back")
    assert result.returncode == 0, result.stderr
    assert torch.equal(images_of("back"), images_of("run"))
    saved = newest("back")
    assert saved["step"] == 3 and saved["settings"]["img_size"] == 8
    ours = newest("run")
    assert tensors_equal(saved["ema"]["model"], ours["ema"]["model"])
    assert saved["diffusion"] == ours["diffusion"]


def test_nothing_of_the_machine_is_in_the_folder(there):
    settings = json.loads((there / "folder" / "run.json").read_text())["settings"]
    assert not settings.keys() & {"experiment_name", "path_to_data", "init_from"}
    assert str(there) not in "".join(path.read_text() for path in there.glob("folder/**/*.json"))


@pytest.mark.parametrize(
    "flags, part",
    [
        (dict(), "--to_diffusers: not one thing"),
        (dict(to_diffusers="run", from_diffusers="folder", out="x"), "not one thing"),
        (dict(to_diffusers="run"), "--out: is not given"),
        (dict(to_diffusers="run", out="folder"), "--out: folder exists"),
        (dict(to_diffusers="run", out="x", condition=("Smiling",)), "--condition"),
        (dict(from_diffusers="run", out="x"), "--from_diffusers"),
        (dict(from_diffusers="folder", out="x", half=True), "--half"),
        (dict(from_diffusers="nothing", out="x"), "nothing: does not exist"),
    ],
)
def test_mistakes_of_the_command_are_refused_and_write_nothing(there, flags, part):
    with pytest.raises(UserError, match=part):
        convert(ConvertConfig(**flags))
    assert not (there / "x").exists()


def test_mistake_of_the_command_is_one_line(there):
    assert_error(run_script("convert.py", "--from_diffusers", "pictures", "--out", "x"), 4, "holds")


def test_network_that_cannot_be_expressed_is_one_line_and_writes_nothing(here):
    train(tiny(num_training_steps=1, channels=24, head_dim=24))
    with pytest.raises(UsageError, match="cannot be expressed in diffusers .norm_groups: "):
        convert(ConvertConfig(to_diffusers="run", out="folder"))
    assert not Path("folder").exists()


# Starting from weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["run", "folder"])
def test_new_run_starts_from_the_average_and_from_step_0(there, given, capsys):
    options = dict(experiment_name="new", init_from=given, num_training_steps=1)
    train(tiny(**WIDE, **options, learning_rate=1e-12))
    new, old = newest("new"), newest("run")["ema"]["model"]
    assert new["step"] == 1 and new["ema"]["num_updates"] == 1
    for name, tensor in new["ema"]["model"].items():
        torch.testing.assert_close(tensor, old[name], rtol=0, atol=1e-9)
        torch.testing.assert_close(new["model"][name], old[name], rtol=0, atol=1e-9)
    assert "started from" in capsys.readouterr().out


def test_resumed_run_goes_on_from_its_own_checkpoint(there):
    options = dict(experiment_name="new", init_from="run", save_every=2)
    train(tiny(**WIDE, **options, num_training_steps=4))
    shutil.move("new", "whole")
    train(tiny(**WIDE, **options, num_training_steps=2))
    train(tiny(**WIDE, **{**options, "init_from": ""}, num_training_steps=4, resume=True))
    assert tensors_equal(newest("new")["ema"], newest("whole")["ema"])


def test_images_of_another_size_are_started_with_where_the_network_allows_it(there):
    options = dict(WIDE, experiment_name="large", init_from="folder", num_training_steps=1)
    train(tiny(**options, img_size=16, attn_resolutions=(8,), learning_rate=1e-12))
    new, old = newest("large")["model"], newest("run")["ema"]["model"]
    assert all(torch.allclose(new[name], old[name], atol=1e-9) for name in old)


@pytest.mark.parametrize(
    "before, now, kept",
    [
        (("Smiling", "Male"), ("Smiling", "Male"), True),
        (("Smiling", "Male"), ("Male", "Smiling"), False),
        (("Smiling",), ("Smiling", "Male"), False),
        (("Smiling",), (), False),
        ((), ("Smiling",), False),
    ],
)
def test_map_of_the_attributes_is_kept_where_they_are_the_same(before, now, kept, capsys):
    cpu = torch.device("cpu")
    config = tiny(attributes=before, seed=1)
    old, new = make_state(config, cpu, False), make_state(tiny(attributes=now), cpu, False)
    fresh = new.model.state_dict().get("attribute_map.weight")
    fresh = None if fresh is None else fresh.clone()
    saved = {"unet": unet_arguments(config), "diffusion": diffusion_arguments(config)}
    saved |= {"settings": {"attributes": before}, "step": 7, "ema": old.ema.state_dict()}
    start_from(new, Path("old.pt"), saved, tiny(attributes=now))
    for model in (new.model, new.ema.model):
        weights, theirs = model.state_dict(), old.ema.model.state_dict()
        found = weights.pop("attribute_map.weight", None)
        wanted = theirs.pop("attribute_map.weight", None) if kept else fresh
        assert tensors_equal(dict(weights), {name: theirs[name] for name in weights})
        assert found is None and wanted is None or torch.equal(found, wanted)
    text = capsys.readouterr().out
    assert "started from old.pt, step 7" in text and ("attributes" in text) != kept


def test_network_of_another_shape_is_refused_with_the_flags_that_fit(there):
    words = as_flags({**vars(tiny(**WIDE)), "experiment_name": "new", "init_from": "folder"})
    words += ["--img_size", "16", "--channels", "32"]
    wanted = "--channels 64 --norm_groups 32 --attn_resolutions 8"
    assert_error(run_script("train.py", *words), 2, "--init_from", "another network", wanted)
    words += wanted.split()
    result = run_script("train.py", *words, "--num_training_steps", "1")
    assert result.returncode == 0, result.stderr


def test_network_of_another_family_is_started_from_and_resumed(there):
    """Its padding, its eps and its frequencies are no constants of a run: its checkpoints keep
    them."""
    shape = dict(sample_size=8, block_out_channels=(64, 64), layers_per_block=1)
    shape |= dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), norm_eps=1e-3)
    shape |= dict(up_block_types=("AttnUpBlock2D", "UpBlock2D"), downsample_padding=0)
    theirs = UNet2DModel(**shape)
    scheduler = DDPMScheduler(50, beta_start=0.1 / 50, beta_end=20 / 50)
    DDPMPipeline(theirs, scheduler).save_pretrained("theirs")
    options = dict(channels=64, channel_mults=(1, 1), head_dim=8)
    options |= dict(experiment_name="new", noise_schedule="linear", init_from="theirs")
    train(tiny(**options, num_training_steps=1, learning_rate=1e-12))
    shutil.rmtree("theirs")
    train(tiny(**options, num_training_steps=2, learning_rate=1e-12, resume=True))
    model = load_trained("new", half=False).model
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 15])
    with torch.no_grad():
        torch.testing.assert_close(model(x, t), theirs(x, t).sample, rtol=1e-5, atol=1e-5)


def test_weights_that_are_not_there_are_one_line_before_anything_is_written(there):
    with pytest.raises(CheckpointError, match="nothing"):
        train(tiny(**WIDE, experiment_name="new", init_from="nothing"))
    assert not list_checkpoints(Path("new"))


def test_sample_command_takes_a_folder_of_diffusers(there):
    options = dict(num_images=4, steps=2, out="faces.png")
    assert Image.open(sample(SampleConfig(checkpoint="folder", **options))).size == (22, 22)
