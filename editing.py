"""Images of your own: repaired, varied, and inverted to the noise that generates them.

    image = read_image("face.png", trained)                         # (1, 3, H, W) in [-1, 1]
    mask = read_mask("mask.png", "face.png", trained)               # (1, 1, H, W), True: generate
    repaired = generate(trained, range(8), loop=edit_loop, image=image, mask=mask, resample=5)
    varied = generate(trained, range(8), loop=edit_loop, image=image, strength=0.4)
    noise = encode(trained, image)                                  # generates this image again
    smiling = generate(trained, [0], x_T=noise, attributes=wanted)  # or with other attributes

Repair: Lugmayr et al. 2022, "RePaint". Variation: Meng et al. 2022, "SDEdit". Inversion: Song et
al. 2020, "Denoising Diffusion Implicit Models", section 4.3.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset.decoding import crop_face, open_file
from diffusion import draw_noise, image_generators
from generate import Moves, Trained
from samplers import SAMPLERS, Draw, Level, Predict, check_sampler, put_noise
from system.errors import UsageError
from utils import to_x_0

# Repair and variation ----------------------------------------------------------------------------


def edit_loop(
    trained: Trained,
    numbers: Sequence[int],
    seed: int = 0,
    attributes: Tensor | None = None,
    *,
    image: Tensor,
    mask: Tensor | None = None,
    strength: float = 1.0,
    resample: int = 1,
    sampler: str = "dpm++",
    steps: int = 20,
    guidance: float = 1.0,
    eta: float = 0.0,
) -> Moves:
    """Generate new versions of an image step by step, as `generate.sample_loop` does.

    image: (N or 1, 3, H, W) in [-1, 1]. It is noised to the share `strength` of T and denoised
    again (SDEdit): 0 returns it, 1 keeps nothing of it. mask: (N or 1, 1, H, W) bool, True where
    pixels are generated and False where they stay the image's (RePaint, eq. 8a); resample: how
    often each stretch of a repair is repeated, at as many times the cost. Raises UsageError for
    what the sampler cannot do."""
    diffusion, device = trained.diffusion, trained.diffusion.device
    image = image.to(device)
    start = round(strength * diffusion.num_timesteps)
    if start == 0:
        yield image, image.expand(len(numbers), -1, -1, -1)
        return
    check_sampler(sampler, steps, eta, start)
    levels = diffusion.levels(sampler, steps, start)
    shape, generators = (len(numbers), *image.shape[1:]), image_generators(seed, numbers)
    draw = partial(draw_noise, shape, generators, device, diffusion.dtype)

    x = draw() if start == diffusion.num_timesteps else put_noise(image, levels[0], draw())
    if attributes is not None:
        attributes = attributes.to(device)
    predict = diffusion.predictor(trained, attributes, guidance)
    if mask is not None:
        predict = keep_known(predict, image, mask.to(device))
    run = partial(SAMPLERS[sampler].run, predict, draw=draw, eta=eta)
    for _, x_t, x_0_pred in repeat_stretches(run, x, levels, draw, resample):
        yield x_t, x_0_pred


def keep_known(predict: Predict, image: Tensor, mask: Tensor) -> Predict:
    """`predict`, with x_0_pred replaced by the image where the mask is False.

    Any sampler then keeps x_t there at the image plus noise, and its last x_0_pred is the image."""

    def predict_the_rest(x_t: Tensor, t: float, alpha_bar_t: float) -> tuple[Tensor, Tensor]:
        x_0_pred = torch.where(mask, predict(x_t, t, alpha_bar_t)[0], image)
        return x_0_pred, (x_t - math.sqrt(alpha_bar_t) * x_0_pred) / math.sqrt(1 - alpha_bar_t)

    return predict_the_rest


def repeat_stretches(run: Callable, x: Tensor, levels: Sequence[Level], draw: Draw, times: int):
    """Run a sampler in short stretches, each `times` times with new noise in between, so that the
    generated part comes to fit the known part (RePaint, section 4.2 and algorithm 1).

    A stretch is a 25th of the steps, as the paper's 10 of 250."""
    steps = len(levels) - 1
    stretch = steps if times == 1 else max(1, round(steps / 25))
    for start in range(0, steps, stretch):
        part = levels[start : start + stretch + 1]
        for left in reversed(range(times)):
            x = yield from run(x, part)
            if left:
                kept = part[0].alpha_bar / part[-1].alpha_bar
                x = math.sqrt(kept) * x + math.sqrt(1 - kept) * draw()


# Inversion and interpolation ---------------------------------------------------------------------


def encode(
    trained: Trained,
    images: Tensor,
    steps: int = 50,
    attributes: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """The noise from which the network generates these images: its ODE solved backwards by DDIM.

    images: (N, 3, H, W) in [-1, 1]; attributes: (N or 1, K). Returns the shape of `images`."""
    diffusion = trained.diffusion
    x = images.to(diffusion.device, diffusion.dtype)
    if attributes is not None:
        attributes = attributes.to(diffusion.device).expand(len(x), -1)
    predict = diffusion.predictor(trained, attributes, guidance)
    for here, there in pairwise(diffusion.levels("dpm++", steps)[-2::-1]):
        x_0_pred, eps_pred = predict(x, *here)
        x = put_noise(x_0_pred, there, eps_pred)
    return x


def between(a: Tensor, b: Tensor, count: int) -> Tensor:
    """`count` steps from the noise a (3, H, W) to the noise b, on the great circle, because what
    lies on it is as long as noise is (Song et al. 2020, eq. 67). Returns (count, 3, H, W)."""
    shape, a, b = a.shape, a.flatten(), b.flatten()
    angle = torch.acos((torch.dot(a, b) / (a.norm() * b.norm())).clamp(-1, 1))
    share = torch.linspace(0, 1, count, device=a.device)[:, None]
    if float(angle) == 0:  # the same noise twice
        return a.expand(count, -1).reshape(count, *shape)
    noise = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return noise.reshape(count, *shape)


def noise_of(trained: Trained, end: int | str, seed: int, **options) -> Tensor:
    """The noise (3, H, W) of a generated image, by its number, or of an image file, by `encode`
    with these options. Raises DataError if the file cannot be read."""
    if isinstance(end, int):
        shape = (1, 3, trained.img_size, trained.img_size)
        return draw_noise(shape, image_generators(seed, [end]), "cpu")[0]
    return encode(trained, read_image(end, trained), **options)[0].cpu()


# Files -------------------------------------------------------------------------------------------


def read_image(path: str | Path, trained: Trained) -> Tensor:
    """Read an image file, cropped and resized as the training data: (1, 3, H, W) in [-1, 1].

    Raises DataError if it cannot be read."""
    pixels = crop_face(open_file(path), trained.img_size, trained.settings.get("crop", "aligned"))
    return to_x_0(torch.from_numpy(pixels[None].copy()))


def read_mask(given: str, image: str | Path, trained: Trained) -> Tensor:
    """Read what is to be generated of an image: (1, 1, H, W) bool, True to generate.

    given: a box in percent of the square that is used, left:right,top:bottom such as 40:60,20:80,
    or an image file. In the file the hole is white and the rest black; or strokes of one colour on
    a transparent ground; or the image itself with the hole erased. Raises UsageError for a box or a
    file that is none of these, DataError if the file cannot be read."""
    size = trained.img_size
    if box := re.fullmatch(r"(\d+):(\d+),(\d+):(\d+)", given):
        left, right, top, bottom = (round(int(edge) * size / 100) for edge in box.groups())
        mask = torch.zeros(1, 1, size, size, dtype=torch.bool)
        mask[..., top:bottom, left:right] = True
    else:
        hole, (width, height) = find_hole(open_file(given), given), open_file(image).size
        if abs(hole.width * height - hole.height * width) > 2 * max(width, height):
            what = f"{given} has {hole.width}x{hole.height} pixels, the image {width}x{height}"
            raise UsageError("--mask", what, "give a mask of the image's shape")
        hole = hole.resize((width, height)).convert("RGB")
        pixels = crop_face(hole, size, trained.settings.get("crop", "aligned"))
        mask = torch.from_numpy(pixels.mean(-1) > 127)[None, None]
    if not mask.any():
        fix = "paint white what is to be generated, within the square that is used"
        raise UsageError("--mask", f"{given} has no hole at {size} pixels", fix)
    return mask


def find_hole(image: Image.Image, name: str) -> Image.Image:
    """The hole of a mask file as white on black (mode L), for `read_mask`. Raises UsageError."""
    image = image.convert("RGBA")
    colours, opaque = np.asarray(image)[..., :3].astype(int), np.asarray(image)[..., 3] > 127
    painted = colours[opaque]
    if not opaque.all() and opaque.any() and np.ptp(painted, axis=0).max() > 32:
        return Image.fromarray(~opaque)  # an image with a part erased
    if not opaque.all():
        return Image.fromarray(opaque)  # strokes on a transparent ground
    extreme = ((colours < 64).all(-1) | (colours > 191).all(-1)).mean()
    if extreme < 0.9:
        fix = "paint white what is to be generated and black what is kept, or give a box in percent"
        raise UsageError("--mask", f"{name} is not black and white", f"{fix}: 40:60,20:80")
    return Image.fromarray(colours.mean(-1) > 127)
