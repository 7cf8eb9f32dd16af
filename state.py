"""All that a training step changes, and how a run is taken up again."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ema import EMA
from errors import CheckpointError, UsageError
from log import say
from unet import UNet
from utils import list_checkpoints, load_newest_checkpoint, plain_keys

# What a resumed run may change; anything else would make it another run.
MAY_CHANGE = {
    "experiment_name",
    "path_to_data",  # the faces themselves are compared by their fingerprint
    "resume",
    "num_training_steps",
    "mixed_precision",
    "compile",
    "log_every",
    "sample_every",
    "num_samples",
    "save_every",
    "keep_checkpoints",
}


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

    def load_state_dict(self, saved: dict, path: Path) -> None:
        """Take up the state that `path` held. Raises CheckpointError where something does not
        fit."""
        try:
            self.model.load_state_dict(plain_keys(saved["model"]))
            ema = saved["ema"]
            self.ema.load_state_dict({**ema, "model": plain_keys(ema["model"])})
            self.optimizer.load_state_dict(saved["optimizer"])
            if saved["scaler"]["growth_interval"] == self.scaler.get_growth_interval():
                self.scaler.load_state_dict(saved["scaler"])
            else:
                say("note: resumed in another precision, so the loss scale starts afresh")
            self.step, self.history = saved["step"], [list(point) for point in saved["history"]]
        except KeyError as error:
            what, fix = f"lacks {error}", "resume from another checkpoint"
            raise CheckpointError(path, what, fix) from error
        except (RuntimeError, ValueError) as error:
            what = f"does not fit ({' '.join(str(error).split())[:300]})"
            fix = "pass the settings it was trained with"
            raise CheckpointError(path, what, fix) from error


def make_state(config, device: torch.device, fp16: bool) -> State:
    """The network, its average, the optimiser and the loss scale, as they are before the first
    step."""
    torch.manual_seed(config.seed)
    model = UNet(**unet_arguments(config)).to(device)
    # Outside fp16 the scale is 1 and stays 1: it only keeps a gradient that is not finite from the
    # weights, without waiting for the GPU to tell.
    scaler = torch.amp.GradScaler(
        device.type,
        init_scale=2.0**16 if fp16 else 1.0,
        growth_interval=2000 if fp16 else 2**31 - 1,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True
    )
    return State(model, EMA(model, config.ema_decay), optimizer, scaler)


def diffusion_arguments(config) -> dict:
    """What `Diffusion(**...)` needs to be built again."""
    names = ("num_timesteps", "noise_schedule", "prediction")
    return {name: getattr(config, name) for name in names}


def unet_arguments(config) -> dict:
    """What `UNet(**...)` needs to be built again."""
    names = ["img_size", "channels", "channel_mults", "num_res_blocks"]
    names += ["attn_resolutions", "head_dim", "dropout"]
    arguments = {name: getattr(config, name) for name in names}
    return arguments | {"num_attributes": len(config.attributes)}


def take_up(state: State, folder: Path, about: dict, resume: bool) -> None:
    """Load the newest good checkpoint of `folder` into `state`, where the run is to be resumed and
    there is one.

    about: "settings", "unet" and "diffusion" of this run, as the checkpoint holds them. Raises
    UsageError where a new run would fall into the folder of another, or where the settings differ
    in
    what may not change: it lists both values of each; CheckpointError where no checkpoint is good
    or it holds another network."""
    if not resume:
        if list_checkpoints(folder):
            what = f"{folder} already holds the checkpoints of a run"
            fix = "pass --resume to go on, or choose another name"
            raise UsageError("--experiment_name", what, fix)
        return
    found = load_newest_checkpoint(folder)
    if found is None:
        say(f"nothing to resume in {folder}: starting at step 0")
        return
    path, saved = found
    for key in about:
        if key not in saved:
            raise CheckpointError(path, f"lacks {key!r}", "resume from another checkpoint")
    fix = "pass the values it was trained with, or choose another --experiment_name"
    network = _differences(saved["unet"], about["unet"])
    if network:
        raise CheckpointError(path, f"holds another network: {_list(network)}", fix)
    changes = _differences(saved["settings"], about["settings"])
    refused = {name: values for name, values in changes.items() if name not in MAY_CHANGE}
    if refused:
        raise UsageError("--resume", f"{path} is of another run: {_list(refused)}", fix)
    state.load_state_dict(saved, path)
    changes.pop("resume", None)
    say(f"resumed {path}" + (f"; changed: {_list(changes)}" if changes else ""))


def _differences(before: dict, now: dict) -> dict[str, tuple]:
    names = before.keys() | now.keys()
    pairs = {name: (before.get(name), now.get(name)) for name in sorted(names)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _list(changes: dict[str, tuple]) -> str:
    return ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in changes.items())
