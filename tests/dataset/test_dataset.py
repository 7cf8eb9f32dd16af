"""What dataset.py and sources.py promise: which faces, which pixels, which order.

The archives are built here in the layouts they are passed on in, of made images; where the real
CelebA of `shared/data` is there, the same facts are checked on it too."""

import csv
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import needs_posix
from PIL import Image, ImageDraw

from dataset import decoding, sources, synthetic
from dataset.decoding import crop_face, decode_face, face_box
from dataset.faces import Batches, Faces, load_faces, parse_attributes
from system.errors import DataError, UsageError
from utils import to_x_0

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "celeba"
NAMES = ("Eyeglasses", "Male", "Smiling", "Young")
LAYOUTS = ("zip", "folder", "torchvision", "kaggle archive", "kaggle folder", "one archive")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def jpeg(number, size=(89, 109)):
    """A face-like image that differs from every other: bytes of a JPEG."""
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (7, 6, 3), np.uint8)).resize(size)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def made_attributes(count):
    """(count, 4) of 1 and -1: the binary digits of the number of the face."""
    return 2 * (np.arange(1, count + 1)[:, None] >> np.arange(4) & 1) - 1


def made_partition(count):
    return np.arange(count) * 3 // count  # thirds: train, validation, test


def list_texts(count, kaggle):
    """The two lists of CelebA, as the authors or as Kaggle write them: {name: text}."""
    names = [f"{n:06d}.jpg" for n in range(1, count + 1)]
    attributes, partition = made_attributes(count), made_partition(count)
    if kaggle:
        rows = [
            ",".join([name, *map(str, row)]) for name, row in zip(names, attributes, strict=True)
        ]
        table = "\r\n".join([",".join(["image_id", *NAMES]), *rows])
        rows = [f"{name},{part}" for name, part in zip(names, partition, strict=True)]
        split = "\n".join(["image_id,partition", *rows])
        return {"list_attr_celeba.csv": table, "list_eval_partition.csv": split}
    rows = [
        name + "".join(f"{v:>3}" for v in row) for name, row in zip(names, attributes, strict=True)
    ]
    table = "\n".join([str(count), " ".join(NAMES) + " ", *rows]) + "\n"
    split = "".join(f"{name} {part}\n" for name, part in zip(names, partition, strict=True))
    return {"list_attr_celeba.txt": table, "list_eval_partition.txt": split}


def make_celeba(root, layout="zip", count=24, size=(89, 109)):
    """Write a small CelebA in one of its layouts; return the path a user would give."""
    images = {f"img_align_celeba/{n:06d}.jpg": jpeg(n, size) for n in range(1, count + 1)}
    lists = list_texts(count, kaggle=layout.startswith("kaggle"))
    home = root / "celeba" if layout == "torchvision" else root
    home.mkdir(parents=True, exist_ok=True)
    if layout.startswith("kaggle"):
        images = {f"img_align_celeba/{name}": data for name, data in images.items()}
    if layout in ("kaggle archive", "one archive"):
        images |= {name: text.encode() for name, text in lists.items()}
    else:
        for name, text in lists.items():
            (home / name).write_text(text, newline="")
    if layout in ("folder", "kaggle folder"):
        for name, data in images.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(data)
    else:
        name = "archive.zip" if layout == "kaggle archive" else "img_align_celeba.zip"
        with zipfile.ZipFile(home / name, "w") as archive:
            for member, data in images.items():
                archive.writestr(member, data)
    return home / "img_align_celeba.zip" if layout == "one archive" else root


def make_folder(root, count, size=(40, 40)):
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (root / f"{number:03d}.jpg").write_bytes(jpeg(number, size))
    return root


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


# ---- The crop ----


def real_and_made(size):
    images = [jpeg(1, size), jpeg(2, size)]
    if REAL.is_dir():  # half size
        with zipfile.ZipFile(REAL / "img_align_celeba.zip") as archive:
            images += [archive.read(name) for name in archive.namelist()[:20]]
    return images


def test_half_size_celeba_is_cropped_to_rows_28_to_92_and_columns_12_to_76_untouched():
    for data in real_and_made((89, 109)):
        image = Image.open(io.BytesIO(data))
        expected = np.asarray(image)[28:92, 12:76]
        np.testing.assert_array_equal(crop_face(image, 64, aligned=True), expected)


def test_celeba_crop_is_128_around_x_89_y_121_and_scales_with_the_image():
    assert face_box(178, 218, aligned=True) == (89 - 64, 121 - 64, 89 + 64, 121 + 64)
    assert face_box(89, 109, aligned=True) == (12, 28, 76, 92)
    assert face_box(2 * 178, 2 * 218, aligned=True) == (50, 114, 306, 370)


@pytest.mark.parametrize("img_size", [16, 32, 192])
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
        assert abs(crop_face(image, img_size, aligned=True) - expected).mean() < 0.36


@pytest.mark.parametrize("width, height", [(178, 218), (300, 201), (201, 300), (64, 64), (1, 9)])
def test_other_images_are_cropped_to_the_largest_centred_square(width, height):
    left, top, right, bottom = face_box(width, height, aligned=False)
    assert right - left == bottom - top == min(width, height)
    assert 0 <= left and 0 <= top and right <= width and bottom <= height
    assert abs(left - (width - right)) <= 1 and abs(top - (height - bottom)) <= 1


def test_aligned_source_with_an_odd_image_takes_its_centred_square():
    assert face_box(200, 100, aligned=True) == (50, 0, 150, 100)


def test_nothing_outside_the_crop_reaches_the_pixels():
    image = Image.new("RGB", (178, 218), "red")
    image.paste("blue", face_box(178, 218, aligned=True))
    for size in (32, 64, 128, 192):
        face = crop_face(image, size, aligned=True)
        assert (face == (0, 0, 255)).all()


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (640, 480), (50, 40)])
def test_a_circle_stays_round(size):
    image = Image.new("L", size)
    centre, radius = np.array(size) / 2, 0.3 * min(size)
    ImageDraw.Draw(image).ellipse([*(centre - radius), *(centre + radius)], fill=255)
    for img_size in (32, 64):
        inside = crop_face(image, img_size)[..., 0] > 127
        width, height = inside.any(0).sum(), inside.any(1).sum()
        assert abs(width - height) <= 1 and abs(width - 0.6 * img_size) <= 2


def test_reduction_is_antialiased():
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: they must become grey
    face = crop_face(Image.fromarray(stripes), 32)
    assert abs(face.astype(int) - 127.5).max() < 8


# ---- Sources ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_celeba_gives_the_same_faces_attributes_and_partition(layout, tmp_path):
    faces = load_faces(make_celeba(tmp_path / "data", layout), 64, attributes=NAMES)
    expected = [np.asarray(Image.open(io.BytesIO(jpeg(n))))[28:92, 12:76] for n in range(1, 25)]
    np.testing.assert_array_equal(faces.images, expected)
    np.testing.assert_array_equal(faces.attributes, made_attributes(24))
    assert faces.train.tolist() == list(range(8)) and faces.held_out.tolist() == list(range(8, 24))
    assert faces.images.dtype == np.uint8 and faces.attributes.dtype == np.float32
    assert faces.train.dtype == faces.held_out.dtype == np.int64


def sources_of_attributes(tmp_path):
    """(path, attributes as the csv module reads them) of the made and of the real CelebA."""
    roots = [make_celeba(tmp_path / "data"), *[REAL] * REAL.is_dir()]
    for root in roots:
        lines = (root / "list_attr_celeba.txt").read_text().splitlines()
        rows = [r[1:] for r in csv.reader(lines[2:], delimiter=" ", skipinitialspace=True)]
        names = lines[1].split()
        yield root, {n: np.array([int(r[k]) for r in rows]) for k, n in enumerate(names)}


def test_attributes_come_in_the_order_asked_for(tmp_path):
    for root, truth in sources_of_attributes(tmp_path):
        faces = load_faces(root, 64, attributes=("Young", "Male"))
        expected = np.stack([truth["Young"], truth["Male"]], axis=1)
        np.testing.assert_array_equal(faces.attributes, expected)


def test_only_keeps_exactly_the_faces_that_fit(tmp_path):
    for root, truth in sources_of_attributes(tmp_path):
        everything = load_faces(root, 64)
        faces = load_faces(root, 64, only=["Smiling", "Male=-1"], attributes=["Male"])
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
    assert faces.description == f"8 faces (16 held out), 64x64, from {where}"


def test_any_folder_of_images_is_read_sorted_with_its_subfolders_and_without_hidden_files():
    make_folder(Path("mine"), 3)
    make_folder(Path("mine/below/more"), 2)
    for odd in ("mine/.hidden.jpg", "mine/__MACOSX/001.jpg", "mine/.git/x.png", "mine/notes.txt"):
        Path(odd).parent.mkdir(exist_ok=True)
        Path(odd).write_text("no image")
    Path("mine/002.jpg").rename("mine/002.JPEG")
    assert sources.open_files(Path("mine")).names == [
        "000.jpg", "001.jpg", "002.JPEG", "below/more/000.jpg", "below/more/001.jpg"
    ]  # fmt: skip
    assert load_faces("mine", 16).images.shape == (5, 16, 16, 3)


def test_a_zip_of_images_equals_the_folder_it_was_made_of():
    make_folder(Path("mine"), 5, size=(50, 60))
    with zipfile.ZipFile("mine.zip", "w") as archive:
        for path in sorted(Path("mine").iterdir()):
            archive.write(path, path.name)
    np.testing.assert_array_equal(load_faces("mine.zip", 16).images, load_faces("mine", 16).images)


def test_without_a_list_every_20th_image_is_held_out_and_never_trained_on():
    faces = load_faces(make_folder(Path("mine"), 45), 8)
    assert faces.held_out.tolist() == [19, 39]
    assert sorted([*faces.train, *faces.held_out]) == list(range(45))
    batches = Batches(faces, 43)
    seen = {tuple(np.asarray(x).ravel()) for index in range(3) for x in batches(index)[0]}
    for image in faces.images[faces.held_out]:
        for pixels in (image, image[:, ::-1]):
            assert tuple(np.asarray(to_x_0(torch.tensor(pixels[None].copy()))).ravel()) not in seen


def test_celeba_without_a_partition_holds_out_every_20th(tmp_path):
    root = make_celeba(tmp_path / "data")
    (root / "list_eval_partition.txt").unlink()
    assert load_faces(root, 64).held_out.tolist() == [19]


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


# ---- Decoding ----


@pytest.mark.parametrize("img_size", [16, 64])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1, "quality": 30}],
    ids=str,
)
def test_plain_jpeg_has_the_pixels_that_pillow_decodes(img_size, options):
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (13, 11, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((89, 109), Image.Resampling.BICUBIC).save(file, "JPEG", **options)
    for aligned in (True, False):
        expected = crop_face(Image.open(file), img_size, aligned)
        assert decoding._plain_jpeg(file.getvalue()) is not None
        found = decode_face(file.getvalue(), img_size, aligned)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode,extra", [("L", {}), ("CMYK", {}), ("RGB", {"orientation": 6})])
def test_other_jpegs_are_left_to_pillow(mode, extra):
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert(mode)
    exif = Image.Exif()
    if extra:
        exif[0x0112] = extra["orientation"]
    file = io.BytesIO()
    image.save(file, "JPEG", **({"exif": exif} if extra else {}))
    assert decoding._plain_jpeg(file.getvalue()) is None
    expected = crop_face(Image.open(file), 8)
    np.testing.assert_array_equal(decode_face(file.getvalue(), 8), expected)


def test_an_orientation_that_only_xmp_gives_is_applied():
    upright = Image.open(io.BytesIO(jpeg(1, (16, 16))))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", quality=100, xmp=xmp)
    found = decode_face(file.getvalue(), 16).astype(int)
    assert abs(found - np.asarray(upright)).mean() < 10  # turned the wrong way: over 60


# ---- Preparing once ----


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


@pytest.mark.parametrize("name", ["n" * 240, "\u00e9" * 100, "a\udcffb", "a:b c'\n"])
def test_a_folder_of_any_name_is_prepared(name):
    faces = load_faces(make_folder(Path(name), 3), 8)
    assert len(faces.images) == 3 and len(faces.key) < 80 and faces.key.encode()


def test_images_behind_a_link_to_a_folder_are_read_and_each_once():
    needs_posix()
    make_folder(Path("elsewhere"), 2)
    make_folder(Path("mine/below"), 3)
    Path("mine/more").symlink_to(Path("elsewhere").absolute())
    Path("mine/again").symlink_to("below")
    Path("mine/below/loop").symlink_to("..")
    names = sources.open_files(Path("mine")).names
    assert names == [*(f"below/00{i}.jpg" for i in range(3)), "more/000.jpg", "more/001.jpg"]


def test_a_folder_of_the_name_of_a_built_in_source_is_pointed_to(monkeypatch):
    monkeypatch.setattr(sources, "NUM_SYNTHETIC", 20)
    assert load_faces("synthetic", 8).description.endswith("from synthetic")
    make_folder(Path("synthetic"), 3)
    faces = load_faces("synthetic", 8)
    assert len(faces.images) == 20 and "./synthetic" in faces.description
    assert len(load_faces("./synthetic", 8).images) == 3


# ---- The fingerprint ----


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


# ---- Batches ----


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
