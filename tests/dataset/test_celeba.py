"""CelebA: its layouts, its lists, its download."""

import errno
import inspect
import io
import os
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_celeba_gives_the_same_faces_attributes_and_partition(layout, tmp_path):
    faces = load_faces(make_celeba(tmp_path / "data", layout), 64, attributes=NAMES)
    expected = [np.asarray(Image.open(io.BytesIO(jpeg(n))))[28:92, 12:76] for n in range(1, 25)]
    np.testing.assert_array_equal(faces.images, expected)
    np.testing.assert_array_equal(faces.attributes, made_attributes(24))
    assert faces.train.tolist() == list(range(8)) and faces.held_out.tolist() == list(range(8, 24))
    assert faces.images.dtype == np.uint8 and faces.attributes.dtype == np.float32
    assert faces.train.dtype == faces.held_out.dtype == np.int64


def test_celeba_without_a_partition_holds_out_every_20th(tmp_path):
    root = make_celeba(tmp_path / "data")
    (root / "list_eval_partition.txt").unlink()
    assert load_faces(root, 64).held_out.tolist() == [19]


@pytest.mark.parametrize("layout", ["folder", "kaggle folder", "kaggle archive", "zip"])
def test_partial_celeba_says_how_many_of_how_many(layout, tmp_path):
    root = make_celeba(tmp_path / "data", layout)
    if "folder" in layout:
        for path in sorted(root.rglob("*.jpg"))[5:]:
            path.unlink()
    else:
        archive = next(root.glob("*.zip"))
        with zipfile.ZipFile(archive) as old, zipfile.ZipFile(root / "new", "w") as new:
            images = sorted(name for name in old.namelist() if name.endswith(".jpg"))
            for name in old.namelist():
                if name not in images[5:]:
                    new.writestr(name, old.read(name))
        (root / "new").replace(archive)
    text = refused(root)
    assert "list_attr_celeba" in text and "only 5 of the 24 images" in text


def test_partial_celeba_is_trained_on_once_the_list_is_cut_or_removed(tmp_path):
    root = make_celeba(tmp_path / "data", "folder")
    for path in sorted(root.rglob("*.jpg"))[5:]:
        path.unlink()
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


@pytest.mark.parametrize("damage", ["cut", "word", "other", "empty", "page", "binary"])
def test_a_damaged_list_names_the_list(damage, tmp_path):
    root = make_celeba(tmp_path / "data")
    path = root / "list_attr_celeba.txt"
    text = path.read_text()
    new = {
        "cut": text[:-3],
        "word": text.replace("000007.jpg ", "000007.jpg x"),
        "other": text.replace("-1", " 3", 1),
        "empty": "",
        "page": HTML.decode(),
        "binary": None,
    }[damage]
    path.write_bytes(b"\xff\xfe\x00\x81" * 9 if new is None else new.encode())
    assert f"{path}: " in refused(root, attributes=["Male"])


def test_a_list_in_a_damaged_archive_is_named(tmp_path):
    path = make_celeba(tmp_path / "data", "kaggle archive") / "archive.zip"
    data = path.read_bytes()
    where = data.index(b"image_id,")
    path.write_bytes(data[:where] + b"X" + data[where + 1 :])
    assert f"{path}/list_attr_celeba.csv: " in refused(path)


def change_list(tmp_path, change):
    """A made CelebA whose list of attributes is changed."""
    root = make_celeba(tmp_path / "data", "folder")
    path = root / "list_attr_celeba.txt"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    return root


@pytest.mark.parametrize("value", ["257", "255", "65537", "4294967297", "1.0", "nan"])
def test_a_value_that_would_wrap_around_to_1_is_refused(value, tmp_path):
    root = change_list(tmp_path, lambda lines: [*lines[:4], lines[4].replace(" 1", f" {value}")])
    for path in sorted(root.rglob("*.jpg"))[3:]:
        path.unlink()
    assert "list_attr_celeba.txt: " in refused(root, attributes=["Male", "Eyeglasses", "Smiling"])


def test_a_row_too_short_before_one_too_long_is_damage_not_a_shift(tmp_path):
    def shift(lines):
        return [*lines[:4], lines[4].rsplit(None, 1)[0], lines[5] + "  1", *lines[6:]]

    text = refused(change_list(tmp_path, shift), attributes=["Male"])
    assert "list_attr_celeba.txt: is damaged" in text


def test_two_images_of_one_name_are_not_given_one_row():
    make_folder(Path("mine/a"), 2)
    make_folder(Path("mine/b"), 2)
    Path("mine/list_attr_celeba.txt").write_text("2\nMale\n000.jpg 1\n001.jpg -1\n")
    assert "several images named 000" in refused("mine", attributes=["Male"])


@pytest.mark.parametrize("names", [("a.0", "a.1"), ("a 0", "a 1"), ("\u00e9", "e")])
def test_names_with_dots_spaces_and_accents_have_their_rows(names):
    Path("mine").mkdir()
    for number, name in enumerate(names):
        Path(f"mine/{name}.jpg").write_bytes(jpeg(number))
    rows = f"{names[0]}.jpg,1\n{names[1]}.jpg,-1\n"
    Path("mine/list_attr_celeba.csv").write_text("image_id,Male\n" + rows, encoding="utf-8")
    found = load_faces("mine", 8, attributes=["Male"]).attributes.ravel().tolist()
    assert found == [1, -1] if names[0] < names[1] else [-1, 1]


def kaggle(monkeypatch, download):
    stub = types.SimpleNamespace(dataset_download=download)
    monkeypatch.setitem(sys.modules, "kagglehub", stub)


def no_kaggle(handle, output_dir):
    raise RuntimeError("403 Client Error\nnot\ttoday")


def make_kaggle(handle, output_dir):
    assert handle == "jessicali9530/celeba-dataset"
    make_celeba(Path(output_dir), "kaggle folder")
    (Path(output_dir) / ".complete").mkdir()
    return output_dir


def assert_is_celeba(path):
    faces = load_faces(path, 64, attributes=["Male"])
    assert len(faces.images) == 24 and len(faces.train) == 8
    assert not (Path(path) / ".download").exists()


def test_a_download_that_fails_or_is_partial_leaves_nothing_and_says_the_way_out(monkeypatch):
    def half(handle, output_dir):
        root = Path(make_kaggle(handle, output_dir))
        for path in sorted(root.rglob("*.jpg"))[10:]:
            path.unlink()
        return output_dir

    for download, reason in ((no_kaggle, "403 Client Error not today"), (half, "only 10 of the")):
        kaggle(monkeypatch, download)
        text = refused("data")
        assert reason in text and "--demo" in text and "kaggle.com/datasets/jessi" in text
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


@pytest.mark.parametrize("there", [False, True])
def test_the_default_folder_absent_or_empty_gets_celeba_from_kaggle(there, monkeypatch):
    kaggle(monkeypatch, make_kaggle)
    if there:
        Path("data/cifar10").mkdir(parents=True)  # a data set that is known by name
        Path("data/.DS_Store").touch()
    assert_is_celeba("data")
    kaggle(monkeypatch, lambda *_, **__: pytest.fail("downloaded twice"))
    assert_is_celeba("data")


def test_kagglehub_takes_the_folder_asked_for():
    import kagglehub

    assert "output_dir" in inspect.signature(kagglehub.dataset_download).parameters


def test_a_folder_that_kaggles_machines_hold_already_is_used_where_it_is(monkeypatch, tmp_path):
    root = make_celeba(tmp_path / "input", "kaggle folder")
    kaggle(monkeypatch, lambda *_, **__: str(root))
    assert_is_celeba("data")
    assert str(root) in load_faces("data", 64).description


def test_a_page_under_the_name_of_the_archive_is_named_not_trained_on(tmp_path):
    root = make_celeba(tmp_path / "data")
    (root / "img_align_celeba.zip").write_bytes(HTML)
    assert "img_align_celeba.zip: cannot be read as a zip archive" in refused(root)


def test_an_interrupted_download_leaves_nothing(monkeypatch):
    def interrupt(handle, output_dir):
        make_kaggle(handle, output_dir)
        raise KeyboardInterrupt

    kaggle(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_faces("data", 64)
    assert list(Path("data").iterdir()) == []


def test_no_room_for_the_download_says_so_and_asks_no_further(monkeypatch):
    def full(handle, output_dir):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kaggle(monkeypatch, full)
    text = refused("data", ResourceError)
    assert "data: " in text and "bytes (No space left on device)" in text


@pytest.mark.parametrize("path", ["data/archive.zip", "dta", "data/below", "elsewhere/data"])
def test_another_path_that_is_not_there_is_no_download(path, monkeypatch):
    kaggle(monkeypatch, lambda *_, **__: pytest.fail("downloaded"))
    text = refused(path)
    assert f"{path}: is not there" in text and "synthetic" in text
    assert not Path(path).exists()


def test_another_empty_folder_is_no_download(monkeypatch):
    kaggle(monkeypatch, lambda *_, **__: pytest.fail("downloaded"))
    Path("mine").mkdir()
    assert "mine: holds no images" in refused("mine")


@pytest.mark.parametrize("path", ["./data", "data/", "absolute"])
def test_the_default_folder_is_known_however_it_is_written(path, monkeypatch):
    kaggle(monkeypatch, make_kaggle)
    assert_is_celeba(Path("data").absolute() if path == "absolute" else path)


# ---- The crop, and CelebAMask-HQ ----


def test_the_crop_does_not_depend_on_which_file_comes_first(tmp_path):
    root = make_celeba(tmp_path / "data", "folder")
    (root / "img_align_celeba").rename(tmp_path / "img_align_celeba")
    home = tmp_path / "authors" / "Img"
    home.mkdir(parents=True)
    (tmp_path / "img_align_celeba").rename(home / "img_align_celeba")
    (tmp_path / "authors" / "Eval").mkdir()
    split = (root / "list_eval_partition.txt").read_text()
    expected = np.asarray(Image.open(io.BytesIO(jpeg(1))))[28:92, 12:76]
    for name in ("Eval/list_eval_partition.txt", "zzz/list_eval_partition.txt"):
        path = tmp_path / "authors" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(split)
        faces = load_faces(tmp_path / "authors", 64)
        np.testing.assert_array_equal(faces.images[0], expected)
        assert faces.crop == "aligned" and ", CelebA's crop, from " in faces.description
        path.unlink()
    (tmp_path / "authors" / "000.jpg").write_bytes(jpeg(1))  # not all are CelebA's now
    assert load_faces(tmp_path / "authors", 64).crop == "square"


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
