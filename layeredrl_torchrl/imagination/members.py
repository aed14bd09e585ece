"""One step of each entry of a batch: by one member of an ensemble, or by the mean of all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from layeredrl_torchrl.models import Model
from layeredrl_torchrl.models.output_checks import check_output

__all__ = ["draw_members", "step_by_mean", "step_by_members"]


def step_by_mean(
    model: Model, state: Tensor, context: Tensor, action: Tensor
) -> tuple[Tensor, Tensor]:
    """Expected next state ``[*B, D]`` and term_prob ``[*B]`` over all members and modes.

    Inputs are as for :func:`step_by_members`, and not checked here, once a step: planners project
    their actions.

    Raises:
        ValueError: A member that predicts what is not finite (the message names it).
    """
    batch = state.shape[:-1]
    rows = (x.reshape(batch.numel(), *x.shape[len(batch) :]) for x in (state, context, action))
    out = model.predict_members(*(x.expand(model.n_models, *x.shape) for x in rows))
    check_output(out)
    (mean, _), weights, term_prob = out
    mean = (weights.unsqueeze(-1) * mean).sum(-2).mean(0)
    return mean.reshape(state.shape), term_prob.mean(0).reshape(batch)


def draw_members(model: Model, batch: torch.Size, device: torch.device | None) -> Tensor:
    """Uniformly drawn members, int64 ``[*B, 1]``."""
    return torch.randint(model.n_models, (*batch, 1), device=device)


def step_by_members(
    model: Model, member: Tensor, state: Tensor, context: Tensor, action: Tensor
) -> tuple[Tensor, Tensor]:
    """Sample a next state of each entry from the mixture that one member predicts.

    Entries of one member are put side by side, so that the members are evaluated on as many rows
    as the most frequent of them has (near ``N / M`` of ``N`` entries), not on all rows each.

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
            predicts what is not finite (the message names it).
    """
    batch = state.shape[:-1]
    n_models, n = model.n_models, batch.numel()
    if member.shape != (*batch, 1) or member.dtype != torch.int64:
        raise ValueError(
            f"the members are {member.dtype} of shape {tuple(member.shape)}, expected int64 of "
            f"shape {(*batch, 1)}; leave them out to have them drawn"
        )
    flat = member.reshape(n)
    if n and not 0 <= int(flat.min()) <= int(flat.max()) < n_models:
        raise ValueError(
            f"the members lie in [{int(flat.min())}, {int(flat.max())}], but the model has "
            f"{n_models}; leave them out to have them drawn"
        )
    taken = one_hot(flat, n_models)  # [N, M]
    rank = taken.cumsum(0).gather(1, flat.unsqueeze(1)).squeeze(1) - 1  # among those of its member
    width = int(taken.sum(0).max()) if n else 0
    seat = flat * width + rank
    # Seats left over repeat entry 0 for a member that it does not follow; nobody reads them.
    entry = seat.new_zeros(n_models * width).scatter(0, seat, torch.arange(n, device=seat.device))
    rows = (
        x.reshape(n, *x.shape[len(batch) :])[entry].unflatten(0, (n_models, width))
        for x in (state, context, action)
    )
    following, term_prob = model.make_step()(*rows)
    following, term_prob = following.flatten(0, 1)[seat], term_prob.flatten()[seat]
    _check_finite(following, term_prob, flat)
    return following.reshape(state.shape), term_prob.reshape(batch)


def _check_finite(following: Tensor, term_prob: Tensor, member: Tensor) -> None:
    """Raise if ``following [N, D]`` or ``term_prob [N]`` are not finite, naming the members."""
    finite = torch.isfinite(following).all(-1) & torch.isfinite(term_prob)
    if bool(finite.all()):
        return
    raise ValueError(
        f"member(s) {member[~finite].unique().tolist()} predict values that are not finite for "
        f"{int((~finite).sum())} of {len(finite)} entries: shorten the episodes, or train the "
        "model on data like these states and actions"
    )
