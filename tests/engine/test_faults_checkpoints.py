"""Faults around the checkpoint: a crash, a full disk or a flipped bit never costs the last good
one, and nothing but whole, finite, plain weights is ever saved or loaded."""

import builtins
import errno
import io
import math
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    TINY,
    as_flags,
    assert_error,
    needs_posix,
    run_script,
    tensors_equal,
    tiny,
    write_pictures,
)
from PIL import Image

import utils
from engine import session as run_module
from engine.state import make_state
from formats.weights import find_checkpoint
from generate import load_trained
from system.errors import CheckpointError, DivergedError, ResourceError, UsageError
from train import train
from utils import (
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
    sign,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 6 steps with checkpoints at 3 and 6, beside its pictures."""
    folder = tmp_path_factory.mktemp("finished")
    write_pictures(folder, 22)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(tiny())
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of the finished run to damage; the current folder is around it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return list_checkpoints(run)[0]


def rewrite(path: Path, change) -> None:
    """Change the state in a checkpoint, and sign it as good."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    sign(path)


def equal_to(a: dict, b: dict) -> bool:
    return all(tensors_equal(a[k], b[k]) for k in ("step", "model", "ema", "optimizer", "scaler"))


# Writing -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("bytes_written", [0, 100, 5000])
def test_a_kill_inside_a_write_leaves_the_old_checkpoint(run, monkeypatch, bytes_written):
    before = newest(run).read_bytes()

    def half_save(state, path):
        whole = io.BytesIO()
        real_save(state, whole)
        Path(path).write_bytes(whole.getvalue()[:bytes_written])
        raise Killed

    real_save = torch.save
    monkeypatch.setattr(torch, "save", half_save)
    with pytest.raises(Killed):
        save_checkpoint(newest(run), {"step": 6})
    assert newest(run).read_bytes() == before


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_around_fsync_and_replace_leaves_the_old_or_the_new_checkpoint(
    run, monkeypatch, where, after
):
    old, new = load_checkpoint(newest(run)), {"step": 7, "model": {"w": torch.ones(3)}}
    real = getattr(os, where)
    for call in range(5):  # at each of the calls in turn
        calls = iter(range(100))

        def killed(*arguments, call=call, calls=calls):
            mine = next(calls) == call
            if not mine or after:
                real(*arguments)
            if mine:
                raise Killed

        monkeypatch.setattr(os, where, killed)
        try:
            save_checkpoint(newest(run), new)
        except Killed:
            pass
        monkeypatch.setattr(os, where, real)
        state = load_checkpoint(newest(run))
        assert tensors_equal(state, old) or tensors_equal(state, {"format": 1, **new})
        assert list(run.joinpath("checkpoints").glob("*.tmp")) == []


def test_a_kill_while_old_checkpoints_are_removed_leaves_the_newest(run, monkeypatch):
    for step in (7, 8, 9):
        shutil.copy(newest(run), checkpoint_path(run, step))
    monkeypatch.setattr(Path, "unlink", lambda *a, **k: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        utils.prune_checkpoints(newest(run), 2, 9)
    assert load_newest_checkpoint(run)[0] == checkpoint_path(run, 9)
    monkeypatch.undo()


def test_a_stale_temporary_file_is_removed(run):
    stale = [run / "checkpoints" / ".step_00000009.pt.123.tmp", run / ".config.json.77.tmp"]
    for path in stale:
        path.write_bytes(b"half")
    train(tiny(num_training_steps=7, resume=True, path_to_data=str(run.parent / "pictures")))
    assert not any(path.exists() for path in stale)


def test_a_full_disk_names_the_bytes_needed(run, monkeypatch):
    before = newest(run).read_bytes()

    def full(state, path):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(ResourceError, match=r"12 bytes needed.*Fix"):
            save_checkpoint(newest(run), {"model": torch.zeros(3)})
    assert newest(run).read_bytes() == before


def test_no_room_for_the_checkpoints_is_found_out_before_the_first_step(here, monkeypatch):
    run_module.load_faces("pictures", 8)  # the disk fills up after the faces are prepared
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(ResourceError, match="9 bytes left and the checkpoints need [0-9,]{6,}"):
        train(tiny())
    assert not list_checkpoints(here / "run")


def test_a_limit_of_file_sizes_ends_a_real_process_before_the_first_step(here):
    """The disk takes 60 kB a file, a checkpoint is larger: exit 5 from the trial before step 1."""
    needs_posix()
    import resource

    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # noqa: E731
    result = run_script("train.py", *as_flags(TINY), preexec_fn=limit)
    assert_error(result, 5, "checkpoints", "bytes needed")
    assert not list_checkpoints(here / "run")


@pytest.mark.parametrize("call", ["open", "mkdir"])
def test_a_read_only_folder_is_found_out_before_the_first_step(here, monkeypatch, call):
    load = run_module.load_faces("pictures", 8)
    monkeypatch.setattr(run_module, "load_faces", lambda *a, **k: load)

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    if call == "mkdir":
        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        real = builtins.open
        monkeypatch.setattr(
            builtins, "open", lambda p, *a, **k: refuse() if "run" in str(p) else real(p, *a, **k)
        )
    with pytest.raises(ResourceError, match="Read-only file system"):
        train(tiny())


def test_a_failing_fsync_is_an_error_not_a_silent_success(run, monkeypatch):
    before = newest(run).read_bytes()
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(error))
        with pytest.raises(ResourceError, match="Input/output error"):
            save_checkpoint(newest(run), {"step": 7})
    assert newest(run).read_bytes() == before


def test_an_experiment_folder_that_is_a_file_is_named(here):
    (here / "run").touch()
    assert_error(run_script("train.py", *as_flags(TINY)), 2, "--experiment_name", "run is a file")
    assert (here / "run").read_bytes() == b""


# Damage ------------------------------------------------------------------------------------------


def test_a_truncated_checkpoint_gives_way_to_the_one_before(run, capsys):
    whole = newest(run).read_bytes()
    for size in np.linspace(0, len(whole) - 1, 100).astype(int):
        newest(run).write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            load_checkpoint(newest(run))
    path, state = load_newest_checkpoint(run)
    assert path == checkpoint_path(run, 3) and state["step"] == 3
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "step_00000006.pt" in warning and "step_00000003" in warning


def test_a_run_resumed_behind_a_truncated_checkpoint_equals_the_uninterrupted_one(run):
    reference = load_checkpoint(newest(run))
    os.truncate(newest(run), 10_000)
    train(tiny(resume=True))
    assert equal_to(load_checkpoint(newest(run)), reference)


def test_each_of_200_flipped_bits_is_noticed(run):
    whole = bytearray(newest(run).read_bytes())
    random = np.random.default_rng(0)
    edges = [0, 1, 30, len(whole) - 1, len(whole) - 70, len(whole) - 72, len(whole) - 90]
    for place in [*edges, *random.integers(0, len(whole), 193)]:
        flipped = whole.copy()
        flipped[place] ^= 1 << random.integers(8)
        newest(run).write_bytes(flipped)
        with pytest.raises(CheckpointError):
            load_checkpoint(newest(run))
    newest(run).write_bytes(whole)
    assert load_checkpoint(newest(run))["step"] == 6


def test_a_run_whose_checkpoints_are_all_bad_never_starts_over(run):
    for path in list_checkpoints(run):
        os.truncate(path, 1000)
    before = {p: p.read_bytes() for p in list_checkpoints(run)}
    result = run_script("train.py", *as_flags({**TINY, "resume": True}))
    assert_error(result, 4, "step_00000003.pt")
    assert before == {p: p.read_bytes() for p in list_checkpoints(run)}


def test_an_empty_checkpoint_gives_way_to_the_one_before(run):
    newest(run).write_bytes(b"")
    assert load_newest_checkpoint(run)[1]["step"] == 3


def test_a_web_page_where_a_checkpoint_should_be_is_one_line(run):
    page = run.parent / "page.pt"
    page.write_text("<!DOCTYPE html><html>quota exceeded</html>" * 50)
    assert_error(
        run_script("sample.py", "--checkpoint", str(page)), 4, "page.pt", "not a checkpoint"
    )


def test_a_run_s_folder_stands_for_its_newest_checkpoint(run):
    (run.parent / "empty").mkdir()
    result = run_script("sample.py", "--checkpoint", "empty")
    assert_error(result, 4, "empty", "holds no checkpoints")
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == newest(run)
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(run)


def test_a_checkpoint_that_is_not_there_is_one_line(run):
    assert_error(run_script("sample.py", "--checkpoint", "no.pt"), 4, "no.pt", "does not exist")
    shutil.rmtree(run)
    words = ("--num_images", "1", "--steps", "2")  # by the weights that come with the program
    assert run_script("sample.py", *words).returncode == 0


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("owned"),)


def test_a_malicious_pickle_is_not_run(run):
    for state in ({"format": 1, "model": Evil()}, Evil()):
        torch.save(state, "evil.pt")
        sign(Path("evil.pt"))
        with pytest.raises(CheckpointError, match="plain weights"):
            load_checkpoint(Path("evil.pt"))
        assert not Path("owned").exists()
    assert_error(run_script("sample.py", "--checkpoint", "evil.pt"), 4)
    assert not Path("owned").exists()


def test_a_checkpoint_that_unpacks_to_more_than_its_size_is_refused(run):
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 50_000_000)
    assert os.path.getsize("bomb.pt") < 100_000
    sign(Path("bomb.pt"))
    with pytest.raises(CheckpointError, match="more than its size"):
        load_checkpoint(Path("bomb.pt"))


def keys_of(state: dict) -> list[tuple[str, ...]]:
    inner = [(k, i) for k in ("ema", "optimizer", "scaler") for i in state[k]]
    some = [("model", list(state["model"])[i]) for i in (0, 5, -1)]
    return [(k,) for k in state if k != "format"] + inner + some


def test_each_missing_key_is_named(finished, tmp_path, monkeypatch, here):
    source = checkpoint_path(finished / "run", 6)
    for keys in keys_of(load_checkpoint(source)):
        path = checkpoint_path(here / "run", 6)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)

        def delete(state, keys=keys):
            for key in keys[:-1]:
                state = state[key]
            del state[keys[-1]]

        rewrite(path, delete)
        with pytest.raises(CheckpointError) as error:
            train(tiny(num_training_steps=7, resume=True))
        assert keys[-1] in str(error.value), (keys, str(error.value))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(step="6"),
        lambda state: state.update(step=-1),
        lambda state: state.update(settings=[1]),
        lambda state: state.update(unet=[1]),
        lambda state: state.update(history=3),
        lambda state: state["settings"].update(micro_batches="2"),
        lambda state: state["ema"].update(num_updates="x"),
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    ],
)
def test_parts_of_a_wrong_type_or_shape_are_one_line(run, change):
    for path in run.glob("checkpoints/*.pt"):
        rewrite(path, change)
    with pytest.raises(CheckpointError, match="step_0000000.*Fix: "):
        train(tiny(num_training_steps=7, resume=True))


@pytest.mark.parametrize("settings", [dict(img_size=0.5), dict(img_size=16), dict(attributes=5)])
def test_settings_that_are_not_those_of_the_network_are_one_line(run, settings):
    rewrite(newest(run), lambda state: state["settings"].update(settings))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_trained(newest(run))


def test_another_width_names_both_values(run):
    result = run_script("train.py", *as_flags({**TINY, "resume": True, "channels": 16}))
    assert_error(result, 4, "channels was 8, is 16")


@pytest.mark.parametrize("name, value", [("seed", 3), ("batch_size", 2), ("ema_decay", 0.5)])
def test_settings_that_would_change_the_run_are_refused(run, name, value):
    before = newest(run).read_bytes()
    with pytest.raises(UsageError, match=f"{name} was {TINY.get(name, 0)}, is {value}"):
        train(tiny(**{"resume": True, "num_training_steps": 9, name: value}))
    assert newest(run).read_bytes() == before


def test_other_faces_are_refused(run, monkeypatch):
    first = sorted((run.parent / "pictures").iterdir())[0]
    Image.new("RGB", (8, 8)).save(first)
    with pytest.raises(UsageError, match="faces was 21 faces"):
        train(tiny(resume=True, num_training_steps=9))
    monkeypatch.undo()


def test_harmless_settings_pass_with_a_note(run, capsys):
    train(tiny(resume=True, num_training_steps=7, save_every=1, log_every=1, keep_checkpoints=9))
    text = capsys.readouterr().out
    assert "num_training_steps was 6, is 7" in text and "save_every was 3, is 1" in text
    assert load_checkpoint(newest(run))["step"] == 7


def test_a_newer_format_says_upgrade(run):
    rewrite(newest(run), lambda state: state.update(format=99))
    with pytest.raises(CheckpointError, match="format 99.*upgrade"):
        load_checkpoint(newest(run))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixed_keys_load_equal(run, prefix):
    reference = load_checkpoint(newest(run))

    def add_prefix(state):
        for holder in (state, state["ema"]):
            holder["model"] = {prefix + k: v for k, v in holder["model"].items()}

    rewrite(newest(run), add_prefix)
    drawn = load_trained(run, half=False).model.state_dict()
    assert tensors_equal(dict(drawn), reference["ema"]["model"])
    state = make_state(tiny(), CPU, fp16=False)
    state.load_state_dict(load_checkpoint(newest(run)))
    assert equal_to(state.state_dict(), reference)


def test_resuming_in_another_precision_starts_the_loss_scale_afresh(run, capsys):
    saved = load_checkpoint(newest(run))
    fp16 = make_state(tiny(), CPU, fp16=True)
    fp16.load_state_dict(saved)
    assert fp16.scaler.get_scale() == 2.0**16 and "afresh" in capsys.readouterr().out
    plain = make_state(tiny(), CPU, fp16=False)
    plain.load_state_dict({**saved, "scaler": fp16.scaler.state_dict()})
    assert plain.scaler.get_scale() == 1.0 and capsys.readouterr().out.count("\n") == 1
    plain.load_state_dict(saved)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_numbers_that_are_not_finite_are_never_saved(run, part, poison):
    before = newest(run).read_bytes()
    state = load_checkpoint(newest(run))
    tensor = [t for _, t in utils.tensors_in(state[part]) if t.is_floating_point() and t.dim()][3]
    tensor.view(-1)[0] = poison
    with pytest.raises(DivergedError, match=f"{part}.*not finite"):
        save_checkpoint(newest(run), state)
    assert newest(run).read_bytes() == before


def test_objects_that_would_not_load_fail_the_save(run):
    before = newest(run).read_bytes()
    with pytest.raises(CheckpointError, match="would not load again"):
        save_checkpoint(newest(run), {"step": 7, "oops": Path("x")})
    assert newest(run).read_bytes() == before
    assert sorted(p.name for p in newest(run).parent.iterdir()) == [
        "step_00000003.pt",
        "step_00000006.pt",
    ]
