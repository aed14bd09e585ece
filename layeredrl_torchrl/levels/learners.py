"""A TorchRL loss with the policy that it trains and its target networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import LossModule, SoftUpdate, ValueEstimators

from layeredrl_torchrl._checks import check_number
from layeredrl_torchrl._state import refuse_other_shapes
from layeredrl_torchrl._watch import refuse

__all__ = ["Learner"]


class Learner(nn.Module, ABC):
    """The policy and the loss of a :class:`~layeredrl_torchrl.ModelFreeLevel`.

    A subclass builds a TorchRL loss over the key ``"features"``, and implements the policy in
    :meth:`act`. Gradient steps are taken with Adam on the sum of the loss's terms that begin with
    ``"loss"``; after each, TorchRL's ``SoftUpdate`` updates the target networks.

    All parameters belong to ``loss``, as TorchRL has it. Copies and pickles can act but not learn.

    >>> learner = SACLearner(3, Bounded(-1.0, 1.0, (1,)))
    >>> "features" in learner.loss.in_keys
    True

    Args:
        loss: Reads ``"features" [N, F]``, ``"action"`` and below ``"next"`` the features,
            ``reward``, ``terminated`` and ``done``, each ``[N, 1]``. It has target networks.
        gamma: Discount over one of the level's own actions, in ``[0, 1]``.
        lr: Learning rate.
        tau: Share by which target networks move at each update, in ``(0, 1]``.

    Raises:
        ValueError: Numbers outside their range.
    """

    def __init__(self, loss: LossModule, *, gamma: float, lr: float, tau: float) -> None:
        super().__init__()
        check_number("gamma", gamma, 0.0, 1.0)
        check_number("lr", lr, 0.0, open_low=True)
        check_number("tau", tau, 0.0, 1.0, open_low=True)
        loss.make_value_estimator(ValueEstimators.TD0, gamma=gamma)
        self.loss = loss
        # SoftUpdate copies the networks to their targets, so it is built before a state is loaded.
        self._targets: SoftUpdate | None = SoftUpdate(loss, tau=tau)
        self.optim: torch.optim.Optimizer | None = torch.optim.Adam(
            loss.parameters(), lr=lr, fused=True
        )
        refuse_other_shapes(self.optim)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the parts that only learning needs, which would change the original."""
        return {**self.__dict__, "_targets": None, "optim": None}

    @abstractmethod
    def act(self, features: Tensor, *, explore: bool) -> Tensor:
        """Return actions for ``features [*B, F]`` in the form of the spec.

        Args:
            features: ``[*B, F]``.
            explore: Whether to explore; otherwise the actions are deterministic.
        """

    def prepare(self, action: Tensor) -> Tensor:
        """Turn actions ``[N]`` of the spec into the form that the loss reads."""
        return action

    def update(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Take one gradient step on ``batch [N]``, whose actions are prepared.

        Returns:
            The loss's terms without gradient; those that are no scalars are averaged.

        Raises:
            ValueError: A loss that is not finite: on a CPU nothing is changed, on an accelerator a
                later call raises.
            RuntimeError: This is a copy.
        """
        if self.optim is None or self._targets is None:
            raise RuntimeError(
                f"this {type(self).__name__} is a copy that was made to act; learn with the "
                "original"
            )
        terms = self.loss(batch)
        losses = [value for name, value in terms.items() if name.startswith("loss")]
        total = torch.stack(losses).sum()

        def error(_: Tensor) -> ValueError:
            found = {name: value.item() for name, value in terms.items()}
            return ValueError(
                f"the loss is {total.item()} (terms: {found}); lower the learning rate, or scale "
                "the rewards (a reward-scaling transform)"
            )

        refuse(~total.detach().isfinite(), error)
        self.optim.zero_grad()
        total.backward()
        self.optim.step()
        self._targets.step()
        detached = ((name, value.detach()) for name, value in terms.items())
        return {name: value.mean() if value.ndim else value for name, value in detached}
