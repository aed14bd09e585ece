"""Check and connect levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchrl.data import Bounded, TensorSpec

from layeredrl_torchrl.hierarchies._maps import Choice, ObservationMap
from layeredrl_torchrl.levels import Level
from layeredrl_torchrl.specs import to_spec

__all__ = ["assemble", "label", "names"]


def label(levels: Sequence[Level], i: int) -> str:
    """Return the description of level ``i`` in messages."""
    place = {0: ", the highest", len(levels) - 1: ", the lowest"}.get(i, "")
    return f"level {i} ({levels[i].name}{place if len(levels) > 1 else ''})"


def names(levels: Sequence[Level]) -> list[str]:
    """Return unique names of the levels; equal names get the position of the level."""
    given = [level.name for level in levels]
    return [name if given.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(given)]


def _short(spec: TensorSpec) -> str:
    """Describe a spec in one line."""
    text = f"{type(spec).__name__} of shape {tuple(spec.shape)} ({spec.dtype})"
    if isinstance(spec, Bounded):
        text += f" from {spec.low.tolist()} to {spec.high.tolist()}"
    return text


def _check_levels(levels: Sequence[Level]) -> None:
    """Raise unless each level takes input from the level above and hands control back to it."""
    if not levels:
        raise ValueError("levels is empty, expected at least one Level; highest first")
    for i, level in enumerate(levels):
        if not isinstance(level, Level):
            raise TypeError(f"levels[{i}] is a {type(level).__name__}, expected a Level")
    for i, level in enumerate(levels):
        first = next(j for j, other in enumerate(levels) if other is level)
        if first != i:
            raise ValueError(
                f"{label(levels, first)} and {label(levels, i)} are the same object; build one "
                "for each place"
            )
    if levels[0].input_spec is not None:
        free = [label(levels, i) for i, level in enumerate(levels) if level.input_spec is None]
        hint = "put a level over it, or build it without input_spec"
        if free:
            hint = f"levels go from the highest to the lowest: put {free[0]} first"
        raise ValueError(
            f"{label(levels, 0)} takes {_short(levels[0].input_spec)} from above, but nothing is "
            f"above it{_and_below(levels)}; {hint}"
        )
    for i, level in enumerate(levels[1:], 1):
        pair = f"{label(levels, i)} below {label(levels, i - 1)}"
        if level.input_spec is None:
            raise ValueError(
                f"{pair} takes nothing from it; build it with input_spec=, or put it first, as the "
                "highest level"
            )
        if level.parent_each_step not in (None, levels[i - 1].each_step):
            raise ValueError(
                f"{pair} needs a level above that learns with each_step={level.parent_each_step}, "
                f"got {levels[i - 1].each_step}; build that one accordingly"
            )
        if level.parent_each_step and not level.each_step and level is not levels[-1]:
            raise ValueError(
                f"{pair} is rewarded by that one's predictions of single environment steps, but "
                f"its own actions, which {label(levels, i + 1)} carries out, may take several; put "
                "it lowest, build it with each_step=True too, or reward whole actions (as a "
                "SkillLevel with SPlaTESReward below a level without each_step)"
            )
        if level.duration is None and level.ends_by_duration:
            raise ValueError(
                f"{pair} never hands control back to it; build it with duration=, or override "
                "hands_back"
            )
    if levels[-1].each_step:
        above = f" below {label(levels, len(levels) - 2)}" if len(levels) > 1 else ""
        raise ValueError(
            f"{label(levels, len(levels) - 1)}{above} has each_step=True, but the lowest acts at "
            "each step anyway; leave it out"
        )


def _and_below(levels: Sequence[Level]) -> str:
    return f" ({label(levels, 1)} is below)" if len(levels) > 1 else ""


def assemble(
    levels: Sequence[Level],
    observation: TensorSpec,
    action: TensorSpec,
    choices: Sequence[Choice] | None,
) -> list[ObservationMap]:
    """Attach and set up ``levels``, from the highest down, and return their observation maps.

    Args:
        levels: Highest first.
        observation: Spec of one observation of the environment.
        action: Spec of one action of the environment.
        choices: The part of the observation that each level sees; by default all of it.

    Raises:
        TypeError, ValueError: See :class:`~layeredrl_torchrl.Hierarchy`.
    """
    _check_levels(levels)
    choices = [None] * len(levels) if choices is None else list(choices)
    if len(choices) != len(levels):
        raise ValueError(
            f"observation_maps has {len(choices)} entries for {len(levels)} levels; give one for "
            "each, None for the whole observation"
        )
    maps = []
    for i, level in enumerate(levels):
        lowest = i == len(levels) - 1
        upper = f" below {label(levels, i - 1)}" if i else _and_below(levels)
        lower = "the environment" if lowest else label(levels, i + 1)
        expected: Any = action if lowest else levels[i + 1].input_spec
        try:
            level.attach(levels[i - 1].predictor if i else None)
        except ValueError as error:
            raise ValueError(f"{label(levels, i)}{upper}: {error}") from error
        try:
            maps.append(ObservationMap(choices[i], observation))
            level.setup(maps[i].space, expected)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{label(levels, i)} above {lower}: {error}") from error
        # Specs of levels have this form, but the spec of an environment may not.
        if level.action_spec.cpu() != to_spec(expected).cpu():
            raise ValueError(
                f"{label(levels, i)} was set up for {_short(level.action_spec)}, but {lower} "
                f"takes {_short(expected)}; build a new level"
            )
    return maps
