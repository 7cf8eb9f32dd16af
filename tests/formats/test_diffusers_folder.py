"""Folders of diffusers, written and read, compared with diffusers itself; nothing is downloaded."""

import json
import os
import re
import struct

import pytest
import torch
from conftest import needs_posix
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffusion import NOISE_SCHEDULES, PREDICTIONS, Diffusion, image_generators
from formats import safe_files
from formats.diffusers_folder import diffusers_obstacle, to_diffusers, write_folder
from formats.safe_files import read_json
from formats.weights import open_weights
from system.errors import CheckpointError, ResourceError
from unet import UNet

OURS = dict(img_size=16, channels=32, channel_mults=(1, 2), attn_resolutions=(8,), head_dim=32)
COSINE = dict(num_timesteps=20, noise_schedule="cosine", prediction="eps")
# google/ddpm-cifar10-32 and google/ddpm-celebahq-256, narrower and at fewer pixels.
CIFAR10 = dict(
    sample_size=16,
    act_fn="silu",
    attention_head_dim=None,
    block_out_channels=(32, 64, 64, 64),
    center_input_sample=False,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    layers_per_block=2,
    mid_block_scale_factor=1,
    norm_eps=1e-6,
    norm_num_groups=32,
    time_embedding_type="positional",
)
CELEBAHQ = CIFAR10 | dict(
    sample_size=32,
    block_out_channels=(32, 32, 64, 64, 128, 128),
    down_block_types=(*4 * ("DownBlock2D",), "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", *4 * ("UpBlock2D",)),
)
# examples/unconditional_image_generation: what it does not say is diffusers' default.
EXAMPLE = dict(
    sample_size=32,
    layers_per_block=2,
    block_out_channels=CELEBAHQ["block_out_channels"],
    down_block_types=CELEBAHQ["down_block_types"],
    up_block_types=CELEBAHQ["up_block_types"],
)
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


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# To diffusers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_pipelines_load_our_folder_and_ddim_gives_our_image(tmp_path, schedule, prediction):
    model = make_ours()
    diffusion = COSINE | dict(noise_schedule=schedule, prediction=prediction)
    write_folder(tmp_path, model, diffusion, {})
    assert_same_output(model, DDPMPipeline.from_pretrained(tmp_path).unet, 16)
    pipeline = DDIMPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    generators = image_generators(7, range(2))
    options = dict(num_inference_steps=20, use_clipped_model_output=True, output_type="np")
    theirs = pipeline(batch_size=2, generator=generators, **options).images
    options = dict(sampler="ddim", steps=20, generator=image_generators(7, range(2)))
    ours = Diffusion(**diffusion).sample(model, (2, 3, 16, 16), **options)
    ours = (ours / 2 + 0.5).permute(0, 2, 3, 1)
    assert ours.std() > 0.1
    torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=1e-3)


def test_pipelines_sample_by_the_variance_of_our_ddpm(tmp_path):
    write_folder(tmp_path, make_ours(), COSINE, {})
    scheduler = DDPMPipeline.from_pretrained(tmp_path).scheduler
    scheduler.set_timesteps(20)
    betas, bar = Diffusion(**COSINE).betas, Diffusion(**COSINE).alphas_cumprod
    for t in (1, 10, 19):
        wanted = betas[t] * (1 - bar[t - 1]) / (1 - bar[t])  # Ho et al. 2020, eq. 7
        torch.testing.assert_close(scheduler._get_variance(t), wanted, rtol=1e-3, atol=0)


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


@pytest.mark.parametrize(
    "changes, setting",
    [
        ({"channels": 24, "norm_groups": 0}, "norm_groups"),
        ({"channel_mults": (1, 3), "head_dim": 48, "attn_resolutions": (16, 8)}, "head_dim"),
    ],
)
def test_network_that_diffusers_cannot_express_is_refused_by_its_setting(changes, setting):
    model = make_ours(**changes)
    with pytest.raises(ValueError, match=f"^{setting}: "):
        to_diffusers(model)
    assert diffusers_obstacle(model, "v").startswith(f"{setting}: ")


def test_layers_that_diffusers_lacks_are_an_obstacle():
    model = make_ours()
    block = model.middle_block1
    block.time = torch.nn.Linear(block.time.in_features, 2 * block.time.out_features)
    assert diffusers_obstacle(model, "v").startswith("network: ")


def test_prediction_that_diffusers_lacks_is_an_obstacle(monkeypatch):
    assert [diffusers_obstacle(make_ours(), each) for each in ("eps", "v")] == ["", ""]
    monkeypatch.setitem(PREDICTIONS, "new", PREDICTIONS["v"]._replace(diffusers_name=""))
    assert diffusers_obstacle(make_ours(), "new").startswith("prediction: ")


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
    ours = model.state_dict()
    assert ours.keys() == saved.model.keys() == saved.ema.keys()
    for name, tensor in saved.model.items():
        assert torch.equal(tensor, ours[name].half().float() if half else ours[name]), name
    size = (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 1.1 * sum(p.numel() for p in model.parameters()) * (2 if half else 4) + 20_000


def test_half_folder_is_loaded_by_diffusers(tmp_path):
    model = make_ours()
    write_folder(tmp_path, model, COSINE, {}, half=True)
    theirs = DDPMPipeline.from_pretrained(tmp_path).unet.float()
    ours, _ = built(tmp_path)
    assert_same_output(ours, theirs, 16)


# From diffusers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PUBLISHED)
def test_model_like_a_published_one_puts_out_the_same_here(tmp_path, kind):
    theirs = theirs_in(tmp_path, kind)
    ours, diffusion = built(tmp_path)
    assert_same_output(ours, theirs, PUBLISHED[kind]["sample_size"])
    assert diffusion.num_timesteps == 1000 and diffusion.prediction == "eps"
    torch.testing.assert_close(diffusion.betas, DDPMScheduler(1000).betas, rtol=1e-4, atol=0)


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


def test_files_at_the_root_and_old_names_of_attention_are_read(tmp_path):
    theirs = theirs_in(tmp_path)
    for part in ("unet", "scheduler"):
        for path in (tmp_path / part).iterdir():
            path.rename(tmp_path / path.name)
        (tmp_path / part).rmdir()
    olds = {
        ".to_q.": ".query.",
        ".to_k.": ".key.",
        ".to_v.": ".value.",
        ".to_out.0.": ".proj_attn.",
    }
    pattern = "|".join(map(re.escape, olds))
    rename_weights(tmp_path, lambda name: re.sub(pattern, lambda found: olds[found[0]], name))
    assert any(
        ".proj_attn." in name
        for name in load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    )
    assert_same_output(built(tmp_path)[0], theirs, 16)


@pytest.mark.parametrize(
    "scheduler, wanted",
    [
        (DDPMScheduler(100, beta_start=1e-3, beta_end=0.2), (100, "linear", "eps")),
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


def rename_weights(folder, change):
    """Change the names of the weights in a folder's file."""
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({change(name): tensor for name, tensor in weights.items()}, path, {"format": "pt"})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_networks_are_read(tmp_path, prefix):
    theirs = theirs_in(tmp_path)
    rename_weights(tmp_path / "unet", lambda name: prefix + name)
    assert_same_output(built(tmp_path)[0], theirs, 16)


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


@pytest.mark.parametrize(
    "file, changes, part",
    [
        ("unet/config.json", dict(time_embedding_type="fourier"), "time_embedding_type"),
        ("unet/config.json", dict(down_block_types=["SkipDownBlock2D"] * 4), "down_block_types"),
        ("unet/config.json", dict(up_block_types=["UpBlock2D"] * 4), "up_block_types"),
        ("unet/config.json", dict(block_out_channels=[32, 48, 64, 64]), "block_out_channels"),
        ("unet/config.json", dict(block_out_channels=[10**9] * 4), "block_out_channels"),
        ("unet/config.json", dict(block_out_channels="many"), "block_out_channels"),
        ("unet/config.json", dict(layers_per_block=10**9), "layers_per_block"),
        ("unet/config.json", dict(sample_size=None), "sample_size"),
        ("unet/config.json", dict(sample_size=[16, 24]), "sample_size"),
        ("unet/config.json", dict(sample_size=20), "sample_size"),
        ("unet/config.json", dict(attention_head_dim=7), "attention_head_dim"),
        ("unet/config.json", dict(norm_num_groups=5), "divisible by num_groups"),
        ("unet/config.json", dict(norm_eps=float("nan")), "norm_eps"),
        ("unet/config.json", dict(in_channels=4), "in_channels"),
        ("unet/config.json", dict(_class_name="UNet2DConditionModel"), "_class_name"),
        ("unet/config.json", dict(num_class_embeds=10), "num_class_embeds"),
        ("scheduler/scheduler_config.json", dict(beta_end=0.03), "betas"),
        ("scheduler/scheduler_config.json", dict(beta_schedule="sigmoid"), "beta_schedule"),
        ("scheduler/scheduler_config.json", dict(prediction_type="sample"), "prediction_type"),
        ("scheduler/scheduler_config.json", dict(num_train_timesteps=10**12), "num_train"),
        ("scheduler/scheduler_config.json", dict(trained_betas=["a"] * 1000), "trained_betas"),
        ("unet/config.json", dict(setting_of_tomorrow=1), "setting_of_tomorrow"),
        ("unet/config.json", dict(down_block_types=7), "down_block_types"),
        ("unet/config.json", dict(flip_sin_to_cos="yes"), "flip_sin_to_cos"),
        ("model_index.json", dict(vqvae=["diffusers", "VQModel"]), "vqvae"),
    ],
)
def test_what_our_network_is_not_is_refused_by_the_setting(tmp_path, file, changes, part):
    theirs_in(tmp_path)
    edit_json(tmp_path / file, **changes)
    with pytest.raises(CheckpointError, match=part) as error:
        open_weights(tmp_path)
    assert str(tmp_path / file) in str(error.value) and "\n" not in str(error.value)


def test_pipe_in_place_of_a_configuration_is_not_waited_for(tmp_path):
    needs_posix()
    theirs_in(tmp_path)
    (tmp_path / "unet" / "config.json").unlink()
    os.mkfifo(tmp_path / "unet" / "config.json")
    with pytest.raises(CheckpointError, match="no file"):
        read_json(tmp_path / "unet" / "config.json")


def test_full_disk_under_safetensors_is_one_error(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safe_files, "save_file", full)
    with pytest.raises(ResourceError, match="cannot be written .*No space"):
        safe_files.save_weights(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, half=False)
    assert not list(tmp_path.iterdir())


def test_scheduler_without_betas_is_refused(tmp_path):
    theirs_in(tmp_path, scheduler=ScoreSdeVeScheduler())
    with pytest.raises(CheckpointError, match="scheduler_config.json: beta_schedule is None"):
        open_weights(tmp_path)


def with_header(path, change):
    """Change the header of a file of safetensors, and nothing else."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def with_weights(path, change):
    """Change the tensors in a file of safetensors, by name."""
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


BAD_WEIGHTS = {
    "empty": (lambda p: p.write_bytes(b""), "is damaged"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "is damaged"),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:1000]), "is damaged"),
    "deep header": (lambda p: p.write_bytes(struct.pack("<Q", 10**7) + b"[" * 10**7), "is damaged"),
    "header that lies about a shape": (
        lambda p: with_header(p, lambda h: h["conv_in.weight"].update(shape=[10**9, 3, 3, 3])),
        "is damaged",
    ),
    "header that lies about a place": (
        lambda p: with_header(p, lambda h: h["conv_in.weight"].update(data_offsets=[0, 10**15])),
        "is damaged",
    ),
    "missing": (
        lambda p: with_weights(p, lambda w: w.pop("conv_in.bias")),
        r"conv_in.bias is missing, by config.json it is \(32,\)",
    ),
    "one more": (
        lambda p: with_weights(p, lambda w: w.update(more=torch.zeros(2))),
        r"more is \(2,\), by config.json it is absent",
    ),
    "another shape": (
        lambda p: with_weights(p, lambda w: w.update({"conv_in.bias": torch.zeros(31)})),
        r"conv_in.bias is \(31,\), by config.json it is \(32,\)",
    ),
    "not finite": (
        lambda p: with_weights(p, lambda w: w["conv_in.bias"].fill_(float("nan"))),
        "conv_in.bias is not finite",
    ),
    "pickle": (lambda p: p.rename(p.with_suffix(".bin")), "is a pickle"),
    "no file": (lambda p: p.unlink(), "does not exist"),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_bad_weights_are_one_error(tmp_path, kind):
    spoil, part = BAD_WEIGHTS[kind]
    theirs_in(tmp_path)
    spoil(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=part) as error:
        open_weights(tmp_path)
    assert "diffusion_pytorch_model" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json", "run.json"]
)
def test_damaged_json_is_one_error(tmp_path, file):
    write_folder(tmp_path, make_ours(), COSINE, {"step": 1, "settings": {}})
    for text in ("", "[]", "{", "[" * 100_000, "null", "\xff", " " * (1 << 21)):
        (tmp_path / file).write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=f"{file}: is damaged") as error:
            open_weights(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "run",
    [
        dict(settings=[]),
        dict(step="x"),
        dict(step=-1),
        dict(settings={"attributes": "Smiling"}),
        dict(settings={"attributes": [1]}),
        dict(settings={"only": {}}),
    ],
)
def test_run_json_with_other_contents_is_one_error(tmp_path, run):
    write_folder(tmp_path, make_ours(), COSINE, run)
    with pytest.raises(CheckpointError, match="run.json: is damaged"):
        open_weights(tmp_path)


def test_attribute_map_must_fit_the_names(tmp_path):
    run = {"step": 1, "settings": {"attributes": ["Smiling"]}}
    write_folder(tmp_path, make_ours(num_attributes=2), COSINE, run)
    with pytest.raises(CheckpointError, match=r"attribute_map.weight is \(128, 2\), .* \(128, 1\)"):
        open_weights(tmp_path)
