"""Levels that learn: how often, from which buffer, what they report, and going on after saving."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import partial

import pytest
import torch
from helpers import (
    ACTIONS,
    OBS,
    SMALL_FACTORY,
    SMALL_PLANNER,
    SPACES,
    Kept,
    both,
    make_transitions,
    model_free_level,
    planner_level,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import (
    Bounded,
    Composite,
    LazyTensorStorage,
    ListStorage,
    OneHot,
    ReplayBuffer,
    TensorDictReplayBuffer,
)

from layeredrl_torchrl import (
    DQNLearner,
    ICEMPlanner,
    IdentityEncoder,
    ModelFreeLevel,
    PlannerLevel,
    StaticPredictor,
    get_task,
    make_batched,
)


class Diary(StaticPredictor):
    """Writes down what it is asked to learn."""

    def __init__(self, *_):
        reward = lambda state, context, action: state.sum(-1)  # noqa: E731
        super().__init__(SMALL_FACTORY(*SPACES).model, None, reward, IdentityEncoder((2,)), 2)
        self.calls = []

    def learn(self, buffer, n_updates, batch_size, model_batch_size, n_total_env_steps, **_):
        self.calls.append((len(buffer), n_updates, batch_size, model_batch_size, n_total_env_steps))
        return torch.zeros(()), {"n_updates": float(n_updates)}


level_with_diary = partial(planner_level, *SPACES, predictor_factory=Diary)


def random_data(n):
    """``[n]`` steps in the layout of a collector, with what a level leaves in it."""
    no = torch.zeros(n, 1, dtype=torch.bool)
    carried = {"planner": {"warm": ~no}, "random_steps_left": (~no).long()}
    now = {"observation": torch.randn(n, 2), "action": 2 * torch.rand(n, 1) - 1}
    after = {"observation": torch.randn(n, 2), "reward": torch.randn(n, 1)}
    after |= {"done": no, "terminated": no.clone(), **carried}
    return TensorDict({**now, "random_action": no.clone(), **carried, "next": after}, [n])


# -- the schedule ---------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    rate=st.sampled_from(["0", "0.1", "0.3", "0.5", "1", "2.7"]),
    n_random=st.sampled_from([0, 1, 7, 20, 1000]),
    n_initial=st.sampled_from([None, 0, 5]),
)
def test_updates_are_those_of_an_exact_count(sizes, rate, n_random, n_initial):
    """The slow twin counts in fractions, from the beginning for each call."""
    level = level_with_diary(
        updates_per_step=float(rate),
        n_initial_random_steps=n_random,
        n_initial_updates=n_initial,
        batch_size=3,
        model_batch_size=5,
    )
    begins, expected, done = None, [], 0
    for i, size in enumerate(sizes):
        info = level.learn(random_data(size))
        steps = sum(sizes[: i + 1])
        assert info["n_env_steps"] == steps == int(level.n_env_steps)
        due = 0
        if steps >= n_random:
            begins = i if begins is None else begins
            if n_initial is None:
                total = math.floor(Fraction(rate) * steps)
            else:
                total = n_initial + math.floor(Fraction(rate) * sum(sizes[begins + 1 : i + 1]))
            due, done = total - done, total
        assert info["n_updates"] == due
        if due:
            expected.append((steps, due, 3, 5, steps))
    assert level.predictor.calls == expected


def test_updates_go_by_transitions_and_all_else_by_environment_steps():
    level = level_with_diary(n_initial_random_steps=30, updates_per_step=0.5)
    for elapsed, n_updates in ((4, 0), (4, 4), (2, 2)):
        data = random_data(4)
        data["next", "elapsed_steps"] = torch.full((4, 1), elapsed)
        assert level.learn(data)["n_updates"] == n_updates
    assert level.n_env_steps == 40
    # Updates go by transitions, all else by environment steps.
    assert level.predictor.calls == [(8, 4, 8, 8, 32), (12, 2, 8, 8, 40)]
    assert len(level.buffer) == 12


def test_updates_wait_for_enough_steps():
    """Two steps are too few for a value target over three; as many as a slice has are enough."""
    level = planner_level(*SPACES, updates_per_step=1.0)
    needed = level.predictor.n_steps_needed
    for n in (needed - 2, 20):
        level = planner_level(*SPACES, updates_per_step=1.0)
        assert level.learn(make_transitions(n_steps=2))["n_updates"] == 0
        assert level.updates_due == level.n_env_steps == len(level.buffer) == 2 < needed
        assert level.learn(make_transitions(n_steps=n))["n_updates"] == 2 + n


@both
def test_its_parts_learn_and_report_to_logger_and_bar(make, capsys):
    name, term = {
        planner_level: ("RewardPredictor", "nll"),
        model_free_level: ("walker", "loss_qvalue"),
    }[make]
    level = make(*SPACES, logger=Kept(), progress=True)
    level.name = "walker"
    before = {key: value.clone() for key, value in level.state_dict().items()}
    info = level.learn(make_transitions())
    assert info["n_updates"] == 6
    moved = {
        key for key, value in level.state_dict().items() if not torch.equal(value, before[key])
    }
    trained = {p.data_ptr() for group in level.optim.param_groups for p in group["params"]}
    assert {k for k, v in level.state_dict().items() if v.data_ptr() in trained} <= moved
    ((metrics, step),) = level.logger.logged
    assert step == 60
    assert metrics[f"{name}/{term}"] == info[term]
    assert name in capsys.readouterr().err
    make(*SPACES).learn(make_transitions())
    assert not capsys.readouterr().err


def test_of_what_cannot_learn_there_is_no_optimizer():
    assert level_with_diary().optim is None
    level = planner_level(*SPACES)
    assert level.optim is level.predictor.optim


# -- the buffer -----------------------------------------------------------------------------


def test_what_only_acting_needs_is_not_stored():
    level = level_with_diary()
    data = random_data(5)
    level.learn(data)
    stored = level.buffer[:]
    left_out = {"planner", "random_steps_left"}
    assert not left_out & set(stored.keys())
    assert not left_out & set(stored["next"].keys())
    assert set(data["next"].keys()) - left_out <= set(stored["next"].keys())
    for key in ("observation", "action", "random_action", ("next", "reward")):
        assert torch.equal(stored[key], data[key])
    assert "planner" in data.keys()  # what was passed is as it was
    other = level_with_diary()  # of what was random nobody has to know
    other.learn(data.exclude("random_action"))
    assert "random_action" not in other.buffer[:].keys()


@pytest.mark.parametrize("key", ["random_action", "explored", ("note", "explored")])
def test_the_value_function_is_not_taught_by_random_actions(key):
    """The flag that the level writes is the one that the value targets read."""
    level, data = planner_level(*SPACES, random_action_key=key), make_transitions()
    value = [p.clone() for p in level.predictor.val_func.parameters()]
    for random in (True, False):
        data[key] = torch.full((60, 1), random)
        level.learn(data)
        same = map(torch.equal, value, level.predictor.val_func.parameters())
        assert all(same) == random


@pytest.mark.parametrize("joined", [False, True])
def test_the_loss_and_the_level_call_random_actions_the_same(joined):
    parts = {name: OBS.clone() for name in ("observation", "achieved_goal", "desired_goal")}
    spaces = Composite(parts) if joined else OBS, ACTIONS

    def called(name):
        def make(*spaces):
            predictor = SMALL_FACTORY(*spaces)
            predictor.predictor_loss.set_keys(random_action=name)
            return predictor

        return make

    level = planner_level(*spaces, random_action_key="explored")
    assert level.predictor.predictor_loss.tensor_keys.random_action == "explored"
    planner_level(*spaces, random_action_key="mine", predictor_factory=called("mine"))
    with pytest.raises(ValueError, match="pass random_action_key='mine'"):
        planner_level(*spaces, predictor_factory=called("mine"))


def test_a_buffer_has_the_axes_of_the_environment():
    batched = make_batched("InvertedPendulum-v5", 2)
    single = get_task("InvertedPendulum-v5").make()
    for env, ndim in ((single, 1), (batched, 2)):
        level = planner_level(env=env)
        assert level.buffer.storage.ndim == ndim
        assert level.action_spec == env.action_spec_unbatched


@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 3, 2)])
def test_without_an_environment_the_first_data_decide_the_axes_of_a_buffer(shape):
    level = level_with_diary(buffer_size=50)
    assert level.buffer.storage.max_size == 50
    for n in (1, 2):
        level.learn(random_data(12).reshape(shape))
        assert len(level.buffer) == 12 * n
    # TorchRL stores time first.
    assert tuple(level.buffer.storage.shape) == {1: (24,), 2: (8, 3), 3: (4, 3, 2)}[len(shape)]
    if len(shape) > 1:
        with pytest.raises(ValueError, match=re.escape(f"{shape[:-1]} environments")):
            level.learn(random_data(12).reshape((4, 3) if len(shape) == 2 else (3, 2, 2)))
    with pytest.raises(ValueError, match=r"batch shape \(.*buffer stores . axes; build.*env="):
        level.learn(random_data(12).reshape((4, 3) if len(shape) == 1 else (12,)))


@both
def test_a_buffer_of_ones_own_is_used(make):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(7))
    level = make(*SPACES, buffer=buffer)
    assert level.buffer is buffer
    level.learn(make_transitions(10))
    assert len(buffer) == 7
    other = TensorDictReplayBuffer(storage=LazyTensorStorage(8, ndim=2))
    with pytest.raises(ValueError, match="the buffer stores 2 axes"):
        make(*SPACES, buffer=other).learn(make_transitions(4))


# -- bad options ----------------------------------------------------------------------------

ENV = partial(get_task("InvertedPendulum-v5").make)
GIVEN = {"predictor_factory": Diary, "planner_factory": SMALL_PLANNER}
EITHER = [
    ({"buffer": [1]}, TypeError, "buffer must be an object of ReplayBuffer, got list"),
    (
        {"buffer": ReplayBuffer(storage=ListStorage(3)), "buffer_size": 3},
        ValueError,
        "buffer_size=3 has no effect with a buffer",
    ),
    ({"env": ENV}, ValueError, "or env= to take both from"),
]
PLANNER = [
    ({"predictor_factory": lambda *_: OBS}, TypeError, "object of Predictor, got Unbounded"),
    ({"planner_factory": lambda *_, **__: OBS}, TypeError, "gave a Unbounded.*, expected"),
    (
        {"planner_factory": lambda *_, **__: ICEMPlanner(Diary())},
        ValueError,
        "in another predictor",
    ),
    (
        {
            "planner_factory": lambda predictor, action_spec: ICEMPlanner(
                predictor, action_spec=Bounded(-0.5, 0.5, (1,))
            )
        },
        ValueError,
        "pass action_spec= on",
    ),
]
MODEL_FREE = [
    ({"duration": 3}, ValueError, "duration=3 is for an input from above"),
    ({"input_ends": False}, ValueError, "input_ends is for an input from above"),
    ({"learner_factory": lambda *_: OBS}, TypeError, "got Unbounded.*; pass partial"),
    ({"learner_factory": DQNLearner}, TypeError, "pass SACLearner"),
]


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        *((planner_level, *row) for row in EITHER + PLANNER),
        *((model_free_level, *row) for row in EITHER + MODEL_FREE),
    ],
)
def test_options_that_do_not_fit_are_refused(make, options, error, message):
    if "env" in options:
        options = {"env": options["env"]()}
    with pytest.raises(error, match=message):
        make(*SPACES, **options)


def test_spaces_come_in_pairs():
    for one in ({"observation_space": OBS}, {"action_space": ACTIONS}):
        with pytest.raises(ValueError, match="pass observation_space and action_space"):
            PlannerLevel(**one, **GIVEN)
    with pytest.raises(TypeError, match="expected a vector of floats"):
        ModelFreeLevel(OneHot(3), ACTIONS, learner_factory=DQNLearner)
