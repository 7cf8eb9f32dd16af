"""Features: functions of the user's, or Inception's, from images to vectors."""

import sys
import urllib.error

import numpy as np
import pytest
import torch
from torch import nn

from formats.features import Features, find_features
from system.errors import ResourceError, UsageError


def random_images(count: int, seed: int = 0, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def means(images: torch.Tensor) -> torch.Tensor:
    """The colours' means in the four corners."""
    half = images.shape[-1] // 2
    parts = images.float().unfold(2, half, half).unfold(3, half, half).mean((4, 5))
    return parts.flatten(1)


def test_features_are_of_the_images_in_order():
    images = random_images(300)
    picks = np.array([5, 299, 0])
    expected = means(torch.from_numpy(images[picks]).permute(0, 3, 1, 2)).numpy()
    for size in (0, 8):  # as it is
        assert (Features("means", means, size).of(images, picks) == expected).all()
    assert Features("means", means).of(images).shape == (300, 12)


def test_images_are_resized_to_the_features_size():
    def sizes(batch):
        assert batch.dtype == torch.uint8
        return torch.tensor([batch.shape[1:]] * len(batch))

    assert Features("sizes", sizes, size=4).of(random_images(2)).tolist() == [[3, 4, 4]] * 2


@pytest.mark.parametrize(
    "function, said",
    [
        (lambda x: x.float(), "returns (2, 3, 8, 8)"),
        (lambda x: means(x)[:1], "returns (1, 12)"),
        (lambda x: [1.0], "returns list"),
        (lambda x: means(x) / 0, "not finite"),
        (lambda x: means(x).double() * 1e300, "not finite in float32"),
        (lambda x: x @ torch.zeros(3), "fails on uint8 (2, 3, 8, 8)"),
        (lambda x: sys.exit("enough"), "fails on uint8 (2, 3, 8, 8): SystemExit enough"),
        (lambda x: means(x)[:, :0], "returns (2, 0)"),
        (lambda x: means(x) * 1j, "of torch.complex64"),
        (lambda x: torch.zeros(len(x), len(x)), "vectors of 128 numbers, then of 72"),
    ],
)
def test_wrong_features_are_refused_as_one_error(function, said):
    count = 200 if "then of" in said else 2
    with pytest.raises(UsageError, match="--features: mine") as error:
        Features("mine", function).of(random_images(count))
    assert said in str(error.value)


def test_features_of_the_reference_are_kept_and_never_mixed_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    def counted(batch):
        calls.append(len(batch))
        return means(batch)

    images, picks = random_images(20), np.arange(0, 20, 2)
    first = Features("f", counted).cached(images, picks, "celeba_8")
    calls.clear()
    again = Features("f", counted).cached(images, picks, "celeba_8")
    assert (first == again).all() and calls == [4]  # the probe alone
    others = [
        (Features("f", counted), images, picks, "celeba_crop_8"),  # another crop or source
        (Features("f", counted, size=4), images, picks, "celeba_8"),
        (Features("f", lambda x: counted(x) * 2), images, picks, "celeba_8"),
        (Features("f", counted), images, picks + 1, "celeba_8"),
        (Features("f", counted), random_images(20, side=16), picks, "celeba_8"),
    ]
    for features, pixels, indices, key in others:
        calls.clear()
        features.cached(pixels, indices, key)
        assert calls == [4, 10]
    assert len(list((tmp_path / "prepared").iterdir())) == 6


def test_features_that_cannot_be_kept_are_made_all_the_same(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prepared").write_text("in the way of the folder")
    images, features = random_images(9), Features("means", means)
    vectors = features.cached(images, np.arange(9), "made_4")
    np.testing.assert_array_equal(vectors, features.of(images))
    assert "the features are not cached" in capfd.readouterr().err


@pytest.fixture
def module(tmp_path, monkeypatch, fresh_imports):
    """A user's module in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def direct(images):\n    return images.float().mean((2, 3))\n"
        "def load(device='cpu'):\n    return direct\n"
        "number = 3\n"
    )


@pytest.mark.parametrize("name", ["direct", "load"])
def test_features_come_from_any_module(module, name):
    images = random_images(3)
    expected = images.astype(np.float32).mean((1, 2))
    assert find_features(f"mine:{name}").of(images) == pytest.approx(expected)


@pytest.mark.parametrize(
    "spec, text",
    [
        *((spec, None) for spec in ("mine", "mine:absent", "absent:load", ":load", "mine:number")),
        ("mine:f", "1 / 0"),
        ("mine:f", "raise SystemExit(3)"),
        ("mine:f", "this is no Python"),
        ("mine:f", "\0"),
        ("mine:f", "def f():\n    raise KeyError(1)"),
    ],
)
def test_features_that_cannot_be_used_are_refused_as_one_error(module, tmp_path, spec, text):
    if text:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UsageError, match="^--features: [^\n]+$"):
        find_features(spec)


def test_inception_is_asked_for_its_2048_features(monkeypatch):
    class Stand(nn.Module):
        def __init__(self, name, features_list):
            super().__init__()
            assert (name, features_list) == ("inception-v3-compat", ["2048"])

        def forward(self, images):
            assert images.dtype == torch.uint8
            return means(images)

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Stand)
    assert find_features("inception").of(random_images(2)).shape == (2, 12)


def test_inception_without_a_network_says_what_still_works(monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", offline)
    with pytest.raises(ResourceError, match="--features none"):
        find_features("inception")
