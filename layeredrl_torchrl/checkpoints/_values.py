"""Plain values in checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrl.checkpoint import JSONCheckpointAdapter, StateDictCheckpointAdapter

__all__ = ["ValueAdapter"]


@dataclass
class _Held:
    """A value as the state of an object."""

    value: Any

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]


class ValueAdapter(JSONCheckpointAdapter):
    """Saves a value so that loading returns an equal one.

    TorchRL's adapter returns lists for tensors, arrays and tuples, and text for keys that are not
    text. Values that JSON cannot represent are saved here like the state of an object; others as
    TorchRL does.
    """

    def save(self, component: Any, path: Path, **options: Any) -> Any:
        """Save a value under ``path``."""
        if _is_json(component):
            return super().save(component, path, **options)
        return StateDictCheckpointAdapter().save(_Held(component), path, **options)

    def load(self, component: Any, path: Path, **options: Any) -> Any:
        """Fill a mapping or a list in place, or return another value."""
        if (path / self.state_filename).exists():
            return super().load(component, path, **options)
        held = _Held(None)
        StateDictCheckpointAdapter().load(held, path, **options)
        value = held.value
        if isinstance(component, MutableMapping) and isinstance(value, Mapping):
            component.clear()
            component.update(value)
            return component
        if isinstance(component, list) and isinstance(value, list):
            component[:] = value
            return component
        return value


def _is_json(value: Any) -> bool:
    """Whether JSON restores an equal value."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, OverflowError):
        return False
