"""Our network as a folder that diffusers' pipelines load and save.

    model_index.json                                names the two parts
    unet/config.json                                the arguments of `UNet2DModel`
    unet/diffusion_pytorch_model.safetensors        its weights
    scheduler/scheduler_config.json                 the noise schedule and the prediction
    run.json, attribute_map.safetensors             ours: what diffusers has no place for

The first published folders have all files at the root. No file is trusted: numbers are bounded, the
network that they describe is built without memory, and it must be written as the file says.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from diffusion import NOISE_SCHEDULES, PREDICTIONS, Diffusion, cosine_betas
from formats.safe_files import load_weights, read_json, refuse, save_weights, within
from system.errors import CheckpointError, UserError
from system.files import save_json
from unet import Attention, GroupNorm, UNet

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
ATTRIBUTE_MAP, RUN = "attribute_map.safetensors", "run.json"
MAP = "attribute_map.weight"  # the one weight of ours that diffusers' network does not have

# Our names of weights, piece by piece, and diffusers' names; the other pieces are the same.
RENAMES = (
    (r"^time_mlp\.0\.", "time_embedding.linear_1."),
    (r"^time_mlp\.2\.", "time_embedding.linear_2."),
    (r"^middle_block1\.", "mid_block.resnets.0."),
    (r"^middle_block2\.", "mid_block.resnets.1."),
    (r"^middle_attention\.", "mid_block.attentions.0."),
    (r"^(down|up)\.(\d+)\.blocks\.", r"\1_blocks.\2.resnets."),
    (r"^(down|up)\.(\d+)\.attentions\.", r"\1_blocks.\2.attentions."),
    (r"^down\.(\d+)\.resample\.", r"down_blocks.\1.downsamplers.0.conv."),
    (r"^up\.(\d+)\.resample\.", r"up_blocks.\1.upsamplers.0."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"(resnets\.\d+)\.time\.", r"\1.time_emb_proj."),
    (r"(resnets\.\d+)\.shortcut\.", r"\1.conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.out\.", r"\1.to_out.0."),
)
# diffusers' earlier names of the layers of attention, and today's.
EARLIER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# An argument of `UNet`: its name in `UNet2DModel`, the default there, the least and the most that
# is read. The bounds keep a hostile file from making the network too large to be built.
SETTINGS = dict(
    img_size=("sample_size", None, 8, 4096),
    num_res_blocks=("layers_per_block", 2, 1, 32),
    head_dim=("attention_head_dim", 8, 1, 1 << 14),
    norm_groups=("norm_num_groups", 32, 1, 1 << 14),
    norm_eps=("norm_eps", 1e-5, 0.0, 1.0),
    downsample_padding=("downsample_padding", 1, 0, 1),
    freq_shift=("freq_shift", 0, 0, 1),
    dropout=("dropout", 0.0, 0.0, 1.0),
)
MAX_STAGES, MAX_WIDTH = 12, 1 << 14
# The other settings of `UNet2DModel`, as our network has them.
FIXED = dict(_class_name="UNet2DModel", in_channels=3, out_channels=3, center_input_sample=False)
FIXED |= dict(time_embedding_type="positional", time_embedding_dim=None, num_class_embeds=None)
FIXED |= dict(class_embed_type=None, attn_norm_num_groups=None, resnet_time_scale_shift="default")
FIXED |= dict(mid_block_type="UNetMidBlock2D", mid_block_scale_factor=1, add_attention=True)
FIXED |= dict(downsample_type="conv", upsample_type="conv", act_fn="silu")
# Settings that do not change this network's output; all but the first describe its average.
IGNORED = {"num_train_timesteps", "decay", "min_decay", "inv_gamma", "power", "optimization_step"}
IGNORED |= {"update_after_step", "use_ema_warmup"}


# To diffusers ------------------------------------------------------------------------------------


def unet_config(unet: UNet) -> dict:
    """The arguments of the `UNet2DModel` that computes what our network computes. Raises
    ValueError, "setting: reason", if there is none."""
    groups = {m.num_groups for m in unet.modules() if isinstance(m, GroupNorm)}
    if len(groups) > 1:
        raise ValueError(f"norm_groups: the norms have {sorted(groups)} groups, not one number")
    attentions = [m for m in unet.modules() if isinstance(m, Attention)]
    dims = {m.qkv.in_features // m.heads for m in attentions}
    if len(dims) > 1 and any(m.heads > 1 for m in attentions):
        raise ValueError(f"head_dim: the heads have {sorted(dims)} channels, not one number")
    attends = [isinstance(stage.attentions[0], Attention) for stage in unet.down]
    return dict(
        sample_size=unet.img_size,
        block_out_channels=[stage.blocks[0].conv1.out_channels for stage in unet.down],
        down_block_types=[f"{'Attn' if each else ''}DownBlock2D" for each in attends],
        up_block_types=[f"{'Attn' if each else ''}UpBlock2D" for each in reversed(attends)],
        layers_per_block=len(unet.down[0].blocks),
        attention_head_dim=dims.pop() if len(dims) == 1 else None,  # None: a single head each
        norm_num_groups=groups.pop(),
        norm_eps=unet.norm_out.eps,
        downsample_padding=getattr(unet.down[0].resample, "padding", (1,))[0],
        flip_sin_to_cos=False,
        freq_shift=unet.freq_shift,
        dropout=unet.middle_block1.dropout.p,
    )


def diffusers_obstacle(unet: UNet, prediction: str) -> str:
    """Why diffusers cannot express the network, as "setting: reason"; "" if it can."""
    try:
        arguments = arguments_of(unet_config(unet))
    except ValueError as error:
        return str(error)
    with torch.device("meta"):
        plain = UNet(**arguments).state_dict()
    ours = {name: weight for name, weight in unet.state_dict().items() if name != MAP}
    if {k: w.shape for k, w in ours.items()} != {k: w.shape for k, w in plain.items()}:
        return "network: it has layers that diffusers lacks"
    unknown = not PREDICTIONS[prediction].diffusers_name
    return f"prediction: it does not know {prediction!r}" if unknown else ""


def scheduler_config(num_timesteps: int, noise_schedule: str, prediction: str, **_) -> dict:
    """diffusers' configuration of a scheduler, from the arguments of `Diffusion`; those that only
    training uses are left out."""
    betas = Diffusion(num_timesteps, noise_schedule, dtype=torch.float64).betas
    config = dict(num_train_timesteps=num_timesteps, beta_schedule="squaredcos_cap_v2")
    if not torch.allclose(scheduler_betas(config), betas, rtol=1e-9, atol=0):
        ends = dict(beta_start=betas[0].item(), beta_end=betas[-1].item())
        config |= dict(beta_schedule="linear", **ends)
        if not torch.allclose(scheduler_betas(config), betas, rtol=1e-9, atol=0):
            config |= dict(trained_betas=betas.tolist())
    return config | dict(
        prediction_type=PREDICTIONS[prediction].diffusers_name,
        variance_type="fixed_small",
        clip_sample=True,
        timestep_spacing="leading",
    )


def scheduler_betas(config: dict) -> Tensor:
    """The betas that diffusers' schedulers compute from a configuration. (T,) float64."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    T = config["num_train_timesteps"]
    if config["beta_schedule"] == "linear":
        return torch.linspace(config["beta_start"], config["beta_end"], T, dtype=torch.float64)
    return cosine_betas(T).clamp(max=0.999)  # squaredcos_cap_v2


def diffusers_names(name: str) -> list[str]:
    """diffusers' names of our weight `name`: three for qkv, which are its thirds, else one."""
    for ours, theirs in RENAMES:
        name = re.sub(ours, theirs, name)
    parts = ("to_q", "to_k", "to_v") if ".qkv." in name else ("",)
    return [name.replace("qkv", part) for part in parts]


def to_diffusers(unet: UNet, condition: Tensor | None = None) -> tuple[dict, dict[str, Tensor]]:
    """The arguments and the state dict of the `UNet2DModel` that computes what our network does.

    condition: attributes, (K,) or (1, K), to build in; None: the unconditional network. Raises
    ValueError, "setting: reason", if there is no such `UNet2DModel`."""
    weights = {}
    for name, tensor in unet.state_dict().items():
        if name != MAP:
            names = diffusers_names(name)
            weights |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    if condition is not None:
        # The map of the attributes is added to the embedding, as this bias is.
        added = unet.attribute_map.weight @ condition.flatten().to(unet.attribute_map.weight)
        weights["time_embedding.linear_2.bias"] = weights["time_embedding.linear_2.bias"] + added
    return unet_config(unet), weights


def write_folder(folder: Path, unet: UNet, diffusion: dict, run: dict, condition=None, half=False):
    """Write the folder that diffusers' DDPMPipeline loads.

    diffusion: the arguments of `Diffusion`; run: for `run.json`, the step and the settings;
    condition: as in `to_diffusers`, without it the map of the attributes is kept; half: in float16.
    Raises ResourceError, and ValueError for what `diffusers_obstacle` names."""
    about = {"_diffusers_version": "0.35.0"}
    config, weights = to_diffusers(unet, condition)
    save_weights(folder / "unet" / WEIGHTS, weights, half)
    save_json(folder / "unet" / "config.json", {"_class_name": "UNet2DModel", **about, **config})
    scheduler = {"_class_name": "DDPMScheduler", **about, **scheduler_config(**diffusion)}
    save_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if unet.attribute_map is not None and condition is None:
        save_weights(folder / ATTRIBUTE_MAP, {MAP: unet.attribute_map.weight}, half)
    save_json(folder / RUN, run)
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    save_json(folder / "model_index.json", {"_class_name": "DDPMPipeline", **about, **parts})


# From diffusers ----------------------------------------------------------------------------------


def read_folder(path: Path) -> dict:
    """Read the folder of a file of weights into the contents of a checkpoint (`weights.Saved`).

    Raises CheckpointError, naming file and setting, for what our network is not or a bad file."""
    folder = path.parent
    root = folder.parent if folder.name in ("unet", "unet_ema") else folder
    if (index_file := root / "model_index.json").is_file():
        index = read_json(index_file)
        others = [key for key in index if key[:1] != "_" and key not in ("unet", "scheduler")]
        if others:
            what = f"is a {str(index.get('_class_name'))[:100]} with {', '.join(others)[:100]}"
            raise CheckpointError(index_file, what, "take a pipeline of a UNet2DModel alone")
    arguments, unet, flip = read_unet_config(folder / "config.json")
    diffusion = read_scheduler_config(find_scheduler(root))
    step, settings = read_run(root / RUN)
    settings["img_size"] = unet.img_size

    shapes = {}
    for name, tensor in unet.state_dict().items():
        names = diffusers_names(name)
        shapes |= dict.fromkeys(names, (len(tensor) // len(names), *tensor.shape[1:]))
    theirs = load_weights(path, shapes, todays_name)
    weights = {n: torch.cat([theirs[t] for t in diffusers_names(n)]) for n in unet.state_dict()}
    if settings["attributes"]:
        arguments["num_attributes"] = len(settings["attributes"])
        shape = (4 * unet.channels, arguments["num_attributes"])
        weights |= load_weights(root / ATTRIBUTE_MAP, {MAP: shape})
    if flip:  # there the cosines come first
        first, second = weights["time_mlp.0.weight"].chunk(2, dim=1)
        weights["time_mlp.0.weight"] = torch.cat([second, first], dim=1)
    about = {"unet": arguments, "diffusion": diffusion, "settings": settings, "step": step}
    return about | {"model": weights, "ema": {"model": weights, "num_updates": 0}}


def todays_name(name: str) -> str:
    """diffusers' name of today for a weight that may have an earlier name."""
    earlier = rf"(attentions\.\d+)\.({'|'.join(EARLIER)})\."
    return re.sub(earlier, lambda found: f"{found[1]}.{EARLIER[found[2]]}.", name)


def arguments_of(config: dict) -> dict:
    """The arguments of `UNet` for a UNet2DModel's configuration."""
    widths = config["block_out_channels"]
    arguments = {ours: config[theirs] for ours, (theirs, *_) in SETTINGS.items()}
    # None: a single head, however wide
    arguments["head_dim"] = config["attention_head_dim"] or max(widths)
    arguments["channels"] = widths[0]
    arguments["channel_mults"] = tuple(-(-width // widths[0]) for width in widths)
    kinds = enumerate(config["down_block_types"])
    sizes = [config["sample_size"] >> i for i, kind in kinds if kind == "AttnDownBlock2D"]
    arguments["attn_resolutions"] = tuple(sizes)
    return arguments


def read_unet_config(path: Path) -> tuple[dict, UNet, bool]:
    """The arguments of `UNet` for a UNet2DModel's configuration, the network without memory for its
    weights, and whether its embedding puts the cosines first. Raises CheckpointError."""
    config = read_bounded(path)
    widths, head_dim = config["block_out_channels"], config["attention_head_dim"]
    arguments = arguments_of(config)
    try:
        with torch.device("meta"):
            unet = UNet(**arguments)
        ours = FIXED | unet_config(unet)
    except (UserError, ValueError) as error:
        what, _, _ = str(error).partition(". Fix: ")
        setting, _, reason = what.removeprefix("--").partition(": ")
        what = f"is of no network of ours: {SETTINGS.get(setting, [setting])[0]} {reason}"
        raise CheckpointError(path, what, "take another model") from error
    ours["flip_sin_to_cos"] = flip = config["flip_sin_to_cos"] is True
    ignored = IGNORED | ({"attention_head_dim"} if head_dim is None else set())
    ignored |= {"downsample_padding"} if len(widths) == 1 else set()  # nothing is downsampled
    for name, value in config.items():
        known = name in ignored or name[:1] == "_" and name not in ours
        if not known and value != ours.get(name):
            refuse(path, config, name, str(ours.get(name)))
    return arguments, unet, flip


def read_bounded(path: Path) -> dict:
    """A UNet2DModel's configuration with diffusers' defaults, whose numbers are in their bounds.
    Raises CheckpointError."""
    config = {theirs: default for theirs, default, _, _ in SETTINGS.values()}
    config |= dict(block_out_channels=[], down_block_types=[], flip_sin_to_cos=True)
    config |= read_json(path)
    size, widths = config["sample_size"], config["block_out_channels"]
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        config["sample_size"] = size[0]
    for name in ("block_out_channels", "down_block_types"):
        if not isinstance(config[name], list) or not 0 < len(config[name]) <= MAX_STAGES:
            refuse(path, config, name, f"lists of 1 to {MAX_STAGES}")
    if not all(within(width, 4, MAX_WIDTH) for width in widths):
        refuse(path, config, "block_out_channels", f"numbers from 4 to {MAX_WIDTH}")
    single = {"attention_head_dim": 1} if config["attention_head_dim"] is None else {}
    for theirs, _, least, most in SETTINGS.values():
        if not within((config | single)[theirs], least, most):
            refuse(path, config, theirs, f"numbers from {least} to {most}")
    return config


def find_scheduler(root: Path) -> Path:
    """The scheduler's file in a folder or beside a trainer's checkpoint. Raises CheckpointError."""
    folders = root / "scheduler", root, root.absolute().parent / "scheduler"
    for path in (folder / "scheduler_config.json" for folder in folders):
        if path.is_file():
            return path
    what = "does not exist, so the noise schedule of these weights is not known"
    fix = f"write it: diffusers.DDPMScheduler(...).save_pretrained({str(folders[0])!r})"
    raise CheckpointError(folders[0] / "scheduler_config.json", what, fix)


def read_scheduler_config(path: Path) -> dict:
    """The arguments of `Diffusion` for a scheduler's configuration. Raises CheckpointError."""
    config = dict(num_train_timesteps=1000, beta_schedule=None, beta_start=1e-4, beta_end=0.02)
    config |= dict(trained_betas=None, prediction_type="epsilon", rescale_betas_zero_snr=False)
    config |= read_json(path)
    T, betas = config["num_train_timesteps"], config["trained_betas"]
    listed = isinstance(betas, list) and len(betas) == T and all(within(b, 0.0, 1.0) for b in betas)
    schedules = ["linear", "squaredcos_cap_v2"] if betas is None else [config["beta_schedule"]]
    names = {each.diffusers_name: name for name, each in PREDICTIONS.items() if each.diffusers_name}
    for name, good, known in (
        ("num_train_timesteps", within(T, 2, 100_000), "2 to 100000"),
        ("trained_betas", betas is None or listed, "as many numbers from 0 to 1"),
        ("beta_schedule", config["beta_schedule"] in schedules, ", ".join(map(str, schedules))),
        ("beta_start", within(config["beta_start"], 0.0, 1.0), "0 to 1"),
        ("beta_end", within(config["beta_end"], 0.0, 1.0), "0 to 1"),
        ("prediction_type", config["prediction_type"] in list(names), ", ".join(names)),
        ("rescale_betas_zero_snr", not config["rescale_betas_zero_snr"], "False"),
    ):
        if not good:
            refuse(path, config, name, known)
    betas, prediction = scheduler_betas(config), names[config["prediction_type"]]
    for name in NOISE_SCHEDULES:
        ours = Diffusion(T, name, dtype=torch.float64).betas
        if torch.allclose(ours, betas, rtol=1e-3, atol=0):
            return dict(num_timesteps=T, noise_schedule=name, prediction=prediction)
    what = f"its betas, {betas[0]:.3g} to {betas[-1]:.3g}, are those of no noise schedule here"
    raise CheckpointError(path, what, f"there are {', '.join(NOISE_SCHEDULES)}")


def read_run(path: Path) -> tuple[int, dict]:
    """The step and the settings in `run.json`, if there is one. Raises CheckpointError."""
    run = read_json(path) if path.is_file() else {}
    step, settings = run.get("step", 0), run.get("settings", {})
    good = within(step, 0, 1 << 53) and isinstance(settings, dict)
    lists = [settings.get(name, []) for name in ("attributes", "only")] if good else [None]
    if not all(isinstance(each, list) and all(type(e) is str for e in each) for each in lists):
        raise CheckpointError(path, "is damaged", "write the folder again with convert.py")
    names = dict(zip(("attributes", "only"), map(tuple, lists), strict=True))
    return step, {"faces": "unknown"} | settings | names
