"""The learning rates of an optimizer's groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from layeredrl_torchrl._checks import check_number

__all__ = ["LearningRate", "LearningRates", "share_left"]

LearningRate: TypeAlias = float | Callable[[int], float]


class LearningRates:
    """Sets the learning rates of an optimizer with named groups.

    Args:
        optim: The optimizer.
        rates: The learning rate of each group: a number, or a callable of the environment steps.
    """

    def __init__(self, optim: torch.optim.Optimizer, rates: Mapping[str, LearningRate]) -> None:
        self._optim, self._rates = optim, dict(rates)
        self._current: dict[str, float] = {}

    def add(self, name: str, rate: LearningRate) -> None:
        """Add the learning rate of a new group."""
        self._rates[name] = rate

    def begin(self, n_total_env_steps: int) -> None:
        """Evaluate the learning rates, and let the optimizer follow its parameters' device.

        Raises:
            TypeError, ValueError: A learning rate that is not a finite number of at least 0.
        """
        current = {
            name: rate(n_total_env_steps) if callable(rate) else rate
            for name, rate in self._rates.items()
        }
        self._current = {
            name: float(check_number(f"{name}_lr", r, 0.0)) for name, r in current.items()
        }
        self.follow_device()

    def set(self, i: int, n_updates: int, annealed: Mapping[str, float]) -> None:
        """Set the learning rates of update ``i`` of ``n_updates``.

        Args:
            i: From 0.
            n_updates: Of this call.
            annealed: Share of the updates, at the end, over which the learning rate of a group
                falls linearly to a tenth.
        """
        for group in self._optim.param_groups:
            share = annealed.get(group["name"], 0.0)
            rate = self._current[group["name"]] * (0.1 + 0.9 * share_left(i, n_updates, share))
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def follow_device(self) -> None:
        """Move the optimizer's state to the current device of its parameters.

        On an accelerator the learning rate is a tensor, so that a captured step notices its
        changes.
        """
        for group in self._optim.param_groups:
            device = group["params"][0].device
            on_accelerator = device.type != "cpu"
            group["capturable"] = on_accelerator
            rate = group["lr"]
            if on_accelerator and not (isinstance(rate, Tensor) and rate.device == device):
                group["lr"] = torch.zeros((), device=device)
            elif not on_accelerator:
                group["lr"] = 0.0
            for p in group["params"]:
                moments = self._optim.state.get(p, {})
                for name, value in moments.items():
                    if value.device != p.device:
                        moments[name] = value.to(p.device)


def share_left(i: int, n_updates: int, share: float, end: float = 0.0) -> float:
    """Return a factor that falls linearly from 1 to 0 over the last ``share`` of the updates.

    It reaches 0 earlier, when a share ``end`` of the updates is left.
    """
    if not share:
        return 1.0
    return min(1.0, max(0.0, (1.0 - (i + 0.5) / n_updates - end) / share))
