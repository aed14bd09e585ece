"""Transforms of the scale of rewards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from tensordict import NestedKey
from torch import Tensor
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded
from torchrl.envs import Transform

from layeredrl_torchrl._checks import check_keys, check_number

__all__ = ["AffineReward", "LogReward"]


class _MappedReward(Transform):
    """Applies a monotone function to the reward, and to the bounds of its spec."""

    def __init__(
        self, in_keys: Sequence[NestedKey] | None, out_keys: Sequence[NestedKey] | None
    ) -> None:
        in_keys = ["reward"] if in_keys is None else check_keys("in_keys", in_keys)
        out_keys = in_keys if out_keys is None else check_keys("out_keys", out_keys)
        if len(in_keys) != len(out_keys):
            raise ValueError(f"in_keys={in_keys} need as many out_keys, got {out_keys}")
        super().__init__(in_keys=in_keys, out_keys=out_keys)

    @abstractmethod
    def _map(self, reward: Tensor) -> Tensor:
        """Map rewards of any shape."""

    def _apply_transform(self, reward: Tensor) -> Tensor:
        return self._map(reward)

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """Map the bounds of bounded rewards; other rewards are unbounded."""
        for in_key, out_key in zip(self.in_keys, self.out_keys, strict=True):
            if in_key not in reward_spec.keys(True, True):
                found = sorted(map(str, reward_spec.keys(True, True)))
                raise KeyError(
                    f"{type(self).__name__} reads {in_key!r}, but the environment rewards by "
                    f"{found}; name one with in_keys="
                )
            reward_spec[out_key] = self._map_spec(reward_spec[in_key].clone())
        return reward_spec

    def _map_spec(self, spec: TensorSpec) -> TensorSpec:
        if not isinstance(spec, Bounded):
            # Integers and flags become floats.
            return Unbounded(spec.shape, dtype=self._map(spec.zero()).dtype, device=spec.device)
        ends = self._map(spec.space.low), self._map(spec.space.high)
        low, high = torch.minimum(*ends), torch.maximum(*ends)
        return Bounded(low, high, spec.shape, dtype=low.dtype, device=spec.device)


class AffineReward(_MappedReward):
    """``reward -> scale * reward + offset``.

    TorchRL's ``RewardScaling`` raises any scale below 1e-6 to 1e-6, so it cannot turn costs into
    rewards, and it refuses bounded rewards.

    >>> transform = AffineReward(scale=-1.0, offset=10.0, in_keys=[("next", "reward")])
    >>> transform(TensorDict({"next": {"reward": torch.tensor([4.0])}}))["next", "reward"]
    tensor([6.])

    Args:
        scale: Any number but 0; negative to turn a cost into a reward.
        offset: Added after scaling.
        in_keys: Keys of the rewards, ``["reward"]`` by default; ``[("next", "reward")]`` in a
            replay buffer.
        out_keys: Keys of the results, ``in_keys`` by default.

    Raises:
        ValueError: A scale of 0, or numbers that are not finite; another number of ``out_keys``.
        TypeError: Keys that are not a list. KeyError: An environment without such a reward.
    """

    def __init__(
        self,
        scale: float = 1.0,
        offset: float = 0.0,
        *,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        _check_affine(scale, offset)
        super().__init__(in_keys, out_keys)
        self.scale, self.offset = float(scale), float(offset)

    def _map(self, reward: Tensor) -> Tensor:
        return self.scale * reward + self.offset


class LogReward(_MappedReward):
    """``reward -> scale * log(max(reward, floor)) + offset``, for rewards of at least 0.

    It turns a reward ``exp(-distance)`` back into ``-distance``, which still varies at large
    distances.

    >>> transform = LogReward(floor=1e-3, in_keys=[("next", "reward")])
    >>> transform(TensorDict({"next": {"reward": torch.tensor([-2.0]).exp()}}))["next", "reward"]
    tensor([-2.])

    Args:
        floor: Smaller rewards are raised to this, since the logarithm of 0 is not finite. Choose it
            below all rewards that should stay distinct.
        scale: Factor of the logarithm; not 0.
        offset: Added after scaling. ``LogReward(math.exp(-30), scale=1 / 50, offset=0.6)`` maps
            ``exp(-30)`` to 0 and ``exp(20)`` to 1.
        in_keys: As for :class:`AffineReward`.
        out_keys: Likewise.

    Raises:
        ValueError: A floor that is not above 0; a scale or offset as for :class:`AffineReward`;
            when called, a negative reward.
    """

    def __init__(
        self,
        floor: float,
        scale: float = 1.0,
        offset: float = 0.0,
        *,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        check_number("floor", floor, 0.0, open_low=True)
        _check_affine(scale, offset)
        super().__init__(in_keys, out_keys)
        self.floor, self.scale, self.offset = float(floor), float(scale), float(offset)

    def _map(self, reward: Tensor) -> Tensor:
        # In float16 the floor may be 0.
        wide = reward.float() if reward.dtype == torch.float16 else reward
        found = self.scale * wide.clamp_min(self.floor).log() + self.offset
        return found.to(reward.dtype) if wide is not reward else found

    def _apply_transform(self, reward: Tensor) -> Tensor:
        if bool((reward < 0.0).any()):
            raise ValueError(
                f"LogReward got a reward of {reward.min().item():.6g}; the logarithm needs rewards "
                "of at least 0: shift them first with AffineReward(offset=...)"
            )
        return self._map(reward)


def _check_affine(scale: float, offset: float) -> None:
    check_number("offset", offset)
    if check_number("scale", scale) == 0.0:
        raise ValueError("scale must not be 0; every reward would be the same")
