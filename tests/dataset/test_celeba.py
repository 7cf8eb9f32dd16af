"""CelebA: its layouts, its lists, its download."""

import errno
import inspect
import io
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import refuse
from made import (  # noqa: F401
    HTML,
    NAMES,
    die_in_a_fork,
    empty_folder,
    jpeg,
    killed,
    made_attributes,
    make_celeba,
    make_folder,
    refused,
)
from PIL import Image

from dataset.faces import load_faces
from system.errors import ResourceError

LAYOUTS = ("zip", "folder", "torchvision", "kaggle archive", "kaggle folder", "one archive")


def leave(count, root):
    """Remove all but the first images below a folder."""
    for path in sorted(root.rglob("*.jpg"))[count:]:
        path.unlink()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_celeba_gives_the_same_faces_attributes_and_partition(layout, tmp_path):
    faces = load_faces(make_celeba(tmp_path / "data", layout), 64, attributes=NAMES)
    expected = [np.asarray(Image.open(io.BytesIO(jpeg(n))))[28:92, 12:76] for n in range(1, 25)]
    np.testing.assert_array_equal(faces.images, expected)
    np.testing.assert_array_equal(faces.attributes, made_attributes(24))
    assert faces.train.tolist() == list(range(8)) and faces.held_out.tolist() == list(range(8, 24))
    assert faces.images.dtype == np.uint8 and faces.attributes.dtype == np.float32
    assert faces.train.dtype == faces.held_out.dtype == np.int64


# The lists ---------------------------------------------------------------------------------------


def test_partial_celeba_is_trained_on_once_the_list_is_cut_or_removed(tmp_path):
    root = make_celeba(tmp_path / "data", "folder")
    leave(5, root)
    text = refused(root)
    assert "list_attr_celeba" in text and "only 5 of the 24 images" in text
    lines = (root / "list_attr_celeba.txt").read_text().splitlines()
    (root / "list_attr_celeba.txt").write_text("\n".join(lines[: 2 + 5]))
    assert load_faces(root, 64, attributes=["Male"]).attributes.shape == (5, 1)
    (root / "list_attr_celeba.txt").unlink()
    assert load_faces(root, 64).images.shape[0] == 5


def test_an_image_without_a_row_is_named_when_attributes_are_asked_for(tmp_path):
    root = make_celeba(tmp_path / "data", "folder")
    (root / "img_align_celeba" / "000099.jpg").write_bytes(jpeg(99))
    (root / "list_eval_partition.txt").unlink()
    assert "no row for image '000099'" in refused(root, attributes=["Male"])
    assert load_faces(root, 64).images.shape[0] == 25


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-3],
        lambda text: "",
        lambda text: HTML.decode(),
        lambda text: "\udcff\udcfe\0" * 9,  # bytes of no text
        lambda text: text.replace("000007.jpg ", "000007.jpg x"),
        # A row too short before one too long is no shift.
        lambda text: text.replace(" -1\n000004.jpg", "\n000004.jpg  1"),
        # Values other than 1 and -1, of which some would wrap around to 1.
        lambda text: text.replace("-1", " 3", 1),
        lambda text: text.replace("g  1", "g  257"),
        lambda text: text.replace("g  1", "g  4294967297"),
        lambda text: text.replace("g  1", "g  1.0"),
        lambda text: text.replace("g  1", "g  nan"),
    ],
)
def test_a_damaged_list_names_the_list(damage, tmp_path):
    root = make_celeba(tmp_path / "data")
    path = root / "list_attr_celeba.txt"
    text = path.read_text()
    path.write_bytes(damage(text).encode(errors="surrogateescape"))
    assert damage(text) != text and f"{path}: " in refused(root, attributes=NAMES)


def test_two_images_of_one_name_are_not_given_one_row():
    make_folder(Path("mine/a"), 2)
    make_folder(Path("mine/b"), 2)
    Path("mine/list_attr_celeba.txt").write_text("2\nMale\n000.jpg 1\n001.jpg -1\n")
    assert "several images named 000" in refused("mine", attributes=["Male"])


@pytest.mark.parametrize("names", [("a.0", "a.1"), ("a 0", "a 1"), ("e", "\u00e9")])
def test_names_with_dots_spaces_and_accents_have_their_rows(names):
    Path("mine").mkdir()
    for number, name in enumerate(names):
        Path(f"mine/{name}.jpg").write_bytes(jpeg(number))
    rows = f"{names[0]}.jpg,1\n{names[1]}.jpg,-1\n"
    Path("mine/list_attr_celeba.csv").write_text("image_id,Male\n" + rows, encoding="utf-8")
    assert load_faces("mine", 8, attributes=["Male"]).attributes.ravel().tolist() == [1, -1]


# The download ------------------------------------------------------------------------------------


def kaggle(monkeypatch, download):
    stub = types.SimpleNamespace(dataset_download=download)
    monkeypatch.setitem(sys.modules, "kagglehub", stub)


def make_kaggle(handle, output_dir):
    assert handle == "jessicali9530/celeba-dataset"
    make_celeba(Path(output_dir), "kaggle folder")
    (Path(output_dir) / ".complete").mkdir()
    return output_dir


def assert_is_celeba(path):
    faces = load_faces(path, 64, attributes=["Male"])
    assert len(faces.images) == 24 and len(faces.train) == 8
    assert not (Path(path) / ".download").exists()


@pytest.mark.parametrize("path", ["data", "./data", "data/", "absolute"])
def test_the_default_folder_absent_or_empty_gets_celeba_from_kaggle(path, monkeypatch):
    kaggle(monkeypatch, make_kaggle)
    if path != "data":
        Path("data/cifar10").mkdir(parents=True)  # a data set that is known by name
        Path("data/.DS_Store").touch()
    path = Path("data").absolute() if path == "absolute" else path
    assert_is_celeba(path)
    kaggle(monkeypatch, lambda *_, **__: pytest.fail("downloaded twice"))
    assert_is_celeba(path)


@pytest.mark.parametrize("path", ["data/archive.zip", "dta", "data/below", "mine"])
def test_another_path_is_no_download(path, monkeypatch):
    kaggle(monkeypatch, lambda *_, **__: pytest.fail("downloaded"))
    text = refused(path)
    assert f"{path}: is not there" in text and "synthetic" in text
    assert not Path(path).exists()
    Path("mine").mkdir()
    assert "mine: holds no images" in refused("mine")


def test_kagglehub_takes_the_folder_asked_for():
    import kagglehub

    assert "output_dir" in inspect.signature(kagglehub.dataset_download).parameters


def test_a_folder_that_kaggles_machines_hold_already_is_used_where_it_is(monkeypatch, tmp_path):
    root = make_celeba(tmp_path / "input", "kaggle folder")
    kaggle(monkeypatch, lambda *_, **__: str(root))
    assert_is_celeba("data")
    assert str(root) in load_faces("data", 64).description


def test_a_download_that_fails_is_partial_or_interrupted_leaves_nothing(monkeypatch):
    def forbid(handle, output_dir):
        raise RuntimeError("403 Client Error\nnot\ttoday")

    def half(handle, output_dir):
        leave(10, Path(make_kaggle(handle, output_dir)))
        return output_dir

    def interrupt(handle, output_dir):
        make_kaggle(handle, output_dir)
        raise KeyboardInterrupt

    for download, reason in ((forbid, "403 Client Error not today"), (half, "only 10 of the")):
        kaggle(monkeypatch, download)
        text = refused("data")
        assert reason in text and "--demo" in text and "kaggle.com/datasets/jessi" in text
        assert list(Path("data").iterdir()) == []
    kaggle(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_faces("data", 64)
    assert list(Path("data").iterdir()) == []


def test_a_killed_download_is_not_taken_for_the_data(monkeypatch):
    def kaggle_then_die(handle, output_dir):
        make_kaggle(handle, output_dir)
        killed()

    kaggle(monkeypatch, kaggle_then_die)
    die_in_a_fork(lambda: load_faces("data", 64))
    assert any(Path("data/.download").iterdir())  # it was under way
    kaggle(monkeypatch, make_kaggle)
    assert_is_celeba("data")


def test_no_room_for_the_download_says_so_and_asks_no_further(monkeypatch):
    kaggle(monkeypatch, refuse(errno.ENOSPC))
    text = refused("data", ResourceError)
    assert "data: " in text and "bytes (No space left on device)" in text


# The crop, and CelebAMask-HQ ---------------------------------------------------------------------


def test_the_crop_does_not_depend_on_which_file_comes_first(tmp_path):
    root = make_celeba(tmp_path / "data", "folder")
    (root / "Img").mkdir()
    (root / "img_align_celeba").rename(root / "Img/img_align_celeba")
    (root / "list_attr_celeba.txt").unlink()
    expected = np.asarray(Image.open(io.BytesIO(jpeg(1))))[28:92, 12:76]
    split = root / "list_eval_partition.txt"
    for folder in ("Eval", "zzz"):
        (root / folder).mkdir()
        split = split.rename(root / folder / split.name)
        faces = load_faces(root, 64)
        np.testing.assert_array_equal(faces.images[0], expected)
        assert faces.crop == "aligned" and ", CelebA's crop, from " in faces.description
    split.unlink()
    (root / "000.jpg").write_bytes(jpeg(1))  # not all are CelebA's now
    assert load_faces(root, 64).crop == "square"


def test_masks_of_celebamask_hq_are_no_faces_and_its_list_is_read():
    make_folder(Path("CelebAMask-HQ/CelebA-HQ-img"), 3, (64, 64))
    masks = Path("CelebAMask-HQ/CelebAMask-HQ-mask-anno/0")
    masks.mkdir(parents=True)
    for part in ("hair", "skin"):
        Image.new("L", (16, 16)).save(masks / f"00000_{part}.png")
    rows = "000.jpg  1 -1\n001.jpg -1  1\n002.jpg  1  1\n"
    path = Path("CelebAMask-HQ/CelebAMask-HQ-attribute-anno.txt")
    path.write_text("3\nMale Young\n" + rows)
    faces = load_faces("CelebAMask-HQ", 8, attributes=["Young"])
    assert faces.attributes.ravel().tolist() == [-1, 1, 1] and faces.crop == "square"
    assert faces.description.endswith("left out: 2 .png")
