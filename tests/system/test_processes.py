"""One run in several processes: the same however it is split, and ended together.

Most tests fork their processes, which saves each the seconds of importing torch; what depends on
the launcher starts `torchrun`."""

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, as_flags, needs_posix, tensors_equal, tiny, write_pictures

import evaluate
import train as train_module
from dataset import sources
from engine import session as run_module
from engine.state import check_split
from evaluate import EvaluateConfig
from sample import SampleConfig, sample
from system import flags
from system import processes as processes_module
from system.errors import DataError, UsageError
from system.files import disk_error
from train import train
from utils import checkpoint_path, list_checkpoints, load_checkpoint

STATE = ("step", "model", "ema", "optimizer", "scaler", "history")
SPLIT = dict(  # 20 updates of 4 micro-batches, with all that is random
    path_to_data="synthetic",
    attributes=("Smiling", "Eyeglasses"),
    attribute_dropout=0.3,
    dropout=0.3,
    batch_size=2,
    num_training_steps=20,
    save_every=5,
    log_every=1,
)


@pytest.fixture(autouse=True)
def posix():
    needs_posix()


@pytest.fixture(autouse=True)
def few_faces(monkeypatch):
    monkeypatch.setattr(sources, "NUM_SYNTHETIC", 60)


FORKED: list[int] = []  # by the test that runs


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    """A test that fails before it has ended its processes would leave them training."""
    yield
    for pid in FORKED:
        with contextlib.suppress(ChildProcessError):  # it has been waited for
            if not os.waitpid(pid, os.WNOHANG)[0]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    FORKED.clear()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def fork(count: int, work, folders=None) -> list[int]:
    """Start processes that each do work(rank) as a script would; returns their pids. What they
    say is in rank0.txt, rank1.txt, ..."""
    port, here, pids = free_port(), Path.cwd(), []
    for rank in range(count):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        try:
            file = open(here / f"rank{rank}.txt", "w", buffering=1)
            sys.stdout = sys.stderr = file
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            here_too = {"LOCAL_WORLD_SIZE": count, "LOCAL_RANK": rank}
            if folders:  # each stands for a machine
                os.chdir(folders[rank])
                here_too = {"LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "GROUP_RANK": rank}
            here_too |= {"RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            here_too |= {"OMP_NUM_THREADS": 1}  # or accelerate sets more: other roundings
            os.environ.update({k: str(v) for k, v in here_too.items()}, MASTER_ADDR="127.0.0.1")
            from accelerate.state import AcceleratorState, PartialState

            AcceleratorState._reset_state(True)  # what this process got from the tests before
            PartialState._reset_state()
            torch.set_num_threads(1)
            run_module.Run.held_out_loss = lambda self: {}  # seconds, and nothing of several
            train_module.RunLog.plot_loss = lambda self: None
            code = 0
            try:
                flags.run(lambda rank=rank: work(rank))
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                code = 1
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
        finally:
            os._exit(code)
    FORKED.extend(pids)
    return pids


def join(pids: list[int], seconds: float = 60) -> list[int]:
    """The exit codes of the processes, which must all end within so many seconds."""
    codes, end = {}, time.monotonic() + seconds
    try:
        while len(codes) < len(pids):
            for pid in set(pids) - codes.keys():
                if (found := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(found[1])
            assert time.monotonic() < end, f"{codes} of {pids} after {seconds} s\n{said()}"
            time.sleep(0.02)
    finally:
        for pid in set(pids) - codes.keys():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return [codes[pid] for pid in pids]


def said(rank: int | None = None) -> str:
    """What a process has said, or all have."""
    ranks = sorted(Path().glob("rank*.txt")) if rank is None else [Path(f"rank{rank}.txt")]
    return "".join(path.read_text() for path in ranks)


def complaints() -> list[str]:
    return [line for line in said().splitlines() if line.startswith(("error", "Traceback"))]


def final(name: str, step: int) -> dict:
    return load_checkpoint(checkpoint_path(Path(name), step))


def assert_equal_runs(a: dict, b: dict) -> None:
    for part in STATE:
        assert tensors_equal(a[part], b[part]), part


def difference(a: dict, b: dict) -> float:
    """The largest relative difference of the losses."""
    losses = [[loss for _, loss in run["history"]] for run in (a, b)]
    assert len(losses[0]) == len(losses[1])
    return max(abs(x - y) / abs(x) for x, y in zip(*losses, strict=True))


# The split ---------------------------------------------------------------------------------------


def split(count: int, **changes):
    """The run of SPLIT by so many processes."""
    return tiny(**{**SPLIT, "gradient_accumulation_steps": 4 // count, **changes})


def finish(count: int, config) -> None:
    assert join(fork(count, lambda rank: train(config))) == [0] * count, said()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What unbroken runs by 1, 2 and 4 processes end with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "NUM_SYNTHETIC", 60)
        patch.chdir(tmp_path_factory.mktemp("whole"))
        for count in (1, 2, 4):
            finish(count, split(count, experiment_name=f"of_{count}"))
        return {count: final(f"of_{count}", 20) for count in (1, 2, 4)}


def assert_close(a: dict, b: dict) -> None:
    """The runs differ by no more than float32 rounds."""
    assert 0 < difference(a, b) < 1e-5
    for name, weight in a["model"].items():
        torch.testing.assert_close(weight, b["model"][name], rtol=1e-3, atol=1e-5)


def test_a_run_is_the_same_split_among_1_2_or_4_processes(whole):
    for count in (2, 4):
        found = difference(whole[1], whole[count])
        print(f"{count} processes: largest relative difference of the losses {found:.1e}")
        assert_close(whole[1], whole[count])


def test_a_run_of_2_processes_again_is_the_same_bit_for_bit(here, whole):
    finish(2, split(2))
    assert_equal_runs(whole[2], final("run", 20))


def die_at(step: int, rank: int):
    """A train_step in whose process of that rank nothing follows a step."""
    real = train_module.train_step

    def train_step(config, state, *arguments):
        if state.step == step and os.environ["RANK"] == str(rank):
            os._exit(137)
        return real(config, state, *arguments)

    return train_step


def killed(config, step: int, rank: int):
    def work(_):
        train_module.train_step = die_at(step, rank)
        train(config)

    return work


def test_a_killed_run_of_4_processes_goes_on_with_4_or_with_fewer(here, whole):
    join(fork(4, killed(split(4), step=7, rank=2)))
    assert list_checkpoints(here / "run")[0].stem == "step_00000005"
    shutil.copytree("run", "fewer")
    finish(4, split(4, resume=True))
    assert_equal_runs(whole[4], final("run", 20))  # bit for bit
    fewer = dict(experiment_name="fewer", resume=True)
    join(fork(2, killed(split(2, **fewer), step=13, rank=1)))
    assert list_checkpoints(here / "fewer")[0].stem == "step_00000010"
    finish(1, split(1, **fewer))
    assert_close(whole[4], final("fewer", 20))


def test_an_update_of_another_size_names_the_flag_that_keeps_it():
    def check(saved, world_size, accumulation):
        split = {"world_size": world_size, "micro_batches": world_size * accumulation}
        check_split(Path("x.pt"), {"settings": saved}, split)

    check({"micro_batches": 8}, 2, 4)
    check({"world_size": 4, "gradient_accumulation_steps": 2}, 1, 8)  # of an older version
    with pytest.raises(UsageError, match="pass --gradient_accumulation_steps 4 on 2 processes"):
        check({"micro_batches": 8}, 2, 1)
    with pytest.raises(UsageError, match="start 1 or 2 or 4 or 8 processes"):
        check({"micro_batches": 8}, 3, 1)


# Two machines ------------------------------------------------------------------------------------


def test_two_machines_need_no_disk_in_common(here):
    """Each process has a folder of its own, and only that of rank 0 ever holds the run."""
    config = tiny(batch_size=2, gradient_accumulation_steps=2)
    finish(2, tiny(**{**TINY, **vars(config), "experiment_name": "whole"}))
    folders = [here / "a", here / "b"]
    for folder in folders:
        folder.mkdir()
        write_pictures(folder, 22)
    join(fork(2, killed(config, step=4, rank=1), folders))
    again = tiny(**{**vars(config), "resume": True})
    assert join(fork(2, lambda rank: train(again), folders)) == [0, 0], said()
    assert "resumed" in said(0) and said(1) == ""
    assert not (here / "b" / "run").exists() and (here / "b" / "prepared").exists()
    assert_equal_runs(final("whole", 6), final("a/run", 6))


@pytest.mark.parametrize("changes, part", [({"seed": 1}, "seed is 1"), ({}, "faces is")])
def test_processes_that_do_not_agree_say_what_differs(here, changes, part):
    folders = [here / "a", here / "b"]
    for folder, count in zip(folders, (22, 22 if changes else 30), strict=True):
        folder.mkdir()
        write_pictures(folder, count)
    pids = fork(2, lambda rank: train(tiny(**(changes if rank else {}))), folders)
    assert join(pids) == [5, 2], said()
    assert (
        len(complaints()) == 1 and "error: rank 1: " in complaints()[0] and part in complaints()[0]
    )


# The end -----------------------------------------------------------------------------------------

LONG = dict(batch_size=2, num_training_steps=100_000, save_every=100_000, log_every=1)


def slow(function, seconds: float):
    """The function, with a file `busy` from its start and some seconds before its end."""

    def slowed(*arguments, **options):
        Path("busy").touch()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.05)
        return function(*arguments, **options)

    return slowed


def appears(path: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < end, said()
        time.sleep(0.02)


TARGETS = ("rank 0", "rank 1", "all", "all twice")
PLACES = ("a step", "a save", "the sampling")
QUICK = [("a step", "rank 1"), ("a save", "all twice"), ("the sampling", "rank 0")]
REST = [(place, to) for place in PLACES for to in TARGETS if (place, to) not in QUICK]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in REST]


@pytest.mark.parametrize("place, to", [*QUICK, *SLOW])
def test_a_signal_to_any_process_saves_for_all(here, to, place):
    """The save takes two seconds, during which a launcher passes on what it gets."""
    config = dict(LONG, sample_every=3 if place == "the sampling" else 100_000)
    config |= dict(save_every=3 if place == "a save" else 100_000)

    def work(rank):
        real_save = run_module.save_checkpoint
        run_module.save_checkpoint = lambda path, state: (
            slow(real_save, 2)(path, state) if "step" in path.name else real_save(path, state)
        )
        if place == "the sampling":
            real_sample = run_module.Run.sample
            run_module.Run.sample = lambda run, stop, num_samples, steps=10: (
                slow(real_sample, 1) if steps == 10 else real_sample  # not the trial
            )(run, stop, num_samples, steps)
        if place == "a step" and rank == 0:
            real = train_module.train_step

            def step(config, state, *arguments):
                if state.step == 3:
                    Path("busy").touch()
                return real(config, state, *arguments)

            train_module.train_step = step
        train(tiny(**config))

    pids = fork(2, work)
    appears("busy")
    targets = {"rank 0": pids[:1], "rank 1": pids[1:]}.get(to, pids)
    for _ in range(2 if to == "all twice" else 1):
        for pid in targets:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)
    assert join(pids, 30) == [143, 143], said()
    newest, *_ = list_checkpoints(here / "run")
    assert load_checkpoint(newest)["step"] >= 3
    assert said().count("is saved") == 1 and not complaints(), said()
    assert f"step {int(newest.stem[5:])} is saved" in said(0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_while_the_faces_are_prepared_ends_all(here, rank):
    def work(_):
        run_module.load_faces = slow(run_module.load_faces, 20)
        train(tiny(**LONG))

    pids = fork(2, work)
    appears("busy")
    time.sleep(0.5)
    os.kill(pids[rank], signal.SIGTERM)
    codes = join(pids, 15)
    assert codes[rank] == 143 and not complaints() and not list_checkpoints(here / "run")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_with_one_line(here, rank):
    began = time.monotonic()
    codes = join(fork(2, killed(tiny(**LONG), step=4, rank=rank)))
    assert codes[rank] == 137 and codes[1 - rank] == 5 and time.monotonic() - began < 60
    (line,) = complaints()
    assert line.startswith(f"error: rank {1 - rank}: another process") and "--resume" in line


def test_a_process_that_stops_without_ending_is_taken_for_lost(here, monkeypatch):
    monkeypatch.setattr(processes_module, "HEARTBEAT", 0.2)
    monkeypatch.setattr(processes_module, "SILENCE", 2.0)
    monkeypatch.setattr(processes_module, "GRACE", 1.0)
    pids = fork(2, lambda rank: train(tiny(**LONG)))
    appears("run/checkpoints")
    time.sleep(1)
    os.kill(pids[1], signal.SIGSTOP)
    try:
        end = time.monotonic() + 20
        while not os.waitpid(pids[0], os.WNOHANG)[0]:
            assert time.monotonic() < end, said()
            time.sleep(0.1)
    finally:
        os.kill(pids[1], signal.SIGKILL)
        os.waitpid(pids[1], 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_all_with_its_line(here, rank):
    def damaged(*_):
        raise DataError("images/7.png", "is damaged", "remove it")

    def work(mine):
        if mine == rank:
            train_module.train_step = damaged
        train(tiny(**LONG))

    codes = join(fork(2, work), 30)
    assert codes[rank] == 3 and codes[1 - rank] == 5
    (line,) = complaints()
    assert line.startswith(f"error: rank {rank}: images/7.png: is damaged")


def test_a_full_disk_ends_all_with_its_line(here):
    def work(_):
        real = run_module.save_checkpoint

        def save(path, state):
            if "step" in path.name:  # not the trial before the first step
                raise disk_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            real(path, state)

        run_module.save_checkpoint = save
        train(tiny(batch_size=2))

    assert join(fork(2, work), 30) == [5, 5]
    assert len(complaints()) == 1 and "rank 0: run/checkpoints" in complaints()[0], said()


# The launcher ------------------------------------------------------------------------------------

SCRIPT = """import sys, os, time
sys.path.insert(0, {root!r})
import train
from engine import session as run
from system import flags
{body}
flags.run(train.main)
"""


def launch(body: str, config: dict, *options: str, cwd=".", launcher="torch.distributed.run"):
    """Start `torchrun train.py` with 2 processes on a machine, or what options say, changed by the
    lines of `body`."""
    script = "changed.py"
    Path(script).write_text(SCRIPT.format(root=str(ROOT), body=body))
    command = [sys.executable, "-m", launcher]
    command += options or ["--nproc_per_node", "2", "--master_port", str(free_port())]
    command += [str(Path(script).absolute()), *as_flags({**TINY, **config})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=environment, start_new_session=True, cwd=cwd, **pipes)


def wait(process, seconds: float = 150) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def test_a_launcher_restarts_a_killed_run_and_hands_on_a_scheduler_s_sigterm(here):
    """Restarted and stopped again, the run comes to the end of one that never was."""
    finish(2, tiny(batch_size=2, num_training_steps=9, experiment_name="whole"))
    body = "real, save_checkpoint = train.train_step, run.save_checkpoint\n"
    body += "def step(config, state, *a):\n"
    body += "    killed = os.path.exists('killed')\n"
    body += "    if state.step == 4 and os.environ['RANK'] == '1' and not killed:\n"
    body += "        open('killed', 'w').close(); os.kill(os.getpid(), 9)\n"
    body += "    return real(config, state, *a)\n"
    body += "def save(path, state):\n"
    body += "    if 'step' in path.name: time.sleep(3)\n"  # while the launcher hands on the signal
    body += "    save_checkpoint(path, state)\n"
    body += "train.train_step, run.save_checkpoint = step, save\n"
    config = dict(batch_size=2, num_training_steps=9, resume=True)
    options = ["--nproc_per_node", "2", "--max-restarts", "3", "--master_port", str(free_port())]
    process = launch(body, config, *options)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 6/"):
            break
    os.killpg(process.pid, signal.SIGTERM)
    text = "".join(lines) + wait(process, 30)
    assert process.returncode != 0 and "resumed run" in text, text
    assert "is saved; go on with --resume" in text, text
    assert load_checkpoint(list_checkpoints(here / "run")[0])["step"] < 9
    finish(2, tiny(**config))
    assert_equal_runs(final("whole", 9), final("run", 9))


LAUNCHERS = {
    "torch.distributed.run": "--nnodes 2 --node_rank {i} --nproc_per_node 1"
    " --master_addr 127.0.0.1 --master_port {port}",
    "accelerate.commands.launch": "--multi_gpu --num_machines 2 --machine_rank {i}"
    " --num_processes 2 --main_process_ip 127.0.0.1 --main_process_port {port}",
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_launchers_without_a_common_disk_run_and_resume(here, launcher):
    """As `test_two_machines_need_no_disk_in_common`, by the commands of docs/many-gpus.md."""
    finish(2, tiny(batch_size=2, experiment_name="whole"))
    for name in ("a", "b"):
        (here / name).mkdir()
        write_pictures(here / name, 22)
    die = "real = train.train_step\ndef step(config, state, *a):\n"
    die += "    if os.environ['RANK'] == '1' and state.step == 4: os.kill(os.getpid(), 9)\n"
    die += "    return real(config, state, *a)\ntrain.train_step = step"
    for body in (die, ""):
        config, port = dict(batch_size=2, resume=body == "", device="cpu"), free_port()
        options = [LAUNCHERS[launcher].format(i=i, port=port).split() for i in (0, 1)]
        machines = [
            launch(body, config, *of_machine, cwd=folder, launcher=launcher)
            for of_machine, folder in zip(options, "ab", strict=True)
        ]
        texts = [wait(machine) for machine in machines]
        assert [machine.returncode for machine in machines] == [int(body != "")] * 2, texts
    assert not (here / "b" / "run").exists() and "resumed" in texts[0]
    assert_equal_runs(final("whole", 6), final("a/run", 6))


# Sampling and evaluating -------------------------------------------------------------------------


def test_sampling_is_shared_and_gives_the_same_images(here):
    train(tiny(num_training_steps=1))
    wanted = dict(checkpoint="run", num_images=7, steps=2, batch_size=2)
    for out in ("one.png", "one"):
        sample(SampleConfig(**wanted, out=out))
    for out in ("two.png", "two"):
        config = SampleConfig(**wanted, out=out)
        assert join(fork(2, lambda rank, config=config: sample(config))) == [0, 0], said()
    files = ["one.png", *(f"one/{i:06d}.png" for i in range(7))]
    for name in files:
        assert Path(name).read_bytes() == Path(name.replace("one", "two")).read_bytes()


def test_an_evaluation_shares_what_is_missing(here):
    train(tiny(num_training_steps=1))
    options = dict(num_images=11, batch_size=2, loss_draws=0, features="none")
    config = EvaluateConfig("run", "pictures", samplers=("dpm++:2", "ddim:3"), **options)
    evaluate.evaluate(config)
    parts = sorted(Path("run/evaluation/generated").rglob("*.npz"))
    kept = {path: load_images(path) for path in parts}
    for path in parts[1:8:2]:  # all even ones of the first sampler are there already
        path.unlink()

    def work(rank):
        real, made = evaluate.keep_generated, []
        evaluate.keep_generated = lambda path, make: (made.append(path), real(path, make))
        evaluate.evaluate(config)
        Path(f"made{rank}").write_text(str(len(made)))

    assert join(fork(2, work)) == [0, 0], said()
    assert [Path(f"made{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    assert len(parts) == 12 and not complaints()
    for path in parts:
        assert np.array_equal(load_images(path), kept[path])


def load_images(path: Path) -> np.ndarray:
    with np.load(path) as kept:
        return kept["images"]
