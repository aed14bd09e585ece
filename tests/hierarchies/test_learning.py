"""What levels of a hierarchy learn from, and how a run goes on after it was saved."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import SMALL_SAC, Kept, collected, model_free_level, planner_level
from tensordict import TensorDict
from torchrl.data import Bounded, Unbounded

from layeredrl_torchrl import (
    ActionSequenceLevel,
    ConstantLevel,
    Hierarchy,
    ModelFreeLevel,
    RandomLevel,
    SkillLevel,
    SPlaTESReward,
)

ONE = Unbounded((1,))
BOX = Bounded(-1.0, 1.0, (1,))
make_learner = partial(
    planner_level, n_initial_random_steps=15, updates_per_step=0.2, random_prob=0.1
)


def run(policy, env, n_rounds=4):
    """Collect and learn in turn; all actions and infos."""
    torch.manual_seed(0)
    actions, infos = [], []
    for data in collected(env, policy, n_rounds):
        actions.append(data["action"])
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


def test_each_level_learns_from_its_transitions_the_highest_first(toy):
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
    first, second = collected(env, hierarchy, 2, 5)
    assert hierarchy.learn(first) == {"Notes_1/n": 2.0, "Feet/n": 5.0}
    assert hierarchy.learn(second) == {"Notes_0/n": 1.0, "Notes_1/n": 3.0, "Feet/n": 5.0}
    assert [factor for factor, _ in order] == [2, 3, 1, 2, 3]
    for (_, got), expected in zip(order[2:], hierarchy.transitions(second), strict=True):
        assert (got == expected).all()


@pytest.mark.parametrize("width", [0, 1])
def test_a_reward_func_sees_the_transition_and_replaces_its_reward(toy, width):
    """It sees the whole transition, with the environment's reward, and replaces that."""

    def double(own):
        reward = 2 * own["next", "reward"] - own["input"] + own["n_actions"]
        return reward if width else reward.squeeze(-1)

    env = toy.Env(2)
    (plain, own) = (
        Hierarchy([toy.Level(1), toy.Level(3, input_spec=ONE, duration=2, **options)], env)
        for options in ({}, {"reward_func": double})
    )
    (data,) = collected(env, plain, 1, 18)
    info = own.learn(data.clone())
    plain, own = plain.transitions(data), own.transitions(data)
    assert (plain[0] == own[0]).all()
    expected = 2 * plain[1]["next", "reward"] - plain[1]["input"] + plain[1]["n_actions"]
    assert torch.equal(own[1]["next", "reward"], expected)
    (paid,) = (value for name, value in info.items() if name.endswith("/reward"))
    assert paid == pytest.approx(expected.mean().item())
    wrong = Hierarchy([toy.Level(1, reward_func=lambda own: own["observation"])], env)
    with pytest.raises(
        ValueError, match=r"Formula.reward_func gave \(18, 4\), expected \(18,\) or"
    ):
        wrong.learn(next(collected(env, wrong, 1, 18)))


def test_a_reward_of_its_own_is_computed_once(toy):
    """A level that learns computes it itself where it is alone."""
    env = toy.Env(2)
    options = {"n_initial_random_steps": 1000, "reward_func": lambda own: 3 * own["next", "reward"]}
    lower = model_free_level(input_spec=Bounded(-5.0, 5.0, (1,)), duration=2, **options)
    hierarchy = Hierarchy([RandomLevel(), lower], env)
    (data,) = collected(env, hierarchy, 1, 18)
    hierarchy.learn(data)
    expected = 3 * data["next", "reward"].reshape(-1, 1)
    assert torch.equal(lower.buffer[:]["next", "reward"], expected)


class Reaching(ModelFreeLevel):
    """Hands back where the sum of actions is above its input, too."""

    def hands_back(self, tensordict):
        above = tensordict["observation"][..., -1:] > tensordict["input"]
        return super().hands_back(tensordict) | above


@pytest.mark.parametrize("input_ends", [True, False])
@pytest.mark.parametrize("each_step", [True, False])
@pytest.mark.parametrize(("kind", "duration"), [(ModelFreeLevel, 2), (Reaching, 3), (Reaching, 1)])
def test_the_state_at_an_end_is_seen_as_the_one_it_acts_on_next(
    toy, kind, duration, each_step, input_ends
):
    """Where a transition is one environment step of several under an action, too."""
    env = toy.Env(2, lengths=(20, 31))
    middle = kind(
        input_spec=Bounded(-5.0, 5.0, (1,)),
        duration=duration,
        each_step=each_step,
        input_ends=input_ends,
        learner_factory=SMALL_SAC,
        n_initial_random_steps=10_000,
    )
    low = RandomLevel(input_spec=BOX, duration=3)
    hierarchy = Hierarchy([RandomLevel(), middle, low], env)
    (data,) = collected(env, hierarchy, 1, 240)
    rows = hierarchy.transitions(data)[1]
    middle.learn(rows)
    rows = rows[~rows["next", "interrupted"].squeeze(-1)]
    seen, after = middle._prepare(rows), rows["next"]
    follows = (after["observation"][:-1] == rows["observation"][1:]).all(-1, keepdim=True)
    goes_on = (follows & ~after["input_done"][:-1]).squeeze(-1)
    # A single action, as a whole, is all of its input.
    assert goes_on.any() == (duration > 1 or each_step)
    now, then = seen["features"][1:][goes_on], seen["next", "features"][:-1][goes_on]
    assert torch.equal(then, now)
    # An end of the input: nothing follows, or the same input is given again.
    over = after["input_done"] & ~after["done"]
    assert over.any()
    if input_ends:
        assert bool(seen["next", "terminated"][over].all())
    else:
        anew = torch.zeros_like(rows["n_actions"])
        again = middle.features(after["observation"], rows["input"], anew)
        assert torch.equal(seen["next", "features"][over.squeeze(-1)], again[over.squeeze(-1)])
    ends, inside = over & input_ends, ~after["done"]
    assert torch.equal(seen["next", "terminated"][inside], ends[inside])


def kinds_of_lower_levels():
    learns = {"learner_factory": SMALL_SAC, "n_initial_random_steps": 20, "updates_per_step": 0.1}
    given = {"input_spec": BOX, "duration": 2}
    return {
        "model-free": lambda: ModelFreeLevel(**given, **learns),
        "skills": lambda: SkillLevel(
            **given, **learns, skill_reward=SPlaTESReward(n_skill_samples=4), end_prob=0.2
        ),
        "random": lambda: RandomLevel(**given),
        "constant": lambda: ConstantLevel(torch.ones(1), **given),
        "sequence": lambda: ActionSequenceLevel(torch.ones(2, 1), **given),
    }


KEYS = ["observation", "input", "action", "reward", "done", "terminated"]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", kinds_of_lower_levels())
def test_keys_may_be_set_after_a_level_was_built(toy, kind, late):
    """It does and learns the same under any."""
    outcomes = []
    for named in (False, True):
        torch.manual_seed(0)
        level, env = kinds_of_lower_levels()[kind](), toy.Env(2)
        if not late:
            hierarchy = Hierarchy([make_learner(), level], env)
        for key in KEYS if named else ():
            setattr(level, f"{key}_key", f"my_{key}")
        if late:
            hierarchy = Hierarchy([make_learner(), level], env)
        reads, writes = set(level.in_keys), set(level.out_keys)
        assert level.observation_key in reads
        assert level.action_key in writes
        assert (level.input_key in reads) == (kind in ("model-free", "skills"))
        outcomes.append(run(hierarchy, env, 3))
    (one, infos), (other, more) = outcomes
    assert torch.equal(one, other)
    assert infos == more
    if level.buffer is not None:
        assert level.learn(hierarchy.transitions(next(collected(env, hierarchy, 1)))[1])
        stored = {key for key in level.buffer[:].keys(True, True) if key != "index"}
        assert {"my_observation", "my_action", "my_input", ("next", "my_reward")} <= stored
        assert not {"observation", "action", "input", ("next", "reward")} & stored


def test_a_subclass_may_have_its_own_lists_of_keys():
    level = RandomLevel()
    level.in_keys = ["observation", "more"]
    level.observation_key = "seen"
    assert level.in_keys == ["observation", "more"]
    assert RandomLevel().in_keys == ["observation"]


@pytest.mark.parametrize("named", [(), ("Feet",), ("Feet", "Feet", "Feet")])
@pytest.mark.parametrize("kinds", ["p", "m", "pm", "pmm", "mm", "mmm"])
def test_levels_log_under_the_names_that_results_have(toy, kinds, named):
    env, kept = toy.Env(2), Kept()
    make = {"p": planner_level, "m": model_free_level}
    below = {"input_spec": BOX, "duration": 2}
    levels = [make[k](logger=kept, **(below if i else {})) for i, k in enumerate(kinds)]
    for level, name in zip(levels, named, strict=False):
        level.name = name
    hierarchy = Hierarchy(levels, env)
    (data,) = collected(env, hierarchy, 1, 80)
    info = hierarchy.learn(data)
    logged = [(name, value) for metrics, _ in kept.logged for name, value in metrics.items()]
    assert len({name for name, _ in logged}) == len(logged)
    assert all(info[name] == value for name, value in logged)
    assert {name.split("/")[0] for name, _ in logged} == {name.split("/")[0] for name in info}


def test_trajectories_are_told_apart(toy):
    env = toy.Env(3)
    hierarchy = Hierarchy([toy.Level(1), toy.Level(3, input_spec=ONE, duration=3)], env)
    (data,) = collected(env, hierarchy, 1, 60)
    for own in hierarchy.transitions(data):
        episode = torch.stack([own["observation"][:, 0], own["observation"][:, 1]], -1)
        same = (episode.unsqueeze(0) == episode.unsqueeze(1)).all(-1)
        ids = own["collector", "traj_ids"]
        assert torch.equal(same, ids.unsqueeze(0) == ids.unsqueeze(1))


@pytest.mark.parametrize("each_step", [False, True])
def test_what_ends_without_terminating_was_truncated(toy, each_step):
    """Where the environment does not say so itself."""
    env = toy.Env(2)
    upper = toy.Level(1, each_step=each_step)
    hierarchy = Hierarchy([upper, toy.Level(3, input_spec=ONE, duration=3)], env)
    (data,) = collected(env, hierarchy, 1, 60)
    assert data["next", "truncated"].any()
    assert data["next", "terminated"].any()
    untold = data.exclude(("next", "truncated"))
    for own, expected in zip(
        hierarchy.transitions(untold), hierarchy.transitions(data), strict=True
    ):
        assert (own == expected).all()


def test_data_that_another_policy_collected_are_refused(toy):
    env = toy.Env()
    hierarchy = Hierarchy([toy.Level(1)], env)
    with pytest.raises(KeyError, match=r"reads \('next', 'hierarchy'\).*hierarchy as its policy"):
        hierarchy.transitions(env.rollout(3))
    with pytest.raises(TypeError, match="got NoneType; pass what a collector yields"):
        hierarchy.learn(None)
    first, second = collected(env, hierarchy, 2, 6, init_random_frames=6)
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
        (data,) = collected(env, hierarchy, 1)
        actions.append(data["action"])
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
