"""Rollouts of a model, and the layout and uncertainty of their trajectories."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict, unravel_key
from torch import Tensor

from layeredrl_torchrl._watch import refuse
from layeredrl_torchrl.models._blocks import starts_at_once
from layeredrl_torchrl.models._step import StepInputs
from layeredrl_torchrl.models._stepping import Stepper
from layeredrl_torchrl.models.propagation import Propagation

__all__ = ["ImaginedStep", "imagine", "lay_out", "trajectory", "uncertainty"]


class ImaginedStep(NamedTuple):
    """One imagined step of the particles of ``N`` starts."""

    state: Tensor  # [M', D, N, P']
    action: Tensor  # [N, *]
    next_state: Tensor  # [M', D, N, P']
    term_prob: Tensor  # [M', N, P']


def imagine(
    step: Stepper,
    given: tuple[Tensor, Tensor, Tensor],
    propagation: Propagation,
    sizes: tuple[int, int],
    into: tuple[Tensor, Tensor] | None = None,
) -> Iterator[ImaginedStep]:
    """Step particles along ``actions``, keeping only the few steps that one call makes.

    Args:
        step: Steps the members.
        given: State ``[N, D]``, context ``[N, C]`` and actions ``[N, H, *]``, checked.
        propagation: Which member moves which particle.
        sizes: ``M`` and ``P``.
        into: Tensors to write all states ``[H, M', D, N, P']`` and term_probs ``[H, M', N, P']``
            to.
    """
    state, context, actions = given
    n_models = sizes[0]
    n_seats, n_part = propagation.particles(*sizes)
    particles = state.mT[None, :, :, None].expand(n_seats, -1, -1, n_part)
    # Columns of all rows: the action and context of a start are repeated for its particles.
    ctx = _per_particle(context.mT, n_part)
    acts = _per_particle(step.actions(actions).movedim(0, -1), n_part)  # [1, H, *, R]
    n_at_once = step.n_at_once if propagation.stays and into is None else 1
    horizon = actions.shape[1]
    if n_at_once > 1:
        size = math.ceil(horizon / math.ceil(horizon / n_at_once))
        for start in range(0, horizon, size):
            stop = min(start + size, horizon)
            flat = particles.reshape(*particles.shape[:2], -1)
            noise = [step.draw(flat) for _ in range(start, stop)]
            moved = step.several(flat, ctx, [acts[:, h] for h in range(start, stop)], noise)
            for h, (following, term_prob) in zip(range(start, stop), moved, strict=True):
                following = following.view(particles.shape)
                term_prob = term_prob.view(n_seats, -1, n_part)
                yield ImaginedStep(particles, actions[:, h], following, term_prob)
                particles = following
        return

    for h in range(horizon):
        out = None if into is None else (into[0][h], into[1][h])

        def move(
            particles: Tensor, h: int = h, out: tuple[Tensor, Tensor] | None = out
        ) -> tuple[Tensor, Tensor]:
            flat = particles.reshape(*particles.shape[:2], -1)
            if out is not None and propagation.stays:
                out = (out[0].view(flat.shape), out[1].view(n_models, -1))
            else:
                out = None
            following, term_prob = step(StepInputs(flat, ctx, acts[:, h], step.draw(flat)), out)
            shape = (n_models, *particles.shape[2:])
            return following.view(*shape[:1], -1, *shape[1:]), term_prob.view(shape)

        following, term_prob = propagation.advance(move, n_models, particles)
        seats = (particles.shape[0], *particles.shape[2:])
        if following.shape != particles.shape or term_prob.shape != seats:
            raise ValueError(
                f"advance of {type(propagation).__name__} gave states {tuple(following.shape)} and "
                f"term_prob {tuple(term_prob.shape)}, expected {tuple(particles.shape)} and "
                f"{tuple(seats)}: [M', D, N, P'] and [M', N, P'], as its particles() says"
            )
        if out is not None and not propagation.stays:
            following, term_prob = out[0].copy_(following), out[1].copy_(term_prob)
        yield ImaginedStep(particles, actions[:, h], following, term_prob)
        particles = following


def _per_particle(columns: Tensor, n_particles: int) -> Tensor:
    """Repeat columns ``[..., N]`` of starts for their particles, ``[1, ..., N * P]``."""
    if n_particles > 1:
        columns = columns.repeat_interleave(n_particles, -1)
    return columns.unsqueeze(0)


def trajectory(
    step: Stepper,
    given: tuple[Tensor, Tensor, Tensor],
    propagation: Propagation,
    sizes: tuple[int, int],
    floats_per_row: int,
) -> tuple[Tensor, Tensor]:
    """Compute all states ``[H + 1, M', D, N, P']`` and term_probs ``[H, M', N, P']``.

    For the arguments see :func:`imagine` and :func:`starts_at_once`.
    """
    state, context, actions = given
    n, horizon = actions.shape[:2]
    n_seats, n_part = propagation.particles(*sizes)
    first = state.mT[None, :, :, None].expand(n_seats, -1, -1, n_part)
    if torch.is_grad_enabled() or not step.writes:
        # Writing steps in place would overwrite tensors that a backward pass needs.
        made = list(imagine(step, (state, context, actions), propagation, sizes))
        states = torch.stack([first, *(one.next_state for one in made)])
        term = torch.stack([one.term_prob for one in made])
    else:
        states = state.new_empty(horizon + 1, *first.shape)
        term = state.new_empty(horizon, n_seats, n, n_part)
        states[0] = first
        size = starts_at_once(n, n_part, floats_per_row, state.device)
        for start in range(0, n, size):
            rows = slice(start, start + size)
            into = (states[1:, :, :, rows], term[:, :, rows])
            block = (state[rows], context[rows], actions[rows])
            for _ in imagine(step, block, propagation, sizes, into):
                pass
    check_trajectory(states, term)
    return states, term


def lay_out(
    batch: torch.Size,
    keys: Sequence[NestedKey],
    term_key: NestedKey,
    states: Tensor,
    term: Tensor,
    context: Tensor,
    actions: Tensor,
) -> TensorDict:
    """Lay out a :func:`trajectory` as ``Model.rollout`` returns it, without copying.

    Args:
        batch: ``*B``, of ``N`` items.
        keys: Of state, context and action.
        term_key: Of the probability of termination.
        states: From :func:`trajectory`.
        term: From :func:`trajectory`.
        context: ``[N, C]``.
        actions: ``[N, H, *]``.
    """
    horizon, n_models, n, n_part = term.shape
    shape = (*batch, n_models, n_part, horizon)
    states = states.permute(3, 1, 4, 0, 2)  # [N, M, P, H + 1, D]
    term = term.permute(2, 1, 3, 0).unsqueeze(-1)
    acts = actions[:, None, None].expand(n, n_models, n_part, *actions.shape[1:])
    ctx = context[:, None, None, None].expand(n, n_models, n_part, horizon, -1)

    def batched(x: Tensor) -> Tensor:
        return x.squeeze(0) if not batch else x.unflatten(0, batch)

    state_key, context_key, action_key = keys
    data = TensorDict({}, batch_size=shape)
    data.set(term_key, batched(term))
    data.set(state_key, batched(states[..., :-1, :]))
    data.set(context_key, batched(ctx))
    data.set(action_key, batched(acts))
    data.set(unravel_key(("next", state_key)), batched(states[..., 1:, :]))
    return data


def uncertainty(state: Tensor) -> TensorDict:
    """Return mean and variances ``[*B, H, D]`` of particles ``[*B, M, P, H, D]``."""
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
    """Refuse values that are not finite in ``states [H + 1, M, *]``, ``term_prob [H, M, *]``."""
    horizon = len(term_prob)
    bad = ~torch.isfinite(states.detach().flatten(2).sum(2))
    bad[1:] |= ~torch.isfinite(term_prob.detach().flatten(2).sum(2))
    on_host = bad.device.type == "cpu"

    def error(found: Tensor) -> ValueError | None:
        if on_host:  # a sum of finite values may overflow
            found = (~torch.isfinite(states)).flatten(2).any(2)
            found[1:] |= (~torch.isfinite(term_prob)).flatten(2).any(2)
        where = found.nonzero().tolist()
        if not where:
            return None
        step, member = where[0]
        return ValueError(
            f"the rollout of member {member} diverged at step {step} of {horizon}: shorten the "
            "horizon, or train the model on data like these states and actions"
        )

    refuse(bad, error)
