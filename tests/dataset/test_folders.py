"""Folders and archives: which files are images, in which order, and what is refused."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import needs_posix
from made import (  # noqa: F401
    HTML,
    empty_folder,
    jpeg,
    make_celeba,
    make_folder,
    refused,
    within_seconds,
)
from PIL import Image

from dataset import decoding
from dataset.faces import load_faces
from dataset.folders import open_files
from dataset.sources import find_classes, find_split
from system.errors import UsageError


def zipped(files, compression=zipfile.ZIP_STORED):
    """The bytes of an archive of {name: contents}."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


# Which files are images --------------------------------------------------------------------------


def test_any_folder_of_images_is_read_sorted_with_its_subfolders_and_without_hidden_files():
    make_folder(Path("mine"), 3)
    make_folder(Path("mine/below/more"), 2)
    for odd in ("mine/.hidden.jpg", "mine/__MACOSX/001.jpg", "mine/.git/x.png", "mine/notes.txt"):
        Path(odd).parent.mkdir(exist_ok=True)
        Path(odd).write_text("no image")
    Path("mine/002.jpg").rename("mine/002.JPEG")
    assert open_files(Path("mine")).names == [
        "000.jpg", "001.jpg", "002.JPEG", "below/more/000.jpg", "below/more/001.jpg"
    ]  # fmt: skip
    assert load_faces("mine", 16).images.shape == (5, 16, 16, 3)


def test_images_behind_a_link_to_a_folder_are_read_and_each_once():
    needs_posix()
    make_folder(Path("elsewhere"), 2)
    make_folder(Path("mine/below"), 3)
    Path("mine/more").symlink_to(Path("elsewhere").absolute())
    Path("mine/again").symlink_to("below")
    Path("mine/below/loop").symlink_to("..")
    names = open_files(Path("mine")).names
    assert names == [*(f"below/00{i}.jpg" for i in range(3)), "more/000.jpg", "more/001.jpg"]


def test_formats_that_pillow_reads_are_taken_and_other_files_counted_by_kind():
    make_folder(Path("mine"), 2)
    image = Image.new("RGB", (9, 9), (9, 99, 199))
    kinds = dict(jfif="JPEG", jpe="JPEG", avif="AVIF", tga="TGA", jp2="JPEG2000", apng="PNG")
    kinds |= dict(JPX="JPEG2000", dib="DIB", pbm="PPM", qoi="QOI", pcx="PCX")
    for suffix, kind in kinds.items():
        image.save(f"mine/x.{suffix}", kind)
    for name in ("a.heic", "b.HEIC", "notes.txt", "README", ".hidden.heic"):
        Path("mine", name).write_bytes(b"?")
    Path("mine/old.zip").write_bytes(zipped({"1.jpg": jpeg(1)}))
    faces = load_faces("mine", 8)
    assert len(faces.images) == 2 + len(kinds)
    left_out = "2 .heic, 1 .zip, 1 .txt, 1 without suffix"
    assert faces.description.endswith(f", left out: {left_out}")
    Path("phone").mkdir()
    Path("phone/a.heic").write_bytes(b"?")
    assert "phone: holds no images, only 1 .heic" in refused("phone")


@pytest.mark.parametrize("name", ["n" * 240, "\u00e9" * 100, "a\udcffb", "a:b c'\n"])
def test_a_folder_of_any_name_is_prepared(name):
    faces = load_faces(make_folder(Path(name), 3), 8)
    assert len(faces.images) == 3 and len(faces.key) < 80 and faces.key.encode()


# What is refused ---------------------------------------------------------------------------------


def test_a_pipe_a_device_or_a_dead_link_is_named_not_waited_for():
    needs_posix()
    make_folder(Path("mine"), 3)
    os.mkfifo("mine/1.jpg")
    assert "mine/1.jpg: is not a file" in within_seconds(lambda: refused("mine"))
    Path("mine/1.jpg").unlink()
    Path("mine/gone.jpg").symlink_to("nowhere.jpg")
    assert "mine/gone.jpg" in refused("mine")
    os.mkfifo("pipe")
    assert "pipe: is neither a folder nor a file" in within_seconds(lambda: refused("pipe"))
    assert "/dev/zero: is neither" in refused("/dev/zero")


def test_an_empty_path_is_not_the_current_folder():
    make_folder(Path("mine"), 3)
    assert refused("", UsageError).startswith("--path_to_data: is empty")


def test_an_archive_reaches_nothing_outside_of_it(tmp_path):
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    os.chdir(work)
    names = ["../../out.jpg", "/tmp/absolute_out.jpg", "in.jpg"]
    Path("evil.zip").write_bytes(zipped({name: jpeg(1, (8, 8)) for name in names}))
    assert len(load_faces("evil.zip", 8).images) == 3
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2 and all(name.startswith("a/b/") for name in files)
    assert not Path("/tmp/absolute_out.jpg").exists()
    Path("secret.jpg").write_bytes(jpeg(1))
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = 0o120777 << 16
    Path("link.zip").write_bytes(zipped({link: "secret.jpg"}))
    assert "link.zip: 1 of 1 images cannot be used: link.jpg (" in refused("link.zip")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_archive_member_is_named(compression):
    data = bytearray(zipped({f"{number}.jpg": jpeg(number) for number in range(5)}, compression))
    member = zipfile.ZipFile(io.BytesIO(data)).infolist()[3]
    data[member.header_offset + 35 + member.compress_size // 2] ^= 0xFF
    Path("mine.zip").write_bytes(data)
    assert "3.jpg (" in refused("mine.zip")


def test_a_cut_archive_or_another_file_in_its_place_is_named(tmp_path):
    path = make_celeba(tmp_path / "data", "one archive")
    for data in (path.read_bytes()[:-100], HTML):
        path.write_bytes(data)
        assert f"{path}: cannot be read as a zip archive" in refused(path.parent)
    Path("mine").mkdir()
    Path("mine/inner.zip").write_bytes(b"PK")
    assert "mine/inner.zip: cannot be read as a zip archive" in refused("mine")


def test_an_image_that_unpacks_to_gigabytes_is_refused_unread(monkeypatch):
    monkeypatch.setattr(decoding, "LARGEST", 100_000)
    Path("mine.zip").write_bytes(zipped({"1.jpg": bytes(100_001)}, zipfile.ZIP_DEFLATED))
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("unpacked"))
    text = refused("mine.zip")
    assert "1.jpg (" in text and "100,001 bytes" in text
    make_folder(Path("mine"), 2)
    Path("mine/1.bmp").write_bytes(bytes(100_001))
    assert "1.bmp (" in refused("mine")


# What the names of folders say -------------------------------------------------------------------


def test_a_split_into_folders_is_kept_and_said():
    for part, count in (("Train", 4), ("val", 2), ("TEST", 1)):
        make_folder(Path("mine", part, "cats"), count)
    faces = load_faces("mine", 8)
    assert ", held out as its subfolders say" in faces.description
    assert faces.train.tolist() == [1, 2, 3, 4]  # sorted: TEST, Train, val
    assert faces.held_out.tolist() == [0, 5, 6]


@pytest.mark.parametrize("name", ["test/1.jpg", "train/1.jpg", "a/test/1.jpg"])
def test_one_part_alone_or_elsewhere_is_no_split(name):
    assert find_split([name, "b/train/2.jpg", "c.jpg"]) is None


@pytest.mark.parametrize("around", ["", "archive/flowers/", "archive/train/"])
def test_folders_of_classes_become_attributes(around):
    names = [f"{around}{name}" for name in ("lily/1.jpg", "lily/old/2.jpg", "rose/1.jpg")]
    names += ["archive/val/rose/1.jpg"] * (around == "archive/train/")
    classes, labels = find_classes(names)
    assert classes == ["lily", "rose"] and labels.tolist() == [0, 0, 1, 1][: len(names)]
    assert find_classes([*names, f"{around}one.jpg"])[0] == []


def test_classes_are_asked_for_by_name_or_all_at_once():
    make_folder(Path("mine/lily"), 3)
    make_folder(Path("mine/Wild Rose"), 2)
    faces = load_faces("mine", 8, attributes=("all",))
    assert faces.attribute_names == ("Wild_Rose", "lily")
    assert faces.attributes.tolist() == [[1, -1]] * 2 + [[-1, 1]] * 3
    assert load_faces("mine", 8, only=["wild_rose"]).train.tolist() == [0, 1]


# Archives inside ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["kaggle's tool", "the authors", "zip in zip", "zip in a zip"])
def test_archives_inside_a_folder_or_an_archive_are_read_in_place(layout, tmp_path):
    plain = make_celeba(tmp_path / "plain", "kaggle folder")
    images = {str(path.relative_to(plain)): path.read_bytes() for path in plain.rglob("*.jpg")}
    lists = {f"Anno/{path.name}": path.read_bytes() for path in plain.glob("list_*")}
    inner = {"Img/img_align_celeba.zip": zipped(images)}
    files = {
        "kaggle's tool": {"celeba-dataset.zip": zipped(images | lists)},
        "the authors": inner | lists,
        "zip in zip": {"celeba.zip": zipped(inner | lists, zipfile.ZIP_DEFLATED)},
        "zip in a zip": {"celeba.zip": zipped(inner | lists)},
    }[layout]
    path = tmp_path / "data"
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    path = path / "celeba.zip" if "zip in" in layout else path
    expected = load_faces(plain, 64, attributes=["Male"])
    for _ in range(2):
        faces = load_faces(path, 64, attributes=["Male"])
        np.testing.assert_array_equal(faces.images, expected.images)
        np.testing.assert_array_equal(faces.attributes, expected.attributes)
        assert faces.held_out.tolist() == expected.held_out.tolist() and faces.crop == "aligned"
    assert len(list(Path("prepared").iterdir())) == 2
    assert not list(path.rglob("*.jpg"))
