"""`load_faces` and `Batches`: which images, which attributes, which order."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from made import NAMES, empty_folder, jpeg, make_celeba, make_folder, one_line  # noqa: F401

from dataset import sources, synthetic
from dataset.faces import Batches, Faces, load_faces, parse_attributes
from system.errors import DataError, UsageError
from utils import to_x_0

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "celeba"
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


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


def sources_of_attributes(tmp_path):
    """(path, attributes as the csv module reads them) of the made and of the real CelebA."""
    roots = [make_celeba(tmp_path / "data"), *[REAL] * REAL.is_dir()]
    for root in roots:
        lines = (root / "list_attr_celeba.txt").read_text().splitlines()
        rows = [r[1:] for r in csv.reader(lines[2:], delimiter=" ", skipinitialspace=True)]
        names = lines[1].split()
        yield root, {n: np.array([int(r[k]) for r in rows]) for k, n in enumerate(names)}


def test_only_keeps_exactly_the_faces_that_fit_with_attributes_in_the_order_asked_for(tmp_path):
    for root, truth in sources_of_attributes(tmp_path):
        everything = load_faces(root, 64)
        only, names = ["Smiling", "Male=-1"], ("Young", "Male")
        faces = load_faces(root, 64, only=only, attributes=names)
        expected = np.stack([truth["Young"], truth["Male"]], axis=1)
        np.testing.assert_array_equal(faces.attributes, expected)
        fits = np.flatnonzero((truth["Smiling"] == 1) & (truth["Male"] == -1))
        assert sorted([*faces.train, *faces.held_out]) == fits.tolist()
        assert set(faces.train) == set(fits) & set(everything.train)
        assert faces.key == everything.key and len(faces.images) == len(truth["Male"])
        text = f": the {len(fits):,} of {len(faces.images):,} with Smiling, not Male"
        assert faces.description.endswith(text)


def test_no_attributes_asked_for_gives_zero_columns(tmp_path):
    assert load_faces(make_celeba(tmp_path / "data"), 64).attributes.shape == (24, 0)


def test_description_says_how_many_of_what_size_from_where(tmp_path):
    faces = load_faces(make_celeba(tmp_path / "data"), 64)
    where = tmp_path / "data" / "img_align_celeba.zip"
    assert faces.description == f"8 faces (16 held out), 64x64, CelebA's crop, from {where}"


def test_without_a_list_every_20th_image_is_held_out_and_never_trained_on():
    faces = load_faces(make_folder(Path("mine"), 45), 8)
    assert faces.held_out.tolist() == [19, 39]
    assert sorted([*faces.train, *faces.held_out]) == list(range(45))
    batches = Batches(faces, 43)
    seen = {tuple(np.asarray(x).ravel()) for index in range(3) for x in batches(index)[0]}
    for image in faces.images[faces.held_out]:
        for pixels in (image, image[:, ::-1]):
            assert tuple(np.asarray(to_x_0(torch.tensor(pixels[None].copy()))).ravel()) not in seen


def test_the_synthetic_source_holds_the_faces_of_synthetic_py(monkeypatch):
    monkeypatch.setattr(sources, "NUM_SYNTHETIC", 70)
    names = synthetic.ATTRIBUTES
    for _ in range(2):  # rendered, then mapped
        faces = load_faces("synthetic", 16, attributes=names)
        pixels, has = zip(*(synthetic.render_face(i, 16) for i in range(70)), strict=True)
        np.testing.assert_array_equal(faces.images, pixels)
        np.testing.assert_array_equal(faces.attributes, has)
    kept = load_faces("synthetic", 16, only=[names[0]])
    assert (
        sorted([*kept.train, *kept.held_out]) == np.flatnonzero(np.array(has)[:, 0] == 1).tolist()
    )


def test_a_folder_of_the_name_of_a_built_in_source_is_pointed_to(monkeypatch):
    monkeypatch.setattr(sources, "NUM_SYNTHETIC", 20)
    assert load_faces("synthetic", 8).description.endswith("from synthetic")
    make_folder(Path("synthetic"), 3)
    faces = load_faces("synthetic", 8)
    assert len(faces.images) == 20 and "./synthetic" in faces.description
    assert len(load_faces("./synthetic", 8).images) == 3


def test_parse_attributes():
    parsed = parse_attributes(["Smiling", "Male=-1", "Young=0", "Bald=1"])
    assert parsed == {"Smiling": 1, "Male": -1, "Young": 0, "Bald": 1}


@pytest.mark.parametrize("spec", ["Male=2", "Male=", "=1", "", "Male=yes", "Male==1", "Male=+1"])
def test_parse_attributes_refuses_anything_else_and_names_the_flag(spec):
    with pytest.raises(UsageError, match="^--condition: .*name=value"):
        parse_attributes([spec], "--condition")


def test_an_attribute_with_two_values_is_refused():
    with pytest.raises(UsageError, match="^--only: Smiling is 1 and -1"):
        parse_attributes(["Smiling", "Male", "Smiling=-1"])
    assert parse_attributes(["Smiling", "Smiling=1"]) == {"Smiling": 1}


def test_an_attribute_named_twice_is_refused(tmp_path):
    root = make_celeba(tmp_path / "data")
    with pytest.raises(UsageError, match="^--attributes: names Male twice"):
        load_faces(root, 64, attributes=["Male", "Young", "Male"])


def test_unknown_attributes_are_refused_with_those_that_exist(tmp_path):
    root = make_celeba(tmp_path / "data")
    with pytest.raises(UsageError, match="^--only: .*Smilling.*Eyeglasses, Male, Smiling, Young"):
        load_faces(root, 64, only=["Smilling"])
    with pytest.raises(UsageError, match="^--attributes: .*Mail"):
        load_faces(root, 64, attributes=["Mail"])
    with pytest.raises(UsageError, match="^--attributes: .*Mail.*Eyeglasses"):
        load_faces("synthetic", 16, attributes=["Mail"])
    with pytest.raises(UsageError, match="^--only"):
        load_faces(root, 64, only=["Male=0"])
    assert not Path("prepared").exists()  # said before the minutes of preparing


def test_only_that_leaves_nothing_says_of_how_many(tmp_path):
    root = make_celeba(tmp_path / "data", count=3)  # none of 1, 2, 3 has the digit of Young
    with pytest.raises(DataError, match="--only: .*the 0 of 3 with Young"):
        load_faces(root, 64, only=["Young"])


def test_attributes_of_a_source_without_any_are_refused_with_what_would_work():
    with pytest.raises(DataError, match="no attributes. Fix: .*list_attr_celeba"):
        load_faces(make_folder(Path("mine"), 3), 8, attributes=["Male"])


def test_one_other_image_of_a_thousand_is_another_fingerprint():
    make_folder(Path("mine"), 1000, size=(8, 8))
    before = load_faces("mine", 8)
    Path("mine/501.jpg").write_bytes(jpeg(5000, (8, 8)))
    after = load_faces("mine", 8)
    assert before.fingerprint != after.fingerprint


def test_the_same_images_elsewhere_have_the_same_fingerprint(tmp_path):
    one = load_faces(make_celeba(tmp_path / "a", "folder"), 64, attributes=["Male"])
    two = load_faces(make_celeba(tmp_path / "b", "kaggle archive"), 64, attributes=["Male"])
    assert one.fingerprint == two.fingerprint and one.key != two.key
    other = load_faces(tmp_path / "a", 64, attributes=["Young"])
    assert other.fingerprint != one.fingerprint


@pytest.mark.parametrize("count", [11, 12, 13])  # of 6 batches: one face short, even, one over
def test_an_epoch_holds_each_face_at_most_once_and_whole_batches_only(count):
    batches = Batches(made_faces(count), 2, seed=3)
    per_epoch = count // 2
    for epoch in range(3):
        ours = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = [n for number in ours for n in numbers(batches(number)[0])]
        assert len(seen) == len(set(seen)) == per_epoch * 2
        assert set(seen) <= set(range(count))


def test_neighbouring_batches_are_disjoint_slices_of_one_order():
    faces = made_faces(24)
    whole, halves = Batches(faces, 12, seed=5), Batches(faces, 6, seed=5)
    for number in range(6):
        parts = [numbers(halves(2 * number + i)[0]) for i in (0, 1)]
        assert parts[0] + parts[1] == numbers(whole(number)[0])


def test_epochs_and_seeds_have_orders_of_their_own():
    faces = made_faces(100)
    one, other = Batches(faces, 100, seed=0), Batches(faces, 100, seed=1)
    orders = [numbers(one(0)[0]), numbers(one(1)[0]), numbers(other(0)[0])]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(100)) for order in orders)


def test_a_batch_depends_on_its_index_alone_so_a_restart_in_mid_epoch_changes_nothing():
    faces = made_faces(30, columns=3)
    through = Batches(faces, 4, seed=7)
    first = [through(index) for index in range(20)]
    for index in (13, 4, 19, 0, 8):  # each as if after a restart, then out of order
        for batches in (Batches(faces, 4, seed=7), through):
            x_0, attributes = batches(index)
            assert torch.equal(x_0, first[index][0]) and torch.equal(attributes, first[index][1])


def test_x_0_is_a_float_batch_that_spans_minus_one_to_one():
    x_0, attributes = Batches(made_faces(20), 20)(0)
    assert x_0.shape == (20, 3, 8, 8) and x_0.dtype == torch.float32 and x_0.is_contiguous()
    assert x_0.min() == -1 and x_0.max() == 1 and attributes is None
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    expected = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1)
    np.testing.assert_array_equal(to_x_0(every)[0, 1].ravel(), expected)


def test_half_of_the_faces_are_mirrored_and_the_rest_untouched():
    faces = made_faces(200)
    x_0, _ = Batches(faces, 200)(0)
    plain = to_x_0(torch.tensor(faces.images[numbers(x_0)]))
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(x_0, plain, strict=True)]
    untouched = [torch.equal(a, b) for a, b in zip(x_0, plain, strict=True)]
    assert all(m != u for m, u in zip(mirrored, untouched, strict=True))
    assert 70 < sum(mirrored) < 130


def test_mirroring_differs_between_batches():
    batches = Batches(made_faces(64), 32)
    signs = [tuple((x[0, 1, 0] > x[0, 1, -1]).item() for x in batches(i)[0]) for i in range(4)]
    assert len(set(signs)) == 4


def test_attributes_belong_to_the_faces_of_the_batch():
    faces = made_faces(32, columns=5)
    x_0, attributes = Batches(faces, 16, seed=2)(1)
    assert attributes.shape == (16, 5) and attributes.dtype == torch.float32
    np.testing.assert_array_equal(attributes, faces.attributes[numbers(x_0)])


def test_batches_come_from_the_training_faces_only():
    faces = made_faces(32, columns=5)
    faces = Faces(faces.images, faces.attributes, np.arange(3, 32, 4), np.arange(3), "made", "made")
    batches = Batches(faces, 4)
    for index in range(6):
        x_0, attributes = batches(index)
        assert {n % 4 for n in numbers(x_0)} == {3}
        np.testing.assert_array_equal(attributes, faces.attributes[numbers(x_0)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("free", [1 << 40, 0])
def test_faces_on_the_device_and_faces_read_ahead_give_the_same_batches(device, free, monkeypatch):
    faces = made_faces(50, columns=2)
    expected = Batches(faces, 7, seed=1, device=device)
    expected.resident, expected.cuda = None, False  # the plain way: read when asked
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    if device == "cpu":  # take the two ways of a CUDA device without one
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    batches = Batches(faces, 7, seed=1, device=device, stride=2)
    batches.cuda, batches.resident = True, batches._move_to_device()
    assert (batches.resident is None) == (free == 0)
    for index in (0, 2, 4, 3, 15, 17, 2, 9):
        for got, wanted in zip(batches(index), expected(index), strict=True):
            assert torch.equal(got, wanted)


def test_fewer_faces_than_a_batch_name_the_flag():
    faces = load_faces(make_folder(Path("mine"), 7), 8)
    Batches(faces, 7)
    with pytest.raises(DataError) as error:
        Batches(faces, 8)
    assert one_line(error).startswith("--batch_size: ") and "7 faces" in one_line(error)


def test_without_horizontal_flip_no_image_is_mirrored_and_the_log_says_so():
    faces = made_faces(200)
    batches = Batches(faces, 200, horizontal_flip=False)
    x_0, _ = batches(0)
    assert torch.equal(x_0, to_x_0(torch.tensor(faces.images[numbers(x_0)])))
    assert batches.description == "made, none mirrored"
    assert Batches(faces, 200).description == "made, half of them mirrored"


def test_attributes_are_named_in_any_case_of_letters(tmp_path):
    root = make_celeba(tmp_path / "data")
    faces = load_faces(root, 64, only=["mALE=-1"], attributes=["young", "SMILING"])
    expected = load_faces(root, 64, only=["Male=-1"], attributes=["Young", "Smiling"])
    assert faces.attribute_names == expected.attribute_names == ("Young", "Smiling")
    assert faces.fingerprint == expected.fingerprint
    with pytest.raises(UsageError, match="^--attributes: names Male twice"):
        load_faces(root, 64, attributes=["Male", "male"])


def test_all_attributes_are_taken_at_once(tmp_path):
    faces = load_faces(make_celeba(tmp_path / "data"), 64, attributes=("all",))
    assert faces.attribute_names == NAMES and faces.attributes.shape == (24, 4)
    with pytest.raises(DataError, match="has no attributes"):
        load_faces(make_folder(Path("mine"), 3), 8, attributes=("all",))
