"""What the tests of the optimizers share."""

from __future__ import annotations

import pytest
import torch
from pretended import Accelerator

from layeredrl_torchrl.optimizers import CEM, ICEM, MPPI, GaussianSearch


def gaussian(a=2, low=-1.0, high=1.0, sigma=None, dtype=torch.float32):
    return GaussianSearch(
        torch.full((a,), low, dtype=dtype), torch.full((a,), high, dtype=dtype), sigma
    )


@pytest.fixture(scope="session")
def make_gaussian():
    """``make_gaussian(a, low, high, sigma)``: the same bounds in every dimension."""
    return gaussian


@pytest.fixture(scope="session")
def accelerator():
    """A pretended device."""
    return Accelerator()


@pytest.fixture(scope="session", params=[CEM, ICEM, MPPI], ids=["cem", "icem", "mppi"])
def kind(request):
    """Each optimizer in turn."""
    return request.param


@pytest.fixture(scope="session")
def make(kind):
    """Build the optimizer whose turn it is, small."""

    def build(search=None, horizon=4, **options):
        return kind(search or gaussian(), horizon, **{"n_samples": 64, "n_iterations": 5} | options)

    return build
