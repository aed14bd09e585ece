"""Imagined returns: what a planner needs of a rollout, without the rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layeredrl_torchrl.models import Propagation, TSInfinity
from layeredrl_torchrl.models.rollouts import imagine

if TYPE_CHECKING:
    from layeredrl_torchrl.predictors.predictor import Predictor

__all__ = ["imagined_returns"]


def imagined_returns(
    predictor: Predictor,
    state: Tensor,
    context: Tensor | None,
    actions: Tensor,
    *,
    discount: float,
    use_value_func: bool,
    use_term_prob: bool,
    exploration_bonus: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    propagation: Propagation | None,
    deterministic: bool,
) -> Tensor:
    """As ``Predictor.returns`` says; one step's particles are all that is kept."""
    if not 0.0 < discount <= 1.0:
        raise ValueError(f"discount must lie in (0, 1], got {discount}")
    reward_of = predictor.need("rew_func")
    value_of = predictor.need("terminal_value") if use_value_func else None
    model = predictor.model
    batch, flat = model.prepare_rollout(state, context, actions)
    propagation = TSInfinity() if propagation is None else propagation
    n_models, n_part = propagation.particles(model.n_models, model.n_particles_per_model)
    particles = (n_models, len(flat[0]), n_part)
    ctx = flat[1][:, None].expand(*particles, -1)
    total = flat[0].new_zeros(particles)
    share: Tensor | float = 1.0
    last: tuple[Tensor, ...] = ()
    for step in imagine(model, *flat, propagation, deterministic=deterministic):
        action = step.action[:, None].expand(*particles, *step.action.shape[1:])
        gain = reward_of(step.state, ctx, action)
        if exploration_bonus is not None:
            # At the mean over particles: the bonus asks all members itself.
            mean = step.state.mean((0, 2))
            gain = gain + exploration_bonus(mean, flat[1], step.action)[:, None]
        total = total + share * gain
        if use_term_prob:
            share = share * discount * (1.0 - step.term_prob)
        else:
            share = share * discount
        last = (step.next_state, ctx, action)
    if value_of is not None:
        total = total + share * value_of(*last)
    if not bool(torch.isfinite(total.detach().sum())):
        bad = (~torch.isfinite(total)).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"the imagined returns of member(s) {bad} are not finite over a horizon of "
                f"{flat[2].shape[1]}: shorten it, or train the predictor on data like these "
                "states and actions"
            )
    return total.movedim(0, 1).reshape(*batch, *total.shape[:1], total.shape[2])
