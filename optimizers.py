"""What turns gradients into steps: AdamW, and Muon, which needs far fewer steps.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the step of a matrix of weights is its
averaged gradient made orthogonal, so that the network learns all directions of a matrix at the same
pace, not the strongest first.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from system import cpu

MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the Newton-Schulz iteration, Jordan et al. 2024


# Muon's step --------------------------------------------------------------------------------------


def orthogonal(matrices: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Replace each matrix U S V^T by roughly U V^T: all singular values between 0.7 and 1.2.

    matrices: of one dtype, which the results have; dtype: to compute in."""
    wide = [x if x.shape[0] <= x.shape[1] else x.T for x in matrices]  # x x^T: the smaller product
    if wide and wide[0].device.type == "cpu" and dtype != torch.bfloat16:
        wide = [x.to(dtype) / (x.to(dtype).norm() + 1e-7) for x in wide]
        wide = [x.to(matrices[0].dtype) for x in cpu.newton_schulz(wide, *COEFFICIENTS)]
    else:
        wide = newton_schulz(wide, dtype)
    pairs = zip(wide, matrices, strict=True)
    return [x if x.shape == given.shape else x.T for x, given in pairs]


def newton_schulz(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Five times x <- (a + b x x^T + c (x x^T)^2) x, from each matrix divided by its norm.

    Matrices of the same shape are one stack: the default network has 130 matrices of 23 shapes, and
    a GPU would wait for the launches of single small products. dtype: to compute in."""
    a, b, c = COEFFICIENTS
    results = list(matrices)
    for shape in dict.fromkeys(x.shape for x in matrices):
        places = [i for i, x in enumerate(matrices) if x.shape == shape]
        x = torch.stack([matrices[i] for i in places]).to(dtype)  # (matrices, rows, columns)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        for i, one in zip(places, x.to(matrices[0].dtype), strict=True):
            results[i] = one
    return results


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices between the network's first and last convolution, and the other parameters."""
    ends = [*model.conv_in.parameters(), *model.conv_out.parameters()]
    matrices, others = [], []
    for parameter in model.parameters():
        is_end = any(parameter is end for end in ends)
        (others if is_end or parameter.ndim < 2 else matrices).append(parameter)
    return matrices, others


class Muon(torch.optim.AdamW):
    """Muon for `matrices`, with Nesterov's momentum; AdamW without weight decay for `others`.

    The kernel of a convolution is a matrix (C_out, 9 C_in). A step changes its entries by 0.2
    times the learning rate on average, about as much as AdamW does (Liu et al. 2025, eq. 4), so
    one learning rate serves both. dtype: that `orthogonal` computes in."""

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        lr: float,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(list(others), lr=lr, weight_decay=0.0, fused=True)
        self.add_param_group({"params": list(matrices)})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of all weights, from their gradients."""
        # A tensor, 1 if GradScaler found a gradient that is not finite; a GPU is not waited for.
        found = getattr(self, "found_inf", None)
        if found is not None and found.device.type == "cpu":
            if found:
                return
            found = None
        others, matrices = self.param_groups
        self._step_matrices(matrices, found)
        self.param_groups = [others]
        super().step()  # AdamW's own step must not see the matrices
        self.param_groups = [others, matrices]

    def _step_matrices(self, group: dict, found: Tensor | None) -> None:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        for weight in weights:
            if not self.state[weight]:  # the names that AdamW's load_state_dict expects
                self.state[weight]["step"] = torch.zeros((), device=weight.device)
                self.state[weight]["exp_avg"] = torch.zeros_like(weight)
        gradients = [weight.grad for weight in weights]
        momenta = [self.state[weight]["exp_avg"] for weight in weights]
        if found is not None:  # then the momentum stays, and so do the weights, below
            pairs, skip = zip(momenta, gradients, strict=True), found > 0
            gradients = [torch.where(skip, old, new) for old, new in pairs]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        averages = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        directions = orthogonal([average.flatten(1) for average in averages], self.dtype)
        scales = [0.2 * max(direction.shape) ** 0.5 * group["lr"] for direction in directions]
        torch._foreach_mul_(directions, scales)
        if found is not None:
            torch._foreach_mul_(directions, 1.0 - found)
        pairs = zip(directions, weights, strict=True)
        torch._foreach_sub_(weights, [step.view_as(weight) for step, weight in pairs])


# By name ------------------------------------------------------------------------------------------


def adamw(model: nn.Module, lr: float, dtype: torch.dtype) -> torch.optim.Optimizer:
    """AdamW without weight decay."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)


def muon(model: nn.Module, lr: float, dtype: torch.dtype) -> torch.optim.Optimizer:
    """Muon for the network's matrices, AdamW for the rest."""
    return Muon(*split_parameters(model), lr=lr, dtype=dtype)


# The choices of --optimizer: (network, learning rate, dtype of matrix products) -> optimiser. An
# optimiser needs nothing special, but GradScaler then waits for a GPU at every step. To avoid that,
# set `_step_supports_amp_scaling = True` and change nothing if `self.found_inf` is 1, as Muon does.
OPTIMIZERS = {"adamw": adamw, "muon": muon}
