"""What the levels that learn from stored transitions share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer, TensorSpec
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.record.loggers import Logger

from layeredrl_torchrl._checks import check_positive_int
from layeredrl_torchrl._reporting import check_logger
from layeredrl_torchrl.levels.level import Level
from layeredrl_torchrl.levels.storing import make_buffer, match_layout, n_env_steps, uncut
from layeredrl_torchrl.specs import ObservationSpace, Space

__all__ = ["LearningLevel", "spaces_of"]


def spaces_of(
    observation_space: ObservationSpace | None,
    action_space: TensorSpec | Space | None,
    env: EnvBase | None,
) -> tuple[ObservationSpace | None, TensorSpec | Space | None]:
    """Both spaces, from ``env`` if there is one; ``None`` for both if nothing is given.

    Raises:
        ValueError: One space without the other, or spaces beside ``env``.
    """
    given = {observation_space is not None, action_space is not None}
    if len(given) == 2 or (given == {True} and env is not None):
        raise ValueError(
            "pass observation_space and action_space, or env= to take both from, or (in a "
            f"hierarchy) none of them; got observation_space={observation_space!r}, "
            f"action_space={action_space!r}, env={env}"
        )
    if env is not None:
        return env.observation_spec_unbatched, env.action_spec_unbatched
    return observation_space, action_space


class LearningLevel(Level):
    """Stores transitions, and makes the updates that are due on a schedule.

    A subclass implements ``_transitions`` (checks, and what is stored), ``_update``, and
    ``_observe`` where it keeps statistics of the data. Its own docstring says what the arguments
    mean to a user.
    """

    n_env_steps: Tensor  # [] int64
    updates_due: Tensor  # [] float64

    def __init__(
        self,
        *,
        input_spec: TensorSpec | Space | None = None,
        duration: int | None = None,
        reward_func: Callable[[TensorDictBase], Tensor] | None = None,
        each_step: bool = False,
        buffer: ReplayBuffer | None,
        buffer_size: int | None,
        n_axes: int | None,
        n_initial_random_steps: int,
        updates_per_step: float,
        n_initial_updates: int | None,
        batch_size: int,
        logger: Logger | None,
        progress: bool,
    ) -> None:
        super().__init__(
            input_spec=input_spec, duration=duration, reward_func=reward_func, each_step=each_step
        )
        if not 0.0 <= updates_per_step < math.inf:
            raise ValueError(
                f"updates_per_step must be finite and at least 0, got {updates_per_step}"
            )
        if n_initial_updates is not None:
            check_positive_int("n_initial_updates", n_initial_updates, minimum=0)
        check_logger(logger)
        self.n_initial_random_steps = check_positive_int(
            "n_initial_random_steps", n_initial_random_steps, minimum=0
        )
        self.updates_per_step = updates_per_step
        self.n_initial_updates = n_initial_updates
        self.batch_size = check_positive_int("batch_size", batch_size)
        self.logger = logger
        self.progress = progress
        self.register_buffer("n_env_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("updates_due", torch.zeros((), dtype=torch.float64))
        # Without axes told, the first data says how many there are.
        self._lays_out = n_axes is None and buffer is None
        self.buffer: ReplayBuffer | None = make_buffer(buffer, buffer_size, n_axes or 1)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without what only learning needs."""
        return {**self.__dict__, "buffer": None, "logger": None}

    @property
    def explores(self) -> bool:
        """Whether actions may be random now: in training, unless TorchRL asks for none."""
        return self.training and exploration_type() in (ExplorationType.RANDOM, None)

    @property
    def warming_up(self) -> bool:
        """Whether the initial random steps are still to be taken."""
        return int(self.n_env_steps) < self.n_initial_random_steps

    @abstractmethod
    def _transitions(self, data: object) -> TensorDictBase:
        """What is stored of ``data``, checked; changes nothing."""

    @abstractmethod
    def _update(self, buffer: ReplayBuffer, n_updates: int) -> dict[str, float]:
        """Make updates; returns the terms."""

    def _observe(self, data: TensorDictBase) -> None:
        """Take statistics of what was just stored. Overridden by levels that keep any."""

    def learn(self, data: TensorDictBase) -> dict[str, float]:
        """Store transitions, and make the updates that are due.

        Transitions count as environment steps one each, or as many as ``("next",
        "elapsed_steps")`` says where it is present (as it is where actions are skills). One that
        was cut short by a time limit (``("next", "interrupted")``) counts and is not stored.

        Args:
            data: ``[T]`` or ``[env, T]``, as a collector of this level gives it; ``[N]`` in a
                hierarchy.

        Returns:
            ``n_env_steps``, ``n_updates`` of this call, and with updates the terms.

        Raises:
            TypeError: Not a TensorDict. KeyError: One without what is learned from.
            ValueError: NaN in it; other axes than the buffer's. In these cases nothing is
                stored. And as the updates: then the data is stored, the updates stay due.
            RuntimeError: A copy of a level, which has no buffer; a level without spaces.
        """
        if self.buffer is None:
            raise RuntimeError(
                f"this {self.name} is a copy that was made to act, and copies come without a "
                "buffer; call learn() on the level that was copied"
            )
        data = self._transitions(data)
        before = int(self.n_env_steps)
        n_steps, data = n_env_steps(data), uncut(data)
        if data.shape.numel():
            match_layout(self.buffer, data, adapt=self._lays_out)
            self.buffer.extend(data)
            self._observe(data)
        self.n_env_steps += n_steps
        self.updates_due += self.updates_per_step * data.shape.numel()
        info = {"n_env_steps": float(self.n_env_steps), "n_updates": 0.0}
        if self.warming_up:
            return info
        if self.n_initial_updates is not None and (
            before < self.n_initial_random_steps or before == 0
        ):
            self.updates_due.fill_(self.n_initial_updates)
        # Ten times 0.1 is one.
        n_updates = int(float(self.updates_due) + 1e-6)
        if n_updates and len(self.buffer):
            info |= self._update(self.buffer, n_updates)
            self.updates_due -= n_updates
        return info
