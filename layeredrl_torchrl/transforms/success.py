"""Success of episodes, and the success rate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import Transform

from layeredrl_torchrl._checks import check_keys, check_positive_int

__all__ = ["SuccessRate"]


class SuccessRate(Transform):
    """Writes whether the episode has succeeded so far, and the share of successful episodes.

    ====================  ======================================================================
    written by default    ``[*B, 1]`` each, at resets and steps
    ====================  ======================================================================
    ``episode_success``   bool: ``success_key`` held at a step of this episode
    ``success_rate``      share of the last ``window`` finished episodes, of all instances, that
                          succeeded; 0 before the first has finished
    ``episode_count``     int64: how many have finished, of all instances
    ====================  ======================================================================

    ``episode_success`` is passed on in the TensorDict. The other two outlast episodes, but
    TorchRL's resets clear every entry that they do not write. So they are statistics of this
    object, as in ``VecNormV2``: its ``state_dict`` has them, and each worker process has its own.
    :meth:`clear` resets them (for instance after ``check_env_specs``).

    An episode counts when ``done_key`` becomes true, so put this transform after those that end
    episodes (``StepCounter``, ``FlipTermination``).

    >>> from torchrl.envs import StepCounter
    >>> env = get_task("PointMaze-U").make().append_transform(StepCounter(5))
    >>> env = env.append_transform(SuccessRate())
    >>> env.rollout(12, break_when_any_done=False)["next", "episode_count"][-1]
    tensor([2])

    Args:
        success_key: Entry that is nonzero where the goal is reached, ``[*B, 1]``.
        window: Number of episodes in the rate.
        done_key: Entry that is true where an episode has ended, with the same shape.
        out_keys: The three keys to write, in the order of the table.

    Raises:
        TypeError, ValueError: A window that is not an integer of at least 1; not exactly three
            ``out_keys``; different shapes of success and ``done_key``.
        KeyError: An environment without ``success_key`` or ``done_key``.
    """

    outcomes: Tensor  # [window] bool, a ring: episode e is at e % window
    count: Tensor  # [] int64

    def __init__(
        self,
        success_key: NestedKey = "success",
        window: int = 100,
        *,
        done_key: NestedKey = "done",
        out_keys: Sequence[NestedKey] = ("episode_success", "success_rate", "episode_count"),
    ) -> None:
        check_positive_int("window", window)
        out_keys = check_keys("out_keys", out_keys)
        if len(out_keys) != 3 or len(set(out_keys)) < 3:
            raise ValueError(
                f"out_keys must be three keys, for success of the episode, rate and count; got "
                f"{out_keys}"
            )
        super().__init__(in_keys=[success_key], out_keys=out_keys)
        self.done_key = done_key
        self.register_buffer("outcomes", torch.zeros(window, dtype=torch.bool))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def clear(self) -> None:
        """Forget all finished episodes."""
        self.outcomes.zero_()
        self.count.zero_()

    @property
    def rate(self) -> Tensor:
        """The success rate over the window, ``[]``; 0 before the first episode has finished."""
        n = min(int(self.count), len(self.outcomes))
        return self.outcomes[:n].sum() / max(n, 1)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        episode = self.out_keys[0]
        success = next_tensordict.get(self.in_keys[0]).bool() | tensordict.get(episode)
        finished = success[next_tensordict.get(self.done_key)].to(self.outcomes.device)
        if finished.numel():
            # More instances than the window holds may finish at once; keep the last ones.
            self.count += len(finished)
            finished = finished[-len(self.outcomes) :]
            first = self.count - len(finished)
            places = first + torch.arange(len(finished), device=first.device)
            self.outcomes[places % len(self.outcomes)] = finished
        return self._write(next_tensordict.set(episode, success))

    def _reset(
        self, tensordict: TensorDictBase | None, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        # Write for all instances; TorchRL restores those that are not reset.
        self._check_key(tensordict_reset)
        like = tensordict_reset.get(self.in_keys[0])
        tensordict_reset.set(self.out_keys[0], torch.zeros_like(like, dtype=torch.bool))
        return self._write(tensordict_reset)

    def _write(self, tensordict: TensorDictBase) -> TensorDictBase:
        episode, rate, count = self.out_keys
        like = tensordict.get(episode)
        tensordict.set(rate, self.rate.to(like.device).expand(like.shape).clone())
        return tensordict.set(count, self.count.to(like.device).expand(like.shape).clone())

    def _check_key(self, found: Composite | TensorDictBase) -> None:
        if self.in_keys[0] not in found.keys(True, True):
            raise KeyError(
                f"SuccessRate reads {self.in_keys[0]!r}, but the environment gives "
                f"{sorted(map(str, found.keys(True, True)))}; read it with SuccessReader, or name "
                "another key with success_key="
            )

    def _check_done(self, shape: torch.Size) -> None:
        """Raise unless an episode ends where it may succeed."""
        done = self.parent.full_done_spec
        if self.done_key not in done.keys(True, True):
            raise KeyError(
                f"SuccessRate counts episodes by {self.done_key!r}, but the environment ends them "
                f"by {sorted(map(str, done.keys(True, True)))}; name one with done_key="
            )
        if done[self.done_key].shape != shape:
            raise ValueError(
                f"{self.in_keys[0]!r} has shape {tuple(shape)}, but {self.done_key!r} has "
                f"{tuple(done[self.done_key].shape)}; success must be one flag for each end of an "
                "episode: name others with success_key= or done_key="
            )

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Add the three entries."""
        self._check_key(observation_spec)
        success = observation_spec[self.in_keys[0]]
        shape, device = success.shape, success.device
        self._check_done(shape)
        episode, rate, count = self.out_keys
        observation_spec[episode] = Binary(1, shape, dtype=torch.bool, device=device)
        observation_spec[rate] = Bounded(0.0, 1.0, shape, dtype=torch.float32, device=device)
        observation_spec[count] = Unbounded(shape, dtype=torch.int64, device=device)
        return observation_spec

    def transform_input_spec(self, input_spec: Composite) -> Composite:
        """Declare the success so far as an input, so that batched environments pass it on."""
        parent = self.parent.observation_spec
        self._check_key(parent)
        success = parent[self.in_keys[0]]
        spec = Binary(1, success.shape, dtype=torch.bool, device=success.device)
        state_spec = input_spec["full_state_spec"]
        if state_spec is None:
            state_spec = Composite(shape=input_spec.shape, device=input_spec.device)
        key = self.out_keys[0]
        group = key[:-1] if isinstance(key, tuple) else ()
        if group and group in parent.keys(True) and group not in state_spec.keys(True):
            # A new group would not have the shape of the environment's.
            state_spec[group] = Composite(shape=parent[group].shape, device=parent[group].device)
        state_spec[key] = spec
        input_spec["full_state_spec"] = state_spec
        return input_spec

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Raise ``RuntimeError``: only environments have episodes."""
        raise RuntimeError("SuccessRate works in an environment only, not on sampled data")
