"""ModelFreeLevel: what its networks see, which returns it learns, and its life as a policy."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint, GlobalRNGState
from torchrl.collectors import Collector
from torchrl.data import (
    Bounded,
    Categorical,
    LazyTensorStorage,
    OneHot,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type

from layeredrl_torchrl import (
    DQNLearner,
    ModelFreeLevel,
    SACLearner,
    get_task,
    make_batched,
)

SMALL = partial(SACLearner, hidden_sizes=(8,))
ACTIONS = Bounded(-1.0, 1.0, (1,))


class Diary(SACLearner):
    """Writes down the batches that it is to learn from."""

    def __init__(self, n_features, action_spec):
        super().__init__(n_features, action_spec, hidden_sizes=(8,), gamma=0.5)
        self.batches = []

    def update(self, batch):
        self.batches.append(batch.clone())
        return super().update(batch)


def make(learner_factory=SMALL, action_space=ACTIONS, **options):
    small = {"n_initial_random_steps": 0, "batch_size": 16}
    return ModelFreeLevel(
        Unbounded((2,)), action_space, learner_factory=learner_factory, **small | options
    )


make_skill = partial(make, input_spec=Bounded(-1.0, 1.0, (1,)), duration=4)


def transitions(n, duration=4):
    """``[n]`` random transitions of a lower level; about half of the ends are time limits."""
    n_actions = torch.randint(duration, (n, 1))
    terminated, truncated = torch.rand(n, 1) < 0.2, torch.rand(n, 1) < 0.2
    done = terminated | truncated
    after = {
        "observation": torch.randn(n, 2),
        "reward": torch.randn(n, 1),
        "terminated": terminated,
        "truncated": truncated,
        "done": done,
        # As a hierarchy says it: done with the input, or the episode ended.
        "input_done": (n_actions == duration - 1) | done,
    }
    now = {
        "observation": torch.randn(n, 2),
        "input": 2 * torch.rand(n, 1) - 1,
        "n_actions": n_actions,
        "action": 2 * torch.rand(n, 1) - 1,
    }
    return TensorDict({**now, "next": after}, [n])


# -- what the networks see ------------------------------------------------------------------


def data_unit(data):
    """The root mean square of the rewards that are not 0."""
    reward = data["next", "reward"].unique()
    return reward[reward != 0].square().mean().sqrt()


# -- which returns it learns ----------------------------------------------------------------


def learned_from(data, **options):
    """The batches that a level learned from, joined, by the row of ``data`` that each was."""
    level = make_skill(Diary, updates_per_step=20 / len(data), batch_size=50, **options)
    level.learn(data)
    seen = torch.cat(level.learner.batches)
    row = (seen["action"] == data["action"].T).int().argmax(-1)
    assert len(row.unique()) == len(data)
    return level, seen, data[row]


def test_an_end_of_the_input_ends_the_return():
    level, seen, rows = learned_from(transitions(60))
    following, over = rows["next"], rows["n_actions"] == 3
    assert torch.equal(seen["next", "terminated"], following["terminated"] | over)
    # Where a time limit came in the middle of an input, the value goes on.
    cut = following["truncated"] & ~following["terminated"] & ~over
    assert cut.any()
    assert not seen["next", "terminated"][cut].any()
    features = level.features(following["observation"], rows["input"], rows["n_actions"] + 1)
    assert torch.equal(seen["next", "features"], features)
    features = level.features(rows["observation"], rows["input"], rows["n_actions"])
    assert torch.equal(seen["features"], features)
    assert torch.equal(seen["action"], rows["action"])
    paid = following["reward"] / data_unit(rows)
    torch.testing.assert_close(seen["next", "reward"], paid)


def test_or_the_value_goes_on_as_if_it_were_given_again():
    level, seen, rows = learned_from(transitions(60), input_ends=False)
    assert torch.equal(seen["next", "terminated"], rows["next", "terminated"])
    again = (rows["n_actions"] + 1) % 4
    features = level.features(rows["next", "observation"], rows["input"], again)
    assert torch.equal(seen["next", "features"], features)


def test_a_rule_of_its_own_decides_where_an_input_ends():
    class Reaching(ModelFreeLevel):
        def hands_back(self, tensordict):
            return tensordict["observation"][..., :1] > tensordict["input"]

    data = transitions(60)
    data["next", "input_done"] = data["next", "done"] | (
        data["next", "observation"][:, :1] > data["input"]
    )
    level = Reaching(
        Unbounded((2,)),
        ACTIONS,
        learner_factory=Diary,
        input_spec=Bounded(-1.0, 1.0, (1,)),
        n_initial_random_steps=0,
        batch_size=60,
    )
    level.learn(data)
    seen = torch.cat(level.learner.batches)
    row = (seen["action"] == data["action"].T).int().argmax(-1)
    reached = data["next", "observation"][:, :1] > data["input"]
    expected = (data["next", "terminated"] | reached)[row]
    assert torch.equal(seen["next", "terminated"], expected)
    assert level.features.dim == 3


def test_rewards_can_be_worked_out_when_they_are_sampled():
    class Ten(ModelFreeLevel):
        scales_rewards = False

        def _sampled(self, data):
            return data.set(("next", "reward"), 10 * data["next", "reward"])

    data = transitions(60).exclude("input", "n_actions")
    level = Ten(Unbounded((2,)), ACTIONS, learner_factory=Diary, n_initial_random_steps=0)
    level.learn(data)
    paid = torch.cat(level.learner.batches)["next", "reward"]
    assert torch.isin(paid, 10 * data["next", "reward"]).all()


def test_what_was_cut_short_is_counted_and_not_stored():
    level = make_skill(updates_per_step=0.1)
    data = transitions(40)
    data["next", "interrupted"] = torch.arange(40).unsqueeze(-1) % 2 == 0
    data["next", "elapsed_steps"] = torch.full((40, 1), 3)
    kept = ~data["next", "interrupted"] | data["next", "terminated"]
    info = level.learn(data)
    assert info["n_env_steps"] == 120
    assert len(level.buffer) == kept.sum()
    assert info["n_updates"] == kept.sum() // 10
    assert torch.equal(level.buffer[:]["observation"], data["observation"][kept.squeeze(-1)])


# -- as a policy ----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [Bounded(-3.0, 1.0, (2,)), OneHot(3), Categorical(3)])
@pytest.mark.parametrize("n_random", [0, 5])
def test_actions_are_of_the_spec(spec, n_random):
    factory = SACLearner if isinstance(spec, Bounded) else DQNLearner
    level = make(factory, spec, n_initial_random_steps=n_random)
    for batch in ((), (4,), (2, 3)):
        action = level(TensorDict({"observation": torch.randn(*batch, 2)}, batch))["action"]
        assert spec.is_in(action)
        assert action.shape == (*batch, *spec.shape)
        assert action.dtype == spec.dtype


def test_random_at_first_then_exploring_and_neither_in_evaluation(unchanged):
    level = make(n_initial_random_steps=5)
    td = TensorDict({"observation": torch.zeros(3000, 2)}, [3000])
    with unchanged(level):
        action = level(td.clone())["action"]
    assert not level.eval()(td.clone())["action"].requires_grad
    level.train()
    # Uniform: mean 0 and variance 1/3, within four standard errors.
    assert abs(action.mean()) < 4 * (1 / 3 / 3000) ** 0.5
    assert abs(action.var() - 1 / 3) < 4 * (4 / 45 / 3000) ** 0.5
    calm = level.eval()(td.clone())["action"]
    assert (calm == calm[0]).all()
    level.train().n_env_steps += 5
    assert len(level(td.clone())["action"].unique()) > 2900
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(level(td.clone())["action"], calm)


@pytest.mark.parametrize(("task", "n"), [("InvertedPendulum-v5", None), ("Reacher-v5", 2)])
def test_collects_and_learns(task, n):
    def run():
        torch.manual_seed(0)
        env = get_task(task).make(seed=0) if n is None else make_batched(task, n, seed=0)
        level = ModelFreeLevel(
            env=env, learner_factory=SMALL, n_initial_random_steps=60, updates_per_step=0.1
        )
        collector = Collector(
            env,
            level,
            frames_per_batch=40,
            total_frames=120,
            auto_register_policy_transforms=True,
        )
        infos = [level.learn(data) for data in collector]
        collector.shutdown()
        return level, infos

    level, infos = run()
    assert [info["n_updates"] for info in infos] == [0, 8, 4]
    assert level.n_env_steps == len(level.buffer) == 120
    assert infos[-1].keys() >= {"loss_actor", "loss_qvalue", "loss_alpha", "alpha", "entropy"}
    stored = level.buffer[:]["observation"]
    torch.testing.assert_close(level.features.normalizer.loc, stored.mean(0))
    assert run()[1] == infos


def test_it_learns_to_act():
    """A point is to be brought to 0 by steps of its own choice: the best action is -x."""
    level = make(
        partial(SACLearner, hidden_sizes=(32, 32), lr=1e-2, alpha_init=0.01, gamma=0.5, tau=0.1),
        batch_size=64,
        updates_per_step=0.15,
    )
    x, action = 2 * torch.rand(2000, 2) - 1, 2 * torch.rand(2000, 1) - 1
    after = x + torch.cat([action, torch.zeros(2000, 1)], -1)
    no = torch.zeros(2000, 1, dtype=torch.bool)
    data = {"observation": x, "action": action}
    data["next"] = {"observation": after, "terminated": no, "done": no}
    data["next"]["reward"] = -after[:, :1].square()
    assert level.learn(TensorDict(data, [2000]))["n_updates"] == 300
    test = TensorDict(
        {"observation": torch.linspace(-0.8, 0.8, 20).unsqueeze(-1).expand(20, 2)}, [20]
    )
    error = (level.eval()(test)["action"] + test["observation"][:, :1]).abs()
    assert error.mean() < 0.15


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_act_and_do_not_learn(duplicate):
    level = make_skill()
    level.learn(transitions(30))
    other = duplicate(level)
    td = transitions(5)
    torch.manual_seed(3)
    expected = level(td.clone())["action"]
    torch.manual_seed(3)
    assert torch.equal(other(td)["action"], expected)
    with pytest.raises(RuntimeError, match="is a copy that was made to act"):
        other.learn(transitions(5))
    assert other.optim is None


# -- state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", [SMALL, partial(DQNLearner, hidden_sizes=(8,))])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, learner):
    spec = ACTIONS if learner is SMALL else OneHot(3)
    batches = [transitions(20) for _ in range(4)]
    for data in batches:
        data["action"] = spec.rand((20,))

    def start():
        level = make_skill(learner, spec, updates_per_step=0.33, n_initial_random_steps=15)
        parts = {"level": level, "optim": level.optim, "buffer": level.buffer}
        return level, Checkpoint(**parts, rng=GlobalRNGState())

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


def test_logger_and_bar(capsys):
    class Kept:
        def __init__(self):
            self.logged = []

        def log_metrics(self, metrics, step):
            self.logged.append((metrics, step))

    level = make(logger=Kept(), progress=True, updates_per_step=0.1)
    level.name = "walker"
    info = level.learn(transitions(30))
    ((metrics, step),) = level.logger.logged
    assert step == 30
    assert metrics["walker/loss_qvalue"] == info["loss_qvalue"]
    assert "walker" in capsys.readouterr().err
    make(updates_per_step=0.1).learn(transitions(30))
    assert not capsys.readouterr().err


# -- bad input ------------------------------------------------------------------------------


def test_bad_data_is_refused_before_it_is_stored():
    level = make_skill()
    broken, wide = transitions(3), transitions(3)
    broken["next", "observation"][1, 0] = torch.nan
    wide["observation"] = torch.randn(3, 5)
    for data, error, message in (
        (None, TypeError, "got NoneType; pass what a collector yields"),
        (
            transitions(3).exclude("n_actions"),
            KeyError,
            "learn reads .*n_actions",
        ),
        (transitions(3).exclude("input"), KeyError, "learn reads .*input.*, which is missing"),
        (transitions(3).exclude(("next", "input_done")), KeyError, "learn reads .*input_done"),
        (transitions(3).exclude(("next", "terminated")), KeyError, "learn reads .*terminated"),
        (broken, ValueError, r"observation.*1 non-finite.*nothing of the data is stored"),
        (wide, ValueError, r"observation has shape \(3, 5\), expected \[\.\.\., 2\]"),
    ):
        with pytest.raises(error, match=message):
            level.learn(data)
    assert not len(level.buffer)
    assert not level.n_env_steps
    assert not level.features.n_seen
    # Without an end of the input, nobody has to say where it is.
    make_skill(input_ends=False).learn(transitions(3).exclude(("next", "input_done")))


def test_what_is_missing_is_named():
    level = make_skill()
    for key in ("observation", "input", "n_actions"):
        with pytest.raises(KeyError, match=f"ModelFreeLevel reads .*{key}.*, which is missing"):
            level(transitions(3).exclude(key))
    waiting = ModelFreeLevel(learner_factory=SMALL)
    with pytest.raises(RuntimeError, match="knows no spaces yet"):
        waiting(transitions(3))
    with pytest.raises(RuntimeError, match="knows no spaces yet"):
        waiting.learn(transitions(3))


def test_bad_options():
    for options, error, message in (
        ({"duration": 3}, ValueError, "duration is about an input from above"),
        ({"input_ends": False}, ValueError, "input_ends is about an input from above"),
        (
            {"learner_factory": lambda *_: torch.nn.Linear(1, 1)},
            TypeError,
            "got Linear; pass partial",
        ),
        ({"learner_factory": DQNLearner}, TypeError, "pass SACLearner"),
        ({"env": get_task("InvertedPendulum-v5").make()}, ValueError, "or env= to take both from"),
    ):
        with pytest.raises(error, match=message):
            make(**options)
    with pytest.raises(TypeError, match="expected a vector of floats"):
        ModelFreeLevel(OneHot(3), ACTIONS, learner_factory=SMALL)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(50, ndim=2))
    with pytest.raises(ValueError, match="the buffer stores 2 axes"):
        make(buffer=buffer).learn(transitions(3))
    own = TensorDictReplayBuffer(storage=LazyTensorStorage(7))
    make(buffer=own).learn(transitions(10))
    assert len(own) == 7
