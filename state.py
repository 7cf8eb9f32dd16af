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
        """Take up the state that `path` held. Raises CheckpointError where something does not fit."""
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


def take_up(state: State, folder: Path, settings: dict, resume: bool) -> None:
    """Load the newest good checkpoint of `folder` into `state`, where the run is to be resumed and
    there is one.

    settings: the constants of this run. Raises UsageError where a new run would fall into the folder
    of another, or where the checkpoint's settings differ in what may not change: it lists both
    values of each; CheckpointError where no checkpoint is good."""
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
    before = saved.get("settings", {})
    changes = {k: (before.get(k), now) for k, now in settings.items() if before.get(k) != now}
    refused = [
        f"{k} was {old}, is {new}" for k, (old, new) in changes.items() if k not in MAY_CHANGE
    ]
    if refused:
        fix = "pass the values it was trained with, or choose another --experiment_name"
        raise UsageError("--resume", f"{path} is of another run: {'; '.join(refused)}", fix)
    state.load_state_dict(saved, path)
    notes = [f"{k} {old} -> {new}" for k, (old, new) in changes.items() if k != "resume"]
    say(f"resumed {path}" + (f", with {', '.join(notes)}" if notes else ""))
