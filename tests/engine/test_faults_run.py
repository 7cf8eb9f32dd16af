"""Faults of a run: killed, stopped, diverged, without a terminal. Two runs are equal where weights,
average, optimiser, loss scale and history are, bit for bit."""

import itertools
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import images
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    as_flags,
    assert_error,
    needs_posix,
    run_script,
    tensors_equal,
    tiny,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train as train_module
import utils
from dataset.faces import Batches
from diffusion import Diffusion
from ema import EMA
from engine import log as log_module
from engine import safety
from engine import session as run_module
from engine import state as state_module
from engine.safety import Watch
from system import files, flags, processes
from system.errors import DivergedError, Interrupted, UsageError
from system.files import FolderLock
from train import Config, check_config, train
from utils import checkpoint_path, list_checkpoints, load_checkpoint

FAST = {"log_every": 1, "save_every": 1, "num_training_steps": 3, "keep_checkpoints": 2}
FAST |= {"sample_every": 2, "dropout": 0.5, "gradient_accumulation_steps": 2}


def final(name: str, step: int) -> dict:
    return load_checkpoint(checkpoint_path(Path(name), step))


def assert_equal_runs(a: dict, b: dict) -> None:
    for part in ("step", "model", "ema", "optimizer", "scaler", "history"):
        assert tensors_equal(a[part], b[part]), part


# Killed ------------------------------------------------------------------------------------------


def in_child(work) -> int:
    """Run `work` in a forked process, of which only files outlive a kill; its exit code."""
    needs_posix()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


MODULES = (train_module, run_module, state_module, utils, files, safety, processes)
TRACED = {module.__file__ for module in MODULES}
ROUNDS = 6  # of a loop over tensors, which touches no file, the first six count


def follow_lines(at_point) -> None:
    """Call `at_point` at each line of the loop and the checkpoint code that is run from here on."""
    seen = Counter()

    def trace(frame, kind, _):
        if frame.f_code.co_filename not in TRACED:
            return None
        if kind == "line":
            line = (frame.f_code.co_filename, frame.f_lineno)
            seen[line] += 1
            if seen[line] <= ROUNDS:
                at_point()
        return trace

    sys.settrace(trace)


def kill_at(point: int, config: Config) -> None:
    """Train, and die without a word at the point-th line."""
    points = itertools.count(1)
    follow_lines(lambda: os._exit(137) if next(points) == point else None)
    train(config)


def count_lines(config: Config) -> int:
    points = []
    follow_lines(lambda: points.append(1))
    try:
        train(config)
    finally:
        sys.settrace(None)
    return len(points)


@pytest.fixture
def quick(here, monkeypatch):
    """No drawing of curves and no TensorBoard, which hold nothing that a resumed run needs."""

    class Silent:
        def __init__(self, folder, step, history):
            pass

        scalars = images = plot_loss = lambda self, *arguments: None
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = images

    monkeypatch.setattr(train_module, "RunLog", Silent)
    return here


def kill_everywhere(stride: int, twice: bool = False, least: int = 800) -> None:
    """Kill a run at every stride-th line, of `least` at least, resume it, and compare its end."""
    settings = {**FAST, "num_training_steps": 2, "num_samples": 1}
    train(tiny(**{**settings, "experiment_name": "whole"}))  # the first run has lines of its own
    reference = final("whole", 2)
    lines = count_lines(tiny(**{**settings, "experiment_name": "counted", "resume": True}))
    assert lines >= least
    points = range(1, lines + 1, stride)
    for point in points:
        run = tiny(**{**settings, "experiment_name": f"run{point}", "resume": True})
        assert in_child(lambda run=run, point=point: kill_at(point, run)) == 137, point
        if twice:  # killed again, while it takes up what it left
            again = in_child(lambda run=run, point=point: kill_at(point // 2 + 1, run))
            assert again == 137 or point > lines // 2 and again == 0, point  # little was left to do
        assert in_child(lambda run=run: train(run)) == 0, point
        assert_equal_runs(final(run.experiment_name, 2), reference)
        shutil.rmtree(run.experiment_name)
    print(f"killed at {len(points)} of {lines} lines")


@pytest.mark.parametrize("stride", [31, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_at_many_lines_resumes_to_the_same_end(quick, stride):
    kill_everywhere(stride)


@pytest.mark.parametrize("stride", [211, pytest.param(53, marks=pytest.mark.slow)])
def test_a_run_killed_while_resuming_resumes_to_the_same_end(quick, stride):
    kill_everywhere(stride, twice=True)


@pytest.mark.parametrize("stride", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_while_it_logs_resumes_to_the_same_end(here, monkeypatch, stride):
    monkeypatch.setattr(sys.modules[__name__], "TRACED", {log_module.__file__})
    kill_everywhere(stride, least=100)


@pytest.mark.parametrize("times, steps", [(3, 8), pytest.param(40, 40, marks=pytest.mark.slow)])
def test_a_process_killed_at_random_times_comes_to_the_same_end(here, times, steps):
    """The last one is left to finish."""
    config = tiny(**{**FAST, "num_training_steps": steps, "resume": True})

    def begin():
        process = multiprocessing.get_context("fork").Process(target=train, args=[config])
        process.start()
        return process

    needs_posix()
    started = time.monotonic()
    begin().join()
    seconds = time.monotonic() - started
    os.rename("run", "reference")
    kills, draw = 0, random.Random(0)
    while kills < times:
        process = begin()
        process.join(seconds * draw.random())
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:  # it was done: begin anew
            shutil.rmtree("run")
    begin().join()
    assert_equal_runs(final("run", steps), final("reference", steps))


def test_three_resumes_in_one_epoch_change_nothing(here, unbroken):
    for steps in (1, 2, 3, 4):  # an epoch is 5 batches of 4
        train(tiny(num_training_steps=steps, resume=True, save_every=1, log_every=1))
    a, b = unbroken(num_training_steps=4), final("run", 4)
    for part in ("model", "ema", "optimizer"):
        assert tensors_equal(a[part], b[part])


def test_the_data_order_across_a_resume_is_the_uninterrupted_one(here, monkeypatch):
    seen = []
    real = Batches.__call__

    def watched(self, index):
        x_0, attributes = real(self, index)
        seen.append((index, float(x_0.sum())))
        return x_0, attributes

    monkeypatch.setattr(Batches, "__call__", watched)
    train(tiny(experiment_name="whole", num_training_steps=12))
    whole = seen.copy()
    seen.clear()
    train(tiny(num_training_steps=7))
    train(tiny(num_training_steps=12, resume=True))
    assert seen == whole and len(whole) == 12 and len({total for _, total in whole}) == 12


def test_the_learning_rate_across_a_resume_is_the_uninterrupted_one(here):
    config = dict(lr_schedule="constant", warmup_steps=8, log_every=1, num_training_steps=10)
    train(tiny(experiment_name="whole", **config))
    train(tiny(**{**config, "num_training_steps": 4}))
    train(tiny(resume=True, **config))
    rates = [
        [(e.step, e.value) for e in EventAccumulator(name).Reload().Scalars("learning_rate")]
        for name in ("whole", "run")
    ]
    assert rates[0] == rates[1] and len(rates[0]) == 10


# Where each part of the state matters: a resume that forgets one of them is noticed.


@pytest.mark.parametrize("part", ["model", "ema", "optimizer", "scaler", "step", "history"])
def test_each_part_of_the_state_is_needed(here, monkeypatch, unbroken, part):
    whole = unbroken()
    train(tiny(num_training_steps=3))
    forgotten = run_module.make_state(tiny(), torch.device("cpu"), fp16=False).state_dict()
    real = state_module.load_newest_checkpoint

    def forgetful(folder, **options):
        path, saved = real(folder, **options)
        saved[part] = forgotten[part]
        return path, saved

    monkeypatch.setattr(state_module, "load_newest_checkpoint", forgetful)
    train(tiny(resume=True))
    with pytest.raises(AssertionError):
        assert_equal_runs(whole, final("run", 6))


# Diverged ----------------------------------------------------------------------------------------


def run_poisoned(monkeypatch, poison, steps=(4,), **changes):
    """Train with the loss of these steps (counted from 0) put through `poison`."""
    real, calls = Diffusion.loss, iter(range(1000))

    def loss(self, *arguments):
        value = real(self, *arguments)
        return poison(value) if next(calls) in steps else value

    monkeypatch.setattr(Diffusion, "loss", loss)
    return train(tiny(**changes))


def test_a_nan_loss_saves_nothing(here, monkeypatch):
    with pytest.raises(DivergedError, match="loss is not finite") as error:
        run_poisoned(monkeypatch, lambda loss: loss * math.nan)
    assert error.value.exit_code == 6
    assert [p.stem for p in list_checkpoints(here / "run")] == ["step_00000003"]
    load_checkpoint(checkpoint_path(here / "run", 3))


class Explode(torch.autograd.Function):
    """The value as it is, with a gradient that is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


@pytest.fixture
def fp16_patience(monkeypatch):
    """The loss scale and the patience of fp16, with the arithmetic of float32."""
    real = run_module.make_state
    monkeypatch.setattr(run_module, "make_state", lambda c, d, fp16, base: real(c, d, True, base))
    monkeypatch.setattr(train_module, "Watch", lambda device, patience: Watch(device, 20))


def test_one_infinite_gradient_under_a_loss_scale_skips_one_step(here, monkeypatch, fp16_patience):
    often = dict(lr_schedule="constant", save_every=1, keep_checkpoints=9)
    train(tiny(experiment_name="clean", num_training_steps=4, **often))
    run_poisoned(monkeypatch, Explode.apply, num_training_steps=6, **often)
    before, at, after = final("run", 4), final("run", 5), final("run", 6)
    assert tensors_equal(before["model"], at["model"]) and at["scaler"]["scale"] == 2.0**15
    assert not tensors_equal(at["model"], after["model"])
    assert tensors_equal(final("clean", 4)["model"], before["model"])


def test_twenty_skipped_steps_in_a_row_stop_the_run(here, monkeypatch, fp16_patience):
    with pytest.raises(DivergedError, match="20 updates in a row"):
        run_poisoned(monkeypatch, Explode.apply, range(3, 23), num_training_steps=60, save_every=23)
    assert not list_checkpoints(here / "run")


def test_nineteen_skipped_steps_in_a_row_do_not_stop_the_run(here, monkeypatch, fp16_patience):
    run_poisoned(monkeypatch, Explode.apply, range(3, 22), num_training_steps=24, save_every=24)
    assert final("run", 24)["scaler"]["scale"] == 2.0 ** (16 - 19)


def test_an_infinite_gradient_without_a_loss_scale_stops_before_the_step(here, monkeypatch):
    updated = []
    real = EMA.update
    monkeypatch.setattr(EMA, "update", lambda self, m: (updated.append(m), real(self, m)))
    with pytest.raises(DivergedError, match="1 updates? in a row"):
        run_poisoned(monkeypatch, Explode.apply, log_every=100)
    assert all(torch.isfinite(p).all() for p in updated[-1].parameters())
    assert [p.stem for p in list_checkpoints(here / "run")] == ["step_00000003"]


def test_a_process_whose_loss_is_nan_exits_6(here):
    script = "import sys, math; sys.path.insert(0, {!r}); import train, cli, diffusion\n".format(
        str(ROOT)
    )
    script += "real = diffusion.Diffusion.loss\n"
    script += "diffusion.Diffusion.loss = lambda *a: real(*a) * math.nan\ncli.run(train.main)"
    Path("poisoned.py").write_text(script)
    result = run_script(str(here / "poisoned.py"), *as_flags(TINY))
    assert_error(result, 6, "the loss is not finite")


# Stopped -----------------------------------------------------------------------------------------


def hook(monkeypatch, module, name, action, at=1):
    """Call `action` before the at-th call of module.name."""
    real, calls = getattr(module, name), iter(range(1, 1000))

    def hooked(*arguments, **options):
        if next(calls) == at:
            action()
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, hooked)


def send(number):
    needs_posix()
    return lambda: os.kill(os.getpid(), number)


PLACES = {
    "a step": (Diffusion, "loss", 2),
    "a save": (utils, "check_signature", 2),  # the first is the trial before step 1
    "a save's renaming": (os, "replace", 3),
    "the sampling": (Diffusion, "x_0_and_eps", 4),
    "the log": (log_module.RunLog, "scalars", 1),
}


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_in_the_loop_saves_and_ends(here, monkeypatch, unbroken, place, number, code):
    config = dict(save_every=2, sample_every=2, log_every=1)
    whole = unbroken(**config)
    run_module.load_faces("pictures", 8)  # prepared: what is counted below is the run's own
    with monkeypatch.context() as patch:
        module, name, at = PLACES[place]
        hook(patch, module, name, send(number), at)
        with pytest.raises(Interrupted) as stop:
            train(tiny(**config))
    assert stop.value.exit_code == code
    newest, *_ = list_checkpoints(here / "run")
    assert load_checkpoint(newest)["step"] < 6 and not list((here / "run").rglob("*.tmp"))
    train(tiny(resume=True, **config))
    assert_equal_runs(whole, final("run", 6))


def test_a_signal_while_loading_faces_ends_at_once(here, monkeypatch):
    hook(monkeypatch, run_module, "load_faces", send(signal.SIGTERM))
    with pytest.raises(Interrupted) as stop:
        train(tiny())
    assert stop.value.exit_code == 143 and not list_checkpoints(here / "run")


def start(*words, settings=None, **options) -> subprocess.Popen:
    """A real run of many steps, once it is past its third."""
    settings = {**TINY, "num_training_steps": 100_000, "log_every": 1, **(settings or {})}
    command = [sys.executable, str(ROOT / "train.py"), *as_flags(settings), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=environment, **pipes, **options)
    for line in process.stdout:
        if line.startswith("step 3/"):
            return process
    raise AssertionError(process.stderr.read())


SIGTERM = pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), SIGTERM])
def test_a_real_process_saves_on_a_signal_and_exits(here, number, code):
    needs_posix()
    process = start(start_new_session=True, settings={"save_every": 100_000})
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors
    newest, *_ = list_checkpoints(here / "run")
    assert load_checkpoint(newest)["step"] >= 3


def test_ctrl_c_twice_ends_within_a_second(here):
    needs_posix()
    process = start()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    for _ in range(20):  # the kernel may merge two signals into one: keep pressing
        if process.poll() is not None:
            break
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - began < 2


def test_the_second_signal_does_not_wait_for_the_step(here):
    needs_posix()
    script = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from safety import StopSignals\n"
    )
    script += "with StopSignals() as stop:\n    stop.deferred = True\n    print('on', flush=True)\n"
    script += "    time.sleep(60); time.sleep(60)\n"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    process.stdout.readline()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(timeout=1) == 130


def test_a_caller_s_signal_handlers_are_given_back(here):
    mine = {}
    before = {n: signal.signal(n, lambda *a: mine.update(hit=1)) for n in (2, 15)}
    handlers = [signal.getsignal(n) for n in (2, 15)]
    try:
        train(tiny(num_training_steps=1))
        assert [signal.getsignal(n) for n in (2, 15)] == handlers
        with pytest.raises(UsageError):
            train(tiny())
        assert [signal.getsignal(n) for n in (2, 15)] == handlers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_two_runs_in_one_folder_are_refused_and_a_crash_leaves_no_lock(here):
    process = start()
    result = run_script("train.py", *as_flags({**TINY, "resume": True}))
    assert_error(result, 2, "--experiment_name", f"pid {process.pid}")
    process.kill()
    process.communicate()
    with FolderLock(here / "run"):  # a crash leaves no lock behind
        pass


# Sampling, resources, the log --------------------------------------------------------------------


def test_a_save_during_sampling_holds_raw_and_averaged_weights(here, monkeypatch, unbroken):
    whole = unbroken()
    taken = {}
    real = Diffusion.sample_loop

    def saving(self, model, *arguments, **options):
        taken["sampled"] = model
        return real(self, model, *arguments, **options)

    real_step = train_module.train_step

    def step(config, state, *arguments):
        if "sampled" in taken and "copy" not in taken and state.step == 2:
            copy = {k: v.clone() for k, v in state.state_dict()["model"].items()}
            taken["copy"], taken["ema"] = copy, dict(state.ema.model.state_dict())
        return real_step(config, state, *arguments)

    monkeypatch.setattr(Diffusion, "sample_loop", saving)
    monkeypatch.setattr(train_module, "train_step", step)
    train(tiny(sample_every=1))
    assert not tensors_equal(taken["copy"], taken["ema"])
    assert_equal_runs(whole, final("run", 6))


def test_out_of_memory_suggests_a_smaller_batch(here):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train, cli, torch, diffusion\n"
    script += "def loss(*a): raise torch.OutOfMemoryError('CUDA out of memory.')\n"
    script += "diffusion.Diffusion.loss = loss\ncli.run(train.main, train.MEMORY)"
    Path("full.py").write_text(script)
    result = run_script(str(here / "full.py"), *as_flags(TINY))
    assert_error(result, 5, "--batch_size", "--gradient_accumulation_steps")


def test_fp16_on_a_cpu_says_what_is_used_instead(here, capsys):
    train(tiny(mixed_precision="fp16", num_training_steps=1))
    used = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    assert f"note: fp16 needs a CUDA GPU; training in {used}" in capsys.readouterr().out


def steps_logged(folder) -> list[int]:
    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("loss")]


def test_tensorboard_shows_no_step_twice_after_a_kill(here):
    config = tiny(log_every=1, save_every=3, num_training_steps=8)
    code = "import sys; sys.path.insert(0, {!r}); import train, os, log\n".format(str(ROOT))
    code += "real = log.RunLog.scalars\n"
    code += "def scalars(self, step, values):\n    real(self, step, values)\n"
    code += "    if step == 5: os._exit(137)\n"
    code += "log.RunLog.scalars = scalars\ntrain.main()"
    Path("dies.py").write_text(code)
    settings = {**TINY, "log_every": 1, "save_every": 3, "num_training_steps": 8}
    assert run_script(str(here / "dies.py"), *as_flags(settings)).returncode == 137
    assert steps_logged("run") == [1, 2, 3, 4, 5]
    time.sleep(1.1)  # TensorBoard orders files by the second in their names
    train(tiny(**{**settings, "resume": True}))
    assert steps_logged("run") == [1, 2, 3, 4, 5, 6, 7, 8] and config.log_every == 1


def test_a_cut_tensorboard_record_is_survived(here):
    train(tiny(log_every=1, num_training_steps=3))
    events = next((here / "run").glob("events*"))
    os.truncate(events, events.stat().st_size - 5)
    time.sleep(1.1)
    train(tiny(log_every=1, resume=True))
    steps = steps_logged("run")
    assert sorted(set(steps)) == steps and steps[-3:] == [4, 5, 6]


def test_no_terminal_means_plain_lines(here):
    result = run_script("train.py", *as_flags(TINY))
    assert result.returncode == 0 and "\r" not in result.stdout + result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("step 6/6")]


def test_the_run_survives_a_closed_stdout(here):
    words = as_flags({**TINY, "num_training_steps": 30, "log_every": 1})
    command = [sys.executable, str(ROOT / "train.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    process = subprocess.Popen(command, **pipes)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 0, errors
    assert "Traceback" not in errors and final("run", 30)["step"] == 30


def test_a_clock_that_steps_back_changes_nothing(here, monkeypatch, unbroken):
    whole = unbroken()
    times = iter(range(10**9, 0, -3600))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(times)))
        train(tiny(sample_every=2))
    assert_equal_runs(whole, final("run", 6))


def test_a_killed_sampler_leaves_no_partial_image(here, monkeypatch):
    import sample

    train(tiny())

    def die(self, file, *arguments, **options):
        Path(file).write_bytes(b"\x89PNG half")
        raise KeyboardInterrupt

    before = set(here.rglob("*.*"))
    for out in ("faces.png", "way.gif", "faces"):
        with monkeypatch.context() as patch:
            patch.setattr(images.Image.Image, "save", die)
            with pytest.raises(KeyboardInterrupt):
                sample.sample(sample.SampleConfig(checkpoint="run", num_images=2, steps=2, out=out))
        assert set(here.rglob("*.*")) == before


def test_a_finished_run_resumed_exits_0_and_touches_nothing(here):
    assert run_script("train.py", *as_flags(TINY)).returncode == 0
    before = {
        p: p.read_bytes() for p in (here / "run").rglob("*") if p.is_file() and p.name != "lock"
    }
    result = run_script("train.py", *as_flags({**TINY, "resume": True}))
    assert result.returncode == 0 and "has all its 6 steps" in result.stdout
    after = {
        p: p.read_bytes() for p in (here / "run").rglob("*") if p.is_file() and p.name != "lock"
    }
    assert before == after


@pytest.mark.parametrize(
    "words",
    [
        ["--img_size", "0"],
        ["--img_size", "63"],
        ["--batch_size", "-1"],
        ["--learning_rate", "nan"],
        ["--ema_decay", "2"],
    ],
)
def test_numbers_out_of_range_name_the_flag(here, words):
    with pytest.raises(UsageError, match=f"^{words[0]}: .*Fix: "):
        check_config(flags.parse(Config, words, ""))


def test_accelerate_launches_train(here):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", str(ROOT / "train.py")]
    result = subprocess.run(
        [*command, *as_flags(TINY)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert final("run", 6)["settings"]["world_size"] == 1
