"""Make the inputs of levels, and check their answers."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from layeredrl_torchrl.hierarchies._memory import together
from layeredrl_torchrl.levels import Level

__all__ = ["ask", "hand"]


def hand(level: Level, seen: Tensor, given: Tensor | None, n_actions: Tensor) -> TensorDict:
    """Return the TensorDict that a level is called with.

    Args:
        level: The level.
        seen: Its part of the observation, ``[*B, obs_i]``.
        given: Its input; ``None`` for the highest.
        n_actions: Its actions on this input so far, ``[*B, 1]``.
    """
    batch = n_actions.shape[:-1]
    source = {level.observation_key: seen, "n_actions": n_actions}
    if given is not None:
        source[level.input_key] = given
    if all(isinstance(key, str) for key in source):
        return together(source, batch, None)
    return TensorDict(source, batch)


def ask(level: Level, handed: TensorDictBase) -> Tensor:
    """Ask ``level`` whether it hands back control, bool ``[*B, 1]``."""
    done = level.hands_back(handed)
    expected = (*handed.batch_size, 1)
    if not isinstance(done, Tensor) or done.dtype != torch.bool or done.shape != expected:
        got = f"{done.dtype} {tuple(done.shape)}" if isinstance(done, Tensor) else repr(done)
        raise ValueError(
            f"{level.name}.hands_back gave {got}, expected a torch.bool {tuple(expected)}"
        )
    return done
