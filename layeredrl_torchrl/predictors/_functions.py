"""The functions of a predictor, evaluated at steps and at mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

from layeredrl_torchrl._checks import check_finite, check_per_item, check_probability
from layeredrl_torchrl.nets import StepFunction, needs_next_state, on_step

__all__ = ["StepFunctions", "Taken", "checked", "value_of_state"]

# State [*B, D], context [*B, C] and action [*B, *], in the form of the action spec.
Taken: TypeAlias = tuple[Tensor, Tensor, Tensor]


class StepFunctions(NamedTuple):
    """Reward of a step, value after the last step, and whether a step ends the episode.

    The methods that return a reward need ``reward``.
    """

    reward: StepFunction | None
    value: StepFunction | None
    term: StepFunction | None  # None: the model says

    @property
    def look_ahead(self) -> bool:
        """Whether reward or termination read the next state."""
        return any(f is not None and needs_next_state(f) for f in (self.reward, self.term))

    def reward_of(self, taken: Taken, next_state: Tensor) -> Tensor:
        """Return the reward ``[*B]`` of steps that led to ``next_state``, in the states' dtype."""
        assert self.reward is not None
        state = taken[0]
        reward = checked("rew_func", on_step(self.reward, *taken, next_state), state.shape[:-1])
        return reward.to(state.dtype)  # a function may give flags, counts or float64

    def term_prob_of(self, taken: Taken, next_state: Tensor, predicted: Tensor) -> Tensor:
        """Return the probability ``[*B]`` that steps end the episode; else ``predicted``."""
        if self.term is None:
            return predicted
        ends = on_step(self.term, *taken, next_state)
        return check_probability("term_func", ends, taken[0].shape[:-1], predicted.dtype)

    def mean_reward(self, taken: Taken, mean: Tensor, weights: Tensor) -> Tensor:
        """Return the mean reward ``[*B]`` at ``mean [*B, M, K, D]``, by ``weights [*B, M, K]``."""
        if self.reward is None or not needs_next_state(self.reward):
            return self.reward_of(taken, taken[0])
        return _average(self.reward_of(_per_component(taken, mean), mean), weights)

    def mean_term_prob(
        self, taken: Taken, mean: Tensor, weights: Tensor, predicted: Tensor
    ) -> Tensor:
        """Return the mean probability of termination; ``predicted [*B]`` without ``term``."""
        if self.term is None or not needs_next_state(self.term):
            return self.term_prob_of(taken, taken[0], predicted)
        of_model = predicted[..., None, None].expand_as(weights)
        return _average(self.term_prob_of(_per_component(taken, mean), mean, of_model), weights)


def checked(name: str, value: Tensor, batch: Sequence[int]) -> Tensor:
    """Return the values of a function if they are one finite number for each state."""
    check_per_item(name, value, batch)
    check_finite(f"what {name} gave", value, hint=f"repair {name}, or train it on such states")
    return value


def value_of_state(value: StepFunction, state: Tensor, context: Tensor) -> Tensor:
    """Evaluate ``value`` at states ``[*B, D]`` where no action is chosen yet, unchecked.

    The action is ``None``. The action that led to a state belongs to the state before; with it, an
    action-value function would silently give a wrong value.

    Raises:
        TypeError: A function that reads the action.
    """
    try:
        return value(state, context, None)
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"val_func failed where no action is chosen yet and it is called with None ({error}); "
            "give a function of state and context, such as an action-value function of the "
            "policy's own action"
        ) from error


def _per_component(taken: Taken, mean: Tensor) -> Taken:
    """Repeat what was taken for each component of ``mean [*B, M, K, D]``."""
    n, rows = mean.ndim - 3, mean.shape[:-1]
    state, context, action = (
        x.unsqueeze(n).unsqueeze(n).expand(*rows, *x.shape[n:]) for x in taken
    )
    return state, context, action


def _average(values: Tensor, weights: Tensor) -> Tensor:
    """Average ``values [*B, M, K]`` to ``[*B]``: modes by their weights, members equally."""
    return (weights * values).sum(-1).mean(-1)
