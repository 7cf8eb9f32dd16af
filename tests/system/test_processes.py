"""One run in several processes: the same numbers however it is split, and a common end.

Most tests fork their processes, which saves the seconds of importing torch. What depends on the
launcher starts torchrun; the slow tests do so as on two machines, in two folders."""

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import (
    ROOT,
    TINY,
    as_flags,
    assert_same_state,
    final,
    fork,
    needs_posix,
    saved_steps,
    tiny,
    write_pictures,
)
from moments import appears, die, in_exchange, in_sampling, in_save, in_step, pause

from engine.log import RunLog
from evaluate import EvaluateConfig, evaluate
from sample import SampleConfig, sample
from system import flags
from system.errors import DataError, OtherFailed, UsageError
from system.processes import Processes
from train import Config, train

MUON = dict(optimizer="muon", learning_rate=1e-2)
SPLIT = dict(  # 6 updates of 4 micro-batches, with everything that is random
    path_to_data="synthetic",
    attributes=("Smiling", "Eyeglasses"),
    attribute_dropout=0.3,
    dropout=0.3,
    batch_size=2,
    log_every=1,
)
LONG = dict(batch_size=2, num_training_steps=100_000, save_every=100_000, log_every=1)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    needs_posix()
    monkeypatch.setattr("dataset.sources.NUM_SYNTHETIC", 60)


FORKED: list[int] = []  # by the test that runs
LAUNCHED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    for pid in FORKED:
        with contextlib.suppress(ChildProcessError):  # it has been waited for
            if not os.waitpid(pid, os.WNOHANG)[0]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    for process in (each for each in LAUNCHED if each.poll() is None):
        process.terminate()  # and it ends its own
        process.wait(60)
    FORKED.clear(), LAUNCHED.clear()


# Processes ---------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def machines(*counts: int) -> list[Path]:
    """The folders of some machines, each with so many images."""
    folders = [Path(f"machine{i}").absolute() for i in range(len(counts))]
    for folder, count in zip(folders, counts, strict=True):
        folder.mkdir()
        write_pictures(folder, count)
    return folders


def start(count: int, work, folders=None, **variables) -> list[int]:
    """Start processes that each do work(rank) as a script would; returns their pids. What they
    print is in rank0.txt, rank1.txt, ...

    folders: of each, if each stands for a machine; variables: of the environment."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | variables
    variables |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": 1 if folders else count}

    def begin(rank):
        mine = {"RANK": rank, "LOCAL_RANK": 0 if folders else rank}
        os.environ.update({k: str(v) for k, v in (variables | mine).items()})
        os.chdir(folders[rank] if folders else ".")
        RunLog.plot_loss = lambda self: None  # half of a tiny run's time
        flags.run(lambda: work(rank))

    pids = []
    for rank in range(count):
        with open(f"rank{rank}.txt", "wb") as file:
            pids.append(fork(lambda rank=rank: begin(rank), file, file))
    FORKED.extend(pids)
    return pids


def join(pids: list[int], seconds: float = 60) -> list[int]:
    """The exit codes of the processes, which must all end within so many seconds."""
    codes, end = {}, time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            if (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
        assert time.monotonic() < end, f"{codes} of {pids} after {seconds} s\n{said()}"
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def said(rank: int | None = None) -> str:
    """What a process has printed, or all have."""
    ranks = sorted(Path().glob("rank*.txt")) if rank is None else [Path(f"rank{rank}.txt")]
    return "".join(path.read_text() for path in ranks)


def complaints(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("error", "Traceback"))]


def training(config: Config, moment: Callable | None = None, *details) -> Callable:
    """What `start` lets each process do: train, with what a function of moments.py arranges."""

    def work(_):
        if moment:
            moment(*details)
        train(config)

    return work


def finish(count: int, config: Config, **options) -> None:
    assert join(start(count, training(config), **options)) == [0] * count, said()


# The split ---------------------------------------------------------------------------------------


def split(count: int, **changes):
    """The run of SPLIT by so many processes."""
    return tiny(**{**SPLIT, "gradient_accumulation_steps": 4 // count, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(config, count): the end of an unbroken run by so many processes."""
    ends = {}

    def end(config: Config, count: int = 2) -> dict:
        if (config, count) not in ends:
            folder = tmp_path_factory.mktemp("whole")
            write_pictures(folder, 22)
            with contextlib.chdir(folder):
                finish(count, config)
                ends[config, count] = final()
        return ends[config, count]

    return end


def assert_close(a: dict, b: dict) -> None:
    """The runs differ by no more than float32 rounds."""
    losses = [[loss for _, loss in run["history"]] for run in (a, b)]
    assert max(abs(x - y) / x for x, y in zip(*losses, strict=True)) < 1e-5
    for name, weight in a["model"].items():
        torch.testing.assert_close(weight, b["model"][name], rtol=1e-3, atol=1e-5)


def test_a_run_is_the_same_split_among_1_2_or_4_processes(whole):
    alone = whole(split(1), 1)
    for count in (2, 4):
        assert_close(alone, whole(split(count), count))


def test_a_killed_run_of_4_processes_goes_on_with_4_or_with_fewer(here, whole):
    codes = join(start(4, training(split(4), in_step, 4, 2, die)))
    assert codes == [5, 5, -signal.SIGKILL, 5] and saved_steps() == [3]
    shutil.copytree("run", "fewer")
    finish(4, split(4, resume=True))
    assert_same_state(whole(split(4), 4), final())  # bit for bit
    finish(2, split(2, experiment_name="fewer", resume=True))
    assert_close(whole(split(4), 4), final("fewer"))
    with pytest.raises(UsageError, match="has 4 micro-batches, .* 1. Fix: .* 4 on 1 processes"):
        train(split(4, resume=True))


def test_two_machines_need_no_disk_in_common(here, whole):
    """Each process has a folder of its own, and only rank 0's ever holds the run."""
    config, folders = dict(MUON, batch_size=2), machines(22, 22)
    join(start(2, training(tiny(**config), in_step, 4, 1, die), folders))
    finish(2, tiny(**config, resume=True), folders=folders)
    assert "resumed" in said(0) and said(1) == ""
    assert not (folders[1] / "run").exists() and (folders[1] / "prepared").exists()
    assert_same_state(whole(tiny(**config)), final("machine0/run"))


@pytest.mark.parametrize(
    "changes, part", [({"seed": 1}, "seed"), ({"init_from": "no"}, "init_from"), ({}, "faces")]
)
def test_processes_that_do_not_agree_say_what_differs(here, changes, part):
    folders = machines(22, 22 if changes else 30)
    pids = start(2, lambda rank: train(tiny(**(changes if rank else {}))), folders)
    assert join(pids) == [2, 2], said()
    for rank in (0, 1):  # on each machine
        (line,) = complaints(said(rank))
        assert line.startswith(f"error: rank {rank}: {part}: is ") and "in rank 1, but" in line


def test_more_processes_than_gpus_are_refused_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local, raised in enumerate((UsageError, OtherFailed, OtherFailed)):
        for name, value in dict(WORLD_SIZE=3, LOCAL_WORLD_SIZE=3, LOCAL_RANK=local).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(raised, match=None if local else "3 processes for 2 GPUs"):
            Processes(torch.device("cuda"))


# The end -----------------------------------------------------------------------------------------

PLACES = {
    "a step": (in_step, 3, 0, pause),
    "a save": (in_save, pause),
    "the sampling": (in_sampling, pause),
}
QUICK = [("a step", "rank 1"), ("a save", "all twice"), ("the sampling", "rank 0")]
REST = [(p, to) for p in PLACES for to in ("rank 0", "rank 1", "all", "all twice")]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in REST if case not in QUICK]


@pytest.mark.parametrize("place, to", [*QUICK, *SLOW])
def test_a_signal_to_any_process_saves_for_all(here, place, to):
    every = {"a save": "save_every", "the sampling": "sample_every"}.get(place)
    config = tiny(**LONG | ({every: 3} if every else {}))
    pids = start(2, training(config, *PLACES[place]))
    appears("busy")
    targets = {"rank 0": pids[:1], "rank 1": pids[1:]}.get(to, pids)
    for _ in range(2 if to == "all twice" else 1):
        for pid in targets:
            os.kill(pid, signal.SIGTERM)
    Path("go").touch()
    assert join(pids) == [143, 143], said()
    assert final()["step"] == saved_steps()[0] >= 3
    assert said().count("is saved") == 1 and not complaints(said()), said()


def test_a_signal_while_the_faces_are_prepared_ends_all(here, monkeypatch):
    monkeypatch.setattr("engine.session.load_faces", lambda *_, **__: pause())
    pids = start(2, training(tiny(**LONG)))
    appears("busy")
    os.kill(pids[0], signal.SIGTERM)
    assert join(pids) == [143, 5] and not saved_steps()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_all(here, rank):
    """The other one says that a process has ended, and what to do then."""

    def damaged():
        raise DataError("images/7.png", "is damaged", "remove it")

    codes = join(start(2, training(tiny(**LONG), in_step, 3, rank, damaged)))
    assert codes[rank] == 3 and codes[1 - rank] == 5
    assert len(complaints(said())) == 2 and "images/7.png: is damaged" in said(rank)
    assert "error: rank" in said(1 - rank) and "continue with --resume" in said(1 - rank)


@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_before_any_exchange_goes_on_with_the_launchers_old_store(here, stride):
    """As torchrun restarts it: the store it has still holds what the dead ones have written."""

    def work(name, number=-1, victim=-1):
        def run(rank):
            count = in_exchange(number if rank == victim else -1, die)
            train(tiny(**MUON, experiment_name=name, batch_size=2, resume=True))
            Path("count").write_text(str(count[0]))

        return run

    assert join(start(2, work("whole"))) == [0, 0]
    cases = [(rank, at) for at in range(int(Path("count").read_text())) for rank in (0, 1)]
    assert len(cases) > 60
    for rank, at in cases[::stride]:
        store = dist.TCPStore("127.0.0.1", 0, None, True)
        launcher = dict(MASTER_PORT=store.port, TORCHELASTIC_USE_AGENT_STORE="True")
        pids = start(2, work(f"{rank}_{at}", at, rank), **launcher)
        assert join([pids[rank]]) == [-signal.SIGKILL]
        if at < 2:  # the other one does not know it yet: the launcher ends it
            os.kill(pids[1 - rank], signal.SIGKILL)
        assert join([pids[1 - rank]])[0] in (0, 5, -signal.SIGKILL), said()
        assert "Traceback" not in said()
        assert join(start(2, work(f"{rank}_{at}"), **launcher)) == [0, 0], said()
        assert_same_state(final("whole"), final(f"{rank}_{at}"))


def test_processes_whose_launcher_was_killed_save_and_end(here):
    work = training(tiny(**LONG), in_step, 3, 0, pause)
    alive, held = os.pipe()  # held by the launcher and its processes until they end
    launcher = os.fork()
    if launcher == 0:
        Path("pids").write_text(" ".join(map(str, start(2, work, TORCHELASTIC_RUN_ID="any"))))
        signal.pause()
    os.close(held)
    appears("busy")
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    Path("go").touch()
    ended = select.select([alive], [], [], 60)[0]
    for pid in map(int, [] if ended else Path("pids").read_text().split()):
        os.kill(pid, signal.SIGKILL)
    assert ended and os.read(alive, 1) == b"", said()
    os.close(alive)
    assert "step 4 is saved" in said(0) and saved_steps() == [4]


def test_a_launcher_that_kills_too_soon_is_named(capsys, monkeypatch):
    processes = Processes(torch.device("cpu"))
    processes.check_grace(31)  # not started by torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    processes.check_grace(29)
    assert not capsys.readouterr().out
    processes.check_grace(31)
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=62" in capsys.readouterr().out


# The launcher ------------------------------------------------------------------------------------

TORCHRUN = "torch.distributed.run"

SCRIPT = """import os, signal, sys
from pathlib import Path
rank, killed = os.environ["RANK"], Path({here!r}) / "killed"
Path({here!r}, "pid" + rank).write_text(str(os.getpid()))
def die():
    if not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
if {importing!r} == rank:
    die()
sys.path[:0] = [{root!r}, {root!r} + "/tests/system"]
import moments, train
from engine.log import RunLog
from system import flags
RunLog.plot_loss = lambda self: None
{body}
flags.run(train.main)
"""


def launch(config: dict, options: str, body="", importing="", cwd=".", module=TORCHRUN):
    """Start `torchrun train.py`, changed by the lines of `body`; in the process of the rank
    `importing` it dies, once, before it has imported anything."""
    script = Path(cwd).absolute() / "changed.py"
    here = str(Path().absolute())
    script.write_text(SCRIPT.format(root=str(ROOT), body=body, importing=importing, here=here))
    command = [sys.executable, "-m", module, *options.split(), str(script)]
    command += as_flags({**TINY, "device": "cpu", "resume": True, **config})
    slurm = dict(SLURM_PROCID=1, SLURM_LOCALID=0, SLURM_NTASKS=2, SLURM_NODEID=1, SLURM_NNODES=2)
    variables = dict(OMP_NUM_THREADS=1, **slurm)  # as `srun torchrun` has them
    variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = 1  # or c10d loses a machine that returns
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, env=environment, start_new_session=True, cwd=cwd, **pipes)
    LAUNCHED.append(process)
    return process


def test_torchrun_restarts_a_killed_run_and_forwards_a_schedulers_sigterm(here, whole):
    """Restarted and stopped again, the run ends as one that never was."""
    config = dict(batch_size=2, num_training_steps=9)
    body = "moments.in_step(4, 1, die)\n"
    body += "if killed.exists(): moments.in_step(6, 0, moments.await_signal)"
    options = f"--nproc_per_node 2 --max-restarts 3 --master_port {free_port()}"
    process = launch(config, options, body)
    appears("busy", 300)
    os.kill(process.pid, signal.SIGTERM)
    text = process.communicate(timeout=300)[0]
    assert process.returncode != 0 and "resumed run" in text, text
    assert "step 7 is saved" in text, text
    finish(2, tiny(**config, resume=True))
    assert_same_state(whole(tiny(**config)), final())


# Two machines: the options of each, and what happens to one of them.
OPTIONS = {
    "static": "--nnodes 2 --node_rank {i} --nproc_per_node 1 --max-restarts 3"
    " --master_addr 127.0.0.1 --master_port {port}",
    "c10d": "--nnodes 2 --nproc_per_node 1 --max-restarts 3 --local_addr 127.0.0.1"
    " --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{port} --rdzv_id any",
    "accelerate": "--multi_gpu --num_machines 2 --machine_rank {i} --num_processes 2"
    " --main_process_ip 127.0.0.1 --main_process_port {port}",
}
# A lost machine 0 held torchrun's own store: both machines must be started again.
FAULTS = [("killed in a step", 0), ("killed in a step", 1), ("killed while importing", 0)]
FAULTS += [("killed while importing", 1), ("machine lost", 1)]
CASES = [(launcher, *fault) for launcher in ("static", "c10d") for fault in FAULTS]
CASES += [("accelerate", "nothing", 0)]


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("launcher, fault, machine", CASES)
@pytest.mark.parametrize("disks", ["one disk", "own disks"])
def test_two_machines_go_on_after(here, whole, launcher, disks, fault, machine):
    folders = machines(22, 22)
    if disks == "one disk":
        folders[1] = folders[0]
    port, body, importing = free_port(), "", ""
    if fault == "killed while importing":
        importing = str(machine)
    elif fault == "killed in a step":
        body = f"moments.in_step(4, {machine}, die)"
    elif fault == "machine lost":
        body = "stop = lambda: killed.exists() or (killed.touch(), moments.appears('never', 999))\n"
        body += f"moments.in_step(4, {machine}, stop)"
    module = "accelerate.commands.launch" if launcher == "accelerate" else TORCHRUN

    def begin(i):
        words = OPTIONS[launcher].format(i=i, port=port)
        return launch(dict(batch_size=2), words, body, importing, folders[i], module)

    launched = [begin(0)]
    while not listens(port):  # in c10d the first one that comes has the store
        time.sleep(0.05)
    launched.append(begin(1))
    if fault == "machine lost":
        appears("killed", 300)
        os.killpg(launched[machine].pid, signal.SIGKILL)
        os.kill(int(Path(f"pid{machine}").read_text()), signal.SIGKILL)
        launched[machine].wait()
        launched[machine] = begin(machine)
    texts = [each.communicate(timeout=300)[0] for each in launched]
    assert [each.returncode for each in launched] == [0, 0], texts
    assert Path("killed").exists() == (fault != "nothing"), texts
    assert folders[0] == folders[1] or not (folders[1] / "run").exists()
    assert_same_state(whole(tiny(batch_size=2)), final("machine0/run"))


@pytest.mark.slow
def test_a_process_that_was_stopped_for_a_minute_goes_on(here, whole):
    pids = start(2, training(tiny(batch_size=2), in_step, 4, 1, pause))
    appears("busy")
    os.kill(pids[1], signal.SIGSTOP)
    Path("go").touch()
    time.sleep(60)
    os.kill(pids[1], signal.SIGCONT)
    assert join(pids) == [0, 0], said()
    assert_same_state(whole(tiny(batch_size=2)), final())


# Sampling and evaluating -------------------------------------------------------------------------


def test_sampling_is_shared_and_gives_the_same_images(run):
    wanted = dict(checkpoint="run", num_images=7, steps=2, batch_size=2)
    for out in ("one.png", "one"):
        sample(SampleConfig(**wanted, out=out))
    for out in ("two.png", "two"):
        config = SampleConfig(**wanted, out=out)
        assert join(start(2, lambda rank, config=config: sample(config))) == [0, 0], said()
    for name in ("one.png", *(f"one/{i:06d}.png" for i in range(7))):
        assert Path(name).read_bytes() == Path(name.replace("one", "two")).read_bytes()


def test_an_evaluation_is_shared_and_measures_the_same_images(run):
    options = dict(num_images=7, samplers=("dpm++:2", "ddim:3"), batch_size=2, loss_draws=0)
    config = EvaluateConfig(checkpoint="run", features="none", **options)
    evaluate(config)
    sheets = [Path("run/evaluation") / name for name in ("nearest.png", "samplers.png")]
    alone = [sheet.read_bytes() for sheet in sheets]
    for sheet in sheets:
        sheet.unlink()
    assert join(start(2, lambda rank: evaluate(config))) == [0, 0], said()
    assert [sheet.read_bytes() for sheet in sheets] == alone
