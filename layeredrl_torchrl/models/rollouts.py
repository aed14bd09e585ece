"""Rolling a model out: the steps, the trajectory they are laid out as, and its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from layeredrl_torchrl.models.propagation import Propagation, StepsAhead

if TYPE_CHECKING:
    from layeredrl_torchrl.models.model import Model

__all__ = ["ImaginedStep", "imagine", "trajectory", "uncertainty"]


class ImaginedStep(NamedTuple):
    """What happens to the particles of ``N`` starts in one step."""

    state: Tensor  # [M', N, P', D]
    action: Tensor  # [N, *]
    next_state: Tensor  # [M', N, P', D]
    term_prob: Tensor  # [M', N, P']


def imagine(
    model: Model,
    state: Tensor,
    context: Tensor,
    actions: Tensor,
    propagation: Propagation,
    *,
    deterministic: bool = False,
) -> Iterator[ImaginedStep]:
    """Step particles along ``actions``, keeping nothing but the few steps made at once.

    Args:
        model: The model.
        state: ``[N, D]``, checked.
        context: ``[N, C]``.
        actions: ``[N, H, *]``, in the form of the action spec.
        propagation: Which member moves which particle.
        deterministic: Whether members follow their mean.
    """
    n_models, n_part = propagation.particles(model.n_models, model.n_particles_per_model)
    step = model.make_step(deterministic=deterministic or propagation.deterministic)
    particles = state[:, None].expand(n_models, len(state), n_part, -1)
    for part in _cut(actions, step.n_at_once if isinstance(step, StepsAhead) else 1):
        moved = propagation.advance_several(step, model.n_models, particles, context, part)
        for action, (following, term_prob) in zip(part.unbind(1), moved, strict=True):
            yield ImaginedStep(particles, action, following, term_prob)
            particles = following


def _cut(actions: Tensor, size: int) -> tuple[Tensor, ...]:
    """``[N, H, *]`` in parts of at most ``size`` steps, as equal as may be."""
    horizon = actions.shape[1]
    return actions.split(math.ceil(horizon / math.ceil(horizon / size)), 1)


def trajectory(
    model: Model,
    batch: torch.Size,
    state: Tensor,
    context: Tensor,
    actions: Tensor,
    propagation: Propagation,
    *,
    deterministic: bool,
) -> TensorDict:
    """A rollout as ``Model.rollout`` returns it, of inputs as for :func:`imagine`."""
    n, horizon = actions.shape[:2]
    n_models, n_part = propagation.particles(model.n_models, model.n_particles_per_model)
    particles = (n_models, n, n_part, model.state_dim)
    # One tensor holds all steps; only where gradients are kept, which steps written in place
    # would destroy, are the steps gathered at the end.
    gathered = [state[:, None].expand(particles)] if torch.is_grad_enabled() else []
    states = state.new_empty(() if gathered else (horizon + 1, *particles))
    term = state.new_empty((horizon, *particles[:-1]))
    if not gathered:
        states[0] = state[:, None]
    steps = imagine(model, state, context, actions, propagation, deterministic=deterministic)
    for h, step in enumerate(steps):
        if gathered:
            gathered.append(step.next_state)
        else:
            states[h + 1] = step.next_state
        term[h] = step.term_prob
    if gathered:
        states = torch.stack(gathered)
    check_trajectory(states, term)

    def lay_out(x: Tensor) -> Tensor:
        """[H, M, N, P, *] -> [*B, M, P, H, *]."""
        return x.permute(2, 1, 3, 0, *range(4, x.ndim)).unflatten(0, batch or (1,))

    shape = (*batch, n_models, n_part, horizon)
    acts = actions[:, None, None].expand(n, n_models, n_part, *actions.shape[1:])
    ctx = context[:, None, None, None].expand(n, n_models, n_part, horizon, -1)
    state_key, context_key, action_key = model.in_keys
    data = TensorDict(
        {
            state_key: lay_out(states[:-1]).reshape(*shape, -1),
            context_key: ctx.reshape(*shape, model.context_dim),
            action_key: acts.reshape(*shape, *acts.shape[4:]),
            "next": {"term_prob": lay_out(term.unsqueeze(-1)).reshape(*shape, 1)},
        },
        batch_size=shape,
    )
    data.set(("next", state_key), lay_out(states[1:]).reshape(*shape, -1))
    return data


def uncertainty(state: Tensor) -> TensorDict:
    """Mean and variances ``[*B, H, D]`` of particles ``[*B, M, P, H, D]``."""
    member_mean = state.mean(-3)  # [*B, M, H, D]
    return TensorDict(
        {
            "mean": member_mean.mean(-3),
            "epistemic_var": member_mean.var(-3, correction=0),
            "aleatoric_var": state.var(-3, correction=0).mean(-3),
        },
        batch_size=(*state.shape[:-4], state.shape[-2]),
    )


def check_trajectory(states: Tensor, term_prob: Tensor) -> None:
    """Raise if ``states [H + 1, M, N, P, D]`` or ``term_prob [H, M, N, P]`` are not finite."""
    if bool(torch.isfinite(states.detach().sum() + term_prob.detach().sum())):
        return
    bad = (~torch.isfinite(states)).flatten(2).any(2)
    bad[1:] |= (~torch.isfinite(term_prob)).flatten(2).any(2)
    if not bool(bad.any()):
        return
    step, member = bad.nonzero()[0].tolist()
    raise ValueError(
        f"the rollout of member {member} diverged at step {step} of {states.shape[0] - 1}: "
        "shorten the horizon, or train the model on data like these states and actions"
    )
