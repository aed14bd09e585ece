"""Steps of stacked members as a formula that ``torch.compile`` makes few loops of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from layeredrl_torchrl._precision import full_precision, product_dtype
from layeredrl_torchrl.models.inputs import InputStatistics, excess_std
from layeredrl_torchrl.nets import StackedProbFCDynamics
from layeredrl_torchrl.specs import action_features

if TYPE_CHECKING:
    from layeredrl_torchrl.models.ensemble import ProbabilisticEnsemble

__all__ = ["FusedStep", "fused_step", "fused_steps"]


class Parts(NamedTuple):
    """What does not change over a rollout."""

    weights: list[Tensor]  # [M, out, in] each
    biases: list[Tensor]  # [M, out, 1] each
    activation: nn.Module
    n_modes: int
    predict_delta: bool
    inputs: InputStatistics | None  # [in, 1] each
    bounds: tuple[float, float]  # center and half width of the log std
    log_std: tuple[Tensor, Tensor]  # shift [M, D, 1] and slope [D, 1] of the bounded one
    target: tuple[Tensor, Tensor]  # loc and scale [D, 1]


class Draws(NamedTuple):
    """The random numbers of a step."""

    noise: Tensor  # [M, D, R], standard normal
    height: Tensor | None  # [M, R], uniform, where there are modes to choose from


def fused_step(
    features: Sequence[Tensor], state: Tensor, parts: Parts, draws: Draws | None
) -> tuple[Tensor, Tensor]:
    """Next state ``[M, R, D]`` and term_prob ``[M, R]``.

    All that lies between is ``[M, *, R]``: rows are many and a state has few dimensions, so loops
    along the rows are the ones that fill vector registers.

    Args:
        features: The inputs side by side, ``[M, R, *]`` each.
        state: ``[M, R, D]``.
        parts: The members, and in which units they predict.
        draws: ``None`` steps to the mean of the members' mixtures.
    """
    x, extra = torch.cat([feature.mT for feature in features], 1), None
    if parts.inputs is not None:
        x = torch.addcmul(parts.inputs.offset, x, parts.inputs.factor)
        if parts.inputs.low is not None:
            clipped = torch.clamp(x, parts.inputs.low, parts.inputs.high)
            extra = excess_std(x - clipped, dim=1)  # [M, 1, R]
            x = clipped
    *hidden, (weight, bias) = zip(parts.weights, parts.biases, strict=True)
    for i, layer in enumerate(hidden):
        y = parts.activation(_product(x, *layer))
        x = y + x if i > 0 and x.shape[1] == y.shape[1] else y
    n_modes, (loc, scale) = parts.n_modes, parts.target
    size = n_modes * len(loc)
    means, raws, logits, term = _product(x, weight, bias).split([size, size, n_modes, 1], 1)
    means, raws = (x.unflatten(1, (n_modes, -1)) for x in (means, raws))  # [M, K, D, R]
    if draws is None:
        following = loc + scale * (means * logits.softmax(1).unsqueeze(2)).sum(1)
    else:
        mean, raw = _choose(means, raws, logits, draws.height)
        center, half = parts.bounds
        shift, slope = parts.log_std
        std = (shift + slope * (center + half * torch.tanh((raw - center) / half))).exp()
        std = std if extra is None else std + extra
        following = loc + scale * (mean + std * draws.noise)
    if parts.predict_delta:
        following = following + state.mT
    return following.mT.contiguous(), term.squeeze(1).sigmoid()


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``[M, out, R]``; the bias is added in its own precision, that of the state."""
    return torch.bmm(weight, x.to(weight.dtype)).to(bias.dtype) + bias


def _choose(
    means: Tensor, raws: Tensor, logits: Tensor, height: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean and raw log std ``[M, D, R]`` of the modes that ``height`` falls upon."""
    mean, raw = means[:, 0], raws[:, 0]
    if height is None:
        return mean, raw
    edges = (logits - logits.amax(1, keepdim=True)).exp().cumsum(1)  # [M, K, R]
    height = height * edges[:, -1]
    for k in range(1, means.shape[1]):
        past = (height >= edges[:, k - 1]).unsqueeze(1)
        mean, raw = torch.where(past, means[:, k], mean), torch.where(past, raws[:, k], raw)
    return mean, raw


def fused_steps(
    state: Tensor,
    context: Tensor | None,
    actions: Sequence[Tensor],
    parts: Parts,
    draws: Sequence[Draws | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """Next states ``[M, R, D]`` and term_probs ``[M, R]`` of one :func:`fused_step` after another.

    A call of what is compiled costs as much as a step of some hundred rows, however long it is.

    Args:
        state: ``[M, R, D]``.
        context: ``[M, R, C]``; ``None`` where it is ignored.
        actions: As the members read them, ``[M, R, *]`` each.
        parts: As for a step.
        draws: Likewise, of each step.
    """
    states, terms = [], []
    for action, drawn in zip(actions, draws, strict=True):
        features = [state, action] if context is None else [state, context, action]
        state, term = fused_step(features, state, parts, drawn)
        states.append(state)
        terms.append(term)
    return states, terms


class FusedStep:
    """Steps an ensemble's members as ``Model.make_step`` describes, compiled and without gradients.

    Args:
        ensemble: The ensemble.
        members: Its predicting members.
        deterministic: Step to the mean.
        options: Of ``torch.compile``.
    """

    n_at_once = 5  # more take long to compile, and what a call costs is hardly seen any more

    @torch.no_grad()
    def __init__(
        self,
        ensemble: ProbabilisticEnsemble,
        members: StackedProbFCDynamics,
        *,
        deterministic: bool,
        options: tuple[tuple[str, Any], ...],
    ) -> None:
        self.members, self.deterministic = members, deterministic
        self.steps = _compiled(options)
        first = members.weights[0]
        dtype = product_dtype(first.device, first.dtype)
        inputs = InputStatistics.of(ensemble, members)
        target, bounds = ensemble.target_normalizer, members.log_std_bounds
        shift, slope = ensemble.calibration.affine()
        self.parts = Parts(
            [weight.detach().mT.to(dtype).contiguous() for weight in members.weights],
            [bias.detach().mT for bias in members.biases],
            members.activation,
            members.n_modes,
            ensemble.predict_delta,
            None if inputs is None else inputs.as_columns(),
            (bounds.center, bounds.half),
            (shift.unsqueeze(-1), slope.unsqueeze(-1)),
            (target.loc.unsqueeze(-1), target.scale.unsqueeze(-1)),
        )

    def __call__(self, state: Tensor, context: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Next state ``[M, R, D]`` and term_prob ``[M, R]``; inputs as ``Model.make_step`` says."""
        (following,), (term_prob,) = self.several(state, context, [action])
        return following, term_prob

    @torch.no_grad()
    def several(
        self, state: Tensor, context: Tensor, actions: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The same for one action after another, ``[M, R, *]`` each."""
        # At its first step a rollout repeats one state; other strides would be compiled anew.
        state = state.contiguous()
        members = self.members
        acts = [action_features(members.action_spec, action, state.dtype) for action in actions]
        ctx = None if members.ignore_context else context
        draws = [self._draw(state) for _ in actions]
        with full_precision(state.device):
            return self.steps(state, ctx, acts, self.parts, draws)

    def _draw(self, state: Tensor) -> Draws | None:
        """Drawn outside: a compiled generator gives other numbers for the same seed."""
        if self.deterministic:
            return None
        n_models, n_rows, dim = state.shape
        noise = torch.randn(n_models, dim, n_rows, dtype=state.dtype, device=state.device)
        return Draws(noise, torch.rand_like(noise[:, 0]) if self.parts.n_modes > 1 else None)


@cache
def _compiled(
    options: tuple[tuple[str, Any], ...],
) -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
    """The compiled formula, one for each choice of options in a process."""
    return torch.compile(fused_steps, **dict(options))
