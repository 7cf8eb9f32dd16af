"""The network of DDPM: a U-Net (Ho et al. 2020, appendix B).

    x_t (B, 3, H, W) -> conv_in -> down stages -> middle -> up stages -> conv_out -> (B, 3, H, W)

A down stage has `num_res_blocks` residual blocks and then halves the image (except the last stage).
An up stage has one block more, concatenates one skip connection to the input of each block, and
then doubles the image. Blocks are followed by attention if the stage's resolution is one of
`attn_resolutions`. The time t enters every residual block through a sinusoidal embedding and a
small MLP. The maths is that of diffusers' `UNet2DModel`, so weights move both ways.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from system import cpu  # operations in a form that is faster on a CPU, and PyTorch's own elsewhere
from system.errors import UsageError

# The default channel multipliers: the published networks for 32 (CIFAR-10), 64 (CelebA, Song et al.
# 2020) and 256 pixels (LSUN), which is used from 128 pixels on.
CHANNEL_MULTS = {32: (1, 2, 2, 2), 64: (1, 2, 2, 2, 4), 128: (1, 1, 2, 2, 4, 4)}


def default_channel_mults(img_size: int) -> tuple[int, ...]:
    """The multipliers of the largest published network for at most this many pixels."""
    fitting = [size for size in CHANNEL_MULTS if size <= img_size]
    return CHANNEL_MULTS[max(fitting)] if fitting else (1, 2, 2)


def sinusoidal_embedding(t: Tensor, dim: int, freq_shift: int = 1) -> Tensor:
    """Sines and cosines of t at `dim / 2` frequencies from 1 to 1/10000 (Vaswani et al. 2017).

    t: (B,) integers or floats in [0, T); freq_shift: 0 leaves out the frequency 1/10000 itself, as
    Vaswani et al. do. Returns (B, dim) float32: the sines, then the cosines."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def zero_init(layer: nn.Module) -> nn.Module:
    """Set the layer's parameters to zero, so that the block it ends starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu and He 2018), then SiLU if `silu`.

    groups: 0 for 32, or the largest power of two that divides a narrow network's channels. A group
    has at least two channels: a channel alone in its group would lose its mean, and with it all
    that the embedding of t adds."""

    def __init__(self, channels: int, silu: bool = False, groups: int = 0, eps: float = 1e-5):
        if not groups:
            groups = math.gcd(32, channels)
            groups = groups if groups < channels else groups // 2
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        y = cpu.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return F.silu(y) if self.silu else y


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice; the embedding is added in between; a shortcut around all.

    norm: makes a `GroupNorm` for a number of channels"""

    def __init__(self, channels_in: int, channels: int, time_dim: int, dropout: float, norm):
        super().__init__()
        self.norm1 = norm(channels_in, silu=True)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time = nn.Linear(time_dim, channels)
        self.norm2 = norm(channels, silu=True)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))
        same = channels_in == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))  # (B, C, H, W)
        h = h + self.time(emb)[:, :, None, None]  # emb is after SiLU
        h = self.conv2(self.dropout(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Multi-head self-attention over the H * W positions, with a residual connection."""

    def __init__(self, channels: int, head_dim: int, norm):
        super().__init__()
        self.heads = max(1, channels // head_dim)
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, c // self.heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, HW, head_dim) each
        tokens = cpu.attention(q, k, v).transpose(1, 2).flatten(2)  # (B, HW, C)
        return x + self.out(tokens).transpose(1, 2).reshape(b, c, h, w)


class Downsample(nn.Conv2d):
    """Halve the image by a 3x3 convolution. padding: 1, or 0 to pad on the right and below only."""

    def __init__(self, channels: int, padding: int):
        super().__init__(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the image: repeat each pixel 2 x 2 times, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cpu.upsample(x, self.conv)


class Stage(nn.Module):
    """Residual blocks at one resolution, each followed by attention or nothing.

    channels_in: input channels of each block; attend: whether attention follows the blocks;
    resample: `Downsample`, `Upsample` or None; block, attention: make these layers"""

    def __init__(
        self,
        channels_in: Sequence[int],
        channels: int,
        attend: bool,
        resample: nn.Module | None,
        block: Callable[[int, int], ResidualBlock],
        attention: Callable[[int], Attention],
    ):
        super().__init__()
        self.blocks = nn.ModuleList([block(c, channels) for c in channels_in])
        attentions = [attention(channels) if attend else nn.Identity() for _ in channels_in]
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample


class DownStage(Stage):
    """Puts the result of each block, and the halved image, on `skips`."""

    def forward(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = attention(block(h, emb))
            skips.append(h)
        if self.resample is not None:
            h = self.resample(h)
            skips.append(h)
        return h


class UpStage(Stage):
    """Takes one skip connection off `skips` for each block, and concatenates it to the input."""

    def forward(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = attention(block(torch.cat([h, skips.pop()], dim=1), emb))
        return h if self.resample is None else self.resample(h)


class UNet(nn.Module):
    """output = UNet(x_t, t): v, eps or another target, as `Diffusion(prediction=...)` defines it.

    img_size: pixels of a side, divisible by 2 at every stage but the last
    channels: width of the first stage; channel_mults: stage i has channels * channel_mults[i]
        channels (empty: chosen by img_size); num_res_blocks: residual blocks in a stage
    attn_resolutions: resolutions, in pixels, at which blocks are followed by attention
    head_dim: channels of an attention head; dropout: share of activations dropped in training
    num_attributes: length K of the condition; 0 for an unconditional network
    norm_groups: groups of every norm; 0: see `GroupNorm`
    norm_eps, downsample_padding, freq_shift: variants that weights of other programs need
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
    ):
        super().__init__()
        check_shape(img_size, channels, channel_mults, head_dim)
        widths = [channels * mult for mult in channel_mults or default_channel_mults(img_size)]
        self.img_size, self.channels, self.freq_shift = img_size, channels, freq_shift
        time_dim = 4 * channels
        norm = partial(GroupNorm, groups=norm_groups, eps=norm_eps)
        block = partial(ResidualBlock, time_dim=time_dim, dropout=dropout, norm=norm)
        attention = partial(Attention, head_dim=head_dim, norm=norm)
        attends = [img_size // 2**i in attn_resolutions for i in range(len(widths))]
        last = len(widths) - 1

        # The embedding of t, and of the attributes.
        mlp = nn.Linear(channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        self.time_mlp = nn.Sequential(*mlp)
        self.attribute_map = (
            nn.Linear(num_attributes, time_dim, bias=False) if num_attributes else None
        )

        # Down: `skips` lists the channels of every h that an up block takes back.
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down, skips = nn.ModuleList(), [channels]
        for i, width in enumerate(widths):
            channels_in = [skips[-1]] + [width] * (num_res_blocks - 1)
            resample = Downsample(width, downsample_padding) if i < last else None
            self.down.append(DownStage(channels_in, width, attends[i], resample, block, attention))
            skips += [width] * (num_res_blocks + 1 if i < last else num_res_blocks)

        # Middle.
        self.middle_block1 = block(width, width)
        self.middle_attention = attention(width)
        self.middle_block2 = block(width, width)

        # Up.
        self.up = nn.ModuleList()
        for i in reversed(range(len(widths))):
            channels_in = []  # the first block gets the width of the stage below
            for _ in range(num_res_blocks + 1):
                channels_in.append(width + skips.pop())
                width = widths[i]
            resample = Upsample(width) if i else None
            self.up.append(UpStage(channels_in, width, attends[i], resample, block, attention))
        self.norm_out = norm(width, silu=True)
        self.conv_out = zero_init(nn.Conv2d(width, 3, 3, padding=1))
        # The memory format in which convolutions are fastest, on GPUs and CPUs.
        self.to(memory_format=torch.channels_last)

    def forward(self, x_t: Tensor, t: Tensor, attributes: Tensor | None = None) -> Tensor:
        """x_t: (B, 3, H, W), the shape of the output; t: (B,) in [0, T); attributes: (B, K)."""
        emb = self.time_mlp(sinusoidal_embedding(t, self.channels, self.freq_shift).to(x_t.dtype))
        if attributes is not None:
            emb = emb + self.attribute_map(attributes)
        emb = F.silu(emb)  # once for all blocks

        h = self.conv_in(x_t)
        skips = [h]
        for stage in self.down:
            h = stage(h, emb, skips)
        h = self.middle_block2(self.middle_attention(self.middle_block1(h, emb)), emb)
        for stage in self.up:
            h = stage(h, emb, skips)
        return self.conv_out(self.norm_out(h))


def check_shape(img_size: int, channels: int, channel_mults: Sequence[int], head_dim: int) -> None:
    """Raise UsageError, naming the constant, if these do not make a network."""
    mults = tuple(channel_mults) or default_channel_mults(img_size)
    smallest = 2 ** (len(mults) - 1)
    if channels < 4 or channels % 4:
        raise UsageError("--channels", f"is {channels}", "give a multiple of 4, such as 64")
    if img_size < 8 or img_size % smallest:
        fix = f"give a multiple of {smallest} from 8 on, as {len(mults)} stages need"
        raise UsageError("--img_size", f"is {img_size}", fix)
    for width in (channels * mult for mult in mults):
        if width % max(1, width // head_dim):
            raise UsageError("--head_dim", f"is {head_dim}", f"give a divisor of {width} channels")
