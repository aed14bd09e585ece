"""Conditions that end imagined episodes where the model has left its data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Composite, TensorSpec
from torchrl.envs import Transform

from layeredrl_torchrl._checks import (
    check_callable,
    check_instance,
    check_number,
    check_per_item,
    require,
)
from layeredrl_torchrl.models import EnsembleDisagreement, ProbabilisticEnsemble

__all__ = ["Disagrees", "OutOfRange", "TruncateWhere"]


class OutOfRange:
    """Whether a step leads far from all states that the model has seen.

    >>> model = ProbabilisticEnsemble(Unbounded((2,)), None, Bounded(-1.0, 1.0, (1,)))
    >>> far = OutOfRange(model, limit=20.0)
    >>> far(torch.zeros(3, 2), torch.zeros(3, 0), torch.zeros(3, 1), torch.full((3, 2), 30.0))
    tensor([True, True, True])

    Args:
        model: A trained ensemble, with statistics of its inputs.
        limit: Allowed distance of a state dimension from its mean, in standard deviations of the
            data.

    Raises:
        TypeError, ValueError: A model of another kind, or that does not normalise its inputs; a
            limit that is not positive.
    """

    def __init__(self, model: ProbabilisticEnsemble, limit: float = 20.0) -> None:
        check_instance("model", model, ProbabilisticEnsemble, hint="pass predictor.model")
        if not model.scaling.normalize_inputs:
            raise ValueError(
                "a model with normalize_inputs=False has no statistics of its states; build it "
                "without that, or pass a function of your own"
            )
        self.model = model
        self.limit = check_number("limit", limit, 0.0, open_low=True)

    def __call__(
        self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
    ) -> Tensor:
        """Answer for each of ``[*B]``."""
        inputs = self.model.scaling.state
        distance = (next_state - inputs.loc) / inputs.scale
        return (distance.abs() > self.limit).any(-1)


class Disagrees:
    """Whether the members of the model differ about a step by more than a limit.

    Args:
        model: The ensemble.
        limit: Allowed disagreement, in the units of
            :class:`~layeredrl_torchrl.EnsembleDisagreement`.

    Raises:
        TypeError, ValueError: As :class:`~layeredrl_torchrl.EnsembleDisagreement`; a limit that is
            not positive.
    """

    def __init__(self, model: ProbabilisticEnsemble, limit: float) -> None:
        self.disagreement = EnsembleDisagreement(model)
        self.limit = check_number("limit", limit, 0.0, open_low=True)

    def __call__(
        self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
    ) -> Tensor:
        """Answer for each of ``[*B]``."""
        return self.disagreement(state, context, action) > self.limit


class TruncateWhere(Transform):
    """Truncates imagined episodes where a condition holds; the last state keeps its value.

    >>> model = ProbabilisticEnsemble(Unbounded((2,)), None, Bounded(-1.0, 1.0, (1,)))
    >>> cost = lambda state, context, action: -state.square().sum(-1)
    >>> predictor = StaticPredictor(model, None, cost, IdentityEncoder((2,)), 2)
    >>> starts = lambda n: TensorDict({"state": torch.ones(n, 2), "context": torch.ones(n, 0)}, [n])
    >>> env = PredictorEnv(predictor, batch_size=[8], initial_states=starts)
    >>> env = env.append_transform(TruncateWhere(OutOfRange(model, limit=1e-3)))
    >>> env.rollout(5, break_when_any_done=False)["next", "truncated"].any()
    tensor(True)

    Args:
        condition: ``(state, context, action, next_state) -> [*B]`` bool, for example
            :class:`OutOfRange` or :class:`Disagrees`.
        in_keys: Keys of state, context and action; a missing context counts as empty.

    Raises:
        TypeError: A condition that cannot be called. When called, TypeError or ValueError for
            results that are not bools or have another shape; KeyError for a step without state or
            action.
    """

    def __init__(
        self,
        condition: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        *,
        in_keys: tuple[NestedKey, NestedKey, NestedKey] = ("state", "context", "action"),
    ) -> None:
        check_callable("condition", condition)
        super().__init__()
        self.condition, self.step_keys = condition, in_keys

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        state_key, context_key, action_key = self.step_keys

        def read(key: NestedKey) -> Tensor:
            hint = "name state, context and action by in_keys="
            return require(tensordict, key, reader="TruncateWhere", hint=hint)

        state, action = read(state_key), read(action_key)
        context = tensordict.get(context_key, None)
        if context is None:  # an empty context may be missing
            context = state[..., :0]
        leaves = self.condition(state, context, action, next_tensordict.get(state_key))
        check_per_item("condition", leaves, state.shape[:-1])
        if leaves.dtype != torch.bool:
            raise TypeError(f"condition gave {leaves.dtype}, expected bool: compare with a limit")
        leaves = leaves.unsqueeze(-1)
        # An earlier transform, such as a StepCounter, may have truncated as well.
        before = next_tensordict.get("truncated", None)
        truncated = leaves & ~next_tensordict.get("terminated")
        next_tensordict.set("truncated", truncated if before is None else before | truncated)
        return next_tensordict.set("done", next_tensordict.get("done") | leaves)

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        done = tensordict_reset.get("done", None)
        if done is None:
            return tensordict_reset
        return tensordict_reset.set("truncated", torch.zeros_like(done))

    def transform_done_spec(self, done_spec: TensorSpec) -> TensorSpec:
        """Add ``"truncated"``."""
        assert isinstance(done_spec, Composite)
        kind = done_spec["done"]
        done_spec["truncated"] = Binary(1, kind.shape, dtype=torch.bool, device=kind.device)
        return done_spec
