"""The fast way of stepping an ensemble of stacked members through a rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layeredrl_torchrl._precision import product_dtype
from layeredrl_torchrl.nets import StackedProbFCDynamics, StackedSampler
from layeredrl_torchrl.specs import is_discrete, width

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

    Raises:
        ValueError: Members with parameters that are not finite; the message names them.
    """

    @torch.no_grad()
    def __init__(
        self,
        ensemble: ProbabilisticEnsemble,
        members: StackedProbFCDynamics,
        *,
        deterministic: bool,
    ) -> None:
        _check_parameters(members)
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
        self.target_scale = target.scale
        self.normalizes, self.clips = ensemble.normalize_inputs, ensemble.state_normalizer.clip
        if not self.normalizes:
            return
        parts = [ensemble.state_normalizer]
        if not members.ignore_context:
            parts.append(ensemble.context_normalizer)
        loc, scale = [p.loc for p in parts], [p.scale for p in parts]
        low, high = ([p.low for p in parts], [p.high for p in parts]) if self.clips else ([], [])
        if is_discrete(ensemble.action_spec):
            one_hot = weight.new_ones(width(ensemble.action_spec))
            loc.append(torch.zeros_like(one_hot))
            scale.append(one_hot)
            low.append(torch.full_like(one_hot, -torch.inf))
            high.append(torch.full_like(one_hot, torch.inf))
        else:
            action = ensemble.action_normalizer
            loc.append(action.loc)
            scale.append(action.scale)
            if self.clips:
                low.append(action.low)
                high.append(action.high)
        self.factor = torch.cat(scale).reciprocal()
        self.offset = -torch.cat(loc) * self.factor
        if self.clips:
            self.low, self.high = torch.cat(low), torch.cat(high)

    @torch.no_grad()
    def __call__(self, state: Tensor, context: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Next state ``[M, R, D]`` and term_prob ``[M, R]``; inputs as ``Model.make_step`` says."""
        with torch.autocast(state.device.type, enabled=False):
            x = self.members.features(state, context, action)
            extra = None
            if self.normalizes:
                x = torch.addcmul(self.offset, x, self.factor)
            if self.normalizes and self.clips:
                clipped = torch.clamp(x, self.low, self.high)
                if not self.sampler.deterministic:
                    extra = excess_std(x - clipped) * self.target_scale
                x = clipped
            base = state if self.predict_delta else None
            return self.sampler(x, base, extra)


def excess_std(excess: Tensor) -> Tensor:
    """What lies beyond the data adds to the normalised std: ``[..., n] -> [..., 1]``.

    The distance from the range of the data, in standard deviations of the inputs, and at most 1:
    far from the data the prediction is no sharper than the spread of all that was seen.
    """
    return torch.linalg.vector_norm(excess, dim=-1, keepdim=True).clamp(max=1.0)


def _check_parameters(members: StackedProbFCDynamics) -> None:
    parameters = [*members.weights, *members.biases]
    if bool(torch.isfinite(torch.stack([p.sum() for p in parameters]).sum())):
        return
    bad = torch.stack([(~torch.isfinite(p)).flatten(1).any(1) for p in parameters]).any(0)
    found = bad.nonzero().flatten().tolist()
    if found:
        raise ValueError(
            f"member(s) {found} of {len(bad)} have parameters that are not finite; the model has "
            "diverged: lower its learning rate, or check the data it was trained on"
        )
