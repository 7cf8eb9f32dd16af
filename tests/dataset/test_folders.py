"""Folders and archives: which files are images, in which order, and what is refused."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import needs_posix
from made import (  # noqa: F401
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


def test_a_zip_of_images_equals_the_folder_it_was_made_of():
    make_folder(Path("mine"), 5, size=(50, 60))
    with zipfile.ZipFile("mine.zip", "w") as archive:
        for path in sorted(Path("mine").iterdir()):
            archive.write(path, path.name)
    np.testing.assert_array_equal(load_faces("mine.zip", 16).images, load_faces("mine", 16).images)


def test_images_behind_a_link_to_a_folder_are_read_and_each_once():
    needs_posix()
    make_folder(Path("elsewhere"), 2)
    make_folder(Path("mine/below"), 3)
    Path("mine/more").symlink_to(Path("elsewhere").absolute())
    Path("mine/again").symlink_to("below")
    Path("mine/below/loop").symlink_to("..")
    names = open_files(Path("mine")).names
    assert names == [*(f"below/00{i}.jpg" for i in range(3)), "more/000.jpg", "more/001.jpg"]


@pytest.mark.parametrize("name", ["n" * 240, "\u00e9" * 100, "a\udcffb", "a:b c'\n"])
def test_a_folder_of_any_name_is_prepared(name):
    faces = load_faces(make_folder(Path(name), 3), 8)
    assert len(faces.images) == 3 and len(faces.key) < 80 and faces.key.encode()


def test_a_folder_or_archive_without_images_is_named():
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("no image")
    assert "mine: holds no images" in refused("mine")
    with zipfile.ZipFile("mine.zip", "w") as archive:
        archive.write("mine/notes.txt")
    assert "mine.zip: holds no images" in refused("mine.zip")
    assert "notes.txt: cannot be read as a zip" in refused("mine/notes.txt")


def test_a_dangling_link_is_named():
    needs_posix()
    make_folder(Path("mine"), 3)
    Path("mine/gone.jpg").symlink_to("nowhere.jpg")
    assert "mine/gone.jpg" in refused("mine")


def test_a_pipe_among_the_images_is_named_not_waited_for():
    needs_posix()
    make_folder(Path("mine"), 3)
    os.mkfifo("mine/1.jpg")
    assert "mine/1.jpg: is not a file" in within_seconds(lambda: refused("mine"))


def test_a_pipe_or_a_device_in_the_place_of_the_data_is_named():
    needs_posix()
    os.mkfifo("pipe")
    assert "pipe: is neither a folder nor a file" in within_seconds(lambda: refused("pipe"))
    assert "/dev/zero: is neither" in refused("/dev/zero")
    Path("link").symlink_to("nowhere")
    assert "link: is neither" in refused("link")


def test_an_empty_path_is_not_the_current_folder():
    make_folder(Path("mine"), 3)
    assert refused("", UsageError).startswith("--path_to_data: is empty")


def test_members_that_point_outside_are_read_in_place_and_nothing_is_written(tmp_path):
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    os.chdir(work)
    with zipfile.ZipFile("evil.zip", "w") as archive:
        for number, name in enumerate(["../../out.jpg", "/tmp/absolute_out.jpg", "in.jpg"]):
            archive.writestr(name, jpeg(number, (8, 8)))
    assert len(load_faces("evil.zip", 8).images) == 3
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2 and all(name.startswith("a/b/") for name in files)
    assert not Path("/tmp/absolute_out.jpg").exists()


def test_a_link_in_an_archive_is_no_image_and_is_not_followed():
    Path("secret.jpg").write_bytes(jpeg(1))
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile("evil.zip", "w") as archive:
        archive.writestr(link, "secret.jpg")
    assert "evil.zip: 1 of 1 images cannot be used: link.jpg (" in refused("evil.zip")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_archive_member_is_named(compression):
    with zipfile.ZipFile("mine.zip", "w", compression) as archive:
        for number in range(5):
            archive.writestr(f"{number}.jpg", jpeg(number))
        offset, size = archive.infolist()[3].header_offset, archive.infolist()[3].compress_size
    data = bytearray(Path("mine.zip").read_bytes())
    data[offset + 35 + size // 2] ^= 0xFF
    Path("mine.zip").write_bytes(data)
    assert "3.jpg (" in refused("mine.zip")


def test_a_cut_archive_is_named(tmp_path):
    path = make_celeba(tmp_path / "data", "one archive")
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: cannot be read as a zip archive" in refused(path.parent)


def test_an_image_that_unpacks_to_gigabytes_is_refused_unread(monkeypatch):
    monkeypatch.setattr(decoding, "LARGEST", 100_000)
    with zipfile.ZipFile("mine.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.jpg", jpeg(0))
        archive.writestr("1.jpg", bytes(100_001))
    read = zipfile.ZipFile.read

    def read_all_but_one(self, name):
        assert name != "1.jpg", "unpacked"
        return read(self, name)

    monkeypatch.setattr(zipfile.ZipFile, "read", read_all_but_one)
    text = refused("mine.zip")
    assert "1.jpg (" in text and "100,001 bytes" in text
    make_folder(Path("mine"), 2)
    Path("mine/1.bmp").write_bytes(bytes(100_001))
    assert "1.bmp (" in refused("mine")


# ---- Which files are images ----


def test_formats_that_pillow_reads_are_taken_and_other_files_counted_by_kind():
    make_folder(Path("mine"), 2)
    image = Image.new("RGB", (9, 9), (9, 99, 199))
    kinds = dict(jfif="JPEG", jpe="JPEG", avif="AVIF", tga="TGA", jp2="JPEG2000", apng="PNG")
    kinds |= dict(JPX="JPEG2000", dib="DIB", pbm="PPM", qoi="QOI", pcx="PCX")
    for suffix, kind in kinds.items():
        image.save(f"mine/x.{suffix}", kind)
    for name in ("a.heic", "b.HEIC", "notes.txt", "README", ".hidden.heic"):
        Path("mine", name).write_bytes(b"?")
    faces = load_faces("mine", 8)
    assert len(faces.images) == 2 + len(kinds)
    assert faces.description.endswith(", left out: 2 .heic, 1 .txt, 1 without suffix")
    for path in [*Path("mine").glob("x.*"), *Path("mine").glob("*.jpg")]:
        path.unlink()
    assert "mine: holds no images, only 2 .heic, 1 .txt" in refused("mine")


# ---- What the names of folders say ----


def test_a_split_into_folders_is_kept_and_said():
    for part, count in (("Train", 4), ("val", 2), ("TEST", 1)):
        make_folder(Path("mine", part, "cats"), count)
    faces = load_faces("mine", 8)
    assert len(faces.train) == 4 and len(faces.held_out) == 3
    assert "(3 held out)" in faces.description
    assert ", held out as its subfolders say" in faces.description
    assert [*faces.train, *faces.held_out] == [1, 2, 3, 4, 0, 5, 6]  # sorted: TEST, Train, val


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
    make_folder(Path("mine/Rose"), 2)
    faces = load_faces("mine", 8, attributes=("all",))
    assert faces.attribute_names == ("Rose", "lily")
    assert faces.attributes.tolist() == [[1, -1]] * 2 + [[-1, 1]] * 3
    assert load_faces("mine", 8, only=["rose"]).train.tolist() == [0, 1]
    with pytest.raises(UsageError, match="no attribute tulip. Fix: choose from Rose, lily"):
        load_faces("mine", 8, attributes=["tulip"])


# ---- Archives inside ----


def zipped(files, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def celeba_files(folder):
    """A made CelebA of Kaggle's as {name: contents}: its images, its lists."""
    root = make_celeba(folder, "kaggle folder")
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*g")}
    return files, {path.name: path.read_bytes() for path in root.glob("list_*")}


@pytest.mark.parametrize("layout", ["kaggle's tool", "the authors", "zip in zip", "zip in a zip"])
def test_archives_inside_a_folder_or_an_archive_are_read_in_place(layout, tmp_path):
    images, lists = celeba_files(tmp_path / "plain")
    path = tmp_path / "data"
    (path / "Img").mkdir(parents=True)
    if layout == "kaggle's tool":
        (path / "celeba-dataset.zip").write_bytes(zipped(images | lists))
    elif layout == "the authors":
        (path / "Img" / "img_align_celeba.zip").write_bytes(zipped(images))
        for name, data in lists.items():
            (path / "Anno").mkdir(exist_ok=True)
            (path / "Anno" / name).write_bytes(data)
    else:
        kind = zipfile.ZIP_DEFLATED if layout == "zip in zip" else zipfile.ZIP_STORED
        path = path / "celeba.zip"
        path.write_bytes(zipped({"Img/img_align_celeba.zip": zipped(images)} | lists, kind))
    expected = load_faces(tmp_path / "plain", 64, attributes=["Male"])
    for _ in range(2):
        faces = load_faces(path, 64, attributes=["Male"])
        np.testing.assert_array_equal(faces.images, expected.images)
        np.testing.assert_array_equal(faces.attributes, expected.attributes)
        assert faces.held_out.tolist() == expected.held_out.tolist() and faces.crop == "aligned"
    assert len(list(Path("prepared").iterdir())) == 2
    assert [file for file in tmp_path.glob("data/**/*.jpg")] == []


def test_an_archive_beside_images_is_left_out_and_a_damaged_one_named():
    make_folder(Path("mine"), 2)
    Path("mine/old.zip").write_bytes(zipped({"1.jpg": jpeg(1)}))
    assert load_faces("mine", 8).description.endswith("left out: 1 .zip")
    for path in Path("mine").glob("*.jpg"):
        path.unlink()
    Path("mine/old.zip").write_bytes(b"PK")
    assert "mine/old.zip: cannot be read as a zip archive" in refused("mine")
