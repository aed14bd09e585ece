"""ModelFreeLevel: what its networks see, which returns it learns, and its life as a policy."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import OBS, SMALL_SAC, SPACES, collected, model_free_level, unchanged
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type

from layeredrl_torchrl import DQNLearner, ModelFreeLevel, SACLearner, get_task, make_batched

INPUT = Bounded(-1.0, 1.0, (1,))
make_skill = partial(model_free_level, *SPACES, input_spec=INPUT, duration=4)


class Diary(SACLearner):
    """Writes down the batches that it is to learn from."""

    def __init__(self, n_features, action_spec):
        super().__init__(n_features, action_spec, hidden_sizes=(8,), gamma=0.5)
        self.batches = []

    def update(self, batch):
        self.batches.append(batch.clone())
        return super().update(batch)


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


# -- which returns it learns ----------------------------------------------------------------


def learned_from(data, **options):
    """The batches that a level learned from, joined, by the row of ``data`` that each was."""
    counts = {"updates_per_step": 20 / len(data), "batch_size": 50}
    level = make_skill(learner_factory=Diary, **counts | options)
    level.learn(data)
    seen = torch.cat(level.learner.batches)
    row = (seen["action"] == data["action"].T).int().argmax(-1)
    assert len(row.unique()) == len(data)
    return level, seen, data[row]


def test_an_end_of_the_input_ends_the_return():
    level, seen, rows = learned_from(transitions(60))
    following, over = rows["next"], rows["n_actions"] == 3
    assert torch.equal(seen["next", "terminated"], following["terminated"] | over)
    assert torch.equal(seen["next", "done"], following["done"] | over)
    # Where a time limit came in the middle of an input, the value goes on.
    cut = following["truncated"] & ~following["terminated"] & ~over
    assert cut.any()
    assert not seen["next", "terminated"][cut].any()
    features = level.features(following["observation"], rows["input"], rows["n_actions"] + 1)
    assert torch.equal(seen["next", "features"], features)
    features = level.features(rows["observation"], rows["input"], rows["n_actions"])
    assert torch.equal(seen["features"], features)
    assert torch.equal(seen["action"], rows["action"])
    # In units of the root mean square of the rewards that are not 0.
    unit = following["reward"].unique().square().mean().sqrt()
    torch.testing.assert_close(seen["next", "reward"], following["reward"] / unit)


def test_without_input_ends_the_value_goes_on_as_if_the_input_were_given_again():
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
        *SPACES, learner_factory=Diary, input_spec=INPUT, n_initial_random_steps=0, batch_size=60
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
    level = Ten(*SPACES, learner_factory=Diary, n_initial_random_steps=0)
    level.learn(data)
    paid = torch.cat(level.learner.batches)["next", "reward"]
    assert torch.isin(paid, 10 * data["next", "reward"]).all()


@pytest.mark.parametrize("ends", ["the input", "the episode", "nothing"])
@pytest.mark.parametrize("input_ends", [True, False])
def test_an_offset_of_all_rewards_counts_where_returns_end(ends, input_ends):
    data = transitions(60)
    data["next", "reward"] += 1000.0
    no = torch.zeros(60, 1, dtype=torch.bool)
    data["next", "terminated"], data["next", "input_done"] = no, no.clone()
    key = {"the input": "input_done", "the episode": "terminated"}.get(ends)
    if key is not None:
        data["next", key] = data["next", "done"].clone()
    level = make_skill(learner_factory=SMALL_SAC, input_ends=input_ends, updates_per_step=0)
    level.learn(data)
    paid = level.reward_scale(data["next", "reward"])
    counts = ends == "the episode" or (ends == "the input" and input_ends)
    assert (paid.mean() > 0.9) == counts
    assert (paid.std() > 0.9) != counts


class Told(SACLearner):
    """Reports its count of updates, and every third time another term."""

    def update(self, batch):
        super().update(batch)
        self.n = getattr(self, "n", 0) + 1
        told = {"n": torch.tensor(float(self.n))}
        return told | ({"third": told["n"] * 10} if self.n % 3 == 0 else {})


def test_terms_are_means_over_the_updates_that_have_them():
    level = make_skill(learner_factory=Told, updates_per_step=20 / 60)
    assert level.learn(transitions(60)) == {
        "n_env_steps": 60.0,
        "n_updates": 20.0,
        "n": 10.5,
        "third": 105.0,  # of 3, 6, ..., 18
    }


# -- as a policy ----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [Bounded(-3.0, 1.0, (2,)), OneHot(3), Categorical(3)])
@pytest.mark.parametrize("n_random", [0, 5])
def test_actions_are_of_the_spec(spec, n_random):
    factory = SACLearner if isinstance(spec, Bounded) else DQNLearner
    factory = partial(factory, hidden_sizes=(8,))
    options = {"learner_factory": factory, "n_initial_random_steps": n_random}
    level = model_free_level(OBS, spec, **options)
    for batch in ((), (4,), (2, 3)):
        action = level(TensorDict({"observation": torch.randn(*batch, 2)}, batch))["action"]
        assert spec.is_in(action)
        assert action.shape == (*batch, *spec.shape)
        assert action.dtype == spec.dtype


def test_random_at_first_then_exploring_and_neither_in_evaluation():
    level = model_free_level(*SPACES, n_initial_random_steps=5)
    td = TensorDict({"observation": torch.zeros(3000, 2)}, [3000])
    with unchanged(level):
        action = level(td.clone())["action"]
    assert not level.eval()(td.clone())["action"].requires_grad
    level.train()
    assert abs(action.var() - 1 / 3) < 4 * (4 / 45 / 3000) ** 0.5  # uniform
    calm = level.eval()(td.clone())["action"]
    assert (calm == calm[0]).all()
    level.train().n_env_steps += 5
    assert len(level(td.clone())["action"].unique()) > 2900
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(level(td.clone())["action"], calm)


@pytest.mark.parametrize(("task", "n"), [("InvertedPendulum-v5", None), ("Reacher-v5", 2)])
def test_it_is_random_first_and_learns_from_what_a_collector_gives(task, n):
    def run():
        torch.manual_seed(0)
        env = get_task(task).make(seed=0) if n is None else make_batched(task, n, seed=0)
        level = model_free_level(env=env, n_initial_random_steps=60)
        return level, [level.learn(data) for data in collected(env, level, 3, 40)]

    level, infos = run()
    assert [info["n_updates"] for info in infos] == [0, 8, 4]
    assert level.n_env_steps == len(level.buffer) == 120
    assert infos[-1].keys() >= {"loss_actor", "loss_qvalue", "loss_alpha", "alpha", "entropy"}
    stored = level.buffer[:]["observation"]
    torch.testing.assert_close(level.features.normalizer.loc, stored.mean(0))
    assert run()[1] == infos


# -- bad input ------------------------------------------------------------------------------


def test_what_is_missing_is_named():
    level = make_skill()
    for key in ("observation", "input", "n_actions"):
        with pytest.raises(KeyError, match=f"ModelFreeLevel reads .*{key}.*, which is missing"):
            level(transitions(3).exclude(key))
    with pytest.raises(RuntimeError, match="has no spaces yet"):
        ModelFreeLevel(learner_factory=SMALL_SAC)(transitions(3))


@pytest.mark.parametrize(
    ("spec", "value", "error"),
    [
        (INPUT, torch.full((20, 1), 1.5), ValueError),
        (INPUT, torch.zeros(20, 2), ValueError),
        (Categorical(3), torch.full((20,), 3), ValueError),
        (Categorical(3), torch.full((20,), 0.5), TypeError),
    ],
)
def test_inputs_outside_their_spec_are_not_learned_from(spec, value, error):
    level = model_free_level(*SPACES, input_spec=spec, duration=4)
    data = transitions(20).set("input", value)
    with unchanged(level), pytest.raises(error, match=r"input: .*nothing of the data is stored"):
        level.learn(data)
    assert not len(level.buffer)


def test_float64_that_float32_rounds_off_is_refused():
    level, data = make_skill(), transitions(20)
    far = {key: 1e9 + data[key].double() for key in ("observation", ("next", "observation"))}
    for key, value in far.items():
        data[key] = value
    with pytest.raises(ValueError, match=r"of observation vary by less than torch.float32"):
        level.learn(data)
    assert not len(level.buffer)
