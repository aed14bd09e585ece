"""Goal observations as one vector."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import CatTensors, EnvBase, Transform

from layeredrl_torchrl._checks import check_keys

__all__ = ["JoinGoals"]


class JoinGoals(CatTensors):
    """Joins the entries of a goal environment's observation, and reports their places.

    In an environment, ``state_dims`` and ``context_dims`` are the arguments for
    ``FixedEncoderNet``. It is TorchRL's ``CatTensors`` with the keys in the given order, plus its
    inverse: stateless environments, which read their observation at each step, get the single
    entries back.

    >>> parts = {"observation": torch.zeros(3), "achieved_goal": torch.ones(2)}
    >>> td = TensorDict(parts | {"desired_goal": torch.full((2,), 2.0)})
    >>> JoinGoals()(td)["observation"]
    tensor([0., 0., 0., 1., 1., 2., 2.])

    Args:
        state_keys: Entries that change in an episode.
        context_keys: Entries that do not change, usually the goal.
        out_key: Key of the vector ``[*B, obs]``.
        del_keys: Whether to drop the joined entries.

    Raises:
        ValueError: No state key, or a repeated key; at a reset, an entry that is not a vector.
            TypeError: Keys that are not a list.
    """

    def __init__(
        self,
        state_keys: Sequence[NestedKey] = ("observation", "achieved_goal"),
        context_keys: Sequence[NestedKey] = ("desired_goal",),
        out_key: NestedKey = "observation",
        *,
        del_keys: bool = True,
    ) -> None:
        state_keys = check_keys("state_keys", state_keys)
        context_keys = check_keys("context_keys", context_keys)
        keys = [*state_keys, *context_keys]
        if not state_keys or len(set(keys)) < len(keys):
            raise ValueError(
                f"JoinGoals needs at least one state key, and each key once; got "
                f"state_keys={state_keys} and context_keys={context_keys}"
            )
        super().__init__(keys, out_key, del_keys=del_keys, sort=False)
        self.state_keys, self.context_keys = state_keys, context_keys
        # Where _inv_call splits; looked up once in an environment.
        self._parts: dict[NestedKey, tuple[range, torch.dtype]] | None = None

    @property
    def index_ranges(self) -> dict[NestedKey, range]:
        """The place of each entry in the vector.

        Raises:
            RuntimeError: If this transform is not part of an environment yet.
            KeyError: If that environment lacks one of the entries.
        """
        if self.parent is None:
            raise RuntimeError(
                "JoinGoals needs an environment to know its sizes: TransformedEnv(env, JoinGoals())"
            )
        spec = self.parent.observation_spec
        ranges, start = {}, 0
        for key in self.in_keys:
            if key not in spec.keys(True, True):
                known = sorted(map(str, spec.keys(True, True)))
                raise KeyError(f"the environment observes {known}, but JoinGoals joins {key!r}")
            width = spec[key].shape[-1]
            ranges[key] = range(start, start + width)
            start += width
        return ranges

    @property
    def state_dims(self) -> list[int]:
        """Indices of the state in the vector, for ``FixedEncoderNet(latent_state_dims=)``."""
        ranges = self.index_ranges
        return [dim for key in self.state_keys for dim in ranges[key]]

    @property
    def context_dims(self) -> list[int]:
        """Indices of the context, for ``FixedEncoderNet(context_dims=)``."""
        ranges = self.index_ranges
        return [dim for key in self.context_keys for dim in ranges[key]]

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Split the vector before a step, for environments that read its entries."""
        joined = tensordict.get(self.out_keys[0], None)
        if self.parent is None or joined is None:
            return tensordict
        if self._parts is None:
            spec = self.parent.observation_spec
            self._parts = {key: (at, spec[key].dtype) for key, at in self.index_ranges.items()}
        if joined.shape[-1] == sum(len(at) for at, _ in self._parts.values()):
            for key, (at, dtype) in self._parts.items():
                tensordict.set(key, joined[..., at.start : at.stop].to(dtype))
        return tensordict

    def _reset(
        self, tensordict: TensorDictBase | None, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        n_axes = tensordict_reset.ndim + 1
        shapes = {k: v.shape for k in self.in_keys if (v := tensordict_reset.get(k)) is not None}
        if wrong := {str(k): tuple(v) for k, v in shapes.items() if len(v) != n_axes}:
            raise ValueError(
                f"JoinGoals joins vectors [*B, n], got the shapes {wrong} where B is "
                f"{tuple(tensordict_reset.shape)}; flatten pictures (TorchRL's FlattenObservation) "
                "and unsqueeze single numbers (UnsqueezeTransform) or make them one-hot"
            )
        return super()._reset(tensordict, tensordict_reset)

    def set_container(self, container: Transform | EnvBase) -> None:
        """Set the container, and forget the sizes of the entries in the previous one."""
        self._parts = None
        super().set_container(container)

    def _joined_dtype(self, spec: Composite) -> torch.dtype:
        """Return the dtype of the vector, to which ``torch.cat`` promotes the entries."""
        return reduce(torch.promote_types, (spec[key].dtype for key in self.in_keys))

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Declare the vector; TorchRL would give it the dtype of one of its entries."""
        found = set(self.in_keys) <= set(observation_spec.keys(True, True))
        dtype = self._joined_dtype(observation_spec) if found else None
        out = super().transform_observation_spec(observation_spec)
        if dtype is not None:
            out[self.out_keys[0]] = out[self.out_keys[0]].to(dtype)
        return out

    def transform_input_spec(self, input_spec: Composite) -> Composite:
        """Declare the vector as an input if the environment declares one of its entries."""
        state_spec = input_spec["full_state_spec"]
        read = [] if state_spec is None else [k for k in self.in_keys if k in state_spec.keys(True)]
        if read:
            ranges, first = self.index_ranges, self.parent.observation_spec[self.in_keys[0]]
            width = sum(map(len, ranges.values()))
            dtype = self._joined_dtype(self.parent.observation_spec)
            for key in read if self._del_keys else []:
                del state_spec[key]
            state_spec[self.out_keys[0]] = Unbounded(
                (*first.shape[:-1], width), dtype=dtype, device=first.device
            )
        return input_spec
