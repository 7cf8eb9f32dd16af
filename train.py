"""Train a denoising diffusion model (DDPM, Ho et al. 2020) on faces.

    python train.py --demo                            # synthetic faces, minutes on a CPU
    python train.py --path_to_data data               # CelebA, downloaded into ./data where absent
    python train.py --path_to_data data --resume      # go on after a stop, a crash, a kill
    accelerate launch train.py --path_to_data data    # several GPUs
    tensorboard --logdir ./my_first_diffusion

Everything a run leaves lies in ./<experiment_name>. Training is a function of (config, step): no
random state is carried from step to step, so a resumed run equals one that was never stopped.
"""

import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dataset.faces import drop_attributes
from diffusion import NOISE_SCHEDULES, PREDICTIONS
from engine.log import RunLog
from engine.safety import StopSignals, Watch
from engine.session import prepare_network, rehearse, set_up
from optimizers import OPTIMIZERS
from system import flags
from system.device import DEVICES, find_device, set_up_device
from system.errors import Interrupted, UsageError
from system.files import FolderLock
from system.flags import check_ranges, fixed, free, steered
from system.processes import Processes
from system.terminal import Progress, say
from system.threads import a_core_each
from unet import check_shape
from utils import checkpoint_path, prune_checkpoints


@dataclass(frozen=True)
class Config:
    """The constants of a run: edit them here, pass them as flags, or write Config(img_size=32)."""

    # Run
    experiment_name: str = free("my_first_diffusion")  # folder of all that the run leaves
    path_to_data: str = free("data")  # folder or zip of images, or a built-in source; data: CelebA
    resume: bool = free(False)  # go on from the newest good checkpoint, or start if there is none
    init_from: str = free("")  # weights to start from: a run, a checkpoint, a folder of diffusers'
    seed: int = fixed(0, least=0)  # of everything random: weights, data order, noise, dropout
    # Data
    img_size: int = fixed(64, least=8)  # pixels of a side: 32, 64, 128, 192, 256
    only: tuple[str, ...] = fixed(())  # train on the faces with these attributes: Smiling Male=-1
    attributes: tuple[str, ...] = fixed(())  # generate faces by these: Smiling Male Eyeglasses
    grey: bool = fixed(False)  # take the colours out; of grey images one channel is trained anyway
    attribute_dropout: float = fixed(0.1, least=0, most=1)  # share trained on without any attribute
    # Network
    channels: int = fixed(128, least=4)  # channels of the first stage
    channel_mults: tuple[int, ...] = fixed((), least=1)  # times channels, by stage; (): by img_size
    num_res_blocks: int = fixed(2, least=1)  # residual blocks in a stage
    attn_resolutions: tuple[int, ...] = fixed((16, 12, 8))  # resolutions, in pixels, with attention
    head_dim: int = fixed(64, least=1)  # channels of an attention head
    dropout: float = steered(0.1, least=0, below=1)  # share of activations dropped in training
    norm_groups: int = fixed(0, least=0)  # of every group norm; 0: up to 32, by its channels
    # Diffusion
    num_timesteps: int = fixed(1000, least=2)  # T, the steps of the forward process
    noise_schedule: Literal[*NOISE_SCHEDULES] = fixed("cosine")  # how the noise grows with t
    prediction: Literal[*PREDICTIONS] = fixed("v")  # what the network's output is
    # Training
    num_training_steps: int = free(250_000, least=1)  # optimiser updates
    batch_size: int = fixed(128, least=1)  # images in a forward pass on each device
    gradient_accumulation_steps: int = free(1, least=1)  # passes in an update, by each process
    optimizer: Literal[*OPTIMIZERS] = fixed("adamw")  # muon: much sooner there, in short runs
    learning_rate: float = steered(2e-4, above=0)  # at its highest; muon takes ten times adamw's
    lr_schedule: Literal["constant", "cosine"] = steered("cosine")  # falls to 0
    warmup_steps: int = steered(5000, least=0)  # updates over which the learning rate rises from 0
    max_grad_norm: float = steered(1.0, above=0)  # length to which longer gradients are clipped
    ema_decay: float = fixed(0.9999, least=0, below=1)  # of the averaged weights, used to generate
    mixed_precision: Literal["fp16", "bf16", "no"] = free("fp16")  # on a CPU: bf16 if it can, or no
    compile: bool = free(True)  # torch.compile the network, on a CUDA GPU only
    device: Literal[*DEVICES] = free("auto")  # auto: cuda or cpu; mps: Apple's GPU, untried
    deterministic: bool = free(False)  # on a CUDA GPU: the same numbers in each run, but slower
    # Log
    log_every: int = free(100, least=1)  # steps between two points of the curves
    sample_every: int = free(5000, least=1)  # steps between two grids of samples
    num_samples: int = free(64, least=1)  # images in a grid
    save_every: int = free(5000, least=1)  # steps between two checkpoints
    keep_checkpoints: int = free(3, least=1)  # newest ones that are kept, beside the early guide


# What to do where memory does not suffice.
MEMORY = "lower --batch_size (and raise --gradient_accumulation_steps), --num_samples, "
MEMORY += "--channels, --num_res_blocks or --num_timesteps"

# What `--demo` changes: synthetic faces, and a network that a CPU trains on them in minutes.
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
    """Raise UsageError, naming the flag, for a constant that cannot be."""
    check_ranges(config)
    if Path(config.experiment_name).name in ("", ".."):  # ".", "./", "/" too
        raise UsageError("--experiment_name", f"is {config.experiment_name!r}", "name a folder")
    if len(set(config.attributes)) < len(config.attributes):
        raise UsageError("--attributes", f"is {config.attributes!r}", "give each name once")
    groups, channels = config.norm_groups, config.channels
    if groups and (groups >= channels or channels % groups):  # alone, a channel loses its mean
        fix = f"give 0, or a divisor of {channels} channels, below it"
        raise UsageError("--norm_groups", f"is {groups}", fix)
    try:
        check_shape(config.img_size, config.channels, config.channel_mults, config.head_dim)
    except ValueError as error:
        argument, what, fix = error.args
        raise UsageError(f"--{argument}", what, fix) from error


def seed_of(*numbers: int) -> int:
    """One seed, below 2**63, from several numbers: any of them changed gives an unrelated seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of the update that follows `step` completed ones."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.lr_schedule == "constant":
        return config.learning_rate * warmup
    after = max(0, step - config.warmup_steps)
    progress = after / max(1, config.num_training_steps - config.warmup_steps)
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def loss_of(config, diffusion, batches, dtype, number: int, forward) -> Tensor:
    """The loss of micro-batch `number` of the run, a scalar, with random numbers of its own."""
    torch.manual_seed(seed_of(config.seed, number, 0, 1))  # dropout
    generator = torch.Generator(diffusion.device)
    generator.manual_seed(seed_of(config.seed, number, 0, 2))  # attributes, timesteps, noise
    x_0, attributes = batches(number)
    if attributes is not None:
        attributes = drop_attributes(attributes, config.attribute_dropout, generator)
    with torch.autocast(diffusion.device.type, dtype, enabled=dtype is not None):
        return diffusion.loss(forward, x_0, generator, attributes)


def train_step(
    config, state, diffusion, batches, forward, dtype, rank=0, world_size=1
) -> tuple[Tensor, Tensor]:
    """One update. forward: the network, compiled and distributed as it may be.

    The micro-batches of a run are numbered through, and its processes take turns: an update is the
    same (to rounding) however many of them share it. Returns the loss (mean over the micro-batches
    of this process) and the gradient norm before clipping, both scalars on the device; nothing here
    waits for the device."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)

    # Gather the gradients of this process's micro-batches.
    accumulation = config.gradient_accumulation_steps
    total = torch.zeros((), device=diffusion.device)
    for micro in range(accumulation):
        number = (state.step * accumulation + micro) * world_size + rank
        # Processes exchange gradients once an update, with the last micro-batch.
        wait = micro < accumulation - 1 and hasattr(forward, "no_sync")
        with forward.no_sync() if wait else nullcontext():
            loss = loss_of(config, diffusion, batches, dtype, number, forward) / accumulation
            state.scaler.scale(loss).backward()
        total += loss.detach()

    # Clip the true gradients, not the scaled ones; leave out an update that is not finite.
    state.scaler.unscale_(state.optimizer)
    parameters = state.model.parameters()
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    state.ema.update(state.model)
    state.step += 1
    return total, grad_norm


def train(config: Config) -> Path:
    """Train as `config` says. Returns the experiment's folder; the README tells what lies there.

    Raises UserError, by kind, for what the user can mend; Interrupted after a signal, when it has
    saved."""
    check_config(config)
    folder = Path(config.experiment_name)
    processes = Processes(find_device(config.device))
    is_main, rank, world_size = processes.is_main, processes.rank, processes.world_size
    set_up_device(processes.device, config.deterministic)
    stop = StopSignals(several=world_size > 1)
    with stop, processes, FolderLock(folder) if is_main else nullcontext() as lock:
        run = set_up(config, processes)
        config, state, diffusion, dtype = run.config, run.state, run.diffusion, run.dtype
        if state.step >= config.num_training_steps:
            say(f"{folder} has all its {state.step} steps")
            return folder
        if is_main:
            rehearse(run, processes, stop)
        processes.everyone()
        per_step = config.gradient_accumulation_steps * world_size  # micro-batches
        loss = partial(loss_of, config, diffusion, run.batches, dtype, state.step * per_step + rank)
        forward = prepare_network(run, processes, loss)
        watch = Watch(processes.device, patience=20 if dtype == torch.float16 else 1)
        total, images_per_step = config.num_training_steps, config.batch_size * per_step
        progress = Progress(state.step, total, images_per_step, show=is_main)
        log = RunLog(folder, state.step, state.history) if is_main else nullcontext()
        stop.deferred = True  # from here on a signal waits for the end of the step
        with log, progress, a_core_each(processes.device):
            while state.step < total:
                # Take a step.
                options = forward, dtype, rank, world_size
                watch.add(*train_step(config, state, diffusion, run.batches, *options))
                progress.step()
                step, last = state.step, state.step == total
                stopping = processes.stop_after(step, stop.received)
                saving = step % config.save_every == 0 or last or stopping
                sampling = (step % config.sample_every == 0 or last) and not stopping
                logging = step % config.log_every == 0 or saving

                # Stop where the numbers are no longer finite.
                if logging:
                    values = watch.read(step, processes.mean)
                    values["learning_rate"] = learning_rate(config, step - 1)
                    values["images_per_second"] = progress.log(values["loss"])
                    state.history.append([step, values["loss"]])

                # Save, before anything that is worth less.
                if saving and is_main:
                    lock.check()
                    run.save(checkpoint_path(folder, step))
                    prune_checkpoints(checkpoint_path(folder, step), config.keep_checkpoints, total)

                # Log and sample.
                if logging and is_main:
                    if saving and not stopping:
                        values |= run.held_out_loss()
                    log.scalars(step, values)
                if saving and is_main:
                    log.plot_loss()
                if sampling and is_main:
                    sampled = run.sample(stop, config.num_samples)
                    if sampled is not None:
                        log.images(step, sampled[0])
                        log.scalars(step, sampled[1])

                if saving or sampling:
                    processes.everyone()  # nobody waits for rank 0 in an exchange of gradients
                    progress.restart()  # the clock counts training only
                if stopping:
                    say(f"stopped by a signal, step {step} is saved; go on with --resume")
                    raise Interrupted(stopping)
    return folder


def main() -> None:
    """The command line: Config's flags, and --demo."""
    demo = {"demo": ("train on synthetic faces, on a CPU, in minutes", DEMO)}
    train(flags.parse(Config, sys.argv[1:], "Train a diffusion model on faces.", demo))


if __name__ == "__main__":
    flags.run(main, MEMORY)
