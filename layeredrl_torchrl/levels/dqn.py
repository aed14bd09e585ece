"""Deep Q-learning with TorchRL's DQNLoss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchrl.data import Categorical, OneHot, TensorSpec
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss

from layeredrl_torchrl._checks import check_flag, check_number, check_sizes
from layeredrl_torchrl.levels._mlp import FlatMLP, layers, mlp
from layeredrl_torchrl.levels.learners import Learner
from layeredrl_torchrl.predictors._learning_rates import LearningRate
from layeredrl_torchrl.specs import is_discrete, width

__all__ = ["DQNLearner"]


class DQNLearner(Learner):
    """Double deep Q-learning (arXiv 1509.06461) for discrete actions, with TorchRL's ``DQNLoss``.

    >>> from torchrl.data import OneHot
    >>> learner = DQNLearner(3, OneHot(4), hidden_sizes=(32,))
    >>> type(learner.loss).__name__
    'DQNLoss'

    Args:
        n_features: ``F``.
        action_spec: A ``OneHot`` or ``Categorical`` spec.
        hidden_sizes: Width of each hidden layer.
        gamma: Discount over one action of the level.
        lr: Learning rate; see :class:`Learner`.
        tau: Step of the target network towards the network at each update.
        epsilon: Share of random actions while exploring.
        double: Whether the network chooses the next action and the target network evaluates it;
            otherwise the target network does both.

    Raises:
        TypeError: Another kind of action spec. ValueError: Numbers outside their range.
    """

    loss: DQNLoss

    def __init__(
        self,
        n_features: int,
        action_spec: TensorSpec,
        *,
        hidden_sizes: Sequence[int] = (128, 128),
        gamma: float = 0.99,
        lr: LearningRate = 3e-4,
        tau: float = 0.005,
        epsilon: float = 0.1,
        double: bool = True,
    ) -> None:
        if not is_discrete(action_spec):
            raise TypeError(
                f"DQN needs choices, a OneHot or Categorical spec, got {action_spec}; for actions "
                "within bounds pass SACLearner"
            )
        hidden_sizes = check_sizes("hidden_sizes", hidden_sizes)
        check_number("epsilon", epsilon, 0.0, 1.0)
        check_flag("double", double)
        n = width(action_spec)
        # TorchRL's actor writes choices without a last axis; its loss reads both forms.
        spec = action_spec if isinstance(action_spec, OneHot) else Categorical(n)
        net = FlatMLP(["features"], ["action_value"], (n_features, *hidden_sizes, n))
        loss = DQNLoss(
            QValueActor(net, in_keys=["features"], spec=spec),
            loss_function="smooth_l1",
            action_space=spec,
            double_dqn=double,
        )
        super().__init__(loss, gamma=gamma, lr=lr, tau=tau)
        self.epsilon = epsilon
        self.action_spec = action_spec

    def act(self, features: Tensor, *, explore: bool) -> Tensor:
        """Take the choice with the highest value, or sometimes a random one while exploring."""
        values = mlp(features, layers(self.loss.value_network_params["module", "0"]))
        choice = values.argmax(-1)
        if explore and self.epsilon:
            other = torch.randint_like(choice, values.shape[-1])
            random = torch.rand(choice.shape, device=choice.device) < self.epsilon
            choice = torch.where(random, other, choice)
        if isinstance(self.action_spec, OneHot):
            choices = torch.arange(values.shape[-1], device=choice.device)
            return (choice.unsqueeze(-1) == choices).to(self.action_spec.dtype)
        return choice.to(self.action_spec.dtype).reshape((*choice.shape, *self.action_spec.shape))
