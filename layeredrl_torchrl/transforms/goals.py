"""Goal observations as one vector."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import NestedKey
from torchrl.envs import CatTensors

__all__ = ["JoinGoals"]


class JoinGoals(CatTensors):
    """Joins the entries of a goal environment's observation, and knows where each has gone.

    In an environment, ``state_dims`` and ``context_dims`` are what ``FixedEncoderNet`` takes.
    It is TorchRL's ``CatTensors`` with the keys in the order given here.

    >>> parts = {"observation": torch.zeros(3), "achieved_goal": torch.ones(2)}
    >>> td = TensorDict(parts | {"desired_goal": torch.full((2,), 2.0)})
    >>> JoinGoals()(td)["observation"]
    tensor([0., 0., 0., 1., 1., 2., 2.])

    Args:
        state_keys: Entries that change in an episode.
        context_keys: Entries that do not, as a rule the goal.
        out_key: Where the vector ``[*B, obs]`` is written.
        del_keys: Whether the entries that were joined are dropped.

    Raises:
        ValueError: No state key, or a key given twice.
    """

    def __init__(
        self,
        state_keys: Sequence[NestedKey] = ("observation", "achieved_goal"),
        context_keys: Sequence[NestedKey] = ("desired_goal",),
        out_key: NestedKey = "observation",
        *,
        del_keys: bool = True,
    ) -> None:
        keys = [*state_keys, *context_keys]
        if not state_keys or len(set(keys)) < len(keys):
            raise ValueError(
                f"JoinGoals needs at least one state key, and each key once; got "
                f"state_keys={list(state_keys)} and context_keys={list(context_keys)}"
            )
        super().__init__(keys, out_key, del_keys=del_keys, sort=False)
        self.state_keys, self.context_keys = list(state_keys), list(context_keys)

    @property
    def index_ranges(self) -> dict[NestedKey, range]:
        """The place of each entry in the vector.

        Raises:
            RuntimeError: If this transform is not part of an environment yet.
            KeyError: If that environment lacks one of the entries.
        """
        if self.parent is None:
            raise RuntimeError(
                "JoinGoals knows the sizes once it is part of an environment: "
                "TransformedEnv(env, JoinGoals())"
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
