"""Levels of several time scales as one policy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor, nn
from torchrl.checkpoint import GlobalRNGState
from torchrl.data import Composite
from torchrl.envs import EnvBase, TensorDictPrimer

from layeredrl_torchrl._checks import check_finite, check_width, own_entries, require
from layeredrl_torchrl._primers import OnePrimer
from layeredrl_torchrl._state import WholeState
from layeredrl_torchrl._watch import watched
from layeredrl_torchrl.checkpoints import SafeCheckpoint
from layeredrl_torchrl.hierarchies._building import assemble, names
from layeredrl_torchrl.hierarchies._control import Answers, ask, hand, refuse_interruptions
from layeredrl_torchrl.hierarchies._due import Due
from layeredrl_torchrl.hierarchies._maps import Choice
from layeredrl_torchrl.hierarchies._memory import (
    MEMORY,
    STATE,
    HierarchyPrimer,
    Layout,
    memory_of,
    together,
)
from layeredrl_torchrl.hierarchies._transitions import Cut, EnvKeys
from layeredrl_torchrl.levels import Level
from layeredrl_torchrl.levels._learning import check_env, refuse_masks
from layeredrl_torchrl.levels._rows import end_keys
from layeredrl_torchrl.levels._undo import all_or_nothing

__all__ = ["Hierarchy"]

_NEEDS = (
    "env = env.append_transform(hierarchy.make_tensordict_primer()) adds it (collectors do so with "
    "auto_register_policy_transforms=True)"
)


class Hierarchy(OnePrimer, WholeState):
    """Levels as one TorchRL policy; each level acts through the level below it.

    The lowest level acts at every environment step. A higher level holds its action, which is the
    input of the level below, until that level hands control back. ``hands_back`` is called before
    each action of a level except the first on an input, from the bottom up, since only a level that
    is due to act can hand control back. After a reset all levels act again. A level is called only
    for the instances where it is due, with its part of the observation, its input, ``"n_actions"``
    (its actions on this input so far) and its memory.

    The state is passed on in the TensorDict under ``"hierarchy"``, and the memories of levels under
    ``"hierarchy_memory"``. So the environment needs the transform :meth:`make_tensordict_primer`,
    and single instances may be reset. Acting computes no gradients.

    On construction each level gets access to the predictor of the level above (``attach``) and is
    set up for the level below (``setup``). :meth:`transitions` splits collected data into the
    transitions of each level. It calls ``hands_back`` again, so this must depend only on its
    arguments. :meth:`learn` lets each level learn from its transitions.

    >>> env = get_task("Reacher-v5").make(seed=0)
    >>> lower = ModelFreeLevel(
    ...     learner_factory=SACLearner, input_spec=Bounded(-1.0, 1.0, (2,)), duration=3
    ... )
    >>> hierarchy = Hierarchy([RandomLevel(), lower], env=env)  # highest first
    >>> data = env.append_transform(hierarchy.make_tensordict_primer()).rollout(
    ...     4, hierarchy, break_when_any_done=False
    ... )
    >>> data["action"].shape
    torch.Size([4, 2])

    Args:
        levels: Highest first; different objects.
        env: The environment to act in; only its specs are used.
        observation_maps: The part of the observation that each level sees: ``None`` for all of it,
            a list of indices, or a function from ``[*B, obs]`` to ``[*B, obs_i]``.
        observation_key: Key of the environment's observation. The keys of action, reward and ends
            of episodes are those of ``env``; levels have their own keys.

    Raises:
        TypeError, ValueError: Not an environment; no levels, or a level twice; a highest level with
            an input; a lower level without an input, or that never hands control back; a level that
            is set up for other spaces, or that needs a predictor above it and has none;
            ``each_step`` of the lowest level; a map that does not fit. The messages name the
            levels.
    """

    levels: nn.ModuleList

    def __init__(
        self,
        levels: Sequence[Level],
        env: EnvBase,
        *,
        observation_maps: Sequence[Choice] | None = None,
        observation_key: NestedKey = "observation",
    ) -> None:
        super().__init__()
        check_env(env)
        spec, key = env.observation_spec_unbatched, unravel_key(observation_key)
        if key not in spec.keys(True, True) or len(spec[key].shape) != 1:
            raise ValueError(
                f"the environment observes {own_entries(spec)}, expected one flat {key!r}; pass "
                "observation_key=, or join or flatten its entries by TorchRL's CatTensors or "
                "FlattenObservation"
            )
        refuse_masks(env)
        levels = list(levels)
        self.observation_key, self.observation_dim = key, spec[key].shape[-1]
        self.action_key = unravel_key(env.action_key)
        self.reward_key = unravel_key(env.reward_key)
        self.end_keys = end_keys(env)
        action_spec = env.full_action_spec_unbatched[self.action_key]
        maps = assemble(levels, spec[key], action_spec, observation_maps)
        self.maps, self.levels = nn.ModuleList(maps), nn.ModuleList(levels)
        self.layout = Layout(levels, spec[key])
        memories = [memory_of(level) for level in levels]
        own = {str(i): m for i, m in enumerate(memories) if m.keys()}
        carried = {STATE: self.layout.spec}
        self._carried = Composite(carried | ({MEMORY: Composite(own)} if own else {}))
        # Keys under MEMORY; "" for levels without a memory.
        self._memories = [str(i) if m.keys() else "" for i, m in enumerate(memories)]
        self._records = [tuple(level.record.keys(True, True)) for level in levels]
        self._answers = [Answers(level, m) for level, m in zip(levels, memories, strict=True)]
        # Looked up at every step, which is slow in a ModuleList.
        self.__dict__["_ordered"] = levels
        self._sees_all = [see.is_identity for see in maps]
        leaves = list(self._carried.keys(True, True))
        self.in_keys = [key, *leaves]
        self.out_keys = [self.action_key, *(unravel_key(("next", leaf)) for leaf in leaves)]

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Return the transform that passes on the state and clears it where instances are reset."""
        return HierarchyPrimer(self._carried.clone(), self.layout, self.reward_key)

    def _in_order(self) -> list[Any]:
        ordered: list[Any] = self.__dict__["_ordered"]
        return ordered

    # -- acting -----------------------------------------------------------------------------

    @watched
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action for ``[*B]``, and under ``"next"`` the state for the next step.

        Raises:
            KeyError: The observation, the state or an entry that a level must write is missing.
            ValueError: An observation of another width; an observation or action that is not
                finite; an action, record or memory of another shape than the level's spec.
            TypeError: Likewise, floats where the spec is discrete.
        """
        held = require(tensordict, STATE, reader="Hierarchy", hint=_NEEDS)
        memories: dict[str, Any] = {}
        if any(self._memories):
            carried: Any = require(tensordict, MEMORY, reader="Hierarchy", hint=_NEEDS)
            memories.update(carried.items())
        hint = "the environment gives none; name it by observation_key="
        observation = require(tensordict, self.observation_key, reader="Hierarchy", hint=hint)
        check_width("observation", observation, self.observation_dim, hint="give what env observes")
        check_finite("observation", observation, hint="repair it in the environment")
        layout, levels = self.layout, self._in_order()
        seen = [
            observation if whole else self.maps[i](observation)
            for i, whole in enumerate(self._sees_all)
        ]
        new, given = layout.is_reset(held), None
        due = self._due(levels, seen, held, new)
        # The new state, used now and passed on; the input is not changed.
        now = held.clone()
        for i, acts in enumerate(due):
            if not acts.nowhere:
                n_actions = layout.n_taken(held, i).masked_fill(new, 0)
                start, n_actions = acts.pick(observation), acts.pick(n_actions)
                saw = start if self._sees_all[i] else acts.pick(seen[i])
                part = hand(levels[i], saw, acts.pick(given), n_actions)
                written = self._call(i, part, memories, acts)
                layout.begin(now, i, written | {"observation": start}, acts)
            given, new = layout.get(now, i, "action"), acts.mask
        n_actions = layout.steps(now, max(len(levels) - 2, 0))
        handed = hand(levels[-1], seen[-1], given, n_actions)
        written = self._call(len(levels) - 1, handed, memories, None)
        tensordict.set(self.action_key, written.pop("action"))
        if written:
            layout.put(now, len(levels) - 1, written)

        layout.step(now)
        # Only under "next": of known entries, a collector with its policy on another device takes
        # back only those that changed in all instances.
        following: dict[str, Any] = {STATE: now}
        if memories:
            following[MEMORY] = together(memories, tensordict.batch_size, tensordict.device)
        if "next" in tensordict.keys():
            return tensordict.update({"next": following})
        following = together(following, tensordict.batch_size, tensordict.device)
        return tensordict.set("next", following)

    def _due(
        self, levels: list[Level], seen: list[Tensor], held: Tensor, reset: Tensor
    ) -> list[Due]:
        """Return where each level except the lowest has to act, highest first."""
        due: list[Due] = []
        asked = ~reset
        for i in range(len(levels) - 1, 0, -1):
            limit = levels[i].limit
            if limit is not None and levels[i].ends_by_duration:
                asked = asked & self.layout.has_taken(held, i, limit)
            elif not (some := Due(asked)).nowhere:
                given = some.pick(self.layout.get(held, i - 1, "action"))
                taken = some.pick(self.layout.n_taken(held, i))
                handed = hand(levels[i], some.pick(seen[i]), given, taken)
                for key in self._records[i]:
                    handed.set(key, some.pick(self.layout.get(held, i, key)))
                asked = some.merge(torch.zeros_like(asked), ask(levels[i], handed))
            due.insert(0, Due(reset | asked))
        return due

    def _call(
        self, i: int, handed: TensorDict, memories: dict[str, TensorDictBase], due: Due | None
    ) -> dict[NestedKey, Tensor]:
        """Call level ``i`` where it is ``due``, with its memory, and return its entries.

        Its new memory replaces the old one in ``memories``.
        """
        level, key = self._in_order()[i], self._memories[i]
        memory = memories.get(key)
        if memory is not None:
            handed.update(memory if due is None else due.pick(memory))
        level(handed)
        answers = self._answers[i]
        if memory is not None:
            following = answers.memory(handed)
            memories[key] = following if due is None else due.merge(memory, following)
        written = {k: answers.read(handed, k) for k in self._records[i]}
        written["action"] = answers.action(handed).to(level.action_spec.dtype)
        if i < len(self._memories) - 1:
            written["n_actions"] = handed.get("n_actions")
        return written

    # -- learning ---------------------------------------------------------------------------

    def transitions(self, data: TensorDictBase) -> list[TensorDict]:
        """Split collected data into the transitions of each level.

        Nothing is kept between calls: an action that continues beyond the end of ``data`` belongs
        to the data in which it ends. The entries, under the keys of the level:

        ==================================  =======================================================
        its observation, input, action      when it acted; also its record
        ``"n_actions" [N, 1]``              its actions on this input before this one
        ``"parent_observation"``            what the level above saw when it gave the input
        ``"parent_sees"``                   what that level sees where the action begins
        ``("collector", "traj_ids")``       if the data has it
        ``("next", observation)``           at the end of the action
        ``("next", "reward") [N, 1]``       the environment's, summed; or by ``reward_func``
        ``("next", "done") [N, 1]``         of the environment, at the end of the action; likewise
                                            ``"terminated"`` and ``"truncated"``
        ``("next", "elapsed_steps")``       environment steps of the action, ``[N, 1]``
        ``("next", "input_done")``          whether the input ended with it, bool ``[N, 1]``
        ``("next", "interrupted")``         whether the episode ended before the level below handed
                                            control back, bool ``[N, 1]``; not of the lowest
        ``("next", "parent_observation")``  what the level above sees at the end
        ==================================  =======================================================

        The highest level has no input, no ``"input_done"``, and no entries of a level above. With
        ``each_step``, each environment step of an action is a transition. Then
        ``("next", "n_actions")`` counts the level's actions on this input that are finished at its
        end, and the ``"parent_observation"`` of the level below is what its parent sees where the
        transition of that level begins.

        Args:
            data: ``[T]`` or ``[env, T]``.

        Returns:
            Transitions ``[N_i]`` of each level, highest first; sorted by environment, then time.

        Raises:
            TypeError: Not a TensorDict. KeyError: Not collected by a hierarchy. ValueError: A
                ``reward_func`` that gives another shape.
        """
        keys = EnvKeys(self.observation_key, self.action_key, self.reward_key, self.end_keys)
        maps: list[Any] = list(self.maps)
        return Cut(self.layout, self._in_order(), maps, keys)(data)

    def learn(self, data: TensorDictBase) -> dict[str, float]:
        """Let each level learn from its :meth:`transitions`, highest first.

        Args:
            data: ``[T]`` or ``[env, T]``, from a collector of this hierarchy.

        Returns:
            The results of the levels' ``learn``, under ``"<name of the level>/"``, or under
            ``"<name>_<position>/"`` for levels with equal names; they log under the same names.
            ``"reward"`` is the mean reward of a level with a ``reward_func``, or of the updates of
            a ``SkillLevel``.

        Raises:
            ValueError: In evaluation, with a level that is interrupted (``interrupt_after``); and
                as :meth:`transitions` and the levels' ``learn`` raise. After any error all levels
                are as before the call.
        """
        info: dict[str, float] = {}
        levels = self._in_order()
        refuse_interruptions(levels)
        with ExitStack() as all_levels:
            for level, name, own in zip(levels, names(levels), self.transitions(data), strict=True):
                level.logs_as = name
                if len(own):
                    all_levels.enter_context(all_or_nothing(level, len(own)))
                    paid = own.get(("next", "reward")) if level.reward_func else None
                    info |= {f"{name}/{term}": value for term, value in level.learn(own).items()}
                    if paid is not None:
                        info[f"{name}/reward"] = paid.mean().item()
        return info

    def parts(self) -> dict[str, Any]:
        """Return the parts of a checkpoint: itself, its levels' optimizers and their buffers."""
        parts: dict[str, Any] = {"hierarchy": self}
        for i, level in enumerate(self.levels):
            parts |= {f"optim_{i}": level.optim, f"buffer_{i}": level.buffer}
        return {name: part for name, part in parts.items() if part is not None}

    def checkpoint(self, **more: Any) -> SafeCheckpoint:
        """Return a checkpoint from which a new hierarchy resumes learning bit for bit.

        Args:
            **more: Further parts of the run for ``SafeCheckpoint``, such as a ``CollectorState``.
        """
        return SafeCheckpoint(**self.parts(), rng=GlobalRNGState(), **more)
