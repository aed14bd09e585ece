"""The interface of a level's planner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn
from torchrl.data import TensorSpec
from torchrl.envs import TensorDictPrimer

from layeredrl_torchrl.predictors import Predictor

__all__ = ["Planner", "check_planner"]


@runtime_checkable
class Planner(Protocol):
    """The planner of a :class:`PlannerLevel`: a policy whose memory can be reset.

    It is called with a TensorDict ``[*B]`` that has its ``in_keys``, and writes the action under
    ``action_key`` and its memory under ``"next"``. If it is a module, it is saved with the level.
    """

    in_keys: list[Any]
    out_keys: list[Any]
    action_key: NestedKey

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write action and memory for ``[*B]``."""

    def forget(
        self, batch: Sequence[int] = (), device: torch.device | None = None
    ) -> TensorDictBase:
        """Return an empty memory for ``[*B]``, under the keys that it has in a TensorDict."""

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Return the transform that passes the memory between steps; zeros are an empty memory."""


def check_planner(planner: object, predictor: Predictor, action_spec: TensorSpec) -> bool:
    """Check the result of a planner factory; return whether it holds the predictor as a part.

    Args:
        planner: The result.
        predictor: The predictor passed to the factory.
        action_spec: The spec passed to the factory.

    Raises:
        TypeError: Not a planner. ValueError: A planner with another predictor, or for other
            actions.
    """
    if not isinstance(planner, Planner) or isinstance(planner, type):
        raise TypeError(
            f"planner_factory gave a {type(planner).__name__}, expected a planner like "
            "ICEMPlanner: a policy with in_keys, out_keys, action_key, forget() and "
            "make_tensordict_primer(); pass partial(ICEMPlanner, horizon=...)"
        )
    parts = list(planner.modules()) if isinstance(planner, nn.Module) else []
    held = [part for part in parts if isinstance(part, Predictor)]
    if held and not any(part is predictor for part in held):
        raise ValueError(
            "planner_factory gave a planner in another predictor than it was called with, so "
            "plans would not use what is learned; pass its first argument on"
        )
    planned = getattr(planner, "action_spec", action_spec)
    if planned.cpu() != action_spec.cpu():
        raise ValueError(
            f"planner_factory gave a planner for {planned}, but the level's actions are "
            f"{action_spec}; pass action_spec= on"
        )
    return bool(held)
