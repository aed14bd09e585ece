"""Steppers: made once for a rollout, called once for each step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

from torch import Tensor

from layeredrl_torchrl._compiling import compile_apart
from layeredrl_torchrl._precision import full_precision
from layeredrl_torchrl.models._output_checks import check_output
from layeredrl_torchrl.models._step import (
    Noise,
    StackedLayers,
    StepInputs,
    StepParts,
    draw_noise,
    ensemble_step,
    sample_mixture,
)
from layeredrl_torchrl.nets import MemberOutput
from layeredrl_torchrl.specs import action_features

__all__ = ["CompileOptions", "EnsembleStepper", "MixtureStepper", "Moved", "Stepper"]

# Next state [M, D, R] and term_prob [M, R].
Moved: TypeAlias = tuple[Tensor, Tensor]


class CompileOptions(dict[str, Any]):
    """Options of ``torch.compile`` that can be the key of a cache, nested ones included."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))


class Stepper(ABC):
    """Steps ``R`` rows in each of ``M`` members, laid out in columns.

    Args:
        n_modes: ``K``.
        deterministic: Step to the members' means instead of samples of their mixtures.
    """

    n_at_once = 1  # how many steps one call of several() should make
    writes = True  # whether results are computed in `out`, without a copy

    def __init__(self, n_modes: int, *, deterministic: bool) -> None:
        self.n_modes, self.deterministic = n_modes, deterministic

    def draw(self, state: Tensor) -> Noise | None:
        """Draw the random numbers of a step of ``state [M, D, R]``."""
        return None if self.deterministic else draw_noise(state.shape, self.n_modes, state)

    def actions(self, actions: Tensor) -> Tensor:
        """Turn ``actions [..., *]`` in the form of the spec into the form that steps read."""
        return actions

    @abstractmethod
    def __call__(self, inputs: StepInputs, out: Moved | None = None) -> Moved:
        """Step row block ``m`` with member ``m``.

        Args:
            inputs: Actions are from :meth:`actions`, the noise from :meth:`draw`.
            out: Where to write the results; only without gradients.
        """

    def several(
        self, state: Tensor, context: Tensor, actions: Sequence[Tensor], noise: Sequence[Any]
    ) -> list[Moved]:
        """Make several steps, each from the state where the previous one ended."""
        return _several(self, state, context, actions, noise)


class MixtureStepper(Stepper):
    """Steps any model by sampling the mixtures that it predicts.

    Args:
        predict_members: The model's ``predict_members``.
        n_modes, deterministic: See the base class.
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

    def __call__(self, inputs: StepInputs, out: Moved | None = None) -> Moved:
        """See the base class."""
        state, context, action, noise = inputs
        n_models = len(state)
        context = context.expand(n_models, *context.shape[1:])
        action = action.expand(n_models, *action.shape[1:])
        rows = action.mT if action.ndim == state.ndim else action
        predicted = self.predict_members(state.mT, context.mT, rows)
        n_models, dim, n = state.shape
        check_output(predicted, (n_models, n, self.n_modes, dim), sign=False)
        (mean, std), weights, term_prob = predicted
        following = sample_mixture(
            mean.permute(0, 2, 3, 1), std.permute(0, 2, 3, 1), weights.mT, noise
        )
        return _write((following, term_prob), out)


class EnsembleStepper(Stepper):
    """Steps an ensemble by :func:`~layeredrl_torchrl.models._step.ensemble_step`.

    Args:
        parts: The ensemble.
        action_spec: The form of its actions.
        options: Of ``torch.compile``; ``None`` runs the function as it is.
        n_at_once: Steps in one call of the compiled function.
        n_modes, deterministic: See the base class.
    """

    def __init__(
        self,
        parts: StepParts,
        action_spec: Any,
        n_modes: int,
        *,
        deterministic: bool,
        options: CompileOptions | None = None,
        n_at_once: int = 1,
    ) -> None:
        super().__init__(n_modes, deterministic=deterministic)
        self.parts, self.action_spec, self.options = parts, action_spec, options
        self.n_at_once = 1 if options is None else n_at_once
        self.writes = options is None
        self.stacked = isinstance(parts.layers, StackedLayers)

    def actions(self, actions: Tensor) -> Tensor:
        """See the base class; stacked members read features."""
        if not self.stacked:
            return actions
        return action_features(self.action_spec, actions, self.parts.target[0].dtype)

    def __call__(self, inputs: StepInputs, out: Moved | None = None) -> Moved:
        """See the base class."""
        if self.options is not None:
            state, context, action, noise = inputs
            (moved,) = self.several(state, context, [action], [noise])
            return _write(moved, out)
        if not self.stacked:
            return ensemble_step(self.parts, inputs, out)
        with full_precision(inputs.state.device):
            return ensemble_step(self.parts, inputs, out)

    def several(
        self, state: Tensor, context: Tensor, actions: Sequence[Tensor], noise: Sequence[Any]
    ) -> list[Moved]:
        """See the base class; when compiled, one call makes all steps."""
        if self.options is None:
            return super().several(state, context, actions, noise)
        layers = self.parts.layers
        assert isinstance(layers, StackedLayers)
        static = (
            tuple((tuple(w.shape), w.dtype) for w in layers.weights),
            *(repr(layers.activation), layers.n_modes, layers.bounds, self.parts.predict_delta),
            *(len(actions), self.parts.inputs is None or self.parts.inputs.low is None),
            state.shape if self.options.get("dynamic") is False else None,
        )
        run = _compiled(self.options, static)
        # The first step of a rollout expands one state; its strides would trigger recompilation.
        state, context = state.contiguous(), context.contiguous()
        with full_precision(state.device):
            return run(self.parts, state, context, list(actions), list(noise))


def _write(moved: Moved, out: Moved | None) -> Moved:
    """Copy results to ``out`` if it is given."""
    if out is None:
        return moved
    return out[0].copy_(moved[0]), out[1].copy_(moved[1])


def _several(
    step: Callable[[StepInputs], Moved],
    state: Tensor,
    context: Tensor,
    actions: Sequence[Tensor],
    noise: Sequence[Noise | None],
) -> list[Moved]:
    """Make one ``step`` after another."""
    moved = []
    for action, drawn in zip(actions, noise, strict=True):
        state, term_prob = step(StepInputs(state, context, action, drawn))
        moved.append((state, term_prob))
    return moved


def _several_of_ensemble(
    parts: StepParts,
    state: Tensor,
    context: Tensor,
    actions: list[Tensor],
    noise: list[Noise | None],
) -> list[Moved]:
    """Make one :func:`ensemble_step` after another; :func:`_compiled` compiles this function."""
    return _several(lambda inputs: ensemble_step(parts, inputs), state, context, actions, noise)


@cache
def _compiled(options: CompileOptions, static: tuple[Any, ...]) -> Callable[..., Any]:
    """Return the compiled function for these options and this kind of ensemble."""
    return compile_apart(_several_of_ensemble, options)
