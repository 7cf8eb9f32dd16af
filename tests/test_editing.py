"""Images of one's own: what is kept, what is changed, which files are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny, write_pictures
from PIL import Image

import sample as sample_module
from dataset.decoding import crop_face
from diffusion import Diffusion
from editing import between, encode, noise_of, read_image, read_mask
from generate import generate, load_trained
from sample import SampleConfig, sample
from samplers import IMAGE, SAMPLERS, resampled
from system.errors import DataError, UserError
from train import train
from utils import to_uint8

SIZE = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run and some files, for all tests here: they change neither."""
    folder = tmp_path_factory.mktemp("editing")
    write_pictures(folder, 22)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_files()
        train(tiny(learning_rate=0.01))
    return folder


def make_files():
    random = np.random.default_rng(5)
    for name, size in (("face", (12, 10)), ("other", (12, 10)), ("celeba", (178, 218))):
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{name}.png")
    mask = np.zeros((10, 12), np.uint8)
    mask[:, 6:] = 255
    Image.fromarray(mask).save("mask.png")
    Image.new("L", (12, 10), "black").save("black.png")
    Image.new("L", (10, 10), "white").save("small.png")
    Path("text.png").write_text("no image")


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return load_trained("run")


def edited(count=4, **flags):
    """The pixels of the images that `sample` saves."""
    options = dict(checkpoint="run", num_images=count, steps=3, out="edited")
    out = sample(SampleConfig(**{**options, **flags}))
    images = [np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("*.png"))]
    for path in out.glob("*.png"):
        path.unlink()
    return np.stack(images)


# Repair ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("resample", [1, 3])
def test_repair_keeps_every_bit_that_the_mask_leaves_out(run, sampler, resample):
    image = np.asarray(crop_face(Image.open("face.png"), SIZE, "aligned")).astype(int)
    answers = edited(image="face.png", mask="mask.png", sampler=sampler, resample=resample)
    keep = ~read_mask("mask.png", "face.png", run)[0, 0].numpy()
    assert 0 < keep.sum() < SIZE * SIZE
    for answer in answers:
        np.testing.assert_array_equal(answer[keep], image[keep])
        assert not np.array_equal(answer[~keep], image[~keep])
    assert not np.array_equal(answers[0], answers[1])


def test_hole_of_a_repair_has_no_trace_of_what_was_in_it(run):
    first = edited(image="face.png", mask="mask.png")
    pixels = np.asarray(Image.open("face.png")).copy()
    pixels[:, 6:] = 255 - pixels[:, 6:]
    Image.fromarray(pixels).save("inverted.png")
    hole = read_mask("mask.png", "face.png", run)[0, 0].numpy()
    # But for the column that the resizing mixes: there the kept part itself is another.
    difference = np.abs(first - edited(image="inverted.png", mask="mask.png"))[:, hole]
    assert np.median(difference) <= 12


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("times", [1, 4])
def test_repair_by_the_exact_network_follows_what_is_known(sampler, times):
    """Two pixels that are always alike: with one of them known, the other one follows."""
    d = Diffusion(dtype=torch.float64)

    def model(x_t, t):  # the pixels are normal, with deviation 1/2, and equal
        log_sigmas = np.log(1 / d._alphas_cumprod.numpy() - 1) / 2
        sigma2 = np.exp(2 * np.interp(float(t[0]), np.arange(1000), log_sigmas))
        alpha_bar = 1 / (1 + sigma2)
        y = x_t.mean(dim=3, keepdim=True) / alpha_bar**0.5
        x_0 = (y * 0.25 / (0.25 + sigma2 / 2)).expand_as(x_t)
        return (x_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5

    image = torch.tensor([0.6, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    mask = torch.tensor([False, True]).view(1, 1, 1, 2)
    options = dict(sampler=sampler, steps=50, image=image, mask=mask, resample=times)
    generator = torch.Generator().manual_seed(0)
    images = d.sample(model, (500, 1, 1, 2), generator=generator, **options)
    assert torch.equal(images[..., 0], image[..., 0].expand(500, 1, 1))
    error = float((images[..., 1] - 0.6).abs().mean())
    assert error < (0.06 if times == 4 else 0.25), error


def test_resampling_goes_through_each_stretch_as_often_as_asked():
    d, model_times = Diffusion(100, dtype=torch.float64), []

    def predict(x, t, alpha_bar):
        model_times.append(t)
        return x.clamp(-1, 1), torch.zeros_like(x)

    for steps, times, stretch in ((10, 3, 1), (50, 2, 2), (7, 1, 7)):
        model_times.clear()
        levels = SAMPLERS["ddim"].levels(d._alphas_cumprod, steps)
        assert levels[-1] == IMAGE and len(levels) == steps + 1
        x = torch.randn(2, 1, 4, 4).double()
        options = (levels, 0.0, lambda: torch.randn(2, 1, 4, 4).double(), times)
        assert len(list(resampled(SAMPLERS["ddim"].run, predict, x, *options))) == steps * times
        grid = [level.t for level in levels[:-1]]
        parts = [grid[i : i + stretch] for i in range(0, steps, stretch)]
        assert model_times == [t for part in parts for _ in range(times) for t in part]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_between_two_passes_is_that_of_the_level(sampler):
    """x keeps the variance that it has at each level, however often it goes up and down."""
    d = Diffusion(dtype=torch.float64)

    options = dict(sampler=sampler, steps=250, resample=3, generator=torch.Generator())
    loop = d.sample_loop(lambda x, t: small(d, x, t), (2000, 1, 1, 1), **options)
    for t, x_t, _ in loop:
        alpha_bar = alpha_bar_at(d, torch.tensor([t]))
        expected = (alpha_bar * 0.04 + 1 - alpha_bar) ** 0.5
        assert abs(float(x_t.std()) / expected - 1) < 0.1, t


def alpha_bar_at(d, t):
    log_sigmas = np.log(1 / d._alphas_cumprod.numpy() - 1) / 2
    return 1 / (1 + np.exp(2 * np.interp(float(t[0]), np.arange(1000), log_sigmas)))


def small(d, x_t, t):
    """The exact network of images that are normal with deviation 0.2."""
    alpha_bar = alpha_bar_at(d, t)
    x_0 = alpha_bar**0.5 * 0.04 / (alpha_bar * 0.04 + 1 - alpha_bar) * x_t
    return (x_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5


# Vary --------------------------------------------------------------------------------------------


def test_strength_0_gives_the_image_and_1_nothing_of_it(run):
    image = np.asarray(crop_face(Image.open("face.png"), SIZE, "aligned"))
    for sampler in SAMPLERS:
        for answer in edited(image="face.png", strength=0.0, sampler=sampler):
            np.testing.assert_array_equal(answer, image)
    np.testing.assert_array_equal(edited(image="face.png", strength=1.0), edited())
    plain = torch.cat(list(generate(run, range(3), steps=3)))
    for name in ("face.png", "other.png"):
        image = read_image(name, run)
        for sampler in SAMPLERS:
            same = dict(sampler=sampler, steps=3)
            one = torch.cat(list(generate(run, range(3), image=image, strength=1.0, **same)))
            assert torch.equal(one, torch.cat(list(generate(run, range(3), **same))))
    assert plain.shape == (3, 3, SIZE, SIZE)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_stronger_the_change_the_further_from_the_image(sampler):
    d, image = Diffusion(), torch.linspace(-0.9, 0.9, 64).view(1, 1, 8, 8)
    distances = []
    for strength in (0.1, 0.4, 0.7, 1.0):
        options = dict(sampler=sampler, steps=10, image=image, strength=strength)
        generator = torch.Generator().manual_seed(0)
        images = d.sample(
            lambda x, t: small(d, x, t), (64, 1, 8, 8), generator=generator, **options
        )
        distances.append(float((images - image).abs().mean()))
    assert distances == sorted(distances) and distances[0] < 0.5 * distances[-1]


def test_image_of_ones_own_goes_with_attributes_guidance_and_guide(here, monkeypatch):
    monkeypatch.setattr("dataset.sources.NUM_SYNTHETIC", 40)
    train(tiny(learning_rate=0.01, path_to_data="synthetic", attributes=("Smiling", "Male")))
    Image.new("RGB", (20, 20), "teal").save("face.png")
    guide = "run/checkpoints/step_00000003.pt"
    flags = dict(image="face.png", strength=0.5, guide="none")
    plain = edited(**flags)
    for change in (dict(condition=("Smiling",)), dict(guide=guide)):
        assert not np.array_equal(edited(**{**flags, **change}), plain), change
    asked = dict(condition=("Smiling",))
    assert not np.array_equal(edited(**flags, **asked, guidance=4.0), edited(**flags, **asked))
    sheet = sample(SampleConfig("run", num_images=2, steps=2, sheet=True, out="s.png", **flags))
    assert Image.open(sheet).height == 4 * (SIZE + 2) + 2


def test_way_of_a_repair_is_saved_as_a_gif(run):
    options = dict(image="face.png", mask="mask.png", resample=2)
    way = Image.open(sample(SampleConfig("run", num_images=2, steps=3, out="w.gif", **options)))
    assert way.n_frames == 7


# Between two images ------------------------------------------------------------------------------


def test_exact_network_finds_the_noise_from_which_it_generates():
    d = Diffusion(dtype=torch.float64)

    class Exact:
        diffusion = d

        def __call__(self, x_t, t):
            return small(d, x_t, t)

    images = 0.2 * torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    errors = []
    for steps in (20, 50, 250):
        noise = encode(Exact(), images, steps)
        assert abs(noise.std() - 1) < 0.15
        back = d.sample(Exact(), images.shape, steps=steps, x_T=noise)
        errors.append(float((back - images).abs().mean() / images.abs().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02, errors


def test_interpolation_leads_from_one_file_to_the_other(run):
    way = edited(5, interpolate=("face.png", "other.png"), steps=50)
    ends = [to_uint8(read_image(name, run))[0].numpy() for name in ("face.png", "other.png")]
    noise = [noise_of(run, name, 0, steps=50) for name in ("face.png", "other.png")]
    assert not torch.allclose(*noise)
    to_ends = [[np.abs(image - end).mean() for image in way] for end in ends]
    assert np.argmin(to_ends[0]) == 0 and np.argmin(to_ends[1]) == 4
    mixed = edited(3, interpolate=(3, "face.png"), steps=50)
    np.testing.assert_allclose(mixed[-1], way[0], atol=1)


def test_noise_between_two_images_is_as_long_as_noise(run):
    ends = [noise_of(run, number, seed=0) for number in (0, 1)]
    noise = between(*ends, 9)
    lengths = noise.flatten(1).norm(dim=1) / noise[0].numel() ** 0.5
    assert lengths.min() > 0.85 and lengths.max() < 1.15
    assert torch.equal(noise[0], ends[0])
    same = between(ends[0], ends[0], 3)
    assert torch.equal(same[0], same[2]) and torch.isfinite(same).all()


# The files ---------------------------------------------------------------------------------------


def test_image_is_cropped_as_the_data_are(run):
    for name in ("face.png", "celeba.png"):
        expected = crop_face(Image.open(name), SIZE, "aligned")
        np.testing.assert_array_equal(to_uint8(read_image(name, run))[0].numpy(), expected)
    centred = crop_face(Image.open("celeba.png"), SIZE)
    assert not np.array_equal(to_uint8(read_image("celeba.png", run))[0].numpy(), centred)


def test_mask_is_cropped_as_its_image_is(run):
    mask = np.zeros((218, 178), np.uint8)
    mask[57:121] = 255  # the upper half of CelebA's square
    Image.fromarray(mask).save("half.png")
    found = read_mask("half.png", "celeba.png", run)[0, 0]
    assert found[:4].all() and not found[4:].any()


def refused(*parts, **flags):
    with pytest.raises(UserError, match="Fix: [^\n]*$") as error:
        sample(SampleConfig(**{"checkpoint": "run", "steps": 3, "out": "x.png", **flags}))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value), str(error.value)
    return error.value


def test_files_that_cannot_be_are_one_line_and_nothing_is_generated(run, monkeypatch):
    monkeypatch.setattr(sample_module, "generate", lambda *_, **__: pytest.fail("generates"))
    for flags, *parts in (
        (dict(image="face.png", mask="small.png"), "small.png", "10x10", "12x10"),
        (dict(image="face.png", mask="black.png"), "black.png", "nothing white"),
        (dict(image="none.png", strength=0.5), "none.png", "cannot be read"),
        (dict(image="text.png", strength=0.5), "text.png", "Pillow"),
        (dict(image="face.png", mask="text.png"), "text.png"),
        (dict(image="pictures", strength=0.5), "pictures"),
        (dict(interpolate=("face.png", "none.png")), "none.png"),
    ):
        assert isinstance(refused(*parts, **flags), DataError)


@pytest.mark.parametrize(
    "flags, part",
    [
        (dict(image="face.png"), "--image"),
        (dict(image="face.png", strength=1.2), "--strength"),
        (dict(image="face.png", strength=-0.1), "--strength"),
        (dict(image="face.png", strength=float("nan")), "--strength"),
        (dict(strength=0.5), "--strength"),
        (dict(mask="mask.png"), "--mask"),
        (dict(image="face.png", mask="mask.png", resample=0), "--resample"),
        (dict(image="face.png", interpolate=(1, 2), strength=0.5), "--image"),
        (dict(image="face.png", strength=0.04, sampler="ddim", steps=3), "--steps"),
        (dict(image="face.png", strength=0.5, resample=3), "--resample"),
        (dict(interpolate=("face.png", 3), steps=1), "--steps"),
        (dict(image="face.png", strength=0.5, out="./face.png"), "--out"),
        (dict(image="face.png", mask="mask.png", out="mask.png"), "--out"),
        (dict(interpolate=(3, "face.png"), out="face.png"), "--out"),
    ],
)
def test_flags_that_cannot_be_are_one_line(run, flags, part):
    assert refused(part, **flags).exit_code == 2
