"""Images of one's own: read as the data were, repaired, varied, and found again as noise.

    image = read_image("face.png", trained)                         # (1, 3, H, W) in [-1, 1]
    mask = read_mask("mask.png", "face.png", trained)               # (1, 1, H, W), True: generate
    repaired = torch.cat(list(generate(trained, range(8), image=image, mask=mask, resample=5)))
    varied = torch.cat(list(generate(trained, range(8), image=image, strength=0.4)))
    noise = encode(trained, image)                                  # what generates this image

Repair: Lugmayr et al. 2022, "RePaint". To vary: Meng et al. 2022, "SDEdit". To encode: Song et al.
2020, "Denoising Diffusion Implicit Models", section 4.3. The first two are in `sample_loop` itself.
"""

from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dataset.decoding import decode_all
from dataset.faces import without_colours
from diffusion import draw_noise, image_generators
from generate import Trained
from samplers import SAMPLERS, put_noise
from system.errors import DataError
from utils import to_x_0


def read_image(path: str | Path, trained: Trained) -> Tensor:
    """The image of a file, (1, C, H, W) in [-1, 1], cropped and resized as the data are: CelebA's
    crop where it has the shape of CelebA's files, else the largest centred square.

    Raises DataError where it cannot be read."""
    path = Path(path)
    files = path.parent, [path.name], lambda name: path.read_bytes()
    (pixels,) = decode_all(*files, trained.img_size, aligned=True)
    if trained.image_channels == 1:
        pixels = without_colours(pixels)
    return to_x_0(torch.from_numpy(pixels), trained.image_channels)


def read_mask(path: str | Path, image: str | Path, trained: Trained) -> Tensor:
    """What is to be generated of an image: (1, 1, H, W) bool, True where the mask's file is white.
    It is cropped and resized as the image is; where that mixes, the larger share counts.

    Raises DataError where it cannot be read, is not of the image's size, or leaves no white."""
    mask = read_image(path, trained).mean(dim=1, keepdim=True) > 0
    sizes = [upright_size(each) for each in (path, image)]
    if sizes[0] != sizes[1]:
        size, other = (f"{width}x{height}" for width, height in sizes)
        fix = f"make a mask of {other}: white where to generate, black where to keep"
        raise DataError(path, f"is of {size}, the image of {other}", fix)
    if not mask.any():
        fix = "paint white what is to be generated, within the square that is used"
        raise DataError(path, f"has nothing white at {trained.img_size} px", fix)
    return mask


def upright_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image's file, turned as its EXIF orientation says."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).size


def encode(
    trained: Trained,
    images: Tensor,
    steps: int = 50,
    attributes: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """The noise from which a deterministic sampler generates these images: the way of DDIM gone
    backwards, with `steps` - 1 evaluations, at the noise levels of dpm++, which leads back best.

    images: (N, 3, H, W) in [-1, 1]; attributes: (N, K), or (1, K) for all. Returns their shape."""
    diffusion, device = trained.diffusion, trained.diffusion.device
    x = images.to(device, diffusion.dtype)
    if attributes is not None:
        attributes = attributes.to(device).expand(len(x), -1)
    predict = diffusion.predictor(trained, attributes, guidance)
    levels = SAMPLERS["dpm++"].levels(diffusion._alphas_cumprod, steps)[-2::-1]
    with torch.no_grad():
        for here, there in pairwise(levels):
            x_0_pred, eps_pred = predict(x, *here)
            x = put_noise(x_0_pred, there, eps_pred)
    return x


def between(a: Tensor, b: Tensor, count: int) -> Tensor:
    """(count, C, H, W) of noise from one to another, each (C, H, W), on the great circle, so that
    what lies between is as long as noise is (Song et al. 2020, eq. 67)."""
    shape, a, b = a.shape, a.flatten(), b.flatten()
    angle = torch.acos((torch.dot(a, b) / (a.norm() * b.norm())).clamp(-1, 1))
    share = torch.linspace(0, 1, count, device=a.device)[:, None]
    if float(angle) == 0:  # twice the same
        return a.expand(count, -1).reshape(count, *shape)
    noise = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return noise.reshape(count, *shape)


def noise_of(trained: Trained, end: int | str, seed: int, **options) -> Tensor:
    """The noise (C, H, W) of the image of that number, or from which that file's is generated.

    options: `encode`'s. Raises DataError where the file cannot be read."""
    if isinstance(end, int):
        shape = (1, trained.image_channels, trained.img_size, trained.img_size)
        return draw_noise(shape, image_generators(seed, [end]), "cpu")[0]
    return encode(trained, read_image(end, trained), **options)[0].cpu()
