"""Weights from anywhere: found, sampled from, and started from."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, WIDE, as_flags, assert_error, final, run_script, tensors_equal, tiny
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from engine.state import diffusion_arguments, make_state, unet_arguments
from formats import weights as weights_module
from formats.weights import Saved, network_constants, open_weights, start_from
from generate import generate, load_trained
from system.errors import CheckpointError
from train import train
from unet import UNet


def images_of(checkpoint, **options):
    return torch.cat(list(generate(load_trained(checkpoint), range(3), steps=4, **options)))


# Finding them ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", ["folder", "folder/unet/diffusion_pytorch_model.safetensors", Path("folder/unet")]
)
def test_folder_of_diffusers_is_sampled_from_as_the_run_is(there, given):
    assert torch.equal(images_of(given), images_of("run"))
    trained = load_trained(given)
    assert trained.step == 3 and trained.img_size == 8 and trained.path.is_file()


def test_nothing_given_means_the_newest_run_or_what_comes_with_the_program(there, monkeypatch):
    monkeypatch.setattr(weights_module, "SHIPPED", there / "weights")
    (there / "weights").mkdir()
    shutil.move("folder", there / "weights" / weights_module.DEFAULT)
    for given in (None, "", "run"):
        assert open_weights(given).path.parent.parent.name == "run"
    shutil.rmtree("run")
    saved = open_weights(None)
    assert saved.path.is_relative_to(there / "weights") and saved.step == 3
    assert open_weights(weights_module.DEFAULT).path == saved.path
    (there / weights_module.DEFAULT).mkdir()  # of a run of that name, before it has a checkpoint
    assert open_weights(weights_module.DEFAULT).path == saved.path
    shutil.rmtree("weights")
    with pytest.raises(CheckpointError, match="train first"):
        open_weights(None)


@pytest.mark.parametrize("folder", sorted(weights_module.SHIPPED.glob("*/unet")))
def test_weights_that_come_with_the_program_are_small_and_loaded_by_diffusers_too(folder):
    folder = folder.parent
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 10_000_000
    ours = load_trained(folder.name, half=False, device="cpu").model
    theirs = DDPMPipeline.from_pretrained(folder).unet
    x, t = torch.randn(2, 3, ours.img_size, ours.img_size), torch.tensor([0, 500])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs(x, t).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "given, part", [("nothing", "nothing: does not exist"), (".", "has no weights")]
)
def test_weights_that_are_not_there_are_answered_by_those_that_are(there, given, part):
    with pytest.raises(CheckpointError, match=part) as error:
        open_weights(given)
    names = str(error.value).split(": ")[-1].split(", ")
    assert names == ["run", "celeba_64", "synthetic_32"]


# Starting from them ------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["run", "folder"])
def test_new_run_starts_from_the_average_and_from_step_0(there, given, capsys):
    options = dict(experiment_name="new", init_from=given, num_training_steps=1)
    train(tiny(**WIDE, **options, learning_rate=1e-12))
    new, old = final("new"), final("run")["ema"]["model"]
    assert new["step"] == 1 and new["ema"]["num_updates"] == 1
    for name, tensor in new["ema"]["model"].items():
        torch.testing.assert_close(tensor, old[name], rtol=0, atol=1e-9)
        torch.testing.assert_close(new["model"][name], old[name], rtol=0, atol=1e-9)
    assert "started from" in capsys.readouterr().out


@pytest.mark.parametrize("img_size", [8, 32])
def test_constants_of_weights_build_their_network_for_images_of_another_size(img_size):
    arguments = dict(img_size=16, channels=24, num_res_blocks=1, attn_resolutions=(16, 12, 4))
    arguments |= dict(channel_mults=(), head_dim=8, norm_groups=0)
    unet = UNet(**arguments)
    saved = Saved(Path("a.pt"), arguments, {}, {}, 1, {}, {}, {})
    constants = network_constants(saved, img_size)
    assert constants["attn_resolutions"] == (img_size, img_size // 4)
    UNet(img_size=img_size, **constants).load_state_dict(unet.state_dict())


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
def test_map_of_the_attributes_is_kept_if_they_are_the_same(before, now, kept, capsys):
    cpu, config = torch.device("cpu"), tiny(attributes=before, seed=1)
    old = make_state(config, cpu, unet_arguments(config))
    new = make_state(tiny(attributes=now), cpu, unet_arguments(tiny(attributes=now)))
    fresh = new.model.state_dict().get("attribute_map.weight")
    fresh = None if fresh is None else fresh.clone()
    contents = {"unet": unet_arguments(config), "diffusion": diffusion_arguments(config)}
    contents |= {"settings": {"attributes": before}, "step": 7, "ema": old.ema.state_dict()}
    saved = Saved.of(Path("old.pt"), contents | {"model": old.model.state_dict()})
    start_from(new.model, new.ema, saved, tiny(attributes=now))
    for model in (new.model, new.ema.model):
        weights, theirs = model.state_dict(), old.ema.model.state_dict()
        found = weights.pop("attribute_map.weight", None)
        wanted = theirs.pop("attribute_map.weight", None) if kept else fresh
        assert tensors_equal(dict(weights), {name: theirs[name] for name in weights})
        assert found is None and wanted is None or torch.equal(found, wanted)
    text = capsys.readouterr().out
    assert "started from old.pt, step 7" in text and ("attributes" in text) != kept


def test_command_takes_the_network_from_the_weights_unless_a_flag_contradicts(there):
    """diffusers gives 32 channels 32 groups, which no constant of ours would."""
    shape = dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1)
    shape |= dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"))
    shape |= dict(up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    DDPMPipeline(UNet2DModel(**shape), DDPMScheduler(500)).save_pretrained("theirs")
    given = {**TINY, "experiment_name": "new", "img_size": 16, "num_training_steps": 1}
    network = ("channels", "channel_mults", "num_res_blocks", "attn_resolutions", "head_dim")
    given = {name: value for name, value in given.items() if name not in network}
    words = as_flags({**given, "init_from": "theirs"})
    result = run_script("train.py", *words, "--channels", "64")
    assert_error(result, 2, "--init_from", "another network", "--channels 32")
    result = run_script("train.py", *words)
    assert result.returncode == 0, result.stderr
    assert "--norm_groups 32" in result.stdout and "note: it was trained with" in result.stdout
    assert final("new")["unet"]["attn_resolutions"] == (8,)


def test_edited_constant_takes_the_network_from_the_weights_as_a_flag_does(there):
    """Nobody typed a flag: `init_from` is edited in train.py."""
    train(replace(tiny(num_training_steps=1), experiment_name="new", init_from="run"), frozenset())
    assert final("new")["unet"]["channels"] == WIDE["channels"] != tiny().channels


def test_network_of_another_family_is_started_from_and_resumed(there):
    """Its padding, its eps and its frequencies are no constants of a run: its checkpoints keep
    them."""
    shape = dict(sample_size=8, block_out_channels=(64, 64), layers_per_block=1)
    shape |= dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), norm_eps=1e-3)
    shape |= dict(up_block_types=("AttnUpBlock2D", "UpBlock2D"), downsample_padding=0)
    theirs = UNet2DModel(**shape)
    scheduler = DDPMScheduler(50, beta_start=0.1 / 50, beta_end=20 / 50)
    DDPMPipeline(theirs, scheduler).save_pretrained("theirs")
    options = dict(channels=64, channel_mults=(1, 1), head_dim=8, norm_groups=32)
    options |= dict(experiment_name="new", noise_schedule="linear", init_from="theirs")
    train(tiny(**options, num_training_steps=1, learning_rate=1e-12))
    shutil.rmtree("theirs")
    train(tiny(**options, num_training_steps=2, learning_rate=1e-12, resume=True))
    model = load_trained("new", half=False).model
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 15])
    with torch.no_grad():
        torch.testing.assert_close(model(x, t), theirs(x, t).sample, rtol=1e-5, atol=1e-5)
