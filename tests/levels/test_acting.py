"""A PlannerLevel as a policy: plans, random actions, and what it carries from step to step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import (
    ACTIONS,
    OBS,
    SMALL_FACTORY,
    SPACES,
    make_transitions,
    model_free_level,
    observed,
    planner_level,
    point_level,
    unchanged,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.envs.utils import ExplorationType, set_exploration_type, step_mdp

from layeredrl_torchrl import (
    ActionSequenceLevel,
    ConstantLevel,
    DQNLearner,
    ICEMPlanner,
    PlannerLevel,
    RandomLevel,
)


def far_goals(n, seed=0):
    """Observations ``[n, 2]`` with the goal far to the right: the best action is 1."""
    place = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed))
    return torch.cat([place, place + 5.0], -1)


def steps(level, td, n):
    """``n`` steps in which nothing but what is carried changes; the random flags ``[n, *B]``."""
    flags = []
    for _ in range(n):
        level(td)
        flags.append(td["random_action"].squeeze(-1).clone())
        td["next", "observation"] = td["observation"]
        td = step_mdp(td)
    return torch.stack(flags)


def test_without_random_steps_it_is_its_planner():
    level = point_level()
    td = observed(level, torch.randn(3, 2))
    alone = level.planner
    for step in range(3):
        torch.manual_seed(step)
        ours = level(td.clone())
        torch.manual_seed(step)
        expected = alone(td.clone())
        assert torch.equal(ours["action"], expected["action"])
        assert (ours["next", "planner"] == expected["next", "planner"]).all()
        assert not ours["random_action"].any()
        ours["next", "observation"] = torch.randn(3, 2)
        td = step_mdp(ours)
        assert td["planner", "warm"].all()


def test_the_initial_steps_are_random():
    level = point_level(n_initial_random_steps=1)
    for random in (True, False):
        out = level(observed(level, torch.randn(2, 3, 2)))
        assert out["action"].shape == out["random_action"].shape == (2, 3, 1)
        assert (out["random_action"] == random).all()
        assert (out["next", "planner", "warm"] != random).all()
        level.n_env_steps += 1


def test_in_a_mixed_batch_only_the_others_plan():
    level = point_level(random_prob=0.5)
    out = level(observed(level, far_goals(400)))
    random = out["random_action"].squeeze(-1)
    assert 140 < random.sum() < 260
    # The best of some forty plans is never one that goes the wrong way.
    assert (out["action"][~random] > 0.0).all()
    assert out["action"][~random].mean() > 0.8
    assert abs(out["action"][random].mean()) < 0.25
    assert torch.equal(out["next", "planner", "warm"].squeeze(-1), ~random)
    assert not out["next", "planner", "elites"][random].any()
    assert out["next", "planner", "elites"][~random].any()


def test_random_phases_last_as_long_as_told():
    """Lengths are exact, and how often is what the Markov chain of the phases says."""
    prob, duration, n_steps, n = 0.2, 4, 30, 400
    level = point_level(random_prob=prob, random_duration=duration)
    flags = steps(level, observed(level, far_goals(n)), n_steps)
    for row in flags.T.tolist():
        length = 0
        for flag in row:
            if not flag:
                # One phase may follow another at once.
                assert length % duration == 0
                length = 0
            else:
                length += 1
    # State: random steps that are left; from 0 a phase begins with probability `prob`.
    chain = torch.zeros(duration, duration, dtype=torch.float64)
    chain[0, 0], chain[0, duration - 1] = 1 - prob, prob
    for left in range(1, duration):
        chain[left, left - 1] = 1.0
    at, expected = torch.eye(duration, dtype=torch.float64)[0], []
    for _ in range(n_steps):
        expected.append(float(1.0 - at[0] * (1 - prob)))
        at = at @ chain
    share = flags.double().mean(-1)
    assert (share - torch.tensor(expected)).abs().max() < 4 * (0.25 / n) ** 0.5


def test_evaluation_is_never_random():
    level = point_level(n_initial_random_steps=100, random_prob=1.0)
    td = observed(level, far_goals(3))
    td["random_steps_left"] += 5
    assert level(td.clone())["random_action"].all()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert not level(td.clone())["random_action"].any()
    level.eval()
    out = level(td.clone())
    assert not out["random_action"].any()
    assert (out["next", "random_steps_left"] == 1).all()  # it acted, and nothing is left
    assert level.train()(td)["random_action"].all()


@pytest.mark.parametrize("spec", [OneHot(3), Bounded(-2.0, 3.0, (2,))], ids=["skill", "torque"])
def test_actions_are_of_any_spec_that_is_given(spec):
    level = planner_level(OBS, spec, random_prob=0.5)
    with unchanged(level):
        out = level(observed(level, torch.randn(20, 2)))
    assert 0 < out["random_action"].sum() < 20
    assert spec.is_in(out["action"])
    assert out["action"].dtype == spec.dtype


def test_keys_can_be_renamed():
    level = point_level(
        random_prob=1.0, random_action_key=("upper", "random"), state_key=("upper", "left")
    )
    out = level(observed(level, far_goals(3)))
    assert set(level.out_keys) <= set(out.keys(True, True))
    assert out["upper", "random"].all()
    assert (out["next", "upper", "left"] == 10).all()  # it acted, and nine are left


def test_what_is_missing_is_named():
    level = point_level()
    td = observed(level, far_goals(3))
    with pytest.raises(KeyError, match=r"reads 'random_steps_left'.*make_tensordict_primer"):
        level(td.exclude("random_steps_left"))
    with pytest.raises(KeyError, match=r"reads 'planner', which is missing"):
        level(td.exclude("planner"))
    with pytest.raises(KeyError, match="reads 'observation', which is missing"):
        level(td.exclude("observation"))


def test_factories_see_what_they_should():
    seen = {}

    def predictor_factory(observation_space, action_space):
        seen["spaces"] = observation_space, action_space
        return SMALL_FACTORY(observation_space, action_space)

    def planner_factory(predictor, *, action_spec):
        seen["predictor"], seen["action_spec"] = predictor, action_spec
        return ICEMPlanner(predictor, action_spec=action_spec, horizon=3)

    factories = {"predictor_factory": predictor_factory, "planner_factory": planner_factory}
    level = PlannerLevel(*SPACES, **factories)
    assert seen["spaces"] == SPACES
    assert seen["predictor"] is level.predictor
    assert seen["action_spec"] == ACTIONS
    assert level.planner.optimizer.horizon == 3


class Shooting(TensorDictModuleBase):
    """A planner of one's own: it tries actions for one step and remembers the best one's score."""

    def __init__(self, predictor, *, action_spec):
        super().__init__()
        self.predictor, self.spec = predictor, action_spec
        self.action_key = "action"
        self.in_keys = ["observation", ("shooting", "score")]
        self.out_keys = ["action", ("next", "shooting", "score")]

    def forget(self, batch=(), device=None):
        score = torch.zeros(*batch, 1, device=device)
        return TensorDict({"shooting": {"score": score}}, torch.Size(batch))

    def make_tensordict_primer(self):
        spec = Composite(shooting=Composite(score=Unbounded((1,))))
        return TensorDictPrimer(spec, expand_specs=True)

    def forward(self, tensordict):
        obs = tensordict["observation"]
        tried = self.spec.rand((40, *obs.shape[:-1]))
        rewards = self.predictor.predict_reward(obs.expand(40, *obs.shape), tried)
        score, best = rewards.max(0)
        index = best[None, ..., None].expand(1, *best.shape, 1)
        tensordict["action"] = tried.gather(0, index)[0]
        tensordict["next", "shooting", "score"] = score.unsqueeze(-1) + 1e3
        return tensordict


class Loose:
    """The same one, but no module: the level alone saves and moves its predictor."""

    def __init__(self, predictor, *, action_spec):
        self.inner = inner = Shooting(predictor, action_spec=action_spec)
        self.in_keys, self.out_keys, self.action_key = inner.in_keys, inner.out_keys, "action"
        self.forget, self.make_tensordict_primer = inner.forget, inner.make_tensordict_primer

    def __call__(self, tensordict):
        return self.inner(tensordict)


@pytest.mark.parametrize("kind", [Shooting, Loose])
def test_a_planner_of_ones_own_is_carried_forgotten_and_saved_once(kind):
    """Its memory is carried, forgotten in random steps, and not stored; it is saved once."""
    level = planner_level(*SPACES, planner_factory=kind, random_prob=0.5)
    saved = {value.data_ptr() for value in level.state_dict().values()}
    assert {p.data_ptr() for p in level.predictor.parameters()} <= saved
    td = observed(level, torch.randn(200, 2))
    with unchanged(level):
        out = level(td)
    random = out["random_action"]
    assert torch.equal(out["next", "shooting", "score"] == 0.0, random)
    assert 60 < random.sum() < 140
    assert level.learn(make_transitions())["n_updates"] == 6
    pointers = [value.data_ptr() for value in level.state_dict().values() if value.numel()]
    assert len(set(pointers)) == len(pointers)

    class Forgetful(Shooting):
        forget = property()

    with pytest.raises(TypeError, match=r"gave a Forgetful, expected .* forget\(\)"):
        planner_level(*SPACES, planner_factory=Forgetful)


def test_with_a_known_predictor_it_plans_and_stores_and_nothing_is_updated():
    """It plans, stores and counts; updates are due, and change nothing."""
    level = point_level(random_prob=0.3, updates_per_step=0.5)
    assert level.optim is None
    before = {name: x.clone() for name, x in level.predictor.state_dict().items()}
    for n in (1, 2):
        td = observed(level, far_goals(5))
        assert level(td)["action"].abs().max() <= 1.0
        info = level.learn(make_transitions(n_steps=20))
        assert info == {"n_env_steps": 20.0 * n, "n_updates": 0.0}
        assert level.n_env_steps == len(level.buffer) == 20 * n
    assert level.updates_due == 0.0
    after = level.predictor.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())


@pytest.mark.parametrize(
    "policy",
    ["planner", "planner level", "random phase", "model-free", "random", "constant", "sequence"],
)
def test_where_actions_are_masked_nothing_acts(policy):
    """The spec of an environment says nothing of its mask before the first reset."""
    if policy in ("planner", "planner level", "random phase"):
        options = {"n_initial_random_steps": 10 * (policy == "random phase")}
        level = planner_level(OBS, Categorical(3), **options)
    elif policy == "model-free":
        level = model_free_level(OBS, Categorical(3), learner_factory=DQNLearner)
    else:
        kinds = {"random": RandomLevel, "constant": partial(ConstantLevel, torch.tensor(2))}
        level = kinds.get(policy, partial(ActionSequenceLevel, torch.tensor([2, 1])))()
        level.setup(OBS, Categorical(3))
    data = TensorDict({"observation": torch.zeros(4, 2)}, [4])
    data.update(level.make_tensordict_primer().primers.expand(4).zero())
    acting = level.planner if policy == "planner" else level
    acting(data.clone())
    data["action_mask"] = torch.ones(4, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"masks actions.*ExcludeTransform"):
        acting(data)
