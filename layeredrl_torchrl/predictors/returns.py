"""Imagined returns, computed without storing the rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from layeredrl_torchrl._checks import (
    check_flag,
    check_instance,
    check_number,
    check_per_item,
    check_probability,
)
from layeredrl_torchrl._graphs import Same
from layeredrl_torchrl._watch import refuse
from layeredrl_torchrl.models import Model, Propagation, TSInfinity
from layeredrl_torchrl.models._blocks import starts_at_once
from layeredrl_torchrl.models._rollouts import ImaginedStep, imagine
from layeredrl_torchrl.models.propagation import propagation_key
from layeredrl_torchrl.nets import check_step_function, on_step
from layeredrl_torchrl.predictors._functions import StepFunctions, value_of_state

__all__ = ["ReturnOptions", "imagined_returns"]


@dataclass(frozen=True, kw_only=True)
class ReturnOptions:
    """How imagined trajectories are scored.

    >>> ReturnOptions(discount=0.99, use_value_func=True).use_term_prob
    True

    Args:
        discount: Over one step of the model, in ``(0, 1]``.
        use_value_func: Whether to add the value of the last state; needs a ``val_func``.
        use_term_prob: Whether to weight rewards by the probability that the episode has not ended.
        exploration_bonus: Callable of state, context and action, for example
            :class:`~layeredrl_torchrl.EnsembleDisagreement`; added to the reward, evaluated at the
            mean over particles.
        propagation: How uncertainty spreads over steps: :class:`~layeredrl_torchrl.TSInfinity`
            (the default), :class:`~layeredrl_torchrl.TS1` or
            :class:`~layeredrl_torchrl.Expectation`.
        deterministic: Whether to follow the members' means instead of sampling.

    Raises:
        TypeError, ValueError: An option of another kind, or outside its range.
    """

    discount: float = 1.0
    use_value_func: bool = False
    use_term_prob: bool = True
    exploration_bonus: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    propagation: Propagation | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_number("discount", self.discount, 0.0, 1.0, open_low=True)
        for name in ("use_value_func", "use_term_prob", "deterministic"):
            check_flag(name, getattr(self, name))
        check_step_function("exploration_bonus", self.exploration_bonus, may_look_ahead=False)
        if self.propagation is not None:
            check_instance("propagation", self.propagation, Propagation, hint="pass TSInfinity()")


# Particles whose rewards are computed at once: enough that matrix products dominate the overhead of
# calls, and few enough that intermediate results stay in the caches.
_ROWS = 2048


def imagined_returns(
    model: Model,
    functions: StepFunctions,
    state: Tensor,
    context: Tensor | None,
    actions: Tensor,
    options: ReturnOptions,
) -> Tensor:
    """Compute ``Predictor.returns`` step by step, keeping only the particles of a few steps."""
    propagation = TSInfinity() if options.propagation is None else options.propagation
    sizes = (model.n_models, model.n_particles_per_model)
    n_part = propagation.particles(*sizes)[1]

    def run(state: Tensor, actions: Tensor, *context: Tensor) -> tuple[Tensor, ...]:
        _, flat = model.prepare_rollout(state, context[0] if context else None, actions)
        n = len(flat[0])
        step = model.make_step(
            rows=n * n_part, deterministic=options.deterministic or propagation.deterministic
        )
        size = starts_at_once(n, n_part, model.floats_per_row(), flat[0].device)
        totals = []
        for start in range(0, n, size):
            rows = slice(start, start + size)
            block = (flat[0][rows], flat[1][rows], flat[2][rows])
            imagined = imagine(step, block, propagation, sizes)
            totals.append(_sum_rewards(imagined, functions, block[1], options))
        total = totals[0] if len(totals) == 1 else torch.cat(totals, 1)
        _check_returns(total, flat[2].shape[1])
        return (total.movedim(0, 1),)

    bonus = options.exploration_bonus
    name = (
        *("returns", options.discount, options.use_term_prob, options.deterministic),
        *(*map(Same, (*functions, bonus)), propagation_key(propagation)),
    )
    inputs = (state, actions) if context is None else (state, actions, context)
    (total,) = model.run(name, run, inputs, (*functions, bonus))
    return total.reshape(*state.shape[:-1], *total.shape[1:])


def _sum_rewards(
    imagined: Iterator[ImaginedStep],
    functions: StepFunctions,
    context: Tensor,
    options: ReturnOptions,
) -> Tensor:
    """Return the returns ``[M', N, P']`` of imagined steps, with ``context [N, C]``."""
    steps: list[ImaginedStep] = []
    last = next(imagined)
    share = torch.ones_like(last.term_prob)
    total = torch.zeros_like(share)
    for step in chain((last,), imagined):
        steps.append(step)
        if (len(steps) + 1) * share.numel() > _ROWS:
            gain, share = _gain(steps, share, functions, context, options)
            total, steps = total + gain, []
        last = step
    if steps:
        gain, share = _gain(steps, share, functions, context, options)
        total = total + gain
    # A non-finite state makes the return non-finite, whatever the reward is.
    total = total + (last.next_state * 0.0).sum(1)
    if functions.value is not None:
        state = last.next_state.permute(0, 2, 3, 1).contiguous()
        rows = state.shape[:-1]
        ctx = context[:, None].expand(*rows, -1)
        value = value_of_state(functions.value, state, ctx)
        total = total + share * check_per_item("val_func", value, rows)
    return total


def _gain(
    steps: list[ImaginedStep],
    share: Tensor,
    functions: StepFunctions,
    context: Tensor,
    options: ReturnOptions,
) -> tuple[Tensor, Tensor]:
    """Return what several steps add to the returns, and the remaining share, both ``[M', N, P']``.

    Together they need as much arithmetic, but fewer and larger operations.
    """
    made = [step.state for step in steps]
    if functions.look_ahead:  # each step begins where the previous one ended
        made.append(steps[-1].next_state)
    states = following = torch.stack(made).permute(1, 3, 4, 0, 2).contiguous()
    if functions.look_ahead:
        states, following = states[..., :-1, :], states[..., 1:, :]
    action = torch.stack([step.action for step in steps], 1)  # [N, h, *]
    rows = states.shape[:-1]  # [M', N, P', h]
    spread = action[:, None].expand(*rows, *action.shape[2:])
    taken = (states, context[:, None, None].expand(*rows, -1), spread, following)
    assert functions.reward is not None
    gain = check_per_item("rew_func", on_step(functions.reward, *taken), rows)
    term_prob: Sequence[Tensor] = [step.term_prob for step in steps]
    if functions.term is not None and options.use_term_prob:
        ends = on_step(functions.term, *taken)
        term_prob = check_probability("term_func", ends, rows, states.dtype).unbind(-1)
    shares = []
    for ends in term_prob:
        shares.append(share)
        alive = 1.0 - ends if options.use_term_prob else 1.0
        share = share * (options.discount * alive)
    if options.exploration_bonus is not None:
        # At the mean over particles: the bonus evaluates all members itself.
        of_start = context[:, None].expand(*action.shape[:2], -1)
        bonus = options.exploration_bonus(states.mean((0, 2)), of_start, action)
        check_per_item("exploration_bonus", bonus, action.shape[:2])
        gain = gain + bonus[:, None]
    return (torch.stack(shares, -1) * gain).sum(-1), share


def _check_returns(total: Tensor, horizon: int) -> None:
    """Refuse returns ``[M', N, P']`` that are not finite; the message names the members."""
    on_host = total.device.type == "cpu"

    def error(found: Tensor) -> ValueError | None:
        if on_host:  # a sum of finite values may overflow
            found = (~torch.isfinite(total)).flatten(1).any(1)
        members = found.nonzero().flatten().tolist()
        if not members:
            return None
        return ValueError(
            f"the imagined returns of member(s) {members} are not finite over a horizon of "
            f"{horizon}: shorten it, or train the predictor on data like these states and actions"
        )

    refuse(~torch.isfinite(total.detach().flatten(1).sum(1)), error)
