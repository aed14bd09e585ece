"""Functions of a step, such as rewards and terminations, and how they are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, TypeVar

from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from layeredrl_torchrl._checks import check_callable

__all__ = [
    "StepFunction",
    "check_step_function",
    "needs_next_state",
    "on_step",
    "reads_next_state",
    "refuse_next_state",
]

StepFunction: TypeAlias = Callable[..., Tensor]
"""``(state [*B, D], context [*B, C], action [*B, A]) -> [*B]``, or declared to read the next state
(:func:`~layeredrl_torchrl.reads_next_state`) and with ``next_state [*B, D]`` as a fourth argument.
"""

F = TypeVar("F", bound=Callable[..., Any])


def reads_next_state(func: F) -> F:
    """Declare that a reward or termination function reads the next state, and return it.

    It is then called with the next state as a fourth argument. To declare this for all objects of a
    class, set ``reads_next_state = True`` in the class, or decorate the class with this function.
    The signature alone does not count.

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
    """Return whether ``func`` was declared to read the next state, or is a partial of one."""
    while isinstance(func, partial) and not hasattr(func, "reads_next_state"):
        func = func.func
    return bool(getattr(func, "reads_next_state", False))


def on_step(
    func: StepFunction, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
) -> Tensor:
    """Call ``func`` on steps ``[*B]`` that led to ``next_state [*B, D]``, as it was declared.

    Continuous actions are converted to the dtype of the states.
    """
    if action.is_floating_point():
        action = action.to(state.dtype)
    if needs_next_state(func):
        return func(state, context, action, next_state)
    return func(state, context, action)


def check_step_function(
    name: str, func: StepFunction | None, *, may_look_ahead: bool = True
) -> None:
    """Raise ``TypeError`` unless ``func`` is ``None`` or can be called as declared.

    The signature never decides what a function reads. But a function is refused before its first
    call if it cannot take state, context and action, and the next state if declared.

    Args:
        name: Name of the argument, for messages.
        func: The function.
        may_look_ahead: Whether it may be declared to read the next state; else ``ValueError``.
    """
    check_callable(name, func, optional=True)
    if not may_look_ahead:
        refuse_next_state(name, func)
    if func is None:
        return
    takes, arguments = _takes(func)
    n_given = 4 if needs_next_state(func) else 3
    if takes(n_given):
        return
    if may_look_ahead and n_given == 3 and takes(4):
        raise TypeError(
            f"{name} takes four arguments {arguments}, but only state, context and action are "
            "given to a function that does not say that it reads the next state; write "
            "@reads_next_state above it, or reads_next_state = True in its class"
        )
    given = "(state, context, action" + (", next_state)" if n_given == 4 else ")")
    raise TypeError(
        f"{name} takes the arguments {arguments}, but is called with {given}; let it take all of "
        "them, also unused ones"
    )


def _takes(func: Callable[..., Any]) -> tuple[Callable[[int], bool], str]:
    """Return a test for the number of arguments that ``func`` takes, and its arguments as text.

    TensorDictModules take their ``in_keys`` (``@dispatch``), whatever their signature.
    """
    if isinstance(func, TensorDictModuleBase):
        n_keys = len(func.in_keys)
        return lambda n: n == n_keys, f"of its in_keys {func.in_keys}"
    try:
        signature = inspect.signature(func.forward if isinstance(func, nn.Module) else func)
    except (TypeError, ValueError):
        return lambda n: True, "that it does not say"

    def takes(n: int) -> bool:
        try:
            signature.bind(*range(n))
        except TypeError:
            return False
        return True

    return takes, str(signature)


def refuse_next_state(name: str, func: StepFunction | None) -> None:
    """Raise ``ValueError`` if ``func`` reads the next state, for places that have none."""
    if func is not None and needs_next_state(func):
        raise ValueError(
            f"{name} was declared to read the next state, but is called with state, context and "
            "action alone; only rew_func and term_func may read it"
        )
