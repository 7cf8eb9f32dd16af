"""The configurations of diffusers' `UNet2DModel` and schedulers, and what of ours they amount to.

Nothing in them is believed: each number is checked against bounds, and a setting that our network
does not have is named.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from diffusion import NOISE_SCHEDULES, Diffusion
from formats.safe_files import read_json
from system.errors import CheckpointError
from unet import Attention, GroupNorm, UNet

PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction"}

# Settings of a UNet2DModel of which our network has one value, which is diffusers' default.
THE_ONLY = dict(
    _class_name="UNet2DModel",
    center_input_sample=False,
    time_embedding_type="positional",
    time_embedding_dim=None,
    mid_block_type="UNetMidBlock2D",
    mid_block_scale_factor=1,
    downsample_type="conv",
    upsample_type="conv",
    act_fn="silu",
    attn_norm_num_groups=None,
    resnet_time_scale_shift="default",
    add_attention=True,
    class_embed_type=None,
    num_class_embeds=None,
)
# diffusers' defaults of the others.
DEFAULTS = dict(
    in_channels=3,
    out_channels=3,
    sample_size=None,
    block_out_channels=[224, 448, 672, 896],
    down_block_types=["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    up_block_types=["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    layers_per_block=2,
    attention_head_dim=8,
    norm_num_groups=32,
    norm_eps=1e-5,
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    dropout=0.0,
)


def unet_config(unet: UNet) -> dict:
    """The arguments of the `UNet2DModel` that computes what our network computes. Raises
    ValueError, naming the setting, where there are none."""
    groups = {m.num_groups for m in unet.modules() if isinstance(m, GroupNorm)}
    if len(groups) > 1:
        raise ValueError(f"norm_groups: norms have {sorted(groups)} groups, not all the same")
    attentions = [m for m in unet.modules() if isinstance(m, Attention)]
    dims = {m.qkv.in_features // m.heads for m in attentions}
    if len(dims) > 1:
        raise ValueError(f"head_dim: heads have {sorted(dims)} channels, not all the same")
    attends = [not isinstance(stage.attentions[0], nn.Identity) for stage in unet.down]
    return dict(
        in_channels=unet.image_channels,
        out_channels=unet.image_channels,
        sample_size=unet.img_size,
        block_out_channels=[stage.blocks[0].conv1.out_channels for stage in unet.down],
        down_block_types=[f"{'Attn' if each else ''}DownBlock2D" for each in attends],
        up_block_types=[f"{'Attn' if each else ''}UpBlock2D" for each in reversed(attends)],
        layers_per_block=len(unet.down[0].blocks),
        attention_head_dim=dims.pop(),
        norm_num_groups=groups.pop(),
        norm_eps=unet.norm_out.eps,
        downsample_padding=getattr(unet.down[0].resample, "padding", (1,))[0],
        flip_sin_to_cos=False,
        freq_shift=unet.freq_shift,
        dropout=unet.middle_block1.dropout.p,
    )


def scheduler_config(num_timesteps: int, noise_schedule: str, prediction: str) -> dict:
    """diffusers' configuration of a scheduler, from what builds a `Diffusion`. Raises ValueError,
    naming the setting, where diffusers has no such prediction."""
    if prediction not in PREDICTION_TYPES:
        raise ValueError(f"prediction: diffusers' schedulers do not know {prediction!r}")
    betas = Diffusion(num_timesteps, noise_schedule, dtype=torch.float64).betas
    schedule = dict(trained_betas=betas.tolist())
    if noise_schedule == "cosine":
        schedule = dict(beta_schedule="squaredcos_cap_v2")
    elif noise_schedule == "linear" and num_timesteps > 20:  # below, the last ones are clamped
        ends = dict(beta_start=0.1 / num_timesteps, beta_end=20 / num_timesteps)
        schedule = dict(beta_schedule="linear", **ends)
    return dict(
        num_train_timesteps=num_timesteps,
        **schedule,
        prediction_type=PREDICTION_TYPES[prediction],
        variance_type="fixed_small",
        clip_sample=True,
        timestep_spacing="leading",
    )


def checker(path: Path, config: dict, known: str) -> Callable[[str, bool, str], None]:
    """A function of a setting's name, of whether its value will do, and of what would: it raises
    CheckpointError where it will not. known: says what there is here, with a place for it."""

    def want(name: str, good: bool, allowed: str) -> None:
        if not good:
            what = f"{name} is {str(config.get(name))[:100]}; {known.format(allowed)}"
            raise CheckpointError(path, what, "take another model")

    return want


def read_unet_config(path: Path) -> tuple[dict, bool]:
    """The arguments of `UNet` that a UNet2DModel's configuration amounts to, and whether it puts
    cosines before sines. Raises CheckpointError, naming the setting, where there are none."""
    config = THE_ONLY | DEFAULTS | {"_class_name": None} | read_json(path)
    want = checker(path, config, "our network has {}")
    for name, only in THE_ONLY.items():
        want(name, config[name] == only, f"only {only}")
    want("in_channels", config["in_channels"] in (1, 3), "3, or 1 of grey images")
    want("out_channels", config["out_channels"] == config["in_channels"], "as many as in_channels")
    size, widths = config["sample_size"], config["block_out_channels"]
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    want("sample_size", whole(size, 8, 4096), "squares of 8 to 4096 pixels")
    fits = isinstance(widths, list) and 1 <= len(widths) <= 12
    fits = fits and all(whole(w, 4, 1 << 14) and w % widths[0] == 0 for w in widths)
    want("block_out_channels", fits and widths[0] % 2 == 0, "even widths, multiples of the first")
    smallest = 2 ** (len(widths) - 1)
    want("sample_size", size % smallest == 0, f"multiples of {smallest}")

    # Attention stands at the same resolutions on the way down and up.
    down, up = config["down_block_types"], config["up_block_types"]
    fits = isinstance(down, list) and len(down) == len(widths)
    fits = fits and all(kind in ("DownBlock2D", "AttnDownBlock2D") for kind in down)
    want("down_block_types", fits, f"{len(widths)} of DownBlock2D and AttnDownBlock2D")
    mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
    want("up_block_types", up == mirrored, f"down_block_types mirrored, {mirrored}")
    attends = [kind.startswith("Attn") for kind in down]
    attended = [w for w, each in zip(widths, attends, strict=True) if each] + widths[-1:]
    head_dim = config["attention_head_dim"]
    fits = head_dim is None or whole(head_dim, 1) and all(w % head_dim == 0 for w in attended)
    want("attention_head_dim", fits, f"divisors of {attended}")

    groups = config["norm_num_groups"]
    fits = whole(groups, 1) and widths[0] % groups == 0
    want("norm_num_groups", fits, f"divisors of {widths[0]}")
    want("layers_per_block", whole(config["layers_per_block"], 1, 32), "1 to 32")
    for name in ("dropout", "norm_eps"):
        fits = type(config[name]) in (int, float) and 0 <= config[name] < 1
        want(name, fits, "numbers from 0 to below 1")
    for name in ("downsample_padding", "freq_shift", "flip_sin_to_cos"):
        want(name, config[name] in (0, 1), "0 and 1")
    arguments = dict(
        img_size=size,
        channels=widths[0],
        channel_mults=tuple(width // widths[0] for width in widths),
        num_res_blocks=config["layers_per_block"],
        attn_resolutions=tuple(size >> i for i, each in enumerate(attends) if each),
        head_dim=head_dim or max(attended),  # None: a single head
        norm_groups=groups,
        dropout=config["dropout"],
        norm_eps=config["norm_eps"],
        downsample_padding=int(config["downsample_padding"]),
        freq_shift=int(config["freq_shift"]),
    )
    if config["in_channels"] == 1:
        arguments["image_channels"] = 1
    return arguments, bool(config["flip_sin_to_cos"])


def read_scheduler_config(path: Path) -> dict:
    """The arguments of `Diffusion` that a scheduler's configuration amounts to. Raises
    CheckpointError, naming the setting, where there are none."""
    config = dict(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    config |= dict(trained_betas=None, prediction_type="epsilon") | read_json(path)
    want = checker(path, config, "there is {} here")
    kinds = "DDPM|DDIM|DPMSolver|UniPC|PNDM|DEIS|Euler|Heun"
    fits = re.match(kinds, str(config.get("_class_name")))
    want("_class_name", bool(fits), "a scheduler of betas, such as DDPMScheduler,")
    predictions = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    kind = config["prediction_type"]
    want("prediction_type", isinstance(kind, str) and kind in predictions, ", ".join(predictions))
    for name in ("rescale_betas_zero_snr", "thresholding"):
        want(name, not config.get(name), "none")
    T, given = config["num_train_timesteps"], config["trained_betas"]
    want("num_train_timesteps", whole(T, 2, 100_000), "2 to 100000")
    if given is not None:
        fits = isinstance(given, list) and len(given) == T and all(map(is_number, given))
        want("trained_betas", fits, f"a list of {T} numbers")
        betas = torch.tensor(given, dtype=torch.float64)
    elif config["beta_schedule"] == "squaredcos_cap_v2":
        betas = NOISE_SCHEDULES["cosine"](T).clamp(max=0.999)
    else:
        want("beta_schedule", config["beta_schedule"] == "linear", "linear, squaredcos_cap_v2")
        for name in ("beta_start", "beta_end"):
            want(name, is_number(config[name]), "a number")
        betas = torch.linspace(config["beta_start"], config["beta_end"], T, dtype=torch.float64)
    for name in NOISE_SCHEDULES:
        ours = Diffusion(T, name, dtype=torch.float64).betas
        if torch.allclose(ours, betas, rtol=1e-3, atol=0):
            return dict(num_timesteps=T, noise_schedule=name, prediction=predictions[kind])
    what = f"its betas, {betas[0]:.3g} to {betas[-1]:.3g}, are those of no noise schedule here"
    raise CheckpointError(path, what, f"there are {', '.join(NOISE_SCHEDULES)}")


def whole(value: object, least: int, most: int = 1 << 14) -> bool:
    """Whether it is a whole number in these bounds."""
    return type(value) is int and least <= value <= most


def is_number(value: object) -> bool:
    """Whether it is a variance: a number from 0 to 1."""
    return type(value) in (int, float) and 0 <= value <= 1
