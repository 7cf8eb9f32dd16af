"""Checkpoint files: only whole, finite, plain weights are saved or loaded. Images: pixels to
tensors and back."""

import errno
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_flags, assert_error, assert_same_state, final, run_script, saved_steps, tiny
from PIL import Image

from system.errors import CheckpointError, DivergedError, FormatError, ResourceError
from train import train
from utils import (
    CHECKPOINT_FORMAT,
    checkpoint_path,
    image_grid,
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    sign,
    tensors_in,
    to_uint8,
    to_x_0,
)


def newest(folder: Path) -> Path:
    return list_checkpoints(folder)[0]


@pytest.fixture
def untouched(run):
    """The newest checkpoint of a run whose checkpoints are in the end what they were."""
    before = {path: path.read_bytes() for path in Path("run/checkpoints").iterdir()}
    yield newest(run)
    assert before == {path: path.read_bytes() for path in Path("run/checkpoints").iterdir()}


# Saving ------------------------------------------------------------------------------------------


def refuse(error: OSError | RuntimeError):
    def call(*_, **__):
        raise error

    return call


@pytest.mark.parametrize(
    "call, error, said",
    [
        ("torch.save", RuntimeError("[enforce fail] unexpected pos 64"), "12 bytes needed"),
        ("os.fsync", OSError(errno.EIO, "Input/output error"), "Input/output error"),
        ("os.replace", OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    ],
)
def test_disk_that_refuses_costs_no_checkpoint(untouched, monkeypatch, call, error, said):
    with monkeypatch.context() as patch:
        patch.setattr(call, refuse(error))
        with pytest.raises(ResourceError, match=f"{said}.*Fix: "):
            save_checkpoint(untouched, {"model": torch.zeros(3)})


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_numbers_that_are_not_finite_are_never_saved(untouched, part, poison):
    state = load_checkpoint(untouched)
    tensor = [t for _, t in tensors_in(state[part]) if t.is_floating_point() and t.dim()][3]
    tensor.view(-1)[0] = poison
    with pytest.raises(DivergedError, match=f"{part}.*not finite"):
        save_checkpoint(untouched, state)


def test_objects_that_would_not_load_again_are_not_saved(untouched):
    with pytest.raises(CheckpointError, match="would not load again"):
        save_checkpoint(untouched, {"step": 7, "oops": Path("x")})


def test_newest_checkpoints_and_the_one_that_guides_are_kept(tmp_path, capsys, monkeypatch):
    for step in (1, 2, 3, 4, 9):
        save_checkpoint(checkpoint_path(tmp_path, step), {"step": step})
    prune_checkpoints(checkpoint_path(tmp_path, 4), keep=2, num_training_steps=6)
    # 2 is the first of a fifth of the steps, 9 is of another run.
    assert saved_steps(tmp_path) == [9, 4, 3, 2]
    monkeypatch.setattr(Path, "unlink", refuse(PermissionError(errno.EPERM, "not permitted")))
    prune_checkpoints(checkpoint_path(tmp_path, 4), keep=1, num_training_steps=6)
    assert "step_00000003.pt cannot be removed (not permitted)" in capsys.readouterr().err


# Loading -----------------------------------------------------------------------------------------


def test_each_flipped_bit_and_each_cut_is_noticed(run):
    path, whole, random = newest(run), newest(run).read_bytes(), np.random.default_rng(0)
    edges = [0, 1, 30, len(whole) - 1, len(whole) - 70, len(whole) - 72, len(whole) - 90]
    for place in [*edges, *random.integers(0, len(whole), 93)]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << random.integers(8)
        for damaged in (flipped, whole[:place]):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                load_checkpoint(path)
    path.write_bytes(whole)
    assert load_checkpoint(path)["step"] == 6


def test_damaged_checkpoints_give_way_to_the_newest_good_one(run, unbroken, capsys):
    newest(run).write_bytes(newest(run).read_bytes()[:-100])
    checkpoint_path(run, 7).write_bytes(b"")
    train(tiny(learning_rate=0.01, resume=True))
    assert_same_state(final(), unbroken(learning_rate=0.01))
    assert capsys.readouterr().err.count("taking step_00000003.pt") == 2
    aside = sorted(path.name for path in Path("run/checkpoints").glob("*.damaged"))
    assert aside == ["step_00000006.pt.damaged", "step_00000007.pt.damaged"]


def test_run_whose_checkpoints_are_all_damaged_never_starts_over(run):
    for path in list_checkpoints(run):
        os.truncate(path, 1000)
    before = {path: path.read_bytes() for path in list_checkpoints(run)}
    result = run_script("train.py", "--resume", *as_flags({"experiment_name": "run"}))
    assert_error(result, 4, "step_00000003.pt")
    assert before == {path: path.read_bytes() for path in list_checkpoints(run)}


@pytest.mark.parametrize("version, fix", [(1, "use the version"), (99, "upgrade")])
def test_checkpoint_of_another_format_is_refused(run, version, fix):
    state = torch.load(newest(run), weights_only=True)
    assert state["format"] == CHECKPOINT_FORMAT
    torch.save(state | {"format": version}, newest(run))
    sign(newest(run))
    with pytest.raises(FormatError, match=f"has format {version}, .*Fix: {fix}"):
        load_newest_checkpoint(run)  # and no older one takes its place


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("owned"),)


def test_loading_never_runs_code_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for state in ({"format": CHECKPOINT_FORMAT, "model": Evil()}, Evil()):
        torch.save(state, "evil.pt")
        sign(Path("evil.pt"))
        with pytest.raises(CheckpointError, match="plain weights"):
            load_checkpoint(Path("evil.pt"))
    assert not Path("owned").exists()


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    page, bomb, folder = (tmp_path / name for name in ("page.pt", "bomb.pt", "folder"))
    page.write_text("<!DOCTYPE html><html>quota exceeded</html>" * 50)
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 50_000_000)
    sign(bomb)
    folder.mkdir()
    (tmp_path / "empty.pt").touch()
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    sign(tmp_path / "other.pt")
    for name, said in (
        ("page.pt", "is not a checkpoint"),
        ("bomb.pt", "more than its size"),
        ("folder", "is a folder"),
        ("empty.pt", "is empty"),
        ("other.pt", "is not a checkpoint"),
        ("none.pt", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: .*{said}.*Fix: "):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("part", [{"step": "6"}, {"step": -1}, {"settings": [1]}, {"history": 3}])
def test_part_of_a_checkpoint_of_another_type_is_named(tmp_path, part):
    with pytest.raises(CheckpointError, match=f"{list(part)[0]} is "):
        save_checkpoint(tmp_path / "step_1.pt", {"step": 1} | part)


# Images ------------------------------------------------------------------------------------------


def test_pixels_survive_the_way_to_tensors_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    x_0 = to_x_0(pixels)
    assert x_0.shape == (1, 3, 16, 16) and (x_0.min(), x_0.max()) == (-1, 1)
    assert torch.equal(to_uint8(x_0), pixels)
    assert to_uint8(torch.full((3, 1, 1), 7.0)).max() == 255  # clipped, not wrapped


def test_grid_has_its_images_in_order_and_labels_beside_its_rows():
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(-1, 3, 8, 8)
    grid = np.asarray(image_grid(images))
    assert grid.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    assert [grid[4, x, 0] for x in (4, 14, 24)] == [0, 51, 102] and grid[14, 4, 0] == 153
    sheet = image_grid(images[:4], 2, ["first", "second"])
    assert isinstance(sheet, Image.Image) and sheet.height == 22 and sheet.width > 22
