"""Which levels make a hierarchy, and what it says about those that do not."""

from __future__ import annotations

import pytest
import torch
from helpers import SMALL_FACTORY, known, known_level, model_free_level, planner_level
from torchrl.data import Binary, Bounded, OneHot, Unbounded
from torchrl.envs import (
    ActionDiscretizer,
    InitTracker,
    RenameTransform,
    StepCounter,
    TransformedEnv,
)

from layeredrl_torchrl import DQNLearner, Hierarchy, PredictorFactory, RandomLevel

ONE = Unbounded((1,))
BOX = Bounded(-1.0, 1.0, (2,))


def world(action_spec):
    """A known one, of four dimensions, in which nothing moves."""
    return known(lambda s, a: s, lambda *_: torch.zeros(()), action_spec, width=4)


@pytest.fixture
def build(toy):
    """``build(*levels, maps=None)`` over the toy environment."""

    def make(*levels, maps=None, n=None):
        return Hierarchy(list(levels), toy.Env(n), observation_maps=maps)

    return make


@pytest.fixture
def lower(toy):
    """A level that can be the lowest."""

    def make(**options):
        return toy.Level(2, **{"input_spec": ONE, "duration": 2} | options)

    return make


def test_levels_know_their_spaces(build, lower, toy):
    plans = known_level()
    middle, lowest = lower(input_spec=Bounded(-1.0, 1.0, (1,))), lower(input_spec=OneHot(3))
    hierarchy = build(plans, middle, lowest, maps=[[2, 3], None, lambda obs: obs[..., :3].double()])
    assert list(hierarchy.levels) == [plans, middle, lowest]
    assert plans.action_spec == middle.input_spec
    assert middle.action_spec == lowest.input_spec
    assert lowest.action_spec == toy.Env().action_spec
    assert plans.observation_space == Unbounded((2,))
    assert middle.observation_space == Unbounded((4,))
    assert lowest.observation_space == Unbounded((3,), dtype=torch.float64)
    assert plans.parent_predictor is None
    assert middle.parent_predictor is plans.predictor
    assert lowest.parent_predictor is None
    # Built again of the same levels, it is the same.
    build(plans, middle, lowest, maps=[[2, 3], None, lambda obs: obs[..., :3].double()])


def test_parents_are_built_before_their_children(toy, build):
    seen = []

    class Looks(toy.Level):
        def _build(self, observation_space, action_spec):
            seen.append(self.parent_predictor)

    plans = known_level()
    box = Bounded(-1.0, 1.0, (1,))
    build(plans, Looks(2, input_spec=box, duration=1), maps=[[2, 3], None])
    assert seen == [plans.predictor]


def test_a_level_that_was_built_for_the_environment_is_taken_as_it_is(toy):
    env = toy.Env()
    level = planner_level(env=env)
    predictor = level.predictor
    assert Hierarchy([level], env).levels[0].predictor is predictor


@pytest.mark.parametrize("key", ["obs", ("seen", "obs")])
@pytest.mark.parametrize("plans", [True, False])
def test_a_level_that_was_built_for_an_observation_of_another_name_is_taken(toy, plans, key):
    env = TransformedEnv(toy.Env(), RenameTransform(["observation"], [key]))
    if plans:
        factory = PredictorFactory(hidden_sizes=(8,), n_models=2, observation_key=key)
        level = planner_level(env=env, predictor_factory=factory)
    else:
        level = model_free_level(env=env, observation_key=key)
    hierarchy = Hierarchy([level], env, observation_key=key)
    with pytest.raises(ValueError, match=r"level 0 .* was set up for the observation space"):
        Hierarchy([level], env, observation_key=key, observation_maps=[[0, 1]])
    data = env.append_transform(hierarchy.make_tensordict_primer()).rollout(3, hierarchy)
    assert data[key].shape == (3, 4)


@pytest.mark.parametrize("categorical", [True, False])
@pytest.mark.parametrize("learns", [True, False])
def test_one_choice_in_the_form_of_several_is_taken(toy, learns, categorical):
    def choosing(n):
        return TransformedEnv(toy.Env(), ActionDiscretizer(n, categorical=categorical))

    env = choosing(3)
    level = model_free_level(learner_factory=DQNLearner) if learns else RandomLevel()
    hierarchy = Hierarchy([level], env)
    data = env.append_transform(hierarchy.make_tensordict_primer()).rollout(3, hierarchy)
    assert bool(env.action_spec.is_in(data["action"][0]))
    with pytest.raises(ValueError, match=r"(?s)level 0 .* was set up for "):
        Hierarchy([level], choosing(5))


def rated(toy, **options):
    """A level that is rated by the single steps of the one above."""
    level = toy.Level(2, input_spec=ONE, duration=2, **options)
    level.parent_each_step = True
    return level


def test_a_level_rated_by_single_steps_whose_actions_take_several_is_refused(build, lower, toy):
    def top():
        return toy.Level(1, each_step=True)

    message = (
        r"level 1 \(Formula\) below level 0 .* level 2 \(Formula, the lowest\) carries out, may "
        ".* put it lowest, build it with each_step=True too"
    )
    with pytest.raises(ValueError, match=message):
        build(top(), rated(toy), lower())
    build(top(), rated(toy))
    build(top(), rated(toy, each_step=True), lower())
    build(top(), lower(), lower())


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "levels is empty", lambda top, low: []),
        (TypeError, r"levels\[1\] is a int", lambda top, low: [top(), 3]),
        (
            ValueError,
            r"level 0 \(Formula, the highest\) takes .* \(level 1 .* is below",
            lambda top, low: [top(input_spec=ONE), low()],
        ),
        (
            ValueError,
            r"level 0 .* nothing is above it .* put level 2 \(Formula, the lowest\) first",
            lambda top, low: [low(), low(), top()],
        ),
        (
            ValueError,
            r"level 1 \(Formula, the lowest\) below level 0 \(Formula, the highest\) takes nothing"
            ".* put it first",
            lambda top, low: [top(), low(input_spec=None, duration=None)],
        ),
        (
            ValueError,
            r"level 1 \(Formula\) below level 0 \(Formula, the highest\) never hands",
            lambda top, low: [top(), low(duration=None), low()],
        ),
        (
            ValueError,
            r"level 1 \(Formula, the lowest\) below level 0 .* has each_step=True",
            lambda top, low: [top(), low(each_step=True)],
        ),
    ],
)
def test_levels_that_do_not_fit_are_refused(build, lower, toy, error, message, make):
    class Formula(toy.Level):
        """By its duration alone."""

        hands_back = toy.Base.hands_back

    def low(**options):
        return Formula(2, **{"input_spec": ONE, "duration": 2} | options)

    with pytest.raises(error, match=message):
        build(*make(lambda **options: Formula(1, **options), low))


@pytest.mark.parametrize(
    ("factory", "below", "message"),
    [
        (SMALL_FACTORY, Unbounded((2,)), "has no bounds"),
        (SMALL_FACTORY, Bounded(-1.0, torch.inf, (2,)), "no finite bounds"),
        (lambda *_: world(Bounded(-1.0, 1.0, (1,))), BOX, "model was built for"),
        (lambda *_: world(OneHot(2)), BOX, "model was built for"),
        (lambda *_: world(Bounded(-1.0, 0.5, (2,))), BOX, r"built for .* to \[0.5, 0.5\]"),
    ],
)
def test_inputs_that_the_level_above_cannot_plan_are_refused(build, toy, factory, below, message):
    class Any(toy.Level):
        """Takes any input."""

    top = planner_level(predictor_factory=factory)
    both = r"(?s)level 0 \(PlannerLevel, the highest\) above level 1 \(Any, the lowest\): .*"
    with pytest.raises(ValueError, match=both + message):
        build(top, Any(2, input_spec=below, duration=2))


def test_the_same_level_twice_is_refused(build, lower, toy):
    low = lower()
    with pytest.raises(ValueError, match=r"level 1 \(Formula\) and level 2 .* the same object"):
        build(toy.Level(1), low, low)
    build(toy.Level(1), lower(duration=None))  # its rule of handing back needs no duration


def test_a_level_set_up_for_other_spaces_is_refused(build, lower, toy):
    top = toy.Level(1)
    top.setup(Unbounded((4,)), Bounded(-1.0, 1.0, (2,)))
    both = r"level 0 \(Formula, the highest\) above level 1 \(Formula, the lowest\)"
    with pytest.raises(ValueError, match=both + ".*set up for the action space"):
        build(top, lower())
    # The same shape, and yet another space.
    top = toy.Level(1)
    top.setup(Unbounded((4,)), Bounded(-1.0, 1.0, (1,)))
    with pytest.raises(ValueError, match="(?s)" + both + ".*set up for the action space Bounded"):
        build(top, lower())
    top = toy.Level(1)
    top.setup(Unbounded((4,)), ONE)
    with pytest.raises(ValueError, match=both + ".*set up for the observation space"):
        build(top, lower(), maps=[[1, 2], None])


def test_a_level_that_needs_a_predictor_is_refused_without_one(build, lower, toy):
    class Needs(toy.Level):
        def attach(self, parent_predictor):
            if parent_predictor is None:
                raise ValueError("pass a level with a predictor")

    with pytest.raises(
        ValueError, match=r"level 1 \(Needs, the lowest\) below level 0 \(Formula.*pass a level"
    ):
        build(toy.Level(1), Needs(2, input_spec=ONE, duration=1))
    with pytest.raises(ValueError, match=r"level 0 \(Needs, the highest\) \(level 1 \(Formula.*"):
        build(Needs(1), lower())


@pytest.mark.parametrize(
    ("error", "message", "choice"),
    [
        (TypeError, "expected indices, not flags", [True, False]),
        (ValueError, "different indices from 0 to 3", [0, 4]),
        (ValueError, "different indices from 0 to 3", [-1]),
        (ValueError, "different indices from 0 to 3", [1, 1]),
        (ValueError, "different indices from 0 to 3", []),
        (TypeError, "expected a list of indices", [0.5]),
        (ValueError, r"gave \(1,\) for .* expected \(1, obs_i\)", lambda obs: obs[..., 0]),
        (ValueError, "gave int for", lambda obs: 3),
    ],
)
def test_an_observation_map_that_does_not_fit_is_refused(build, lower, toy, error, message, choice):
    where = r"level 1 \(Formula, the lowest\) above the environment: its observation map"
    with pytest.raises(error, match=f"{where}.*{message}"):
        build(toy.Level(1), lower(), maps=[None, choice])


def test_an_environment_without_a_flat_observation_is_refused(toy):
    class Other(toy.Env):
        def __init__(self):
            super().__init__()
            self.observation_spec["picture"] = self.observation_spec["observation"]
            del self.observation_spec["observation"]

    carrying = Other().append_transform(InitTracker()).append_transform(StepCounter())
    with pytest.raises(ValueError, match=r"observes \['picture'\], expected one flat 'obs"):
        Hierarchy([toy.Level(1)], carrying)
    with pytest.raises(ValueError, match="2 entries for 1 levels"):
        Hierarchy([toy.Level(1)], toy.Env(), observation_maps=[None, None])


def test_an_environment_that_masks_actions_is_refused(toy):
    class Masked(toy.Env):
        def __init__(self):
            super().__init__()
            self.observation_spec["action_mask"] = Binary(3, dtype=torch.bool)

    with pytest.raises(ValueError, match=r"masks actions.*Let the environment"):
        Hierarchy([toy.Level(1)], Masked())


@pytest.mark.parametrize(
    "start",
    [
        {"default_value": 1.0},
        {"default_value": lambda: torch.ones(1)},
        {"default_value": {("own", "sum"): lambda: torch.ones(1)}},
        {"random": True},
    ],
)
def test_memory_starts_from_zeros(toy, build, start):
    class Other(toy.Level):
        def make_tensordict_primer(self):
            primer = super().make_tensordict_primer()
            return type(primer)(primer.primers, expand_specs=True, **start)

    with pytest.raises(ValueError, match="memory in a hierarchy starts from zeros"):
        build(Other(1))
    for zeros in (0, {("own", "sum"): 0.0}, {"own": {"sum": torch.zeros(1)}}):
        start = {"default_value": zeros}
        build(Other(1))
