"""The base class of levels that learn from stored transitions on a schedule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypedDict

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.data import Composite, ReplayBuffer, TensorSpec
from torchrl.envs import ActionMask, EnvBase, TransformedEnv
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.record.loggers import Logger

from layeredrl_torchrl._checks import (
    MASKED,
    check_flag,
    check_instance,
    check_keys,
    check_number,
    check_positive_int,
)
from layeredrl_torchrl._precision import KeepsDoubles
from layeredrl_torchrl._reporting import check_logger
from layeredrl_torchrl._watch import is_at_once
from layeredrl_torchrl.levels._rows import collected, n_env_steps, without_cut
from layeredrl_torchrl.levels._storing import make_buffer, select_stored, write
from layeredrl_torchrl.levels._undo import all_or_nothing
from layeredrl_torchrl.levels.level import OWN_REWARD, Level
from layeredrl_torchrl.specs import ObservationSpace, Space

__all__ = ["LearningLevel", "LearningOptions", "spaces_of"]


class LearningOptions(TypedDict, total=False):
    """The types of the arguments of :class:`LearningLevel`; see there."""

    buffer: ReplayBuffer | None
    buffer_size: int | None
    store_keys: Iterable[NestedKey]
    n_initial_random_steps: int
    updates_per_step: float
    n_initial_updates: int | None
    batch_size: int
    logger: Logger | None
    progress: bool
    reward_func: Callable[[TensorDictBase], Tensor] | None
    each_step: bool


def spaces_of(
    observation_space: ObservationSpace | None,
    action_space: TensorSpec | Space | None,
    env: EnvBase | None,
) -> tuple[ObservationSpace | None, TensorSpec | Space | None]:
    """Return both spaces, from ``env`` if it is given, or ``None`` twice if nothing is given.

    Raises:
        ValueError: Only one space, or spaces together with ``env``; an environment with masked
            actions.
    """
    given = {observation_space is not None, action_space is not None}
    if len(given) == 2 or (given == {True} and env is not None):
        raise ValueError(
            "pass observation_space and action_space, or env= to take both from, or (in a "
            f"hierarchy) none of them; got observation_space={observation_space!r}, "
            f"action_space={action_space!r}, env={env}"
        )
    if env is None:
        return observation_space, action_space
    check_env(env)
    refuse_masks(env)
    return env.observation_spec_unbatched, env.full_action_spec_unbatched[env.action_key]


def check_env(env: EnvBase) -> None:
    """Raise ``TypeError`` unless ``env`` is an environment."""
    check_instance(
        "env", env, EnvBase, hint="make one, as by get_task(name).make() or GymEnv(name)"
    )


def refuse_masks(env: EnvBase) -> None:
    """Raise ``ValueError`` if ``env`` masks actions."""
    masked = any(str(key[-1]) == "action_mask" for key in _tuples(env.observation_spec))
    layer = env
    while isinstance(layer, TransformedEnv):
        parts = getattr(layer.transform, "transforms", [layer.transform])
        masked |= any(isinstance(part, ActionMask) for part in parts)
        layer = layer.base_env
    if masked or getattr(env.full_action_spec[env.action_key], "mask", None) is not None:
        raise ValueError(MASKED)


def _tuples(spec: Composite) -> Iterable[tuple[str, ...]]:
    return (key if isinstance(key, tuple) else (key,) for key in spec.keys(True, True))


class LearningLevel(KeepsDoubles, Level):
    """Stores transitions and makes updates on a schedule.

    It acts randomly until :attr:`n_env_steps`, which :meth:`learn` counts, reaches
    ``n_initial_random_steps``; but never in evaluation, that is after ``level.eval()`` or if
    TorchRL's ``set_exploration_type`` asks for deterministic actions.

    To save and resume, save the level, ``level.optim``, ``level.buffer`` and the state of the
    random number generators, for instance with TorchRL's ``Checkpoint``. Copies and pickles, such
    as those in worker processes, have no buffer and no logger: they can act but not learn.

    A subclass implements ``_checked``, ``_update``, ``stored_keys``, and if needed ``_observe`` and
    ``_can_update``.

    Args:
        buffer: Buffer on a tensor storage, to which this level writes its transitions. By default a
            new one of ``buffer_size`` with the axes of ``env``, or of the first data.
        buffer_size: Transitions that the default buffer can hold; 100,000 by default.
        store_keys: Further entries of the data to store, for example for transforms of the buffer
            or your own losses.
        n_initial_random_steps: Environment steps before the first update, with random actions.
        updates_per_step: Updates for each transition; fractions of an update carry over.
        n_initial_updates: Updates at the end of the initial random steps, in place of those due
            until then; ``None`` to make all that are due.
        batch_size: Transitions, or slices of them, in an update.
        logger: Gets the terms of the updates, with environment steps as the step.
        progress: Whether a bar on stderr counts the updates of each call.
        reward_func: See :class:`Level`.
        each_step: See :class:`Level`.

    Raises:
        TypeError: Arguments of another kind. ValueError: Numbers outside their range;
            ``buffer_size`` together with a ``buffer``; a buffer to which a level cannot write.
    """

    n_env_steps: Tensor  # [] int64
    updates_due: Tensor  # [] float64

    def __init__(
        self,
        *,
        n_axes: int | None = None,
        input_spec: TensorSpec | Space | None = None,
        duration: int | None = None,
        buffer: ReplayBuffer | None = None,
        buffer_size: int | None = None,
        store_keys: Iterable[NestedKey] = (),
        n_initial_random_steps: int = 500,
        updates_per_step: float = 1.0,
        n_initial_updates: int | None = None,
        batch_size: int = 256,
        logger: Logger | None = None,
        progress: bool = False,
        reward_func: Callable[[TensorDictBase], Tensor] | None = None,
        each_step: bool = False,
    ) -> None:
        super().__init__(
            input_spec=input_spec, duration=duration, reward_func=reward_func, each_step=each_step
        )
        check_number("updates_per_step", updates_per_step, 0.0)
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
        self.progress = check_flag("progress", progress)
        self.store_keys = check_keys("store_keys", store_keys)
        self.register_buffer("n_env_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("updates_due", torch.zeros((), dtype=torch.float64))
        self._lays_out = buffer is None
        self.buffer: ReplayBuffer | None = make_buffer(buffer, buffer_size, n_axes or 1)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the parts for learning."""
        return {**self.__dict__, "buffer": None, "logger": None}

    @property
    def explores(self) -> bool:
        """Whether actions may be random, in training, if TorchRL's exploration type allows it."""
        return self.training and exploration_type() in (ExplorationType.RANDOM, None)

    @property
    def warming_up(self) -> bool | Tensor:
        """Whether the initial random steps are still going on.

        On an accelerator a tensor ``[]``, since a bool would have to wait for the device.
        """
        if not self.n_initial_random_steps:
            return False
        counted = self.n_env_steps < self.n_initial_random_steps
        return bool(counted) if is_at_once(counted) else counted

    @property
    def next_reward_key(self) -> NestedKey:
        """The key of a transition's reward."""
        return unravel_key(("next", self.reward_key))

    # -- for subclasses ---------------------------------------------------------------------

    @property
    @abstractmethod
    def stored_keys(self) -> tuple[list[NestedKey], list[NestedKey]]:
        """Entries that are always stored, and those that are stored if the data has them."""

    @abstractmethod
    def _checked(self, data: TensorDictBase) -> TensorDictBase:
        """Return the rows to learn from; raise if they are not usable."""

    @abstractmethod
    def _update(self, buffer: ReplayBuffer, n_updates: int) -> dict[str, float]:
        """Make updates and return their terms."""

    def _observe(self, data: TensorDictBase) -> None:
        """Update statistics with the newly stored rows."""

    def _can_update(self, buffer: ReplayBuffer) -> bool:
        """Return whether the buffer holds enough for an update."""
        return len(buffer) > 0

    # -- learning ---------------------------------------------------------------------------

    def learn(self, data: TensorDictBase) -> dict[str, float]:
        """Store transitions and make the updates that are due.

        Each transition counts as one environment step, or as ``("next", "elapsed_steps")`` if that
        is present (when actions are skills). Transitions cut short by a time limit
        (``("next", "interrupted")``) count but are not stored; padding (``("collector", "mask")``)
        neither counts nor is stored. Updates wait until the buffer holds enough for one.

        Only the entries that learning needs are stored (``stored_keys``, and your ``store_keys``).
        After any error, including ``KeyboardInterrupt``, level and buffer are as before the call.

        Args:
            data: ``[T]`` or ``[env, T]`` from a collector with this level as policy; ``[N]`` in a
                hierarchy.

        Returns:
            ``n_env_steps``, ``n_updates`` of this call, and after updates their terms. ``"reward"``
            is the mean reward of a ``reward_func``; a hierarchy reports it itself.

        Raises:
            TypeError: Not a TensorDict. KeyError: Missing entries that learning needs, or that
                earlier data had.
            ValueError: Values that are not finite or outside their space; axes, shapes or dtypes
                that differ from the stored ones; transitions of several steps. Also as the updates
                raise.
            RuntimeError: A copy of a level, which has no buffer; a level without spaces.
        """
        if self.buffer is None:
            raise RuntimeError(
                f"this {self.name} is a copy for acting, without a buffer; call learn() on the "
                "original level"
            )
        self.action_spec  # noqa: B018 - raises before setup
        made = collected(data, (self.done_key, self.terminated_key))
        paid: dict[str, float] = {}
        if self.reward_func is not None and made.numel() and not self._is_paid(made):
            made = made.copy()
            own = self.own_reward(made)
            made, paid = made.set(self.next_reward_key, own), {"reward": own.mean().item()}
        rows, n_steps = made, 0
        if made.shape.numel():
            rows, n_steps = without_cut(self._checked(made)), n_env_steps(made)
        if rows.shape.numel():
            required, optional = self.stored_keys
            optional = [*optional, *self.store_keys]
            rows = select_stored(self.buffer, rows, required, optional, adapt=self._lays_out)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            all_or_nothing(self, rows.shape.numel()),
        ):
            return paid | self._learn(self.buffer, rows, n_steps)

    def _is_paid(self, data: TensorDictBase) -> bool:
        """Return whether a hierarchy has already computed the own reward, and will report it."""
        own, reward = data.get(OWN_REWARD, None), data.get(self.next_reward_key, None)
        return own is not None and reward is not None and torch.equal(own, reward)

    def _learn(self, buffer: ReplayBuffer, rows: TensorDictBase, n_steps: int) -> dict[str, float]:
        before = int(self.n_env_steps)
        if rows.shape.numel():
            write(buffer, rows)
            self._observe(rows)
        self.n_env_steps += n_steps
        self.updates_due += self.updates_per_step * rows.shape.numel()
        info = {"n_env_steps": float(self.n_env_steps), "n_updates": 0.0}
        if self.warming_up:
            return info
        if self.n_initial_updates is not None and (
            before < self.n_initial_random_steps or before == 0
        ):
            self.updates_due.fill_(self.n_initial_updates)
        # So that ten times 0.1 makes one update.
        n_updates = int(float(self.updates_due) + 1e-6)
        if n_updates and self._can_update(buffer):
            info |= self._update(buffer, n_updates)
            self.updates_due -= n_updates
        return info
