"""PlannerLevel.learn: what is stored, how often is learned, and that all of it can be saved."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint, GlobalRNGState
from torchrl.data import (
    Bounded,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    TensorDictReplayBuffer,
    Unbounded,
)

from layeredrl_torchrl import (
    ICEMPlanner,
    IdentityEncoder,
    Model,
    PlannerLevel,
    RewardPredictor,
    StaticPredictor,
    get_task,
    make_batched,
)


class Still(Model):
    """A world in which nothing moves."""

    def __init__(self):
        super().__init__(Unbounded((2,)), None, Bounded(-1.0, 1.0, (1,)))

    def predict_members(self, state, context, action):
        mean, weights = state.unsqueeze(-2), torch.ones_like(state[..., :1])
        return (mean, torch.zeros_like(mean)), weights, torch.zeros_like(state[..., 0])


class Diary(StaticPredictor):
    """Writes down what it is asked to learn."""

    def __init__(self):
        reward = lambda state, context, action: state.sum(-1)  # noqa: E731
        super().__init__(Still(), None, reward, IdentityEncoder((2,)), 2)
        self.calls = []

    def learn(self, buffer, n_updates, batch_size, model_batch_size, n_total_env_steps, **_):
        self.calls.append((len(buffer), n_updates, batch_size, model_batch_size, n_total_env_steps))
        return torch.zeros(()), {"n_updates": float(n_updates)}


def level_with_diary(**options):
    return PlannerLevel(
        Unbounded((2,)),
        Bounded(-1.0, 1.0, (1,)),
        predictor_factory=lambda observation_space, action_space: Diary(),
        planner_factory=partial(ICEMPlanner, horizon=2, n_samples=24),
        **options,
    )


def random_data(n, obs_dim=2):
    """``[n]`` steps in the layout of a collector, with what a level leaves in it."""
    done = torch.zeros(n, 1, dtype=torch.bool)
    following = {
        "observation": torch.randn(n, obs_dim),
        "reward": torch.randn(n, 1),
        "done": done,
        "terminated": done.clone(),
        "planner": {"warm": ~done},
        "random_steps_left": torch.ones(n, 1, dtype=torch.int64),
    }
    now = {
        "observation": torch.randn(n, obs_dim),
        "action": 2 * torch.rand(n, 1) - 1,
        "random_action": done.clone(),
        "planner": {"warm": ~done},
        "random_steps_left": torch.ones(n, 1, dtype=torch.int64),
    }
    return TensorDict({**now, "next": following}, [n])


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
        updates_per_step=float(rate), n_initial_random_steps=n_random, n_initial_updates=n_initial
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
            expected.append((steps, due, 256, 256, steps))
    assert level.predictor.calls == expected


def test_batch_sizes_are_handed_on():
    level = level_with_diary(batch_size=3, model_batch_size=5, n_initial_random_steps=0)
    level.learn(random_data(4))
    assert level.predictor.calls == [(4, 4, 3, 5, 4)]


def test_transitions_that_take_many_environment_steps():
    level = level_with_diary(n_initial_random_steps=30, updates_per_step=0.5)
    for elapsed, n_updates in ((4, 0), (4, 4), (2, 2)):
        data = random_data(4)
        data["next", "elapsed_steps"] = torch.full((4, 1), elapsed)
        assert level.learn(data)["n_updates"] == n_updates
    assert level.n_env_steps == 40
    # Updates go by transitions, all else by environment steps.
    assert level.predictor.calls == [(8, 4, 256, 256, 32), (12, 2, 256, 256, 40)]
    assert len(level.buffer) == 12


def test_the_predictor_learns(make_learner, make_transitions):
    level = make_learner(updates_per_step=0.1)
    before = {name: value.clone() for name, value in level.predictor.state_dict().items()}
    info = level.learn(make_transitions())
    assert info["n_updates"] == 6
    assert level.predictor.n_learn_updates == 6
    assert {"nll", "loss_reward", "loss_value"} <= info.keys()
    moved = [k for k, v in level.predictor.state_dict().items() if not torch.equal(v, before[k])]
    assert any("members" in name for name in moved)


def test_logger_and_bar(make_learner, make_transitions, capsys):
    class Kept:
        def __init__(self):
            self.logged = []

        def log_metrics(self, metrics, step):
            self.logged.append((metrics, step))

    level = make_learner(logger=Kept(), progress=True, updates_per_step=0.1)
    info = level.learn(make_transitions())
    ((metrics, step),) = level.logger.logged
    assert step == 60
    assert metrics["RewardPredictor/nll"] == info["nll"]
    assert "RewardPredictor" in capsys.readouterr().err
    quiet = make_learner(updates_per_step=0.1)
    quiet.learn(make_transitions())
    assert not capsys.readouterr().err


# -- the buffer -----------------------------------------------------------------------------


def test_what_only_acting_needs_is_not_stored():
    level = level_with_diary()
    data = random_data(5)
    level.learn(data)
    stored = level.buffer[:]
    left_out = {"planner", "random_steps_left"}
    assert not left_out & set(stored.keys())
    assert not left_out & set(stored["next"].keys())
    assert set(data.exclude(*left_out)["next"].keys()) - left_out <= set(stored["next"].keys())
    for key in ("observation", "action", "random_action", ("next", "reward")):
        assert torch.equal(stored[key], data[key])
    assert "planner" in data.keys()  # what was passed is as it was


def test_the_value_function_is_not_taught_by_random_actions(make_learner, make_transitions):
    """The flag that the level writes is the one that the value targets read."""
    level = make_learner(updates_per_step=0.1)
    data = make_transitions()
    value = [p.clone() for p in level.predictor.val_func.parameters()]
    data["random_action"] = torch.ones(60, 1, dtype=torch.bool)
    level.learn(data)
    assert all(map(torch.equal, value, level.predictor.val_func.parameters()))
    data["random_action"] = torch.zeros(60, 1, dtype=torch.bool)
    level.learn(data)
    assert not all(map(torch.equal, value, level.predictor.val_func.parameters()))


def test_buffers_fit_the_data_of_the_environment():
    batched = make_batched("InvertedPendulum-v5", 2)
    single = get_task("InvertedPendulum-v5").make()
    factories = {
        "predictor_factory": lambda observation_space, action_space: Diary(),
        "planner_factory": partial(ICEMPlanner, horizon=2, n_samples=24),
    }
    for env, ndim in ((single, 1), (batched, 2)):
        level = PlannerLevel(env=env, **factories)
        assert level.buffer.storage.ndim == ndim
        assert level.action_spec == env.action_spec_unbatched


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_or_the_first_data(shape):
    level = level_with_diary(buffer_size=50)
    assert level.buffer.storage.max_size == 50
    for n in (1, 2):
        level.learn(random_data(12).reshape(shape))
        assert len(level.buffer) == 12 * n
    # TorchRL stores time first.
    assert tuple(level.buffer.storage.shape) == ((24,) if len(shape) == 1 else (8, 3))
    with pytest.raises(ValueError, match=r"batch shape \(.*buffer stores . axes; build.*env="):
        level.learn(random_data(12).reshape((4, 3) if len(shape) == 1 else (12,)))


def test_a_buffer_of_ones_own():
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(7))
    level = level_with_diary(buffer=buffer)
    assert level.buffer is buffer
    level.learn(random_data(10))
    assert len(buffer) == 7
    with pytest.raises(ValueError, match="buffer stores 1 axes"):
        level_with_diary(buffer=TensorDictReplayBuffer(storage=LazyTensorStorage(7))).learn(
            random_data(4).reshape(2, 2)
        )


# -- state ----------------------------------------------------------------------------------


def test_the_state_dict_holds_everything_once(make_learner, make_transitions):
    level, other = make_learner(updates_per_step=0.15), make_learner(updates_per_step=0.15)
    level.learn(make_transitions(n_steps=70))
    state = level.state_dict()
    pointers = [value.data_ptr() for value in state.values() if value.numel()]
    assert len(set(pointers)) == len(pointers)
    assert state["n_env_steps"] == 70
    assert state["updates_due"] == pytest.approx(0.5)
    other.load_state_dict(state)
    assert other.n_env_steps == 70
    torch.testing.assert_close(other.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(20,), (2, 10)])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, make_learner, make_transitions, shape):
    batches = [make_transitions(n_steps=20, episode_length=10).reshape(shape) for _ in range(4)]

    def start():
        options = {"updates_per_step": 0.33, "n_initial_random_steps": 15}
        if len(shape) == 2:
            # As env= would have it.
            storage = LazyTensorStorage(60, ndim=2)
            options["buffer"] = TensorDictReplayBuffer(storage=storage)
        level = make_learner(**options)
        parts = {"level": level, "optim": level.optim, "buffer": level.buffer}
        return level, Checkpoint(**parts, rng=GlobalRNGState())

    torch.manual_seed(0)
    level, checkpoint = start()
    for data in batches[:2]:
        level.learn(data)
    checkpoint.save(tmp_path / "checkpoint")
    expected = [level.learn(data) for data in batches[2:]]
    torch.manual_seed(9)
    resumed, checkpoint = start()
    checkpoint.load(tmp_path / "checkpoint")
    assert [resumed.learn(data) for data in batches[2:]] == expected
    assert [info["n_updates"] for info in expected] == [6, 7]
    torch.testing.assert_close(resumed.state_dict(), level.state_dict(), rtol=0, atol=0)


# -- bad input ------------------------------------------------------------------------------


def test_bad_data_is_refused_before_it_is_stored():
    level = level_with_diary(n_initial_random_steps=0)
    broken = random_data(3)
    broken["next", "observation"][1, 0] = torch.nan
    inf = random_data(3)
    inf["next", "reward"][0] = torch.inf
    for data, error, message in (
        (None, TypeError, "got NoneType; pass what a collector yields"),
        (random_data(3)[0], ValueError, r"batch shape \(\), expected transitions"),
        (random_data(0), ValueError, r"batch shape \(0,\)"),
        (random_data(3).exclude("action"), KeyError, "learn reads .*action.*nothing of the data"),
        (
            random_data(3).exclude(("next", "reward")),
            KeyError,
            "learn reads .*next.*reward.*, which is missing",
        ),
        (broken, ValueError, r"observation.*1 non-finite.*nothing of the data is stored"),
        (inf, ValueError, r"reward.*1 non-finite"),
    ):
        with pytest.raises(error, match=message):
            level.learn(data)
    assert not len(level.buffer)
    assert level.n_env_steps == level.updates_due == 0


def test_updates_wait_for_enough_steps(make_learner, make_transitions):
    """Two steps are too few for a value target over three."""
    level = make_learner()
    assert level.learn(make_transitions(n_steps=2))["n_updates"] == 0
    assert level.updates_due == level.n_env_steps == len(level.buffer) == 2
    assert level.learn(make_transitions(n_steps=20))["n_updates"] == 22


def test_bad_options():
    spaces = Unbounded((2,)), Bounded(-1.0, 1.0, (1,))
    env = get_task("InvertedPendulum-v5").make()
    for options, error, message in (
        ({"buffer": [1]}, TypeError, "buffer must be an object of ReplayBuffer, got list"),
        (
            {"buffer": TensorDictReplayBuffer(batch_size=8)},
            TypeError,
            "on a ListStorage, but a level writes to .* storage of tensors",
        ),
        (
            {"buffer": ReplayBuffer(storage=ListStorage(3)), "buffer_size": 3},
            ValueError,
            "buffer_size=3 has no effect beside a buffer",
        ),
        ({"env": env}, ValueError, "or env= to take both from"),
    ):
        with pytest.raises(error, match=message):
            level_with_diary(**options)
    good = {
        "predictor_factory": lambda observation_space, action_space: Diary(),
        "planner_factory": partial(ICEMPlanner, horizon=2),
    }
    for one in ({"observation_space": spaces[0]}, {"action_space": spaces[1]}):
        with pytest.raises(ValueError, match="pass observation_space and action_space"):
            PlannerLevel(**one, **good)
    for factories, error, message in (
        (
            {"predictor_factory": lambda *_: Still()},
            TypeError,
            "object of Predictor, got Still",
        ),
        (
            {"planner_factory": lambda *_, **__: Still()},
            TypeError,
            "gave a Still, expected",
        ),
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
            "hand action_spec= on",
        ),
    ):
        with pytest.raises(error, match=message):
            PlannerLevel(*spaces, **good | factories)


def test_of_what_cannot_learn_there_is_no_optimizer(make_learner):
    assert level_with_diary().optim is None
    level = make_learner()
    assert isinstance(level.predictor, RewardPredictor)
    assert level.optim is level.predictor.optim
