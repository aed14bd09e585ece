"""Compile a function independently of earlier compilations."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["compile_apart"]


def compile_apart(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a compiled copy of ``function``, a plain function without a closure.

    Torch counts compilations by code object and falls back to eager beyond a limit. The copy has
    its own code object, and ``fullgraph`` makes the limit an error.

    Args:
        function: The function.
        options: Options of ``torch.compile``.
    """
    code, scope = function.__code__.replace(), function.__globals__
    own = types.FunctionType(code, scope, function.__name__)
    compiled: Callable[..., Any] = torch.compile(own, **({"fullgraph": True} | dict(options)))
    return compiled
