"""What only a GPU can tell, in parts: each a function that returns "tables", lists of rows, and
"facts". `gpu.py` runs them."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import find_device, read_tables
from benchmarks.peers import Ours, make_config
from benchmarks.stopped_runs import stop_and_resume
from generate import generate, load_trained
from system.flags import constant
from system.terminal import say
from train import DEMO, Config, train
from unet import CHANNEL_MULTS
from utils import checkpoint_path, list_checkpoints, load_checkpoint, tensors_in

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class GpuConfig:
    """What to find out, and where to."""

    out: str = "gpu"  # folder of all that is found
    minutes: float = constant(9.0, above=0)  # no part begins that might not end within these
    parts: tuple[str, ...] = ()  # these, anew; empty: all that are left
    toy: bool = False  # every part at a size for a CPU
    wheels: str = ""  # folder with wheels of the packages that may be missing
    device: str = ""  # cpu or cuda; empty: the GPU where there is one
    child: bool = False  # do one part here and now, as its process does


# Sizes ------------------------------------------------------------------------------------------


def run_config(config: GpuConfig, name: str, **changes) -> Config:
    """A short run on synthetic faces, at the size of the demo, or of nearly nothing."""
    size = dict(batch_size=128, num_training_steps=200, log_every=20, num_samples=16)
    if config.toy:
        size = dict(img_size=8, channels=8, channel_mults=(1,), batch_size=4, head_dim=8)
        size |= dict(num_training_steps=4, log_every=2, num_samples=1, path_to_data="pictures")
        size |= dict(norm_groups=0, attributes=())
    often = dict(save_every=10**6, sample_every=10**6, warmup_steps=10, lr_schedule="constant")
    device = config.device or "auto"
    every = {**DEMO, **often, **size, "device": device, "experiment_name": name, **changes}
    return Config(**every)


def network(config: GpuConfig, img_size: int = 64) -> list[str]:
    """The flags of the network whose speed is asked for."""
    size = f"--img_size {img_size} --channels 128 --rounds 3 --channel_mults"
    mults = CHANNEL_MULTS[img_size]
    if config.toy:
        size, mults = "--img_size 8 --channels 64 --rounds 1 --channel_mults", (1, 1)
    return [*size.split(), *map(str, mults)]


def draw_pictures() -> None:
    """A few images to train on, where rendering faces would take long."""
    Path("pictures").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)):
        Image.fromarray(pixels).save(f"pictures/{i}.png")


# Parts -------------------------------------------------------------------------------------------


def call(command: list[str], **options) -> subprocess.CompletedProcess:
    """Run a script of the project, and pass on what it prints. Raises where it fails."""
    say(f"$ {' '.join(command)}")
    command = [sys.executable, str(ROOT / command[0]), *command[1:]]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, **options)
    say(result.stdout)
    result.check_returncode()
    return result


def measured(*command: str) -> dict:
    """The tables that a benchmark prints."""
    text = call(list(command)).stdout
    return {"tables": [list(rows.values()) for rows in read_tables(text)], "text": text[-4000:]}


def losses(folder: Path) -> dict[int, float]:
    """The curve in a run's newest checkpoint."""
    return dict(load_checkpoint(list_checkpoints(folder)[0])["history"])


def curves(config: GpuConfig) -> dict:
    """Do half precision and the compiler learn what float32 learns?"""
    found = {}
    for precision in ("no", "fp16") if config.toy else ("no", "bf16", "fp16"):
        for compiled in (False, True):
            name = f"{precision}{' compiled' if compiled else ''}"
            changes = dict(mixed_precision=precision, compile=compiled)
            found[name] = losses(train(run_config(config, name.replace(" ", "_"), **changes)))
    rows = [
        {"step": step, **{name: f"{curve[step]:.4f}" for name, curve in found.items()}}
        for step in found["no"]
    ]
    last = {name: list(curve.values())[-1] for name, curve in found.items()}
    worst = max(abs(loss / last["no"] - 1) for loss in last.values())
    return {"tables": [rows], "facts": {"last losses differ by at most": f"{worst:.2%}"}}


def largest_difference(one: dict, other: dict) -> float:
    """Between the tensors of two checkpoints: 0 where they are equal bit for bit."""
    pairs = zip(tensors_in(one), tensors_in(other), strict=True)
    return max(
        float((a.double() - b.double()).abs().max()) for (_, a), (_, b) in pairs if a.numel()
    )


def resume(config: GpuConfig) -> dict:
    """Does a resumed run equal one that never stopped?"""
    rows = []
    for deterministic in (True,) if config.toy else (True, False):
        flags = dict(deterministic=deterministic, mixed_precision="fp16")
        name, steps = f"resumed_{deterministic}", 4 if config.toy else 60
        whole = run_config(config, f"{name}_whole", num_training_steps=steps, **flags)
        half = run_config(config, f"{name}_half", num_training_steps=steps // 2, **flags)
        started = time.monotonic()
        train(whole)
        seconds = time.monotonic() - started
        train(half)
        train(replace(half, num_training_steps=steps, resume=True))
        paths = [checkpoint_path(Path(run.experiment_name), steps) for run in (whole, half)]
        one, other = (load_checkpoint(path)["model"] for path in paths)
        row = {"--deterministic": str(deterministic)}
        row["largest difference of weights"] = f"{largest_difference(one, other):.2g}"
        rows.append(row | {"seconds of the whole run": f"{seconds:.1f}"})
    return {"tables": [rows], "facts": {"wanted with --deterministic": "0"}}


def sampling(config: GpuConfig) -> dict:
    """Are the images those of the CPU? In grey levels of 256, by sampler and precision."""
    folder = train(run_config(config, "sampled", num_training_steps=2 if config.toy else 400))
    steps, count, rows = (2 if config.toy else 20), (2 if config.toy else 16), []
    device = find_device(config.device).type
    known = load_trained(folder, device="cpu", half=False)
    ours = {name: load_trained(folder, device=device, half=name == "half") for name in ("", "half")}
    for sampler in ("dpm++", "ddim", "ddpm"):
        options = dict(batch_size=count, sampler=sampler, steps=steps)
        expected = next(generate(known, range(count), **options))
        for name, trained in ours.items():
            images = next(generate(trained, range(count), **options)).cpu()
            off = (images - expected).abs() * 127.5
            row = {"sampler": sampler, "precision": name or "float32", "mean": f"{off.mean():.3f}"}
            rows.append(row | {"most": f"{off.max():.2f}"})
    return {"tables": [rows], "facts": {}}


def small_flags(config: GpuConfig) -> list[str]:
    """The flags of a run that would take long, on synthetic faces."""
    if config.toy:
        flags = "--path_to_data pictures --img_size 8 --channels 8 --channel_mults 1 --head_dim 8"
        flags += " --batch_size 2 --log_every 1 --num_samples 1 --num_training_steps 100000"
    else:
        flags = "--path_to_data synthetic --log_every 10 --num_training_steps 100000"
    return [*flags.split(), "--device", config.device or "auto"]


def ranks(config: GpuConfig) -> dict:
    """Two processes, on one GPU where there is but one."""
    flags = small_flags(config)
    if not config.toy:
        flags += ["--channels", "64", "--batch_size", "64"]
    return stop_and_resume("ranks", 2, flags)


def full_size(config: GpuConfig) -> dict:
    """The defaults, 64 px, as their user runs them."""
    return stop_and_resume("full_size", 1, small_flags(config))


def speed(config: GpuConfig, *rows: str) -> dict:
    """Training beside diffusers' example and an advised diffusers; wanted: 2.5 times, and 40 % of
    the matrix products' rate."""
    size = ["--batch_size", "2", "--steps_per_round", "1"]
    size = size if config.toy else ["--batch_size", "256", "--steps_per_round", "8"]
    size += ["--device", config.device] if config.device else []
    return measured("benchmarks/train_speed.py", *network(config), *size, "--rows", *rows)


def speed_fp16(config: GpuConfig) -> dict:
    """See `speed`."""
    return speed(config, "ours", *(() if config.toy else ("ours-bf16", "diffusers-fp16")))


def speed_advised(config: GpuConfig) -> dict:
    """See `speed`."""
    rows = ("ours",) if config.toy else ("ours", "diffusers-advised", "diffusers-bf16")
    return speed(config, *rows)


def sample_speed(config: GpuConfig) -> dict:
    """Sampling beside diffusers."""
    size = ["--num_images", "1" if config.toy else "64", "--ddpm_steps", "0"]
    size += ["--steps", "2"] if config.toy else ["--steps", "10", "20", "50"]
    size += ["--device", config.device] if config.device else []
    return measured("benchmarks/sample_speed.py", *network(config), *size)


def variants(config: GpuConfig, img_size: int, *names: str) -> dict:
    """Other ways to compute a step and images: what wins belongs into the product."""
    size = ["--batch_size", "2", "--steps", "1"] if config.toy else []
    size += ["--device", config.device] if config.device else []
    flags = [*network(config, img_size), *size]
    return measured("benchmarks/variants.py", *flags, "--variants", *names)


def variants_of_layers(config: GpuConfig) -> dict:
    """See `variants`."""
    names = "not compiled", "weights cast anew", "norm by channels", "transposed upsampling"
    return variants(config, 64, "as it is", *names)


def variants_of_modes(config: GpuConfig) -> dict:
    """See `variants`."""
    names = "grad_scale", "CUDA graphs", *(() if config.toy else ("max-autotune",))
    return variants(config, 64, "as it is", *names)


def variants_at_32px(config: GpuConfig) -> dict:
    """See `variants`; few pixels, for which a graph's single launch counts most."""
    return variants(config, 32, "as it is", "not compiled", "CUDA graphs")


def kernels(config: GpuConfig) -> dict:
    """Where the time of a step goes, by kernel, compiled; and what waits for the device."""
    device = find_device(config.device)
    size = (8, 64, (1,)) if config.toy else (64, 128, ())
    ours = Ours(make_config(*size, batch_size=2 if config.toy else 256), device)
    for _ in range(3):
        ours.step()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as profiled:
        for _ in range(3):
            ours.step()
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda e: getattr(e, own, 0), reverse=True)
    total = sum(getattr(event, own, 0) for event in events) or 1
    rows = [
        {
            "kernel": event.key[:70].replace("|", "/"),
            "share": f"{getattr(event, own) / total:.1%}",
            "ms of a step": f"{getattr(event, own) / 3e3:.3f}",
            "calls": str(event.count // 3),
        }
        for event in events[: 3 if config.toy else 40]
    ]
    facts = {"ms of a step on the device": f"{total / 3e3:.1f}"}
    if device.type == "cuda":
        facts["a step waits for the GPU"] = ours.synchronises() or "no"
        facts["peak GB"] = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"
    return {"tables": [rows], "facts": facts}


def tests(config: GpuConfig) -> dict:
    """The tests of what the GPU computes."""
    names = ["tests/test_cuda.py", *([] if config.toy else ["tests/test_unet.py"])]
    only = ["-k", "kept_is_kept"] if config.toy else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", "-m", "not slow"]  # pytest-xdist may be missing
    result = subprocess.run([*command, *names, *only], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    say(result.stdout)
    return {"tables": [], "facts": {"pytest": result.stdout.strip().splitlines()[-1]}}


class Part(NamedTuple):
    """Something to find out."""

    find_out: Callable[[GpuConfig], dict]  # returns "tables", lists of rows, and "facts"
    seconds: int  # that it takes at most; an upper guess, until a GPU has run it


# What matters most comes first, for a GPU may be lent for half an hour only.
PARTS = {
    "tests": Part(tests, 150),
    "curves": Part(curves, 360),
    "speed": Part(speed_fp16, 360),
    "resume": Part(resume, 240),
    "full_size": Part(full_size, 240),
    "kernels": Part(kernels, 150),
    "speed_advised": Part(speed_advised, 360),
    "sampling": Part(sampling, 150),
    "sample_speed": Part(sample_speed, 150),
    "variants_of_layers": Part(variants_of_layers, 480),
    "variants_at_32px": Part(variants_at_32px, 180),
    "variants_of_modes": Part(variants_of_modes, 480),
    "ranks": Part(ranks, 180),
}
