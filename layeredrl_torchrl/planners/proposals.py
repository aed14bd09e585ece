"""Proposals: action sequences that a planner tries in addition to its own samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import ExplorationType, set_exploration_type

from layeredrl_torchrl._checks import check_instance, check_positive_int
from layeredrl_torchrl.imagination._members import step_by_mean
from layeredrl_torchrl.predictors import Predictor
from layeredrl_torchrl.specs import is_discrete

__all__ = ["PolicyProposal", "Proposal"]

Proposal: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""``(state [*B, D], context [*B, C], horizon H) -> action sequences [*B, any, H, A]``."""


class PolicyProposal:
    """Proposes the actions of a policy, imagined along the predictor's mean.

    With :func:`~layeredrl_torchrl.best_plan`, a planner that tries them plans at least as well as
    the policy, as judged by its predictor (TD-MPC, arXiv 2203.04955, section 3.1, "policy-guided
    trajectory optimization").

    >>> from tensordict.nn import TensorDictModule
    >>> factory = PredictorFactory(hidden_sizes=(8,), n_models=2)
    >>> predictor = factory(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))
    >>> policy = TensorDictModule(lambda state: state[..., :1].tanh(), ["state"], ["action"])
    >>> PolicyProposal(predictor, policy, n=2)(torch.zeros(7, 3), torch.zeros(7, 0), 5).shape
    torch.Size([7, 2, 5, 1])

    Args:
        predictor: Imagines the outcome of actions.
        policy: Reads state and context and writes the action, with the predictor's keys. A planner
            neither saves it nor moves it to a device.
        n: Sequences for each start: one with deterministic actions (TorchRL's ``DETERMINISTIC``),
            and ``n - 1`` with sampled actions (``RANDOM``).

    Raises:
        TypeError: A predictor or policy of another kind, an ``n`` that is no integer. ValueError:
            ``n`` below 1; a policy that reads other keys, or writes no action; when called, actions
            of another shape.
    """

    def __init__(self, predictor: Predictor, policy: TensorDictModuleBase, n: int = 8) -> None:
        check_instance("predictor", predictor, Predictor, hint="the one that is planned in")
        if not isinstance(policy, TensorDictModuleBase):
            raise TypeError(
                f"policy must be a TensorDictModule, got {type(policy).__name__}; wrap it: "
                'TensorDictModule(policy, ["state", "context"], ["action"])'
            )
        state, context, action = predictor.model.in_keys
        unknown = [key for key in policy.in_keys if key not in (state, context)]
        if unknown or action not in policy.out_keys:
            raise ValueError(
                f"the policy reads {list(policy.in_keys)} and writes {list(policy.out_keys)}; "
                f"here it can read {state!r} and {context!r}, and must write {action!r}: leave its "
                "encoder out, or rename its keys"
            )
        self.policy = policy
        self.n = check_positive_int("n", n)
        self._predictor = predictor

    @torch.no_grad()
    def __call__(self, state: Tensor, context: Tensor, horizon: int) -> Tensor:
        """Return action sequences ``[*B, n, H, A]``, the deterministic one first."""
        parts = [self._play(state, context, 1, horizon, ExplorationType.DETERMINISTIC)]
        if self.n > 1:
            parts.append(self._play(state, context, self.n - 1, horizon, ExplorationType.RANDOM))
        return torch.cat(parts, state.ndim - 1)

    def _play(
        self, state: Tensor, context: Tensor, n: int, horizon: int, how: ExplorationType
    ) -> Tensor:
        """Play ``n`` episodes from each start, ``[*B, n, H, A]``."""
        model = self._predictor.model
        state_key, context_key, action_key = model.in_keys
        spec = model.action_spec
        shape = (*state.shape[:-1], n)
        state, context = (x.unsqueeze(-2).expand(*shape, x.shape[-1]) for x in (state, context))
        actions: list[Tensor] = []
        # Not env.rollout, whose resets wait for the device to check what is done.
        with set_exploration_type(how):
            for h in range(horizon):
                if h:
                    state, _ = step_by_mean(model, state, context, actions[-1])
                td = TensorDict({state_key: state, context_key: context}, shape)
                action = self.policy(td).get(action_key)
                if not is_discrete(spec) and action.shape != (*shape, *spec.shape):
                    raise ValueError(
                        f"the policy wrote {action_key!r} of shape {tuple(action.shape)}, expected "
                        f"{(*shape, *spec.shape)}, one action of {spec} for each state"
                    )
                # Project to the bounds now; a search would do so only later.
                actions.append(model.action_form.project(action))
        return torch.stack(actions, len(shape))
