"""Rows of a collector, cut into what each level did."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from layeredrl_torchrl.hierarchies.control import ask, hand, take
from layeredrl_torchrl.hierarchies.memory import MEMORY

if TYPE_CHECKING:
    from layeredrl_torchrl.hierarchies.hierarchy import Hierarchy

__all__ = ["cut"]

_HINT = "transitions are cut from what a collector yields with the hierarchy as its policy"


def cut(hierarchy: Hierarchy, data: TensorDictBase) -> list[TensorDict]:
    """See :meth:`Hierarchy.transitions`."""
    if not isinstance(data, TensorDictBase):
        raise TypeError(
            f"data must be a TensorDict, got {type(data).__name__}; pass what a collector yields "
            "(one with replay_buffer= yields None: leave that out)"
        )
    rows = data.reshape(-1)
    take(rows, MEMORY, f"data was not collected by a hierarchy; {_HINT}")
    strangers = int((hierarchy.layout.steps(rows.get(MEMORY))[:, -1] == 0).sum())
    if strangers:
        raise ValueError(
            f"{strangers} of {len(rows)} rows were collected by another policy than a hierarchy; "
            "leave them out (a collector with init_random_frames= acts at random first)"
        )
    handed_back = _handed_back(hierarchy, rows)
    return [_of_level(hierarchy, rows, handed_back, i) for i in range(len(hierarchy.levels))]


def _handed_back(hierarchy: Hierarchy, rows: TensorDictBase) -> list[Tensor]:
    """Whether each level is done with its input after each row, bool ``[N, 1]`` each."""
    reached = take(rows, ("next", hierarchy.observation_key), _HINT)
    levels: Any = hierarchy.levels
    layout, held = hierarchy.layout, rows.get(MEMORY)
    asked = torch.arange(len(reached), device=reached.device)
    answers = [torch.zeros((len(reached), 1), dtype=torch.bool, device=reached.device)]
    for i in range(len(levels) - 1, 0, -1):
        given = layout.get(held, i - 1, "action")[asked]
        seen = hierarchy.maps[i](reached[asked])
        done = torch.zeros_like(answers[0])
        if len(asked):
            taken = layout.n_taken(held, i)[asked]
            done[asked] = ask(levels[i], hand(levels[i], seen, given, taken))
        answers.insert(1, done)
        asked = done.squeeze(-1).nonzero().squeeze(-1)
    return answers


def _of_level(
    hierarchy: Hierarchy, rows: TensorDictBase, handed_back: list[Tensor], i: int
) -> TensorDict:
    """Transitions of level ``i``."""
    level: Any = hierarchy.levels[i]
    lowest, packed = len(hierarchy.levels) - 1, rows.get(MEMORY)
    done = take(rows, ("next", "done"), _HINT)
    each_row = i == lowest or level.each_step
    # Where not all rows are taken, those at which an action ends.
    where = None if each_row else (done | handed_back[i + 1]).squeeze(-1)

    def of(values: Tensor) -> Tensor:
        return values if where is None else values[where]

    def at(*key: str) -> Tensor:
        return of(take(rows, key, _HINT))

    def held(level: int, key: NestedKey) -> Tensor:
        return of(hierarchy.layout.get(packed, level, key))

    done, reached = of(done), at("next", hierarchy.observation_key)
    start = at(hierarchy.observation_key) if each_row else held(i, "observation")
    steps = of(hierarchy.layout.steps(packed))
    own, see = TensorDict({}, [len(done)]), hierarchy.maps[i]
    own.set(level.observation_key, see(start))
    own.set(("next", level.observation_key), see(reached))
    if i:
        see_above = hierarchy.maps[i - 1]
        own.set(level.input_key, held(i - 1, "action"))
        begin = start if hierarchy.levels[i - 1].each_step else held(i - 1, "observation")
        own.set("parent_observation", see_above(begin))
        own.set(("next", "parent_observation"), see_above(reached))
        own.set(("next", "input_done"), done | of(handed_back[i]))
    if i == lowest:
        own.set(level.action_key, of(take(rows, hierarchy.action_key, _HINT)))
        own.set("n_actions", steps[:, -1:] - 1)
    else:
        own.set(level.action_key, held(i, "action"))
        own.set("n_actions", held(i, "n_actions"))
        cut_short = torch.zeros_like(done) if each_row else done & ~of(handed_back[i + 1])
        own.set(("next", "interrupted"), cut_short)
    for key in level.record.keys(True, True):
        own.set(key, held(i, key))
    if each_row:
        elapsed, earned = torch.ones_like(steps[:, :1]), at("next", *_tuple(hierarchy.reward_key))
    else:
        elapsed, earned = steps[:, i : i + 1], at("next", MEMORY, "rewards")[:, i : i + 1]
    terminated, truncated = at("next", "terminated"), rows.get(("next", "truncated"), None)
    truncated = done & ~terminated if truncated is None else of(truncated)
    own.set(("next", "elapsed_steps"), elapsed)
    own.set(("next", "reward"), earned)
    own.set(("next", "terminated"), terminated)
    own.set(("next", "truncated"), truncated)
    own.set(("next", "done"), done)
    trajectories = rows.get(("collector", "traj_ids"), None)
    if trajectories is not None:
        own.set(("collector", "traj_ids"), of(trajectories))
    if level.reward_func is not None and len(own):
        own.set(("next", "reward"), _own_reward(level.name, level.reward_func, own))
    return own


def _own_reward(
    name: str, reward_func: Callable[[TensorDictBase], Tensor], own: TensorDict
) -> Tensor:
    """What a level's ``reward_func`` gives for its transitions, ``[N, 1]``."""
    reward = reward_func(own)
    n = len(own)
    if not isinstance(reward, Tensor) or reward.shape not in ((n,), (n, 1)):
        got = tuple(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
        raise ValueError(f"{name}.reward_func gave {got}, expected ({n},) or ({n}, 1)")
    return reward.reshape(n, 1)


def _tuple(key: NestedKey) -> tuple[str, ...]:
    return key if isinstance(key, tuple) else (key,)
