"""Distances between sets of images, against closed forms; and features from anywhere."""

import sys
import urllib.error

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from metrics import (
    Features,
    copies,
    find_features,
    frechet_distance,
    kernel_distance,
    nearest,
    nearest_pixels,
    nearest_vectors,
)
from system.errors import ResourceError, UsageError


def vectors(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(6, 6))
    return (random.normal(shift, 1, (count, 6)) @ mix).astype(np.float32)


def random_images(count: int, seed: int = 0, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def means(images: torch.Tensor) -> torch.Tensor:
    """Features of the tests: the colours' means in the four corners."""
    half = images.shape[-1] // 2
    parts = images.float().unfold(2, half, half).unfold(3, half, half).mean((4, 5))
    return parts.flatten(1)


# Distances ---------------------------------------------------------------------------------------


def published_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The published formula in float64, the root of the product by eigenvalues of a symmetric
    matrix with the same trace."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, axes = np.linalg.eigh(cov_a)
    root = (axes * np.sqrt(values)) @ axes.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root)).sum()
    difference = a.mean(0) - b.mean(0)
    return difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * trace


@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_frechet_distance_equals_the_published_formula(shift):
    a, b = vectors(200, 0), vectors(300, 1, shift)
    assert frechet_distance(a, b) == pytest.approx(published_frechet(a, b), rel=1e-9)


def test_frechet_distance_of_a_set_with_itself_is_0():
    a = vectors(200, 0)
    assert abs(frechet_distance(a, a)) < 1e-6


def test_vectors_mapped_from_the_disk_are_measured_without_a_warning(recwarn):
    a, b = vectors(200, 0), vectors(300, 1)
    measured = frechet_distance(a, b)
    a.flags.writeable = b.flags.writeable = False  # as a mapped file's are
    torch.set_warn_always(True)  # else once in a process
    try:
        assert frechet_distance(a, b) == measured
    finally:
        torch.set_warn_always(False)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def closed_kernel(a: np.ndarray, b: np.ndarray) -> float:
    """Binkowski et al. 2018: k(x, y) = (x y / d + 1)^3, without the pairs of one with itself."""
    a, b = a.astype(np.float64), b.astype(np.float64)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * kernel(a, b).mean()


def test_kernel_distance_equals_its_closed_form():
    a, b = vectors(100, 0), vectors(100, 1, 0.3)
    mean, deviation = kernel_distance(a, b)  # each subset is the whole
    assert mean == pytest.approx(closed_kernel(a, b), rel=1e-9) and deviation < 1e-9 * abs(mean)


def test_kernel_distance_is_the_same_twice_and_leaves_the_random_state_alone():
    a, b = vectors(60, 0), vectors(50, 1)
    torch.manual_seed(5)
    first = kernel_distance(a, b, subset_size=20)
    following = torch.rand(())
    torch.manual_seed(6)
    assert kernel_distance(a, b, subset_size=20) == first and first[1] > 0
    torch.manual_seed(5)
    assert torch.rand(()) == following


# Nearest -----------------------------------------------------------------------------------------


def test_planted_image_is_found_at_distance_0():
    reference, queries = random_images(5000), random_images(6, seed=1)
    indices = np.arange(1, 5000)
    queries[2], queries[4] = reference[4500], reference[17][:, ::-1]  # one of them mirrored
    places, distances = nearest_pixels(queries, reference, indices)
    assert indices[places[2, 0]] == 4500 and indices[places[4, 0]] == 17
    assert distances[2, 0] == distances[4, 0] == 0 and (distances[[0, 1, 3, 5]] > 1).all()
    assert copies(distances)["copies"] == pytest.approx(2 / 6)


def test_nearest_equals_a_search_of_all_pairs():
    queries, reference = vectors(7, 0), vectors(300, 1)
    mirrored = vectors(7, 2)
    blocks = torch.from_numpy(reference).split([100, 1, 199])
    both = [torch.from_numpy(each).split(3) for each in (queries, mirrored)]
    found, distances = nearest(zip(*both, strict=True), lambda: blocks)
    pairs = [
        np.linalg.norm(q[:, None].astype(float) - reference, axis=2) for q in (queries, mirrored)
    ]
    expected = np.minimum(*pairs)
    assert (found == expected.argsort(axis=1)[:, :2]).all()
    assert distances == pytest.approx(np.sort(expected, axis=1)[:, :2], rel=1e-6)


def test_nearest_by_features_finds_a_mirrored_image():
    reference, queries = random_images(40), random_images(3, seed=1)
    queries[1] = reference[30][:, ::-1]
    features = Features("means", means)
    both = features.of(queries), features.of(queries[:, :, ::-1])
    found, distances = nearest_vectors(*both, features.of(reference))
    assert found[1, 0] == 30 and distances[1, 0] == 0 and distances[0, 0] > 0


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else [result]
        sizes = [t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)]
        self.nbytes = max([self.nbytes, *sizes])
        return result


def test_memory_of_a_search_does_not_grow_with_the_queries():
    reference, sizes = random_images(500), []
    for count in (600, 2400):
        with LargestTensor() as largest:
            nearest_pixels(random_images(count, seed=1), reference, np.arange(500))
        sizes.append(largest.nbytes)
    assert sizes[0] == sizes[1] > 0


def test_share_of_copies_counts_those_far_nearer_than_the_second():
    distances = np.array([[1.0, 4.0], [1.0, 2.0], [0.0, 0.0], [3.0, 9.1]])
    said = copies(distances)
    assert said["copies"] == 0.75 and said["median_distance"] == 1.0


# Features ----------------------------------------------------------------------------------------


def test_features_are_of_the_images_in_order():
    images = random_images(300)
    picks = np.array([5, 299, 0])
    expected = means(torch.from_numpy(images[picks]).permute(0, 3, 1, 2)).numpy()
    assert (Features("means", means).of(images, picks) == expected).all()
    assert Features("means", means).of(images).shape == (300, 12)


def test_images_are_resized_to_the_features_size():
    seen = []

    def spy(batch):
        seen.append(batch)
        return means(batch)

    Features("spy", spy, size=4).of(random_images(2))
    Features("spy", spy, size=8).of(random_images(2))
    assert seen[0].shape == (2, 3, 4, 4) and seen[0].dtype == torch.uint8
    assert (seen[1].permute(0, 2, 3, 1).numpy() == random_images(2)).all()


@pytest.mark.parametrize(
    "function,said",
    [
        (lambda x: x.float(), "gives (2, 3, 8, 8)"),
        (lambda x: means(x)[:1], "gives (1, 12)"),
        (lambda x: [1.0], "gives list"),
        (lambda x: means(x) / 0, "not finite"),
        (lambda x: means(x).double() * 1e300, "not finite in float32"),
        (lambda x: x @ torch.zeros(3), "fails on uint8 (2, 3, 8, 8)"),
        (lambda x: sys.exit("enough"), "fails on uint8 (2, 3, 8, 8): SystemExit enough"),
        (lambda x: means(x)[:, :0], "gives (2, 0)"),
        (lambda x: means(x) * 1j, "of torch.complex64"),
    ],
)
def test_wrong_features_are_refused_in_one_line(function, said):
    with pytest.raises(UsageError, match="--features: mine") as error:
        Features("mine", function).of(random_images(2))
    assert said in str(error.value)


def test_vectors_with_a_gradient_are_taken_without_it():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    features = Features("own", lambda x: means(x).requires_grad_())
    assert features.of(images).shape == (2, 12)


def test_features_that_change_their_length_are_refused():
    sizes = iter([12, 5])
    with pytest.raises(UsageError, match="12 numbers, then of 5"):
        Features("mine", lambda x: torch.zeros(len(x), next(sizes))).of(random_images(200))


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
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    features = Features("mean", lambda batch: batch.float().mean((2, 3)))
    vectors = features.cached(images, np.arange(9), "made_4")
    np.testing.assert_array_equal(vectors, features.of(images))
    assert "the features are not kept" in capfd.readouterr().err


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


@pytest.mark.parametrize("spec", ["mine", "mine:absent", "absent:load", ":load", "mine:number"])
def test_features_that_are_not_there_are_refused_in_one_line(module, spec):
    with pytest.raises(UsageError, match="--features"):
        find_features(spec)


@pytest.mark.parametrize(
    "text",
    ["1 / 0", "raise SystemExit(3)", "this is no Python", "\0", "def f():\n    raise KeyError(1)"],
)
def test_modules_that_cannot_be_used_are_refused_in_one_line(module, tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UsageError, match="^--features: mine:f: [^\n]+$"):
        find_features("mine:f")


def test_none_means_no_features():
    assert find_features("none") is None


def test_inception_without_a_network_says_what_still_works(monkeypatch):
    import torchmetrics.image.fid as fid

    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(fid, "NoTrainInceptionV3", offline)
    with pytest.raises(ResourceError, match="--features none"):
        find_features("inception")


def test_inception_is_asked_for_its_2048_features(monkeypatch):
    import torchmetrics.image.fid as fid

    class Stand(nn.Module):
        def __init__(self, name, features_list):
            super().__init__()
            assert (name, features_list) == ("inception-v3-compat", ["2048"])

        def forward(self, images):
            assert images.dtype == torch.uint8
            return means(images)

    monkeypatch.setattr(fid, "NoTrainInceptionV3", Stand)
    assert find_features("inception").of(random_images(2)).shape == (2, 12)
