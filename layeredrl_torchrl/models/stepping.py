"""The fast way of stepping an ensemble of stacked members through a rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layeredrl_torchrl._precision import full_precision, product_dtype
from layeredrl_torchrl.models.inputs import InputStatistics, excess_std
from layeredrl_torchrl.nets import StackedProbFCDynamics, StackedSampler
from layeredrl_torchrl.specs import action_features

if TYPE_CHECKING:
    from layeredrl_torchrl.models.ensemble import ProbabilisticEnsemble

__all__ = ["EnsembleStep"]


class EnsembleStep:
    """Steps an ensemble's members as ``Model.make_step`` describes, without gradients.

    The statistics of all inputs are put side by side once, so that a step normalises, clips and
    measures the excess of its inputs in one operation each.

    Args:
        ensemble: The ensemble.
        members: Its predicting members.
        deterministic: Step to the mean.
    """

    @torch.no_grad()
    def __init__(
        self,
        ensemble: ProbabilisticEnsemble,
        members: StackedProbFCDynamics,
        *,
        deterministic: bool,
    ) -> None:
        self.members = members
        self.predict_delta = ensemble.predict_delta
        weight = members.weights[0]
        target = ensemble.target_normalizer
        shift, slope = ensemble.calibration.affine()
        self.sampler = StackedSampler(
            members,
            log_std_shift=(shift + target.scale.log()).unsqueeze(1),
            log_std_slope=slope,
            target_loc=target.loc,
            target_scale=target.scale,
            dtype=product_dtype(weight.device, weight.dtype),
            deterministic=deterministic,
        )
        self.features = weight.new_empty(0, 0, 0)
        # The 1 behind all inputs stays as it is.
        self.inputs = InputStatistics.of(ensemble, members, n_more=1)

    @torch.no_grad()
    def __call__(self, state: Tensor, context: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Next state ``[M, R, D]`` and term_prob ``[M, R]``; inputs as ``Model.make_step`` says."""
        with full_precision(state.device):
            x = self._side_by_side(state, context, action)
            extra = None
            if self.inputs is not None:
                x = torch.addcmul(self.inputs.offset, x, self.inputs.factor)
                if self.inputs.low is not None:
                    clipped = torch.clamp(x, self.inputs.low, self.inputs.high)
                    if not self.sampler.deterministic:
                        extra = excess_std(x.sub_(clipped))
                    x = clipped
            return self.sampler(x, state if self.predict_delta else None, extra)

    def _side_by_side(self, state: Tensor, context: Tensor, action: Tensor) -> Tensor:
        """All inputs and a 1, ``[M, R, in + 1]``; the next call overwrites them."""
        members = self.members
        action = action_features(members.action_spec, action, state.dtype)
        parts = (state, action) if members.ignore_context else (state, context, action)
        widths = [part.shape[-1] for part in parts]
        if self.features.shape[:2] != state.shape[:2]:
            self.features = state.new_ones(*state.shape[:2], sum(widths) + 1)
        *targets, _ = self.features.split([*widths, 1], -1)
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part)
        return self.features
