"""What can go wrong with the data: every error is one line that names the file or the flag and the
way out."""

import errno
import inspect
import io
import os
import shutil
import signal
import sys
import threading
import time
import types
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from conftest import needs_posix, tiny
from PIL import Image
from test_dataset import jpeg, make_celeba, make_folder

from dataset import decoding, prepared, sources
from dataset import faces as dataset
from dataset.decoding import crop_face
from dataset.faces import Batches, load_faces
from system.errors import DataError, ResourceError, UsageError
from train import train

HTML = b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and text.count(". Fix: ") == 1
    return text


def refused(path, kind=DataError, size=16, **options):
    """The one line with which a source is refused."""
    with pytest.raises(kind) as error:
        load_faces(path, size, **options)
    assert not list(Path("prepared").glob("*")), "nothing half made is left"
    return one_line(error)


def die_in_a_fork(action):
    """Run `action` in a copy of this process; it must end by being killed."""
    needs_posix()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the copy needs no other thread
        child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def killed(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


# ---- Decoding ----


def test_no_process_is_started_to_decode(monkeypatch):
    needs_posix()
    for name in ("fork", "posix_spawn"):
        monkeypatch.setattr(os, name, lambda *_: pytest.fail("a process was started"))
    monkeypatch.setattr("_posixsubprocess.fork_exec", lambda *_: pytest.fail("a process"))
    assert len(load_faces(make_folder(Path("mine"), 200), 8).images) == 200


def test_an_error_in_a_decoding_thread_ends_the_call_and_all_threads(monkeypatch):
    def fail(*_):
        raise MemoryError("no memory for this image")

    before = threading.active_count()
    monkeypatch.setattr(decoding, "decode_face", fail)
    text = refused(make_folder(Path("mine"), 1000, (8, 8)), ResourceError)
    assert "mine/" in text and "memory" in text
    assert threading.active_count() == before


# ---- Damaged images ----


@pytest.mark.parametrize("share", [0.999, 0.5, 0.1])
def test_truncated_jpeg_names_the_file(share):
    data = jpeg(1)
    make_folder(Path("mine"), 5)
    Path("mine/003.jpg").write_bytes(data[: int(share * len(data)) - 1])
    assert "mine/003.jpg: " in refused("mine")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "EXIF"])
def test_a_jpeg_that_the_decoder_calls_damaged_is_refused_not_made_up(mode):
    pixels = np.random.default_rng(3).integers(0, 256, (13, 11, 3), np.uint8)
    image, exif, file = Image.fromarray(pixels).resize((89, 109)), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    image = image if mode == "EXIF" else image.convert(mode)
    image.save(file, "JPEG", quality=95, exif=exif if mode == "EXIF" else b"")
    data, random, damaged = file.getvalue(), np.random.default_rng(0), 0
    colours = {"L": "GRAY", "CMYK": "CMYK"}.get(mode, "RGB")
    for _ in range(50):
        start = random.integers(700, len(data) - 64)
        zeroed = data[:start] + bytes(64) + data[start + 64 :]
        try:
            simplejpeg.decode_jpeg(zeroed, colours)
        except ValueError:
            damaged += 1
            with pytest.raises(ValueError):
                decoding.decode_face(zeroed, 64)
    assert damaged > 10


@pytest.mark.parametrize("data", [b"", HTML, b"\0" * 5000])
def test_an_empty_file_or_a_web_page_as_an_image_names_the_file(data):
    make_folder(Path("mine"), 5)
    Path("mine/002.png").write_bytes(data)
    assert "mine/002.png: cannot be used as an image (in no format" in refused("mine")


# ---- Kinds of images ----


def prepared_from(image, name="one.png", **options):
    """The pixels of a saved 8x8 image as load_faces returns them."""
    Path("mine").mkdir(exist_ok=True)
    image.save(f"mine/{name}", **options)
    return load_faces("mine", 8).images[0]


def colours(mode):
    """A 8x8 image of that mode and, by arithmetic of our own, its RGB on white."""
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    values[0, :, 3] = 0  # a row that is transparent
    values[1, :, 3] = 255  # and one that is not
    rgb, alpha = values[..., :3].astype(float), values[..., 3:] / 255
    if mode in ("L", "LA"):
        rgb = np.repeat(rgb[..., :1], 3, axis=-1)
        image = Image.fromarray(values[..., 0]).convert(mode)
        if mode == "LA":
            image.putalpha(Image.fromarray(values[..., 3]))
    elif mode == "1":
        image = Image.fromarray(values[..., 0]).convert("1", dither=Image.Dither.NONE)
        rgb = np.repeat((values[..., :1] >= 128) * 255.0, 3, axis=-1)
    elif mode == "P":
        image = Image.fromarray(values[..., 0] % 4, "L").convert("P")
        palette = np.array([[255, 0, 9], [0, 255, 0], [8, 0, 255], [7, 77, 177]])
        image.putpalette(palette.ravel().tolist())
        rgb = palette[values[..., 0] % 4].astype(float)
    elif mode == "CMYK":
        image = Image.frombytes("CMYK", (8, 8), values.tobytes())
        rgb = (255 - values[..., :3]) * (255 - values[..., 3:].astype(float)) / 255
    else:
        image = Image.frombytes("RGBA", (8, 8), values.tobytes())
    return image, rgb * alpha + 255 * (1 - alpha) if mode in ("LA", "RGBA") else rgb


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_and_palette_images_become_exactly_their_rgb(mode):
    image, expected = colours(mode)
    np.testing.assert_array_equal(prepared_from(image), expected)


@pytest.mark.parametrize("mode, name", [("LA", "a.png"), ("RGBA", "a.png"), ("CMYK", "a.tif")])
def test_transparency_is_laid_on_white_and_cmyk_is_inverted(mode, name):
    image, expected = colours(mode)
    np.testing.assert_allclose(prepared_from(image, name), expected, atol=1)  # of rounding


def test_a_palette_with_a_transparent_colour_is_laid_on_white():
    image, expected = colours("P")
    expected[np.asarray(image) == 2] = 255
    np.testing.assert_array_equal(prepared_from(image, transparency=2), expected)


@pytest.mark.parametrize("mode, name", [("I;16", "a.png"), ("I", "a.tif"), ("F", "a.tif")])
def test_more_than_8_bits_are_refused_never_clipped(mode, name):
    Path("mine").mkdir()
    deep = np.full((8, 8), 40_000, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    Image.fromarray(deep).save(f"mine/{name}")
    assert Image.open(f"mine/{name}").mode == mode
    text = refused("mine")
    assert f"mine/{name}: " in text and "8 bits" in text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    # How a camera stores it: the EXIF standard's row 0 and column 0, for each orientation.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = prepared_from(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(pixels, upright)


@pytest.mark.parametrize("limit", [1000, 2000])  # of 2,500 pixels: an error, a warning
def test_a_decompression_bomb_is_refused(limit, monkeypatch):
    make_folder(Path("mine"), 2, size=(10, 10))
    (Path("mine") / "bomb.jpg").write_bytes(jpeg(1, size=(50, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    text = refused("mine")
    assert "mine/bomb.jpg: " in text and "DecompressionBomb" in text


# ---- Images that are not there ----


def test_an_image_removed_after_the_listing_names_the_file(monkeypatch):
    make_folder(Path("mine"), 5)

    def listed_then_removed(path):
        source = find_source(path)
        Path("mine/004.jpg").unlink()
        return source

    find_source = dataset.find_source
    monkeypatch.setattr(dataset, "find_source", listed_then_removed)
    assert "mine/004.jpg: " in refused("mine")


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


# ---- Killed while preparing ----

POINTS = ["first image", "in the middle", "before fsync", "before rename", "after rename"]


@pytest.mark.parametrize("point", POINTS)
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


def test_the_half_array_of_another_name_is_left_alone():
    Path("prepared").mkdir()
    others = Path("prepared/.a.npy.1.tmp"), Path("prepared/mine.tmp")
    for other in others:
        other.write_text("half")
    load_faces(make_folder(Path("mine"), 3), 8)
    assert all(other.exists() for other in others)


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


@pytest.mark.parametrize("damage", ["a byte", "zeros", "trailer", "header"])
def test_a_damaged_array_is_noticed_and_made_again(damage, capfd):
    first = load_faces(make_folder(Path("mine"), 50), 8)
    path, expected = Path(f"prepared/{first.key}.npy"), np.array(first.images)
    data = bytearray(path.read_bytes())
    if damage == "a byte":
        data[5000] ^= 1
    elif damage == "zeros":
        data[len(data) // 4 : 3 * len(data) // 4] = bytes(len(data) // 2)
    elif damage == "trailer":
        data[-3] ^= 1
    else:
        data = data.replace(b"(50, 8, 8, 3)", b"(8, 50, 8, 3)")
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


def test_an_array_that_is_removed_or_replaced_while_it_is_in_use_serves_on():
    faces = load_faces(make_folder(Path("mine"), 50), 8)
    batches, path = Batches(faces, 10), Path(f"prepared/{faces.key}.npy")
    first = batches(0)[0]
    Path("short").write_bytes(b"")
    os.replace("short", path)
    assert (batches(0)[0] == first).all()
    path.unlink()
    assert (batches(0)[0] == first).all()


def test_an_array_on_a_disk_that_cannot_be_written_serves(monkeypatch):
    expected = np.array(load_faces(make_folder(Path("mine"), 5), 8).images)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(prepared.filelock, "FileLock", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    np.testing.assert_array_equal(load_faces("mine", 8).images, expected)
    assert "Read-only file system" in refused_to_prepare("mine", 16)


def refused_to_prepare(path, size):
    with pytest.raises(ResourceError) as error:
        load_faces(path, size)
    return one_line(error)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_disk_without_locks_is_prepared_on(number, monkeypatch):
    needs_posix()

    def no_flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_flock)
    assert len(load_faces(make_folder(Path("mine"), 5), 8).images) == 5
    assert [path.suffix for path in Path("prepared").iterdir()] == [".npy"]


# ---- No room for the prepared array ----


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


# ---- Archives ----


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
    assert "evil.zip/link.jpg: " in refused("evil.zip")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_archive_member_is_named(compression):
    with zipfile.ZipFile("mine.zip", "w", compression) as archive:
        for number in range(5):
            archive.writestr(f"{number}.jpg", jpeg(number))
        offset, size = archive.infolist()[3].header_offset, archive.infolist()[3].compress_size
    data = bytearray(Path("mine.zip").read_bytes())
    data[offset + 35 + size // 2] ^= 0xFF
    Path("mine.zip").write_bytes(data)
    assert "mine.zip/3.jpg: " in refused("mine.zip")


def test_a_cut_archive_is_named(tmp_path):
    path = make_celeba(tmp_path / "data", "one archive")
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: cannot be read as a zip archive" in refused(path.parent)


def test_a_list_in_a_damaged_archive_is_named(tmp_path):
    path = make_celeba(tmp_path / "data", "kaggle archive") / "archive.zip"
    data = path.read_bytes()
    where = data.index(b"image_id,")
    path.write_bytes(data[:where] + b"X" + data[where + 1 :])
    assert f"{path}/list_attr_celeba.csv: " in refused(path)


def test_an_image_that_unpacks_to_gigabytes_is_refused_unread(monkeypatch):
    monkeypatch.setattr(sources, "LARGEST", 100_000)
    with zipfile.ZipFile("mine.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.jpg", jpeg(0))
        archive.writestr("1.jpg", bytes(100_001))
    read = zipfile.ZipFile.read

    def read_all_but_one(self, name):
        assert name != "1.jpg", "unpacked"
        return read(self, name)

    monkeypatch.setattr(zipfile.ZipFile, "read", read_all_but_one)
    text = refused("mine.zip")
    assert "mine.zip/1.jpg: " in text and "100,001 bytes" in text
    make_folder(Path("mine"), 2)
    Path("mine/1.bmp").write_bytes(bytes(100_001))
    assert "mine/1.bmp: " in refused("mine")


def test_an_image_that_pillow_would_run_a_program_for_is_refused():
    make_folder(Path("mine"), 2)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    Path("mine/1.jpg").write_bytes(eps)
    assert "mine/1.jpg: cannot be used as an image (ValueError: EPS" in refused("mine")


# ---- Lists that are read wrongly ----


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


# ---- What is no file ----


def within_seconds(action):
    """The result of `action`, which must not wait for ever."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(action)
        try:
            return future.result(timeout=20)
        except TimeoutError:
            os.write(os.open("mine/1.jpg", os.O_RDWR | os.O_NONBLOCK), b"x")  # let it end
            pytest.fail("it waits")


def test_a_pipe_among_the_images_is_named_not_waited_for():
    needs_posix()
    make_folder(Path("mine"), 3)
    os.mkfifo("mine/1.jpg")
    assert "mine/1.jpg: is no file" in within_seconds(lambda: refused("mine"))


def test_a_pipe_or_a_device_in_the_place_of_the_data_is_named():
    needs_posix()
    os.mkfifo("pipe")
    assert "pipe: is neither a folder nor a file" in within_seconds(lambda: refused("pipe"))
    assert "/dev/zero: is neither" in refused("/dev/zero")
    Path("link").symlink_to("nowhere")
    assert "link: is neither" in refused("link")


@pytest.mark.parametrize("name", ["n" * 300, "a/" * 3000])
def test_a_path_that_cannot_be_is_not_there(name):
    assert "is not there" in refused(name)


def test_a_pipe_in_the_place_of_an_image_after_the_listing_is_named():
    needs_posix()
    source = sources.find_source(make_folder(Path("mine"), 3))
    Path("mine/1.jpg").write_bytes(b"")
    Path("mine/001.jpg").unlink()
    os.mkfifo("mine/001.jpg")
    with pytest.raises(DataError, match="^mine/001.jpg: is no file"):
        within_seconds(lambda: list(source.images(8)))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")])
def test_something_else_in_the_place_of_the_array_ends_in_a_line_or_is_replaced(make):
    faces = load_faces(make_folder(Path("mine"), 3), 8)
    path, expected = Path(f"prepared/{faces.key}.npy"), np.array(faces.images)
    path.unlink()
    make(path)
    if make is os.mkdir:
        assert "Is a directory" in refused_to_prepare("mine", 8)
    else:
        images = within_seconds(lambda: load_faces("mine", 8).images)
        np.testing.assert_array_equal(images, expected)


def test_an_empty_path_is_not_the_current_folder():
    make_folder(Path("mine"), 3)
    assert refused("", UsageError).startswith("--path_to_data: is empty")


# ---- A good image is not called damaged ----


@pytest.mark.parametrize(
    "number, kind, words",
    [
        (errno.EMFILE, ResourceError, "too many files are open"),
        (errno.ENFILE, ResourceError, "too many files are open"),
        (errno.ENOMEM, ResourceError, "memory"),
        (errno.EIO, DataError, "Input/output error"),
        (errno.EACCES, DataError, "permissions"),
    ],
)
def test_an_image_that_cannot_be_opened_is_not_called_damaged(number, kind, words, monkeypatch):
    make_folder(Path("mine"), 3)

    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    text = refused("mine", kind)
    assert words in text and "replace" not in text and "image (" not in text


# ---- The download ----


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
        Path("data").mkdir()
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


# ---- Nothing to train on, other data ----


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


def test_fewer_faces_than_a_batch_name_the_flag():
    faces = load_faces(make_folder(Path("mine"), 7), 8)
    Batches(faces, 7)
    with pytest.raises(DataError) as error:
        Batches(faces, 8)
    assert one_line(error).startswith("--batch_size: ") and "7 faces" in one_line(error)


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


def test_the_same_name_with_other_images_makes_another_array(monkeypatch):
    first = load_faces(make_folder(Path("a/mine"), 5), 8)
    make_folder(Path("b/mine"), 5)
    Path("b/mine/001.jpg").write_bytes(jpeg(77))
    second = load_faces("b/mine", 8)
    assert first.key != second.key and not np.array_equal(first.images[1], second.images[1])


# ---- A run whose data have changed ----


def test_one_other_image_of_a_hundred_is_noticed_on_a_resume():
    make_folder(Path("pictures"), 100, (8, 8))
    train(tiny())
    Path("pictures/051.jpg").write_bytes(jpeg(5000, (8, 8)))  # not one of 64, evenly taken
    with pytest.raises(UsageError, match="faces was 95 faces, checksum of all .*, is 95 faces"):
        train(tiny(resume=True, num_training_steps=9))
