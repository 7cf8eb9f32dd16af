"""An exponential moving average of a network's weights, which samples better than they do."""

import copy

import torch
from torch import nn


class EMA:
    """The average of the weights over the updates, ema <- d * ema + (1 - d) * weights.

    decay: d once warmed up. After n updates it is at most (1 + n) / (10 + n), so that the average
    forgets the untrained weights. The average is `.model`, a network of its own in eval mode; its
    buffers are copies, not averages."""

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        assert 0 <= decay < 1, f"decay is {decay}, not in [0, 1)"
        self.decay = decay
        self.num_updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of `model`, the network that it was made of."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        ours, theirs = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - decay)  # one launch for all the weights
        for buffer, source in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(source)

    def state_dict(self) -> dict:
        """The averaged weights and the number of updates behind them."""
        return {"model": self.model.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved average. Raises RuntimeError where the weights do not fit."""
        self.model.load_state_dict(state["model"])
        self.num_updates = int(state["num_updates"])
