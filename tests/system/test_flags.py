"""The command lines: what --help says, how flags become constants, how a command ends."""

import errno
import inspect
import math
import os
import re
import signal
import sys
import threading
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from conftest import TINY, as_flags, needs_posix, refuse, run_script, tiny

from convert import ConvertConfig
from evaluate import EvaluateConfig
from sample import SampleConfig
from system import flags
from system.errors import UsageError
from train import DEMO, Config, check_config

PRESETS = {"demo": ("train on synthetic faces", DEMO)}


# --help ------------------------------------------------------------------------------------------


def test_help_of_train_is_grouped_and_says_every_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run_script("train.py", "--help")
    assert result.returncode == 0 and "--demo" in result.stdout
    titles = re.findall(r"^    # (\w+)$", inspect.getsource(Config), re.MULTILINE)
    assert re.findall(r"(\w+) options", result.stdout) == [title.lower() for title in titles]
    assert "(default: )" not in result.stdout and "None" not in result.stdout
    for name, value in asdict(Config()).items():
        assert f"--{name}" in result.stdout
        if isinstance(value, float | int) and not isinstance(value, bool):
            assert f"(default: {value})" in result.stdout, name


@pytest.mark.parametrize("cls", [Config, SampleConfig, EvaluateConfig, ConvertConfig])
def test_every_flag_has_its_comment_as_help_text(cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        flags.parse(cls, ["--help"], "")
    shown = " ".join(re.sub("[^ -~]", " ", capsys.readouterr().out).split())
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.MULTILINE))
    for field in fields(cls):
        assert comments[field.name] in shown, f"--{field.name}"


# From flags to constants -------------------------------------------------------------------------


def test_flags_give_the_constants_that_the_dataclass_has():
    assert flags.parse(Config, as_flags(TINY), "") == tiny()
    words = [word.replace("_", "-") if word.startswith("--") else word for word in as_flags(TINY)]
    assert flags.parse(Config, words, "") == tiny()


def test_flag_beside_demo_wins_over_it():
    demo = replace(Config(), **DEMO)
    assert flags.parse(Config, ["--demo"], "", PRESETS) == demo
    given = flags.parse(Config, ["--batch_size", "7", "--demo"], "", PRESETS)
    assert given == replace(demo, batch_size=7)
    assert flags.parse(Config, [], "", PRESETS) == Config()
    check_config(Config())
    check_config(demo)


def test_flags_that_are_given_are_told_from_their_values():
    words = ["--no-compile", "--seed=3", "--experiment_name", "dropout", "--demo"]
    assert flags.given(Config, words) == {"compile", "seed", "experiment_name"}


@pytest.mark.parametrize(
    "words, part",
    [
        (["--batch_size", "many"], "--batch_size"),
        (["--no_such_flag", "1"], "--no_such_flag"),
        (["--optimizer", "sgd"], "--optimizer"),
    ],
)
def test_flag_that_does_not_parse_exits_with_code_2_and_is_named(here, words, part):
    result = run_script("train.py", *words)
    assert result.returncode == 2 and part in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in here.iterdir()] == ["pictures"]


@pytest.mark.parametrize(
    "changes",
    [
        {"img_size": 63},
        {"batch_size": -1},
        {"learning_rate": math.nan},
        {"learning_rate": 0.0},
        {"ema_decay": 1.0},
        {"attribute_dropout": 1.5},
        {"channels": 6},
        {"norm_groups": 3},
        {"optimizer": "sgd"},
        {"head_dim": 12, "channels": 40},
        {"channel_mults": (0, 1)},
        {"seed": 2**64},
        {"num_training_steps": 10**400},
        {"img_size": "64"},
        {"attributes": ("Smiling", "Smiling")},
        {"experiment_name": "a\0b"},
        {"experiment_name": "a/.."},
        {"experiment_name": "."},
        {"experiment_name": "pictures"},
    ],
)
def test_constant_that_cannot_be_is_one_line_that_names_the_flag(changes):
    with pytest.raises(UsageError, match=f"^--{list(changes)[0]}: [^\n]*Fix: [^\n]*$") as error:
        check_config(tiny(**changes))
    assert len(str(error.value)) < 250


# How a command ends ------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """What `flags.run` changes for the process is given back."""
    for module, name in ((sys, "stdout"), (sys, "stderr"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def no_more_threads():
    raise RuntimeError("can't start new thread")


MEMORY = "error: memory: .*Fix: lower --batch_size"


@pytest.mark.parametrize(
    "main, said",
    [
        (lambda: torch.empty(10**15), MEMORY),
        (lambda: torch.empty(10**10, 10**10), MEMORY),
        (lambda: np.empty(10**16), MEMORY),
        (lambda: bytearray(10**16), MEMORY),
        (no_more_threads, MEMORY),
        (refuse(errno.EMFILE, "a.py"), "error: a.py: Too many open files.*Fix: "),
        (refuse(errno.EACCES, None), "error: the system: Permission denied.*Fix: "),
        (refuse(errno.ENAMETOOLONG, "a" * 5000), "error: aaa+: File name too long.*Fix: "),
    ],
)
def test_what_the_machine_refuses_is_one_line(command, capfd, main, said):
    with pytest.raises(SystemExit) as stop:
        flags.run(main, fix="lower --batch_size")
    (line,) = capfd.readouterr().err.splitlines()
    assert stop.value.code == 5 and re.match(said, line), line


def test_current_folder_that_was_removed_is_an_error(tmp_path, command, capfd, monkeypatch):
    needs_posix()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    os.rmdir(tmp_path / "gone")
    with pytest.raises(SystemExit) as stop:
        flags.run(lambda: pytest.fail("it began"))
    assert stop.value.code == 5 and ". Fix: " in capfd.readouterr().err
