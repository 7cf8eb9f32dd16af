"""Prepared arrays: written once and completely, verified at every start, keyed by contents."""

import errno
import os
import shutil
import time
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import needs_posix
from made import (  # noqa: F401
    HTML,
    die_in_a_fork,
    empty_folder,
    jpeg,
    killed,
    make_celeba,
    make_folder,
    one_line,
    refused,
)
from PIL import Image

from dataset import decoding, prepared
from dataset.decoding import crop_face
from dataset.faces import load_faces
from system.errors import ResourceError


def test_a_second_start_decodes_nothing(tmp_path, monkeypatch):
    root = make_celeba(tmp_path / "data")
    first = np.array(load_faces(root, 64).images)
    monkeypatch.setattr(decoding, "decode_face", None)
    second = load_faces(root, 64).images
    assert isinstance(second, np.memmap)
    np.testing.assert_array_equal(second, first)


@pytest.mark.parametrize("layout", ["folder", "zip"])
def test_a_changed_image_makes_a_new_array(layout, tmp_path):
    before = load_faces(make_celeba(tmp_path / "data", layout), 64)
    assert load_faces(tmp_path / "data", 64).key == before.key
    if layout == "folder":
        (tmp_path / "data" / "img_align_celeba" / "000003.jpg").write_bytes(jpeg(99))
    else:
        make_celeba(tmp_path / "data", layout, size=(178, 218))
    after = load_faces(tmp_path / "data", 64)
    assert after.key != before.key
    assert not np.array_equal(after.images[2], before.images[2])


@pytest.mark.parametrize("layout", ["folder", "one archive"])
def test_sources_of_one_name_with_files_of_one_size_and_time_have_arrays_of_their_own(layout):
    keys = []
    for home, pixel in (("a", 10), ("b", 20)):
        Path(home, "mine").mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (pixel, number, 0)).save(f"{home}/mine/{number}.bmp")
        path = Path(home, "mine")
        if layout == "one archive":
            with zipfile.ZipFile(f"{home}/mine.zip", "w") as archive:
                for file in sorted(path.iterdir()):
                    archive.write(file, file.name)
            path = Path(home, "mine.zip")
        for file in [path, *Path(home, "mine").iterdir()]:
            os.utime(file, (1e9, 1e9))
        faces = load_faces(path, 8)
        assert faces.images[0, 0, 0].tolist() == [pixel, 0, 0]
        keys.append(faces.key)
    assert keys[0] != keys[1]


def test_a_link_to_a_folder_shares_its_array():
    needs_posix()
    make_folder(Path("mine"), 3)
    Path("linked").symlink_to("mine")
    first, second = load_faces("mine", 8), load_faces("linked", 8)
    assert first.key.partition("_8_")[2] == second.key.partition("_8_")[2]


def test_another_size_makes_another_array(tmp_path):
    root = make_celeba(tmp_path / "data", "folder")
    for size in (8, 16, 8):
        assert load_faces(root, size).images.shape == (24, size, size, 3)
    assert len(list(Path("prepared").iterdir())) == 2


def test_another_crop_of_the_same_files_makes_another_array(tmp_path):
    plain = (make_celeba(tmp_path, "folder") / "img_align_celeba").rename(tmp_path / "plain")
    for path in tmp_path.glob("list_*"):
        path.rename(plain / path.name)
    aligned = load_faces(plain, 16)
    (plain / "list_attr_celeba.txt").unlink()  # the same images, no longer known as CelebA's
    centred = load_faces(plain, 16)
    face = crop_face(Image.open(plain / "000001.jpg"), 16)
    np.testing.assert_array_equal(centred.images[0], face)
    assert not np.array_equal(centred.images, aligned.images)


@pytest.mark.parametrize(
    "point", ["first image", "in the middle", "before fsync", "before rename", "after rename"]
)
def test_killed_while_preparing_a_rerun_completes_and_no_half_array_is_mapped(
    point, monkeypatch, tmp_path
):
    make_folder(Path("mine"), 300, size=(8, 8))
    monkeypatch.setattr(prepared, "PREPARED", tmp_path / "reference")
    expected = np.array(load_faces("mine", 8).images)
    monkeypatch.setattr(prepared, "PREPARED", tmp_path / "prepared")
    crop, count, replace = decoding.decode_face, iter(range(1000)), os.replace

    def crop_until_killed(*arguments):
        killed() if next(count) == (0 if point == "first image" else 150) else None
        return crop(*arguments)

    def replace_and_die(*arguments):
        replace(*arguments)
        killed()

    def prepare():
        if point in ("first image", "in the middle"):
            decoding.decode_face = crop_until_killed
        elif point == "before fsync":
            os.fsync = killed
        else:
            os.replace = killed if point == "before rename" else replace_and_die
        load_faces("mine", 8)

    die_in_a_fork(prepare)
    assert len(list(Path("prepared").glob("*.npy"))) == (point == "after rename")
    faces = load_faces("mine", 8)
    np.testing.assert_array_equal(faces.images, expected)
    left = [path.name for path in Path("prepared").iterdir() if path.suffix != ".lock"]
    assert left == [f"{faces.key}.npy"]


def test_processes_that_ask_for_the_same_array_at_once_decode_it_once(monkeypatch):
    make_folder(Path("mine"), 70)
    decode, calls = decoding.decode_face, []

    def slow(*arguments):
        calls.append(time.sleep(0.01))
        return decode(*arguments)

    monkeypatch.setattr(decoding, "decode_face", slow)
    with ThreadPoolExecutor(3) as pool:  # the lock is as good between threads
        faces = list(pool.map(lambda _: load_faces("mine", 8), range(3)))
    assert len(calls) == 70
    for other in faces[1:]:
        np.testing.assert_array_equal(other.images, faces[0].images)


def test_a_cut_or_exchanged_array_is_made_again_never_mapped():
    first = load_faces(make_folder(Path("mine"), 5), 8)
    path, expected = Path(f"prepared/{first.key}.npy"), np.array(first.images)
    whole = path.read_bytes()
    for damage in (whole[:-1], whole[:200], whole[:20], b"", HTML, whole + b"\0"):
        path.write_bytes(damage)
        np.testing.assert_array_equal(load_faces("mine", 8).images, expected)
        assert path.read_bytes() == whole
    for other in (expected[:4], expected.astype(np.int8), expected[:, :, :4]):
        np.save(path, other)
        np.testing.assert_array_equal(load_faces("mine", 8).images, expected)


@pytest.mark.parametrize("damage", ["a byte", "zeros", "trailer"])
def test_a_damaged_array_is_noticed_and_made_again(damage, capfd):
    first = load_faces(make_folder(Path("mine"), 50), 8)
    path, expected = Path(f"prepared/{first.key}.npy"), np.array(first.images)
    data = bytearray(path.read_bytes())
    if damage == "a byte":
        data[5000] ^= 1
    elif damage == "zeros":
        data[len(data) // 4 : 3 * len(data) // 4] = bytes(len(data) // 2)
    else:
        data[-3] ^= 1
    path.write_bytes(data)
    second = load_faces("mine", 8)
    np.testing.assert_array_equal(second.images, expected)
    assert second.fingerprint == first.fingerprint
    assert f"{path} is damaged" in capfd.readouterr().err


def test_every_flipped_byte_of_a_header_is_noticed():
    first = load_faces(make_folder(Path("mine"), 3), 8)
    path, expected = Path(f"prepared/{first.key}.npy"), np.array(first.images)
    whole = path.read_bytes()
    for place in range(128):
        for flip in (0x01, 0x20, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            array = prepared.load_array(path, (3, 8, 8, 3))
            assert array is None or (array == expected).all(), place


def test_an_array_on_a_disk_that_cannot_be_written_serves(monkeypatch):
    expected = np.array(load_faces(make_folder(Path("mine"), 5), 8).images)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(prepared.filelock, "FileLock", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    np.testing.assert_array_equal(load_faces("mine", 8).images, expected)
    with pytest.raises(ResourceError, match="Read-only file system"):
        load_faces("mine", 16)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_disk_without_locks_is_prepared_on(number, monkeypatch):
    needs_posix()

    def no_flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_flock)
    assert len(load_faces(make_folder(Path("mine"), 5), 8).images) == 5
    assert [path.suffix for path in Path("prepared").iterdir()] == [".npy"]


def test_a_full_disk_is_said_before_decoding_with_the_bytes_needed(monkeypatch):
    make_folder(Path("mine"), 5)
    usage = types.SimpleNamespace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(decoding, "decode_face", lambda *_: pytest.fail("decoded in vain"))
    text = refused("mine", ResourceError, size=8)
    assert f"{5 * 8 * 8 * 3:,} bytes" in text and str(Path("prepared").absolute()) in text


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind(monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in refused(make_folder(Path("mine"), 5), ResourceError)


def test_a_prepared_folder_that_is_a_file_is_named(tmp_path):
    Path("prepared").write_text("in the way")
    with pytest.raises(ResourceError) as error:
        load_faces(make_folder(Path("mine"), 5), 8)
    assert str(tmp_path / "prepared") in one_line(error)
