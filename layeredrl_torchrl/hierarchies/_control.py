"""Build the inputs of levels, and check their outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.data import Composite, TensorSpec

from layeredrl_torchrl._checks import check_finite, require
from layeredrl_torchrl.hierarchies._memory import together
from layeredrl_torchrl.levels import Level

__all__ = ["Answers", "ask", "hand", "refuse_interruptions"]


class Answers:
    """Reads the entries that a called level wrote, if they fit the specs.

    Otherwise shapes that broadcast, and floats in place of choices, would go unnoticed.

    Args:
        level: A level after ``setup``.
        memory: Specs of its memory.
    """

    def __init__(self, level: Level, memory: Composite) -> None:
        self.level = level
        record = level.record
        self._record = {key: record[key] for key in record.keys(True, True)}
        self._memory = list(memory.keys(True, True))
        self._following = {unravel_key(("next", key)): memory[key] for key in self._memory}

    def read(self, handed: TensorDictBase, key: NestedKey) -> Tensor:
        """Return an entry of the record, ``[*B]``.

        Raises:
            KeyError: It is missing. TypeError: Another kind of numbers. ValueError: Another shape.
        """
        return self._checked_entry(handed, key, self._record[key])

    def action(self, handed: TensorDictBase) -> Tensor:
        """Return the action; raise as :meth:`read`, and ``ValueError`` if it is not finite."""
        key = self.level.action_key
        action = self._checked_entry(handed, key, self.level.action_spec)
        if action.is_floating_point():
            hint = "repair the level: its action goes to the level below or to the environment"
            check_finite(f"{key!r}, which {self.level.name} wrote,", action, hint=hint)
        return action

    def memory(self, handed: TensorDictBase) -> TensorDictBase:
        """Return the memory for the next step; raise as :meth:`read`."""
        for key, spec in self._following.items():
            self._checked_entry(handed, key, spec)
        following: TensorDictBase = handed.get("next")
        return following.select(*self._memory)

    def _checked_entry(self, handed: TensorDictBase, key: NestedKey, spec: TensorSpec) -> Tensor:
        name = self.level.name
        hint = f"{name} did not write it"
        value = require(handed, key, reader=f"Hierarchy, after {name},", hint=hint)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} wrote {key!r}, a {type(value).__name__}, expected a torch.Tensor"
            )
        expected, dtype = (*handed.batch_size, *spec.shape), spec.dtype
        if value.shape != expected:
            raise ValueError(
                f"{name} wrote {key!r} of shape {tuple(value.shape)}, expected {expected}: the "
                f"batch shape of the TensorDict that it is called with, then {tuple(spec.shape)} "
                f"of its {type(spec).__name__} spec"
            )
        if value.is_complex() or (value.is_floating_point() and not dtype.is_floating_point):
            raise TypeError(f"{name} wrote {key!r} in {value.dtype}, expected {dtype} of its spec")
        return value


def hand(level: Level, seen: Tensor, given: Tensor | None, n_actions: Tensor) -> TensorDict:
    """Return the TensorDict with which a level is called.

    Args:
        level: The level.
        seen: Its part of the observation, ``[*B, obs_i]``.
        given: Its input; ``None`` for the highest level.
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


def refuse_interruptions(levels: Sequence[Level]) -> None:
    """Raise ``ValueError`` if a level is interrupted now, which makes its inputs end early."""
    for level in levels:
        if level.limit != level.duration:
            raise ValueError(
                f"{level.name} has interrupt_after={level.interrupt_after} in evaluation, where "
                f"inputs end before duration={level.duration}, but learning would take them for "
                "complete ones; learn in training mode (.train()), from rows that were collected "
                "in it"
            )
