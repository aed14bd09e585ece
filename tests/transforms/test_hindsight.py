"""Goals inside of joined observations, relabelled by TorchRL's HERReplayBuffer."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import collected, model_free_level
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import HERReplayBuffer, LazyTensorStorage, ListStorage
from torchrl.envs import DoubleToFloat, Transform, TransformedEnv
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate

from layeredrl_torchrl import AffineReward, SafeCheckpoint, make_batched
from layeredrl_torchrl.transforms import RelabelGoals

RADIUS = 0.45


def near(achieved, desired):
    return (achieved - desired).norm(dim=-1) <= RADIUS


PLACES = {"achieved": [4, 5], "desired": [6, 7]}
relabelling = partial(RelabelGoals, 8, **PLACES, reward_func=near)


def walk(n_episodes=3, length=7, n_envs=2):
    """``[env, time]`` random walks of a plane, joined as a maze's; the episodes go on in time."""
    data = []
    for _ in range(n_envs * n_episodes):
        place, goal = torch.randn(length + 1, 2).cumsum(0), torch.randn(2) + 50
        obs = torch.cat([place, torch.randn(length + 1, 2), place, goal.expand(length + 1, 2)], -1)
        end = torch.arange(length).unsqueeze(-1) == length - 1
        after = {"observation": obs[1:], "reward": torch.zeros(length, 1)}
        after |= {"done": end, "terminated": torch.zeros_like(end)}
        data.append(TensorDict({"observation": obs[:-1], "next": after}, [length]))
    return torch.cat(data).reshape(n_envs, -1)


def buffer_of(data, **options):
    buffer = relabelling().make_buffer(storage=LazyTensorStorage(1000), **options)
    buffer.extend(data.reshape(-1).clone())
    return buffer


@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
def test_rows_are_relabelled_as_by_hand(strategy):
    data = walk()[:, :-3]  # cut off in the middle of an episode, where the next instance begins
    buffer = buffer_of(data, batch_size=2000, her_ratio=0.75, strategy=strategy)
    rows, batch = data.reshape(-1), buffer.sample()
    index = batch["index"].reshape(-1)
    lengths = [7, 7, 4, 7, 7, 4]
    first = torch.tensor([0, 7, 14, 18, 25, 32])
    episode = torch.bucketize(index, first, right=True) - 1
    new = batch["observation"][:, 6:]
    assert torch.equal(new[1500:], rows["observation"][index[1500:], 6:])
    drawn = set()
    for i in range(1500):
        row, begin = int(index[i]), int(first[episode[i]])
        last = begin + lengths[episode[i]] - 1
        allowed = {
            "future": range(row, last + 1),
            "final": [last],
            "episode": range(begin, last + 1),
        }
        reached = rows["next", "observation"][list(allowed[strategy])][:, 4:6]
        hit = (reached == new[i]).all(-1)
        assert hit.sum() == 1
        drawn.add((row, int(hit.nonzero())))
        expected = rows["observation"][row].clone()
        expected[6:] = new[i]
        assert torch.equal(batch["observation"][i], expected)
        expected = rows["next", "observation"][row].clone()
        expected[6:] = new[i]
        assert torch.equal(batch["next", "observation"][i], expected)
        paid = float((expected[4:6] - new[i]).norm() <= RADIUS)
        assert batch["next", "reward"][i].item() == paid
    if strategy == "future":  # every one of them is drawn
        assert len(drawn) == sum(n * (n + 1) // 2 for n in lengths)
        assert (batch["next", "reward"] == 1).any()
    assert not batch["next", "reward"][1500:].any()
    # What is stored stays as it was.
    assert torch.equal(buffer[:]["observation"], rows["observation"])
    assert not buffer[:]["next", "reward"].any()


def lost(buffer, n=200):
    """How many of ``n`` relabelled rows have no goal of a later row (``"t"``) of their episode."""
    rows, batch = buffer[:], buffer.sample(n)
    reached, new = rows["next", "observation"][:, 4:6], batch["observation"][:, 6:]
    hit = (reached == new[:, None]).all(-1)
    same = rows["episode"] == batch["episode"][:, None]
    return int((~(hit & same & (rows["t"] >= batch["t"][:, None])).any(-1)).sum())


def numbered(n_episodes, length, first=0):
    data = walk(n_episodes, length, n_envs=1).reshape(-1)
    data["episode"] = torch.arange(n_episodes).repeat_interleave(length) + first
    data["t"] = torch.arange(length).repeat(n_episodes)
    return data


@pytest.mark.parametrize("strategy", ["future", "final"])
@pytest.mark.parametrize("capacity", [21, 25, 40])
def test_goals_are_of_the_own_episode_when_old_rows_are_overwritten(strategy, capacity):
    options = {"her_ratio": 1.0, "strategy": strategy, "batch_size": 1}
    buffer = relabelling().make_buffer(storage=LazyTensorStorage(capacity), **options)
    for turn, (n, length) in enumerate([(3, 7), (7, 3), (3, 7), (1, 1), (1, 21)]):
        buffer.extend(numbered(n, length, first=10 * turn))
        assert lost(buffer) == 0


def test_sampling_leaves_the_ends_as_they_were_stored():
    """Also the last place of a ring, where an episode goes on at the beginning."""
    buffer = relabelling().make_buffer(storage=LazyTensorStorage(10), batch_size=1)
    for length in (7, 7):
        buffer.extend(numbered(1, length))
    stored = buffer[:]["next", "goal_end"].clone()
    assert not stored[-1]
    buffer.sample(50)
    assert torch.equal(buffer[:]["next", "goal_end"], stored)


def test_goals_are_of_the_own_episode_after_loading(tmp_path):
    def build(*shape):
        options = {"her_ratio": 1.0, "strategy": "final", "batch_size": 1}
        buffer = relabelling().make_buffer(storage=LazyTensorStorage(21), **options)
        buffer.extend(numbered(*shape))
        assert lost(buffer) == 0
        return buffer

    saved, first, second, third = build(3, 7), build(7, 3), build(7, 3), build(7, 3)
    saved.dumps(tmp_path / "dump")
    SafeCheckpoint(buffer=saved).save(tmp_path / "safe")
    first.loads(tmp_path / "dump")
    second.load_state_dict(saved.state_dict())
    SafeCheckpoint(buffer=third).load(tmp_path / "safe")
    assert [lost(buffer) for buffer in (first, second, third)] == [0, 0, 0]


def test_ends_may_have_other_names_and_shapes():
    data = numbered(3, 7)
    done = data["next"].pop("done")
    data["next", "agent", "end"] = done.float().squeeze(-1)
    buffer = relabelling(done_key=("agent", "end")).make_buffer(storage=LazyTensorStorage(50))
    buffer.extend(data)
    assert torch.equal(buffer[:]["next", "goal_end"], done)
    buffer.extend(data[:0])  # such as a batch of which a filter left nothing
    assert len(buffer) == 21


def test_rows_under_other_names_are_relabelled_alike():
    plain = walk().reshape(-1)
    names = {
        "observation": ("agent", "joined"),
        ("next", "observation"): ("next", "agent", "joined"),
        ("next", "reward"): ("next", "pay"),
    }
    named = plain.clone()
    for old, new in names.items():
        named.rename_key_(old, new)
    other = {"observation_key": ("agent", "joined"), "reward_key": "pay"}
    drawn = []
    for data, options in ((plain, {}), (named, other)):
        buffer = relabelling(**options).make_buffer(storage=LazyTensorStorage(50), batch_size=40)
        buffer.extend(data)
        torch.manual_seed(5)
        drawn.append(buffer.sample())
    for old, new in names.items():
        assert torch.equal(drawn[1][new], drawn[0][old])
    assert (drawn[1]["next", "pay"] == 1).any()  # nobody is paid before rows are relabelled


def test_sac_of_torchrl_learns_in_hindsight_in_a_maze():
    pytest.importorskip("gymnasium_robotics")
    env = make_batched("PointMaze-U-Sparse", 3, seed=0)
    net = nn.Sequential(MLP(8, 4, num_cells=[16]), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    critic = ValueOperator(MLP(10, 1, num_cells=[16]), in_keys=["observation", "action"])
    loss = SACLoss(actor, critic, action_spec=env.action_spec_unbatched)
    targets, optim = SoftUpdate(loss, tau=0.01), torch.optim.Adam(loss.parameters(), 1e-3)
    buffer = relabelling().make_buffer(storage=LazyTensorStorage(5000), batch_size=64)
    paid = []
    for data in Collector(env, actor, frames_per_batch=300, total_frames=900):
        buffer.extend(data.reshape(-1))
        for _ in range(5):
            batch = buffer.sample()
            known = near(batch["next", "observation"][:, :2], batch["observation"][:, 6:])
            assert torch.equal(batch["next", "reward"].squeeze(-1), known.float())
            terms = loss(batch)
            optim.zero_grad()
            sum(terms[k] for k in terms.keys() if k.startswith("loss")).backward()
            optim.step()
            targets.step()
            paid.append(batch["next", "reward"].mean().item())
    assert sum(paid) / len(paid) > 0.1  # who moves at random does not reach the goal


def test_a_model_free_level_learns_in_hindsight():
    pytest.importorskip("gymnasium_robotics")
    env = make_batched("PointMaze-U-Sparse", 3, seed=0)
    buffer = relabelling().make_buffer(storage=LazyTensorStorage(5000))
    level = model_free_level(env=env, buffer=buffer, batch_size=50, n_initial_random_steps=100)
    seen = []
    level.learner.update = lambda batch, update=level.learner.update: (
        seen.append(batch["next", "reward"].mean().item()),
        update(batch),
    )[1]
    for data in collected(env, level, 3, 300):
        info = level.learn(data)
    assert info["n_updates"] == 30
    # Each batch has its share of relabelled rows, though several are sampled at once.
    assert min(seen) > 0.05
    assert {"goal", "goal_reached"} <= set(level.buffer[:].keys())


# -- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"desired": [6, 8]}, ValueError, "desired .* 8"),
        ({"achieved": [-1, 4]}, ValueError, "achieved .*-1"),
        ({"desired": [6]}, ValueError, "the same width"),
        ({"desired": [5, 6]}, ValueError, "different places"),
        ({"achieved": [0.5, 1.0]}, TypeError, "achieved"),
        ({"reward_func": 1.0}, TypeError, "reward_func"),
    ],
)
def test_goals_outside_of_the_observation_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        RelabelGoals(8, **{**PLACES, "reward_func": near} | changes)


def test_rows_and_rewards_of_another_shape_are_refused():
    data = walk()
    buffer = relabelling().make_buffer(storage=LazyTensorStorage(100))
    with pytest.raises(ValueError, match=r"must be \[N\] .* data.reshape\(-1\)"):
        buffer.extend(data)
    wide = data.reshape(-1)
    wide["observation"] = torch.randn(len(wide), 9)
    with pytest.raises(ValueError, match=r"observations of 8, got .* 9\)"):
        buffer_of(wide)
    relabel = relabelling(reward_func=lambda achieved, desired: achieved)
    buffer = relabel.make_buffer(storage=LazyTensorStorage(100), batch_size=10)
    buffer.extend(data.reshape(-1))
    with pytest.raises(ValueError, match=r"reward_func gave \(8, 2\) for 8 rows"):
        buffer.sample()
    with pytest.raises(TypeError, match="make_buffer"):
        TransformedEnv(make_batched("Reacher-v5", 1, seed=0), relabelling()).reset()
    assert isinstance(buffer, HERReplayBuffer)
    agents = data.reshape(-1)
    for part in (agents, agents["next"]):
        part["observation"] = part["observation"][:, None].expand(-1, 2, 8).clone()
    with pytest.raises(ValueError, match=r"observations of 8, got \(42,\) with \(42, 2, 8\)"):
        buffer_of(agents)


def test_storages_that_do_not_fit_are_refused():
    for options in ({}, {"storage": ListStorage(100)}):
        with pytest.raises(TypeError, match=r"TensorStorage, got .*=LazyTensorStorage\(n\)"):
            relabelling().make_buffer(**options)
    with pytest.raises(ValueError, match="storage has ndim=2"):
        relabelling().make_buffer(storage=LazyTensorStorage(100, ndim=2))


@pytest.mark.parametrize("key", ["observation", *(("next", k) for k in ("reward", "done"))])
def test_entries_that_are_missing_are_named(key):
    data = walk().reshape(-1).exclude(key)
    with pytest.raises(KeyError, match=f"RelabelGoals reads .*{key[-1]}.*missing"):
        buffer_of(data)


def test_entries_that_would_be_overwritten_or_cut_are_refused():
    data = walk().reshape(-1)
    data["goal"] = data["observation"][:, 6:].clone()  # the desired goal itself
    buffer_of(data)
    data["goal"][3] += 1
    with pytest.raises(ValueError, match="entry 'goal' that is not the desired goal"):
        buffer_of(data)
    whole = walk()
    whole["next", "reward"] = whole["next", "reward"].long()
    assert (buffer_of(whole).sample(50)["next", "reward"] == 1).any()  # near() gives booleans
    relabel = relabelling(reward_func=lambda achieved, desired: -(achieved - desired).norm(dim=-1))
    buffer = relabel.make_buffer(storage=LazyTensorStorage(100))
    buffer.extend(whole.reshape(-1))
    with pytest.raises(ValueError, match=r"gave torch.float32, but .* stored as torch.int64"):
        buffer.sample(10)


class Threes(Transform):
    """Adds an entry of threes where rows are drawn."""

    def forward(self, tensordict):
        return tensordict.set("three", torch.full(tensordict.shape, 3.0))


def test_transforms_of_what_is_relabelled_are_refused():
    """They would be applied before relabelling, so to the other rows only."""
    buffer = buffer_of(walk(), batch_size=10)
    scale = AffineReward(2.0, 1.0, in_keys=[("next", "reward")])
    with pytest.raises(ValueError, match=r"AffineReward writes .*reward.*relabelled"):
        buffer.append_transform(scale)
    with pytest.raises(ValueError, match=r"DoubleToFloat writes .*observation.*relabelled"):
        buffer.insert_transform(0, DoubleToFloat(["observation"]))
    assert len(buffer.transform) == 1
    buffer.append_transform(lambda td: td.set("two", torch.full(td.shape, 2.0)))
    assert (buffer.sample()["two"] == 2).all()
    buffer.insert_transform(0, Threes())
    assert (buffer.sample()["three"] == 3).all()  # when rows are drawn, not when they are stored
    assert "three" not in buffer.storage[:].keys()
    with pytest.raises(ValueError, match=r"AffineReward writes .*reward.*relabelled"):
        buffer.append_transform(scale)
