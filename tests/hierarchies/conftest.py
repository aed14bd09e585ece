"""A small environment that counts, levels for it, and the plain loop they are compared with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, TensorDictPrimer

from layeredrl_torchrl import Level


class Counting(EnvBase):
    """Instance ``e``, counted from ``first``, observes ``[e, episode, step, sum of actions]``.

    The reward is the action plus the step, integers. An episode ends by its own length, which its
    number decides, by termination or truncation in turn.
    """

    def __init__(self, n=None, lengths=(4, 7, 3, 9), first=0):
        super().__init__(batch_size=[] if n is None else [n])
        self.n, self.lengths = n, lengths
        b = self.batch_size
        self.observation_spec = Composite(observation=Unbounded((*b, 4)), shape=b)
        self.action_spec = Bounded(-5.0, 5.0, (*b, 1))
        self.reward_spec = Unbounded((*b, 1))
        self.full_done_spec = Composite(
            {
                key: Binary(1, (*b, 1), dtype=torch.bool)
                for key in ("done", "terminated", "truncated")
            },
            shape=b,
        )
        self.state = torch.zeros(*b, 4)
        self.state[..., 0] = first + torch.arange(n or 1).float().reshape(b)
        self.state[..., 1] = -1

    def _reset(self, tensordict=None, **_):
        reset = None if tensordict is None else tensordict.get("_reset", None)
        reset = torch.ones(*self.batch_size, 1, dtype=torch.bool) if reset is None else reset
        start = torch.stack([self.state[..., 0], self.state[..., 1] + 1], -1)
        start = torch.cat([start, torch.zeros_like(start)], -1)
        self.state = torch.where(reset, start, self.state)
        return TensorDict({"observation": self.state.clone()}, self.batch_size)

    def _step(self, tensordict):
        action, before = tensordict["action"], self.state
        self.state, reward, terminated, truncated = advance(before, action, self.lengths)
        following = {
            "observation": self.state.clone(),
            "reward": reward,
            "terminated": terminated,
            "truncated": truncated,
            "done": terminated | truncated,
        }
        return TensorDict(following, self.batch_size)

    def _set_seed(self, seed):
        return seed


def advance(state, action, lengths):
    """One step of ``[*B]`` instances."""
    after = state.clone()
    after[..., 2] += 1
    after[..., 3:] += action
    episode = state[..., 1:2].long() + state[..., :1].long()
    length = torch.tensor(lengths)[episode % len(lengths)]
    ends = after[..., 2:3] >= length
    by_termination = (episode // 2) % 2 == 0
    return after, action + after[..., 2:3], ends & by_termination, ends & ~by_termination


class Formula(Level):
    """Its action is a whole number worked out from all that it is given, and its memory.

    It remembers the sum of its own actions. Where ``until`` is given, it is done where that divides
    the last observed entry plus its input.
    """

    def __init__(self, factor, *, until=None, remembers=True, **options):
        super().__init__(**options)
        self.factor, self.until, self.remembers = factor, until, remembers
        self.calls, self.n_rows = [], 0

    @property
    def record(self):
        return Composite({("notes", "double"): Unbounded((1,))})

    def make_tensordict_primer(self):
        if not self.remembers:
            return super().make_tensordict_primer()
        return TensorDictPrimer(Composite(own={"sum": Unbounded((1,))}), expand_specs=True)

    def hands_back(self, tensordict):
        done = super().hands_back(tensordict)
        if self.until is None:
            return done
        n = tensordict["observation"][..., -1:] + tensordict["input"]
        return done | (n.long() % self.until == 0)

    def forward(self, tensordict):
        self.calls.append(sorted(map(str, tensordict.keys(True, True))))
        self.n_rows += tensordict.numel()
        given = tensordict["observation"].sum(-1, keepdim=True) + tensordict["n_actions"]
        given = given + 2 * tensordict.get("input", torch.zeros_like(given))
        if self.remembers:
            given = given + tensordict["own", "sum"]
        action = (self.factor * given) % 5 - 2
        if self.remembers:
            tensordict["next", "own", "sum"] = tensordict["own", "sum"] + action
        tensordict["notes", "double"] = 2 * action
        return tensordict.set("action", action)

    def learn(self, data):
        return {"n": float(len(data))}


class Timed(Formula):
    """Hands back by its duration alone, so that a hierarchy need not ask it."""

    hands_back = Level.hands_back


class Follower(Level):
    """Adds noise to its input."""

    def __init__(self, input_spec, **options):
        super().__init__(input_spec=input_spec, **options)

    def forward(self, tensordict):
        return tensordict.set(
            "action", tensordict["input"] + torch.randn(tensordict["input"].shape)
        )

    def learn(self, data):
        return {}


def plain_loop(levels, sees, episode, instance, n_steps, lengths):
    """What one instance does, step by step: its transitions by level, ``[(end, {key: value})]``."""

    def handed(i, given, n_actions, state):
        td = {"observation": sees[i](state), "n_actions": torch.tensor([n_actions])}
        return TensorDict(td if given is None else {**td, "input": given}, [])

    n_levels = len(levels)
    state = torch.tensor([float(instance), float(episode), 0.0, 0.0])
    found = [[] for _ in levels]
    fresh, counts, doing = True, [0] * n_levels, [None] * n_levels
    memories = [level.make_tensordict_primer().primers.zero() for level in levels]

    def is_done(i, state):
        td = handed(i, doing[i - 1]["action"], counts[i], state)
        return bool(levels[i].hands_back(td))

    for t in range(n_steps):
        due = [fresh] * (n_levels - 1) + [True]
        for i in range(n_levels - 1, 0, -1):
            if not fresh and due[i]:
                due[i - 1] = is_done(i, state)
        for i in range(n_levels):
            if due[i]:
                new = fresh if i == 0 else due[i - 1]
                n_actions = 0 if new else counts[i]
                td = handed(i, doing[i - 1]["action"] if i else None, n_actions, state)
                td.update(memories[i])
                levels[i](td)
                counts[i] = n_actions + 1
                memories[i] = td["next"].clone() if "next" in td.keys() else memories[i]
                doing[i] = {
                    "observation": sees[i](state),
                    "n_actions": torch.tensor([n_actions]),
                    "action": td["action"],
                    ("notes", "double"): td["notes", "double"],
                    "start": state,
                    "reward": torch.zeros(1),
                    "elapsed": 0,
                }
        before = state
        state, reward, terminated, truncated = advance(state, doing[-1]["action"], lengths)
        ended = terminated | truncated
        for now in doing:
            now["reward"], now["elapsed"] = now["reward"] + reward, now["elapsed"] + 1
        back = [False] * n_levels + [True]
        for i in range(n_levels - 1, 0, -1):
            back[i] = back[i + 1] and is_done(i, state)
        for i, level in enumerate(levels):
            lowest, now = i == n_levels - 1, dict(doing[i])
            if not (lowest or level.each_step or ended or back[i + 1]):
                continue
            total, elapsed = now.pop("reward"), now.pop("elapsed")
            start = before if level.each_step else now["start"]
            sees_now = start
            del now["start"]
            if level.each_step:
                now["observation"], total, elapsed = sees[i](before), reward, 1
            now |= {
                ("next", "observation"): sees[i](state),
                ("next", "reward"): total,
                ("next", "elapsed_steps"): torch.tensor([elapsed]),
                ("next", "done"): ended,
                ("next", "terminated"): terminated,
                ("next", "truncated"): truncated,
            }
            if i:
                now["input"] = doing[i - 1]["action"]
                whole = not levels[i - 1].each_step
                start = doing[i - 1]["start"] if whole else start
                now["parent_observation"] = sees[i - 1](start)
                now["parent_sees"] = sees[i - 1](sees_now)
                now["next", "parent_observation"] = sees[i - 1](state)
                now["next", "input_done"] = ended | back[i]
            if not lowest:
                cut = ended & (not back[i + 1] and not level.each_step)
                now["next", "interrupted"] = cut
                if level.each_step:
                    now["next", "n_actions"] = now["n_actions"] + int(back[i + 1])
            found[i].append((t, now))
        fresh = bool(ended)
        if fresh:
            state = torch.tensor([float(instance), state[1] + 1, 0.0, 0.0])
            counts, memories = [0] * n_levels, [m.clone().zero_() for m in memories]
    return found


@pytest.fixture(scope="session")
def toy():
    """The environment, the levels and the loop of this file."""
    return SimpleNamespace(
        Env=Counting,
        Level=Formula,
        Timed=Timed,
        Follower=Follower,
        Base=Level,
        plain_loop=plain_loop,
    )
