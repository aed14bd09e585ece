"""The units of the inputs and outputs of an ensemble's networks."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layeredrl_torchrl._checks import check_finite, check_flag, check_instance
from layeredrl_torchrl._outliers import warn_of_outliers
from layeredrl_torchrl._state import undone_on_error
from layeredrl_torchrl.nets import Normalizer

__all__ = ["InputUnits", "Scaling"]


class InputUnits(NamedTuple):
    """Maps inputs ``x [..., F, R]`` to ``clamp((x - loc) * factor, low, high)``.

    The statistics are ``[F, 1]``.
    """

    loc: Tensor
    factor: Tensor
    low: Tensor | None  # None where nothing is clipped
    high: Tensor | None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the networks' inputs and how much each was clipped (or ``None``)."""
        x = (x - self.loc).mul_(self.factor)
        if self.low is None:
            return x, None
        inside = torch.clamp(x, self.low, self.high)
        return inside, x - inside


class Scaling(nn.Module):
    """Standardises the inputs and targets of networks; only :meth:`fit` changes it.

    Args:
        state_dim: ``D``.
        context_dim: ``C``.
        action_dim: ``A`` of continuous actions; 0 for choices, which are not standardised.
        predict_delta: Whether the target is the change of the state instead of the next state.
        normalize_inputs: Whether inputs are standardised.
        normalize_targets: Whether targets are standardised.
        clip_inputs: Whether standardised inputs are clipped to the range of the data; the default
            is ``normalize_inputs``.

    Raises:
        TypeError: Options that are not bools. ValueError: Clipped inputs that are not standardised.
    """

    def __init__(
        self,
        state_dim: int,
        context_dim: int,
        action_dim: int,
        *,
        predict_delta: bool = True,
        normalize_inputs: bool = True,
        normalize_targets: bool = True,
        clip_inputs: bool | None = None,
    ) -> None:
        super().__init__()
        self.predict_delta = check_flag("predict_delta", predict_delta)
        self.normalize_inputs = check_flag("normalize_inputs", normalize_inputs)
        self.normalize_targets = check_flag("normalize_targets", normalize_targets)
        self.clip = normalize_inputs if clip_inputs is None else clip_inputs
        if check_flag("clip_inputs", self.clip) and not normalize_inputs:
            raise ValueError("clip_inputs=True has no effect without normalize_inputs=True")
        self.state = Normalizer(state_dim, clip=self.clip)
        self.context = Normalizer(context_dim, clip=self.clip)
        self.action = Normalizer(action_dim, clip=self.clip)
        self.target = Normalizer(state_dim)

    def inputs(
        self, state: Tensor, context: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Standardise ``state [..., D]``, ``context [..., C]`` and, if continuous, ``action``."""
        if not self.normalize_inputs:
            return state, context, action
        if self.action.loc.numel():
            action = self.action(action)
        if self.context.loc.numel():
            context = self.context(context)
        return self.state(state), context, action

    def targets(self, state: Tensor, next_state: Tensor) -> Tensor:
        """Return the networks' targets for transitions ``[..., D]``."""
        return self.target(next_state - state if self.predict_delta else next_state)

    def units(self, parts: list[str], n_plain: int) -> InputUnits | None:
        """Return the units of concatenated inputs, ``None`` where they are not standardised.

        Args:
            parts: The inputs, of ``"state"``, ``"context"`` and ``"action"``, in order.
            n_plain: How many further inputs follow that are not standardised.
        """
        if not self.normalize_inputs:
            return None
        found = [getattr(self, part) for part in parts]

        def column(name: str, plain: float) -> Tensor:
            values = torch.cat([getattr(normalizer, name) for normalizer in found])
            return F.pad(values, (0, n_plain), value=plain).unsqueeze(-1)

        loc, factor = column("loc", 0.0), column("scale", 1.0).reciprocal()
        if not self.clip:
            return InputUnits(loc, factor, None, None)
        return InputUnits(loc, factor, column("low", -torch.inf), column("high", torch.inf))

    def check(self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor) -> None:
        """Raise ``TypeError`` or ``ValueError`` for data that :meth:`fit` cannot use."""
        named = {"state": state, "context": context, "next_state": next_state}
        if self.action.loc.numel():
            named["action"] = action
        for name, value in named.items():
            check_instance(name, value, Tensor, hint="give transitions [N, n], also where n is 0")
            if not len(value):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}: give at least one transition"
                )
            check_finite(name, value, hint="repair the data first")

    @torch.no_grad()
    def fit(self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor) -> None:
        """Set the statistics from transitions ``[N, ...]``.

        Raises:
            TypeError: Data that are not tensors. ValueError: No transitions, another shape, or
                values that are not finite. After any error nothing is changed.

        Warns:
            UserWarning: Dimensions whose spread comes from a few outliers, and dimensions of the
                state so far from 0 that rounding hides their variation.
        """
        self.check(state, context, action, next_state)
        fits: list[tuple[str, Normalizer, Tensor]] = []
        if self.normalize_inputs:
            fits += [("state", self.state, state), ("context", self.context, context)]
            if self.action.loc.numel():
                fits.append(("action", self.action, action))
        if self.normalize_targets:
            # The difference is taken in the precision of the data.
            target = next_state - state if self.predict_delta else next_state
            name = "change of the state" if self.predict_delta else "next state"
            fits.append((name, self.target, target))
        with undone_on_error(self):  # a wrong shape, or a warning turned into an error
            for name, normalizer, x in fits:
                normalizer.fit(x)
                warn_of_outliers(name, x, normalizer.loc, normalizer.scale)
            _warn_of_rounding(state, next_state)


def _warn_of_rounding(state: Tensor, next_state: Tensor) -> None:
    """Warn of dimensions of ``[N, D]`` where rounding hides the spread of values or changes."""
    far = torch.maximum(state.abs().amax(0), next_state.abs().amax(0))
    # Subtracting the first row is exact for values that are close together.
    spread = (state - state[:1]).std(0, correction=0)
    spread_of_change = (next_state - state).std(0, correction=0)
    gap = torch.finfo(state.dtype).eps * far  # between neighbouring numbers, at most
    buried = ((spread > 0) & (spread < 8 * gap)) | (
        (spread_of_change > 0) & (spread_of_change < 4 * gap)
    )
    told_apart = ~(buried & (far > 1e3))
    found = [d for d, is_fine in enumerate(told_apart.tolist()) if not is_fine]
    if found:
        values = ", ".join(f"{far[d].item():.4g}" for d in found)
        warnings.warn(
            f"dimension(s) {found} of the state lie so far from 0 (up to {values}) that "
            f"{state.dtype} rounds off most of what they vary by, or change by in a step; subtract "
            "a constant in the environment, before observations are cast",
            stacklevel=4,
        )
