"""One step of each entry of a batch, by one member of an ensemble or by the mean of all."""

from __future__ import annotations

import torch
from torch import Tensor

from layeredrl_torchrl._watch import refuse
from layeredrl_torchrl.models import Model
from layeredrl_torchrl.models._step import StepInputs

__all__ = ["draw_members", "step_by_any", "step_by_mean", "step_by_members"]


def step_by_mean(
    model: Model, state: Tensor, context: Tensor, action: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the mean next state ``[*B, D]`` and term_prob ``[*B]`` over all members and modes.

    Inputs are as for :func:`step_by_members`.

    Raises:
        ValueError: A member that predicts non-finite values (the message names it).
    """
    rows = _rows(model, state, context, action)
    seats = [x.expand(model.n_models, *x.shape) for x in rows]
    following, term_prob = _step(model, seats, deterministic=True)
    finite = torch.isfinite(following).flatten(1).all(1) & torch.isfinite(term_prob).all(1)
    refuse(~finite, lambda bad: _diverged(bad.nonzero().flatten().tolist()))
    batch = state.shape[:-1]
    return following.mean(0).reshape(state.shape), term_prob.mean(0).reshape(batch)


def draw_members(model: Model, batch: torch.Size, device: torch.device | None) -> Tensor:
    """Draw members uniformly, int64 ``[*B, 1]``."""
    return torch.randint(model.n_models, (*batch, 1), device=device)


def step_by_any(
    model: Model, state: Tensor, context: Tensor, action: Tensor
) -> tuple[Tensor, Tensor]:
    """Sample the next state of each entry from the mixture of a newly drawn member.

    Entries are dealt to the members as evenly as possible, so all members are equally likely.
    Inputs, results and errors are those of :func:`step_by_members`.
    """
    n, n_models = state.shape[:-1].numel(), model.n_models
    width = -(-n // n_models)
    order = torch.rand(n, device=state.device).argsort()  # the entry in each seat
    # Rotating the seats also draws which members get one entry less.
    turn = torch.randint(n_models, (), device=state.device)
    place = torch.arange(n_models * width, device=state.device)
    seat = (place % n_models + turn) % n_models * width + place // n_models
    seat = torch.zeros_like(order).scatter(0, order, seat[:n])
    return _step_seated(model, seat, seat // width, width, state, context, action)


def step_by_members(
    model: Model, member: Tensor, state: Tensor, context: Tensor, action: Tensor
) -> tuple[Tensor, Tensor]:
    """Sample the next state of each entry from the mixture of its given member.

    On a CPU, the entries of each member are grouped, so that every member is evaluated on as many
    rows as the most frequent member has (near ``N / M`` of ``N`` entries). On an accelerator the
    host would have to wait for that number, so every member is evaluated on all rows.

    Args:
        model: The ensemble of ``M`` members.
        member: Which member moves which entry, int64 ``[*B, 1]``.
        state: ``[*B, D]``.
        context: ``[*B, C]``.
        action: ``[*B, *]``, in the form of the action spec.

    Returns:
        Next state ``[*B, D]`` and term_prob ``[*B]``.

    Raises:
        ValueError: Members that the model does not have, or of another shape; a member that
            predicts non-finite values (the message names it).
    """
    batch = state.shape[:-1]
    n_models, n = model.n_models, batch.numel()
    if member.shape != (*batch, 1) or member.dtype != torch.int64:
        raise ValueError(
            f"the members are {member.dtype} of shape {tuple(member.shape)}, expected int64 of "
            f"shape {(*batch, 1)}; leave them out to sample them"
        )
    flat = member.reshape(n)
    refuse(
        ((flat < 0) | (flat >= n_models)).any(),
        lambda _: ValueError(
            f"there are members outside [0, {n_models - 1}], the members of the model; leave "
            "them out to sample them"
        ),
    )
    if state.device.type != "cpu" or torch.compiler.is_compiling() or type(member) is not Tensor:
        seat = flat.clamp(0, n_models - 1) * n + torch.arange(n, device=flat.device)
        return _step_seated(model, seat, flat, n, state, context, action, all_rows=True)
    taken = torch.nn.functional.one_hot(flat, n_models)  # [N, M]
    rank = taken.cumsum(0).gather(1, flat.unsqueeze(1)).squeeze(1) - 1  # within its member
    width = int(taken.sum(0).max()) if n else 0
    return _step_seated(model, flat * width + rank, flat, width, state, context, action)


def _step_seated(
    model: Model,
    seat: Tensor,
    member: Tensor,
    width: int,
    state: Tensor,
    context: Tensor,
    action: Tensor,
    *,
    all_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """Step entries on their ``seat [N]``; each member has ``width`` consecutive seats.

    With ``all_rows`` every entry has a seat in every member.
    """
    n, n_models = len(seat), model.n_models
    rows = _rows(model, state, context, action)
    if all_rows:
        seats = [x.expand(n_models, *x.shape) for x in rows]
    else:
        # Unused seats repeat entry 0; their results are not read.
        entry = seat.new_zeros(n_models * width)
        entry = entry.scatter(0, seat, torch.arange(n, device=seat.device))
        seats = [x[entry].unflatten(0, (n_models, width)) for x in rows]
    following, term_prob = _step(model, seats)
    following, term_prob = following.flatten(0, 1)[seat], term_prob.flatten()[seat]
    finite = torch.isfinite(following).all(-1) & torch.isfinite(term_prob)
    members = torch.arange(n_models, device=member.device)
    bad = ((member == members.unsqueeze(1)) & ~finite).any(1)
    refuse(bad, lambda bad: _diverged(bad.nonzero().flatten().tolist()))
    return following.reshape(state.shape), term_prob.reshape(state.shape[:-1])


def _rows(model: Model, *inputs: Tensor) -> list[Tensor]:
    """Flatten state, context and action ``[*B, ...]`` to ``[N, ...]``, in the model's dtype."""
    batch, dtype = inputs[0].shape[:-1], model.floats.dtype
    rows = [x.reshape(batch.numel(), *x.shape[len(batch) :]) for x in inputs]
    return [x.to(dtype) if x.is_floating_point() else x for x in rows]


def _step(
    model: Model, seats: list[Tensor], *, deterministic: bool = False
) -> tuple[Tensor, Tensor]:
    """Return next states ``[M, R, D]`` and term_prob ``[M, R]`` of inputs ``[M, R, ...]``."""
    state, context, action = seats
    step = model.make_step(rows=state.shape[1], deterministic=deterministic)
    action = step.actions(action)
    columns = state.mT
    inputs = StepInputs(columns, context.mT, action.movedim(1, -1), step.draw(columns))
    following, term_prob = step(inputs)
    return following.mT, term_prob


def _diverged(members: list[int]) -> ValueError:
    return ValueError(
        f"member(s) {members} predict values that are not finite: shorten the episodes, or train "
        "the model on data like these states and actions"
    )
