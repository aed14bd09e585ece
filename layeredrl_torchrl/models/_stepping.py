"""The step of a rollout: made once, called once for each step."""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from layeredrl_torchrl._precision import full_precision
from layeredrl_torchrl.models._output_checks import check_output
from layeredrl_torchrl.models._step import (
    Noise,
    StackedLayers,
    StepParts,
    draw_noise,
    ensemble_step,
    sample_mixture,
)
from layeredrl_torchrl.nets import MemberOutput
from layeredrl_torchrl.specs import action_features

__all__ = ["EnsembleStepper", "MixtureStepper", "Moved", "Stepper"]

# Next state [M, D, R] and term_prob [M, R].
Moved: TypeAlias = tuple[Tensor, Tensor]


class Stepper(ABC):
    """Steps ``R`` rows in each of ``M`` members, laid out in columns.

    Args:
        n_modes: ``K``.
        deterministic: Step to the members' means instead of samples of their mixtures.
    """

    n_at_once = 1  # steps that are best made by one call of several()
    writes = True  # whether `out` saves a copy

    def __init__(self, n_modes: int, *, deterministic: bool) -> None:
        self.n_modes, self.deterministic = n_modes, deterministic

    def draw(self, state: Tensor) -> Noise | None:
        """Draw the random numbers of a step of ``state [M, D, R]``."""
        return None if self.deterministic else draw_noise(state.shape, self.n_modes, state)

    def actions(self, actions: Tensor) -> Tensor:
        """Bring ``actions [..., *]``, in the form of the spec, into that which steps read."""
        return actions

    @abstractmethod
    def __call__(
        self,
        state: Tensor,
        context: Tensor,
        action: Tensor,
        noise: Noise | None,
        out: Moved | None = None,
    ) -> Moved:
        """Step row block ``m`` with member ``m``.

        Args:
            state: ``[M, D, R]``.
            context: ``[1, C, R]`` or ``[M, C, R]``.
            action: From :meth:`actions`, ``[1, A, R]`` or ``[M, A, R]``; integers without ``A``.
            noise: From :meth:`draw`.
            out: Where to write the results; without gradients only.
        """

    def several(
        self, state: Tensor, context: Tensor, actions: Sequence[Tensor], noise: Sequence[Any]
    ) -> list[Moved]:
        """One step after another."""
        moved = []
        for action, drawn in zip(actions, noise, strict=True):
            state, term_prob = self(state, context, action, drawn)
            moved.append((state, term_prob))
        return moved


class MixtureStepper(Stepper):
    """Steps any model, by way of the mixtures that it predicts.

    Args:
        predict_members: As ``Model.predict_members``.
        n_modes, deterministic: As the base class has them.
    """

    def __init__(
        self,
        predict_members: Callable[[Tensor, Tensor, Tensor], MemberOutput],
        n_modes: int,
        *,
        deterministic: bool,
    ) -> None:
        super().__init__(n_modes, deterministic=deterministic)
        self.predict_members = predict_members

    def __call__(
        self,
        state: Tensor,
        context: Tensor,
        action: Tensor,
        noise: Noise | None,
        out: Moved | None = None,
    ) -> Moved:
        """As the base class has it."""
        n_models = len(state)
        context = context.expand(n_models, *context.shape[1:])
        action = action.expand(n_models, *action.shape[1:])
        rows = action.mT if action.ndim == state.ndim else action
        said = self.predict_members(state.mT, context.mT, rows)
        check_output(said, sign=False)
        (mean, std), weights, term_prob = said
        following = sample_mixture(
            mean.permute(0, 2, 3, 1), std.permute(0, 2, 3, 1), weights.mT, noise
        )
        if out is None:
            return following, term_prob
        return out[0].copy_(following), out[1].copy_(term_prob)


class EnsembleStepper(Stepper):
    """Steps an ensemble by :func:`~layeredrl_torchrl.models._step.ensemble_step`.

    Args:
        parts: The ensemble.
        action_spec: The form of its actions.
        options: Of ``torch.compile``; ``None`` runs the function as it is.
        n_at_once: Steps in a call of what is compiled.
        n_modes, deterministic: As the base class has them.
    """

    def __init__(
        self,
        parts: StepParts,
        action_spec: Any,
        n_modes: int,
        *,
        deterministic: bool,
        options: tuple[tuple[str, Any], ...] | None = None,
        n_at_once: int = 1,
    ) -> None:
        super().__init__(n_modes, deterministic=deterministic)
        self.parts, self.action_spec, self.options = parts, action_spec, options
        self.n_at_once = 1 if options is None else n_at_once
        self.writes = options is None
        self.stacked = isinstance(parts.layers, StackedLayers)

    def actions(self, actions: Tensor) -> Tensor:
        """As the base class has it: features for stacked members."""
        if not self.stacked:
            return actions
        return action_features(self.action_spec, actions, self.parts.target[0].dtype)

    def __call__(
        self,
        state: Tensor,
        context: Tensor,
        action: Tensor,
        noise: Noise | None,
        out: Moved | None = None,
    ) -> Moved:
        """As the base class has it."""
        if self.options is not None:
            ((following, term_prob),) = self.several(state, context, [action], [noise])
            if out is None:
                return following, term_prob
            return out[0].copy_(following), out[1].copy_(term_prob)
        if not self.stacked:
            return ensemble_step(self.parts, state, context, action, noise, out)
        with full_precision(state.device):
            return ensemble_step(self.parts, state, context, action, noise, out)

    def several(
        self, state: Tensor, context: Tensor, actions: Sequence[Tensor], noise: Sequence[Any]
    ) -> list[Moved]:
        """As the base class has it; compiled in one call."""
        if self.options is None:
            return super().several(state, context, actions, noise)
        layers = self.parts.layers
        assert isinstance(layers, StackedLayers)
        static = (
            tuple((tuple(w.shape), w.dtype) for w in layers.weights),
            *(repr(layers.activation), layers.n_modes, layers.bounds, self.parts.predict_delta),
            *(len(actions), self.parts.inputs is None or self.parts.inputs.low is None),
            state.shape if dict(self.options).get("dynamic") is False else None,
        )
        run = _compiled(self.options, static)
        # At its first step a rollout repeats one state; other strides would be compiled anew.
        state, context = state.contiguous(), context.contiguous()
        with full_precision(state.device):
            return run(self.parts, state, context, list(actions), list(noise))


def _several(
    parts: StepParts,
    state: Tensor,
    context: Tensor,
    actions: list[Tensor],
    noise: list[Noise | None],
) -> list[Moved]:
    """One :func:`ensemble_step` after another: what is compiled."""
    moved = []
    for action, drawn in zip(actions, noise, strict=True):
        state, term_prob = ensemble_step(parts, state, context, action, drawn)
        moved.append((state, term_prob))
    return moved


@cache
def _compiled(options: tuple[tuple[str, Any], ...], static: tuple[Any, ...]) -> Callable[..., Any]:
    """The compiled function, one for each choice of options and each kind of ensemble.

    Torch counts compilations by code object and falls back to eager beyond a limit; each kind gets
    a code object of its own, and ``fullgraph`` makes the limit an error.
    """
    own = types.FunctionType(
        _several.__code__.replace(), _several.__globals__, _several.__name__, None, None
    )
    return torch.compile(own, **({"fullgraph": True} | dict(options)))
