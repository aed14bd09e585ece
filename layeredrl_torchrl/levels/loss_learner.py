"""Any off-policy loss of TorchRL as the learner of a level."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor, nn
from torchrl.data import OneHot, TensorSpec
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import LossModule

from layeredrl_torchrl._checks import check_instance, check_number
from layeredrl_torchrl._precision import KeepsFloats
from layeredrl_torchrl.levels._random_actions import RandomActions
from layeredrl_torchrl.levels._unit_actions import finite_bounds, from_unit, to_unit
from layeredrl_torchrl.levels.learners import Learner, has_targets
from layeredrl_torchrl.predictors._learning_rates import LearningRate
from layeredrl_torchrl.specs import is_discrete, width

__all__ = ["LossLearner"]

_NETWORKS = ("actor_network", "value_network")
_READ = {"features", "action"}
# Value estimators that mark on-policy losses.
_ON_POLICY = {"GAE", "MAGAE", "VTrace"}


class LossLearner(KeepsFloats, Learner):
    """Any off-policy loss of TorchRL that contains its policy: TD3, REDQ, CrossQ, TQC and others.

    Build the loss in a function of the number of features and the action spec, and pass this
    function as ``learner_factory`` to a :class:`~layeredrl_torchrl.ModelFreeLevel`. Its networks
    read ``"features"``, and continuous actions in ``[-1, 1]``; this class scales actions from and
    to their bounds.

    While exploring, a policy that is a distribution is sampled; otherwise TorchRL's deterministic
    action is taken. Networks are in training mode while the loss is evaluated, and in evaluation
    mode while they act, so that batch normalisation and dropout work as intended.

    >>> from tensordict.nn import TensorDictModule
    >>> from torchrl.modules import MLP, ValueOperator
    >>> from torchrl.objectives import DDPGLoss
    >>> def ddpg(n_features, action_spec):
    ...     net = torch.nn.Sequential(MLP(n_features, 1, num_cells=[8]), torch.nn.Tanh())
    ...     actor = TensorDictModule(net, ["features"], ["action"])
    ...     critic = ValueOperator(MLP(n_features + 1, 1, num_cells=[8]), ["features", "action"])
    ...     return LossLearner(DDPGLoss(actor, critic), action_spec, lr=1e-3)
    >>> ddpg(3, Bounded(-5.0, 5.0, (1,))).act(torch.zeros(7, 3), explore=False).shape
    torch.Size([7, 1])

    Args:
        loss: A TorchRL loss, reduced to scalars.
        action_spec: The level's actions: a ``Bounded`` spec with finite bounds, or a discrete spec.
        policy: Name of the loss's policy; by default ``"actor_network"``, or ``"value_network"``
            without one.
        exploration: Exploration added to the policy: the standard deviation of Gaussian noise, in
            units of half the range, or for discrete actions the share of random ones. By default 0
            for policies that are distributions, otherwise 0.1.
        gamma: Discount over one action of the level.
        lr: See :class:`Learner`.
        tau: See :class:`Learner`; 0.005 by default if the loss has target networks.
        actor_every: See :class:`Learner`.
        targets_every: See :class:`Learner`.
        optim_factory: See :class:`Learner`.

    Raises:
        TypeError: Not a TorchRL loss, or another kind of action spec. ValueError: An on-policy loss
            (PPO, A2C, REINFORCE); a loss without such a policy, with networks that read other
            entries, without reduction, or without a known target entropy; numbers outside their
            range. Also as :class:`Learner`.
    """

    low: Tensor  # [A], not for discrete actions
    high: Tensor  # [A]

    def __init__(
        self,
        loss: LossModule,
        action_spec: TensorSpec,
        *,
        policy: str | None = None,
        exploration: float | None = None,
        gamma: float = 0.99,
        lr: LearningRate = 3e-4,
        tau: float | None = None,
        actor_every: int = 1,
        targets_every: int = 1,
        optim_factory: Callable[..., torch.optim.Optimizer] | None = None,
    ) -> None:
        hint = "build one of torchrl.objectives, such as TD3Loss"
        check_instance("loss", loss, LossModule, hint=hint)
        _refuse_on_policy(loss)
        policy = _policy_name(loss, policy)
        _check_networks(loss)
        choices = is_discrete(action_spec)
        hint = "bound the actions in the environment"
        bounds = None if choices else finite_bounds("LossLearner", action_spec, hint=hint)
        _know_target_entropy(loss, action_spec)
        if tau is None and has_targets(loss):
            tau = 0.005
        super().__init__(
            loss,
            gamma=gamma,
            lr=lr,
            tau=tau,
            actor_every=actor_every,
            targets_every=targets_every,
            optim_factory=optim_factory,
        )
        draws = isinstance(getattr(loss, policy), ProbabilisticTensorDictSequential)
        if exploration is None:
            exploration = 0.0 if draws else 0.1
        most = 1.0 if choices else math.inf
        self.exploration = check_number("exploration", exploration, 0.0, most)
        self.policy, self.action_spec, self._has_bounds = policy, action_spec, not choices
        if bounds is None:
            self.random_actions = RandomActions(action_spec)
        else:
            # Not in the state dict, since they follow from the arguments.
            self.register_buffer("low", bounds[0], persistent=False)
            self.register_buffer("high", bounds[1], persistent=False)
        self._set_mode(False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out TorchRL's closures for evaluating losses, which cannot be pickled."""
        loss = copy.copy(self.loss)
        own = vars(loss)
        for key in [*own]:
            if key == "_cache" or (key.startswith("_vmap_") and callable(own[key])):
                del own[key]
        state = super().__getstate__()
        return {**state, "_modules": {**state["_modules"], "loss": loss}}

    def _set_mode(self, training: bool) -> None:
        """Set the mode of the loss's networks; ``train`` does not reach them."""
        for part in vars(self.loss).values():
            if isinstance(part, nn.Module):
                part.train(training)

    def update(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """See :meth:`Learner.update`."""
        self._set_mode(True)
        try:
            return super().update(batch)
        finally:
            self._set_mode(False)

    def act(self, features: Tensor, *, explore: bool) -> Tensor:
        """See :meth:`Learner.act`."""
        kind = ExplorationType.RANDOM if explore else ExplorationType.DETERMINISTIC
        td = TensorDict({"features": features}, features.shape[:-1])
        net, params = getattr(self.loss, self.policy), getattr(self.loss, f"{self.policy}_params")
        with set_exploration_type(kind), params.to_module(net):
            action: Tensor = net(td).get("action")
        if action.is_floating_point() != self._has_bounds and not isinstance(
            self.action_spec, OneHot
        ):
            raise TypeError(
                f"the {self.policy} of {type(self.loss).__name__} writes {action.dtype}, but the "
                f"level's actions are {type(self.action_spec).__name__} "
                f"({self.action_spec.dtype}); take a loss for such actions"
            )
        explore = explore and self.exploration > 0.0
        if self._has_bounds:
            expected = (*td.batch_size, *self.action_spec.shape)
            if action.shape != expected:  # one dimension would broadcast to all
                raise ValueError(
                    f"the {self.policy} of {type(self.loss).__name__} writes actions of shape "
                    f"{tuple(action.shape)}, expected {expected}; build it for the action spec"
                )
            if explore:
                action = action + self.exploration * torch.randn_like(action)
            action = from_unit(action.clamp(-1.0, 1.0), self.low, self.high)
            return action.to(self.action_spec.dtype)
        batch = td.batch_size
        action = action.reshape((*batch, *self.action_spec.shape)).to(self.action_spec.dtype)
        if explore:
            random = torch.rand(batch, device=action.device) < self.exploration
            random = random.reshape((*batch, *(1 for _ in self.action_spec.shape)))
            action = torch.where(random, self.random_actions(batch).to(action.device), action)
        return action

    def prepare(self, action: Tensor) -> Tensor:
        """Scale bounded actions to ``[-1, 1]``, and turn one-hot bools into integers."""
        if self._has_bounds:
            return to_unit(action, self.low, self.high)
        return action.long() if action.dtype == torch.bool else action  # some take its argmax


def _know_target_entropy(loss: LossModule, action_spec: TensorSpec) -> None:
    """Let ``loss`` create the buffer of its target entropy, if it has one.

    TorchRL does so when it is first read, but it must exist to be found as an option.
    """
    if not hasattr(type(loss), "target_entropy"):
        return
    try:
        loss.target_entropy  # noqa: B018 - creates it
    except (AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{type(loss).__name__} does not know its target entropy; build it with "
            f"target_entropy=-{float(width(action_spec))}, minus the dimensions of the action"
        ) from error


def _refuse_on_policy(loss: LossModule) -> None:
    """Raise if the loss needs trajectories of the current policy."""
    if getattr(loss.default_value_estimator, "name", None) in _ON_POLICY:
        raise ValueError(
            f"{type(loss).__name__} is an on-policy loss: it needs advantages along trajectories "
            "of the current policy, but a level learns from single transitions of a buffer, also "
            "of older policies; take an off-policy loss, such as SACLoss, TD3Loss or DQNLoss"
        )


def _policy_name(loss: LossModule, name: str | None) -> str:
    """Return the name of the loss's policy."""
    known = [name] if name is not None else list(_NETWORKS)
    for one in known:
        if getattr(loss, one, None) is not None and hasattr(loss, f"{one}_params"):
            return one
    parts = [key for key, _ in loss.named_children()]
    networks = [key.removesuffix("_params") for key in parts if key.endswith("_params")]
    raise ValueError(
        f"{type(loss).__name__} has no policy named {' or '.join(known)}, its networks are "
        f"{networks}; name the one that writes 'action' by policy="
    )


def _check_networks(loss: LossModule) -> None:
    """Raise unless the loss is reduced and its networks read only a level's entries."""
    name = type(loss).__name__
    if getattr(loss, "reduction", None) == "none":
        raise ValueError(f"{name} has reduction='none', expected scalars; build it without")
    for one in ("actor_network", "qvalue_network", "value_network"):
        net = getattr(loss, one, None)
        unknown = set(getattr(net, "in_keys", ())) - _READ
        if unknown:
            raise ValueError(
                f"the {one} of {name} reads {sorted(map(str, unknown))}, but a level gives "
                "'features', its observation and input as one normalised vector, and 'action'; "
                "build the networks with in_keys=['features'] or ['features', 'action']"
            )
