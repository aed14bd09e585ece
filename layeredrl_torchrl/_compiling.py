"""Compile a function apart from all that was compiled of it before."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["compile_apart"]


def compile_apart(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a compiled copy of ``function``, a plain one without a closure.

    Torch counts compilations by code object and falls back to eager beyond a limit; the copy gets
    a code object of its own, and ``fullgraph`` makes the limit an error.

    Args:
        function: The function.
        options: Of ``torch.compile``.
    """
    code, scope = function.__code__.replace(), function.__globals__
    own = types.FunctionType(code, scope, function.__name__)
    compiled: Callable[..., Any] = torch.compile(own, **({"fullgraph": True} | dict(options)))
    return compiled
