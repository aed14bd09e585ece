"""What a hierarchy carries from step to step."""

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
#: Tensors ``[*B, n]`` by dtype: what is held, packed.
Store = dict[str, Tensor]
_COUNTS = "int64"


def memory_of(level: Level) -> Composite:
    """Specs of what the level itself carries.

    Raises:
        ValueError: It starts from other values than zeros.
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
    """A TensorDict ``[*B]`` of entries that are known to fit, so that nothing is checked.

    At every step of an environment a hierarchy makes several; checks take most of their time.
    """
    return TensorDict._new_unsafe(dict(entries), batch, device=device)


@dataclass(frozen=True)
class _Field:
    """Columns ``start`` to ``stop`` of what is packed as ``dtype``, for values of ``shape``."""

    dtype: str
    start: int
    stop: int
    shape: torch.Size


class Layout:
    """Where what the levels hold lies in tensors that hold it for all of them.

    A TensorDict's cost is in its entries, which every step of an environment touches several
    times; so all that has the same dtype is one entry. Of each level but the lowest, from one of
    its actions to the next:

    ===============  =====================================================================
    ``"action"``       what it emitted
    ``"observation"``  the whole observation it acted on
    ``"n_actions"``    its own actions on its input before this one
    ===============  =====================================================================

    and of every level what it recorded. The first columns of the integers are the environment
    steps under each action so far, with that of the row; so the last of them is how many actions
    the lowest level took on its input. In what comes in, 0 there means that the instance was reset.

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
        """Specs of what is packed, of one instance."""
        return {
            dtype: Unbounded((width,), dtype=getattr(torch, dtype))
            for dtype, width in self.widths.items()
        }

    def steps(self, held: Mapping[str, Tensor]) -> Tensor:
        """Environment steps under each action so far, ``[*B, max(L - 1, 1)]``."""
        return held[_COUNTS][..., : self.n_steps]

    def get(self, held: Mapping[str, Tensor], i: int, key: NestedKey) -> Tensor:
        """What level ``i`` holds below ``key``, ``[*B, ...]``."""
        field = self.fields[i][key]
        values = held[field.dtype][..., field.start : field.stop]
        if len(field.shape) == 1:
            return values
        return values.reshape((*values.shape[:-1], *field.shape))

    def n_taken(self, held: Mapping[str, Tensor], i: int) -> Tensor:
        """Actions of level ``i`` on its input so far, ``[*B, 1]``."""
        if i == self.n_held:
            return self.steps(held)[..., -1:]
        return self.get(held, i, "n_actions") + 1

    def copy(self, held: Store) -> Store:
        """What is held, with integers of its own; other entries are replaced, never changed."""
        return {**held, _COUNTS: held[_COUNTS].clone()}

    def put(
        self, held: Store, i: int, values: Mapping[NestedKey, Tensor], due: Due | None = None
    ) -> None:
        """Let level ``i`` hold ``values``, all that it holds.

        Args:
            held: As :meth:`copy` gives it.
            i: Which level.
            values: ``[*B, ...]``, or as ``due`` picked them.
            due: Of which instances; of all by default.
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
        """:meth:`put` what level ``i`` does anew, and count its steps and rewards from 0.

        Args:
            held: As :meth:`copy` gives it.
            i: Which level.
            values: As for :meth:`put`.
            due: Of which instances.
        """
        self.put(held, i, values, due)
        held[_COUNTS][..., i : i + 1].mul_(~due.mask)
        held["rewards"] = held["rewards"].clone()
        held["rewards"][..., i : i + 1].masked_fill_(due.mask, 0)

    def step(self, held: Store) -> None:
        """Count the environment step that is made now, in ``held`` as :meth:`copy` gives it."""
        held[_COUNTS][..., : self.n_steps].add_(1)


class HierarchyPrimer(TensorDictPrimer):
    """Carries what a hierarchy holds, clears it at resets, and sums the rewards of each action.

    Args:
        carried: Specs of it, for one instance.
        reward_key: Where the environment writes its reward.
    """

    def __init__(self, carried: Composite, reward_key: NestedKey) -> None:
        super().__init__(carried, expand_specs=True)
        self.reward_key = reward_key

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        before, memories = tensordict.get(MEMORY), next_tensordict.get(MEMORY, None)
        after = {key: before.get(key) for key in before.keys()}
        if memories is not None:
            after |= {key: memories.get(key) for key in memories.keys()}
        if "rewards" in after:
            after["rewards"] = after["rewards"] + next_tensordict.get(self.reward_key)
        return next_tensordict.set(MEMORY, together(after, before.batch_size, before.device))
