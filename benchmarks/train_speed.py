"""How fast this project trains, beside diffusers and denoising-diffusion-pytorch.

    python benchmarks/train_speed.py                          # 32 px, 64 channels, batch 32
    python benchmarks/train_speed.py --rows ours diffusers    # only these; --help lists all
    python benchmarks/train_speed.py --img_size 64 --channels 128 --channel_mults 1 2 2 2 4 \\
        --batch_size 128 --rounds 10 --steps_per_round 20     # on a GPU

    pip install -r requirements-test.txt denoising-diffusion-pytorch

Every row has a process of its own: what `train.py` sets for its process helps no other row, and
each has its own memory to show. They compute in turn, one at a time, round after round; ratios are
taken within a round, and of each number the median over the rounds is shown. This project's rows
run `train.train_step` and `Watch.add`, with the making of the batch. The others find one batch
ready on the device, and diffusers' network has the same weights and FLOPs, which is asserted. A
image costs three times the FLOPs of its forward pass.
"""

import importlib.util
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Worker, find_device, machine, measure, ratio
from benchmarks.peers import (
    DenoisingDiffusionPytorch,
    Diffusers,
    Machine,
    Ours,
    make_config,
)
from system import flags
from system.errors import UsageError
from system.flags import check_ranges, constant
from system.terminal import table
from train import Config

ROWS = {
    "ours": "this project as train.py runs it: fp16 on a GPU, bf16 on a CPU that has it",
    "ours-bf16": "on a GPU, in bf16",
    "ours-float32": "in full precision",
    "diffusers": "as its unconditional example runs it: in full precision, the default",
    "diffusers-fp16": "on a GPU, the example with --mixed_precision fp16",
    "diffusers-bf16": "the example with --mixed_precision bf16",
    "diffusers-advised": "bf16, channels_last, fused AdamW and average; a GPU: compiled, TF32",
    "denoising-diffusion-pytorch": "its Trainer's step; its own network of about as many FLOPs",
}


@dataclass(frozen=True)
class TrainSpeedConfig:
    """What to train, and how long."""

    img_size: int = 32  # pixels of a side
    channels: int = 64  # channels of the first stage
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)  # times `channels`, for each stage
    batch_size: int = 32  # images in a step
    rounds: int = constant(5, least=1)  # turns that every row has
    steps_per_round: int = constant(2, least=1)  # timed in a turn, after one that is not
    rows: tuple[str, ...] = ()  # names of the rows to measure; empty: all
    device: str = ""  # cpu or cuda; empty: the GPU where there is one


@dataclass
class Measured:
    """A row of the table."""

    about: dict  # what `Row.about` returns
    seconds: list[float] = field(default_factory=list)  # for a step, in each round
    memory: int = 0  # bytes, at most


def config_of(config: TrainSpeedConfig, **changes) -> Config:
    """The constants of the rows."""
    check_ranges(config)
    shape = (config.img_size, config.channels, config.channel_mults)
    return make_config(*shape, batch_size=config.batch_size, **changes)


def makers(config: TrainSpeedConfig, device: torch.device) -> dict[str, tuple]:
    """For each row that can be measured here, its class and arguments. Names the others."""
    for name in config.rows:
        if name not in ROWS:
            raise UsageError("--rows", f"no row {name}", f"choose of {', '.join(ROWS)}")
    gpu = device.type == "cuda"
    bf16 = gpu or torch.cpu._is_avx512_bf16_supported()
    lucid = importlib.util.find_spec("denoising_diffusion_pytorch") is not None
    train_config = partial(config_of, config)
    plain, on_bf16 = train_config(), train_config(mixed_precision="bf16")
    float32 = train_config(mixed_precision="no")
    every = {
        "ours": (True, Ours, plain, device),
        "ours-bf16": (gpu, Ours, on_bf16, device),
        "ours-float32": (True, Ours, float32, device),
        "diffusers": (True, Diffusers, plain, device, "float32"),
        "diffusers-fp16": (gpu, Diffusers, plain, device, "fp16"),
        "diffusers-bf16": (bf16, Diffusers, plain, device, "bf16"),
        "diffusers-advised": (bf16, Diffusers, plain, device, "bf16", True),
        "denoising-diffusion-pytorch": (lucid, DenoisingDiffusionPytorch, plain, device),
    }
    chosen = {name: row for name, row in every.items() if not config.rows or name in config.rows}
    without = [name for name, row in chosen.items() if not row[0]]
    if without:
        print(f"not on this machine: {', '.join(without)}", file=sys.stderr)
    if len(without) == len(chosen):
        raise UsageError("--rows", "none of them is for this machine", "leave the flag out")
    return {name: row[1:] for name, row in chosen.items() if row[0]}


def check_same_network(abouts: dict[str, dict]) -> str:
    """Assert that all rows but denoising-diffusion-pytorch's train a network of the same weights
    and, within 3 %, FLOPs. Returns the line that says so."""
    same = {name: about for name, about in abouts.items() if about["same_network"]}
    weights = {name: about["weights"] for name, about in same.items()}
    assert len(set(weights.values())) == 1, f"not the same number of weights: {weights}"
    flops = {name: about["flops"] for name, about in same.items()}
    least, most = min(flops.values()), max(flops.values())
    assert most <= 1.03 * least, f"not the same number of FLOPs: {flops}"
    return (
        f"checked: {len(same)} rows train {next(iter(weights.values())):,} weights with"
        f" {least / 1e9:.4g} GFLOP a forward pass and image, within {most / least - 1:.2%}"
    )


def run_rows(
    config: TrainSpeedConfig, device: torch.device
) -> tuple[dict[str, Measured], dict, dict]:
    """Measure all rows in turn. Returns them, what the machine can do in each precision (TFLOP/s of
    matrix products and of convolutions, in each round), and the parts of our step."""
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(*row)) for name, row in makers(config, device).items()
        }
        rows = {name: Measured(worker("about")) for name, worker in workers.items()}
        if any(row.about["same_network"] for row in rows.values()):
            print(check_same_network({name: row.about for name, row in rows.items()}))
        precisions = sorted({row.about["precision"] for row in rows.values()})
        steps, rates_of = config.steps_per_round, Machine(config_of(config), device).rates
        calls = {name: partial(worker, "time", steps) for name, worker in workers.items()}
        for precision in precisions:
            calls[f"rates {precision}"] = partial(rates_of, precision)
        if "ours" in workers:
            calls["constant"] = partial(workers["ours"], "time_constant", steps)
        answers = measure(calls, config.rounds)
        for name, row in rows.items():
            row.seconds, row.memory = answers[name], workers[name]("memory")
        rates = {precision: answers[f"rates {precision}"] for precision in precisions}
        parts = {}
        if "ours" in workers:
            parts = {"seconds": workers["ours"]("parts"), "constant": answers["constant"]}
            if device.type == "cuda":
                parts["waits"] = workers["ours"]("synchronises")
    return rows, rates, parts


def format_rows(
    config: TrainSpeedConfig, rows: dict[str, Measured], rates: dict, reference: str
) -> str:
    """The table: every number is the median over the rounds."""
    lines = []
    for name, row in rows.items():
        speeds = [config.batch_size / seconds for seconds in row.seconds]
        work = 3 * row.about["flops"] / 1e12  # TFLOP for a image
        shares = []
        for rate in zip(*rates[row.about["precision"]], strict=True):
            shares.append(f"{ratio([speed * work for speed in speeds], rate):.1%}")
        label = f", {row.about['label']}" if row.about["label"] else ""
        times = ratio(rows[reference].seconds, row.seconds) if reference in rows else None
        lines.append(
            [
                f"{name} ({row.about['precision']}{label})",
                f"{row.about['weights'] / 1e6:.3g}",
                f"{row.about['flops'] / 1e9:.4g}",
                f"{median(speeds):.4g}",
                f"{median(speeds) * work:.3g}",
                *shares,
                f"{row.memory / 1e9:.2f}",
                f"{times:.2f}" if times else "-",
            ]
        )
    columns = ["row", "M weights", "GFLOP forward", "images/s", "TFLOP/s"]
    columns += ["of matrix product", "of convolution", "peak GB", f"x {reference}"]
    return table(columns, lines)


def format_machine(rates: dict) -> str:
    """What the shares are shares of."""
    parts = []
    for precision, of_rounds in rates.items():
        products, convolutions = (median(rate) for rate in zip(*of_rounds, strict=True))
        parts.append(f"{precision} {products:.3g} and {convolutions:.3g}")
    return f"matrix products and 3x3 convolutions (TFLOP/s): {', '.join(parts)}"


def format_parts(ours: Measured, parts: dict) -> str:
    """What of our step is not the network."""
    step = median(ours.seconds)
    shares = [f"{name} {value / step:.2%}" for name, value in parts["seconds"].items()]
    text = f"of our step of {step * 1e3:.4g} ms, each measured alone: {', '.join(shares)}\n"
    times = ratio(ours.seconds, parts["constant"])
    text += f"our step with a batch made for it takes {times:.3f} of one with a constant batch"
    if "waits" in parts:
        text += f"\nour step waits for the GPU: {parts['waits'] or 'no'}"
    return text


def main() -> None:
    """The command line."""
    rows = "\n\n".join(f"{name}: {about}." for name, about in ROWS.items())
    description = f"How fast this project trains, beside its peers. Rows:\n\n{rows}"
    config = flags.parse(TrainSpeedConfig, sys.argv[1:], description)
    device = find_device(config.device)
    about_machine = machine(device)
    measured, rates, parts = run_rows(config, device)
    # Like with like: a GPU's rows are compared with the example's in half precision.
    reference = "diffusers-fp16" if device.type == "cuda" else "diffusers"
    print(f"\n{format_rows(config, measured, rates, reference)}\n")
    print(format_machine(rates))
    if "ours" in measured:
        print(format_parts(measured["ours"], parts))
    print(
        f"{config.img_size} px, batch {config.batch_size}, {config.rounds} rounds of"
        f" {config.steps_per_round} steps; peak GB of "
        + ("the GPU" if device.type == "cuda" else "the process, libraries included")
    )
    print(about_machine)


if __name__ == "__main__":
    flags.run(main)
