"""Imagined returns: what a planner needs of a rollout, without the rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layeredrl_torchrl._checks import check_per_item
from layeredrl_torchrl.models import Propagation, TSInfinity
from layeredrl_torchrl.models.rollouts import ImaginedStep, imagine

if TYPE_CHECKING:
    from layeredrl_torchrl.predictors.predictor import Predictor

__all__ = ["imagined_returns"]

# Particles whose rewards are computed at once: enough that the time goes into the products and
# not into calling them, and few enough that what lies between two products stays in the caches.
_ROWS = 2048


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
    """As ``Predictor.returns`` says; a few steps' particles are all that is kept."""
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
    share = flat[0].new_ones(particles)
    n_steps = max(1, _ROWS // share.numel())
    steps: list[ImaginedStep] = []
    shares: list[Tensor] = []
    last: tuple[Tensor, ...] = ()
    imagined = imagine(model, *flat, propagation, deterministic=deterministic)
    for h, step in enumerate(imagined, start=1):
        steps.append(step)
        shares.append(share)
        alive = discount * (1.0 - step.term_prob) if use_term_prob else discount
        share = share * alive
        if len(steps) < n_steps and h < flat[2].shape[1]:
            continue
        # Rewards of several steps at once: as much to compute, but fewer and larger operations.
        states = torch.stack([step.state for step in steps], 3)  # [M', N, P', h, D]
        action = torch.stack([step.action for step in steps], 1)  # [N, h, *]
        rows = states.shape[:-1]
        spread = action[:, None].expand(*rows, *action.shape[2:])
        gain = reward_of(states, ctx.unsqueeze(3).expand(*rows, -1), spread)
        check_per_item("rew_func", gain, rows)
        if exploration_bonus is not None:
            # At the mean over particles: the bonus asks all members itself.
            of_start = flat[1][:, None].expand(*action.shape[:2], -1)
            bonus = exploration_bonus(states.mean((0, 2)), of_start, action)
            check_per_item("exploration_bonus", bonus, action.shape[:2])
            gain = gain + bonus[:, None]
        total = total + (torch.stack(shares, -1) * gain).sum(-1)
        last = (step.next_state, ctx, spread[:, :, :, -1])
        steps, shares = [], []
    if value_of is not None:
        total = total + share * check_per_item("val_func", value_of(*last), particles)
    if not bool(torch.isfinite(total.detach().sum())):
        bad = (~torch.isfinite(total)).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"the imagined returns of member(s) {bad} are not finite over a horizon of "
                f"{flat[2].shape[1]}: shorten it, or train the predictor on data like these "
                "states and actions"
            )
    return total.movedim(0, 1).reshape(*batch, *total.shape[:1], total.shape[2])
