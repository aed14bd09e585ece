"""Functions of a step, such as rewards and terminations, and how they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from layeredrl_torchrl._checks import check_callable

__all__ = ["StepFunction", "needs_next_state", "on_step", "reads_next_state", "refuse_next_state"]

StepFunction: TypeAlias = Callable[..., Tensor]
"""``(state [*B, D], context [*B, C], action [*B, A]) -> [*B]``, or declared to read the next state
(:func:`~layeredrl_torchrl.reads_next_state`) and with ``next_state [*B, D]`` as a fourth argument.
"""

F = TypeVar("F", bound=Callable[..., Any])


def reads_next_state(func: F) -> F:
    """Declare that a reward or termination reads the next state, and return it.

    It is then called with the next state as a fourth argument. To declare this for all objects of a
    class, set ``reads_next_state = True`` in the class, or use this function as its decorator. The
    signature is not inspected.

    >>> @reads_next_state
    ... def progress(state, context, action, next_state):
    ...     return next_state[..., 0] - state[..., 0]
    >>> model = ProbabilisticEnsemble(Unbounded((3,)), None, Bounded(-1.0, 1.0, (1,)))
    >>> predictor = StaticPredictor(model, None, progress, IdentityEncoder((3,)), 3)
    >>> predictor.rollout(torch.zeros(7, 3), torch.zeros(7, 15, 1))["next", "reward"].shape
    torch.Size([7, 5, 1, 15, 1])

    Raises:
        TypeError: Not a callable, or one that takes no attributes.
    """
    check_callable("func", func, factory=True)
    try:
        func.reads_next_state = True  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        raise TypeError(
            f"{func!r} takes no attributes; write `reads_next_state = True` in its class, or "
            "declare a function that calls it: def f(state, context, action, next_state)"
        ) from None
    return func


def needs_next_state(func: StepFunction) -> bool:
    """Return whether ``func`` was declared to read the next state."""
    return bool(getattr(func, "reads_next_state", False))


def on_step(
    func: StepFunction, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
) -> Tensor:
    """Call ``func`` on steps ``[*B]`` that led to ``next_state [*B, D]``, as it was declared."""
    if needs_next_state(func):
        return func(state, context, action, next_state)
    return func(state, context, action)


def refuse_next_state(name: str, func: StepFunction | None) -> None:
    """Raise ``ValueError`` if ``func`` reads the next state where there is none."""
    if func is not None and needs_next_state(func):
        raise ValueError(
            f"{name} was declared to read the next state, but is asked about state, context and "
            "action alone; only rew_func and term_func may read it"
        )
