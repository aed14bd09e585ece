"""A TorchRL loss with its policy and target networks."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, nn
from torchrl.objectives import LossModule, SoftUpdate, ValueEstimators
from torchrl.objectives.value import ValueEstimatorBase

from layeredrl_torchrl._checks import (
    check_callable,
    check_number,
    check_positive_int,
    check_trainable,
)
from layeredrl_torchrl._state import follow_parameters, not_saved, refuse_other_shapes
from layeredrl_torchrl._watch import refuse
from layeredrl_torchrl.predictors._learning_rates import LearningRate

__all__ = ["Learner", "has_targets"]

_TARGETS = re.compile(r"target_\w+_params\.")
_ACTOR = re.compile(r"loss_actor|loss_alpha$")
# Arguments that TorchRL's losses and value estimators keep as buffers. (log_alpha is a buffer if it
# is fixed, and a parameter if it is learned.)
_OPTIONS = {"gamma", "lmbda", "alpha_init", "log_alpha", "min_log_alpha", "max_log_alpha"}
_OPTIONS |= {"_target_entropy", "target_entropy", "target_entropy_buffer"}
_OPTIONS |= {"min_action", "max_action"}


class Learner(nn.Module, ABC):
    """The policy and the loss of a :class:`~layeredrl_torchrl.ModelFreeLevel`.

    A subclass builds a TorchRL loss over the key ``"features"``, and implements the policy in
    :meth:`act`. :class:`~layeredrl_torchrl.levels.LossLearner` does so for any loss that contains
    its policy. Each gradient step is on the sum of the loss's terms whose names begin with
    ``"loss"``; then TorchRL's ``SoftUpdate`` updates the target networks, if there are any.

    All parameters belong to ``loss``, as usual in TorchRL. Options, such as ``gamma``, are not part
    of the state, so a state can be loaded to continue with other options. Copies and pickles can
    act but not learn.

    >>> learner = SACLearner(3, Bounded(-1.0, 1.0, (1,)))
    >>> "features" in learner.loss.in_keys
    True

    Args:
        loss: Reads ``"features" [N, F]``, ``"action"`` and under ``"next"`` the features and
            ``reward``, ``terminated`` and ``done``, each ``[N, 1]``.
        gamma: Discount over one action of the level, in ``[0, 1]``.
        lr: Learning rate: a number, or a function of the environment steps, called before the
            updates of each ``learn``.
        tau: Step of the target networks at each of their updates, in ``(0, 1]``; ``None`` for a
            loss without target networks.
        actor_every: Updates for each step of the actor and its temperature (the terms
            ``loss_actor*`` and ``loss_alpha``); 2 in TD3.
        targets_every: Updates for each update of the target networks; 2 in TD3.
        optim_factory: Called as ``optim_factory(parameters, lr=...)``, returns a torch optimizer;
            Adam by default.

    Raises:
        TypeError, ValueError: Numbers outside their range; ``tau`` or ``targets_every`` for a loss
            without target networks, or ``tau=None`` for a loss with them; ``actor_every`` for a
            loss without an actor.
    """

    n_updates: Tensor  # [] int64, only with delayed updates of actor or targets

    def __init__(
        self,
        loss: LossModule,
        *,
        gamma: float,
        lr: LearningRate,
        tau: float | None,
        actor_every: int = 1,
        targets_every: int = 1,
        optim_factory: Callable[..., torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        check_number("gamma", gamma, 0.0, 1.0)
        self.lr = lr
        self.actor_every = check_positive_int("actor_every", actor_every)
        self.targets_every = check_positive_int("targets_every", targets_every)
        check_callable("optim_factory", optim_factory, optional=True)
        name = type(loss).__name__
        if actor_every > 1 and not hasattr(loss, "actor_network"):
            raise ValueError(f"actor_every={actor_every} is for an actor, but {name} has none")
        try:
            loss.make_value_estimator(ValueEstimators.TD0, gamma=gamma)
        except NotImplementedError as error:
            raise ValueError(
                f"{name} has no one-step returns (TD0), which a level needs to learn from "
                "rewards; take a loss that has, such as SACLoss"
            ) from error
        self.loss = loss
        self._targets: SoftUpdate | None = None
        if has_targets(loss):
            if tau is None:
                raise ValueError(f"{name} has target networks, but tau is None; pass 0.005 or so")
            check_number("tau", tau, 0.0, 1.0, open_low=True)
            # It copies the networks to their targets, so build it before a state is loaded.
            self._targets = SoftUpdate(loss, tau=tau)
        elif tau is not None or targets_every > 1:
            raise ValueError(
                f"{name} has no target networks, but tau={tau} and "
                f"targets_every={targets_every} are for them; leave them out"
            )
        _leave_out_options(loss)
        self._count = 0
        if max(actor_every, targets_every) > 1:
            self.register_buffer("n_updates", torch.zeros((), dtype=torch.int64))
        make = optim_factory or partial(torch.optim.Adam, fused=True)
        self.optim: torch.optim.Optimizer | None = make(loss.parameters(), lr=self._lr(0))
        refuse_other_shapes(self.optim)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the parts for learning, since they would change the original."""
        return {**self.__dict__, "_targets": None, "optim": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Cast or move everything, including the views that the loss keeps of its parameters.

        Tensordict caches detached views, which would still show the old parameters.
        """
        super()._apply(fn, recurse)
        for part in self.modules():
            if isinstance(part, TensorDictParams):
                part._erase_cache()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Ignore options, which old states contain."""
        for name in not_saved(self):
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _lr(self, n_env_steps: int) -> float:
        if callable(self.lr):
            return float(check_number("lr(n_env_steps)", self.lr(n_env_steps), 0.0))
        return float(check_number("lr", self.lr, 0.0, open_low=True))

    def begin(self, n_env_steps: int) -> None:
        """Prepare for the updates of one ``learn``: set the learning rate.

        Args:
            n_env_steps: Environment steps so far.
        """
        if self.optim is not None:
            follow_parameters(self.optim)
        if callable(self.lr) and self.optim is not None:
            rate = self._lr(n_env_steps)
            for group in self.optim.param_groups:
                group["lr"] = rate
        if max(self.actor_every, self.targets_every) > 1:
            # Read it here, since an update must not wait for an accelerator.
            self._count = int(self.n_updates)

    @abstractmethod
    def act(self, features: Tensor, *, explore: bool) -> Tensor:
        """Return actions for ``features [*B, F]`` in the form of the spec.

        Args:
            features: ``[*B, F]``.
            explore: Whether to explore; otherwise the actions are deterministic.
        """

    def prepare(self, action: Tensor) -> Tensor:
        """Turn actions ``[N]`` of the spec into the form that the loss takes."""
        return action

    def update(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Take one gradient step on ``batch [N]``, whose actions are prepared.

        Actor and targets take part only when their update is due.

        Returns:
            The loss's terms without gradient; terms that are not scalars are averaged.

        Raises:
            ValueError: A loss that is not finite; on a CPU nothing is changed, on an accelerator a
                later call raises the error.
            RuntimeError: This is a copy, or all parameters are frozen.
        """
        if self.optim is None:
            raise RuntimeError(
                f"this {type(self).__name__} is a copy for acting; learn with the original"
            )
        count = self._count + 1
        found = self.loss(batch)
        terms = {
            key if isinstance(key, str) else ".".join(key): value
            for key, value in found.items(True, True)
        }
        losses = [name for name in terms if name.startswith("loss")]
        if count % self.actor_every:
            losses = [name for name in losses if not _ACTOR.match(name)]
        total = torch.stack([terms[name] for name in losses]).sum()

        def error(_: Tensor) -> ValueError:
            each = {name: value.mean().item() for name, value in terms.items()}
            return ValueError(
                f"the loss is {total.item()} (terms: {each}); lower the learning rate, or scale "
                "the rewards (a reward-scaling transform)"
            )

        refuse(~total.detach().isfinite(), error)
        check_trainable(type(self).__name__, total)
        self.optim.zero_grad()
        total.backward()
        self.optim.step()
        if self._targets is not None and count % self.targets_every == 0:
            self._targets.step()
        if max(self.actor_every, self.targets_every) > 1:
            self._count = count
            self.n_updates += 1
        detached = ((name, value.detach()) for name, value in terms.items())
        return {name: value.mean() if value.ndim else value for name, value in detached}


def _leave_out_options(loss: LossModule) -> None:
    """Leave options out of the state of ``loss``, so that loading a state does not replace them."""
    for part in loss.modules():
        if isinstance(part, LossModule | ValueEstimatorBase):
            for name in _OPTIONS & part._buffers.keys():
                part.register_buffer(name, part._buffers[name], persistent=False)


def has_targets(loss: LossModule) -> bool:
    """Return whether a loss has target networks."""
    return any(_TARGETS.match(key) for key, _ in loss.named_buffers())
