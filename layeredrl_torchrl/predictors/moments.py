"""A check of optimizer states before they are loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["refuse_other_shapes"]


def refuse_other_shapes(optim: torch.optim.Optimizer) -> None:
    """Let ``optim.load_state_dict`` raise ``ValueError`` for parameters of other shapes.

    Torch itself compares only how many there are. A checkpoint of another architecture would leave
    moments that fail in the next gradient step, and TorchRL's ``Checkpoint`` restores components in
    the order of their names: ``"optim"`` before ``"predictor"``, whose own check would come too
    late. Copies of an optimizer lose the check, as they lose all its hooks.
    """
    optim.register_load_state_dict_pre_hook(_check_shapes)


def _check_shapes(optim: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    problems = []
    theirs = state_dict["param_groups"]
    if len(theirs) != len(optim.param_groups):
        problems.append(
            f"the checkpoint has {len(theirs)} groups, this one {len(optim.param_groups)}"
        )
    for ours, other in zip(optim.param_groups, theirs, strict=False):
        name, indices = ours.get("name", "group"), other["params"]
        if len(indices) != len(ours["params"]):
            problems.append(
                f"{name}: the checkpoint has {len(indices)} parameters, this one "
                f"{len(ours['params'])}"
            )
        for i, (parameter, index) in enumerate(zip(ours["params"], indices, strict=False)):
            shapes = {
                tuple(value.shape)
                for value in state_dict["state"].get(index, {}).values()
                if isinstance(value, Tensor) and value.ndim  # the step count has no shape
            }
            problems += [
                f"parameter {i} of {name}: the checkpoint has {shape}, this one "
                f"{tuple(parameter.shape)}"
                for shape in shapes - {tuple(parameter.shape)}
            ]
    if problems:
        raise ValueError(
            f"the checkpoint's optimizer does not fit ({len(problems)} differences: "
            f"{'; '.join(problems[:5])}); build the predictor with the sizes it was saved with"
        )
