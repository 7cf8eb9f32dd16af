"""Linux, macOS and Windows: nothing that one of them lacks is used. Windows is played here, by
taking away what it does not have."""

import builtins
import os
import re
import signal
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY, flags, run_script, tiny

import files
import sample
from train import train

CODE = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]
POSIX_MODULES = "fcntl|grp|posix|pwd|resource|termios|tty"
POSIX_CALLS = r"os\.(fork|kill\w*|getloadavg|uname|mkfifo|chown|geteuid|sched_\w+|wait\w*)\("
POSIX_SIGNALS = r"signal\.SIG(?!INT\b|TERM\b)"


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_no_module_uses_what_only_posix_has(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(rf"^(import|from) ({POSIX_MODULES})\b", text, flags=re.MULTILINE)
    assert not re.search(POSIX_CALLS, text) and not re.search(POSIX_SIGNALS, text)


@pytest.fixture
def windows(monkeypatch):
    """No POSIX modules for our code, no opening of folders, no renaming or removing of what this
    process holds open, no signal but SIGINT and SIGTERM."""
    importing, opening, this = builtins.__import__, os.open, psutil.Process()

    def import_ours(name, namespace=None, *args):
        ours = str((namespace or {}).get("__file__", "")).startswith(str(ROOT))
        if ours and re.fullmatch(POSIX_MODULES, name):
            raise ModuleNotFoundError(name)
        return importing(name, namespace, *args)

    def open_file(path, *args, **options):
        if isinstance(path, str | Path) and os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opening(path, *args, **options)

    def unless_open(change):
        def changed(*paths, **options):
            held = {file.path for file in this.open_files()}
            held |= {mapped.path for mapped in this.memory_maps()}
            for path in paths:
                if os.path.realpath(path) in held:
                    raise PermissionError(32, "used by another process", str(path))
            return change(*paths, **options)

        return changed

    monkeypatch.setattr(builtins, "__import__", import_ours)
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.delattr(os, "O_DIRECTORY")
    for name in ("fork", "kill", "killpg", "getloadavg", "uname"):
        monkeypatch.delattr(os, name)
    for name in ("replace", "rename", "unlink", "remove"):
        monkeypatch.setattr(os, name, unless_open(getattr(os, name)))
    for number in set(signal.Signals) - {signal.SIGINT, signal.SIGTERM}:
        monkeypatch.delattr(signal, number.name)


def test_run_trains_resumes_and_samples_without_posix(here, windows):
    train(tiny(num_training_steps=3, save_every=1, keep_checkpoints=1))
    train(tiny(num_training_steps=6, save_every=1, keep_checkpoints=1, resume=True))
    sample.sample(sample.SampleConfig(checkpoint="run", num_images=4, steps=2))
    assert Path("samples.png").exists() and len(list(Path("run/checkpoints").iterdir())) == 1
    names = [part for path in here.rglob("*") for part in path.relative_to(here).parts]
    assert not [name for name in names if re.search(r'[<>:"|?*\\]|[. ]$', name)]


def test_played_windows_refuses_what_windows_refuses(here, windows):
    Path("held").write_text("a")
    Path("other").write_text("b")
    with open("held"), pytest.raises(PermissionError):
        os.replace("other", "held")
    with pytest.raises(PermissionError):
        os.open(here, os.O_RDONLY)
    with pytest.raises(ModuleNotFoundError):
        exec("import fcntl", {"__file__": files.__file__})


def test_files_are_read_and_written_in_a_named_encoding(here):
    """Windows takes another one than UTF-8 where none is named."""
    warn = {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "always::EncodingWarning"}
    result = run_script("train.py", *flags({**TINY, "num_training_steps": 1}), env=warn)
    assert result.returncode == 0, result.stderr
    ours = [line for line in result.stderr.splitlines() if line.startswith(str(ROOT))]
    assert not [line for line in ours if "EncodingWarning" in line]
