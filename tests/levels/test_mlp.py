"""The networks of learned levels, against torch's own layers."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from layeredrl_torchrl.levels._mlp import FlatMLP


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_it_is_an_mlp_of_what_it_reads_for_any_batch(batch):
    net = FlatMLP(["features", ("own", "action")], ["value"], (5, 7, 6, 1))
    layers = []
    for i in range(3):
        weight, bias = getattr(net, f"weight_{i}"), getattr(net, f"bias_{i}")
        layers += [nn.Linear(weight.shape[1], weight.shape[0]), nn.ReLU()]
        layers[-2].load_state_dict({"weight": weight, "bias": bias})
    twin = nn.Sequential(*layers[:-1])
    td = TensorDict({"features": torch.randn(*batch, 3)}, batch)
    td["own", "action"] = torch.randn(*batch, 2)
    expected = twin(torch.cat([td["features"], td["own", "action"]], -1))
    torch.testing.assert_close(net(td)["value"], expected)
