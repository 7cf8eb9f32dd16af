"""Train a denoising diffusion model (DDPM, Ho et al. 2020) on faces.

    python train.py --demo                            # synthetic faces, minutes on a CPU
    python train.py --path_to_data data               # CelebA, downloaded into ./data if absent
    python train.py --path_to_data data --resume      # go on after a stop, a crash, a kill
    accelerate launch train.py --path_to_data data    # several GPUs
    tensorboard --logdir ./my_first_diffusion

A run writes everything into ./<experiment_name>. Training is a function of (config, step): no
random state is carried from step to step, so a resumed run equals one that never stopped.
"""

import math
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dataset.faces import drop_attributes
from diffusion import NOISE_SCHEDULES, PREDICTIONS
from engine.run import Run
from engine.session import open_run
from optimizers import OPTIMIZERS
from system import flags
from system.device import DEVICES
from system.errors import UsageError
from system.flags import check_ranges, fixed, free, steered
from unet import check_shape

# The learning rate after the warm-up: share of the training that is done, 0 to 1 -> factor.
LR_SCHEDULES = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "wsd": lambda progress: min(1.0, 5 * (1 - progress)),  # warm-up, stable, decay: Hu et al. 2024
}


@dataclass(frozen=True)
class Config:
    """The constants of a run: edit them here, pass them as flags, or write Config(img_size=32).

    A constant with the name of a parameter of `UNet` or `Diffusion` is passed to it, and saved with
    the weights. All others are read as `run.config.name`. --resume keeps a `fixed` constant, may
    change a `free` one, and changes a `steered` one with a warning. Each takes one line, and its
    comment is the text of --help."""

    # Run
    experiment_name: str = free("my_first_diffusion")  # folder for all that the run writes
    path_to_data: str = free("data")  # folder or zip of images, or a data set's name; data: CelebA
    resume: bool = free(False)  # go on from the newest good checkpoint, or start if there is none
    init_from: str = free("")  # weights to start from: a run, a checkpoint, a diffusers folder
    seed: int = fixed(0, least=0)  # for weights, data order, noise and dropout
    # Data
    img_size: int = fixed(64, least=8)  # pixels of a side: 32, 64, 128, 192, 256
    horizontal_flip: bool = fixed(True)  # mirror half of the images in training
    skip_damaged: bool = free(False)  # leave out images that cannot be read
    only: tuple[str, ...] = fixed(())  # train on the faces with these attributes: Smiling Male=-1
    attributes: tuple[str, ...] = fixed(())  # condition on these: Smiling Male Eyeglasses; all
    attribute_dropout: float = fixed(0.1, least=0, most=1)  # share trained unconditionally
    # Network
    channels: int = fixed(128, least=4)  # width of the first stage
    channel_mults: tuple[int, ...] = fixed((), least=1)  # width of each stage, times channels
    num_res_blocks: int = fixed(2, least=1)  # residual blocks in a stage
    attn_resolutions: tuple[int, ...] = fixed((16, 12, 8))  # resolutions in pixels with attention
    head_dim: int = fixed(64, least=1)  # channels of an attention head
    dropout: float = steered(0.1, least=0, below=1)  # share of activations dropped in training
    norm_groups: int = fixed(0, least=0)  # groups of every norm; 0: up to 32, by its channels
    # Diffusion
    num_timesteps: int = fixed(1000, least=2)  # T, the steps of the forward process
    noise_schedule: Literal[*NOISE_SCHEDULES] = fixed("cosine")  # how the noise grows with t
    prediction: Literal[*PREDICTIONS] = fixed("v")  # what the network's output is
    # Training
    num_training_steps: int = free(250_000, least=1)  # optimiser updates
    batch_size: int = fixed(128, least=1)  # images in a forward pass on each device
    gradient_accumulation_steps: int = free(1, least=1)  # passes in an update, by each process
    optimizer: Literal[*OPTIMIZERS] = fixed("adamw")  # muon learns sooner in short runs
    learning_rate: float = steered(2e-4, above=0)  # peak; muon takes a higher one than adamw
    lr_schedule: Literal[*LR_SCHEDULES] = steered("cosine")  # cosine, wsd: 0 at the end
    warmup_steps: int = steered(5000, least=0)  # updates in which the learning rate rises from 0
    max_grad_norm: float = steered(1.0, above=0)  # the gradient's norm is clipped to this
    ema_decay: float = fixed(0.9999, least=0, below=1)  # of the averaged weights, which generate
    mixed_precision: Literal["fp16", "bf16", "no"] = free("fp16")  # a CPU uses bf16 if it can
    compile: bool = free(True)  # torch.compile the network, on a CUDA GPU only
    device: Literal[*DEVICES] = free("auto")  # auto: cuda if there is one, else cpu; mps is untried
    deterministic: bool = free(False)  # on a CUDA GPU: the same numbers in each run, but slower
    # Log
    log_every: int = free(100, least=1)  # steps between two points of the curves
    sample_every: int = free(5000, least=1)  # steps between two grids of samples
    num_samples: int = free(64, least=1)  # images in a grid
    save_every: int = free(5000, least=1)  # steps between two checkpoints
    keep_checkpoints: int = free(3, least=1)  # newest checkpoints kept, beside an early one


# The constants that `--demo` changes: synthetic faces, and a network that a CPU trains in minutes.
DEMO = dict(
    experiment_name="demo",
    path_to_data="synthetic",
    img_size=32,
    attributes=(
        *("Bangs", "Black_Hair", "Blond_Hair", "Brown_Hair", "Eyeglasses"),
        *("Gray_Hair", "Male", "Smiling", "Wearing_Hat"),
    ),
    channels=32,
    channel_mults=(1, 2, 4),
    num_res_blocks=1,
    attn_resolutions=(8,),
    dropout=0.0,
    norm_groups=16,
    num_training_steps=750,
    batch_size=32,
    optimizer="muon",
    learning_rate=4e-3,
    warmup_steps=40,
    ema_decay=0.99,
    mixed_precision="bf16",
    log_every=25,
    sample_every=150,
    save_every=150,
)


def check_config(config: Config) -> None:
    """Raise UsageError, naming the flag, for a constant that is not possible."""
    check_ranges(config)
    if Path(config.experiment_name).name in ("", ".."):  # ".", "./", "/" too
        raise UsageError("--experiment_name", f"is {config.experiment_name!r}", "name a folder")
    if os.path.realpath(config.experiment_name) == os.path.realpath(config.path_to_data):
        raise UsageError("--experiment_name", "is the folder of the data", "give another name")
    if len(set(config.attributes)) < len(config.attributes):
        raise UsageError("--attributes", f"is {config.attributes!r}", "give each name once")
    if config.norm_groups and config.channels % config.norm_groups:
        fix = f"give 0, or a divisor of {config.channels} channels"
        raise UsageError("--norm_groups", f"is {config.norm_groups}", fix)
    check_shape(config.img_size, config.channels, config.channel_mults, config.head_dim)


def seed_of(*numbers: int) -> int:
    """One seed below 2**63 from several numbers; changing any of them gives an unrelated seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of the update that follows `step` completed ones."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    after = max(0, step - config.warmup_steps)
    progress = min(1.0, after / max(1, config.num_training_steps - config.warmup_steps))
    return config.learning_rate * warmup * LR_SCHEDULES[config.lr_schedule](progress)


def loss_of(run: Run, number: int) -> Tensor:
    """The loss of micro-batch `number` of the run, a scalar. All that is random about it follows
    from (seed, number)."""
    config, device = run.config, run.diffusion.device
    # The last number keeps the streams apart; dataset/faces.py uses others.
    torch.manual_seed(seed_of(config.seed, number, 0, 1))  # for dropout
    generator = torch.Generator(device)  # for dropped attributes, timesteps and noise
    generator.manual_seed(seed_of(config.seed, number, 0, 2))
    x_0, attributes = run.batches(number)
    if attributes is not None:
        attributes = drop_attributes(attributes, config.attribute_dropout, generator)
    with torch.autocast(device.type, run.dtype, enabled=run.dtype is not None):
        return run.diffusion.loss(run.forward, x_0, generator, attributes)


def train_step(run: Run) -> dict[str, Tensor]:
    """One update. What it returns is logged.

    The processes of a run take its numbered micro-batches in turns, so an update is the same, to
    rounding, however many processes share it. Returns the loss, the mean over the micro-batches of
    this process, and the gradient norm before clipping: scalars on the device. Nothing here waits
    for the device."""
    config, state = run.config, run.state
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)

    # Accumulate the gradients of this process's micro-batches.
    accumulation = config.gradient_accumulation_steps
    total = torch.zeros((), device=run.diffusion.device)
    for micro in range(accumulation):
        number = (state.step * accumulation + micro) * run.world_size + run.rank
        # Processes exchange gradients with the last micro-batch only.
        wait = micro < accumulation - 1 and hasattr(run.forward, "no_sync")
        with run.forward.no_sync() if wait else nullcontext():
            loss = loss_of(run, number) / accumulation
            state.scaler.scale(loss).backward()
        total += loss.detach()

    # Clip the unscaled gradients; the scaler skips an update that is not finite.
    state.scaler.unscale_(state.optimizer)
    parameters = state.model.parameters()
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    state.ema.update(state.model)
    state.step += 1
    return {"loss": total, "grad_norm": grad_norm}


def train(config: Config, given: frozenset[str] | None = None) -> Path:
    """Train as `config` says. Returns the experiment's folder.

    given: the constants that the user set. With `resume` or `init_from` all others come from the
    checkpoint. None: every constant is set. Raises UserError, by kind, for what the user can fix;
    Interrupted after a signal, when the last step is saved."""
    check_config(config)
    with open_run(config, loss_of, given) as run:
        config = run.config
        for _ in run.steps():
            run.meter(**train_step(run))
            saving = run.due(config.save_every)
            if saving or run.due(config.log_every):
                run.log()
            if saving:
                run.save()  # before what may fail
                run.measure()
            if run.due(config.sample_every):
                run.sample()
    return run.folder


def main() -> None:
    """The command line: Config's flags, and --demo."""
    presets = {"demo": ("train on synthetic faces, in minutes, on a CPU", DEMO)}
    config = flags.parse(Config, sys.argv[1:], "Train a diffusion model on faces.", presets)
    train(config, flags.given(Config, sys.argv[1:]))


if __name__ == "__main__":
    fix = "lower --batch_size (and raise --gradient_accumulation_steps), --num_samples, "
    flags.run(main, fix + "--channels or --num_res_blocks")
