"""Levels that learn their spaces later, loading as a whole, and actions that were cut short."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from helpers import (
    ACTIONS,
    OBS,
    SMALL_FACTORY,
    SMALL_PLANNER,
    SMALL_SAC,
    SPACES,
    both,
    make_transitions,
    model_free_level,
    observed,
    planner_level,
    unchanged,
)
from torchrl.data import Bounded, OneHot, Unbounded
from torchrl.envs import ActionMask, Compose, GymEnv, RenameTransform, StepCounter, TransformedEnv

from layeredrl_torchrl import (
    DQNLearner,
    ModelFreeLevel,
    ModelTraining,
    PlannerLevel,
    PredictorFactory,
    get_task,
)
from layeredrl_torchrl.objectives import PartitionedBatch


@both
def test_set_up_later_it_is_as_if_built_with_its_spaces(make):
    torch.manual_seed(1)
    at_once = make(*SPACES)
    later = make()
    assert later.buffer is not None
    torch.manual_seed(1)
    later.setup(*SPACES)
    torch.testing.assert_close(later.state_dict(), at_once.state_dict(), rtol=0, atol=0)
    td = observed(later, torch.randn(4, 2))
    actions = []
    for level in (at_once, later):
        torch.manual_seed(2)
        actions.append(level(td.clone())["action"])
    assert torch.equal(*actions)
    assert later.in_keys == at_once.in_keys
    assert later.optim is not None


@both
def test_set_up_again_it_stays_what_it_learned(make):
    level = make(*SPACES, updates_per_step=0.1)
    level.learn(make_transitions())
    with unchanged(level, level.optim):
        level.setup(Unbounded((2,)), Bounded(-1.0, 1.0, (1,)))
        level.setup(Bounded(-9.0, 9.0, (2,)), gym.spaces.Box(-1.0, 1.0, (1,)))
    for spaces, message in (
        ((Unbounded((3,)), ACTIONS), "set up for the observation space"),
        ((OneHot(2), ACTIONS), "set up for the observation space"),
        ((OBS, Bounded(-1.0, 1.0, (2,))), "set up for the action space"),
        ((OBS, Bounded(-5.0, -4.0, (1,))), "set up for the action space"),
        ((OBS, Unbounded((1,))), "set up for the action space"),
        ((OBS, Bounded(-1.0, 1.0, (1,), dtype=torch.float64)), "set up for the action space"),
    ):
        with unchanged(level), pytest.raises(ValueError, match=message):
            level.setup(*spaces)


@both
def test_what_learned_alone_fits_the_same_environments_observations(make):
    env = get_task("InvertedPendulum-v5").make(seed=0)
    level = make(env=env)
    level.setup(env.observation_spec_unbatched["observation"], env.action_spec_unbatched)
    assert level.action_spec == env.action_spec_unbatched


@both
def test_before_it_is_set_up_it_says_that_it_knows_no_spaces(make):
    level = make()
    for use in (
        lambda: level.action_spec,
        lambda: level.optim,
        lambda: level.learn(make_transitions()),
    ):
        with pytest.raises(RuntimeError, match="has no spaces yet; put it into a Hierarchy"):
            use()
    assert not len(level.buffer)


@both
def test_after_a_setup_that_failed_it_can_be_set_up(make):
    level = make()
    with pytest.raises(TypeError, match=r"observation_space is OneHot\((?s:.)*expected .* floats"):
        level.setup(OneHot(3), ACTIONS)
    with pytest.raises(RuntimeError, match="has no spaces yet"):
        level.action_spec  # noqa: B018
    level.setup(*SPACES)
    assert level.action_spec == ACTIONS


def test_batches_that_the_members_cannot_share_are_refused_before_anything_is_collected():
    factory = PredictorFactory(
        hidden_sizes=(8,),
        n_models=3,
        predictor_options={"model_training": ModelTraining(member_batches=PartitionedBatch())},
    )
    with pytest.raises(ValueError, match=r"model_batch_size is 8, which 3 members.*multiple of 3"):
        planner_level(*SPACES, predictor_factory=factory)
    planner_level(*SPACES, predictor_factory=factory, model_batch_size=9)


def in_its_spec(env):
    spec = env.action_spec.clone()
    spec.update_mask(torch.tensor([True, False]))
    env.action_spec = spec
    return env


MASKS = {
    "an entry": lambda env: env.append_transform(
        RenameTransform(["observation"], ["action_mask"], create_copy=True)
    ),
    "a nested entry": lambda env: env.append_transform(
        RenameTransform(["observation"], [("agents", "action_mask")], create_copy=True)
    ),
    "a transform": lambda env: TransformedEnv(env, ActionMask()),
    "one of several": lambda env: TransformedEnv(env, Compose(ActionMask(), StepCounter())),
    "one below another": lambda env: TransformedEnv(
        TransformedEnv(env, ActionMask()), StepCounter()
    ),
    "a mask of the spec": in_its_spec,
}


@both
@pytest.mark.parametrize("how", MASKS)
def test_an_environment_that_masks_actions_is_refused(make, how):
    options = {"learner_factory": DQNLearner} if make is model_free_level else {}
    plain = GymEnv("CartPole-v1").append_transform(StepCounter())
    assert make(env=plain, **options).action_spec == plain.action_spec
    with pytest.raises(ValueError, match=r"masks actions.*Let the environment"):
        make(env=MASKS[how](GymEnv("CartPole-v1")), **options)


def test_defaults_are_those_that_are_documented():
    parts = {"predictor_factory": SMALL_FACTORY, "planner_factory": SMALL_PLANNER}
    planner, other = (
        PlannerLevel(*SPACES, **parts),
        ModelFreeLevel(*SPACES, learner_factory=SMALL_SAC),
    )
    assert (planner.n_initial_random_steps, other.n_initial_random_steps) == (500, 1000)
    for level in (planner, other):
        assert level.buffer.storage.max_size == 100_000
        assert level.updates_per_step == 1
        assert level.n_initial_updates is None
        assert (level.batch_size, getattr(level, "model_batch_size", 256)) == (256, 256)


# -- loading --------------------------------------------------------------------------------


@both
def test_a_state_is_loaded_as_a_whole_or_not_at_all(make):
    level, other = make(*SPACES, updates_per_step=0.1), make(*SPACES)
    level.learn(make_transitions())
    good = level.state_dict()
    last = next(name for name in reversed(good) if good[name].ndim)
    short = {name: value for name, value in good.items() if name != last}
    for state, message in (
        (good | {last: torch.zeros(7, 7, 7)}, r"saved is \(7, 7, 7\), .* nothing was loaded"),
        (good | {last: None}, "saved is a NoneType"),
        (short, f"1 differences: {last}: not saved"),
        (good | {"more": torch.zeros(1)}, "more: not in"),
    ):
        with unchanged(other), pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    with unchanged(other), pytest.raises(ValueError, match="saved is"):
        other.load_state_dict(good | {last: torch.zeros(7, 7, 7)}, strict=False)
    kept = other.state_dict()[last].clone()
    result = other.load_state_dict(short | {"more": kept}, strict=False)
    assert result.missing_keys == [last]
    assert result.unexpected_keys == ["more"]
    for name, value in other.state_dict().items():
        assert torch.equal(value, kept if name == last else good[name])
    other.load_state_dict(good)
    torch.testing.assert_close(other.state_dict(), good, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"not in .*set up before loading, which a Hierarchy does"):
        make().load_state_dict(good)


# -- actions that were cut short ------------------------------------------------------------


@both
def test_of_an_action_that_a_time_limit_cut_short_nothing_is_learned(make):
    data = make_transitions(n_steps=40)
    ended = torch.arange(40).unsqueeze(-1)
    data["next", "interrupted"] = ended % 4 == 0
    # One that is seen to terminate shows where it led.
    data["next", "terminated"] = ended % 8 == 0
    data["next", "elapsed_steps"] = torch.full((40, 1), 5)
    level = make(*SPACES, updates_per_step=0.1)
    info = level.learn(data)
    stored = (ended % 4 != 0) | (ended % 8 == 0)
    assert stored.sum() == 35
    assert torch.equal(level.buffer[:]["action"], data["action"][stored.squeeze(-1)])
    # The steps were taken all the same; updates go by what is stored.
    assert info["n_env_steps"] == 200
    assert info["n_updates"] == 3
    # Nothing but such: nothing to learn from, and no error.
    cut = data[:8].clone()
    cut["next", "interrupted"] = torch.ones(8, 1, dtype=torch.bool)
    cut["next", "terminated"] = torch.zeros(8, 1, dtype=torch.bool)
    assert level.learn(cut)["n_env_steps"] == 240
    assert len(level.buffer) == 35
    fresh = make(*SPACES, n_initial_updates=5)
    assert fresh.learn(cut)["n_updates"] == 0
