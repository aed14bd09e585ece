"""A PlannerLevel over a StaticPredictor: it explores, stores, plans and is saved; none learns."""

from __future__ import annotations

import torch
from helpers import collected, known_level, make_predictor
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, LazyTensorStorage, TensorDictReplayBuffer, Unbounded
from torchrl.envs import EnvBase, StepCounter, TransformedEnv

from layeredrl_torchrl import Hierarchy, SafeCheckpoint


class Line(EnvBase):
    """The world that ``make_point`` knows: observation ``[x, goal]``, cost squared distance."""

    def __init__(self, n):
        super().__init__(batch_size=[n])
        self.observation_spec = Composite(observation=Unbounded((n, 2)), shape=[n])
        self.action_spec = Bounded(-1.0, 1.0, (n, 1))
        self.reward_spec = Unbounded((n, 1))

    def _reset(self, tensordict):
        start = torch.tensor([2.0, 0.5]).expand(*self.batch_size, 2)
        return TensorDict({"observation": start.clone()}, self.batch_size)

    def _step(self, tensordict):
        x, goal = tensordict["observation"].split(1, -1)
        no = torch.zeros_like(x, dtype=torch.bool)
        after = torch.cat([x + 0.5 * tensordict["action"], goal], -1)
        values = {"observation": after, "reward": -((x - goal) ** 2), "done": no}
        return TensorDict({**values, "terminated": no.clone()}, self.batch_size)

    def _set_seed(self, seed):
        torch.manual_seed(seed)


def play(policy, n_batches=3, n=2):
    """Batches of 20 steps of 2 environments, whose episodes take 10; all data, and what is told."""
    env = TransformedEnv(Line(n), StepCounter(10))
    batches, infos = [], []
    for data in collected(env, policy, n_batches, 20 * n):
        batches.append(data)
        infos.append(policy.learn(data))
    return torch.cat(batches, -1), infos


def build(**options):
    options = {"n_initial_random_steps": 40, "updates_per_step": 0.5} | options
    return known_level(env=Line(2), **options)


def test_it_explores_first_and_then_reaches_its_goal():
    level = build()
    data, infos = play(level)
    assert torch.equal(data["random_action"][..., 0], (torch.arange(60) < 20).expand(2, -1))
    planned = data[:, 20:].reshape(2, 4, 10)
    assert (planned["next", "observation"][..., -3:, 0] - 0.5).abs().max() < 0.1
    assert planned["next", "reward"].mean() > data[:, :20]["next", "reward"].mean()
    # Every step is stored, and counted, and nothing is made of it.
    assert infos[-1] == {"n_env_steps": 120.0, "n_updates": 0.0}
    assert len(level.buffer) == 120
    assert level.updates_due == 0
    assert level.optim is None


def test_it_goes_on_where_it_was_saved(tmp_path):
    level, other = build(), build()
    play(level)
    parts = lambda one: {"level": one, "buffer": one.buffer}  # noqa: E731
    SafeCheckpoint(**parts(level)).save(tmp_path / "saved")
    play(other, n_batches=1)
    SafeCheckpoint(**parts(other)).load(tmp_path / "saved")
    assert other.n_env_steps == 120
    assert not other.warming_up
    assert (other.buffer[:] == level.buffer[:]).all()
    actions = []
    for one in (level, other):
        torch.manual_seed(1)
        actions.append(play(one, n_batches=1)[0]["action"])
    assert torch.equal(*actions)


def test_what_it_stores_another_predictor_learns_from():
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(500, ndim=2))
    play(build(buffer=buffer))
    info = make_predictor().learn(buffer, 3, 16, 16, 120)[1]
    assert info["n_updates"] == 3.0


def test_in_a_hierarchy_it_reaches_its_goal_too():
    level = known_level(n_initial_random_steps=40)
    hierarchy = Hierarchy([level], Line(2))
    data, _ = play(hierarchy)
    planned = data[:, 20:].reshape(2, 4, 10)
    assert (planned["next", "observation"][..., -3:, 0] - 0.5).abs().max() < 0.1
    assert level.n_env_steps == len(level.buffer) == 120
