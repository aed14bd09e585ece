"""A policy's imagined steps, with all gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor, nn
from torchrl.modules.distributions.utils import rsample_and_log_prob
from torchrl.objectives.utils import hold_out_net

from layeredrl_torchrl._compiling import compile_apart
from layeredrl_torchrl._watch import refuse
from layeredrl_torchrl.imagination._members import step_by_any
from layeredrl_torchrl.predictors import Predictor

__all__ = ["FollowedPolicy", "compile_following", "follow"]

Steps = Callable[..., tuple[Tensor, ...]]
# What is compiled belongs to one object: copies and pickles of it compile for themselves.
_COMPILED: WeakKeyDictionary[nn.Module, tuple[Mapping[str, Any], Steps]] = WeakKeyDictionary()


class FollowedPolicy(NamedTuple):
    """Actions and rewards of a policy in ``H`` imagined steps from ``B`` starts."""

    reward: Tensor  # [H, B]
    log_prob: Tensor  # [H + 1, B], of the actions
    share: Tensor  # [H + 1, B], discounted survival, the weight of what follows
    action: Tensor  # [B, A], the first
    last: TensorDict  # [B], state, context and action after H steps


def follow(
    predictor: Predictor,
    actor: ProbabilisticTensorDictSequential,
    start: tuple[Tensor, Tensor],
    horizon: int,
    gamma: Tensor,
    steps: Steps | None = None,
) -> FollowedPolicy:
    """Follow a policy through a predictor, whose parameters get no gradient.

    Each step of each row is sampled from one newly drawn member (TS-1).

    Args:
        predictor: The predictor to imagine with.
        actor: The policy, with reparameterised actions.
        start: State ``[B, D]`` and context ``[B, C]``.
        horizon: ``H``, may be 0.
        gamma: Discount, a scalar.
        steps: From :func:`compile_following`, to make all steps by one compiled function.
    """
    run = _steps if steps is None else steps
    with _HeldOut(predictor):
        found = run(predictor, actor, *start, horizon, gamma)
    reward, log_prob, share, first, state, action = found
    if steps is not None:  # compiled code leaves out the check of each step
        bad = ~(reward.isfinite().all() & log_prob.isfinite().all() & share.isfinite().all())
        refuse(bad, _not_finite)
    keys = predictor.model.in_keys
    last = TensorDict(dict(zip(keys, (state, start[1], action), strict=True)), [len(state)])
    return FollowedPolicy(reward, log_prob, share, first, last)


class _HeldOut(hold_out_net):
    """Keeps gradients from parameters, and leaves each trainable or frozen as it was.

    TorchRL's version checks only the first parameter, and makes all trainable at the end.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.mode = True  # for traced code, which gets other tensors meanwhile

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            super().__enter__()
            return
        self._trainable = [p for p in self.network.parameters() if p.requires_grad]
        for parameter in self._trainable:
            parameter.requires_grad_(False)

    def __exit__(self, *error: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            super().__exit__(*error)
            return
        for parameter in self._trainable:
            parameter.requires_grad_(True)


def _steps(
    predictor: Predictor,
    actor: ProbabilisticTensorDictSequential,
    state: Tensor,
    context: Tensor,
    horizon: int,
    gamma: Tensor,
) -> tuple[Tensor, ...]:
    """Return all but the last field of :class:`FollowedPolicy`, then the last state and action."""
    state_key, context_key, _ = predictor.model.in_keys
    n = len(state)

    def act(state: Tensor) -> tuple[Tensor, Tensor]:
        seen = TensorDict({state_key: state, context_key: context}, [n])
        action, log_prob = rsample_and_log_prob(actor.get_dist(seen))
        return action, log_prob

    action, log_prob = act(state)
    first, log_probs = action, [log_prob]
    rewards, shares = [], [state.new_ones(n)]
    for _ in range(horizon):
        taken = state, context, action
        following, term_prob = step_by_any(predictor.model, *taken)
        rewards.append(predictor.reward_of(*taken, following))
        term_prob = predictor.term_prob_of(*taken, following, term_prob)
        shares.append(shares[-1] * gamma * (1.0 - term_prob))
        state = following
        action, log_prob = act(state)
        log_probs.append(log_prob)
    reward = torch.stack(rewards) if rewards else state.new_zeros(0, n)
    return reward, torch.stack(log_probs), torch.stack(shares), first, state, action


def compile_following(owner: nn.Module, options: Mapping[str, Any] | None) -> Steps | None:
    """Return the steps of ``owner``, compiled once by these options; ``None`` without any."""
    if options is None:
        return None
    known = _COMPILED.get(owner)
    if known is None or known[0] is not options:
        known = _COMPILED[owner] = (options, compile_apart(_steps, options))
    return known[1]


def _not_finite(_: Tensor) -> ValueError:
    return ValueError(
        "imagined rewards, terminations or log-probabilities are not finite; without compile() the "
        "error names the part: shorten the horizon, or train the model on data like these starts"
    )
