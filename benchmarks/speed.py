"""How fast this project trains and generates, beside diffusers and denoising-diffusion-pytorch.

    python benchmarks/speed.py                           # training at 32 px, batch 32
    python benchmarks/speed.py --what sampling           # 32 images at once, by 10 and 50 steps
    python benchmarks/speed.py --what profile            # where the time of a step goes
    python benchmarks/speed.py --rows ours diffusers     # only these; --help lists all
    python benchmarks/speed.py --img_size 64 --channels 128 --channel_mults 1 2 2 2 4 \\
        --batch_size 128 --rounds 10 --steps_per_round 20     # on a GPU

    pip install diffusers denoising-diffusion-pytorch

Each row has a process of its own. The rows compute one at a time, in turn, round after round;
ratios are taken within a round, and the table shows the median over the rounds. So a busy machine
slows both sides of a ratio. Diffusers' network has as many weights and FLOPs as ours, which is
asserted.
"""

import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Local, Worker, machine, measure, ratio, seconds_of
from benchmarks.peers import (
    PEERS,
    PRECISIONS,
    DenoisingDiffusionPytorch,
    Diffusers,
    Ours,
    diffusers_network,
    installed,
    make_config,
    pipeline_images,
)
from engine.state import diffusion_arguments, unet_arguments
from generate import generate, load_trained
from system import flags
from system.cpu import keep_freed_memory
from system.device import DEVICES, autocast_dtype, find_device
from system.errors import UsageError
from system.flags import check_ranges, constant
from system.terminal import table
from train import Config
from unet import UNet
from utils import save_checkpoint

# How each row trains: a class of peers.py, what it changes in Config, further arguments.
ROWS = {
    "ours": (Ours, {}),  # as train.py runs it: fp16 on a GPU, bf16 on a CPU that has it
    "ours-muon": (Ours, dict(optimizer="muon")),
    "ours-float32": (Ours, dict(mixed_precision="no")),
    "diffusers": (Diffusers, {}, False),  # its unconditional example, in float32, the default
    "diffusers-half": (Diffusers, {}, True),  # the example in half precision
    "diffusers-advised": (Diffusers, {}, True, True),  # and channels_last, fused AdamW, compiled
    "denoising-diffusion-pytorch": (DenoisingDiffusionPytorch, {}),  # its Trainer and its network
}


@dataclass(frozen=True)
class SpeedConfig:
    """What to measure, and for how long."""

    what: Literal["training", "sampling", "profile"] = "training"  # what to measure
    img_size: int = constant(32, least=8)  # pixels of a side
    channels: int = 64  # channels of the first stage
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)  # width of each stage, times channels
    batch_size: int = constant(32, least=1)  # images in a step, or generated at once
    rows: tuple[Literal[*ROWS], ...] = ()  # rows of training to measure; empty: all
    steps: tuple[int, ...] = constant((10, 50), least=2, most=1000)  # of each sampler
    rounds: int = constant(5, least=1)  # turns of each row
    steps_per_round: int = constant(2, least=1)  # training steps timed in a turn
    device: Literal[*DEVICES] = "auto"  # auto: cuda if there is one, else cpu


def network_config(config: SpeedConfig, **changes) -> Config:
    """The constants of the network that is measured."""
    shape = (config.img_size, config.channels, config.channel_mults)
    return make_config(*shape, batch_size=config.batch_size, **changes)


# Training ----------------------------------------------------------------------------------------


def training_rows(config: SpeedConfig, device: torch.device) -> dict[str, tuple]:
    """The class and the arguments of each row that can be measured here; prints why the others
    cannot. Raises UsageError if none can."""
    rows, half = {}, autocast_dtype("fp16", device) is not None
    for name in config.rows or ROWS:
        make, changes, *options = ROWS[name]
        if any(options) and not half:
            print(f"{name} is left out, because this processor has no bf16")
        elif all(installed(peer) for peer in PEERS if name.startswith(peer)):
            rows[name] = (make, network_config(config, **changes), device, *options)
    if not rows:
        raise UsageError("--rows", "none of them can be measured here", "leave the flag out")
    return rows


def check_same_network(abouts: dict[str, dict]) -> None:
    """Assert that all rows but denoising-diffusion-pytorch's train a network with the same number
    of weights and of FLOPs."""
    for key in ("weights", "flops"):
        counts = {name: about[key] for name, about in abouts.items() if about["same_network"]}
        assert len(set(counts.values())) <= 1, f"not the same number of {key}: {counts}"


def matrix_rate(precision: str, device: torch.device) -> float:
    """What the device reaches in products of large matrices, FLOP/s: the best of three."""
    gpu = device.type == "cuda"
    dtype = next(dtype for dtype, name in PRECISIONS.items() if name == precision)
    side, options = 8192 if gpu else 2048, dict(device=device, dtype=dtype)
    a, b = (torch.randn(side, side, **options) for _ in range(2))
    a @ b
    return 2 * side**3 / min(seconds_of(lambda: a @ b, device, 10 if gpu else 1) for _ in range(3))


def measure_training(config: SpeedConfig, device: torch.device, worker: type) -> list[dict]:
    """A dictionary for each row, by the columns of the table; numbers are not rounded."""
    with ExitStack() as stack:
        rows = training_rows(config, device)
        workers = {name: stack.enter_context(worker(*row)) for name, row in rows.items()}
        abouts = {name: call("about") for name, call in workers.items()}
        check_same_network(abouts)
        calls = {
            name: partial(call, "time", config.steps_per_round) for name, call in workers.items()
        }
        for precision in {about["precision"] for about in abouts.values()}:
            calls[f"rate {precision}"] = partial(matrix_rate, precision, device)
        found, on_gpu = measure(calls, config.rounds), device.type == "cuda"
        abouts = {name: call("about") for name, call in workers.items()}
    # A GPU's rows are compared with the example in half precision.
    names = ["diffusers-half", "diffusers"] if on_gpu else ["diffusers", "diffusers-half"]
    reference = next(name for name in [*names, *workers] if name in workers)
    lines = []
    for name, about in abouts.items():
        seconds, rate = median(found[name]), found[f"rate {about['precision']}"]
        flops = 3 * about["flops"] * config.batch_size  # backward takes twice as many as forward
        line = {"row": name, "precision": about["precision"], "M weights": about["weights"] / 1e6}
        line |= {"GFLOP forward": about["flops"] / 1e9, "images/s": config.batch_size / seconds}
        line |= {"TFLOP/s": flops / seconds / 1e12}
        line |= {"% of matrix rate": 100 * ratio([flops / s for s in found[name]], rate)}
        line |= {"peak GB": about["memory"] / 1e9} if on_gpu else {}
        lines.append(line | {f"x {reference}": ratio(found[reference], found[name])})
    return lines


def device_rows(averages: Iterable, on_gpu: bool) -> list[tuple[str, float, int]]:
    """Name, microseconds and calls of what ran on the device, from the averages of a profile.

    Each kernel counts once: on a GPU the row of an operator repeats the time of its kernels, and so
    does the mark of a compiled region."""
    device, kind = (DeviceType.CUDA, "device") if on_gpu else (DeviceType.CPU, "cpu")
    found = [one for one in averages if one.device_type == device and not one.is_user_annotation]
    found = [(one.key, getattr(one, f"self_{kind}_time_total"), one.count) for one in found]
    return sorted(found, key=lambda row: -row[1])


def measure_profile(config: SpeedConfig, device: torch.device, worker: type) -> list[dict]:
    """A dictionary for each of the 40 kernels that take most of a step of ours."""
    ours, steps, on_gpu = Ours(network_config(config), device), 3, device.type == "cuda"
    ours.time(steps)
    with profile() as profiled:
        seconds_of(ours.step, device, steps)
    rows = device_rows(profiled.key_averages(), on_gpu)
    total = sum(time for _, time, _ in rows)
    return [
        {
            "kernel": name[:70].replace("|", "/"),
            "ms of a step": time / steps / 1e3,
            "% of all": 100 * time / total,
            "calls": count / steps,
        }
        for name, time, count in rows[:40]
    ]


# Sampling ----------------------------------------------------------------------------------------


class OurSampling:
    """This project, as `sample.py` generates: in half precision if the device has it."""

    def __init__(self, path: Path, config: Config, device: torch.device):
        keep_freed_memory()
        self.device, self.trained = device, load_trained(path, device=device)

    def generate(self, sampler: str, steps: int, count: int) -> Tensor:
        """(count, 3, H, W) in [-1, 1], on the CPU."""
        options = dict(batch_size=count, sampler=sampler, steps=steps)
        return torch.cat([x.cpu() for x in generate(self.trained, range(count), **options)])

    def time(self, sampler: str, steps: int, count: int) -> float:
        """Seconds for the images."""
        return seconds_of(lambda: self.generate(sampler, steps, count), self.device)


class DiffusersSampling(OurSampling):
    """diffusers' pipelines with our weights, in the same precision: on a GPU weights in float16; on
    a CPU, where the pipelines cannot use such weights, autocast."""

    def __init__(self, path: Path, config: Config, device: torch.device):
        self.config, self.device = config, device
        ours = load_trained(path, device="cpu", half=False).model
        self.network = diffusers_network(ours).eval().to(device)
        self.half = autocast_dtype("fp16", device) is not None
        if device.type == "cuda":
            self.network.half()

    def generate(self, sampler: str, steps: int, count: int) -> Tensor:
        """(count, 3, H, W) in [-1, 1], on the CPU."""
        on_cpu = self.half and self.device.type == "cpu"
        with torch.autocast("cpu", torch.bfloat16, enabled=on_cpu):
            return pipeline_images(self.network, self.config, sampler, steps, count, seed=0)


def random_network(config: Config) -> UNet:
    """A network without a layer whose weights are zero."""
    torch.manual_seed(0)
    model = UNet(**unet_arguments(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def write_checkpoint(config: Config, path: Path) -> None:
    """A checkpoint of `random_network` that `sample.py` can read."""
    weights = random_network(config).state_dict()
    state = {"unet": unet_arguments(config), "diffusion": diffusion_arguments(config)}
    state |= {"model": weights, "ema": {"model": weights, "num_updates": 0}}
    save_checkpoint(path, {"settings": asdict(config), "step": 0, **state})


def measure_sampling(config: SpeedConfig, device: torch.device, worker: type) -> list[dict]:
    """A dictionary for each sampler, by the columns of the table; numbers are not rounded."""
    lines = []
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "random.pt"
        network = network_config(config, prediction="eps")
        write_checkpoint(network, path)
        makers = {"ours": OurSampling, "diffusers": DiffusersSampling}
        workers = {
            name: stack.enter_context(worker(make, path, network, device))
            for name, make in makers.items()
        }
        for sampler, steps in product(("ddim", "dpm++"), config.steps):
            calls = {}
            for name, call in workers.items():
                call("time", sampler, 2, config.batch_size)  # warms up
                calls[name] = partial(call, "time", sampler, steps, config.batch_size)
            found = measure(calls, config.rounds)
            line = {"sampler": f"{sampler}:{steps}"}
            line |= {f"{name}, seconds": median(seconds) for name, seconds in found.items()}
            lines.append(line | {"x diffusers": ratio(found["diffusers"], found["ours"])})
    return lines


MEASURES = {"training": measure_training, "profile": measure_profile, "sampling": measure_sampling}


def run(config: SpeedConfig, here: bool = False) -> list[dict]:
    """Measure what the config says, and print the table. here: in this process, for tests. Returns
    the lines of the table. Raises UsageError."""
    check_ranges(config)
    device = find_device(config.device)
    about = machine(device)
    if config.what == "sampling" and not installed("diffusers"):
        raise UsageError("--what sampling", "compares with diffusers", "pip install diffusers")
    lines = MEASURES[config.what](config, device, Local if here else Worker)
    cells = [[v if isinstance(v, str) else f"{v:.3g}" for v in line.values()] for line in lines]
    print(f"\n{table(list(lines[0]), cells)}\n")
    print(f"{config.img_size} px, batch {config.batch_size}, medians of {config.rounds} rounds")
    print(about)
    return lines


def main() -> None:
    """The command line: SpeedConfig's flags."""
    run(flags.parse(SpeedConfig, sys.argv[1:], "How fast this project is, beside its peers."))


if __name__ == "__main__":
    flags.run(main)
