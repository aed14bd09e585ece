"""The state that a hierarchy carries from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Composite, TensorSpec, Unbounded
from torchrl.envs import TensorDictPrimer

from layeredrl_torchrl.hierarchies._due import Due
from layeredrl_torchrl.levels import Level

__all__ = ["MEMORY", "HierarchyPrimer", "Layout", "Store", "memory_of", "together"]

MEMORY = "hierarchy"
#: The packed state: tensors ``[*B, n]`` by dtype.
Store = dict[str, Tensor]
_COUNTS = "int64"


def memory_of(level: Level) -> Composite:
    """Return the specs of a level's own memory.

    Raises:
        ValueError: The memory starts from other values than zeros.
    """
    primer = level.make_tensordict_primer()
    starts = primer.default_value
    if primer.random or callable(starts) or any(callable(v) or bool(v) for v in starts.values()):
        raise ValueError(
            f"{level.name}.make_tensordict_primer() starts from {starts}, but memory in a "
            "hierarchy starts from zeros; let zeros mean that it remembers nothing"
        )
    return primer.primers


def together(
    entries: Mapping[str, Any], batch: torch.Size, device: torch.device | None
) -> TensorDict:
    """Make a TensorDict ``[*B]`` of entries that are known to fit, without checks.

    A hierarchy makes several at every step of an environment, and checks would take most of the
    time.
    """
    return TensorDict._new_unsafe(dict(entries), batch, device=device)


@dataclass(frozen=True)
class _Field:
    """Columns ``start`` to ``stop`` of the tensor of ``dtype``, for values of ``shape``."""

    dtype: str
    start: int
    stop: int
    shape: torch.Size


class Layout:
    """The places of all levels' state in one tensor for each dtype.

    The cost of a TensorDict grows with its entries, which every step of an environment touches
    several times, so everything of one dtype is one entry. Each level but the lowest holds, from
    one of its actions to the next:

    ===============  =====================================================================
    ``"action"``       its action
    ``"observation"``  the whole observation it acted on
    ``"n_actions"``    its own actions on its input before this one
    ===============  =====================================================================

    and every level holds its ``record``. The first columns of the integers count the environment
    steps under each action, the current one included; so the last of them counts the actions of
    the lowest level on its input. A 0 there, before a step, means that the instance was reset.

    Args:
        levels: Highest first.
        observation: Spec of one observation.
    """

    def __init__(self, levels: Sequence[Level], observation: TensorSpec) -> None:
        self.n_held = len(levels) - 1
        self.n_steps = max(self.n_held, 1)
        self.fields: list[dict[NestedKey, _Field]] = []
        self._blocks: list[dict[str, tuple[int, int]]] = []
        self.widths = {_COUNTS: self.n_steps}
        for level in levels:
            specs = {key: level.record[key] for key in level.record.keys(True, True)}
            if len(self.fields) < self.n_held:
                specs |= {
                    "action": level.action_spec,
                    "observation": observation,
                    "n_actions": Unbounded((1,), dtype=torch.int64),
                }
            before = dict(self.widths)
            self.fields.append({key: self._add(spec) for key, spec in specs.items()})
            ends = self.widths.items()
            self._blocks.append({dtype: (before.get(dtype, 0), end) for dtype, end in ends})

    def _add(self, spec: TensorSpec) -> _Field:
        dtype = str(spec.dtype).removeprefix("torch.")
        start = self.widths.get(dtype, 0)
        self.widths[dtype] = stop = start + spec.shape.numel()
        return _Field(dtype, start, stop, spec.shape)

    @property
    def spec(self) -> dict[str, TensorSpec]:
        """Specs of the packed state of one instance."""
        return {
            dtype: Unbounded((width,), dtype=getattr(torch, dtype))
            for dtype, width in self.widths.items()
        }

    def steps(self, held: Mapping[str, Tensor]) -> Tensor:
        """Return the environment steps under each action so far, ``[*B, max(L - 1, 1)]``."""
        return held[_COUNTS][..., : self.n_steps]

    def get(self, held: Mapping[str, Tensor], i: int, key: NestedKey) -> Tensor:
        """Return what level ``i`` holds under ``key``, ``[*B, ...]``."""
        field = self.fields[i][key]
        values = held[field.dtype][..., field.start : field.stop]
        if len(field.shape) == 1:
            return values
        return values.reshape((*values.shape[:-1], *field.shape))

    def n_taken(self, held: Mapping[str, Tensor], i: int) -> Tensor:
        """Return the number of actions of level ``i`` on its input so far, ``[*B, 1]``."""
        if i == self.n_held:
            return self.steps(held)[..., -1:]
        return self.get(held, i, "n_actions") + 1

    def copy(self, held: Store) -> Store:
        """Copy the integers; the other entries are never changed in place."""
        return {**held, _COUNTS: held[_COUNTS].clone()}

    def put(
        self, held: Store, i: int, values: Mapping[NestedKey, Tensor], due: Due | None = None
    ) -> None:
        """Replace all that level ``i`` holds.

        Args:
            held: From :meth:`copy`.
            i: Which level.
            values: ``[*B, ...]``, or as ``due`` picked them.
            due: Which instances; all by default.
        """
        packed: dict[str, list[Tensor]] = {}
        for key, field in self.fields[i].items():
            value = values[key]
            if len(field.shape) != 1:
                value = value.reshape((*value.shape[: value.ndim - len(field.shape)], -1))
            packed.setdefault(field.dtype, []).append(value)
        for dtype, parts in packed.items():
            start, stop = self._blocks[i][dtype]
            block = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
            whole = held[dtype] if dtype == _COUNTS else held[dtype].clone()
            if due is None:
                whole[..., start:stop] = block
            else:
                due.write(whole[..., start:stop], block)
            held[dtype] = whole

    def begin(self, held: Store, i: int, values: Mapping[NestedKey, Tensor], due: Due) -> None:
        """Begin a new action of level ``i``: :meth:`put` it, and reset its steps and rewards to 0.

        Args:
            held: From :meth:`copy`.
            i: Which level.
            values: See :meth:`put`.
            due: Which instances.
        """
        self.put(held, i, values, due)
        held[_COUNTS][..., i : i + 1].mul_(~due.mask)
        held["rewards"] = held["rewards"].clone()
        held["rewards"][..., i : i + 1].masked_fill_(due.mask, 0)

    def step(self, held: Store) -> None:
        """Count the current environment step in ``held``, which is from :meth:`copy`."""
        held[_COUNTS][..., : self.n_steps].add_(1)


class HierarchyPrimer(TensorDictPrimer):
    """Carries the state of a hierarchy, clears it at resets, and sums the rewards of each action.

    Args:
        carried: Specs of the state of one instance.
        reward_key: Key of the environment's reward.
    """

    def __init__(self, carried: Composite, reward_key: NestedKey) -> None:
        super().__init__(carried, expand_specs=True)
        self.reward_key = reward_key

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        held = next_tensordict.get(MEMORY, None)
        if held is None:  # another policy acted
            held = tensordict.get(MEMORY)
        after = {key: held.get(key) for key in held.keys()}
        if "rewards" in after:
            after["rewards"] = after["rewards"] + next_tensordict.get(self.reward_key)
        return next_tensordict.set(MEMORY, together(after, held.batch_size, held.device))
