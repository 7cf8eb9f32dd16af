"""Prepared arrays: written once and completely, verified at every start, keyed by contents."""

import errno
import os
import shutil
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import needs_posix, refuse
from made import (  # noqa: F401
    HTML,
    die_in_a_fork,
    empty_folder,
    jpeg,
    killed,
    make_celeba,
    make_folder,
    refused,
)
from PIL import Image

from dataset import decoding, prepared
from dataset.faces import load_faces
from system.errors import ResourceError

# Which array -------------------------------------------------------------------------------------


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


def test_folders_of_one_name_with_files_of_one_size_and_time_have_arrays_of_their_own():
    needs_posix()
    keys = []
    for home, pixel in (("a", 10), ("b", 20)):
        Path(home, "mine").mkdir(parents=True)
        for number in range(3):
            path = Path(home, "mine", f"{number}.bmp")
            Image.new("RGB", (8, 8), (pixel, number, 0)).save(path)
            os.utime(path, (1e9, 1e9))
        faces = load_faces(f"{home}/mine", 8)
        assert faces.images[0, 0, 0].tolist() == [pixel, 0, 0]
        keys.append(faces.key)
    assert keys[0] != keys[1]
    Path("c").symlink_to("a")  # one folder by another path has one array
    assert load_faces("c/mine", 8).key == keys[0]


def test_another_size_or_crop_of_the_same_files_makes_another_array(tmp_path):
    root = make_celeba(tmp_path / "data", "folder").joinpath("img_align_celeba").rename("plain")
    for path in Path("data").glob("list_*"):
        path.rename(root / path.name)
    aligned = load_faces(root, 16)
    (root / "list_attr_celeba.txt").unlink()  # the same images, no longer known as CelebA's
    assert not np.array_equal(load_faces(root, 16).images, aligned.images)
    assert load_faces(root, 8).images.shape == (24, 8, 8, 3)
    assert len(list(Path("prepared").iterdir())) == 3


# Written once, completely ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "point", ["in the middle", "before fsync", "before rename", "after rename"]
)
def test_killed_while_preparing_a_rerun_completes_and_no_half_array_is_mapped(point):
    make_folder(Path("mine"), 200, size=(8, 8))
    decode, count, replace = decoding.decode_face, iter(range(200)), os.replace

    def decode_until_killed(*arguments):
        return killed() if next(count) == 150 else decode(*arguments)

    def replace_and_die(*arguments):
        replace(*arguments)
        killed()

    broken = {
        "in the middle": (decoding, "decode_face", decode_until_killed),
        "before fsync": (os, "fsync", killed),
        "before rename": (os, "replace", killed),
        "after rename": (os, "replace", replace_and_die),
    }[point]
    die_in_a_fork(lambda: (setattr(*broken), load_faces("mine", 8)))
    assert len(list(Path("prepared").glob("*.npy"))) == (point == "after rename")
    faces = load_faces("mine", 8)
    expected = [decode(path.read_bytes(), 8) for path in sorted(Path("mine").iterdir())]
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


# Verified ----------------------------------------------------------------------------------------


def flipped(data, place, bits=0xFF):
    """The data with some bits of one byte changed."""
    return data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]


def test_a_damaged_array_is_noticed_and_made_again(capfd):
    first = load_faces(make_folder(Path("mine"), 50), 8)
    path, expected = Path(f"prepared/{first.key}.npy"), np.array(first.images)
    whole = path.read_bytes()
    zeros = whole[:3000] + bytes(4000) + whole[7000:]
    cut = [whole[:-1], whole[:200], whole[:20], b"", HTML, whole + b"\0"]
    for damage in (*cut, zeros, flipped(whole, 5000, 1), flipped(whole, len(whole) - 3, 1)):
        path.write_bytes(damage)
        again = load_faces("mine", 8)
        np.testing.assert_array_equal(again.images, expected)
        assert path.read_bytes() == whole and again.fingerprint == first.fingerprint
        assert f"{path} is damaged" in capfd.readouterr().err
    for other in (expected[:4], expected.astype(np.int8), expected[:, :, :4]):
        np.save(path, other)
        np.testing.assert_array_equal(load_faces("mine", 8).images, expected)
    for place in range(128):  # of the header
        for bits in (0x01, 0x20, 0xFF):
            path.write_bytes(flipped(whole, place, bits))
            array = prepared.load_array(path, (50, 8, 8, 3))
            assert array is None or (array == expected).all(), place


# The disk ----------------------------------------------------------------------------------------


def test_an_array_on_a_disk_that_cannot_be_written_serves(monkeypatch):
    expected = np.array(load_faces(make_folder(Path("mine"), 5), 8).images)
    monkeypatch.setattr(prepared.filelock, "FileLock", refuse(errno.EROFS))
    monkeypatch.setattr(Path, "mkdir", refuse(errno.EROFS))
    np.testing.assert_array_equal(load_faces("mine", 8).images, expected)
    with pytest.raises(ResourceError, match="Read-only file system"):
        load_faces("mine", 16)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_disk_without_locks_is_prepared_on(number, monkeypatch):
    needs_posix()
    monkeypatch.setattr("fcntl.flock", refuse(number))
    assert len(load_faces(make_folder(Path("mine"), 5), 8).images) == 5
    assert [path.suffix for path in Path("prepared").iterdir()] == [".npy"]


def test_a_full_disk_is_said_before_decoding_or_leaves_nothing_behind(monkeypatch, tmp_path):
    make_folder(Path("mine"), 5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse(errno.ENOSPC))
        assert "No space left" in refused("mine", ResourceError)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100))
    monkeypatch.setattr(decoding, "decode_face", lambda *_: pytest.fail("decoded in vain"))
    text = refused("mine", ResourceError, size=8)
    assert f"{5 * 8 * 8 * 3:,} bytes" in text and str(tmp_path / "prepared") in text


def test_a_prepared_folder_that_is_a_file_is_named(tmp_path):
    Path("prepared").write_text("in the way")
    assert str(tmp_path / "prepared") in refused(make_folder(Path("mine"), 5), ResourceError)
