"""The state that a hierarchy passes from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchrl.data import Composite, TensorSpec, Unbounded
from torchrl.envs import TensorDictPrimer

from layeredrl_torchrl.hierarchies._due import Due
from layeredrl_torchrl.levels import Level

__all__ = ["MEMORY", "STATE", "HierarchyPrimer", "Layout", "memory_of", "together"]

#: The key of the state, one tensor ``[*B, n]``.
STATE = "hierarchy"
#: The key of the levels' memories, by position.
MEMORY = "hierarchy_memory"


def memory_of(level: Level) -> Composite:
    """Return the specs of a level's own memory.

    Raises:
        ValueError: A memory that does not start from zeros.
    """
    primer = level.make_tensordict_primer()
    starts = primer.default_value
    values = tree_leaves(starts.to_dict() if isinstance(starts, TensorDictBase) else starts)
    if primer.random or any(callable(v) or bool(torch.as_tensor(v).any()) for v in values):
        raise ValueError(
            f"{level.name}.make_tensordict_primer() starts from {starts}, but memory in a "
            "hierarchy starts from zeros; let zeros stand for an empty memory"
        )
    return primer.primers


def together(
    entries: Mapping[str, Any], batch: torch.Size, device: torch.device | None
) -> TensorDict:
    """Make a TensorDict ``[*B]`` of matching entries, without checks.

    A hierarchy makes several at every environment step, and checks would take most of the time.
    """
    return TensorDict._new_unsafe(dict(entries), batch, device=device)


@dataclass(frozen=True)
class _Field:
    """Columns ``start`` to ``stop`` of the state, for values of ``shape`` and ``dtype``."""

    start: int
    stop: int
    shape: torch.Size
    dtype: torch.dtype


class Layout:
    """The layout of all levels' state in one tensor ``[*B, n]``.

    The cost of a TensorDict grows with its number of entries, which every environment step touches
    many times, so the state is one entry. It is float64, which represents every float32, bool and
    integer up to 2**53. Each level except the lowest holds, from one of its actions to the next:

    ===============  =====================================================================
    ``"action"``       its action
    ``"observation"``  the whole observation it acted on
    ``"n_actions"``    its actions on its input before this one
    ===============  =====================================================================

    and every level holds its ``record``. The first columns are the environment steps of each
    action, including the current one; then come the rewards of each action so far. So the steps of
    the action of the last but one level count the actions of the lowest level on its input. A 0
    there, before a step, means that the instance was reset.

    (``narrow`` selects columns in a third of the time of indexing.)

    Args:
        levels: Highest first.
        observation: Spec of one observation.
    """

    def __init__(self, levels: Sequence[Level], observation: TensorSpec) -> None:
        self.n_held = len(levels) - 1
        self._n_steps = max(self.n_held, 1)
        self.fields: list[dict[NestedKey, _Field]] = []
        self._blocks: list[tuple[int, int]] = []
        self.width = self._n_steps + self.n_held
        for level in levels:
            specs = {key: level.record[key] for key in level.record.keys(True, True)}
            if len(self.fields) < self.n_held:
                specs |= {
                    "action": level.action_spec,
                    "observation": observation,
                    "n_actions": Unbounded((1,), dtype=torch.int64),
                }
            start = self.width
            self.fields.append({key: self._add(spec) for key, spec in specs.items()})
            self._blocks.append((start, self.width))

    def _add(self, spec: TensorSpec) -> _Field:
        start = self.width
        self.width = start + spec.shape.numel()
        return _Field(start, self.width, spec.shape, spec.dtype)

    @property
    def spec(self) -> TensorSpec:
        """Spec of the state of one instance."""
        return Unbounded((self.width,), dtype=torch.float64)

    def is_reset(self, held: Tensor) -> Tensor:
        """Return whether an instance was reset before this step, bool ``[*B, 1]``."""
        return held.narrow(-1, self._n_steps - 1, 1) == 0

    def steps(self, held: Tensor, i: int) -> Tensor:
        """Return the environment steps under the action of level ``i`` so far, ``[*B, 1]``."""
        return held.narrow(-1, i, 1).long()

    def rewards(self, held: Tensor, i: int) -> Tensor:
        """Return the rewards of the action of level ``i`` so far, float64 ``[*B, 1]``."""
        return held.narrow(-1, self._n_steps + i, 1)

    def get(self, held: Tensor, i: int, key: NestedKey) -> Tensor:
        """Return the entry ``key`` of level ``i``, ``[*B, ...]``."""
        field = self.fields[i][key]
        values = held.narrow(-1, field.start, field.stop - field.start).to(field.dtype)
        if len(field.shape) == 1:
            return values
        return values.reshape((*values.shape[:-1], *field.shape))

    def n_taken(self, held: Tensor, i: int) -> Tensor:
        """Return the number of actions of level ``i`` on its input so far, ``[*B, 1]``."""
        if i == self.n_held:
            return self.steps(held, max(i - 1, 0))
        return self.get(held, i, "n_actions") + 1

    def has_taken(self, held: Tensor, i: int, n: int) -> Tensor:
        """Return whether :meth:`n_taken` is at least ``n``, bool ``[*B, 1]``."""
        if i == self.n_held:
            return held.narrow(-1, max(i - 1, 0), 1) >= n
        return held.narrow(-1, self.fields[i]["n_actions"].start, 1) >= n - 1

    def put(
        self, held: Tensor, i: int, values: Mapping[NestedKey, Tensor], due: Due | None = None
    ) -> None:
        """Replace all entries of level ``i``, in place.

        Args:
            held: A copy of the state.
            i: Which level.
            values: ``[*B, ...]``, or the values picked by ``due``.
            due: Which instances; all by default.
        """
        parts = []
        for key, field in self.fields[i].items():
            value = values[key]
            if len(field.shape) != 1:
                value = value.reshape((*value.shape[: value.ndim - len(field.shape)], -1))
            parts.append(value.double())
        if not parts:
            return
        start, stop = self._blocks[i]
        block = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        place = held.narrow(-1, start, stop - start)
        if due is None:
            place.copy_(block)
        else:
            due.write(place, block)

    def begin(self, held: Tensor, i: int, values: Mapping[NestedKey, Tensor], due: Due) -> None:
        """Begin a new action of level ``i``: :meth:`put` it, and reset its steps and rewards to 0.

        Args:
            held: A copy of the state.
            i: Which level.
            values: See :meth:`put`.
            due: Which instances.
        """
        self.put(held, i, values, due)
        for column in (i, self._n_steps + i):
            held.narrow(-1, column, 1).masked_fill_(due.mask, 0)

    def step(self, held: Tensor) -> None:
        """Count the current environment step in ``held``, a copy of the state."""
        held.narrow(-1, 0, self._n_steps).add_(1)

    def earn(self, held: Tensor, reward: Tensor) -> Tensor:
        """Return the state after a ``reward [*B, 1]``, without changing ``held``."""
        if not self.n_held:
            return held
        held = held.clone()
        held.narrow(-1, self._n_steps, self.n_held).add_(reward)
        return held


class HierarchyPrimer(TensorDictPrimer):
    """Passes on the state of a hierarchy, clears it at resets, and sums rewards per action.

    Args:
        carried: Specs of the state of one instance, and of the memories of the levels.
        layout: The layout of the state.
        reward_key: Key of the environment's reward.
    """

    def __init__(self, carried: Composite, layout: Layout, reward_key: NestedKey) -> None:
        super().__init__(carried, expand_specs=True)
        self.layout, self.reward_key = layout, reward_key
        self._has_memory = MEMORY in carried.keys()

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        held = next_tensordict.get(STATE, None)
        if held is None:  # another policy acted
            held = tensordict.get(STATE)
            if self._has_memory:
                next_tensordict.set(MEMORY, tensordict.get(MEMORY))
        reward = next_tensordict.get(self.reward_key)
        return next_tensordict.set(STATE, self.layout.earn(held, reward))
