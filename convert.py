"""Our network as diffusers' `UNet2DModel`: its arguments, and its names of the weights."""

import re

from torch import Tensor, nn

from unet import Attention, GroupNorm, UNet

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


def diffusers_names(name: str) -> list[str]:
    """What diffusers calls the weight `name` of ours; qkv is three weights there, one behind the
    other in ours."""
    for ours, theirs in RENAMES:
        name = re.sub(ours, theirs, name)
    parts = ("to_q", "to_k", "to_v") if ".qkv." in name else ("",)
    return [name.replace("qkv", part) for part in parts]


def to_diffusers(unet: UNet) -> tuple[dict, dict[str, Tensor]]:
    """The arguments of the `UNet2DModel` that computes the same, without attributes, and its state
    dict. Raises ValueError, naming the setting, where there is no such `UNet2DModel`."""
    weights = {}
    for name, tensor in unet.state_dict().items():
        if not name.startswith("attribute_map."):
            names = diffusers_names(name)
            weights |= dict(zip(names, tensor.chunk(len(names)), strict=True))

    groups = {m.num_groups for m in unet.modules() if isinstance(m, GroupNorm)}
    if len(groups) > 1:
        raise ValueError(
            f"channels: the norms have {sorted(groups)} groups; diffusers wants one number"
        )
    attentions = [m for m in unet.modules() if isinstance(m, Attention)]
    head_dims = {m.qkv.in_features // m.heads for m in attentions}
    if len(head_dims) > 1:
        raise ValueError(
            f"head_dim: the heads have {sorted(head_dims)} channels; diffusers wants one number"
        )
    attends = [not isinstance(stage.attentions[0], nn.Identity) for stage in unet.down]
    config = dict(
        sample_size=unet.img_size,
        block_out_channels=[stage.blocks[0].conv1.out_channels for stage in unet.down],
        down_block_types=[f"{'Attn' if each else ''}DownBlock2D" for each in attends],
        up_block_types=[f"{'Attn' if each else ''}UpBlock2D" for each in reversed(attends)],
        layers_per_block=len(unet.down[0].blocks),
        attention_head_dim=head_dims.pop(),
        norm_num_groups=groups.pop(),
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return config, weights
