"""Checks of the policy and the critics given to a soft actor-critic loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torchrl.data import Bounded, Composite, TensorSpec
from torchrl.modules.distributions.utils import rsample_and_log_prob

__all__ = ["check_bounds", "check_keys", "check_networks"]


def check_keys(actor: Any, qvalue: Any, step_keys: Sequence[NestedKey]) -> None:
    """Refuse networks of another kind, or with entries that steps do not have."""
    state, context, action = step_keys
    for name, module, allowed in (
        ("actor_network", actor, {state, context}),
        ("qvalue_network", qvalue, {state, context, action}),
    ):
        kinds = (TensorDictModule, ProbabilisticTensorDictSequential)
        if not isinstance(module, kinds):
            raise TypeError(
                f"{name} must be a TensorDictModule as TorchRL's losses take, got "
                f"{type(module).__name__}"
            )
        unknown = [key for key in module.in_keys if key not in allowed]
        if unknown:
            raise ValueError(
                f"{name} reads {unknown}, but imagined steps have {sorted(map(str, allowed))}; "
                "build it with in_keys= of the predictor's state and context"
            )
    if action not in actor.out_keys:
        raise ValueError(
            f"actor_network writes {actor.out_keys}, but the predictor's actions are {action!r}"
        )


def check_bounds(actor: Any, key: NestedKey, space: TensorSpec) -> None:
    """Raise ``ValueError`` if the spec of the policy's actions exceeds ``space``."""
    known = getattr(actor, "spec", None)
    own = known.get(key, None) if isinstance(known, Composite) else known
    if not isinstance(own, Bounded) or not isinstance(space, Bounded) or own.shape != space.shape:
        return
    for own_end, end, sign in (
        (own.space.low, space.space.low, -1.0),
        (own.space.high, space.space.high, 1.0),
    ):
        beyond = sign * (own_end.to(end) - end)
        if bool((beyond > 1e-5 * end.abs().clamp_min(1.0)).any()):
            raise ValueError(
                f"actor_network acts in {own.space.low.tolist()} to {own.space.high.tolist()}, but "
                f"the predictor's actions are {space.space.low.tolist()} to "
                f"{space.space.high.tolist()}; build it for the predictor's action space"
            )


def check_networks(
    actor: Any, qvalue: Any, step_keys: Sequence[NestedKey], widths: Sequence[int]
) -> None:
    """Try both networks on states of zeros; raise ``ValueError`` if they do not fit.

    This changes neither their statistics and modes nor the random numbers.

    Args:
        actor: The policy.
        qvalue: The critic.
        step_keys: Of state, context and action.
        widths: Dimensions of state, context and action.
    """
    like = next(actor.parameters(), None)
    if like is None:
        raise ValueError(
            "actor_network has no parameters, so there is nothing to learn; make what it learns "
            "an nn.Parameter, or parts of an nn.Module"
        )
    state, context, action = (
        TensorDict({key: like.new_zeros(3, width)}, [3])
        for key, width in zip(step_keys, widths, strict=True)
    )
    modes = [(part, part.training) for network in (actor, qvalue) for part in network.modules()]
    with torch.no_grad(), torch.random.fork_rng([like.device] if like.is_cuda else []):
        try:
            _check_policy(actor.eval(), state.update(context), widths[2])
            _check_values(qvalue.eval(), state.update(action))
        finally:
            for part, mode in modes:
                part.training = mode


def _check_policy(actor: Any, starts: TensorDict, n_actions: int) -> None:
    n = len(starts)
    try:
        action, log_prob = rsample_and_log_prob(actor.get_dist(starts.clone()))
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"actor_network cannot act at {_shapes(starts)}: {error}; build it for the predictor's "
            "latent_state_dim and context_dim, with reparameterised actions (TanhNormal)"
        ) from error
    if tuple(action.shape) != (n, n_actions) or tuple(log_prob.shape) != (n,):
        raise ValueError(
            f"actor_network gives actions {tuple(action.shape)} and log-probabilities "
            f"{tuple(log_prob.shape)} for {n} states, expected {(n, n_actions)} and {(n,)}: one "
            "number for each whole action (TanhNormal, IndependentNormal)"
        )
    if bool(log_prob.isinf().any()):
        raise ValueError(
            "actor_network gives infinite log-probabilities, as a deterministic policy does; give "
            "it a distribution with a density (TanhNormal)"
        )


def _check_values(qvalue: Any, steps: TensorDict) -> None:
    n = len(steps)
    try:
        values = qvalue(steps.clone()).get("state_action_value", None)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"qvalue_network cannot evaluate {_shapes(steps)}: {error}; build it for the "
            "predictor's latent_state_dim and context_dim, and its actions"
        ) from error
    # set_keys may still name another key; it is checked when called.
    if values is not None and tuple(values.shape) not in ((n, 1), (n,)):
        raise ValueError(
            f"qvalue_network gives values {tuple(values.shape)} for {n} steps, expected {(n, 1)}: "
            "one for each state and action"
        )


def _shapes(steps: TensorDict) -> str:
    return ", ".join(f"{key!r} {list(value.shape)}" for key, value in steps.items(True, True))
