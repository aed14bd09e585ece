"""In evaluation the level above may choose anew before what it chose is over."""

from __future__ import annotations

import pytest
import torch
from torchrl.data import Unbounded
from torchrl.envs import TransformedEnv

from layeredrl_torchrl import Hierarchy

ONE = Unbounded((1,))
LENGTHS = (40,)  # no episode ends within a test


@pytest.fixture(params=["Level", "Timed"])
def agent(toy, request):
    """A level that acts, and one below it with six actions of its own on each."""
    make = getattr(toy, request.param)
    env = toy.Env(2, lengths=LENGTHS)
    hierarchy = Hierarchy([toy.Level(1), make(3, input_spec=ONE, duration=6)], env)
    return TransformedEnv(env, hierarchy.make_tensordict_primer()), hierarchy


def n_chosen(env, hierarchy, n_steps):
    """How often the upper level chose in so many steps of two environments."""
    before = hierarchy.levels[0].n_rows
    data = env.rollout(n_steps, hierarchy, break_when_any_done=False)
    return hierarchy.levels[0].n_rows - before, data


def test_it_chooses_anew_in_evaluation_only(agent):
    env, hierarchy = agent
    assert n_chosen(env, hierarchy.eval(), 12)[0] == 2 * 2
    hierarchy.levels[1].interrupt_after = 4
    assert n_chosen(env, hierarchy.eval(), 12)[0] == 2 * 3
    assert n_chosen(env, hierarchy.train(), 12)[0] == 2 * 2
    hierarchy.levels[1].interrupt_after = None
    assert n_chosen(env, hierarchy.eval(), 12)[0] == 2 * 2


def test_each_input_begins_with_its_first_action(agent):
    env, hierarchy = agent
    hierarchy.levels[1].interrupt_after = 4
    _, data = n_chosen(env, hierarchy.eval(), 12)
    lower = hierarchy.transitions(data)[1]
    assert lower["n_actions"].reshape(2, 12).tolist() == 2 * [3 * [0, 1, 2, 3]]


def test_what_was_interrupted_is_not_learned_as_if_it_had_not_been(agent):
    env, hierarchy = agent
    hierarchy.levels[1].interrupt_after = 4
    _, data = n_chosen(env, hierarchy.eval(), 12)
    # Where acting and cutting go by the same rule, an action ends where it was interrupted.
    upper = hierarchy.transitions(data)[0]
    assert upper["next", "elapsed_steps"].flatten().tolist() == 6 * [4]
    # But what it led to in so few steps is not what all of it leads to.
    with pytest.raises(ValueError, match=r"interrupt_after=4 in evaluation.*duration=6"):
        hierarchy.learn(data)
    with pytest.raises(ValueError, match=r"interrupted 4 times in 24 rows.*interrupt_after=4"):
        hierarchy.train().learn(data)
    _, data = n_chosen(env, hierarchy, 12)
    assert len(hierarchy.transitions(data)[0]) == 2 * 2


def test_the_end_of_one_environment_is_no_interruption(toy):
    """The last row of one is followed by the first of the next, which may look alike."""
    env = toy.Env(2, lengths=LENGTHS)
    hierarchy = Hierarchy([toy.Level(1), toy.Level(3, input_spec=ONE, duration=6)], env)
    env = TransformedEnv(env, hierarchy.make_tensordict_primer())
    data = env.rollout(4, hierarchy, break_when_any_done=False)
    data["next", "observation"][0, -1] = data["observation"][1, 0]
    assert [len(own) for own in hierarchy.transitions(data)] == [0, 8]


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (0, ValueError, "interrupt_after must be at least 1, got 0"),
        (7, ValueError, "interrupt_after is 7.*duration=6.*at most"),
        (2.0, TypeError, "interrupt_after must be an int"),
        (True, TypeError, "interrupt_after must be an int"),
    ],
)
def test_values_that_cannot_be_are_refused(agent, value, error, match):
    _, hierarchy = agent
    with pytest.raises(error, match=match):
        hierarchy.levels[1].interrupt_after = value
    assert hierarchy.levels[1].interrupt_after is None
    hierarchy.levels[1].interrupt_after = 6  # which is no interruption
    with pytest.raises(ValueError, match="duration=None"):
        hierarchy.levels[0].interrupt_after = 1


def test_a_level_in_the_middle_is_interrupted_with_its_own_action(toy):
    """A level in the middle is interrupted by the end of its own action."""
    env = toy.Env(2, lengths=LENGTHS)
    levels = [toy.Level(1), toy.Level(2, input_spec=ONE, duration=2)]
    hierarchy = Hierarchy([*levels, toy.Level(3, input_spec=ONE, duration=6)], env)
    env = TransformedEnv(env, hierarchy.make_tensordict_primer())
    hierarchy.levels[1].interrupt_after = 1
    hierarchy.levels[2].interrupt_after = 3
    data = env.rollout(12, hierarchy.eval(), break_when_any_done=False)
    assert [level.n_rows for level in hierarchy.levels] == [2 * 4, 2 * 4, 2 * 12]
    assert torch.equal(
        hierarchy.transitions(data)[0]["next", "elapsed_steps"], torch.full((8, 1), 3)
    )
