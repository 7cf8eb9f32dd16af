"""What a training step changes: the state of a run, which its checkpoints hold."""

from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch

from diffusion import Diffusion
from ema import EMA
from optimizers import OPTIMIZERS
from system.device import autocast_dtype
from system.terminal import warn
from unet import UNet


@dataclass
class State:
    """All that a step changes. A run goes on from it as if it had never stopped."""

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
        """Load a saved state. Raises an exception of some kind if it does not fit."""
        self.model.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for weight, moments in self.optimizer.state.items():  # fused kernels do not check
            if any(each.shape not in ((), weight.shape) for each in moments.values()):
                raise ValueError("the optimizer's moments do not have the weights' shapes")
        if saved["scaler"]["growth_interval"] == self.scaler.get_growth_interval():
            self.scaler.load_state_dict(saved["scaler"])
        else:
            warn("resumed in another precision, so the loss scale starts afresh")
        self.step, self.history = saved["step"], [list(point) for point in saved["history"]]


def make_state(config: Any, device: torch.device, unet: dict) -> State:
    """The network, its average, the optimiser and the loss scale at the start of a run.

    config: train.Config; unet: the arguments of `UNet`."""
    torch.manual_seed(config.seed)
    model = UNet(**unet).to(device)
    half = autocast_dtype(config.mixed_precision, device)
    # Except in fp16 the scale is always 1: it only keeps a gradient that is not finite from the
    # weights, without waiting for the GPU.
    fp16 = half == torch.float16
    scaler = torch.amp.GradScaler(
        device.type,
        init_scale=2.0**16 if fp16 else 1.0,
        growth_interval=2000 if fp16 else 2**31 - 1,
    )
    # Muon's products are in bfloat16 on a GPU that has it, whatever the network computes in.
    ampere = device.type == "cuda" and autocast_dtype("bf16", device) == torch.bfloat16
    muon_dtype = torch.bfloat16 if ampere else torch.float32
    optimizer = OPTIMIZERS[config.optimizer](model, config.learning_rate, muon_dtype)
    return State(model, EMA(model, config.ema_decay), optimizer, scaler)


def unet_arguments(config: Any, base: dict | None = None) -> dict:
    """The arguments of `UNet` for a run.

    base: those of the weights that it starts from. The run keeps the arguments that are not
    constants of its own, and the norms' groups unless it sets them."""
    base = base or {}
    ours = _arguments(UNet, config) | {"num_attributes": len(config.attributes)}
    ours["norm_groups"] = config.norm_groups or base.get("norm_groups", 0)
    return base | ours


def diffusion_arguments(config: Any) -> dict:
    """The arguments of `Diffusion` for a run, without the device."""
    return _arguments(Diffusion, config, leave_out=("device", "dtype"))


def _arguments(cls: type, config: Any, leave_out: tuple[str, ...] = ()) -> dict:
    """The constructor's parameters that are constants of the run."""
    names = [name for name in signature(cls).parameters if name not in leave_out]
    return {name: getattr(config, name) for name in names if hasattr(config, name)}
