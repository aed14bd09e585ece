"""Split collected rows into the transitions of each level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor

from layeredrl_torchrl._checks import require
from layeredrl_torchrl.hierarchies._control import ask, hand
from layeredrl_torchrl.hierarchies._maps import ObservationMap
from layeredrl_torchrl.hierarchies._memory import STATE, Layout
from layeredrl_torchrl.levels import Level
from layeredrl_torchrl.levels._rows import collected

__all__ = ["Cut", "EnvKeys"]

_HINT = "transitions are cut from what a collector yields with the hierarchy as its policy"
# The state that acted in a row, with the rewards up to the end of the row.
_HELD = ("next", STATE)
_TRAJECTORIES = ("collector", "traj_ids")


@dataclass(frozen=True)
class EnvKeys:
    """Keys of the environment; reward and ends without ``"next"``."""

    observation: NestedKey
    action: NestedKey
    reward: NestedKey
    ends: tuple[NestedKey, NestedKey]  # done, terminated


class Cut:
    """Splits collected rows into the transitions of each level; see ``Hierarchy.transitions``.

    Args:
        layout: The places of the levels' state in the rows.
        levels: Highest first.
        maps: The observation map of each level.
        keys: Keys of the environment.
    """

    def __init__(
        self,
        layout: Layout,
        levels: Sequence[Level],
        maps: Sequence[ObservationMap],
        keys: EnvKeys,
    ) -> None:
        self.layout, self.levels, self.maps, self.keys = layout, levels, maps, keys

    def __call__(self, data: TensorDictBase) -> list[TensorDict]:
        """Return the transitions ``[N_i]`` of each level, highest first.

        Args:
            data: ``[T]`` or ``[env, T]``.

        Raises:
            TypeError: Not a TensorDict. KeyError: A missing entry.
            ValueError: Rows collected by another policy.
        """
        rows = collected(data, self.keys.ends)
        n_steps, rows = rows.shape[-1], rows.reshape(-1)
        strangers = int(self.layout.is_reset(_take(rows, _HELD)).sum())
        if strangers:
            raise ValueError(
                f"{strangers} of {len(rows)} rows were collected by another policy than a "
                "hierarchy; leave them out (a collector with init_random_frames= acts at random "
                "first)"
            )
        rows = self._read(rows)
        handed_back = self._handed_back(rows)
        self._check_interrupted(rows, handed_back, n_steps)
        return [self._of_level(rows, handed_back, i) for i in range(len(self.levels))]

    def _read(self, rows: TensorDictBase) -> TensorDict:
        """Select the needed entries of ``rows [N]``."""
        keys = self.keys
        needed = [_HELD, keys.observation, keys.action]
        needed += [("next", key) for key in (keys.observation, keys.reward, "done", "terminated")]
        read = TensorDict({}, rows.batch_size)
        for key in map(unravel_key, needed):
            read.set(key, _take(rows, key))
        for key in (("next", "truncated"), _TRAJECTORIES):
            value = rows.get(key, None)
            if value is not None:
                read.set(key, value)
        return read

    def _handed_back(self, rows: TensorDict) -> list[Tensor]:
        """Return whether each level hands back control after each row, bool ``[N, 1]`` each."""
        layout, held = self.layout, rows.get(_HELD)
        reached = rows.get(unravel_key(("next", self.keys.observation)))
        asked = torch.arange(len(reached), device=reached.device)
        answers = [torch.zeros((len(reached), 1), dtype=torch.bool, device=reached.device)]
        for i in range(len(self.levels) - 1, 0, -1):
            given = layout.get(held, i - 1, "action")[asked]
            seen = self.maps[i](reached[asked])
            done = torch.zeros_like(answers[0])
            if len(asked):
                taken = layout.n_taken(held, i)[asked]
                handed = hand(self.levels[i], seen, given, taken)
                for key in self.levels[i].record.keys(True, True):
                    handed.set(key, layout.get(held, i, key)[asked])
                done[asked] = ask(self.levels[i], handed)
            answers.insert(1, done)
            asked = done.squeeze(-1).nonzero().squeeze(-1)
        return answers

    def _check_interrupted(self, rows: TensorDict, handed_back: list[Tensor], n_steps: int) -> None:
        """Refuse rows whose next one has a new input although control was not handed back."""
        reached = rows.get(unravel_key(("next", self.keys.observation)))
        following = reached[:-1] == rows.get(self.keys.observation)[1:]
        goes_on = following.all(-1, keepdim=True) & ~rows.get(("next", "done"))[:-1]
        goes_on[n_steps - 1 :: n_steps] = False  # another environment's
        for i in range(len(self.levels) - 1, 0, -1):
            # The first row of an input of level i is also a first row of all levels below.
            goes_on = goes_on & (self.layout.n_taken(rows.get(_HELD), i)[1:] == 1)
            n = int((goes_on & ~handed_back[i][:-1]).sum())
            if n:
                level = self.levels[i]
                raise ValueError(
                    f"{level.name} was interrupted {n} times in {len(rows)} rows before it handed "
                    f"control back (interrupt_after={level.interrupt_after}): such rows show "
                    "only part of a chosen action; learn from rows that were collected in "
                    "training mode"
                )

    def _of_level(self, rows: TensorDict, handed_back: list[Tensor], i: int) -> TensorDict:
        """Return the transitions of level ``i``."""
        level, lowest = self.levels[i], i == len(self.levels) - 1
        each_row = lowest or level.each_step
        done = rows.get(("next", "done"))
        below_done = handed_back[0] if lowest else handed_back[i + 1]
        above_done = handed_back[i] if i else below_done
        if not each_row:
            # Keep only the rows at which an action ends.
            ends = (done | below_done).squeeze(-1)
            rows, below_done, above_done = rows[ends], below_done[ends], above_done[ends]
        done, held = rows.get(("next", "done")), rows.get(_HELD)
        row_start = rows.get(self.keys.observation)
        start = row_start if each_row else self.layout.get(held, i, "observation")
        reached = rows.get(unravel_key(("next", self.keys.observation)))
        own, see = TensorDict({}, rows.batch_size), self.maps[i]
        own.set(level.observation_key, see(start))
        own.set(unravel_key(("next", level.observation_key)), see(reached))
        if i:
            see_above = self.maps[i - 1]
            above_each = self.levels[i - 1].each_step
            begin = start if above_each else self.layout.get(held, i - 1, "observation")
            own.set(level.input_key, self.layout.get(held, i - 1, "action"))
            own.set("parent_observation", see_above(begin))
            own.set("parent_sees", see_above(start))
            own.set(("next", "parent_observation"), see_above(reached))
            own.set(("next", "input_done"), done | above_done)
        if lowest:
            own.set(level.action_key, rows.get(self.keys.action))
            own.set("n_actions", self.layout.n_taken(held, i) - 1)
        else:
            own.set(level.action_key, self.layout.get(held, i, "action"))
            own.set("n_actions", self.layout.get(held, i, "n_actions"))
            cut_short = torch.zeros_like(done) if each_row else done & ~below_done
            own.set(("next", "interrupted"), cut_short)
            if each_row:
                own.set(("next", "n_actions"), own.get("n_actions") + below_done.long())
        for key in level.record.keys(True, True):
            own.set(key, self.layout.get(held, i, key))
        earned = rows.get(unravel_key(("next", self.keys.reward)))
        if each_row:
            elapsed = torch.ones(earned.shape, dtype=torch.int64, device=earned.device)
        else:
            elapsed = self.layout.steps(held, i)
            earned = self.layout.rewards(held, i).to(earned.dtype)
        terminated = rows.get(("next", "terminated"))
        own.set(("next", "elapsed_steps"), elapsed)
        own.set(unravel_key(("next", level.reward_key)), earned)
        own.set(unravel_key(("next", level.terminated_key)), terminated)
        own.set(("next", "truncated"), rows.get(("next", "truncated"), done & ~terminated))
        own.set(unravel_key(("next", level.done_key)), done)
        trajectories = rows.get(_TRAJECTORIES, None)
        if trajectories is not None:
            own.set(_TRAJECTORIES, trajectories)
        if level.reward_func is not None and len(own):
            own.set(unravel_key(("next", level.reward_key)), level.own_reward(own))
        return own


def _take(rows: TensorDictBase, key: NestedKey) -> Tensor:
    return require(rows, key, reader="Hierarchy.transitions", hint=_HINT)
