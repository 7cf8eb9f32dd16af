"""Other ways to compute this project's step and its images, for a GPU to judge: what wins there
belongs into the product, what does not goes from here.

    python benchmarks/variants.py                                   # 64 px, 128 channels, batch 128
    python benchmarks/variants.py --variants "as it is" grad_scale  # only these; --help lists all

Every variant has a process of its own, which changes the product from outside, and they compute in
turn as in `train_speed.py`. Each must first find the loss, and the norm of its gradient, that the
product finds, or it is left out. Evaluations are those of sampling: few images, averaged
weights in half precision. The product does not compile them: there "not compiled" is its row.
"""

import copy
import math
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

import unet
from benchmarks.common import Worker, empty_cache, find_device, machine, measure, ratio, seconds_of
from benchmarks.peers import Ours, make_config
from generate import cast_weights
from system import flags
from system.errors import UsageError
from system.flags import check_ranges, constant
from system.processes import change_tensors
from system.terminal import table
from train import Config
from utils import save_checkpoint

NOT_COMPILED = ("not compiled", "weights cast anew")
MODES = {"max-autotune": "max-autotune-no-cudagraphs", "CUDA graphs": "reduce-overhead"}


@dataclass(frozen=True)
class VariantsConfig:
    """What to train, and how long."""

    img_size: int = 64  # pixels of a side
    channels: int = 128  # channels of the first stage
    channel_mults: tuple[int, ...] = ()  # times `channels`, for each stage; empty: by img_size
    batch_size: int = 128  # images in a step
    num_images: int = constant(4, least=1)  # in an evaluation
    rounds: int = constant(5, least=1)  # turns that every variant has
    steps: int = constant(10, least=1)  # timed in a turn, after one that is not
    variants: tuple[str, ...] = ()  # names of those to measure; empty: all
    device: str = ""  # cpu or cuda; empty: the GPU where there is one


def norm_by_channels(self: unet.GroupNorm, x: Tensor) -> Tensor:
    """GroupNorm with the statistics of each channel first, which reads channels_last in order."""
    groups = (x.shape[0], self.num_groups, -1)
    variance, mean = torch.var_mean(x.float(), dim=(2, 3), correction=0)  # (B, C)
    variance, mean = variance.view(groups), mean.view(groups)
    mean_of_group = mean.mean(2, keepdim=True)
    variance = (variance + (mean - mean_of_group) ** 2).mean(2, keepdim=True)
    scale = (variance + self.eps).rsqrt() * self.weight.view(1, *groups[1:])
    shift = self.bias.view(1, *groups[1:]) - mean_of_group * scale
    y = x.float() * scale.view(*x.shape[:2], 1, 1) + shift.view(*x.shape[:2], 1, 1)
    return F.silu(y) if self.silu else y


def transposed_upsampling(self: unet.Upsample, x: Tensor) -> Tensor:
    """Upsample as one transposed convolution, as float32 on a CPU has it: fewer products."""
    weight = F.pad(self.conv.weight.flip(2, 3), (1, 1, 1, 1))
    weight = F.avg_pool2d(weight, 2, stride=1, divisor_override=1).transpose(0, 1)
    return F.conv_transpose2d(x, weight, stride=2, padding=1) + self.conv.bias[:, None, None]


def fold_into_adamw(ours: Ours) -> None:
    """Leave unscaling and clipping to fused AdamW, which divides gradients by its `grad_scale`."""
    scaler, optimizer = ours.state.scaler, ours.state.optimizer

    def norm_only(parameters, max_norm: float) -> Tensor:
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        scale = scaler.scale(torch.ones((), device=ours.device))
        optimizer.grad_scale = torch.maximum(norm / max_norm, scale)
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        return norm / scale

    def update() -> None:
        factors = scaler.get_growth_factor(), scaler.get_backoff_factor()
        state = scaler._scale, scaler._growth_tracker, optimizer.found_inf
        torch._amp_update_scale_(*state, *factors, scaler.get_growth_interval())

    torch.nn.utils.clip_grad_norm_ = norm_only
    scaler.unscale_, scaler.step, scaler.update = lambda _: None, lambda _: optimizer.step(), update


class Variant(Ours):
    """This project's step, changed."""

    def __init__(self, name: str, config: Config, device: torch.device):
        if name == "norm by channels":
            unet.GroupNorm.forward = norm_by_channels
        if name == "transposed upsampling":
            unet.Upsample.forward = transposed_upsampling
        super().__init__(replace(config, compile=False), device)
        if name == "grad_scale":
            fold_into_adamw(self)
        self.sampled = copy.deepcopy(self.state.ema.model)
        if self.dtype is not None and name != "weights cast anew":
            cast_weights(self.sampled, self.dtype)
        if device.type == "cuda" and name not in NOT_COMPILED:
            for network in (self.network, self.sampled):
                network.compile(mode=MODES.get(name))

    def first(self) -> list[float]:
        """The mean loss and norm of the gradient of the first three steps."""
        for _ in range(3):  # the last convolution starts at zero and hides what is before it
            self.step()
        return list(self.watch.read(3, lambda totals: totals).values())

    def evaluations(self, count: int, times: int) -> float:
        """Seconds for an evaluation of so many images, as samplers ask for it."""
        size = self.config.img_size
        x_t = torch.randn(count, 3, size, size, device=self.device)
        t = torch.full((count,), 500, device=self.device)

        def evaluate() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(self.device.type, self.dtype, self.dtype is not None):
                x_t.add_(self.sampled(x_t, t), alpha=0.0)

        with torch.no_grad():
            evaluate()
            seconds = seconds_of(evaluate, self.device, times)
        empty_cache(self.device)
        return seconds

    def saving(self, times: int) -> tuple[float, float]:
        """Seconds to save a checkpoint; of those, to copy it to the CPU."""
        state = self.state.state_dict

        def copy_to_cpu() -> None:
            change_tensors(state(), lambda tensor: tensor.to("cpu", copy=True))

        with TemporaryDirectory(dir=".") as folder:
            path = Path(folder) / "saved.pt"
            save = seconds_of(lambda: save_checkpoint(path, state()), self.device, times)
        return save, seconds_of(copy_to_cpu, self.device, times)


VARIANTS = ("as it is", "norm by channels", "transposed upsampling", "grad_scale")
VARIANTS += (*NOT_COMPILED, *MODES)


def compare(config: VariantsConfig, device: torch.device) -> str:
    """Measure, and return the tables."""
    check_ranges(config)
    if unknown := [name for name in config.variants if name not in VARIANTS]:
        fix = f"choose of {', '.join(VARIANTS)}"
        raise UsageError("--variants", f"{unknown[0]!r} is none", fix)
    shape = config.img_size, config.channels, config.channel_mults
    train_config = make_config(*shape, batch_size=config.batch_size, warmup_steps=0)
    names = config.variants or VARIANTS
    with ExitStack() as stack:
        workers, expected = {}, None
        for name in names:
            try:
                worker = stack.enter_context(Worker(Variant, name, train_config, device))
                found = worker("first")
                worker("evaluations", config.num_images, 1)
                expected = expected or found
                if not all(map(partial(math.isclose, rel_tol=0.05), found, expected)):
                    raise RuntimeError(f"it finds {found}, the first row {expected}")
                workers[name] = worker
            except RuntimeError as error:
                if name == names[0]:
                    raise
                print(f"{name} is left out: {str(error).strip().splitlines()[-1]}")
        steps = {n: partial(worker, "time", config.steps) for n, worker in workers.items()}
        calls = {
            n: partial(worker, "evaluations", config.num_images, config.steps)
            for n, worker in workers.items()
        }
        steps, calls = measure(steps, config.rounds), measure(calls, config.rounds)
        memory = {name: worker("memory") for name, worker in workers.items()}
        save, copying = workers[names[0]]("saving", min(config.steps, 3))
    rows = []
    for name in workers:
        row = [f"{median(config.batch_size / s for s in steps[name]):.1f}"]
        row += [f"{ratio(steps[names[0]], steps[name]):.3f}", f"{memory[name] / 1e9:.2f}"]
        row += [f"{median(calls[name]) * 1e3:.2f}", f"{ratio(calls[names[0]], calls[name]):.3f}"]
        rows.append([name, *row])
    columns = ["variant", "images/s", "x first row", "peak GB", "ms to evaluate", "x first row's"]
    won = (save - copying) / (1000 * median(steps[names[0]]) + save)
    saving = ["checkpoint, every 1000 steps", f"{save:.2f}", f"{copying:.2f}", f"{won:.1%}"]
    about_saving = ["saving", "seconds", "of it copying to the CPU", "a thread for the rest wins"]
    return f"{table(columns, rows)}\n\n{table(about_saving, [saving])}"


def main() -> None:
    """The command line: VariantsConfig's flags."""
    description = f"Other ways to compute this project's step. Variants: {', '.join(VARIANTS)}"
    config = flags.parse(VariantsConfig, sys.argv[1:], description)
    device = find_device(config.device)
    about_machine = machine(device)
    print(f"\n{compare(config, device)}\n")
    print(f"{config.rounds} rounds of {config.steps} steps, medians; {config.num_images} images")
    print(about_machine)


if __name__ == "__main__":
    flags.run(main)
