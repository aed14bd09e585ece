"""Read from gymnasium's ``info`` whether the goal is reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.data import Binary, Composite, TensorSpec
from torchrl.envs.gym_like import BaseInfoDictReader

__all__ = ["SuccessReader"]


class SuccessReader(BaseInfoDictReader):
    """Writes ``info[key]`` as ``"success" [*B, 1]``, bool, at resets and steps.

    TorchRL's own readers take only arrays, but gymnasium's environments report a Python bool (or a
    float of 0 or 1, like gymnasium-robotics' Fetch tasks). A vectorised environment reports an
    array, and a mask of the environments that reported.

    Use it as ``env.set_info_dict_reader(SuccessReader(batch_size=env.batch_size))``.

    >>> SuccessReader()({"success": True}, TensorDict({"reward": torch.zeros(1)}))["success"]
    tensor([True])

    Args:
        key: Key in ``info``.
        out_key: Key to write.
        batch_size: Batch size of the environment, ``[]`` or ``[n]``.

    Raises:
        KeyError: ``info`` without ``key`` after a step. At a reset it may be missing: nothing is
            reached yet.
        ValueError: A value that is neither true nor false.
    """

    def __init__(
        self, key: str = "success", out_key: str = "success", batch_size: Sequence[int] = ()
    ) -> None:
        self.key = key
        self.out_key = out_key
        self.batch_size = torch.Size(batch_size)

    @property
    def info_spec(self) -> dict[str, TensorSpec]:
        """Spec of the written entry."""
        leaf = Binary(1, (*self.batch_size, 1), dtype=torch.bool)
        return Composite({self.out_key: leaf}, shape=self.batch_size)

    def reset(self) -> None:
        """Do nothing: there is no state between steps."""

    def __call__(self, info_dict: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        """Add ``out_key`` to the environment's output."""
        value = np.asarray(info_dict.get(self.key, False))
        spoke = np.asarray(info_dict.get(f"_{self.key}", self.key in info_dict))
        after_step = "reward" in tensordict.keys()
        if after_step and not spoke.all():
            raise KeyError(
                f"info has no {self.key!r} after a step, it holds {sorted(map(str, info_dict))}; "
                "name the environment's key with SuccessReader(key=...)"
            )
        if not np.isin(value, (0, 1)).all():
            raise ValueError(f"info[{self.key!r}] is {value!r}, expected true or false")
        success = np.broadcast_to(value.astype(bool), self.batch_size)
        tensordict.set(self.out_key, torch.tensor(success).unsqueeze(-1))
        return tensordict
