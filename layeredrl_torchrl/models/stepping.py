"""The fast way of stepping an ensemble of stacked members through a rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from layeredrl_torchrl._precision import full_precision, product_dtype
from layeredrl_torchrl.nets import StackedProbFCDynamics, StackedSampler
from layeredrl_torchrl.specs import action_features, is_discrete

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
        self.inputs = weight.new_empty(0, 0, 0)
        self.normalizes, self.clips = ensemble.normalize_inputs, False
        if not self.normalizes:
            return
        parts = [ensemble.state_normalizer]
        if not members.ignore_context:
            parts.append(ensemble.context_normalizer)
        if not is_discrete(ensemble.action_spec):
            parts.append(ensemble.action_normalizer)
        loc, scale = torch.cat([p.loc for p in parts]), torch.cat([p.scale for p in parts])
        # Choices, and the 1 behind all inputs, stay as they are.
        n_plain = members.weights[0].shape[1] + 1 - len(loc)
        self.factor = F.pad(scale.reciprocal(), (0, n_plain), value=1.0)
        self.offset = F.pad(-loc / scale, (0, n_plain))
        if ensemble.state_normalizer.clip:
            self.low = F.pad(torch.cat([p.low for p in parts]), (0, n_plain), value=-torch.inf)
            self.high = F.pad(torch.cat([p.high for p in parts]), (0, n_plain), value=torch.inf)
            # Before there are statistics, nothing lies outside.
            self.clips = bool((self.low.isfinite() | self.high.isfinite()).any())

    @torch.no_grad()
    def __call__(self, state: Tensor, context: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Next state ``[M, R, D]`` and term_prob ``[M, R]``; inputs as ``Model.make_step`` says."""
        with full_precision(state.device):
            x = self._features(state, context, action)
            extra = None
            if self.normalizes:
                x = torch.addcmul(self.offset, x, self.factor)
            if self.clips:
                clipped = torch.clamp(x, self.low, self.high)
                if not self.sampler.deterministic:
                    extra = excess_std(x.sub_(clipped))
                x = clipped
            return self.sampler(x, state if self.predict_delta else None, extra)

    def _features(self, state: Tensor, context: Tensor, action: Tensor) -> Tensor:
        """All inputs and a 1, ``[M, R, in + 1]``; the next call overwrites them."""
        members = self.members
        action = action_features(members.action_spec, action, state.dtype)
        parts = (state, action) if members.ignore_context else (state, context, action)
        widths = [part.shape[-1] for part in parts]
        if self.inputs.shape[:2] != state.shape[:2]:
            self.inputs = state.new_ones(*state.shape[:2], sum(widths) + 1)
        *targets, _ = self.inputs.split([*widths, 1], -1)
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part)
        return self.inputs


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
