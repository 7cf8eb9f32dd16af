"""Grey images train a network of one channel, and every part follows it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from diffusers import UNet2DModel
from PIL import Image

from benchmarks import editing, quality
from benchmarks.common import read_tables
from convert import ConvertConfig, convert
from dataset.faces import Batches, load_faces
from evaluate import EvaluateConfig, evaluate
from generate import generate, load_trained
from sample import SampleConfig, sample
from system.errors import UsageError
from train import train
from utils import find_checkpoint, load_checkpoint, save_checkpoint, to_uint8

MODES = ("L", "1", "LA", "P")


@pytest.fixture
def grey(here):
    """`grey/`: 28x28 images of all grey modes, as of handwritten digits."""
    Path("grey").mkdir()
    random = np.random.default_rng(0)
    for i in range(24):
        image = Image.fromarray(random.integers(0, 256, (28, 28), dtype=np.uint8))
        image.convert(MODES[i % len(MODES)]).save(f"grey/{i:03d}.png")
    return here


def weights_of(run):
    saved = load_checkpoint(find_checkpoint(run))
    return saved["unet"].get("image_channels", 3), saved["model"]["conv_in.weight"].shape[1]


def test_folder_of_grey_images_trains_one_channel_and_says_so(grey, capsys):
    run = train(tiny(path_to_data="grey", img_size=28, channel_mults=(1, 2)))
    assert weights_of(run) == (1, 1)
    assert "all images are grey, so the network has one channel" in capsys.readouterr().out
    for path in (run / "samples" / "step_00000006.png", sample(SampleConfig("run", 4, steps=2))):
        pixels = np.asarray(Image.open(path))
        assert pixels.shape[-1] == 3 and (pixels == pixels[..., :1]).all()
    trained = load_trained(run)
    assert next(generate(trained, range(2), steps=2)).shape == (2, 1, 28, 28)


def test_colour_images_train_three_channels(here):
    assert weights_of(train(tiny(num_training_steps=1))) == (3, 3)
    assert "image_channels" not in load_checkpoint(find_checkpoint("run"))["unet"]


def test_grey_takes_the_colours_out_as_pillow_does(here):
    assert weights_of(train(tiny(grey=True, num_training_steps=1))) == (1, 1)
    faces, colour = load_faces("pictures", 8, grey=True), load_faces("pictures", 8)
    assert faces.grey and not colour.grey and faces.key != colour.key
    theirs = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colour.images])
    assert np.abs(faces.images[..., 0].astype(int) - theirs).max() <= 1
    x_0, _ = Batches(faces, 4, channels=1)(0)
    assert x_0.shape == (4, 1, 8, 8)


def test_grey_run_goes_on_bit_for_bit(grey):
    whole = train(tiny(path_to_data="grey", experiment_name="whole"))
    train(tiny(path_to_data="grey", num_training_steps=3))
    run = train(tiny(path_to_data="grey", resume=True))
    ours, other = (load_checkpoint(find_checkpoint(each))["model"] for each in (run, whole))
    assert all(torch.equal(ours[name], other[name]) for name in ours)


def test_run_of_grey_images_that_is_older_than_this_stays_one_of_colours(here):
    config = tiny(num_training_steps=3)
    run = train(config)  # three channels, on images with colours
    path = find_checkpoint(run)
    saved = load_checkpoint(path)
    del saved["settings"]["grey"]
    for image in Path("pictures").glob("*.png"):
        Image.open(image).convert("L").save(image)
    saved["settings"]["faces"] = load_faces("pictures", 8).fingerprint
    save_checkpoint(path, saved)
    assert weights_of(train(replace(config, num_training_steps=6, resume=True))) == (3, 3)


def test_weights_and_images_of_other_channels_are_one_line(grey):
    train(tiny(num_training_steps=1, experiment_name="colour"))
    train(tiny(num_training_steps=1, experiment_name="one", path_to_data="grey"))
    with pytest.raises(UsageError, match="^--grey: .*is of colour images. Fix: "):
        train(tiny(init_from="colour", grey=True))
    with pytest.raises(UsageError, match="is of grey images, these have colours. Fix: add --grey"):
        train(tiny(init_from="one"))


def test_evaluation_shows_features_three_equal_channels(grey, monkeypatch):
    seen = []

    class Features:
        def __call__(self, images):
            seen.append((images.shape[1], bool((images == images[:, :1]).all())))
            return images.float().flatten(1)[:, :4]

    run = train(tiny(path_to_data="grey"))
    (grey / "mine.py").write_text(
        "from test_grey import FEATURES\n\n\ndef load():\n    return FEATURES"
    )
    monkeypatch.setitem(globals(), "FEATURES", Features())
    monkeypatch.syspath_prepend(str(grey))
    options = dict(num_images=4, samplers=("dpm++:2",), features="mine:load")
    assert evaluate(EvaluateConfig(str(run), "grey", **options)).is_file()
    assert len(seen) > 3 and seen.count((3, True)) >= len(seen) - 1  # one probe has colours


def test_benchmarks_measure_a_grey_network_or_refuse_it(grey, monkeypatch, capsys):
    train(tiny(path_to_data="pictures", grey=True))
    words = "--checkpoint run --path_to_data pictures --num_images 1 --steps 2 --out sheet.png"
    words += " --resample 1 --strengths 0.5 --encode_steps 2"
    monkeypatch.setattr("sys.argv", ["editing.py", *words.split()])
    editing.main()
    assert len(read_tables(capsys.readouterr().out)) == 3
    sheet = np.asarray(Image.open("sheet.png").convert("RGB"))
    assert (sheet == sheet[..., :1]).all()
    with pytest.raises(UsageError, match="^--checkpoint: .*is of grey images"):
        quality.compare(quality.QualityConfig("run", device="cpu"))


def test_grey_network_goes_to_diffusers_and_back(grey):
    run = train(tiny(path_to_data="grey", norm_groups=4, attn_resolutions=(4,)))
    convert(ConvertConfig(to_diffusers=str(run), out="folder"))
    theirs = UNet2DModel.from_pretrained("folder/unet").eval()
    assert theirs.config.in_channels == theirs.config.out_channels == 1
    ours, back = load_trained(run, half=False), load_trained("folder", half=False)
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 40])
    torch.testing.assert_close(ours(x_t, t), theirs(x_t, t).sample, rtol=1e-4, atol=1e-5)
    assert back.image_channels == 1 and torch.equal(ours(x_t, t), back(x_t, t))


def test_own_image_is_varied_without_its_colours(grey):
    train(tiny(path_to_data="grey"))
    Image.new("RGB", (20, 20), (200, 40, 90)).save("face.png")
    out = sample(SampleConfig("run", 2, steps=2, image="face.png", strength=0.0, out="same"))
    pixels = np.asarray(Image.open(out / "000000.png"))
    assert np.abs(pixels.astype(int) - 94).max() <= 1  # 0.299 * 200 + 0.587 * 40 + 0.114 * 90


def test_one_channel_becomes_three_equal_ones():
    pixels = to_uint8(torch.linspace(-1, 1, 16).view(1, 1, 4, 4))
    assert pixels.shape == (1, 4, 4, 3) and torch.equal(pixels[..., 0], pixels[..., 2])
