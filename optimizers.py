"""What turns gradients into steps: AdamW, and Muon, which needs far fewer steps.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the step of a matrix of weights is its
averaged gradient made orthogonal, so that all directions in which the matrix works are learned at
the same pace, not the strongest first.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adamw", "muon")
MOMENTUM = 0.95


def make_optimizer(name: str, model: nn.Module, lr: float, dtype: torch.dtype):
    """The optimiser of this name for a network. dtype: of Muon's matrix products."""
    if name == "muon":
        return Muon(*split_parameters(model), lr=lr, dtype=dtype)
    assert name == "adamw", f"optimizer is {name!r}, not one of {OPTIMIZERS}"
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)


def orthogonal(matrices: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of each matrix U S V^T roughly U V^T: the singular values all between 0.7 and 1.2.

    Five steps of a Newton-Schulz iteration, x <- q x with q = a + b x x^T + c (x x^T)^2, with the
    coefficients of Jordan et al. 2024. dtype: to compute in. Returns the dtypes given."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = [x if x.shape[0] <= x.shape[1] else x.T for x in matrices]  # x x^T: the smaller product
    wide = [x.to(dtype) / (x.to(dtype).norm() + 1e-7) for x in wide]
    if wide and wide[0].device.type == "cpu" and dtype != torch.bfloat16:
        # All q are polynomials of the first x x^T and commute: the next x x^T is q (x x^T) q, and
        # only the product of all q meets x. Far fewer products, if exact ones (a GPU's are TF32),
        # and small ones: those of all matrices with as many rows are one call.
        products = {}
        for rows in {len(x) for x in wide}:
            places = [i for i, x in enumerate(wide) if len(x) == rows]
            gram = torch.stack([wide[i] @ wide[i].T for i in places])  # (matrices, rows, rows)
            product = None
            for step in range(5):
                q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
                q.diagonal(dim1=1, dim2=2).add_(a)
                product = q @ product if step else q
                gram = q @ gram @ q if step < 4 else gram
            products |= zip(places, product, strict=True)
        wide = [products[i] @ x for i, x in enumerate(wide)]
    else:
        for i, x in enumerate(wide):
            for _ in range(5):
                gram = x @ x.T
                x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            wide[i] = x
    pairs = zip(wide, matrices, strict=True)
    return [(x if x.shape == given.shape else x.T).to(given.dtype) for x, given in pairs]


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
        # A tensor, 1 where GradScaler found a gradient that is not finite: a GPU is not waited for.
        found = getattr(self, "found_inf", None)
        if found is not None and found.device.type == "cpu" and not found:
            found = None
        group = self.param_groups[1]
        weights = [weight for weight in group["params"] if weight.grad is not None]
        averages, keep = [], 1.0 if found is None else 1.0 - found
        for weight in weights:
            gradient, state = weight.grad, self.state[weight]
            if found is not None:
                gradient = torch.where(found > 0, 0.0, gradient)
            if not state:  # named as AdamW's, which loads it
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(weight)
            momentum = state["exp_avg"].lerp_(gradient, (1 - MOMENTUM) * keep)
            averages.append(gradient.lerp(momentum, MOMENTUM).flatten(1))
        for weight, direction in zip(weights, orthogonal(averages, self.dtype), strict=True):
            scale = 0.2 * max(direction.shape) ** 0.5 * group["lr"] * keep
            weight.sub_(scale * direction.view_as(weight))
            weight.grad = None  # AdamW leaves out what has no gradient
        super().step()
