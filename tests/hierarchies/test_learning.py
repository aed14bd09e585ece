"""What levels of a hierarchy learn from, and how a run goes on after it was saved."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Bounded, Unbounded

from layeredrl_torchrl import Hierarchy, ICEMPlanner, PlannerLevel, PredictorFactory

ONE = Unbounded((1,))
BOX = Bounded(-1.0, 1.0, (1,))


def make_learner(**options):
    """A level with a small predictor that learns."""
    small = {"n_initial_random_steps": 15, "updates_per_step": 0.2, "random_prob": 0.1}
    return PlannerLevel(
        predictor_factory=PredictorFactory(hidden_sizes=(8,), n_models=2),
        planner_factory=partial(ICEMPlanner, horizon=2, n_samples=16, n_iterations=2),
        **small | {"batch_size": 8, "model_batch_size": 8} | options,
    )


def run(policy, env, n_rounds=4):
    """Collect and learn in turn; all actions and infos."""
    torch.manual_seed(0)
    collector = Collector(
        env,
        policy,
        frames_per_batch=20,
        total_frames=20 * n_rounds,
        auto_register_policy_transforms=True,
    )
    actions, infos = [], []
    for data in collector:
        actions.append(data["action"].clone())
        infos.append(policy.learn(data))
    return torch.cat(actions, -2), infos


@pytest.mark.parametrize("n", [None, 2])
def test_one_level_equals_that_level_alone(toy, n):
    """Bit for bit: what it does, and (where its buffer has the same layout) what it learns."""
    torch.manual_seed(1)
    options = {} if n is None else {"n_initial_random_steps": 0, "updates_per_step": 0.0}
    alone = make_learner(env=toy.Env(n), **options)
    torch.manual_seed(1)
    level = make_learner(**options)
    hierarchy = Hierarchy([level], toy.Env(n))
    actions, infos = run(alone, toy.Env(n))
    others, more = run(hierarchy, toy.Env(n))
    assert torch.equal(actions, others)
    assert more == [{f"PlannerLevel/{k}": v for k, v in info.items()} for info in infos]
    assert n is not None or sum(info["n_updates"] for info in infos) == 16
    for one, other in zip(alone.parameters(), level.parameters(), strict=True):
        assert torch.equal(one, other)


def test_learns_from_its_transitions(toy):
    """Highest first; levels without transitions are left out; names are made unique."""
    order = []

    class Notes(toy.Level):
        def learn(self, data):
            order.append((self.factor, data))
            return {"n": float(len(data))}

    env = toy.Env(lengths=(50,))
    levels = [Notes(1), Notes(2, input_spec=ONE, duration=3), Notes(3, input_spec=ONE, duration=2)]
    levels[2].name = "Feet"
    hierarchy = Hierarchy(levels, env)
    first, second = toy.collect(env, hierarchy, 2, 5)
    assert hierarchy.learn(first) == {"Notes_1/n": 2.0, "Feet/n": 5.0}
    assert hierarchy.learn(second) == {"Notes_0/n": 1.0, "Notes_1/n": 3.0, "Feet/n": 5.0}
    assert [factor for factor, _ in order] == [2, 3, 1, 2, 3]
    for (_, got), expected in zip(order[2:], hierarchy.transitions(second), strict=True):
        assert (got == expected).all()


@pytest.mark.parametrize("width", [0, 1])
def test_reward_func(toy, width):
    """It sees the whole transition, with the environment's reward, and replaces that."""

    def double(own):
        reward = 2 * own["next", "reward"] - own["input"] + own["n_actions"]
        return reward if width else reward.squeeze(-1)

    env = toy.Env(2)
    (plain, own) = (
        Hierarchy([toy.Level(1), toy.Level(3, input_spec=ONE, duration=2, **options)], env)
        for options in ({}, {"reward_func": double})
    )
    (data,) = toy.collect(env, plain, 1, 9)
    plain, own = plain.transitions(data), own.transitions(data)
    assert (plain[0] == own[0]).all()
    expected = 2 * plain[1]["next", "reward"] - plain[1]["input"] + plain[1]["n_actions"]
    assert torch.equal(own[1]["next", "reward"], expected)


def test_a_reward_func_of_another_shape(toy):
    env = toy.Env(2)
    hierarchy = Hierarchy([toy.Level(1, reward_func=lambda own: own["observation"])], env)
    (data,) = toy.collect(env, hierarchy, 1, 3)
    with pytest.raises(ValueError, match=r"Formula.reward_func gave \(6, 4\), expected \(6,\) or"):
        hierarchy.learn(data)


def test_trajectories_are_told_apart(toy):
    env = toy.Env(3)
    hierarchy = Hierarchy([toy.Level(1), toy.Level(3, input_spec=ONE, duration=3)], env)
    (data,) = toy.collect(env, hierarchy, 1, 20)
    for own in hierarchy.transitions(data):
        episode = torch.stack([own["observation"][:, 0], own["observation"][:, 1]], -1)
        same = (episode.unsqueeze(0) == episode.unsqueeze(1)).all(-1)
        ids = own["collector", "traj_ids"]
        assert torch.equal(same, ids.unsqueeze(0) == ids.unsqueeze(1))


def test_data_of_others(toy):
    env = toy.Env()
    hierarchy = Hierarchy([toy.Level(1)], env)
    with pytest.raises(KeyError, match=r"reads 'hierarchy'.*hierarchy as its policy"):
        hierarchy.transitions(env.rollout(3))
    with pytest.raises(TypeError, match="got NoneType; pass what a collector yields"):
        hierarchy.learn(None)
    collector = Collector(
        env,
        hierarchy,
        frames_per_batch=6,
        total_frames=12,
        init_random_frames=6,
        auto_register_policy_transforms=True,
    )
    first, second = collector
    with pytest.raises(ValueError, match="6 of 6 rows were collected by another policy"):
        hierarchy.learn(first)
    assert isinstance(second, TensorDict)


def make_two(toy):
    """A planner over a planner, both learning."""
    upper = make_learner(n_initial_random_steps=30, random_prob=0.3)
    lower = toy.Follower(BOX, duration=3)
    return Hierarchy([upper, lower], toy.Env(), observation_maps=[[1, 2, 3], None])


def rounds(hierarchy, env, n):
    """``n`` times 20 steps, each from fresh episodes, as a resumed run begins them."""
    actions = []
    for _ in range(n):
        collector = Collector(
            env,
            hierarchy,
            frames_per_batch=20,
            total_frames=20,
            auto_register_policy_transforms=True,
        )
        (data,) = collector
        actions.append(data["action"].clone())
        hierarchy.learn(data)
    return torch.cat(actions)


def test_a_saved_run_goes_on_bit_for_bit(toy, tmp_path):
    torch.manual_seed(0)
    whole = make_two(toy)
    counters = {"round": 0}
    rounds(whole, toy.Env(), 3)
    counters["round"] = 3
    whole.checkpoint(counters=counters).save(tmp_path / "saved")
    expected = rounds(whole, toy.Env(), 2)

    torch.manual_seed(5)
    resumed, found = make_two(toy), {"round": 0}
    rounds(resumed, toy.Env(), 1)
    resumed = make_two(toy)
    resumed.checkpoint(counters=found).load(tmp_path / "saved")
    assert found == {"round": 3}
    assert torch.equal(rounds(resumed, toy.Env(), 2), expected)
    one, other = whole.state_dict(), resumed.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert len(whole.levels[0].buffer) == len(resumed.levels[0].buffer)


def test_a_state_that_does_not_fit_changes_nothing(toy):
    hierarchy = make_two(toy)
    saved = {key: value.clone() for key, value in hierarchy.state_dict().items()}
    other = {key: value + 1 for key, value in saved.items()}
    key, value = next((k, v) for k, v in reversed(other.items()) if v.ndim)
    other[key] = value.unsqueeze(0).repeat(2, *[1] * value.ndim)
    with pytest.raises(ValueError, match=r"does not fit this Hierarchy.*nothing was loaded"):
        hierarchy.load_state_dict(other)
    now = hierarchy.state_dict()
    assert all(torch.equal(now[key], saved[key]) for key in saved)
