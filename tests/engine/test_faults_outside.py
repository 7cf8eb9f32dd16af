"""Faults from outside a run: the disk under its log, its folder taken away, damaged checkpoints,
signals, the environment, whoever reads what it says."""

import builtins
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMANDS, ROOT, TINY, as_flags, needs_posix, run_script, tiny

import train as train_module
from diffusion import Diffusion
from engine import log
from system import flags
from system.errors import Interrupted, ResourceError, UsageError
from system.files import FolderLock
from train import Config, check_config, train
from utils import checkpoint_path, list_checkpoints, load_checkpoint


def steps(folder: str = "run") -> list[int]:
    return [int(path.stem[5:]) for path in list_checkpoints(Path(folder))]


def before_step(monkeypatch, number: int, action) -> None:
    """Call `action` while the step of this number is on."""
    real, calls = Diffusion.loss, iter(range(1, 1000))

    def loss(*arguments):
        if next(calls) == number:
            action()
        return real(*arguments)

    monkeypatch.setattr(Diffusion, "loss", loss)


# Checkpoints -------------------------------------------------------------------------------------


def test_damaged_newer_checkpoints_never_cost_good_ones(here, capsys):
    train(tiny(num_training_steps=3, save_every=1))
    for step in (100, 101):
        half = checkpoint_path(here / "run", 3).read_bytes()[:-100]
        checkpoint_path(here / "run", step).write_bytes(half)
    train(tiny(resume=True, num_training_steps=5, save_every=1, keep_checkpoints=2))
    assert steps() == [5, 4, 1]  # the first guides
    assert all(load_checkpoint(path) for path in list_checkpoints(here / "run"))
    aside = sorted(path.name for path in (here / "run" / "checkpoints").glob("*.damaged"))
    assert aside == ["step_00000100.pt.damaged", "step_00000101.pt.damaged"]
    assert capsys.readouterr().err.count("taking step_00000003.pt") == 2


def test_checkpoints_already_written_count_as_room_for_them(here, monkeypatch):
    train(tiny(num_training_steps=3, save_every=1))
    size = checkpoint_path(here / "run", 3).stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 2 * size))
    train(tiny(resume=True, num_training_steps=4))
    assert steps() == [4, 3, 2, 1]  # the first guides


def test_checkpoint_that_cannot_be_removed_ends_nothing(here, monkeypatch, capsys):
    real = Path.unlink

    def unlink(self, *arguments, **options):
        if self.suffix == ".pt":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    train(tiny(save_every=1, keep_checkpoints=1))
    assert 6 in steps() and "step_00000001.pt cannot be removed" in capsys.readouterr().err


def test_advice_after_a_divergence_can_be_followed(here, capsys):
    train(tiny(num_training_steps=3))
    gentler = dict(learning_rate=1e-5, warmup_steps=9, lr_schedule="cosine", max_grad_norm=0.1)
    train(tiny(resume=True, dropout=0.3, **gentler))
    text = capsys.readouterr().out
    assert "learning_rate was 0.001, is 1e-05" in text and steps() == [6, 3]
    assert "from step 3 on, another run" in text


# The log and the folder --------------------------------------------------------------------------


def test_log_that_cannot_be_written_costs_no_step_and_is_said_once(here, monkeypatch, capsys):
    (here / "run" / "loss.png" / "in_the_way").mkdir(parents=True)
    (here / "run" / "samples").write_text("a file")
    real = io.open

    def full(file, *arguments, **options):
        if "tfevents" in str(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", full)
    monkeypatch.setattr(io, "open", full)
    train(tiny(log_every=1, sample_every=1, save_every=1))
    assert steps() == [6, 5, 4, 2]
    errors = capsys.readouterr().err
    for what in ("TensorBoard's file", "loss.png", "samples/"):
        assert errors.count(f"{what} is not written") == 1, errors


def test_step_is_saved_before_it_is_logged(here, monkeypatch):
    needs_posix()
    monkeypatch.setattr(log.RunLog, "scalars", lambda *_: os._exit(137))
    pid = os.fork()
    if pid == 0:
        train(tiny(save_every=1, log_every=1))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 137
    assert steps() == [1] and load_checkpoint(checkpoint_path(here / "run", 1))["history"]


def test_folder_removed_under_a_run_is_made_again(here, monkeypatch, capsys):
    before_step(monkeypatch, 4, lambda: shutil.rmtree("run"))
    train(tiny())
    assert steps() == [6] and "run was removed or renamed" in capsys.readouterr().err


def test_run_whose_folder_is_now_another_s_stops_and_touches_nothing(here, monkeypatch):
    def take():
        shutil.rmtree("run")
        (here / "run" / "checkpoints").mkdir(parents=True)
        for name in ("lock", "lock.pid", "checkpoints/step_00000009.pt"):
            (here / "run" / name).write_text("1\n")

    before_step(monkeypatch, 4, take)
    with pytest.raises(UsageError, match="now the folder of another run"):
        train(tiny(keep_checkpoints=1))
    assert steps() == [9]


def test_only_leftovers_of_its_own_are_removed(here):
    train(tiny(num_training_steps=3))
    kept = [here / "run" / name for name in (".notes.tmp", "samples/.other.12.tmp")]
    gone = [here / "run" / name for name in (".loss.png.7.tmp", "samples/.step_00000003.png.7.tmp")]
    for path in kept + gone:
        path.write_text("half")
    train(tiny(resume=True))
    assert all(path.exists() for path in kept) and not any(path.exists() for path in gone)


@pytest.mark.parametrize("name", ["./", "..", "a/..", "/"])
def test_experiment_needs_a_folder_of_its_own(name):
    with pytest.raises(UsageError, match="--experiment_name"):
        check_config(Config(experiment_name=name))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_disk_without_locks_that_cannot_be_synced_is_used_with_a_line(
    here, monkeypatch, capsys, number
):
    needs_posix()
    import fcntl

    def refuse(code):
        def call(*_):
            raise OSError(code, os.strerror(code))

        return call

    monkeypatch.setattr(fcntl, "flock", refuse(number))
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    train(tiny())
    errors = capsys.readouterr().err
    assert steps() == [6, 3] and "its disk cannot be synced" in errors and "lock files" in errors


def test_folder_that_is_held_is_refused_whatever_its_pid_file_holds(tmp_path):
    with FolderLock(tmp_path):
        (tmp_path / "lock.pid").write_bytes(b"\xff\xfe")
        with pytest.raises(UsageError, match="is in use by the run with pid"):
            FolderLock(tmp_path).__enter__()


def test_disk_that_turns_read_only_is_named_by_what_failed_first(here, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def turn():
        for call in ("replace", "unlink"):
            monkeypatch.setattr(os, call, refuse)
        monkeypatch.setattr(Path, "unlink", refuse)

    before_step(monkeypatch, 2, turn)
    with pytest.raises(ResourceError, match="step_00000003.pt: cannot be written"):
        train(tiny())


# Signals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGHUP],
        [signal.SIGUSR1],
        [signal.SIGUSR2],
        [signal.SIGXCPU],
        [signal.SIGALRM],
        [signal.SIGHUP, signal.SIGHUP],
        [signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM],
    ],
)
def test_signals_that_announce_an_end_save_and_stop_however_often_they_come(
    here, monkeypatch, numbers
):
    needs_posix()
    before_step(monkeypatch, 2, lambda: [os.kill(os.getpid(), number) for number in numbers])
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is, and stays, ignored
        try:
            train(tiny(save_every=100))
        except Interrupted as stop:
            os._exit(stop.exit_code)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + numbers[0]
    assert steps() == [2]


@pytest.mark.parametrize("script", COMMANDS)
def test_ctrl_c_while_importing_ends_without_a_traceback(script):
    """So it has found its own modules, though Python hides the folder that they lie in."""
    needs_posix()
    command = [sys.executable, "-X", "importtime", str(ROOT / script), "--help"]
    options = dict(stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(command, env=os.environ | {"PYTHONSAFEPATH": "1"}, **options)
    for line in process.stderr:
        if "numpy" in line:
            break
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.stderr.read() and process.wait(timeout=60) == 130


# Memory and numbers ------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """What flags.run changes is given back."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def no_more_threads():
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    "take",
    [
        lambda: torch.empty(10**15),
        lambda: torch.empty(10**10, 10**10),
        lambda: np.empty(10**16),
        lambda: bytearray(10**16),
        no_more_threads,
    ],
)
def test_memory_that_does_not_suffice_is_one_line(command, capfd, take):
    with pytest.raises(SystemExit) as stop:
        flags.run(take)
    lines = capfd.readouterr().err.splitlines()
    assert stop.value.code == 5 and len(lines) == 1 and ". Fix: " in lines[0]


@pytest.mark.parametrize(
    "number, name, words",
    [
        (errno.EMFILE, "a.py", "a.py: Too many open files"),
        (errno.EACCES, None, "the system: Permission denied"),
        (errno.ENAMETOOLONG, "a" * 5000, "aaa: File name too long"),
    ],
)
def test_what_the_system_refuses_is_one_line_wherever_it_does(command, capfd, number, name, words):
    def refuse():
        raise OSError(number, os.strerror(number), name)

    with pytest.raises(SystemExit) as stop:
        flags.run(refuse)
    assert stop.value.code == 5 and words in capfd.readouterr().err


def test_current_folder_that_was_removed_is_named(tmp_path, command, capfd, monkeypatch):
    needs_posix()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    os.rmdir(tmp_path / "gone")
    with pytest.raises(SystemExit) as stop:
        flags.run(lambda: pytest.fail("it began"))
    assert stop.value.code == 2 and "the current folder: was removed" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE"])
def test_launcher_that_is_not_there_is_named(here, command, monkeypatch, name):
    monkeypatch.setitem(os.environ, name, "4" if name == "PMI_SIZE" else "many")
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "localhost")
    if name == "PMI_SIZE":
        monkeypatch.delitem(os.environ, "MASTER_ADDR")
    with pytest.raises(UsageError, match="launcher: .*torchrun"):
        train(tiny())


def test_grid_that_does_not_fit_is_found_before_the_first_step(here, monkeypatch):
    monkeypatch.setattr(train_module, "train_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(MemoryError):
        train(tiny(num_samples=10**14))


def test_nul_in_a_name_is_refused():
    with pytest.raises(UsageError, match="--experiment_name: .*NUL"):
        check_config(tiny(experiment_name="a\0b"))


@pytest.mark.parametrize("name, value", [("seed", 2**64), ("num_training_steps", 10**400)])
def test_numbers_that_no_machine_holds_are_refused(name, value):
    with pytest.raises(UsageError, match=f"--{name}: .*below 2") as error:
        check_config(tiny(**{name: value}))
    assert len(str(error.value)) < 200


def test_names_that_are_not_utf_8_are_trained_under(here):
    name = os.fsdecode(b"run\xff")
    train(tiny(experiment_name=name, num_training_steps=3))
    train(tiny(experiment_name=name, resume=True))
    assert steps(name) == [6, 3]


# Who reads, and the environment ------------------------------------------------------------------

SHORT = as_flags({**TINY, "num_training_steps": 2, "log_every": 1})
ENVIRONMENT = {"MPLBACKEND": "bogus", "PYTHONSAFEPATH": "1", "WORLD_SIZE": "1", "RANK": "0"}
ENVIRONMENT |= {"ACCELERATE_DYNAMO_BACKEND": "inductor", "COLUMNS": "1"}


@pytest.mark.parametrize("where", [">&- 2>/dev/full", "2>&1 | true"])
def test_run_goes_on_where_nobody_reads(here, where):
    words = [sys.executable, str(ROOT / "train.py"), *SHORT]
    line = "set -o pipefail; " + " ".join(f"'{word}'" for word in words) + " " + where
    assert subprocess.run(["bash", "-c", line], timeout=120).returncode == 0
    assert steps() == [2]


def test_terminal_of_ascii_shows_every_line_and_leftover_variables_change_nothing(here):
    words = [*SHORT, "--resume", "--experiment_name", "Läufe"]
    result = run_script("train.py", *words, env={"PYTHONIOENCODING": "ascii", **ENVIRONMENT})
    assert result.returncode == 0, result.stderr
    assert "nothing to resume in L\\xe4ufe" in result.stdout  # what cannot be shown is escaped
    assert "step 2/2" in result.stdout and steps("Läufe") == [2]
    assert "warning" not in result.stderr and (here / "Läufe" / "loss.png").exists()


def test_help_in_a_terminal_of_one_column_ends(command, monkeypatch, capfd):
    monkeypatch.setitem(os.environ, "COLUMNS", "1")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it goes on for ever"))
    signal.alarm(20)
    with pytest.raises(SystemExit):
        flags.run(lambda: flags.parse(Config, ["--help"], ""))
    signal.alarm(0)
    assert "--experiment_name" in capfd.readouterr().out


def test_mistake_is_named_on_a_terminal_of_ascii(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with pytest.raises(UsageError, match="^--bogus: unrecognized options: --bogus. Fix: "):
        flags.parse(Config, ["--bogus"], "")
