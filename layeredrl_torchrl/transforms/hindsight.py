"""Hindsight relabelling of observations that include their goals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.data import HERReplayBuffer, ReplayBuffer, Storage, TensorStorage
from torchrl.envs import Transform

from layeredrl_torchrl._checks import (
    check_callable,
    check_indices,
    check_instance,
    check_key,
    check_positive_int,
    require,
)

__all__ = ["RelabelGoals"]


class RelabelGoals(Transform):
    """Lets TorchRL's ``HERReplayBuffer`` relabel goals that are part of one flat observation.

    In a share of the sampled transitions, a goal that was reached later in the same episode
    replaces the goal (arXiv 1707.01495). :meth:`make_buffer` builds the buffer, with this object as
    a transform. When rows are stored it adds, for the buffer to choose from,

    ========================  ================================================================
    ``"goal"``                the desired goal of the row, ``[N, G]``
    ``"goal_reached"``        the goal that its step achieved, ``[N, G]``
    ``("next", "goal_end")``  whether the next row does not follow on this one, bool ``[N, 1]``
    ========================  ================================================================

    and in relabelled rows, :meth:`relabel` writes the new goal into the observation and the next
    one, and computes the reward. Terminations do not change.

    Store ``[N]`` rows of one environment after the other, like ``data.reshape(-1)`` of a
    collector's batch. New goals come only from rows stored in the same call: let the collector give
    whole episodes, or long parts of them.

    >>> near = lambda achieved, desired: (achieved - desired).norm(dim=-1) <= 0.45
    >>> hindsight = RelabelGoals(8, achieved=[4, 5], desired=[6, 7], reward_func=near)
    >>> from torchrl.data import LazyTensorStorage
    >>> buffer = hindsight.make_buffer(storage=LazyTensorStorage(100), batch_size=4)
    >>> data = get_task("PointMaze-U").make().rollout(20)
    >>> buffer.extend(data).shape
    torch.Size([20])
    >>> buffer.sample()["observation"].shape
    torch.Size([4, 8])

    Args:
        observation_dim: Width of an observation, ``[obs]``.
        achieved: Indices of the achieved goal in the observation, ``G``; with ``JoinGoals`` its
            ``index_ranges["achieved_goal"]``.
        desired: Indices of the desired goal, likewise.
        reward_func: ``(achieved [N, G], desired [N, G]) -> [N]`` or ``[N, 1]``, with the goal that
            a step achieves, like gymnasium's ``compute_reward``.
        observation_key: Key of the observation, also under ``"next"``.
        reward_key: Key of the reward under ``"next"``.
        done_key: Key under ``"next"`` of the flag for the end of an episode.

    Raises:
        TypeError: Indices that are not integers. ValueError: Indices outside the observation, or
            repeated; different numbers of achieved and desired ones. When rows are stored:
            KeyError: A missing entry. ValueError: Observations of another width; a ``"goal"`` that
            differs from the desired goal.
    """

    goal_key: NestedKey = "goal"
    reached_key: NestedKey = "goal_reached"
    end_key: NestedKey = ("next", "goal_end")

    def __init__(
        self,
        observation_dim: int,
        *,
        achieved: Sequence[int],
        desired: Sequence[int],
        reward_func: Callable[[Tensor, Tensor], Tensor],
        observation_key: NestedKey = "observation",
        reward_key: NestedKey = "reward",
        done_key: NestedKey = "done",
    ) -> None:
        super().__init__(in_keys=[], out_keys=[])
        self.observation_dim = check_positive_int("observation_dim", observation_dim)
        self.achieved = check_indices("achieved", achieved, observation_dim)
        self.desired = check_indices("desired", desired, observation_dim)
        if len(self.achieved) != len(self.desired) or set(self.achieved) & set(self.desired):
            raise ValueError(
                "achieved and desired goal must have the same width and different places in "
                f"the observation, got achieved={self.achieved} and desired={self.desired}"
            )
        check_callable("reward_func", reward_func)
        self.reward_func = reward_func
        self.observation_key = check_key("observation_key", observation_key)
        self.next_observation_key = unravel_key(("next", observation_key))
        self.next_reward_key = unravel_key(("next", check_key("reward_key", reward_key)))
        self.next_done_key = unravel_key(("next", check_key("done_key", done_key)))

    @property
    def added_keys(self) -> list[NestedKey]:
        """The entries that are added to stored rows."""
        return [self.goal_key, self.reached_key, self.end_key]

    @property
    def relabelled_keys(self) -> list[NestedKey]:
        """The entries that change in relabelled rows."""
        keys = self.observation_key, self.next_observation_key, self.next_reward_key
        return [*keys, self.goal_key]

    def make_buffer(self, **options: Any) -> HERReplayBuffer:
        """Return a buffer that relabels.

        Args:
            **options: Options of TorchRL's ``HERReplayBuffer``: ``storage``, ``batch_size``,
                ``her_ratio`` (0.8 of a batch by default), ``strategy`` (``"future"``) and others.

        Raises:
            TypeError: A storage of anything but tensors, which is TorchRL's default. ValueError: A
                storage of several axes.
        """
        storage: Any = options.get("storage")
        hint = "pass storage=LazyTensorStorage(n)"
        check_instance("storage", storage, TensorStorage, hint=hint)
        if storage.ndim != 1:
            raise ValueError(f"storage has ndim={storage.ndim}, but rows are stored [N]; {hint}")
        return _HindsightBuffer(
            self.relabel,
            goal_key=self.goal_key,
            achieved_goal_key=self.reached_key,
            reward_key=self.next_reward_key,
            end_key=self.end_key,
            transform=self,
            **options,
        )

    def relabel(self, tensordict: TensorDictBase) -> Tensor:
        """Write ``"goal"`` into the observations of ``[N]``; return the rewards ``[N, 1]``."""
        goal = tensordict.get(self.goal_key)
        for key in (self.observation_key, self.next_observation_key):
            tensordict.get(key)[..., self.desired] = goal
        achieved = tensordict.get(self.next_observation_key)[..., self.achieved]
        reward = self.reward_func(achieved, goal)
        before = tensordict.get(self.next_reward_key)
        if not isinstance(reward, Tensor) or reward.numel() != before.numel():
            got = tuple(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
            raise ValueError(f"reward_func gave {got} for {len(goal)} rows, expected [N] or [N, 1]")
        if reward.is_floating_point() and not before.is_floating_point():
            raise ValueError(
                f"reward_func gave {reward.dtype}, but rewards are stored as {before.dtype}, which "
                "would cut them off; store them as floats"
            )
        return reward.reshape(before.shape).to(before.dtype)

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        hint = "store what a collector yields, or name another key (observation_key=, ...)"
        now, after, _, done = (
            require(tensordict, key, reader="RelabelGoals", hint=hint)
            for key in (
                *(self.observation_key, self.next_observation_key),
                *(self.next_reward_key, self.next_done_key),
            )
        )
        if tensordict.ndim != 1 or now.ndim != 2 or now.shape[-1] != self.observation_dim:
            raise ValueError(
                f"rows to relabel must be [N] with observations of {self.observation_dim}, got "
                f"{tuple(tensordict.shape)} with {tuple(now.shape)}; store data.reshape(-1), and "
                "give RelabelGoals the width of the joined observation"
            )
        goal, own = now[..., self.desired], tensordict.get(self.goal_key, None)
        if own is not None and (own.shape != goal.shape or not bool((own == goal).all())):
            raise ValueError(
                f"the rows have an entry {self.goal_key!r} that is not the desired goal in the "
                "observation, which is stored under this name; leave it out, or rename it"
            )
        ends = torch.ones((len(now), 1), dtype=torch.bool, device=now.device)
        done = done.unsqueeze(-1) if done.ndim == 1 else done.flatten(1)
        ends[:-1] = done.any(-1, keepdim=True)[:-1]
        ends[:-1] |= (after[:-1] != now[1:]).any(-1, keepdim=True)
        tensordict.set(self.goal_key, goal)
        tensordict.set(self.reached_key, after[..., self.achieved])
        return tensordict.set(self.end_key, ends)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the sample unchanged: the buffer relabels it afterwards."""
        return tensordict

    def _reset(self, tensordict: Any, tensordict_reset: Any) -> Any:
        raise TypeError("RelabelGoals is for replay buffers; build one by its make_buffer()")


class _HindsightBuffer(HERReplayBuffer):
    """Finds the ends of episodes at every sample, and refuses transforms of relabelled entries.

    TorchRL's buffer caches the ends until it notices new rows. It does not notice them once the
    storage is full, nor when other rows take the same places: after loading, or when a level undoes
    a write. Transforms run before relabelling, which would not know their scales.
    """

    def append_transform(self, transform: Any, *, invert: bool = False) -> ReplayBuffer:
        """Append a transform; ``ValueError`` if it changes relabelled entries."""
        return super().append_transform(self._checked_transform(transform), invert=invert)

    def insert_transform(self, index: int, transform: Any, *, invert: bool = False) -> ReplayBuffer:
        """Insert a transform; ``ValueError`` if it changes relabelled entries."""
        return super().insert_transform(index, self._checked_transform(transform), invert=invert)

    def _checked_transform(self, transform: Any) -> Any:
        written = {unravel_key(key) for key in getattr(transform, "out_keys", None) or ()}
        goals = next(each for each in self.transform if isinstance(each, RelabelGoals))
        if both := written & set(goals.relabelled_keys):
            raise ValueError(
                f"{type(transform).__name__} writes {sorted(map(str, both))}, which are relabelled "
                "after it, in their stored scale: put it into the environment (and into "
                "reward_func), or apply it to sampled data"
            )
        return transform

    def _get_episode_ends(self, storage: Storage) -> Tensor:
        ends = storage[:].get(self.end_key).reshape(-1).clone()
        ends[-1] = True  # an episode may continue at the start of the ring, but its goals do not
        return ends.nonzero()[:, 0].cpu()
