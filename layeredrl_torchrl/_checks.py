"""Checks of arguments in public calls, and the wording of their errors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, SupportsIndex

import torch
from tensordict import NestedKey, TensorDictBase, is_tensor_collection, unravel_key
from torch import Tensor
from torchrl.data import Composite

from layeredrl_torchrl._watch import is_traced, refuse

# Entries that planners, levels, hierarchies, InitTracker and StepCounter add to observations.
_CARRIED = {
    *("planner", "random_steps_left", "hierarchy", "hierarchy_memory"),
    *("is_init", "step_count"),
}


def require(tensordict: TensorDictBase, key: NestedKey, *, reader: str, hint: str) -> Tensor:
    """Return ``tensordict[key]``; raise a ``KeyError`` that names the existing keys.

    Args:
        tensordict: Any TensorDict.
        key: The entry to read.
        reader: Name of the reader, for the message.
        hint: Remedy for a missing entry.

    Raises:
        KeyError: The entry is missing. TypeError: Not a TensorDict.
    """
    if not is_tensor_collection(tensordict):
        raise TypeError(
            f"{reader} reads {key!r} from a TensorDict, got {type(tensordict).__name__}; wrap "
            "dictionaries, TensorDict({...}, batch_size), and turn arrays into tensors, "
            "torch.as_tensor(...)"
        )
    value = tensordict.get(key, None)
    if value is None:
        found = sorted(tensordict.keys(True, True), key=str)
        raise KeyError(f"{reader} reads {key!r}, which is missing among {found}; {hint}")
    return value


#: The problem with an environment that masks actions, and the remedy.
MASKED = (
    "the environment masks actions ('action_mask'), and levels would take illegal ones: neither "
    "random actions nor plans look at masks. Let the environment carry out a legal action instead, "
    "or drop the mask (TorchRL's ExcludeTransform) where all are legal"
)


def refuse_mask(tensordict: TensorDictBase, action_key: NestedKey) -> None:
    """Raise ``ValueError`` if ``tensordict`` has an action mask next to ``action_key``."""
    above = action_key[:-1] if isinstance(action_key, tuple) else ()
    if tensordict.get((*above, "action_mask"), None) is not None:
        raise ValueError(MASKED)


def own_entries(space: Mapping[Any, Any]) -> list[str]:
    """Return the names of an observation space's entries, without those of policies and transforms.

    These are recognised by their usual names.
    """
    keys = space.keys(True, True) if isinstance(space, Composite) else space.keys()
    tops = {key: key if isinstance(key, str) else key[0] for key in keys}
    return sorted(str(key) for key, top in tops.items() if top not in _CARRIED)


def check_width(name: str, tensor: Tensor, width: int, *, hint: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` is a float tensor of shape ``[..., width]``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}; {hint}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got dtype {tensor.dtype}; {hint}")
    if tensor.ndim == 0 or tensor.shape[-1] != width:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [..., {width}]; {hint}")


def check_finite(name: str, tensor: Tensor, *, hint: str) -> None:
    """Raise ``ValueError`` if ``tensor`` holds NaN or infinity, with their number and first place.

    On an accelerator the error comes with a later call, without a place (``_watch.py``).
    """
    if tensor.numel() == 0:
        return
    on_host = tensor.device.type == "cpu"

    def error(_: Tensor) -> ValueError | None:
        if not on_host:
            return ValueError(f"{name} holds values that are not finite; {hint}")
        bad = ~torch.isfinite(tensor)
        if not bool(bad.any()):
            return None
        first = tuple(bad.nonzero()[0].tolist())
        return ValueError(
            f"{name} holds {int(bad.sum())} non-finite values of {tensor.numel()} "
            f"(the first, {tensor[first].item()}, at index {list(first)}); {hint}"
        )

    # One reduction decides the common case, since NaN and infinity survive a sum. A sum of large
    # finite values may overflow, so on a CPU check again before raising.
    total = tensor.detach()
    if on_host and not is_traced(total) and math.isfinite(float(total.sum())):
        return
    total = total.sum() if on_host else total.abs().amax()
    refuse(~torch.isfinite(total), error)


def check_resolution(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Refuse ``value [*B, n]`` so far from 0 that ``dtype`` rounds off its variation.

    Examples are map coordinates, clocks and counters. Few rows do not show how much values vary.
    Values of no higher precision than ``dtype`` lose nothing.
    """
    if not value.is_floating_point() or value.dtype.itemsize <= dtype.itemsize:
        return
    if not value.shape[-1]:
        return
    rows = value.detach().reshape(-1, value.shape[-1])
    if len(rows) < 8:
        return
    error_of = (rows - rows.to(dtype).to(rows.dtype)).abs().amax(0)
    far = rows.abs().amax(0)
    spread = rows.std(0)
    # A constant varies too, by rounding, but by less than a billionth.
    bad = (far > 1e4) & (spread > 1e-10 * far) & (error_of > 0.1 * spread)

    def error(found: Tensor) -> ValueError:
        return ValueError(
            f"dimension(s) {found.nonzero().flatten().tolist()} of {name} vary by less than "
            f"{dtype} can tell apart so far from 0; subtract a constant in the environment "
            "(TorchRL's ObservationNorm, or a float64 observation minus its first), or compute in "
            f"{value.dtype} (.double())"
        )

    refuse(bad, error)


def check_per_item(name: str, value: Tensor, batch: Sequence[int]) -> Tensor:
    """Return the result of the function ``name`` if it is one number for each of ``[*B]`` items.

    This checks only shapes, so it does not wait for a device.

    Raises:
        TypeError: Not a tensor. ValueError: Another shape, even one that would broadcast.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} gave a {type(value).__name__}, expected a tensor [*B]")
    if value.shape != torch.Size(batch):
        raise ValueError(
            f"{name} gave shape {tuple(value.shape)}, expected {tuple(batch)}: one value for each "
            "state, [*B], from state [*B, D], context [*B, C] and action [*B, A]; write it for any "
            "batch shape, and reduce the last axis (sum(-1), squeeze(-1))"
        )
    return value


def check_probability(name: str, value: Tensor, batch: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the result of the function ``name`` as probabilities ``[*B]`` of ``dtype``.

    Raises:
        TypeError: Neither bool nor floats. ValueError: As :func:`check_per_item`; values that are
            NaN or outside [0, 1].
    """
    check_per_item(name, value, batch)
    if value.dtype != torch.bool:
        if not value.is_floating_point():
            raise TypeError(
                f"{name} gave {value.dtype}, expected bool, or a probability in floats; compare "
                "(x > limit), or convert it (.bool())"
            )
        refuse(
            ~((value >= 0) & (value <= 1)).all(),
            lambda _: ValueError(
                f"{name} gave values that are NaN or outside [0, 1], expected bool or a "
                f"probability; repair {name}"
            ),
        )
    return value.to(dtype)


def check_trainable(name: str, loss: Tensor) -> None:
    """Raise ``RuntimeError`` if a loss depends on no trainable parameter."""
    if not loss.requires_grad:
        raise RuntimeError(
            f"{name} cannot learn: all parameters of its loss are frozen (requires_grad is False); "
            "to keep a level as it is build it with updates_per_step=0, otherwise call "
            "requires_grad_(True)"
        )


def check_positive_int(name: str, value: int, *, minimum: int = 1) -> int:
    """Return ``value`` if it is an ``int`` of at least ``minimum``; raise otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def check_indices(name: str, value: Iterable[SupportsIndex], size: int | None = None) -> list[int]:
    """Return ``value`` as a list if it holds integers, each once, from 0 to ``size - 1``.

    Any sequence of integers works: a list, a range, a numpy array, a tensor.

    Raises:
        TypeError: Not integers. ValueError: A number that is repeated or out of range.
    """
    try:
        found = [operator.index(index) for index in value]
    except TypeError:
        raise TypeError(f"{name} must be integers, like [0, 2], got {value!r}") from None
    outside = [i for i in found if i < 0 or (size is not None and i >= size)]
    if outside:
        among = "0 and above" if size is None else f"the {size} dimensions from 0 to {size - 1}"
        raise ValueError(f"{name} {outside} are not among {among} of an observation")
    twice = sorted({i for i in found if found.count(i) > 1})
    if twice:
        raise ValueError(f"{name} has {twice} more than once; name each dimension once")
    return found


def check_sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return ``sizes`` as a tuple if it is not empty and holds ints of at least 1.

    Raises:
        TypeError: Not a sequence of ``int``. ValueError: An empty sequence, or a number below 1.
    """
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise TypeError(f"{name} must be a sequence of int, e.g. (128, 128), got {sizes!r}")
    if not sizes:
        raise ValueError(f"{name} is empty; give at least one, e.g. (128,)")
    return tuple(check_positive_int(f"{name}[{i}]", size) for i, size in enumerate(sizes))


def check_number(
    name: str,
    value: float,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    hint: str = "",
) -> float:
    """Return ``value`` if it is a finite number between ``low`` and ``high``.

    Args:
        name: Name of the argument, for the message.
        value: An ``int``, ``float`` or numpy scalar.
        low: Lowest allowed value.
        high: Highest allowed value.
        open_low: Exclude ``low`` itself.
        open_high: Exclude ``high`` itself.
        hint: Remedy, for the message.

    Raises:
        TypeError: Not a number. ValueError: NaN, infinite or outside the range.
    """
    ends = f"; {hint}" if hint else ""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}){ends}")
    below = value <= low if open_low else value < low
    above = value >= high if open_high else value > high
    if not math.isfinite(value) or below or above:
        left = "(" if open_low or low == -math.inf else "["
        right = ")" if open_high or high == math.inf else "]"
        raise ValueError(
            f"{name} must be finite and lie in {left}{low:g}, {high:g}{right}, got {value}{ends}"
        )
    return value


def check_flag(name: str, value: bool) -> bool:
    """Return ``value`` if it is ``True`` or ``False``; raise ``TypeError`` otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return value


def check_key(name: str, key: NestedKey) -> NestedKey:
    """Return ``key`` in tensordict's form; raise ``TypeError`` if it is not a key."""
    parts = key if isinstance(key, tuple) and key else (key,)
    if not all(isinstance(part, str | tuple) for part in parts):
        raise TypeError(f"{name} must be a key, a str or a tuple of str, got {key!r}")
    found: NestedKey = unravel_key(key)
    return found


def check_keys(name: str, keys: Iterable[NestedKey]) -> list[NestedKey]:
    """Return ``keys`` as a list of keys in tensordict's form.

    Raises:
        TypeError: A single string, whose letters would count as keys, or anything else but keys.
    """
    if isinstance(keys, str) or not isinstance(keys, Iterable):
        raise TypeError(f"{name} must be a list of keys, got {keys!r}")
    return [check_key(name, key) for key in keys]


def check_callable(
    name: str,
    value: Callable[..., Any] | None,
    *,
    optional: bool = False,
    factory: bool = False,
) -> None:
    """Raise ``TypeError`` unless ``value`` can be called (or is ``None`` where ``optional``).

    A class is refused, since probably an object of it is meant, unless ``factory``.
    """
    if optional and value is None:
        return
    allowed = "callable or None" if optional else "callable"
    if isinstance(value, type) and not factory:
        raise TypeError(
            f"{name} must be {allowed}, got the class {value.__name__}; pass an object: "
            f"{value.__name__}(...)"
        )
    if not callable(value):
        raise TypeError(f"{name} must be {allowed}, got {value!r} ({type(value).__name__})")


def check_instance(name: str, value: object, kind: type | tuple[type, ...], *, hint: str) -> None:
    """Raise ``TypeError`` unless ``value`` is an object of ``kind``; classes are refused."""
    if isinstance(value, kind) and not isinstance(value, type):
        return
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(k.__name__ for k in kinds)
    got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    raise TypeError(f"{name} must be an object of {expected}, got {got}; {hint}")
