"""`load_faces` and `Batches`: which images, which attributes, which order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made import NAMES, empty_folder, made_attributes, make_celeba, make_folder  # noqa: F401

from dataset import sources, synthetic
from dataset.faces import Batches, Faces, load_faces, parse_attributes
from system.errors import DataError, UsageError
from utils import to_x_0


def made_faces(count, columns=0, size=8):
    """Faces whose first pixel tells their number and whose columns differ from left to right."""
    images = np.zeros((count, size, size, 3), np.uint8)
    images[...] = np.arange(size)[:, None] * 255 // (size - 1)
    images[:, 0, :, :] = np.arange(count)[:, None, None]
    attributes = np.where(np.arange(count)[:, None] >> np.arange(columns) & 1, 1.0, -1.0)
    everything = np.arange(count)
    return Faces(images, attributes.astype(np.float32), everything, everything[:0], "made", "made")


def numbers(x_0):
    """Which of `made_faces` a batch holds."""
    return ((x_0[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


# What is loaded ----------------------------------------------------------------------------------


def test_only_keeps_exactly_the_faces_that_fit_with_attributes_in_the_order_asked_for(tmp_path):
    root, truth = make_celeba(tmp_path / "data"), made_attributes(24)
    everything = load_faces(root, 64)
    text = f"8 faces (16 held out), 64x64, CelebA's crop, from {root / 'img_align_celeba.zip'}"
    assert everything.description == text
    faces = load_faces(root, 64, only=["Smiling", "mALE=-1"], attributes=["young", "MALE"])
    assert everything.attributes.shape == (24, 0) and faces.attribute_names == ("Young", "Male")
    np.testing.assert_array_equal(faces.attributes, truth[:, [3, 1]])
    fits = np.flatnonzero((truth[:, 2] == 1) & (truth[:, 1] == -1))
    assert sorted([*faces.train, *faces.held_out]) == fits.tolist()
    assert set(faces.train) == set(fits) & set(everything.train)
    assert faces.key == everything.key and len(faces.images) == 24
    assert faces.description.endswith(f".zip: the {len(fits)} of 24 with Smiling, not Male")
    assert load_faces(root, 64, attributes=("all",)).attribute_names == NAMES


def test_without_a_list_every_20th_image_is_held_out():
    faces = load_faces(make_folder(Path("mine"), 45), 8)
    assert faces.held_out.tolist() == [19, 39]
    assert sorted([*faces.train, *faces.held_out]) == list(range(45))


def test_the_synthetic_source_holds_the_faces_of_synthetic_py(monkeypatch):
    monkeypatch.setattr(sources, "NUM_SYNTHETIC", 70)
    pixels, has = zip(*(synthetic.render_face(i, 16) for i in range(70)), strict=True)
    for _ in range(2):  # rendered, then mapped
        faces = load_faces("synthetic", 16, attributes=synthetic.ATTRIBUTES)
        np.testing.assert_array_equal(faces.images, pixels)
        np.testing.assert_array_equal(faces.attributes, has)


def test_a_folder_of_the_name_of_a_built_in_source_is_pointed_to(monkeypatch):
    monkeypatch.setattr(sources, "NUM_SYNTHETIC", 20)
    assert load_faces("synthetic", 8).description.endswith("from synthetic")
    make_folder(Path("synthetic"), 3)
    faces = load_faces("synthetic", 8)
    assert len(faces.images) == 20 and "./synthetic" in faces.description
    assert len(load_faces("./synthetic", 8).images) == 3


def test_the_same_images_elsewhere_have_the_same_fingerprint(tmp_path):
    one = load_faces(make_celeba(tmp_path / "a", "folder"), 64, attributes=["Male"])
    two = load_faces(make_celeba(tmp_path / "b", "kaggle archive"), 64, attributes=["Male"])
    assert one.fingerprint == two.fingerprint and one.key != two.key
    other = load_faces(tmp_path / "a", 64, attributes=["Young"])
    assert other.fingerprint != one.fingerprint


# Mistakes ----------------------------------------------------------------------------------------


def test_an_attribute_has_one_of_three_values():
    parsed = parse_attributes(["Smiling", "Male=-1", "Young=0", "Bald=1", "Bald"])
    assert parsed == {"Smiling": 1, "Male": -1, "Young": 0, "Bald": 1}
    for spec in ("Male=2", "Male=", "=1", "", "Male=yes", "Male==1", "Male=+1"):
        with pytest.raises(UsageError, match="^--condition: .*name=value"):
            parse_attributes([spec], "--condition")
    with pytest.raises(UsageError, match="^--only: Smiling is 1 and -1"):
        parse_attributes(["Smiling", "Male", "Smiling=-1"])


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(only=["Smilling"]), "^--only: .*Smilling.*Eyeglasses, Male, Smiling, Young"),
        (dict(only=["Male=0"]), "^--only"),
        (dict(attributes=["Mail"]), "^--attributes: .*Mail"),
        (dict(attributes=["Male", "male"]), "^--attributes: names Male twice"),
    ],
)
def test_attributes_that_cannot_be_are_refused_before_the_minutes_of_preparing(options, said):
    root = make_celeba(Path("data").absolute())
    with pytest.raises(UsageError, match=said):
        load_faces(root, 16, **options)
    assert not Path("prepared").exists()


def test_only_that_leaves_nothing_says_of_how_many(tmp_path):
    root = make_celeba(tmp_path / "data", count=3)  # none of 1, 2, 3 has the digit of Young
    with pytest.raises(DataError, match="--only: .*the 0 of 3 with Young"):
        load_faces(root, 64, only=["Young"])


@pytest.mark.parametrize("name", ["Male", "all"])
def test_attributes_of_a_source_without_any_are_refused_with_what_would_work(name):
    with pytest.raises(DataError, match="no attributes. Fix: .*list_attr_celeba"):
        load_faces(make_folder(Path("mine"), 3), 8, attributes=(name,))


# The batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [11, 12, 13])  # of 6 batches: one face short, even, one over
def test_an_epoch_holds_each_face_at_most_once_in_an_order_of_its_own(count):
    per_epoch, orders = count // 2, set()
    for seed, epoch in ((3, 0), (3, 1), (4, 0), (4, 1)):
        batches = Batches(made_faces(count), 2, seed)
        ours = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = [n for number in ours for n in numbers(batches(number)[0])]
        assert len(set(seen)) == per_epoch * 2 and set(seen) <= set(range(count))
        orders.add(tuple(seen))
    assert len(orders) == 4


def test_a_batch_depends_on_its_index_alone_so_a_restart_in_mid_epoch_changes_nothing():
    faces = made_faces(30, columns=3)
    through = Batches(faces, 4, seed=7)
    first = [through(index) for index in range(20)]
    for index in (13, 4, 19, 0, 8):  # each as if after a restart, then out of order
        for batches in (Batches(faces, 4, seed=7), through):
            x_0, attributes = batches(index)
            assert torch.equal(x_0, first[index][0]) and torch.equal(attributes, first[index][1])


def test_a_batch_is_of_training_faces_in_minus_one_to_one_with_their_attributes():
    faces = made_faces(32, columns=5)
    faces = Faces(faces.images, faces.attributes, np.arange(3, 32, 4), np.arange(3), "made", "made")
    batches = Batches(faces, 4)
    for index in range(6):
        x_0, attributes = batches(index)
        assert x_0.shape == (4, 3, 8, 8) and x_0.dtype == torch.float32 and x_0.is_contiguous()
        assert x_0.min() == -1 and x_0.max() == 1
        assert {n % 4 for n in numbers(x_0)} == {3}
        assert attributes.dtype == torch.float32
        np.testing.assert_array_equal(attributes, faces.attributes[numbers(x_0)])
    assert Batches(made_faces(4), 4)(0)[1] is None


def test_half_of_the_faces_are_mirrored_others_in_each_batch_and_none_if_so_asked():
    faces, seen = made_faces(200), []
    for index, flip in ((0, True), (1, True), (0, False)):
        batches = Batches(faces, 100, horizontal_flip=flip)
        x_0, _ = batches(index)
        plain = to_x_0(torch.tensor(faces.images[numbers(x_0)]))
        mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(x_0, plain, strict=True)]
        untouched = [torch.equal(a, b) for a, b in zip(x_0, plain, strict=True)]
        assert all(m != u for m, u in zip(mirrored, untouched, strict=True))
        assert 30 < sum(mirrored) < 70 if flip else not any(mirrored)
        seen.append(mirrored)
        words = "half of them mirrored" if flip else "none mirrored"
        assert batches.description == f"made, {words}"
    assert seen[0] != seen[1]


@pytest.mark.parametrize("free", [1 << 40, 0])
def test_faces_on_the_device_and_faces_read_ahead_give_the_same_batches(free, monkeypatch):
    faces = made_faces(50, columns=2)
    expected = Batches(faces, 7, seed=1)
    batches = Batches(faces, 7, seed=1, stride=2)
    # The two ways of a CUDA device, without one.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    batches.cuda, batches.resident = True, batches._move_to_device()
    assert (batches.resident is None) == (free == 0)
    for index in (0, 2, 4, 3, 15, 17, 2, 9):
        for got, wanted in zip(batches(index), expected(index), strict=True):
            assert torch.equal(got, wanted)
