"""Data sets by name, with the real libraries on small files in their real formats."""

import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision
from made import empty_folder, jpeg, one_line  # noqa: F401

from dataset.decoding import decode_face
from dataset.faces import load_faces
from system.errors import DataError, UsageError

# Each has ten images, of the classes 0 to 9; the last three are held out.
TRAIN, TEST = slice(7), slice(7, 10)
LABELS = np.arange(10)
KINDS = [f"kind {i}" for i in range(10)]


def pixels(size):
    return np.random.default_rng(size).integers(0, 256, (10, size, size, 3), np.uint8)


def write_cifar10(root):
    root = root / "cifar-10-batches-py"
    root.mkdir(parents=True)
    images = pixels(32)
    rows = images.transpose(0, 3, 1, 2).reshape(10, -1)
    parts = {f"data_batch_{i}": slice(i - 1, i) for i in range(1, 5)}
    parts |= {"data_batch_5": slice(4, 7), "test_batch": TEST}
    for name, part in parts.items():
        (root / name).write_bytes(pickle.dumps({"data": rows[part], "labels": [*LABELS[part]]}))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": KINDS}))
    return images, "kind_0"


def write_mnist(root, kind="MNIST"):
    root = root / kind / "raw"
    root.mkdir(parents=True)
    images = pixels(28)[..., 0]
    for name, part in (("train", TRAIN), ("t10k", TEST)):
        count = len(LABELS[part])
        header = struct.pack(">4I", 2051, count, 28, 28)
        (root / f"{name}-images-idx3-ubyte").write_bytes(header + images[part].tobytes())
        header = struct.pack(">2I", 2049, count)
        (root / f"{name}-labels-idx1-ubyte").write_bytes(header + bytes(LABELS[part].tolist()))
    return np.repeat(images[..., None], 3, axis=-1), "0"


def write_fashion_mnist(root):
    return write_mnist(root, "FashionMNIST")[0], "T-shirt/top"


def write_svhn(root):
    from scipy import io

    root.mkdir(parents=True)
    images = pixels(32)
    for name, part in (("train", TRAIN), ("test", TEST)):
        y = np.where(LABELS == 0, 10, LABELS)[part, None]  # their 0 is a 10
        io.savemat(root / f"{name}_32x32.mat", {"X": images[part].transpose(1, 2, 3, 0), "y": y})
    return images, "0"


def write_stl10(root):
    root = root / "stl10_binary"
    root.mkdir(parents=True)
    images = pixels(96)
    for name, part in (("train", slice(4)), ("unlabeled", slice(4, 7)), ("test", TEST)):
        (root / f"{name}_X.bin").write_bytes(images[part].transpose(0, 3, 2, 1).tobytes())
        if name != "unlabeled":
            (root / f"{name}_y.bin").write_bytes(bytes((LABELS[part] + 1).tolist()))
    (root / "class_names.txt").write_text("\n".join(KINDS) + "\n")
    return images, "kind_0"


def write_flowers102(root):
    from scipy import io

    root = root / "flowers-102"
    (root / "jpg").mkdir(parents=True)
    for number in range(1, 11):
        (root / "jpg" / f"image_{number:05d}.jpg").write_bytes(jpeg(number, (40, 40)))
    split = {"trnid": [[1, 2, 3]], "tstid": [[4, 5, 6, 7]], "valid": [[8, 9, 10]]}
    io.savemat(root / "imagelabels.mat", {"labels": LABELS[None] + 1})
    io.savemat(root / "setid.mat", split)
    return [decode_face(jpeg(number, (40, 40)), 40) for number in range(1, 11)], "pink_primrose"


WRITERS = dict(
    cifar10=write_cifar10,
    mnist=write_mnist,
    fashion_mnist=write_fashion_mnist,
    svhn=write_svhn,
    stl10=write_stl10,
    flowers102=write_flowers102,
)


@pytest.fixture
def any_checksum(monkeypatch):
    """torchvision knows the checksums of the real files."""
    for module in ("cifar", "svhn", "stl10", "flowers102"):
        check = lambda path, md5=None: os.path.isfile(path)  # noqa: E731
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", check)


@pytest.mark.parametrize("name", WRITERS)
def test_a_data_set_of_torchvision_has_its_images_its_classes_and_its_split(name, any_checksum):
    images, first_class = WRITERS[name](Path("data") / name)
    faces = load_faces(name, len(images[0]), attributes=("all",))
    np.testing.assert_array_equal(faces.images, images)
    assert faces.attribute_names[0] == first_class
    wanted = np.where(LABELS[:, None] == np.arange(len(faces.attribute_names)), 1, -1)
    wanted[4 : 7 if name == "stl10" else 4] = 0  # not known
    np.testing.assert_array_equal(faces.attributes, wanted)
    assert all(row.count("+") == 1 for row in faces.usual_attributes(20))
    assert faces.train.tolist() == list(range(7)) and len(faces.held_out) == 3
    assert f"from data/{name}" in faces.description and faces.crop == "square"
    assert load_faces(name, 8, only=[first_class.upper()]).train.tolist() == [0]


def test_a_data_set_is_downloaded_once_into_a_folder_that_is_said(monkeypatch, capsys):
    def download(part):
        if not Path(part.raw_folder).exists():
            write_mnist(Path(part.root))

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    first = load_faces("mnist", 8)
    assert "data/mnist: downloading MNIST" in capsys.readouterr().out
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", None)
    assert load_faces("mnist", 8).key == first.key


def test_a_failed_download_and_a_missing_package_are_one_line(monkeypatch, any_checksum):
    def fail(part):
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fail)
    with pytest.raises(DataError, match="^data/mnist: mnist could not be .*no route to host") as e:
        load_faces("mnist", 8)
    one_line(e)
    Path("data/svhn").mkdir(parents=True)
    Path("data/svhn/train_32x32.mat").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UsageError, match="svhn needs the package scipy. Fix: .*pip install scipy"):
        load_faces("svhn", 8)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the package datasets. Fix: .*pip install datasets"):
        load_faces("hf:owner/name", 8)


# The Hub's library -------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The library, with its cache in a folder of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def table(hub, numbers, kinds=True):
    """A data set of the library's: images, and maybe their classes."""
    columns = {"id": list(numbers)}
    columns["photo"] = [{"bytes": jpeg(i, (16, 16)), "path": None} for i in numbers]
    features = {"id": hub.Value("int64"), "photo": hub.Image()}
    if kinds:
        columns["kind"] = [i % 2 for i in numbers]
        features["kind"] = hub.ClassLabel(names=["a frog", "a cat"])
    return hub.Dataset.from_dict(columns, hub.Features(features))


def test_a_folder_of_parquet_files_has_its_images_its_labels_and_its_split(hub):
    Path("mine/data").mkdir(parents=True)
    for name, numbers in (("train", range(7)), ("test", range(7, 10))):
        table(hub, numbers).to_parquet(f"mine/data/{name}-00000-of-00001.parquet")
    faces = load_faces("mine", 16, attributes=("all",))
    expected = [decode_face(jpeg(i, (16, 16)), 16) for i in range(10)]
    np.testing.assert_array_equal(faces.images, expected)
    assert faces.train.tolist() == list(range(7)) and faces.held_out.tolist() == [7, 8, 9]
    assert faces.attribute_names == ("a_frog", "a_cat")
    assert faces.attributes.tolist() == [[1, -1], [-1, 1]] * 5
    assert load_faces("mine", 16).key == faces.key


def test_parquet_files_of_another_program_are_read(hub):
    import pandas

    Path("mine").mkdir()
    rows = [{"bytes": jpeg(i, (16, 16)), "path": f"{i}.jpg"} for i in range(21)]
    pandas.DataFrame({"image": rows, "label": [f"kind {i}" for i in range(21)]}).to_parquet(
        "mine/0.parquet"
    )
    faces = load_faces("mine", 16, attributes=["kind_20"])
    assert len(faces.images) == 21 and faces.held_out.tolist() == [19]
    assert np.flatnonzero(faces.attributes[:, 0] == 1).tolist() == [20]
    rows[2]["bytes"] = rows[2]["bytes"][:300]
    pandas.DataFrame({"image": rows}).to_parquet("mine/0.parquet")
    with pytest.raises(DataError, match=r"^mine: 1 of 21 images cannot be used: 2 \("):
        load_faces("mine", 16)
    pandas.DataFrame({"text": ["a"]}).to_parquet("mine/0.parquet")
    with pytest.raises(DataError, match="^mine: has no column of images, only text"):
        load_faces("mine", 16)


def test_a_name_on_the_hub_is_loaded_by_the_library(hub, monkeypatch, capsys):
    asked = []

    def load_dataset(name):
        asked.append(name)
        return hub.DatasetDict(validation=table(hub, [8, 9]), train=table(hub, [1], kinds=False))

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    faces = load_faces("hf:owner/name", 16)
    assert asked == ["owner/name"] and "hf:owner/name: kept in" in capsys.readouterr().out
    assert faces.train.tolist() == [0] and faces.held_out.tolist() == [1, 2]
    np.testing.assert_array_equal(faces.images[0], decode_face(jpeg(1, (16, 16)), 16))
    assert "from hf:owner/name" in faces.description
