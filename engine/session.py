"""How a run begins: from nothing, from its newest checkpoint, or from other weights; and the dry
run before its first step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset import Batches, Faces, load_faces
from diffusion import Diffusion
from engine.log import RunLog
from engine.run import NoLog, Run, Session, Worker
from engine.safety import StopSignals, preflight
from engine.state import diffusion_arguments, make_state, unet_arguments
from formats.diffusers_folder import diffusers_obstacle
from formats.weights import Saved, network_constants, open_weights, short, start_from
from system.cpu import pinned_threads
from system.device import (
    autocast_dtype,
    compile_network,
    find_device,
    precision_note,
    set_up_device,
)
from system.errors import UsageError
from system.files import FolderLock, save_json
from system.flags import as_flags, resume_rule
from system.processes import Processes
from system.terminal import say
from utils import list_checkpoints, load_newest_checkpoint, reading

# Constants that may differ between the machines of a run.
OF_THE_MACHINE = ("experiment_name", "path_to_data", "resume")


@contextmanager
def open_run(
    config: Any, loss: Callable[[Run, int], Tensor], given: frozenset[str] | None = None
) -> Iterator[Session]:
    """Begin or resume the run that the constants describe, with all that it needs until its end.

    config: train.Config; loss: (run, number of the micro-batch) -> scalar, for trying the network
    out; given: the constants that the user set. A resumed run, and one that starts from other
    weights, takes all others from there. None: every constant is set. Raises UserError, by kind."""
    folder = Path(config.experiment_name)
    processes = Processes(find_device(config.device))
    device = processes.device
    set_up_device(device, config.deterministic)
    stop = StopSignals(several=processes.world_size > 1)
    lock = FolderLock(folder) if processes.is_main else nullcontext()
    with stop, processes, lock:
        run = set_up(config, given, processes, stop, lock)
        if run.state.step < run.config.num_training_steps:
            if processes.is_main:
                dry_run(run)
            processes.everyone()
            prepare_network(run, loss)
        stop.deferred = True  # from now on a signal waits for the end of the step
        with run.progress, pinned_threads(device):
            yield run
        run.run_log.close()
        say(f"{folder} has all its {run.state.step:,} steps; look at {folder}/samples, or run")
        say(f"  python sample.py --checkpoint {folder}")
        say(f"  tensorboard --logdir {folder}")


def set_up(
    config: Any,
    given: frozenset[str] | None,
    processes: Processes,
    stop: StopSignals,
    lock: FolderLock | nullcontext,
) -> Session:
    """The run as it stands before its next step. Rank 0 looks for what it starts from, and the
    other processes get it from rank 0. Raises UserError, by kind."""
    processes.agree({k: v for k, v in asdict(config).items() if k not in OF_THE_MACHINE})
    found = processes.from_main(lambda: find_checkpoint(config))
    start = found
    if found:
        config = resumed_config(config, found, given)
        check_split(config, found, processes.world_size)
    elif config.init_from:
        start = processes.from_main(lambda: open_weights(config.init_from))
        config = config_for_weights(config, start, given)

    with processes.first_of_each_machine_first():
        data = config.path_to_data, config.img_size, config.only, config.attributes
        faces = load_faces(*data, skip_damaged=config.skip_damaged)
    processes.agree({"faces": faces.fingerprint})
    config = replace(config, attributes=faces.attribute_names)  # "all" by their names
    about = describe(config, faces, processes.world_size, start.unet if start else None)
    state = make_state(config, processes.device, about["unet"])
    if found:
        resume_state(state, found, about["settings"])
    elif start:
        start_from(state.model, state.ema, start, config)

    folder, device, stride = Path(config.experiment_name), processes.device, processes.world_size
    batches = Batches(faces, config.batch_size, config.seed, device, stride, config.horizontal_flip)
    log = RunLog(folder, state.step, state.history, config) if processes.is_main else NoLog()
    return (Session if processes.is_main else Worker)(
        config=config,
        state=state,
        diffusion=Diffusion(**about["diffusion"], device=device),
        batches=batches,
        forward=processes.distribute(state.model),
        dtype=autocast_dtype(config.mixed_precision, device),
        rank=processes.rank,
        world_size=processes.world_size,
        folder=folder,
        about=about,
        faces=faces,
        processes=processes,
        stop=stop,
        lock=lock,
        run_log=log,
    )


# What a run starts from --------------------------------------------------------------------------


def find_checkpoint(config: Any) -> Saved | None:
    """The newest good checkpoint of the run, or None if it starts.

    Raises UsageError if a new run would use the folder of another, CheckpointError if no checkpoint
    is good."""
    folder = Path(config.experiment_name)
    if config.resume:
        found = load_newest_checkpoint(folder, set_aside=True)
        if found is None:
            say(f"nothing to resume in {folder}: starting at step 0")
            return None
        return Saved.of(*found)
    if list_checkpoints(folder):
        what = f"{folder} already holds the checkpoints of a run"
        fix = "pass --resume to go on, or choose another name"
        raise UsageError("--experiment_name", what, fix)
    return None


def resumed_config(config: Any, saved: Saved, given: frozenset[str] | None) -> Any:
    """The constants of a resumed run: the checkpoint's, except those that the user set.

    Raises UsageError, in the form of flags, if the user set one that must stay as it was."""
    was = {about.name: saved.settings.get(about.name, about.default) for about in fields(config)}
    kept = {k: v for k, v in was.items() if given is not None and k not in given | {"resume"}}
    kept.pop("experiment_name", None)
    other = [name for name, value in kept.items() if value != getattr(config, name)]
    config = replace(config, **kept)
    names = [name.lower() for name in config.attributes]
    if names in (["all"], [name.lower() for name in was["attributes"]]):
        config = replace(config, attributes=was["attributes"])
    if other:
        names = as_flags({name: was[name] for name in other})
        say(f"the run keeps its constants where they differ from train.py's: {names}")
    changed = [f for f in fields(config) if getattr(config, f.name) != was[f.name]]
    fixed = [about.name for about in changed if resume_rule(about) == "fixed"]
    if fixed:
        now = as_flags({name: getattr(config, name) for name in fixed})
        what = f"{saved.path} is of a run with {as_flags({n: was[n] for n in fixed})}, not {now}"
        raise UsageError("--resume", what, "leave it out, or choose another --experiment_name")
    changed = [about for about in changed if about.name not in ("resume", "experiment_name")]
    if changed:
        text = as_flags({about.name: getattr(config, about.name) for about in changed})
        say(f"changed from here on: {text}")
    if steered := [f"--{about.name}" for about in changed if resume_rule(about) == "steered"]:
        say(f"warning: {', '.join(steered)} changed, so this is a different run from here on")
    return config


def config_for_weights(config: Any, weights: Saved, given: frozenset[str] | None) -> Any:
    """The constants of a new run that starts from weights: the network's are theirs, except those
    that the user set."""
    theirs = network_constants(weights, config.img_size)
    theirs = {
        name: value
        for name, value in theirs.items()
        if name not in (theirs if given is None else given)
    }
    other = {name: value for name, value in theirs.items() if value != getattr(config, name)}
    if other:
        say(f"the network is that of {short(weights.path)}: {as_flags(other)}")
    return replace(config, **theirs)


def check_split(config: Any, saved: Saved, world_size: int) -> None:
    """Raise UsageError if an update would have another number of micro-batches than before."""
    before, now = saved.settings["micro_batches"], config.gradient_accumulation_steps * world_size
    if before != now:
        what = f"an update of {saved.path} has {before} micro-batches, here it has {now}"
        fix = f"pass --gradient_accumulation_steps {before // world_size} on {world_size} processes"
        if before % world_size:
            fitting = [str(count) for count in range(1, before + 1) if before % count == 0]
            fix = f"start {' or '.join(fitting)} processes"
        raise UsageError("--gradient_accumulation_steps", what, fix)


def describe(config: Any, faces: Faces, world_size: int, base: dict | None) -> dict:
    """What a checkpoint holds besides the state: the settings, and the constructors' arguments."""
    settings = asdict(config) | {
        "faces": faces.fingerprint,
        "crop": faces.crop,
        "world_size": world_size,
        "micro_batches": config.gradient_accumulation_steps * world_size,
    }
    if config.attributes:
        settings["usual_attributes"] = faces.usual_attributes()
    unet, diffusion = unet_arguments(config, base), diffusion_arguments(config)
    return {"settings": settings, "unet": unet, "diffusion": diffusion}


def resume_state(state, saved: Saved, settings: dict) -> None:
    """Load a checkpoint's state. Raises UsageError if the faces are others, CheckpointError if the
    checkpoint does not fit."""
    was, now = saved.settings.get("faces"), settings["faces"]
    if was != now:
        what = f"{saved.path} was trained on other faces: {was}, not {now}"
        raise UsageError("--path_to_data", what, "give the same faces, or start another run")
    with reading(saved.path, "resume from another checkpoint"):
        state.load_state_dict(saved.contents)
    say(f"resumed {saved.path}")


# Before the first step ---------------------------------------------------------------------------


def dry_run(run: Session) -> None:
    """Say what is trained on what, and try what the run will do later: grids, held-out loss, saves.

    Raises ResourceError if the memory or the disk does not suffice."""
    config, device, model = run.config, run.diffusion.device, run.state.model
    if note := precision_note(config.mixed_precision, run.dtype, device):
        say(note)
    say(run.batches.description)
    used = str(run.dtype or torch.float32).removeprefix("torch.")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"{millions:.1f} M weights in {used} on {run.world_size} x {device.type}")
    if obstacle := diffusers_obstacle(model, config.prediction):
        say(f"note: diffusers cannot load these weights later ({obstacle})")
    size = sum(p.nbytes for p in model.parameters())
    needed = (config.keep_checkpoints + 2) * size * 4  # weights, average, two moments

    def try_out() -> None:
        moments = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]
        run.grid(config.num_samples, steps=1)
        run.held_out_loss()
        del moments  # which the optimiser will have by then

    preflight(run.folder, needed, try_out, run.save_to)
    save_json(run.folder / "config.json", asdict(config))


def prepare_network(run: Session, loss: Callable[[Run, int], Tensor]) -> None:
    """Compile the network on a GPU, if a compiler is there; make a distributed one ready."""
    micro_batches = run.config.gradient_accumulation_steps * run.world_size
    number, seconds = run.state.step * micro_batches + run.rank, None
    if run.config.compile and run.diffusion.device.type == "cuda":
        say("compiling the network, which takes a minute or two; --no_compile skips it")
        seconds = compile_network(run.forward, lambda: loss(run, number))
    if seconds is not None:
        say(f"compiled in {seconds:.0f} s")
    elif run.world_size > 1:
        # After its first exchange DDP reorders the gradients, and sums round differently. Do that
        # now, or the first step of a resumed run would differ from that of an unbroken one.
        loss(run, number).backward()
        run.forward.zero_grad()
