"""Small data sets for the tests: made images, CelebA in each of its layouts, and its failures."""

import io
import os
import signal
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import in_fork
from PIL import Image

from dataset.faces import load_faces
from system.errors import DataError

NAMES = ("Eyeglasses", "Male", "Smiling", "Young")
HTML = b"<!DOCTYPE html><html><title>Quota exceeded</title></html>"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Import this for an empty current folder in each test."""
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


def list_texts(count, kaggle):
    """The two lists of CelebA, as the authors or as Kaggle write them: {name: text}. A third of
    the faces is in each part of the partition: train, validation, test."""
    names = [f"{n:06d}.jpg" for n in range(1, count + 1)]
    attributes, parts = made_attributes(count).tolist(), np.arange(count) * 3 // count
    faces = [*zip(names, attributes, parts, strict=True)]
    if kaggle:
        rows = [",".join(["image_id", *NAMES])]
        rows += [",".join([name, *map(str, row)]) for name, row, _ in faces]
        split = "\n".join(["image_id,partition", *(f"{name},{part}" for name, _, part in faces)])
        return {"list_attr_celeba.csv": "\r\n".join(rows), "list_eval_partition.csv": split}
    rows = [name + "".join(f"{value:>3}" for value in row) for name, row, _ in faces]
    table = "\n".join([str(count), " ".join(NAMES) + " ", *rows]) + "\n"
    split = "".join(f"{name} {part}\n" for name, _, part in faces)
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


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and text.count(". Fix: ") == 1
    return text


def refused(path, kind=DataError, size=16, **options):
    """The one line with which a source is refused."""
    before = sorted(Path("prepared").glob("*"))
    with pytest.raises(kind) as error:
        load_faces(path, size, **options)
    assert sorted(Path("prepared").glob("*")) == before, "nothing half made is left"
    return one_line(error)


def die_in_a_fork(action):
    """Run `action` in a copy of this process; it must end by being killed."""
    result = in_fork(action)
    assert result.returncode == -signal.SIGKILL, result.stderr


def killed(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def within_seconds(action):
    """The result of `action`, which must not wait for ever."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(action)
        try:
            return future.result(timeout=20)
        except TimeoutError:
            os.write(os.open("mine/1.jpg", os.O_RDWR | os.O_NONBLOCK), b"x")  # let it end
            pytest.fail("it waits")
