"""Collect what a step of an ensemble depends on, in columns."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn
from torchrl.data import TensorSpec

from layeredrl_torchrl._precision import product_dtype
from layeredrl_torchrl.models._scaling import Scaling
from layeredrl_torchrl.models._step import Networks, StackedLayers, StepParts
from layeredrl_torchrl.models.calibration import Calibration
from layeredrl_torchrl.nets import StackedProbFCDynamics
from layeredrl_torchrl.specs import width

__all__ = ["step_parts"]


def step_parts(
    members: nn.Module,
    scaling: Scaling,
    calibration: Calibration,
    action_spec: TensorSpec,
    *,
    rows: int,
    ignores_context: bool,
) -> StepParts:
    """Collect the parts of a step; call it for each rollout, since learning changes them.

    Args:
        members: The networks.
        scaling: Units of their inputs and outputs.
        calibration: Correction of their std.
        action_spec: Spec of one action.
        rows: About how many rows each member steps.
        ignores_context: Whether to ignore the distance of the context from the data.
    """
    loc, scale = scaling.target.loc.unsqueeze(-1), scaling.target.scale.unsqueeze(-1)
    shift, slope = (x.unsqueeze(-1) for x in calibration.affine())
    n_state, n_action = scaling.state.loc.numel(), scaling.action.loc.numel()
    n_context = scaling.context.loc.numel()
    n_measured = n_state + n_action + (0 if ignores_context else n_context)
    layers: StackedLayers | Networks
    if isinstance(members, StackedProbFCDynamics):
        layers = _stacked_layers(members, rows)
        center, half = layers.bounds
        shift, slope = shift + slope * center, slope * half
        read = ["state", *(["context"] if not members.ignore_context else []), "action"]
        n_plain = width(action_spec) - n_action
    else:
        layers = Networks(members, (n_state, n_action, n_context))
        read, n_plain = ["state", "action", "context"], 0
    return StepParts(
        layers,
        scaling.units(read, n_plain),
        n_measured,
        (shift + scale.log(), slope),
        (loc, scale),
        scaling.predict_delta,
    )


def _stacked_layers(members: StackedProbFCDynamics, rows: int) -> StackedLayers:
    """Return the layers in columns, in the precision that suits products of ``rows`` rows."""
    weights, biases = list(members.weights), list(members.biases)
    widest = max(weight.shape[-1] for weight in weights)
    device, dtype = weights[0].device, weights[0].dtype
    low = product_dtype(device, dtype, rows, widest)
    if low != dtype and device.type != "cpu":
        # Tensor cores need rows of eight numbers.
        pad = -weights[-1].shape[-1] % 8
        weights[-1], biases[-1] = F.pad(weights[-1], (0, pad)), F.pad(biases[-1], (0, pad))
    bounds = members.log_std_bounds
    columns = [weight.to(low).mT for weight in weights]
    if rows >= 256 and device.type == "cpu":  # matrix products are faster with contiguous weights
        columns = [weight.contiguous() for weight in columns]
    return StackedLayers(
        columns,
        [*(bias.to(low).mT for bias in biases[:-1]), biases[-1].mT],
        members.activation,
        members.n_modes,
        members.state_dim,
        members.ignore_context,
        (bounds.center, bounds.half),
    )
