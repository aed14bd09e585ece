"""Soft actor-critic with TorchRL's SACLoss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.modules import TanhNormal
from torchrl.objectives import SACLoss

from layeredrl_torchrl._checks import check_number, check_positive_int, check_sizes
from layeredrl_torchrl._precision import KeepsFloats
from layeredrl_torchrl.levels._mlp import FlatMLP, layers, mlp
from layeredrl_torchrl.levels._unit_actions import finite_bounds, from_unit, to_unit
from layeredrl_torchrl.levels.learners import Learner
from layeredrl_torchrl.predictors._learning_rates import LearningRate
from layeredrl_torchrl.specs import width

__all__ = ["SACLearner"]

# Bounds of log(std), as in the reference implementation of SAC.
_LOG_STD = (-20.0, 2.0)


class SACLearner(KeepsFloats, Learner):
    """Soft actor-critic (arXiv 1812.05905) for bounded actions, with TorchRL's ``SACLoss``.

    The policy is a squashed Gaussian over actions scaled from their bounds to ``[-1, 1]``, so the
    target entropy does not depend on the units of the action.

    >>> learner = SACLearner(3, Bounded(-2.0, 2.0, (1,)), hidden_sizes=(32,))
    >>> learner.high
    tensor([2.])

    Args:
        n_features: ``F``.
        action_spec: A ``Bounded`` spec with finite bounds.
        hidden_sizes: Width of each hidden layer, of policy and critics.
        gamma: Discount over one action of the level.
        lr: Learning rate of policy, critics and temperature; see :class:`Learner`.
        tau: Step of the target critics towards the critics at each update.
        n_critics: Number of critics; the minimum of their values is used.
        alpha_init: Initial temperature, the reward for one nat of entropy.
        target_entropy: Entropy that the temperature is adapted to; minus the number of action
            dimensions by default.

    Raises:
        TypeError: Another kind of action spec. ValueError: Bounds that are not finite; numbers
            outside their range.
    """

    loss: SACLoss
    low: Tensor  # [A]
    high: Tensor  # [A]

    def __init__(
        self,
        n_features: int,
        action_spec: TensorSpec,
        *,
        hidden_sizes: Sequence[int] = (128, 128),
        gamma: float = 0.99,
        lr: LearningRate = 3e-4,
        tau: float = 0.005,
        n_critics: int = 2,
        alpha_init: float = 1.0,
        target_entropy: float | None = None,
    ) -> None:
        low, high = finite_bounds("SAC", action_spec, hint="for choices pass DQNLearner")
        hidden_sizes = check_sizes("hidden_sizes", hidden_sizes)
        check_number("alpha_init", alpha_init, 0.0, open_low=True)
        if target_entropy is not None:
            check_number("target_entropy", target_entropy)
        check_positive_int("n_critics", n_critics)
        n = width(action_spec)
        actor = ProbabilisticTensorDictSequential(
            _Gaussian(["features"], ["loc", "scale"], (n_features, *hidden_sizes, 2 * n)),
            ProbabilisticTensorDictModule(
                in_keys=["loc", "scale"],
                out_keys=["action"],
                distribution_class=TanhNormal,
                return_log_prob=True,
            ),
        )
        critics = [
            FlatMLP(
                ["features", "action"],
                ["state_action_value"],
                (n_features + n, *hidden_sizes, 1),
            )
            for _ in range(n_critics)
        ]
        loss = _Loss(
            actor,
            # TorchRL's losses register no parameters for a list of one: it would never be trained.
            critics if n_critics > 1 else critics[0],
            num_qvalue_nets=n_critics,
            loss_function="l2",
            alpha_init=alpha_init,
            target_entropy=float(-n if target_entropy is None else target_entropy),
        )
        # TorchRL creates this buffer when it is first read; it must exist to be found as an option.
        loss.target_entropy  # noqa: B018
        super().__init__(loss, gamma=gamma, lr=lr, tau=tau)
        # Not in the state dict, since they follow from the arguments.
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.action_spec = action_spec

    def act(self, features: Tensor, *, explore: bool) -> Tensor:
        """Sample from the policy, or take its median."""
        loc, scale = _split(mlp(features, layers(self.loss.actor_network_params["module", "0"])))
        if explore:
            loc = loc + scale * torch.randn_like(loc)
        return from_unit(loc.tanh(), self.low, self.high).to(self.action_spec.dtype)

    def prepare(self, action: Tensor) -> Tensor:
        """Scale to ``[-1, 1]``."""
        return to_unit(action, self.low, self.high)


class _Gaussian(FlatMLP):
    """Writes mean and standard deviation of the actions before squashing."""

    def write(self, tensordict: TensorDictBase, out: Tensor) -> None:
        for key, value in zip(self.out_keys, _split(out), strict=True):
            tensordict.set(key, value)


def _split(out: Tensor) -> tuple[Tensor, Tensor]:
    loc, log_std = out.chunk(2, -1)
    return loc, log_std.clamp(*_LOG_STD).exp()


class _Loss(SACLoss):
    """``SACLoss`` that evaluates all critics at once, and can be copied and pickled.

    TorchRL's version runs the critics with ``vmap`` in a closure, which takes a third of an
    update's time here and cannot be pickled. The results are the same.
    """

    def _make_vmap(self) -> None:
        self._vmap_qnetworkN0 = partial(_critics, self.qvalue_network.in_keys)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out cached views of the parameters, since a copy has other parameters."""
        return {name: value for name, value in self.__dict__.items() if name != "_cache"}


def _critics(in_keys: Sequence[str], batch: TensorDictBase, params: TensorDictBase) -> TensorDict:
    """Evaluate all critics: ``"state_action_value" [n_critics, N, 1]`` of ``batch [N]``."""
    x = torch.cat([batch.get(key) for key in in_keys], -1)
    values = mlp(x, layers(params))
    return TensorDict({"state_action_value": values}, values.shape[:2])
