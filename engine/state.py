"""What a run is between two steps, how it begins, and how it goes on from a checkpoint."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from ema import EMA
from optimizers import make_optimizer
from system.device import autocast_dtype
from system.errors import CheckpointError, UsageError
from system.flags import resume_rule
from system.terminal import say
from unet import UNet
from utils import list_checkpoints, load_newest_checkpoint, plain_keys


@dataclass
class State:
    """What a step changes, nothing more: a checkpoint of it is a run that can go on."""

    model: UNet
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # completed updates
    history: list[list[float]] = field(default_factory=list)  # [step, loss] at each log

    def state_dict(self) -> dict:
        """Tensors and plain values only."""
        return {
            "step": self.step,
            "history": self.history,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, saved: dict) -> None:
        """Go on from a saved state. Raises where something does not fit, whatever that meets."""
        self.model.load_state_dict(plain_keys(saved["model"]))
        ema = saved["ema"]
        self.ema.load_state_dict({**ema, "model": plain_keys(ema["model"])})
        self.optimizer.load_state_dict(saved["optimizer"])
        for weight, moments in self.optimizer.state.items():  # its kernels do not look
            if any(each.shape not in ((), weight.shape) for each in moments.values()):
                raise ValueError("the optimizer's moments are not of the weights' shapes")
        if saved["scaler"]["growth_interval"] == self.scaler.get_growth_interval():
            self.scaler.load_state_dict(saved["scaler"])
        else:
            say("note: resumed in another precision, so the loss scale starts afresh")
        self.step, self.history = saved["step"], [list(point) for point in saved["history"]]


def make_state(config, device: torch.device, fp16: bool, base: dict | None = None) -> State:
    """The network, its average, the optimiser and the loss scale, as a run starts with them; base:
    as for `unet_arguments`."""
    torch.manual_seed(config.seed)
    model = UNet(**unet_arguments(config, base)).to(device)
    # Outside fp16 the scale is 1 and stays 1: it only keeps a gradient that is not finite from the
    # weights, without waiting for the GPU to tell.
    scaler = torch.amp.GradScaler(
        device.type,
        init_scale=2.0**16 if fp16 else 1.0,
        growth_interval=2000 if fp16 else 2**31 - 1,
    )
    half = autocast_dtype(config.mixed_precision, device)
    on_cpu = device.type == "cpu"  # where Muon is faster in float32, by fewer products
    dtype = torch.bfloat16 if half == torch.bfloat16 and not on_cpu else torch.float32
    optimizer = make_optimizer(config.optimizer, model, config.learning_rate, dtype)
    return State(model, EMA(model, config.ema_decay), optimizer, scaler)


def diffusion_arguments(config) -> dict:
    """What `Diffusion(**...)` needs to be built again."""
    names = ("num_timesteps", "noise_schedule", "prediction")
    return {name: getattr(config, name) for name in names}


def unet_arguments(config, base: dict | None = None) -> dict:
    """What `UNet(**...)` needs to be built again.

    base: those of the network whose weights it takes; of them it keeps what is no constant, and
    the norms' groups where the run does not say them."""
    names = ["img_size", "channels", "channel_mults", "num_res_blocks"]
    names += ["attn_resolutions", "head_dim", "dropout", "norm_groups"]
    arguments = {name: getattr(config, name) for name in names}
    arguments["norm_groups"] = config.norm_groups or (base or {}).get("norm_groups", 0)
    return (base or {}) | arguments | {"num_attributes": len(config.attributes)}


def open_run(folder: Path, resume: bool) -> tuple[Path, dict] | None:
    """What a run goes on from, the newest good checkpoint of its folder, or None where it starts.

    Raises UsageError where a new run would fall into the folder of another, CheckpointError where
    no checkpoint is good."""
    if resume:
        found = load_newest_checkpoint(folder, set_aside=True)
        if found is None:
            say(f"nothing to resume in {folder}: starting at step 0")
        return found
    if list_checkpoints(folder):
        what = f"{folder} already holds the checkpoints of a run"
        fix = "pass --resume to go on, or choose another name"
        raise UsageError("--experiment_name", what, fix)
    return None


def fill_config(config, path: Path, saved: dict):
    """`config` for going on from a checkpoint: a constant that did not exist when its run began, or
    had another default, is what it was. Raises CheckpointError where the settings are missing."""
    for key in ("settings", "unet", "diffusion"):
        if key not in saved:
            raise CheckpointError(path, f"lacks {key!r}", "resume from another checkpoint")
    return config


def check_split(path: Path, saved: dict, split: dict[str, int]) -> None:
    """Raise UsageError where an update would no longer consist of as many micro-batches.

    split: "world_size" and "micro_batches", their number in an update of all processes."""
    was, now, world_size = saved["settings"], split["micro_batches"], split["world_size"]
    before = was.get("micro_batches")
    if before is None:
        before = was.get("world_size", 1) * was.get("gradient_accumulation_steps", 1)
        if was.get("world_size", 1) > 1:
            say(f"note: since {path} batches are numbered through all processes: other faces come")
    if before != now:
        what = f"an update of {path} has {before} micro-batches, here it has {now}"
        fix = f"pass --gradient_accumulation_steps {before // world_size} on {world_size} processes"
        if before % world_size:
            fitting = [str(count) for count in range(1, before + 1) if before % count == 0]
            fix = f"start {' or '.join(fitting)} processes"
        raise UsageError("--gradient_accumulation_steps", what, fix)


def take_up(state: State, path: Path, saved: dict, config, facts: dict) -> None:
    """Load a checkpoint into `state`, where it is of this run.

    facts: what must be as it was besides the fixed constants of `config`. Raises UsageError, with
    both values of each, where something is not; CheckpointError where it holds another network."""
    changed, refused = changes(config, saved["settings"])
    was = saved["settings"]
    refused |= {name: (was.get(name), f) for name, f in facts.items() if was.get(name) != f}
    fix = "pass the values it was trained with, or choose another --experiment_name"
    network = refused.keys() & (unet_arguments(config) | diffusion_arguments(config)).keys()
    if network:
        text = _list({name: refused[name] for name in sorted(network)})
        raise CheckpointError(path, f"holds another network: {text}", fix)
    if refused:
        raise UsageError("--resume", f"{path} is of another run: {_list(refused)}", fix)
    state.load_state_dict(saved)
    changed.pop("resume", None)
    say(f"resumed {path}" + (f"; changed: {_list(changed)}" if changed else ""))
    if another_way := [
        name
        for name in changed
        if type(config).__dataclass_fields__[name].metadata["resume"] == "steered"
    ]:
        names = ", ".join(another_way)
        say(f"note: by {names} it is, from step {state.step} on, another run than it was")


def _list(changes: dict[str, tuple]) -> str:
    return ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in changes.items())


def changes(config, saved: dict) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """The constants that differ from a checkpoint's settings: those that may, those that may not.

    Returns two dictionaries of name: (was, is)."""
    allowed, refused = {}, {}
    for about in fields(config):
        pair = saved.get(about.name, about.default), getattr(config, about.name)
        if pair[0] != pair[1]:
            (refused if resume_rule(about) == "fixed" else allowed)[about.name] = pair
    return allowed, refused
