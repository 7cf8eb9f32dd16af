"""Folders of diffusers, written and read, compared with diffusers itself; nothing is downloaded."""

import errno
import json
import math
import os
import re
import struct
from pathlib import Path

import pytest
import torch
from conftest import needs_posix
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    UNet2DModel,
)
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from diffusion import NOISE_SCHEDULES, PREDICTIONS, Diffusion, image_generators
from formats import safe_files
from formats.diffusers_folder import diffusers_obstacle, write_folder
from formats.safe_files import read_json
from formats.weights import open_weights
from system.errors import CheckpointError, ResourceError
from unet import UNet

OURS = dict(img_size=16, channels=32, channel_mults=(1, 2), attn_resolutions=(8,), head_dim=32)
COSINE = dict(num_timesteps=20, noise_schedule="cosine", prediction="eps")
# google/ddpm-cifar10-32 and google/ddpm-celebahq-256, narrower and at fewer pixels; what they do
# not say is diffusers' default.
CIFAR10 = dict(
    sample_size=16,
    attention_head_dim=None,
    block_out_channels=(32, 64, 64, 64),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_eps=1e-6,
)
CELEBAHQ = CIFAR10 | dict(
    sample_size=32,
    block_out_channels=(32, 32, 64, 64, 128, 128),
    down_block_types=(*4 * ("DownBlock2D",), "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", *4 * ("UpBlock2D",)),
)
# examples/unconditional_image_generation.
SHAPE = ("sample_size", "block_out_channels", "down_block_types", "up_block_types")
EXAMPLE = {name: CELEBAHQ[name] for name in SHAPE}
PUBLISHED = {"cifar10": CIFAR10, "celebahq": CELEBAHQ, "example": EXAMPLE}


def shaken(model):
    """The model in eval mode with all its weights at random, none at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_ours(**changes):
    return shaken(UNet(**{**OURS, "dropout": 0.0, "norm_groups": 16, **changes}))


def theirs_in(folder, kind="cifar10", scheduler=None, **changes):
    """A folder that diffusers writes of a model like a published one; returns the model."""
    model = shaken(UNet2DModel(**{**PUBLISHED[kind], **changes}))
    scheduler = scheduler or DDPMScheduler(1000, variance_type="fixed_large")
    DDPMPipeline(model, scheduler).save_pretrained(folder)
    return model


def built(folder):
    saved = open_weights(folder)
    model = UNet(**saved.unet)
    model.load_state_dict(saved.ema)
    return model.eval(), Diffusion(**saved.diffusion)


def assert_same_output(ours, theirs, size):
    x, t = torch.randn(3, 3, size, size), torch.tensor([0, 17, 999])
    with torch.no_grad():
        a, b = ours(x, t), theirs(x, t)
    b = b if isinstance(b, torch.Tensor) else b.sample
    assert b.std() > 0.01
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# To diffusers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, prediction", [("linear", "eps"), ("cosine", "v")])
def test_pipelines_load_our_folder_and_make_our_images(tmp_path, schedule, prediction):
    model = make_ours()
    diffusion = COSINE | dict(noise_schedule=schedule, prediction=prediction)
    write_folder(tmp_path, model, diffusion, {})
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert_same_output(model, pipeline.unet, 16)
    pipeline.scheduler.set_timesteps(20)
    ours = Diffusion(**diffusion)
    betas, bar = ours.betas, ours.alphas_cumprod
    for t in (1, 10, 19):
        wanted = betas[t] * (1 - bar[t - 1]) / (1 - bar[t])  # Ho et al. 2020, eq. 7
        found = pipeline.scheduler._get_variance(t)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)
    pipeline = DDIMPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=20, use_clipped_model_output=True, output_type="np")
    theirs = pipeline(batch_size=2, generator=image_generators(7, range(2)), **options).images
    options = dict(sampler="ddim", steps=20, generator=image_generators(7, range(2)))
    images = (ours.sample(model, (2, 3, 16, 16), **options) / 2 + 0.5).permute(0, 2, 3, 1)
    assert images.std() > 0.1
    torch.testing.assert_close(torch.from_numpy(theirs), images, rtol=0, atol=1e-3)


def test_condition_is_built_in(tmp_path):
    model = make_ours(num_attributes=3)
    condition = torch.tensor([[1.0, -1.0, 0.0]])
    write_folder(tmp_path, model, COSINE, {}, condition)
    theirs = DDPMPipeline.from_pretrained(tmp_path).unet
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 19])
    with torch.no_grad():
        ours = model(x, t, condition.expand(2, -1))
        torch.testing.assert_close(theirs(x, t).sample, ours, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(x, t), ours, atol=1e-3)


def test_schedule_that_diffusers_has_no_name_for_is_kept_as_its_betas(tmp_path, monkeypatch):
    betas = torch.linspace(0.01, 0.3, 20, dtype=torch.float64)
    monkeypatch.setitem(NOISE_SCHEDULES, "straight", lambda T: betas)
    write_folder(tmp_path, make_ours(), COSINE | dict(noise_schedule="straight"), {})
    scheduler = DDPMPipeline.from_pretrained(tmp_path).scheduler
    torch.testing.assert_close(scheduler.betas.double(), betas, rtol=1e-6, atol=0)
    assert open_weights(tmp_path).diffusion["noise_schedule"] == "straight"


def test_network_that_diffusers_cannot_express_is_refused_by_its_setting(monkeypatch):
    block = (deeper := make_ours()).middle_block1
    block.time = torch.nn.Linear(block.time.in_features, 2 * block.time.out_features)
    uneven = make_ours(channels=24, norm_groups=0)
    other_heads = make_ours(channel_mults=(1, 3), head_dim=48, attn_resolutions=(16, 8))
    assert [diffusers_obstacle(make_ours(), each) for each in ("eps", "v")] == ["", ""]
    monkeypatch.setitem(PREDICTIONS, "new", PREDICTIONS["v"]._replace(diffusers_name=""))
    for model, prediction, setting in (
        (deeper, "v", "network"),
        (uneven, "v", "norm_groups"),
        (other_heads, "v", "head_dim"),
        (make_ours(), "new", "prediction"),
    ):
        assert diffusers_obstacle(model, prediction).startswith(f"{setting}: ")


def test_single_head_of_any_width_moves_both_ways(tmp_path):
    model = make_ours(head_dim=64, attn_resolutions=(16, 8))  # widths 32 and 64
    write_folder(tmp_path, model, COSINE, {})
    assert_same_output(model, DDPMPipeline.from_pretrained(tmp_path).unet, 16)
    assert_same_output(model, built(tmp_path)[0], 16)


# There and back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
def test_our_folder_comes_back_as_it_was(tmp_path, half):
    model = make_ours(num_attributes=2)
    settings = {"attributes": ["Smiling", "Male"], "only": [], "faces": "abc", "img_size": 16}
    run = {"step": 500_000, "settings": settings}
    write_folder(tmp_path, model, COSINE, run, half=half)
    saved = open_weights(tmp_path)
    assert saved.step == 500_000 and saved.diffusion == COSINE
    assert saved.settings["attributes"] == ("Smiling", "Male")
    assert saved.settings["faces"] == "abc"
    assert_same_output(built(tmp_path)[0], DDPMPipeline.from_pretrained(tmp_path).unet.float(), 16)
    ours = model.state_dict()
    assert ours.keys() == saved.model.keys() == saved.ema.keys()
    for name, tensor in saved.model.items():
        assert torch.equal(tensor, ours[name].half().float() if half else ours[name]), name
    size = (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 1.1 * sum(p.numel() for p in model.parameters()) * (2 if half else 4) + 20_000


# From diffusers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PUBLISHED)
def test_model_like_a_published_one_puts_out_the_same_here(tmp_path, kind):
    theirs = theirs_in(tmp_path, kind)
    assert_same_output(built(tmp_path)[0], theirs, PUBLISHED[kind]["sample_size"])


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("example", dict(flip_sin_to_cos=False)),
        ("example", dict(freq_shift=1)),
        ("example", dict(downsample_padding=0, norm_eps=1e-3)),
        ("example", dict(norm_num_groups=8, attention_head_dim=4, layers_per_block=1)),
        ("cifar10", dict(sample_size=(16, 16), dropout=0.1)),
    ],
)
def test_each_setting_that_our_network_has_is_taken_over(tmp_path, kind, changes):
    theirs = theirs_in(tmp_path, kind, **changes)
    assert_same_output(built(tmp_path)[0], theirs, 16 if kind == "cifar10" else 32)


def rename_weights(folder, change):
    """Change the names of the weights in a folder's file."""
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    return weights


def test_files_at_the_root_old_names_of_attention_and_prefixes_are_read(tmp_path):
    theirs = theirs_in(tmp_path)
    for part in ("unet", "scheduler"):
        for path in (tmp_path / part).iterdir():
            path.rename(tmp_path / path.name)
        (tmp_path / part).rmdir()
    olds = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def earlier(name):
        name = re.sub(r"to_q|to_k|to_v|to_out\.0", lambda found: olds[found[0]], name)
        return f"module._orig_mod.{name}"  # as of a network that was distributed and compiled

    renamed = rename_weights(tmp_path, earlier)
    assert any(".proj_attn." in name for name in renamed)
    assert_same_output(built(tmp_path)[0], theirs, 16)


@pytest.mark.parametrize(
    "scheduler, wanted",
    [
        (DDPMScheduler(100, beta_start=1e-3, beta_end=0.2), (100, "linear", "eps")),
        (DDPMScheduler(1000), (1000, "linear", "eps")),
        (DDPMScheduler(500), (500, "linear_unscaled", "eps")),
        (
            DDIMScheduler(50, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
            (50, "cosine", "v"),
        ),
    ],
)
def test_scheduler_becomes_our_diffusion(tmp_path, scheduler, wanted):
    theirs_in(tmp_path, scheduler=scheduler)
    saved = open_weights(tmp_path)
    assert tuple(saved.diffusion.values()) == wanted
    ours = Diffusion(**saved.diffusion).betas
    torch.testing.assert_close(ours, scheduler.betas, rtol=1e-3, atol=0)


def test_variant_and_the_folder_of_the_network_alone_are_read(tmp_path):
    theirs = theirs_in(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    variant = path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    for given in (tmp_path, tmp_path / "unet", variant):
        assert_same_output(built(given)[0], theirs, 16)


def test_checkpoint_of_a_trainer_is_read_by_its_average_and_the_scheduler_beside_it(tmp_path):
    checkpoint = tmp_path / "checkpoint-500"
    trained = shaken(UNet2DModel(**CIFAR10))
    trained.save_pretrained(checkpoint / "unet")
    average = EMAModel(
        shaken(trained).parameters(), model_cls=UNet2DModel, model_config=trained.config
    )
    average.save_pretrained(checkpoint / "unet_ema")
    fix = r"scheduler_config.json: does not exist.*Fix: write it"
    for given in (checkpoint, checkpoint / "unet_ema"):
        with pytest.raises(CheckpointError, match=fix):
            open_weights(given)
    DDPMScheduler(1000).save_pretrained(tmp_path / "scheduler")
    for given in (checkpoint, checkpoint / "unet_ema"):
        assert_same_output(built(given)[0], trained, 16)


# What is refused ---------------------------------------------------------------------------------


def assert_refused(folder, said):
    with pytest.raises(CheckpointError, match=said) as error:
        open_weights(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
NOT_OURS = [
    (UNET, "time_embedding_type", "fourier"),
    (UNET, "down_block_types", ["SkipDownBlock2D"] * 4, 7),
    (UNET, "up_block_types", ["UpBlock2D"] * 4),
    (UNET, "block_out_channels", [32, 48, 64, 64], [10**9] * 4, "many"),
    (UNET, "layers_per_block", 10**9),
    (UNET, "sample_size", None, [16, 24], 20),
    (UNET, "attention_head_dim", 7),
    (UNET, "norm_num_groups", 5),
    (UNET, "norm_eps", float("nan")),
    (UNET, "in_channels", 4),
    (UNET, "_class_name", "UNet2DConditionModel"),
    (UNET, "num_class_embeds", 10),
    (UNET, "setting_of_tomorrow", 1),
    (UNET, "flip_sin_to_cos", "yes"),
    (SCHEDULER, "beta_end", 0.03),
    (SCHEDULER, "beta_schedule", "sigmoid", None),
    (SCHEDULER, "prediction_type", "sample"),
    (SCHEDULER, "num_train_timesteps", 10**12),
    (SCHEDULER, "trained_betas", ["a"] * 1000),
    ("model_index.json", "vqvae", ["diffusers", "VQModel"]),
]
SAID = {"norm_num_groups": "divisible by num_groups", "beta_end": "betas"}


def test_what_our_network_is_not_is_refused_by_the_setting(tmp_path):
    theirs_in(tmp_path)
    for file, setting, *values in NOT_OURS:
        path = tmp_path / file
        whole = path.read_text()
        for value in values:
            path.write_text(json.dumps(json.loads(whole) | {setting: value}))
            assert_refused(tmp_path, f"{file}: .*{SAID.get(setting, setting)}")
        path.write_text(whole)


def test_pipe_in_place_of_a_configuration_is_not_waited_for(tmp_path):
    needs_posix()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="no file"):
        read_json(tmp_path / "config.json")


def test_full_disk_under_weights_is_one_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="cannot be written .*No space"):
        safe_files.save_weights(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, half=False)
    assert not list(tmp_path.iterdir())


def test_others_may_read_the_weights(tmp_path):
    path = tmp_path / "a.safetensors"
    safe_files.save_weights(path, {"x": torch.zeros(2)}, half=False)
    (tmp_path / "b").touch()
    assert path.stat().st_mode == (tmp_path / "b").stat().st_mode


def test_bad_weights_are_one_error(tmp_path):
    theirs_in(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    whole, weights = path.read_bytes(), load_file(path)
    deep = struct.pack("<Q", 10**7) + b"[" * 10**7
    other_shape = whole.replace(b'"shape":[32,3,3,3]', b'"shape":[99,3,3,3]')
    assert other_shape != whole
    for data in (b"", whole[:-100], deep, other_shape):
        path.write_bytes(data)
        assert_refused(tmp_path, f"{path.stem}.*is damaged")
    bias = weights.pop("conv_in.bias")
    for changed, said in (
        ({}, r"conv_in.bias is missing, by config.json it is \(32,\)"),
        ({"conv_in.bias": bias[:31].clone()}, r"is \(31,\), by config.json it is \(32,\)"),
        ({"conv_in.bias": bias, "more": 2 * bias}, r"more is \(32,\), by config.json it is absent"),
        ({"conv_in.bias": bias * math.nan}, "conv_in.bias is not finite"),
    ):
        save_file(weights | changed, path, {"format": "pt"})
        assert_refused(tmp_path, f"{path.stem}.*{said}")
    path.rename(path.with_suffix(".bin"))
    assert_refused(tmp_path, f"{path.stem}.bin: is a pickle")
    path.with_suffix(".bin").unlink()
    assert_refused(tmp_path, f"{path.stem}.*does not exist")


def test_damaged_json_is_one_error(tmp_path):
    write_folder(tmp_path, make_ours(), COSINE, {"step": 1, "settings": {}})
    for file in (UNET, SCHEDULER, "model_index.json", "run.json"):
        whole = (tmp_path / file).read_bytes()
        for data in (b"", b"[]", b"{", b"[" * 100_000, b"null", b"\xff", b" " * (1 << 21)):
            (tmp_path / file).write_bytes(data)
            assert_refused(tmp_path, f"{file}: is damaged")
        (tmp_path / file).write_bytes(whole)


def test_run_json_with_other_contents_is_one_error(tmp_path):
    write_folder(tmp_path, make_ours(), COSINE, {})
    settings = ([], {"attributes": "Smiling"}, {"attributes": [1]}, {"only": {}})
    for run in (*({"settings": each} for each in settings), {"step": "x"}, {"step": -1}):
        (tmp_path / "run.json").write_text(json.dumps(run))
        assert_refused(tmp_path, "run.json: is damaged")


def test_attribute_map_must_fit_the_names(tmp_path):
    run = {"step": 1, "settings": {"attributes": ["Smiling"]}}
    write_folder(tmp_path, make_ours(num_attributes=2), COSINE, run)
    assert_refused(tmp_path, r"attribute_map.weight is \(128, 2\), .* \(128, 1\)")
