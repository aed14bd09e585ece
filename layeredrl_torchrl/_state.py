"""Loading a saved state as a whole, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict.nn import TensorDictModuleBase
from torch import Tensor

__all__ = ["WholeState"]


class WholeState(TensorDictModuleBase):
    """A module whose state is loaded as a whole, or not at all."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's, but nothing is loaded unless everything fits.

        Raises:
            ValueError: Entries that are missing, not known or of another shape; the message lists
                them, and everything is as it was.
        """
        own = self.state_dict()
        label = getattr(self, "name", type(self).__name__)
        _check_state(label, own, state_dict, strict=strict)
        # TorchRL's losses load all of a network or, halfway through, raise: what is not strict
        # keeps its value by being loaded as well.
        fitting = {name: state_dict.get(name, value) for name, value in own.items()}
        result = super().load_state_dict(fitting, strict=True, assign=assign)
        result.missing_keys.extend(name for name in own if name not in state_dict)
        result.unexpected_keys.extend(name for name in state_dict if name not in own)
        return result


def _check_state(
    name: str, own: Mapping[str, Any], saved: Mapping[str, Any], *, strict: bool
) -> None:
    """Raise ``ValueError`` unless ``saved`` fits.

    Args:
        name: Whose state it is.
        own: Its state now.
        saved: What is to be loaded.
        strict: Whether both must have the same entries.
    """
    problems = []
    for key, value in own.items():
        if not isinstance(value, Tensor) or key not in saved:
            continue
        other = saved[key]
        if not isinstance(other, Tensor):
            problems.append(f"{key}: saved is a {type(other).__name__}, {name} has a Tensor")
        elif other.shape != value.shape:
            problems.append(
                f"{key}: saved is {tuple(other.shape)}, {name} has {tuple(value.shape)}"
            )
    if strict:
        problems += [f"{key}: not saved" for key in own.keys() - saved.keys()]
        problems += [f"{key}: not in {name}" for key in saved.keys() - own.keys()]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise ValueError(
            f"the saved state does not fit this {name} ({len(problems)} differences: {shown}), and "
            "nothing was loaded; build it with the sizes it was saved with (and a level has to be "
            "set up before loading, which a Hierarchy does)"
        )
