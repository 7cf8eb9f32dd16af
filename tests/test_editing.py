"""Images of one's own: what is kept, what is changed, which files are refused."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from exact import Gaussian, alpha_bar_at
from PIL import Image, ImageDraw, ImageOps

from dataset.decoding import crop_face
from diffusion import Diffusion
from editing import between, edit_loop, encode, noise_of, read_image, read_mask, repeat_stretches
from generate import generate, load_trained
from sample import SampleConfig, sample
from samplers import SAMPLERS
from system.errors import DataError, UsageError
from train import train
from utils import to_uint8

SIZE = 8


def make_files() -> None:
    random = np.random.default_rng(5)
    for name, size in (("face", (12, 10)), ("other", (12, 10)), ("celeba", (178, 218))):
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{name}.png")
    mask = np.zeros((10, 12), np.uint8)
    mask[:, 6:] = 255
    Image.fromarray(mask).save("mask.png")
    Path("text.png").write_text("no image")


@pytest.fixture
def trained(run):
    """The network of the run in the current folder, beside some files."""
    make_files()
    return load_trained(run)


def edited(count=4, **options) -> np.ndarray:
    """The pixels of the images that `sample` saves."""
    options = dict(checkpoint="run", num_images=count, steps=3, out="edited") | options
    out = sample(SampleConfig(**options))
    images = [np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("*.png"))]
    for path in out.glob("*.png"):
        path.unlink()
    return np.stack(images)


def pixels_of(name: str) -> np.ndarray:
    return np.asarray(crop_face(Image.open(name).convert("RGB"), SIZE)).astype(int)


def exact() -> Gaussian:
    return Gaussian(Diffusion(prediction="eps", dtype=torch.float64), mean=0.0)


def last(moves) -> torch.Tensor:
    *_, (_, images) = moves
    return images


# Repair ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("resample", [1, 3])
def test_repair_keeps_every_bit_that_the_mask_leaves_out(trained, sampler, resample):
    image = pixels_of("face.png")
    answers = edited(image="face.png", mask="mask.png", sampler=sampler, resample=resample)
    keep = ~read_mask("mask.png", "face.png", trained)[0, 0].numpy()
    assert 0 < keep.sum() < SIZE * SIZE
    for answer in answers:
        np.testing.assert_array_equal(answer[keep], image[keep])
        assert not np.array_equal(answer[~keep], image[~keep])
    assert not np.array_equal(answers[0], answers[1])


def test_hole_of_a_repair_has_no_trace_of_what_was_in_it(trained):
    image, other = read_image("face.png", trained), read_image("face.png", trained)
    mask = read_mask("50:100,0:100", "face.png", trained)
    other[mask.expand_as(other)] *= -1
    options = dict(loop=edit_loop, mask=mask, resample=3, steps=3)
    answers = [next(generate(trained, range(3), image=each, **options)) for each in (image, other)]
    assert torch.equal(*answers) and not torch.equal(image, other)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("times", [1, 4])
def test_repair_by_the_exact_network_follows_what_is_known(sampler, times):
    """Two pixels that are always alike: if one of them is known, the other one follows."""
    d = Diffusion(prediction="eps", dtype=torch.float64)

    def model(x_t, t):  # the pixels are normal, with deviation 1/2, and equal
        alpha_bar = alpha_bar_at(d, t)
        y = x_t.mean(dim=3, keepdim=True) / alpha_bar**0.5
        x_0 = (y * 0.25 / (0.25 + (1 / alpha_bar - 1) / 2)).expand_as(x_t)
        return (x_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5

    model.diffusion = d
    image = torch.tensor([0.6, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    mask = torch.tensor([False, True]).view(1, 1, 1, 2)
    options = dict(sampler=sampler, steps=50, image=image, mask=mask, resample=times)
    images = last(edit_loop(model, range(500), **options))
    assert torch.equal(images[..., 0], image[..., 0].expand(500, 1, 1))
    error = float((images[..., 1] - 0.6).abs().mean())
    assert error < (0.06 if times == 4 else 0.25), error


def test_each_stretch_of_a_repair_is_repeated_as_often_as_asked():
    d, draw = Diffusion(100), partial(torch.randn, 2, 1, 4, 4)
    run = partial(SAMPLERS["ddim"].run, lambda x, *_: (x.clamp(-1, 1), x), draw=draw, eta=0.0)
    for steps, times, stretch in ((10, 3, 1), (50, 2, 2), (7, 1, 7)):
        levels = d.levels("ddim", steps)
        found = [t for t, *_ in repeat_stretches(run, draw(), levels, draw, times)]
        grid = [level.t for level in levels[:-1]]
        parts = [grid[i : i + stretch] for i in range(0, steps, stretch)]
        assert found == [t for part in parts for _ in range(times) for t in part]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_between_two_passes_is_that_of_the_level(sampler):
    """x keeps the variance that it has at each level, however often it goes up and down."""
    model, d = exact(), exact().diffusion
    predict, draw = d.predictor(model), partial(torch.randn, 2000, 1, 1, 1, dtype=torch.float64)
    run = partial(SAMPLERS[sampler].run, predict, draw=draw, eta=0.0)
    levels = d.levels(sampler, 250)
    for t, x_t, _ in repeat_stretches(run, draw(), levels, draw, 3):
        alpha_bar = alpha_bar_at(d, torch.tensor([t]))
        expected = (alpha_bar * 0.04 + 1 - alpha_bar) ** 0.5
        assert abs(float(x_t.std()) / expected - 1) < 0.1, t


# Variation, and other attributes -----------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_0_gives_the_image_and_1_nothing_of_it(trained, sampler):
    for answer in edited(image="face.png", strength=0.0, sampler=sampler):
        np.testing.assert_array_equal(answer, pixels_of("face.png"))
    options = dict(sampler=sampler, steps=3)
    plain = next(generate(trained, range(3), **options))
    for name in ("face.png", "other.png"):
        options |= dict(loop=edit_loop, image=read_image(name, trained), strength=1.0)
        assert torch.equal(next(generate(trained, range(3), **options)), plain)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_stronger_the_change_the_further_from_the_image(sampler):
    image, distances = torch.linspace(-0.9, 0.9, 64).view(1, 1, 8, 8).double(), []
    for strength in (0.1, 0.4, 0.7, 1.0):
        options = dict(sampler=sampler, steps=10, image=image, strength=strength)
        images = last(edit_loop(exact(), range(64), **options))
        distances.append(float((images - image).abs().mean()))
    assert distances == sorted(distances) and distances[0] < 0.5 * distances[-1]


def test_image_goes_with_attributes_guidance_and_guide(here, monkeypatch):
    monkeypatch.setattr("dataset.sources.NUM_SYNTHETIC", 40)
    train(tiny(learning_rate=0.01, path_to_data="synthetic", attributes=("Smiling", "Male")))
    Image.new("RGB", (20, 20), "teal").save("face.png")
    options = dict(image="face.png", strength=0.5, guide="none")
    guide = "run/checkpoints/step_00000003.pt"
    plain, smiling = edited(**options), edited(**options, condition=("Smiling",))
    others = [smiling, edited(**options | {"guide": guide})]
    others += [edited(**options, condition=("Smiling",), guidance=4.0)]
    assert not any(np.array_equal(other, plain) for other in others)
    assert not np.array_equal(others[2], smiling)
    sheet = sample(SampleConfig("run", num_images=2, steps=2, sheet=True, out="s.png", **options))
    assert Image.open(sheet).height == 4 * (SIZE + 2) + 2
    options["strength"] = None  # the attribute alone is changed, by inversion: one answer
    changed = edited(**options, condition=("Smiling",))
    assert len(changed) == 1 and not np.array_equal(changed[0], smiling[0])
    grid = sample(SampleConfig("run", steps=3, out="g.png", condition=("Smiling",), **options))
    cells = np.asarray(Image.open(grid))  # the image, and its change
    assert cells.shape == (12, 22, 3) and (cells[2:10, 2:10] == pixels_of("face.png")).all()


def test_way_of_a_repair_is_saved_as_a_gif(trained):
    options = dict(image="face.png", mask="mask.png", resample=2, num_images=2, steps=3)
    assert Image.open(sample(SampleConfig("run", out="way.gif", **options))).n_frames > 3


# Between two images ------------------------------------------------------------------------------


def test_exact_network_finds_the_noise_from_which_it_generates():
    model = exact()
    images = 0.2 * torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    errors = []
    for steps in (20, 50, 250):
        noise = encode(model, images, steps)
        assert abs(noise.std() - 1) < 0.15
        back = model.diffusion.sample(model, images.shape, steps=steps, x_T=noise)
        errors.append(float((back - images).abs().mean() / images.abs().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02, errors


def test_interpolation_leads_from_one_file_to_the_other(trained):
    way = edited(5, interpolate=("face.png", "other.png"), steps=12)
    ends = [to_uint8(read_image(name, trained))[0].numpy() for name in ("face.png", "other.png")]
    to_ends = [[np.abs(image - end).mean() for image in way] for end in ends]
    assert np.argmin(to_ends[0]) == 0 and np.argmin(to_ends[1]) == 4
    mixed = edited(3, interpolate=(3, "face.png"), steps=12)
    np.testing.assert_allclose(mixed[-1], way[0], atol=1)


def test_noise_between_two_images_is_as_long_as_noise(trained):
    ends = [noise_of(trained, number, seed=0) for number in (0, 1)]
    noise = between(*ends, 9)
    lengths = noise.flatten(1).norm(dim=1) / noise[0].numel() ** 0.5
    assert lengths.min() > 0.85 and lengths.max() < 1.15 and torch.equal(noise[0], ends[0])
    same = between(ends[0], ends[0], 3)
    assert torch.equal(same[0], same[2]) and torch.isfinite(same).all()


# The files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["aligned", "square"])
def test_image_and_mask_are_cropped_as_the_data_of_the_run(trained, crop):
    trained = replace(trained, settings=trained.settings | {"crop": crop})
    expected = crop_face(Image.open("celeba.png"), SIZE, crop)
    np.testing.assert_array_equal(to_uint8(read_image("celeba.png", trained))[0].numpy(), expected)
    upper = np.zeros((218, 178), np.uint8)
    upper[: 121 if crop == "aligned" else 109] = 255  # the upper half of the square
    Image.fromarray(upper).save("half.png")
    found = read_mask("half.png", "celeba.png", trained)[0, 0]
    assert found[:4].all() and not found[4:].any()


def test_hole_may_be_a_box_white_on_black_strokes_or_an_erased_part(trained):
    box = read_mask("50:100,0:100", "face.png", trained)
    assert box[..., 4:].all() and not box[..., :4].any()
    strokes = Image.new("RGBA", (16, 16))
    ImageDraw.Draw(strokes).rectangle((8, 0, 15, 15), "red")
    erased = Image.open("face.png").resize((16, 16)).convert("RGBA")
    kept = Image.new("L", (16, 16), "white")
    ImageDraw.Draw(kept).rectangle((8, 0, 15, 15), "black")
    erased.putalpha(kept)
    white = ImageOps.invert(kept)
    Image.new("RGB", (16, 16), "teal").save("square.png")
    for name, image in (("strokes", strokes), ("erased", erased), ("white", white)):
        image.save(f"{name}.png")
        assert torch.equal(read_mask(f"{name}.png", "square.png", trained), box), name


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(image="face.png", mask="tall.png"), "--mask: tall.png has 10x20 .*12x10"),
        (dict(image="face.png", mask="black.png"), "--mask: black.png has no hole"),
        (dict(image="face.png", mask="other.png"), "--mask: other.png is not black and white"),
        (dict(image="face.png", mask="10:10,0:100"), "--mask: .* no hole"),
        (dict(image="none.png", strength=0.5), "none.png"),
        (dict(image="text.png", strength=0.5), "text.png"),
        (dict(image="pictures", strength=0.5), "pictures"),
        (dict(image="face.png"), "--image"),
        (dict(image="face.png", strength=1.2), "--strength"),
        (dict(strength=0.5), "--strength"),
        (dict(mask="mask.png"), "--mask"),
        (dict(image="face.png", mask="mask.png", resample=0), "--resample"),
        (dict(image="face.png", strength=0.5, resample=3), "--resample"),
        (dict(image="face.png", interpolate=(1, 2), strength=0.5), "--interpolate"),
        (dict(image="face.png", strength=0.04, sampler="ddim"), "--steps"),
        (dict(interpolate=("face.png", 3), steps=1), "--steps"),
        (dict(image="face.png", strength=0.5, out="./face.png"), "--out"),
        (dict(interpolate=(3, "face.png"), out="face.png"), "--out"),
    ],
)
def test_what_cannot_be_is_one_error_and_nothing_is_generated(trained, monkeypatch, options, said):
    Image.new("L", (12, 10), "black").save("black.png")
    Image.new("L", (10, 20), "white").save("tall.png")
    monkeypatch.setattr("sample.generate", lambda *_, **__: pytest.fail("generates"))
    kind = UsageError if said.startswith("--") else DataError
    with pytest.raises(kind, match=rf"^{said}[^\n]*Fix: [^\n]*$"):
        sample(SampleConfig(**dict(checkpoint="run", steps=3, out="x.png") | options))
