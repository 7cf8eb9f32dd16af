"""Our network in the form of diffusers, both ways: a folder that its pipelines load and save.

    model_index.json                                names the two parts
    unet/config.json                                the arguments of `UNet2DModel`
    unet/diffusion_pytorch_model.safetensors        its weights
    scheduler/scheduler_config.json                 the noise schedule, and what the output is
    run.json, attribute_map.safetensors             ours: what diffusers has no place for

The first published folders hold the files of `unet/` and `scheduler/` at the root.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from formats.diffusers_config import (
    read_scheduler_config,
    read_unet_config,
    scheduler_config,
    unet_config,
    whole,
)
from formats.safe_files import load_weights, read_json, save_weights
from system.errors import CheckpointError
from system.files import save_json
from unet import UNet

WEIGHTS = "diffusion_pytorch_model.safetensors"
ATTRIBUTE_MAP, RUN = "attribute_map.safetensors", "run.json"
MAP = "attribute_map.weight"  # the one weight of ours that diffusers' network does not have

# Our name of a weight, piece by piece, as diffusers has it; what is not listed is called the same.
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
# What diffusers called the layers of attention before.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def diffusers_names(name: str) -> list[str]:
    """What diffusers calls the weight `name` of ours; qkv is three weights there, one behind the
    other in ours."""
    for ours, theirs in RENAMES:
        name = re.sub(ours, theirs, name)
    parts = ("to_q", "to_k", "to_v") if ".qkv." in name else ("",)
    return [name.replace("qkv", part) for part in parts]


def new_name(name: str) -> str:
    """diffusers' name of today for a weight that may be called as it was before."""
    return re.sub(
        r"(attentions\.\d+)\.(query|key|value|proj_attn)\.",
        lambda found: f"{found[1]}.{OLD_NAMES[found[2]]}.",
        name,
    )


# To diffusers ------------------------------------------------------------------------------------


def to_diffusers(unet: UNet, condition: Tensor | None = None) -> tuple[dict, dict[str, Tensor]]:
    """The arguments of the `UNet2DModel` that computes the same, and its state dict.

    condition: attributes, (K,) or (1, K), that are built in; None: the unconditional network.
    Raises ValueError, naming the setting, where there is no such `UNet2DModel`."""
    weights = {}
    for name, tensor in unet.state_dict().items():
        if name != MAP:
            names = diffusers_names(name)
            weights |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    if condition is not None:
        # The map of the attributes is added to the embedding, and so is this bias.
        added = unet.attribute_map.weight @ condition.flatten().to(unet.attribute_map.weight)
        weights["time_embedding.linear_2.bias"] = weights["time_embedding.linear_2.bias"] + added
    return unet_config(unet), weights


def write_folder(
    folder: Path,
    unet: UNet,
    diffusion: dict,
    run: dict,
    condition: Tensor | None = None,
    half: bool = False,
) -> None:
    """Write the folder that diffusers' DDPMPipeline loads.

    diffusion: the arguments of `Diffusion`; run: what `run.json` keeps, the step and the settings;
    condition: as for `to_diffusers`, without it the map of the attributes is kept beside; half: in
    float16. Raises ValueError, naming the setting, for what diffusers does not know; ResourceError
    where the disk refuses."""
    about = {"_diffusers_version": "0.35.0"}
    config, weights = to_diffusers(unet, condition)
    scheduler = scheduler_config(**diffusion)
    save_weights(folder / "unet" / WEIGHTS, weights, half)
    save_json(folder / "unet" / "config.json", {"_class_name": "UNet2DModel", **about, **config})
    scheduler = {"_class_name": "DDPMScheduler", **about, **scheduler}
    save_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if unet.attribute_map is not None and condition is None:
        save_weights(folder / ATTRIBUTE_MAP, {MAP: unet.attribute_map.weight}, half)
    save_json(folder / RUN, run)
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    save_json(folder / "model_index.json", {"_class_name": "DDPMPipeline", **about, **parts})


# From diffusers ----------------------------------------------------------------------------------


def weights_file(folder: Path) -> Path | None:
    """Where a folder of diffusers' has its weights, or should have; None of any other folder."""
    signs = ("model_index.json", "unet/config.json", WEIGHTS, "diffusion_pytorch_model.bin")
    if not any((folder / sign).is_file() for sign in signs):
        return None
    return part(folder, "unet") / WEIGHTS


def part(folder: Path, name: str) -> Path:
    """The folder of a part, which is the pipeline's own in the first published ones."""
    return folder / name if (folder / name).is_dir() else folder


def read_folder(folder: Path) -> dict:
    """Read a folder of diffusers' into what a checkpoint of ours holds of it: "unet", "diffusion",
    "settings", "step", "model" and "ema".

    Raises CheckpointError, naming the file and the setting, for what our network is not and for a
    file that is missing, damaged or not what the configuration says."""
    check_parts(folder / "model_index.json")
    arguments, flip = read_unet_config(part(folder, "unet") / "config.json")
    diffusion = read_scheduler_config(part(folder, "scheduler") / "scheduler_config.json")
    step, settings = read_run(folder / RUN, arguments["img_size"])
    arguments["num_attributes"] = len(settings["attributes"])

    with torch.device("meta"):  # names and shapes only
        expected = UNet(**arguments).state_dict()
    attribute_map = expected.pop(MAP, None)
    shapes = {}
    for name, tensor in expected.items():
        names = diffusers_names(name)
        shapes |= dict.fromkeys(names, (len(tensor) // len(names), *tensor.shape[1:]))
    theirs = load_weights(weights_file(folder), shapes, new_name)
    weights = {name: torch.cat([theirs[n] for n in diffusers_names(name)]) for name in expected}
    if attribute_map is not None:
        weights |= load_weights(folder / ATTRIBUTE_MAP, {MAP: tuple(attribute_map.shape)})
    if flip:  # there the cosines come first
        first, second = weights["time_mlp.0.weight"].chunk(2, dim=1)
        weights["time_mlp.0.weight"] = torch.cat([second, first], dim=1)
    about = {"unet": arguments, "diffusion": diffusion, "settings": settings, "step": step}
    return about | {"model": weights, "ema": {"model": weights, "num_updates": 0}}


def check_parts(path: Path) -> None:
    """Raise CheckpointError where a pipeline has more to it than a network and a scheduler."""
    if path.is_file():
        index = read_json(path)
        others = [key for key in index if key[:1] != "_" and key not in ("unet", "scheduler")]
        if others:
            what = f"is a {str(index.get('_class_name'))[:100]} with {', '.join(others)[:100]}"
            fix = "take a pipeline of a UNet2DModel alone"
            raise CheckpointError(path, what, fix)


def read_run(path: Path, img_size: int) -> tuple[int, dict]:
    """The step and the settings that `run.json` keeps; of a folder without it, what is known."""
    run = read_json(path) if path.is_file() else {}
    step, settings = run.get("step", 0), run.get("settings", {})
    fits = whole(step, 0, 2**53) and isinstance(settings, dict)
    names = [settings.get(key, []) for key in ("attributes", "only")] if fits else []
    if not fits or not all(isinstance(each, list) for each in names):
        raise CheckpointError(path, "is damaged", "write the folder anew with convert.py")
    if not all(isinstance(name, str) for name in sum(names, [])) or len(names[0]) > 1000:
        raise CheckpointError(path, "holds no names of attributes", "write the folder anew")
    settings = {"faces": "unknown", **settings, "img_size": img_size}
    return step, settings | {"attributes": tuple(names[0]), "only": tuple(names[1])}
