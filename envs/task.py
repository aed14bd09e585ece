"""Tasks: how to make their environments, and their known functions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import gymnasium as gym
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import CatTensors, Compose, DoubleToFloat, EnvBase, GymWrapper, TransformedEnv

from layeredrl_torchrl._checks import check_indices, check_positive_int
from layeredrl_torchrl.envs.success import SuccessReader

__all__ = ["StepFunction", "Task"]

StepFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(state [*B, D], context [*B, C], action [*B, A], next_state [*B, D]) -> [*B]``."""


@dataclass(frozen=True)
class _OfNextState:
    """A known function of a step that reads the next state, in the form for predictors."""

    function: StepFunction
    reads_next_state: ClassVar[bool] = True

    def __call__(
        self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
    ) -> Tensor:
        """``[*B]``."""
        return self.function(state, context, action, next_state)


@dataclass(frozen=True)
class _OfState:
    """A known function of a step that does not read the next state, in the form for predictors."""

    function: StepFunction

    def __call__(self, state: Tensor, context: Tensor, action: Tensor) -> Tensor:
        """``[*B]``."""
        return self.function(state, context, action, state)


class _GymWrapper(GymWrapper):
    """TorchRL's wrapper; here vectorised environments also take ``env.reset(tensordict)``.

    TorchRL 0.14 reads the mask of a partial reset there without checking that it exists.
    """

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        if tensordict is not None and "_reset" not in tensordict.keys():
            tensordict = None
        return super()._reset(tensordict, **kwargs)


@dataclass(frozen=True)
class Task:
    """A control task for planning: its environment and its known functions in closed form.

    ``state = observation[state_dims]`` and ``context = observation[context_dims]`` are what
    ``FixedEncoderNet((task.observation_dim,), task.state_dims,
    task.context_dims)`` returns, and what ``reward`` and ``termination`` read, batched and in any
    float dtype.

    >>> task = get_task("Reacher-v5")
    >>> task.state_dims, task.context_dims, task.horizon
    ((0, 1, 2, 3, 6, 7, 8, 9), (4, 5), 50)
    >>> task.make(seed=0).rollout(3)["observation"].shape
    torch.Size([3, 10])

    Args:
        name: Name in the registry.
        make_gym: Makes one gymnasium environment with its time limit; keyword arguments go to the
            environment's constructor, ``max_episode_steps`` to the time limit.
        observation_dim: Number of values in ``"observation"``.
        state_dims: Which of them are the state, ``D`` indices.
        context_dims: Which of them are the context, ``C`` indices: constant in an episode.
        action_dim: ``A``.
        horizon: Steps after which an episode is truncated.
        budget: Real steps in which the benchmarks learn the task from scratch.
        solved_at: Undiscounted return of an episode at which the task counts as solved; ``None``
            without an agreed score.
        reward: Reward of a step; ``None`` if the standard observation does not determine it.
        reward_needs_next_state: Whether ``reward`` reads its fourth argument.
        termination: Whether a step terminates the episode, ``[*B]`` bool.
        joined: Keys of a dictionary observation, joined into ``"observation"`` in this order.
        observation_names: Short names of the values in ``"observation"``, for pictures; may be
            empty.
        reports_success: Whether the environment reports in ``info["success"]`` that its goal is
            reached; then this is read into ``"success" [*B, 1]``.

    Raises:
        TypeError, ValueError: Dimensions, a horizon or a budget that are not integers, or out of
            range; in :meth:`make`, a seed that is not an integer.
    """

    name: str
    make_gym: Callable[..., gym.Env[Any, Any]]
    observation_dim: int
    state_dims: tuple[int, ...]
    context_dims: tuple[int, ...]
    action_dim: int
    horizon: int
    budget: int
    solved_at: float | None = None
    reward: StepFunction | None = None
    reward_needs_next_state: bool = True
    termination: StepFunction | None = None
    joined: tuple[str, ...] = ()
    reports_success: bool = False
    observation_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("observation_dim", "action_dim", "horizon", "budget"):
            check_positive_int(name, getattr(self, name))
        for name in ("state_dims", "context_dims"):
            check_indices(name, getattr(self, name), self.observation_dim)

    def make(self, seed: int | None = None, **kwargs: Any) -> EnvBase:
        """Make one TorchRL environment: flat float32 ``"observation" [obs]``, batch size ``[]``.

        Add more transforms with ``env.append_transform(...)``.

        Args:
            seed: Seed of the environment; drawn by the operating system by default.
            **kwargs: Keyword arguments of ``make_gym``, for instance ``render_mode="rgb_array"``.
        """
        return self.wrap(self.make_gym(**kwargs), seed)

    def wrap(
        self, env: gym.Env[Any, Any] | gym.vector.VectorEnv[Any, Any, Any], seed: int | None = None
    ) -> EnvBase:
        """Turn a gymnasium environment, single or vectorised, into a TorchRL one, and seed it."""
        wrapped = _GymWrapper(env)
        if self.reports_success:
            wrapped.set_info_dict_reader(SuccessReader(batch_size=wrapped.batch_size))
        transforms = [DoubleToFloat()]
        if self.joined:
            joined = CatTensors(list(self.joined), "observation", sort=False)
            transforms.insert(0, joined)
        out = TransformedEnv(wrapped, Compose(*transforms))
        if seed is not None:
            out.set_seed(operator.index(seed))
        return out

    def names_of(self, dims: Iterable[int]) -> tuple[str, ...]:
        """Return names of values in ``"observation"``: the task's names, or their indices.

        >>> get_task("InvertedPendulum-v5").names_of([1])
        ('pole angle [rad]',)
        """
        names = self.observation_names
        return tuple(names[dim] if names else f"observation {dim}" for dim in dims)

    def rew_func(self) -> Callable[..., Tensor]:
        """Return the known reward as a predictor's ``rew_func``.

        It declares whether it reads the next state, and can be pickled if ``reward`` can.

        Raises:
            ValueError: The reward is not known.
        """
        if self.reward is None:
            raise ValueError(
                f"the reward of {self.name} is not a function of its observations; learn it "
                "(RewardNet), or use a task whose name ends in '/x'"
            )
        if self.reward_needs_next_state:
            return _OfNextState(self.reward)
        return _OfState(self.reward)

    def term_func(self) -> Callable[..., Tensor]:
        """Return the known termination as a predictor's ``term_func``.

        Raises:
            ValueError: The termination is not known.
        """
        if self.termination is None:
            raise ValueError(
                f"the termination of {self.name} is not known; give the task one (termination=), "
                "or leave term_func out and have it learned"
            )
        return _OfNextState(self.termination)
