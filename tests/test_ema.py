"""The average against its closed form."""

import torch
from torch import nn

from ema import EMA


def test_average_has_its_closed_form():
    model = nn.Linear(1, 1, bias=False).double()
    values = [1.0, 3.0, -2.0, 0.5, 4.0]
    nn.init.constant_(model.weight, values[0])
    ema = EMA(model, decay=0.3)
    expected = values[0]
    for n, value in enumerate(values[1:]):
        nn.init.constant_(model.weight, value)
        ema.update(model)
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(ema.model.weight.item(), expected)
    assert ema.num_updates == 4 and not ema.model.training and not ema.model.weight.requires_grad


def test_buffers_are_copied_not_averaged():
    model = nn.BatchNorm1d(4)
    ema = EMA(model)
    for _ in range(100):
        model(torch.randn(8, 4) * 3 + 1)
        ema.update(model)
    for ours, theirs in zip(ema.model.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
