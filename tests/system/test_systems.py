"""Linux, macOS and Windows: nothing is used that one of them lacks. Windows is mocked: what it
lacks is taken away."""

import builtins
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, TINY, as_flags, assert_error, run_script, tiny

import sample
from engine import session
from system import cpu, files
from system.device import autocast_dtype, find_device, precision_note
from system.errors import UsageError
from train import train

PACKAGES = ("dataset", "formats", "engine", "system")
CODE = [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in ROOT.glob(f"{name}/*.py"))]
CPU = torch.device("cpu")
POSIX_MODULES = "fcntl|grp|posix|pwd|resource|termios|tty"
POSIX_CALLS = r"os\.(fork|kill\w*|getloadavg|uname|mkfifo|chown|geteuid|sched_\w+|wait\w*)\("
POSIX_SIGNALS = r"signal\.SIG(?!INT\b|TERM\b|_)"


def test_no_module_uses_what_only_posix_has():
    for path in CODE:
        text = path.read_text(encoding="utf-8")
        imports = re.search(rf"^(import|from) ({POSIX_MODULES})\b", text, flags=re.MULTILINE)
        assert not imports and not re.search(f"{POSIX_CALLS}|{POSIX_SIGNALS}", text), path


@pytest.fixture
def windows(monkeypatch):
    """No POSIX modules for our code, no opening of folders, no renaming or removing of what this
    process holds open, no signal but SIGINT and SIGTERM."""
    importing, opening, this = builtins.__import__, os.open, psutil.Process()

    def import_ours(name, namespace=None, *args, **options):
        ours = str((namespace or {}).get("__file__", "")).startswith(str(ROOT))
        if ours and re.fullmatch(POSIX_MODULES, name):
            raise ModuleNotFoundError(name)
        return importing(name, namespace, *args, **options)

    def open_file(path, *args, **options):
        if isinstance(path, str | Path) and os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opening(path, *args, **options)

    def unless_open(change):
        def changed(*paths, **options):
            for path in paths:
                held = {file.path for file in this.open_files()}
                held |= {mapped.path for mapped in this.memory_maps()}
                # filelock tries the disk out, but only where there is fcntl, so never on Windows.
                if os.path.realpath(path) in held and ".filelock-probe-" not in str(path):
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
    assert Path("samples.png").exists() and len(list(Path("run/checkpoints").iterdir())) == 2
    names = [part for path in here.rglob("*") for part in path.relative_to(here).parts]
    assert not [name for name in names if re.search(r'[<>:"|?*\\]|[. ]$', name)]


def test_mocked_windows_refuses_what_windows_refuses(here, windows):
    Path("held").write_text("a")
    Path("other").write_text("b")
    with open("held"), pytest.raises(PermissionError):
        os.replace("other", "held")
    with pytest.raises(PermissionError):
        os.open(here, os.O_RDONLY)
    with pytest.raises(ModuleNotFoundError):
        exec("import fcntl", {"__file__": files.__file__})


def test_files_are_read_and_written_in_a_named_encoding(here):
    """Windows takes another one than UTF-8 if none is named."""
    warn = {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "always::EncodingWarning"}
    result = run_script("train.py", *as_flags({**TINY, "num_training_steps": 1}), env=warn)
    assert result.returncode == 0, result.stderr
    ours = [line for line in result.stderr.splitlines() if line.startswith(str(ROOT))]
    assert not [line for line in ours if "EncodingWarning" in line]


# Threads -----------------------------------------------------------------------------------------


PLACED = """
import os, sys
import torch
from system import cpu

def masks():
    return [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]

every = os.sched_getaffinity(0)
cores = [{min(every)}, {max(every)}]
cpu.physical_cores = lambda: cores
torch.ones(1 << 20).add_(1)
with cpu.pinned_threads(torch.device("cpu")):
    assert os.sched_getaffinity(0) == cores[0], masks()
    assert cores[1] in masks(), masks()
assert os.sched_getaffinity(0) == cores[0] | cores[1], masks()
assert cores[1] not in masks() or len(every) == 1, masks()
"""


@pytest.mark.skipif(not cpu.get_cores, reason="needs Linux")
def test_each_thread_has_a_core_of_its_own_while_a_training_lasts():
    """In a process of its own: what was forked from one that has threads could not start any."""
    run = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "2"}, timeout=120)
    result = subprocess.run([sys.executable, "-c", PLACED], capture_output=True, text=True, **run)
    assert result.returncode == 0, result.stderr


def test_threads_are_left_alone_if_they_are_not_as_many_as_cores(monkeypatch):
    monkeypatch.setattr(cpu, "place_threads", lambda cores: pytest.fail(f"placed on {cores}"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for some in ([], [{0}], [{0}, {1}, {2}]):
        monkeypatch.setattr(cpu, "physical_cores", lambda some=some: some)
        with cpu.pinned_threads(CPU):
            pass
    monkeypatch.setattr(cpu, "physical_cores", lambda: [{0}, {1}])
    with cpu.pinned_threads(torch.device("cuda")):
        pass
    with pytest.raises(pytest.fail.Exception, match="placed"), cpu.pinned_threads(CPU):
        pass


def test_cores_that_run_two_threads_at_once_count_once(monkeypatch):
    siblings = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3", 4: "4-5", 5: "4-5"}
    monkeypatch.setattr(cpu, "get_cores", lambda _: {0, 1, 2, 3, 4})
    number = lambda path: int(re.search(r"cpu(\d+)/", path.as_posix())[1])  # noqa: E731
    monkeypatch.setattr(Path, "read_text", lambda path, **_: siblings[number(path)] + "\n")
    assert cpu.physical_cores() == [{0, 2}, {1, 3}, {4}]
    monkeypatch.setattr(Path, "read_text", lambda path, **_: open("/nowhere"))
    assert cpu.physical_cores() == [{0}, {1}, {2}, {3}, {4}]
    monkeypatch.setattr(cpu, "get_cores", None)
    assert cpu.physical_cores() == []


# The device --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda, mps", [(False, False), (True, False), (False, True)])
def test_auto_is_cuda_if_there_is_one_and_never_apples_gpu(monkeypatch, cuda, mps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert find_device().type == find_device("auto").type == ("cuda" if cuda else "cpu")
    assert find_device("cpu").type == "cpu"
    for name, there in (("cuda", cuda), ("mps", mps)):
        if there:
            assert find_device(name).type == name
        else:
            with pytest.raises(UsageError, match=f"--device: torch finds no {name} here"):
                find_device(name)


@pytest.mark.parametrize("asked", ["fp16", "bf16"])
def test_apples_gpu_computes_in_float32_after_a_note(asked):
    apple = torch.device("mps")
    assert autocast_dtype(asked, apple) is None
    assert "training in float32 on the mps" in precision_note(asked, None, apple)


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_device_that_is_not_there_is_one_error(here, script):
    name = "cuda" if torch.backends.mps.is_available() else "mps"
    words = as_flags(TINY) if script == "train.py" else []
    assert_error(run_script(script, *words, "--device", name), 2, "--device", name)


@pytest.mark.parametrize("name, kind", [("cpu", "cpu"), ("auto", "cuda"), ("cuda", "cuda")])
def test_a_run_is_on_the_device_that_is_asked_for(here, monkeypatch, name, kind):
    def processes(device):
        raise RuntimeError(f"on the {device.type}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(session, "Processes", processes)
    with pytest.raises(RuntimeError, match=f"on the {kind}"):
        train(tiny(device=name))
