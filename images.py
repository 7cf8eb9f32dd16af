"""Images: tensors in [-1, 1] to and from uint8 arrays, grids, labelled sheets, files."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.utils import make_grid

from files import write_atomically

GRID = "a grid by ddpm-faces"  # stands in its file: no image to train on


def to_x_0(pixels: Tensor, channels: int = 3) -> Tensor:
    """(B, H, W, 3) uint8 to (B, channels, H, W) float32 in [-1, 1]; of grey images 1 is enough."""
    pixels = (
        pixels[..., :channels]
        .permute(0, 3, 1, 2)
        .to(torch.float32, memory_format=torch.contiguous_format)
    )
    return pixels.div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [-1, 1] to (..., H, W, 3) uint8 in 0 ... 255, on the CPU. Of one channel
    three equal ones are made: what follows, grids, files and features, knows colours only."""
    pixels = (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    pixels = pixels.movedim(-3, -1)
    return pixels.expand(*pixels.shape[:-1], 3).contiguous().cpu()


def image_grid(images: Tensor, columns: int = 0, labels: Sequence[str] = ()) -> Image.Image:
    """One image of many. images: (N, C, H, W) in [-1, 1]; columns: 0 for as square as can be;
    labels: a text for each row, to the left of it, which makes the grid a sheet."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    cells = to_uint8(images).movedim(-1, -3)
    grid = make_grid(cells, nrow=columns, padding=2, pad_value=255)
    grid = Image.fromarray(grid.permute(1, 2, 0).numpy())
    grid.info["comment"] = GRID
    if not labels:
        return grid
    height = images.shape[-2] + 2
    font = ImageFont.load_default(size=max(9, min(16, height // 3)))
    labels = [label.replace(" ", "  ") for label in labels]  # the font's space is narrow
    margin = 8 + math.ceil(max(font.getlength(label) for label in labels))
    sheet = Image.new("RGB", (margin + grid.width, grid.height), "white")
    sheet.paste(grid, (margin, 0))
    sheet.info["comment"] = GRID
    canvas = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels):
        canvas.text((margin - 4, (row + 0.5) * height), label, "black", font, anchor="rm")
    return sheet


def save_image(image: Image.Image, path: Path, **options) -> None:
    """Save an image in the format its name ends in, whole or not at all, and its comment."""
    if comment := image.info.get("comment"):
        text = PngInfo()
        text.add_text("comment", comment)
        options |= dict(pnginfo=text, comment=comment)  # PNG's way and GIF's
    format = Image.registered_extensions()[path.suffix.lower()]
    write_atomically(path, lambda temporary: image.save(temporary, format=format, **options))
