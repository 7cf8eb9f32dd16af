"""How a run begins: from nothing, from its newest checkpoint, from other weights, or not at all."""

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import (
    TINY,
    as_flags,
    assert_error,
    assert_same_state,
    final,
    in_fork,
    needs_posix,
    refuse,
    run_script,
    saved_steps,
    tiny,
)
from PIL import Image

from engine import session
from engine.state import make_state, unet_arguments
from system.errors import CheckpointError, ResourceError, UsageError
from system.files import FolderLock
from train import Config, train
from utils import list_checkpoints, save_checkpoint

CPU = torch.device("cpu")
LONGER = dict(learning_rate=0.01, resume=True, num_training_steps=7)  # of `run`, by one step


def change(path: Path, action) -> None:
    """Change what a checkpoint holds."""
    state = torch.load(path, weights_only=True)
    action(state)
    path.unlink()
    save_checkpoint(path, {name: part for name, part in state.items() if name != "format"})


# Resuming ----------------------------------------------------------------------------------------


def test_resumed_run_keeps_its_own_constants_without_their_flags(here, unbroken):
    train(tiny(num_training_steps=3))
    words = ["--experiment_name", "run", "--resume", "--num_training_steps", "6"]
    result = run_script("train.py", *words)
    assert result.returncode == 0, result.stderr
    kept = "the run keeps its constants where they differ from train.py's: "
    (line,) = (line for line in result.stdout.splitlines() if line.startswith(kept))
    assert "--img_size 8 " in line and "--channel_mults 1 2 " in line
    assert "--num_training_steps" not in line and "--seed" not in line
    assert "changed from here on: --num_training_steps 6" in result.stdout
    assert_same_state(final(), unbroken())
    assert final()["settings"].items() >= {**TINY, "resume": True}.items()


@pytest.mark.parametrize(
    "words, was, now",
    [
        (["--seed", "3"], "--seed 0", "--seed 3"),
        (["--batch_size", "2"], "--batch_size 4", "--batch_size 2"),
        (["--channel_mults", "1", "1", "1"], "--channel_mults 1 2", "--channel_mults 1 1 1"),
        (["--ema_decay=0.5"], "--ema_decay 0.9", "--ema_decay 0.5"),
        (["--no-horizontal-flip"], "--horizontal_flip", "--no_horizontal_flip"),
    ],
)
def test_fixed_constant_given_as_another_flag_is_refused_before_faces_are_prepared(
    run, monkeypatch, words, was, now
):
    before = {path: path.read_bytes() for path in list_checkpoints(run)}
    monkeypatch.setattr("engine.session.load_faces", lambda *_, **__: pytest.fail("prepared"))
    result = run_script("train.py", "--experiment_name", "run", "--resume", *words)
    assert_error(
        result, 2, f"--resume: {list_checkpoints(run)[0]} is of a run with {was}, not {now}"
    )
    assert before == {path: path.read_bytes() for path in list_checkpoints(run)}


def test_constants_that_steer_a_run_may_change_with_a_warning(run, capsys):
    gentler = dict(learning_rate=1e-5, warmup_steps=9, max_grad_norm=0.1, dropout=0.3)
    train(tiny(resume=True, num_training_steps=7, save_every=1, **gentler))
    said = capsys.readouterr().out
    assert (
        "changed from here on: --dropout 0.3 --num_training_steps 7 --learning_rate 1e-05" in said
    )
    assert "warning: --dropout, --learning_rate, --warmup_steps, --max_grad_norm changed" in said
    assert final()["settings"]["learning_rate"] == 1e-5


def test_checkpoint_that_lacks_a_constant_takes_its_default(run, capsys):
    for path in list_checkpoints(run):
        change(path, lambda state: state["settings"].pop("horizontal_flip"))
    train(tiny(**LONGER))
    assert final()["settings"]["horizontal_flip"] is Config().horizontal_flip


def test_other_faces_are_refused(run):
    Image.new("RGB", (8, 8)).save(sorted(Path("pictures").iterdir())[0])
    with pytest.raises(UsageError, match="--path_to_data: .* was trained on other faces: 21 faces"):
        train(tiny(**LONGER))


MISFITS = [
    (lambda state: state.update(unet=[1]), "unet"),
    (lambda state: state["ema"].update(num_updates="x"), "fit"),
    (lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)), "shapes"),
]


def parts_of(state: dict) -> list[tuple]:
    inner = [(part, name) for part in ("ema", "optimizer", "scaler") for name in state[part]]
    return [(name,) for name in state if name != "format"] + inner + [("model", "conv_in.weight")]


def without(*outer: str):
    def remove(state: dict):
        for part in outer[:-1]:
            state = state[part]
        del state[outer[-1]]

    return remove


def test_part_that_is_missing_or_does_not_fit_is_one_error(run):
    path, good = list_checkpoints(run)[0], list_checkpoints(run)[0].read_bytes()
    for action, said in [*((without(*part), part[-1]) for part in parts_of(final())), *MISFITS]:
        path.write_bytes(good)
        with pytest.raises(CheckpointError, match=f"step_0*6.pt.*{said}.*Fix: "):
            change(path, action)
            train(tiny(**LONGER))


def test_resuming_in_another_precision_starts_the_loss_scale_afresh(run, monkeypatch, capsys):
    saved, config = final(), tiny()
    monkeypatch.setattr("engine.state.autocast_dtype", lambda *_: torch.float16)
    fp16 = make_state(config, CPU, unet_arguments(config))
    fp16.load_state_dict(saved)
    assert fp16.scaler.get_scale() == 2.0**16 and "afresh" in capsys.readouterr().err
    monkeypatch.setattr("engine.state.autocast_dtype", lambda *_: None)
    plain = make_state(config, CPU, unet_arguments(config))
    plain.load_state_dict(saved)
    assert capsys.readouterr().err == ""
    plain.load_state_dict({**saved, "scaler": fp16.scaler.state_dict()})
    assert plain.scaler.get_scale() == 1.0 and capsys.readouterr().err.count("\n") == 1


def files_of(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock"}


def test_finished_run_is_not_touched_by_a_resumed_or_a_new_one(run):
    before = files_of(run)
    result = run_script("train.py", "--experiment_name", "run", "--resume")
    assert result.returncode == 0 and "run has all its 6 steps" in result.stdout
    with pytest.raises(UsageError, match="--experiment_name: .*Fix: pass --resume"):
        train(tiny())
    assert files_of(run) == before


# Starts that fail ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, code, part",
    [
        (["--init_from", "nowhere"], 4, "nowhere"),
        (["--path_to_data", "nowhere"], 3, "nowhere"),
        (["--batch_size", "22"], 3, "--batch_size"),
        (["--attributes", "Smiling"], 3, "attributes"),
        (["--img_size", "63"], 2, "--img_size"),
        (["--experiment_name", "pictures/000.png"], 2, "pictures/000.png is a file"),
    ],
)
def test_failed_start_leaves_no_folder(here, words, code, part):
    assert_error(run_script("train.py", *as_flags(TINY), *words), code, part)
    assert {path.name for path in here.iterdir()} <= {"pictures", "prepared"}


def test_folder_of_another_run_is_refused_and_a_killed_one_leaves_no_lock(here):
    with FolderLock(here / "run"):
        result = run_script("train.py", *as_flags(TINY))
        assert_error(result, 2, "--experiment_name: run is in use by another run")
    in_fork(lambda: (FolderLock(here / "run").__enter__(), os.kill(os.getpid(), signal.SIGKILL)))
    train(tiny(num_training_steps=1))
    assert saved_steps() == [1]


def test_disk_without_locks_and_syncing_is_used(here, monkeypatch, capsys):
    needs_posix()
    monkeypatch.setattr("fcntl.flock", refuse(errno.ENOLCK))
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    train(tiny(num_training_steps=1))
    assert "on a disk without locks: let no second run use it" in capsys.readouterr().err


# Before the first step ---------------------------------------------------------------------------


def test_no_room_for_the_checkpoints_is_found_before_the_first_step(run, monkeypatch):
    """Those that are there already need no more."""
    session.load_faces("pictures", 8)  # they need room, too
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    needed = []
    for config in (tiny(experiment_name="new"), tiny(**LONGER)):
        with pytest.raises(ResourceError, match="9 bytes left and the checkpoints need") as error:
            train(config)
        needed.append(int(re.search("need ([0-9,]+)", str(error.value))[1].replace(",", "")))
    assert needed[0] - needed[1] == sum(path.stat().st_size for path in list_checkpoints(run))
    assert saved_steps() == [6, 3] and not saved_steps("new")


@pytest.mark.parametrize("call", ["pathlib.Path.mkdir", "torch.save", "os.replace"])
def test_folder_that_cannot_be_written_is_found_before_the_first_step(here, monkeypatch, call):
    faces = session.load_faces("pictures", 8)
    monkeypatch.setattr(session, "load_faces", lambda *_, **__: faces)
    monkeypatch.setattr("train.train_step", lambda *_: pytest.fail("a step was taken"))
    monkeypatch.setattr(call, refuse(errno.EROFS))
    with pytest.raises(ResourceError, match="cannot be written.*Read-only file system"):
        train(tiny())


def test_limit_of_file_sizes_ends_a_run_before_the_first_step(here):
    needs_posix()
    import resource

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        train(tiny(save_every=1))

    result = in_fork(work)
    assert result.returncode == 5 and "bytes needed" in result.stderr, result.stderr
    assert not saved_steps()


def test_memory_for_a_grid_is_tried_before_the_first_step_and_the_error_names_flags(here):
    words = as_flags({**TINY, "save_every": 1, "num_samples": 10**14})
    named = ("--batch_size", "--gradient_accumulation_steps", "--num_samples")
    assert_error(run_script("train.py", *words), 5, "memory", *named)
    assert not saved_steps()


def test_only_leftovers_of_its_own_are_removed(run):
    kept = [run / name for name in (".notes.tmp", "samples/.other.12.tmp")]
    gone = [run / "checkpoints" / ".step_00000009.pt.1f2e3d4c.tmp", run / ".config.json.77.tmp"]
    gone += [run / "samples" / ".step_00000003.png.7.tmp"]
    for path in kept + gone:
        path.write_text("half")
    train(tiny(**LONGER))
    assert all(path.exists() for path in kept) and not any(path.exists() for path in gone)


def test_run_says_what_it_trains_on_what_and_in_which_precision(here, capsys):
    train(tiny(mixed_precision="fp16", num_training_steps=1))
    said = capsys.readouterr().out
    used = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    assert f"note: fp16 needs a CUDA GPU; training in {used} on the cpu" in said
    assert "21 faces (1 held out), 8x8" in said and f"M weights in {used} on 1 x cpu" in said
    assert json.loads(Path("run/config.json").read_text())["batch_size"] == 4
