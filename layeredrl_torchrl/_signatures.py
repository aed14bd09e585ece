"""Signatures for ``help`` and notebooks, where Python sees only ``**options``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["SignatureOfInit", "passes_on"]

F = TypeVar("F", bound=Callable[..., Any])


class SignatureOfInit:
    """Shows the signature of ``__init__`` for a class whose metaclass hides it.

    >>> class Plain:
    ...     __signature__ = SignatureOfInit()
    ...
    ...     def __init__(self, size: int = 3) -> None: ...
    >>> list(inspect.signature(Plain).parameters)
    ['size']
    """

    def __get__(self, instance: object, owner: type[Any]) -> inspect.Signature:
        """Return the signature without ``self``."""
        signature = inspect.signature(owner.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def passes_on(*receivers: Callable[..., Any]) -> Callable[[F], F]:
    """Show the keyword arguments of ``receivers`` in place of a function's ``**options``.

    >>> def draw(x: float, *, width: int = 1) -> None: ...
    >>> @passes_on(draw)
    ... def plot(*, title: str = "", **options: int) -> None: ...
    >>> list(inspect.signature(plot).parameters)
    ['title', 'width']

    Args:
        *receivers: The functions that get the options; for equal names the first counts.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        kinds = inspect.Parameter
        shown = {n: p for n, p in signature.parameters.items() if p.kind != kinds.VAR_KEYWORD}
        for receiver in receivers:
            for name, parameter in inspect.signature(receiver).parameters.items():
                if parameter.kind == kinds.KEYWORD_ONLY:
                    shown.setdefault(name, parameter)
        replaced = signature.replace(parameters=list(shown.values()))
        function.__signature__ = replaced  # type: ignore[attr-defined]
        return function

    return decorate
