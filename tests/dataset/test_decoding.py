"""From bytes to pixels: the crop, kinds of images, damaged images."""

import errno
import io
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F
from made import HTML, empty_folder, jpeg, make_folder, refused  # noqa: F401
from PIL import Image

from dataset import decoding
from dataset.decoding import crop_face, decode_face, face_box, open_file
from dataset.faces import load_faces
from system.errors import DataError, ResourceError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "celeba"


def real_and_made(size):
    images = [jpeg(1, size), jpeg(2, size)]
    if REAL.is_dir():  # half size
        with zipfile.ZipFile(REAL / "img_align_celeba.zip") as archive:
            images += [archive.read(name) for name in archive.namelist()[:20]]
    return images


def turned(orientation):
    """The EXIF data of an image that was stored in this orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_celeba_crop_is_128_around_x_89_y_121_and_scales_with_the_image():
    assert face_box(178, 218, "aligned") == (89 - 64, 121 - 64, 89 + 64, 121 + 64)
    assert face_box(89, 109, "aligned") == (12, 28, 76, 92)
    assert face_box(2 * 178, 2 * 218, "aligned") == (50, 114, 306, 370)
    assert face_box(200, 100, "aligned") == (50, 0, 150, 100)  # not CelebA's shape


@pytest.mark.parametrize("img_size", [16, 64, 192])
def test_resizing_is_the_antialiased_bicubic_of_torch_but_for_rounding(img_size):
    for data in real_and_made((178, 218)):
        image = Image.open(io.BytesIO(data))
        rows, columns = (slice(57, 185), slice(25, 153))
        if image.size == (89, 109):
            rows, columns = (slice(28, 92), slice(12, 76))
        pixels = torch.tensor(np.asarray(image)[rows, columns]).permute(2, 0, 1)[None].float()
        expected = F.interpolate(pixels, (img_size, img_size), mode="bicubic", antialias=True)
        expected = expected[0].permute(1, 2, 0).clamp(0, 255).numpy()
        # Rounding costs 0.25 on average, and a little more where Pillow clips between its passes.
        assert abs(crop_face(image, img_size, "aligned") - expected).mean() < 0.36


@pytest.mark.parametrize("width, height", [(178, 218), (300, 201), (201, 300), (64, 64), (1, 9)])
def test_other_images_are_cropped_to_the_largest_centred_square(width, height):
    left, top, right, bottom = face_box(width, height, "square")
    assert right - left == bottom - top == min(width, height)
    assert 0 <= left and 0 <= top and right <= width and bottom <= height
    assert abs(left - (width - right)) <= 1 and abs(top - (height - bottom)) <= 1


def test_nothing_outside_the_crop_reaches_the_pixels():
    image = Image.new("RGB", (178, 218), "red")
    image.paste("blue", face_box(178, 218, "aligned"))
    for size in (32, 192):
        face = crop_face(image, size, "aligned")
        assert (face == (0, 0, 255)).all()


@pytest.mark.parametrize(
    "mode, options",
    [
        ("RGB", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 1, "quality": 30}),
        ("RGB", {"exif": turned(6)}),
        ("L", {}),
        ("CMYK", {}),
    ],
)
def test_a_jpeg_has_the_pixels_that_pillow_decodes(mode, options):
    pixels = np.random.default_rng(0).integers(0, 256, (13, 11, 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels).resize((89, 109), Image.Resampling.BICUBIC), io.BytesIO()
    image.convert(mode).save(file, "JPEG", **options)
    for crop, img_size in (("aligned", 16), ("square", 64)):
        expected = crop_face(Image.open(file), img_size, crop)
        np.testing.assert_array_equal(decode_face(file.getvalue(), img_size, crop), expected)


def test_an_orientation_that_only_xmp_gives_is_applied():
    upright = Image.open(io.BytesIO(jpeg(1, (16, 16))))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", quality=100, xmp=xmp)
    found = decode_face(file.getvalue(), 16).astype(int)
    assert abs(found - np.asarray(upright)).mean() < 10  # turned the wrong way: over 60


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "P", "LA", "RGBA", "P with a hole"])
def test_each_kind_of_image_becomes_rgb_on_white(mode):
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    values[0, :, 3], values[1, :, 3] = 0, 255  # a row that is transparent, one that is not
    image = Image.fromarray(values if "A" in mode else values[..., :3]).convert(mode.split()[0])
    options = {"transparency": image.getpixel((3, 3))} if mode == "P with a hole" else {}
    path = Path("mine/a.tif" if mode == "CMYK" else "mine/a.png")
    path.parent.mkdir()
    image.save(path, **options)
    found, saved = load_faces("mine", 8).images[0], np.asarray(Image.open(path).convert("RGBA"))
    alpha = saved[..., 3:] / 255
    assert (alpha < 1).any() == ("A" in mode or bool(options))
    expected = saved[..., :3] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(found, expected, atol=1 if "A" in mode else 0)  # of rounding


@pytest.mark.parametrize("mode, name", [("I;16", "a.png"), ("I", "a.tif"), ("F", "a.tif")])
def test_more_than_8_bits_are_refused_never_clipped(mode, name):
    Path("mine").mkdir()
    deep = np.full((8, 8), 40_000, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    Image.fromarray(deep).save(f"mine/{name}")
    assert Image.open(f"mine/{name}").mode == mode
    text = refused("mine")
    assert f"{name} (" in text and "8 bits" in text


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "EXIF"])
def test_a_jpeg_that_the_decoder_calls_damaged_is_refused_not_made_up(mode):
    pixels = np.random.default_rng(3).integers(0, 256, (13, 11, 3), np.uint8)
    image, file = Image.fromarray(pixels).resize((89, 109)), io.BytesIO()
    image = image if mode == "EXIF" else image.convert(mode)
    image.save(file, "JPEG", quality=95, exif=turned(6) if mode == "EXIF" else b"")
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
    assert "002.png (in no format that Pillow knows)" in refused("mine")


@pytest.mark.parametrize("limit", [1000, 2000])  # of 2,500 pixels: an error, a warning
def test_a_decompression_bomb_is_refused(limit, monkeypatch):
    make_folder(Path("mine"), 2, size=(10, 10))
    (Path("mine") / "bomb.jpg").write_bytes(jpeg(1, size=(50, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    text = refused("mine")
    assert "bomb.jpg (" in text and "DecompressionBomb" in text


def test_an_image_that_pillow_would_run_a_program_for_is_refused():
    make_folder(Path("mine"), 2)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    Path("mine/1.jpg").write_bytes(eps)
    assert "1.jpg (ValueError: EPS" in refused("mine")


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


def test_an_error_in_a_decoding_thread_ends_the_call_and_all_threads(monkeypatch):
    def fail(*_):
        raise MemoryError("no memory for this image")

    before = threading.active_count()
    monkeypatch.setattr(decoding, "decode_face", fail)
    text = refused(make_folder(Path("mine"), 1000, (8, 8)), ResourceError)
    assert "mine/" in text and "memory" in text
    assert threading.active_count() == before


# ---- What is damaged ----


def test_all_damaged_images_are_named_at_once_and_left_out_if_asked(capsys):
    make_folder(Path("mine"), 40, (16, 16))
    damaged = [1, 3, 5, 8, 13, 17, 19, 21, 22, 30, 34, 38]
    expected = load_faces("mine", 16)
    for number, share in zip(damaged, [0.1, 0.5, 0.999] * 4, strict=True):
        data = jpeg(number)
        Path(f"mine/{number:03d}.jpg").write_bytes(data[: int(share * len(data)) - 1])
    text = refused("mine")
    assert text.startswith("mine: 12 of 40 images cannot be used: 001.jpg (")
    assert ", 030.jpg (" in text and "034" not in text and " and 2 more. Fix: " in text
    for _ in range(2):  # prepared, then mapped
        faces = load_faces("mine", 16, skip_damaged=True)
        assert faces.train.tolist() == sorted({*expected.train} - {*damaged})
        assert faces.held_out.tolist() == [39]
        np.testing.assert_array_equal(faces.images[faces.train], expected.images[faces.train])
        assert faces.description.endswith("left out: 12 damaged")
    assert "001.jpg (" in capsys.readouterr().err
    with pytest.raises(DataError, match="^mine: holds 12 damaged images.* Fix: add --skip_damaged"):
        load_faces("mine", 16)


def tiff(compression):
    """A TIFF, and where its pixels are."""
    random = np.random.default_rng(1)
    image = Image.fromarray(random.integers(0, 256, (7, 6, 3), np.uint8)).resize((48, 48))
    image = image.convert("1" if compression == "group4" else "RGB")
    file = io.BytesIO()
    image.save(file, "TIFF", compression=compression)
    tags = Image.open(file).tag_v2
    return file.getvalue(), tags[273][0], tags[279][0]


@pytest.mark.parametrize("kind", ["raw", "tiff_lzw", "packbits", "tiff_adobe_deflate", "jpeg"])
def test_a_whole_tiff_has_the_pixels_that_pillow_decodes(kind):
    data, _, _ = tiff(kind)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(decode_face(data, 48), np.asarray(expected))


@pytest.mark.parametrize("kind", ["tiff_adobe_deflate", "group4", "lzma"])
def test_no_flipped_bit_of_a_compressed_tiff_is_used_with_other_pixels(kind):
    data, start, size = tiff(kind)
    for place in range(start, start + size, max(1, size // 100)):
        damaged = data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]
        try:
            found = decode_face(damaged, 48)
        except Exception:
            continue
        np.testing.assert_array_equal(found, decode_face(data, 48))


def test_a_tiff_whose_jpeg_is_damaged_is_refused_not_made_up():
    data, start, size = tiff("jpeg")
    cut = data[: start + size // 2] + bytes(size - size // 2) + data[start + size :]
    Image.open(io.BytesIO(cut)).load()  # Pillow says nothing
    with pytest.raises(ValueError, match="Premature end of JPEG"):
        decode_face(cut, 48)


def with_short_jfif(data):
    """The JPEG with a JFIF segment that ends after its name, which Pillow cannot read."""
    assert data[2:4] == b"\xff\xe0"
    rest = 4 + int.from_bytes(data[4:6], "big")
    return data[:2] + b"\xff\xe0\0\7JFIF\0" + data[rest:]


def test_a_jpeg_with_a_short_jfif_segment_is_read_everywhere():
    data = jpeg(1, (16, 16))
    Path("face.jpg").write_bytes(with_short_jfif(data))
    np.testing.assert_array_equal(np.asarray(open_file("face.jpg")), decode_face(data, 16))


def test_a_jpeg_with_extraneous_bytes_before_its_end_is_damaged():
    data = jpeg(1)
    Path("face.jpg").write_bytes(data[:-2] + bytes(9) + data[-2:])
    with pytest.raises(DataError, match="^face.jpg: cannot be used .*extraneous bytes.* Fix: "):
        open_file("face.jpg")


@pytest.mark.parametrize("crop, home", [("aligned", "img_align_celeba"), ("square", "mine")])
def test_one_file_is_cropped_as_the_data_that_it_is_from(crop, home):
    faces = load_faces(make_folder(Path(home), 3, (178, 218)), 16)
    assert faces.crop == crop
    image = open_file(f"{home}/001.jpg")
    np.testing.assert_array_equal(crop_face(image, 16, faces.crop), faces.images[1])
    other = "square" if crop == "aligned" else "aligned"
    assert not np.array_equal(crop_face(image, 16, other), faces.images[1])
