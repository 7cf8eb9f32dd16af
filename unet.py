"""The network of DDPM: a U-Net that finds the noise in an image (Ho et al. 2020, appendix B).

    x_t (B, C, H, W) -> conv_in -> down stages -> middle -> up stages -> conv_out -> (B, C, H, W)

A down stage holds `num_res_blocks` residual blocks, each followed by attention where the stage's
resolution is one of `attn_resolutions`, then halves the image (not the last stage). An up stage
holds one block more, takes one skip connection into each by concatenation, then doubles the image.
The time t enters every residual block through a sinusoidal embedding and a small MLP. The maths is
that of diffusers' `UNet2DModel`, so that weights can move both ways (convert.py).
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from system.cpu import group_norm

# Channel multipliers of the stages where none are given: the published networks at 32 (CIFAR-10),
# 64 (CelebA, Song et al. 2020) and 256 px (LSUN), which serves from 128 on.
CHANNEL_MULTS = {32: (1, 2, 2, 2), 64: (1, 2, 2, 2, 4), 128: (1, 1, 2, 2, 4, 4)}


def default_channel_mults(img_size: int) -> tuple[int, ...]:
    """The stages of the largest published network that is not meant for more pixels than these."""
    fitting = [size for size in CHANNEL_MULTS if size <= img_size]
    return CHANNEL_MULTS[max(fitting)] if fitting else (1, 2, 2)


def check_shape(img_size: int, channels: int, channel_mults: Sequence[int], head_dim: int) -> None:
    """Raise ValueError(argument, what is wrong, what to do) where the stages do not fit."""

    def check(good: bool, name: str, value: object, allowed: str) -> None:
        if not good:
            raise ValueError(name, f"is {value!r}", f"give {allowed}")

    check(channels >= 4 and channels % 4 == 0, "channels", channels, "a multiple of 4, such as 64")
    mults = tuple(channel_mults) or default_channel_mults(img_size)
    smallest = 2 ** (len(mults) - 1)
    allowed = f"a multiple of {smallest} from 8, as {len(mults)} stages need, such as 64"
    check(img_size >= 8 and img_size % smallest == 0, "img_size", img_size, allowed)
    for width in (channels * mult for mult in mults):
        fits = width % max(1, width // head_dim) == 0
        check(fits, "head_dim", head_dim, f"a divisor of {width} channels")


def sinusoidal_embedding(t: Tensor, dim: int, freq_shift: int = 1) -> Tensor:
    """Sines and cosines of t at `dim / 2` frequencies from 1 to 1/10000 (Vaswani et al. 2017).

    t: (B,) integers or floats in [0, T); freq_shift: 0 where 1/10000 itself is left out, as in the
    original. Returns (B, dim) float32: the sines, then the cosines."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class GroupNorm(nn.GroupNorm):
    """Normalise groups of channels (Wu and He 2018), then apply SiLU or not: 32 groups, or as many
    as divide a narrow network's channels.

    A group holds two channels or more: alone in its group a channel would lose its mean, and with
    it all that the embedding of t adds to it."""

    def __init__(self, channels: int, silu: bool = False):
        groups = math.gcd(32, channels)
        super().__init__(groups if groups < channels else groups // 2, channels)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        on_cpu = x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
        if on_cpu and x.dtype == torch.bfloat16:
            y = group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        else:
            y = super().forward(x)
        return F.silu(y) if self.silu else y


def zero_init(layer: nn.Module) -> nn.Module:
    """Start the layer at zero, so that the block it ends begins as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def set_norms(network: nn.Module, eps: float, groups: int) -> None:
    """Give every norm in a network this eps and, unless 0, this number of groups."""
    for module in network.modules():
        if isinstance(module, GroupNorm):
            module.eps, module.num_groups = eps, groups or module.num_groups


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice; t added in between; a shortcut around it all."""

    def __init__(self, channels_in: int, channels: int, time_dim: int, dropout: float):
        super().__init__()
        self.norm1 = GroupNorm(channels_in, silu=True)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time = nn.Linear(time_dim, channels)
        self.norm2 = GroupNorm(channels, silu=True)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))
        same = channels_in == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))  # (B, C, H, W)
        h = h + self.time(emb)[:, :, None, None]
        h = self.conv2(self.dropout(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Multi-head self-attention over the H * W positions, with a residual connection."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.heads = max(1, channels // head_dim)
        self.norm = GroupNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, c // self.heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, HW, head_dim) each
        if x.device.type == "cpu" and q.dtype == torch.bfloat16:
            # The backward of the fused kernel is slow there: plain products are twice as fast.
            weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, HW, HW)
            tokens = weights.softmax(dim=-1) @ v
        else:
            tokens = F.scaled_dot_product_attention(q, k, v)
        tokens = self.out(tokens.transpose(1, 2).flatten(2))  # (B, HW, C)
        return x + tokens.transpose(1, 2).reshape(b, c, h, w)


class Downsample(nn.Conv2d):
    """Halve the image by a 3x3 convolution; padding 0: padded on the right and below only."""

    def __init__(self, channels: int, padding: int):
        super().__init__(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the image: repeat each pixel 2 x 2 times, then a 3x3 convolution.

    A 3x3 window on repeated pixels sees only 2 x 2 different ones, so that both steps together are
    a transposed convolution with a 4x4 kernel: four products for a pixel instead of nine."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.float32:  # in bfloat16 that is slower
            weight = F.pad(self.conv.weight.flip(2, 3), (1, 1, 1, 1))
            weight = F.avg_pool2d(weight, 2, stride=1, divisor_override=1).transpose(0, 1)
            # The bias is added apart: inside, its gradient makes the backward 1.4 times as long.
            y = F.conv_transpose2d(x, weight, stride=2, padding=1)
            return y.add_(self.conv.bias[:, None, None])
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Module):
    """Residual blocks at one resolution, each with attention or none; the way to the next one.

    channels_in: of what comes into each block; head_dim: 0 for no attention"""

    def __init__(self, channels_in, channels, head_dim, resample, time_dim: int, dropout: float):
        super().__init__()
        blocks = [ResidualBlock(c, channels, time_dim, dropout) for c in channels_in]
        attentions = [Attention(channels, head_dim) if head_dim else nn.Identity() for _ in blocks]
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample


class UNet(nn.Module):
    """output = UNet(x_t, t): the noise in x_t (Ho et al. 2020), or what else it is taught to find.

    img_size: pixels of a side, divisible by 2 at every stage but the last
    channels: of the first stage; channel_mults: stage i has channels * channel_mults[i] (empty:
        chosen by img_size); num_res_blocks: residual blocks in a stage
    attn_resolutions: resolutions, in pixels, at which blocks are followed by attention
    head_dim: channels of an attention head; dropout: share of activations dropped in training
    num_attributes: length K of the condition; 0 for an unconditional network
    norm_groups: groups of every norm; 0: each has its own number, by `GroupNorm`
    norm_eps, downsample_padding, freq_shift: as in other implementations, whose weights want them
    image_channels: C, 3 of colour, 1 of grey images
    """

    def __init__(
        self,
        img_size: int = 64,
        channels: int = 128,
        channel_mults: Sequence[int] = (),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16, 12, 8),
        head_dim: int = 64,
        dropout: float = 0.1,
        num_attributes: int = 0,
        norm_groups: int = 0,
        norm_eps: float = 1e-5,
        downsample_padding: int = 1,
        freq_shift: int = 1,
        image_channels: int = 3,
    ):
        super().__init__()
        check_shape(img_size, channels, channel_mults, head_dim)
        widths = [channels * mult for mult in channel_mults or default_channel_mults(img_size)]
        self.img_size, self.channels, self.freq_shift = img_size, channels, freq_shift
        self.image_channels = image_channels
        time_dim = 4 * channels
        self.time_mlp = nn.Sequential(
            nn.Linear(channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        self.attribute_map = (
            nn.Linear(num_attributes, time_dim, bias=False) if num_attributes else None
        )
        self.conv_in = nn.Conv2d(image_channels, channels, 3, padding=1)
        stage = partial(Stage, time_dim=time_dim, dropout=dropout)
        last = len(widths) - 1
        resolutions = [img_size // 2**i for i in range(len(widths))]
        head_dims = [head_dim if size in attn_resolutions else 0 for size in resolutions]

        # Down: `skips` lists the channels of every h that an up block will take back.
        self.down, skips = nn.ModuleList(), [channels]
        for i, width in enumerate(widths):
            channels_in = [skips[-1]] + [width] * (num_res_blocks - 1)
            resample = Downsample(width, downsample_padding) if i < last else nn.Identity()
            self.down.append(stage(channels_in, width, head_dims[i], resample))
            skips += [width] * (num_res_blocks + 1 if i < last else num_res_blocks)

        self.middle_block1 = ResidualBlock(width, width, time_dim, dropout)
        self.middle_attention = Attention(width, head_dim)
        self.middle_block2 = ResidualBlock(width, width, time_dim, dropout)

        self.up = nn.ModuleList()
        for i in reversed(range(len(widths))):
            channels_in = []
            for _ in range(num_res_blocks + 1):
                channels_in.append(width + skips.pop())
                width = widths[i]
            resample = Upsample(width) if i else nn.Identity()
            self.up.append(stage(channels_in, width, head_dims[i], resample))

        self.norm_out = GroupNorm(width, silu=True)
        self.conv_out = zero_init(nn.Conv2d(width, image_channels, 3, padding=1))
        set_norms(self, norm_eps, norm_groups)
        # The memory format in which convolutions are fastest, on GPUs and CPUs; it is passed on.
        self.to(memory_format=torch.channels_last)

    def forward(self, x_t: Tensor, t: Tensor, attributes: Tensor | None = None) -> Tensor:
        """x_t: (B, C, H, W), the shape of the output; t: (B,) in [0, T); attributes: (B, K)."""
        emb = self.time_mlp(sinusoidal_embedding(t, self.channels, self.freq_shift).to(x_t.dtype))
        if attributes is not None:
            emb = emb + self.attribute_map(attributes)
        emb = F.silu(emb)  # once for all blocks

        h = self.conv_in(x_t)
        skips = [h]
        for i, stage in enumerate(self.down):
            for block, attention in zip(stage.blocks, stage.attentions, strict=True):
                h = attention(block(h, emb))
                skips.append(h)
            if i < len(self.down) - 1:
                h = stage.resample(h)
                skips.append(h)

        h = self.middle_block2(self.middle_attention(self.middle_block1(h, emb)), emb)

        for stage in self.up:
            for block, attention in zip(stage.blocks, stage.attentions, strict=True):
                h = attention(block(torch.cat([h, skips.pop()], dim=1), emb))
            h = stage.resample(h)
        return self.conv_out(self.norm_out(h))
