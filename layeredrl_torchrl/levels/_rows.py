"""Select and check the rows of collected data from which a level learns."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from layeredrl_torchrl._checks import check_finite, check_width, require
from layeredrl_torchrl._padding import PADDING, padding_mask
from layeredrl_torchrl.specs import canonical_action

__all__ = [
    "check_choice",
    "check_flags",
    "check_numbers",
    "check_observations",
    "collected",
    "end_keys",
    "n_env_steps",
    "with_known_ends",
    "without_cut",
]

_ENDS: tuple[NestedKey, NestedKey] = ("done", "terminated")
_NOTHING = "nothing of the data is stored"
_COMPACT = "; a collector with compact_obs=True leaves it out: build one without"


def end_keys(env: EnvBase) -> tuple[NestedKey, NestedKey]:
    """Return the keys of ``env`` for done and terminated.

    Raises:
        ValueError: Keys that do not end in ``"done"`` and ``"terminated"``, or several such keys.
    """
    keys = [unravel_key(key) for key in env.done_keys]
    found: list[NestedKey] = []
    for name in _ENDS:
        own = [key for key in keys if (key if isinstance(key, str) else key[-1]) == name]
        own = [name] if name in own else own
        if len(own) != 1:
            raise ValueError(
                f"the environment ends episodes by {keys}, expected one {name!r}, at the root or "
                "nested; give it that name by TorchRL's RenameTransform"
            )
        found += own
    return found[0], found[1]


def collected(data: object, ends: tuple[NestedKey, NestedKey] = _ENDS) -> TensorDictBase:
    """Return the transitions of ``data`` without padding.

    Padding of trajectories (``("collector", "mask")`` is false there) is left out; the rest then
    has the shape ``[N]``.

    Args:
        data: ``[T]`` or ``[env, T]``.
        ends: Keys of done and terminated under ``"next"``; the result has their usual names.

    Raises:
        TypeError: Not a TensorDict. KeyError: Ends with another key. ValueError: Data of another
            shape; transitions that span several steps.
    """
    if not isinstance(data, TensorDictBase):
        raise TypeError(
            f"data must be a TensorDict of transitions, got {type(data).__name__}; pass what a "
            "collector yields (one with replay_buffer= yields None: leave that out)"
        )
    if not data.ndim or not data.shape.numel():
        raise ValueError(
            f"data has the batch shape {tuple(data.shape)}, expected transitions [T] or [env, T]"
        )
    spans = data.get("steps_to_next_obs", None)
    if spans is not None and bool((spans != 1).any()):
        raise ValueError(
            f"data has transitions of up to {int(spans.max())} steps ('steps_to_next_obs', which "
            "MultiStep writes), but levels learn from single steps and sum up rewards by "
            f"themselves; leave MultiStep out of the collector. {_NOTHING.capitalize()}"
        )
    rows: TensorDictBase = data
    for key, name in zip(ends, _ENDS, strict=True):
        if key != name:
            hint = f"the environment ends episodes by it; {_NOTHING}"
            value = require(rows, unravel_key(("next", key)), reader="learn", hint=hint)
            rows = rows.copy().set(("next", name), value)
    mask = padding_mask(rows, PADDING)
    if mask is None:
        return rows
    return rows[mask.reshape(rows.shape)]


def n_env_steps(data: TensorDictBase) -> int:
    """Count environment steps: one for each transition, or ``("next", "elapsed_steps")``."""
    elapsed = data.get(("next", "elapsed_steps"), None)
    if elapsed is None:
        return data.shape.numel()
    if elapsed.is_floating_point() or bool((elapsed < 1).any()):
        raise ValueError(
            f"('next', 'elapsed_steps') is {elapsed.dtype} from {elapsed.min().item()}, expected "
            f"whole numbers of at least 1; {_NOTHING}"
        )
    return int(elapsed.sum())


def with_known_ends(data: TensorDictBase, key: NestedKey, name: str) -> TensorDictBase:
    """Leave out ends of episodes whose last observation is unknown, with a warning.

    Environments that reset themselves give the next episode's first observation instead, and
    TorchRL writes NaN in place of the last one. In data ``[env, T]`` all environments need equally
    many rows, so another row of the batch, as an episode of one step, replaces such a row.

    Args:
        data: ``[T]`` or ``[env, T]``.
        key: Key of the observation.
        name: Name of the level, for the warning.
    """
    reached, done = data.get(unravel_key(("next", key))), data.get(("next", "done"))
    if not reached.is_floating_point() or not done.any():
        return data
    unknown = reached.isnan().flatten(data.ndim).all(-1) & done.reshape(data.shape)
    if not unknown.any():
        return data
    warnings.warn(
        f"{name} leaves out {int(unknown.sum())} of {data.numel()} transitions: the last "
        "observation of their episode is NaN, as in environments that reset themselves, so "
        "the ends of episodes are not learned; let TorchRL reset the environment",
        stacklevel=4,
    )
    known = (~unknown).flatten().nonzero().squeeze(-1)
    if data.ndim == 1 or not len(known):
        return data.flatten()[known]
    rows = data.flatten()
    places = unknown.flatten().nonzero().squeeze(-1)
    again = rows[known[torch.arange(len(places)) * len(known) // len(places)]]
    ends = again.get("next").set("done", torch.ones_like(again.get(("next", "done"))))
    if ends.get("truncated", None) is not None:
        ends.set("truncated", ~ends.get("terminated"))
    rows = rows.clone()
    rows[places] = again
    return rows.reshape(data.shape)


def without_cut(data: TensorDictBase) -> TensorDictBase:
    """Leave out transitions cut short by a time limit; return ``[N]`` if there are any.

    They do not show where their action leads, unless the episode terminated with them. Their key is
    ``("next", "interrupted")``; without it, return ``data`` unchanged.
    """
    cut = data.get(("next", "interrupted"), None)
    if cut is None:
        return data
    shows = (~cut | data.get(("next", "terminated"))).squeeze(-1)
    return data if bool(shows.all()) else data[shows]


def check_observations(
    data: TensorDictBase, key: NestedKey, width: int, name: str, hint: str
) -> None:
    """Raise unless ``data`` has observations ``[*B, width]``, before and after each step.

    Raises:
        KeyError: A missing entry. TypeError: Observations that are not floats. ValueError: Another
            width.
    """
    for at, more in ((key, ""), (unravel_key(("next", key)), _COMPACT)):
        value = require(data, at, reader=f"{name}.learn", hint=f"{hint}{more}; {_NOTHING}")
        check_width(str(at), value, width, hint=f"{name} was built for this width; {_NOTHING}")


def check_numbers(data: TensorDictBase, keys: Iterable[NestedKey], name: str, hint: str) -> None:
    """Raise unless ``data`` has finite numbers under all of ``keys``.

    Raises:
        KeyError: A missing entry. ValueError: NaN or infinite values; empty entries.
    """
    for key in map(unravel_key, keys):
        value = require(data, key, reader=f"{name}.learn", hint=f"{hint}; {_NOTHING}")
        if value.is_floating_point():
            check_finite(str(key), value, hint=f"{_NOTHING}; repair it first")


def check_flags(data: TensorDictBase, keys: Iterable[NestedKey], name: str, hint: str) -> None:
    """Raise unless ``data`` has flags under all of ``keys``, bool ``[*B, 1]``.

    Raises:
        KeyError: A missing entry. ValueError: Another dtype or shape.
    """
    for key in map(unravel_key, keys):
        value = require(data, key, reader=f"{name}.learn", hint=f"{hint}; {_NOTHING}")
        if value.dtype != torch.bool or value.shape != (*data.shape, 1):
            raise ValueError(
                f"{key!r} is {value.dtype} {tuple(value.shape)}, expected torch.bool "
                f"{(*data.shape, 1)}, for events and not their probabilities; {_NOTHING}"
            )


def check_choice(name: str, spec: TensorSpec, value: Tensor, batch: torch.Size) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``value [*B, ...]`` is in ``spec``."""
    try:
        canonical_action(spec, value, batch)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}; {_NOTHING}") from error
