"""What levels learn from anybody's data: stored right, or refused with nothing changed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import (
    Bounded,
    LazyStackStorage,
    LazyTensorStorage,
    ListStorage,
    MultiStep,
    PrioritizedSampler,
    RandomSampler,
    SliceSampler,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter
from torchrl.envs import MultiStepTransform, RenameTransform, StepCounter

from layeredrl_torchrl import (
    Hierarchy,
    ICEMPlanner,
    IdentityEncoder,
    ModelFreeLevel,
    PlannerLevel,
    PredictorFactory,
    SACLearner,
    get_task,
)

SPACES = Unbounded((2,)), Bounded(-1.0, 1.0, (1,))


def planner_level(*spaces, **options):
    small = {"n_initial_random_steps": 0, "batch_size": 8, "model_batch_size": 8}
    small["predictor_factory"] = PredictorFactory(hidden_sizes=(8,), n_models=2)
    return PlannerLevel(
        *spaces,
        planner_factory=partial(ICEMPlanner, horizon=2, n_samples=24, n_iterations=2),
        **small | {"updates_per_step": 0.1} | options,
    )


def model_free_level(*spaces, **options):
    small = {"n_initial_random_steps": 0, "batch_size": 8, "updates_per_step": 0.1}
    return ModelFreeLevel(
        *spaces, learner_factory=partial(SACLearner, hidden_sizes=(8,)), **small | options
    )


both = pytest.mark.parametrize("make", [planner_level, model_free_level])


def everything(level):
    """All that learning changes."""
    writer, storage = level.buffer.writer.state_dict(), level.buffer.storage
    rows = storage[:].clone() if len(storage) else None
    optim = {str(i): s for i, s in level.optim.state_dict()["state"].items()}
    return {"level": dict(level.state_dict()), "optim": optim, "writer": writer, "rows": rows}


def assert_same(got, expected):
    torch.testing.assert_close(got["level"], expected["level"], rtol=0, atol=0)
    torch.testing.assert_close(got["optim"], expected["optim"], rtol=0, atol=0)
    assert got["writer"] == expected["writer"]
    assert (got["rows"] is None) == (expected["rows"] is None)
    assert got["rows"] is None or bool((got["rows"] == expected["rows"]).all())


def snapshot(level):
    return torch.utils._pytree.tree_map(
        lambda x: x.clone() if isinstance(x, torch.Tensor) else x, everything(level)
    )


# -- all or nothing -------------------------------------------------------------------------


class Logger:
    """Raises what it is told to, when terms are logged."""

    error = None

    def log_metrics(self, metrics, step):
        if self.error is not None:
            raise self.error


@both
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), MemoryError()])
def test_after_an_error_in_an_update_it_is_as_if_nothing_had_been_learned(
    make, error, make_transitions
):
    """In a ring that is full, where rows were overwritten; and the next call is as ever."""
    twins = [make(*SPACES, logger=Logger(), buffer_size=50) for _ in range(2)]
    twins[1].load_state_dict(twins[0].state_dict())
    batches = [make_transitions(n_steps=30, episode_length=10) for _ in range(4)]
    for level in twins:
        for i, data in enumerate(batches[:3]):
            torch.manual_seed(i)
            level.learn(data)
    tried, spared = twins
    before = snapshot(tried)
    tried.logger.error = error
    with pytest.raises(type(error)):
        tried.learn(batches[0])
    assert_same(everything(tried), before)
    tried.logger.error = None
    for level in twins:
        torch.manual_seed(9)
        level.learn(batches[3])
    assert_same(everything(tried), everything(spared))


def test_an_error_of_the_lowest_level_undoes_what_the_highest_learned(toy_agent):
    agent, data = toy_agent
    agent.learn(data)
    before = [snapshot(level) for level in agent.levels]
    agent.levels[1].logger = Logger()
    agent.levels[1].logger.error = OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        agent.learn(data)
    for level, was in zip(agent.levels, before, strict=True):
        assert_same(everything(level), was)


@pytest.fixture
def toy_agent():
    env = get_task("InvertedPendulum-v5").make(seed=0)
    lower = model_free_level(input_spec=Bounded(-1.0, 1.0, (1,)), duration=2)
    agent = Hierarchy([planner_level(), lower], env)
    env.append_transform(agent.make_tensordict_primer())
    return agent, env.rollout(30, agent, break_when_any_done=False)


def replace(key, value):
    return lambda data: data.set(key, value(data))


DONE, TERMINATED, REWARD = (("next", key) for key in ("done", "terminated", "reward"))
NEXT = ("next", "observation")
BROKEN = {
    "wide": (replace("observation", lambda d: torch.randn(len(d), 3)), ValueError),
    "wide next": (replace(NEXT, lambda d: torch.randn(len(d), 3)), ValueError),
    "NaN": (replace("observation", lambda d: d["observation"] * torch.nan), ValueError),
    "NaN next": (replace(NEXT, lambda d: d[NEXT] * torch.nan), ValueError),
    "infinite": (replace(REWARD, lambda d: d[REWARD] / 0.0), ValueError),
    "flat reward": (replace(REWARD, lambda d: d[REWARD].squeeze(-1)), ValueError),
    "integers": (replace("observation", lambda d: d["observation"].long()), TypeError),
    "doubles": (replace("observation", lambda d: d["observation"].double()), ValueError),
    "action outside": (replace("action", lambda d: d["action"] * 9.0), ValueError),
    "action wide": (replace("action", lambda d: d["action"].expand(-1, 2)), ValueError),
    "no termination": (lambda d: d.exclude(TERMINATED), KeyError),
    "no done": (lambda d: d.exclude(DONE), KeyError),
    "no next": (lambda d: d.exclude(NEXT), KeyError),
    "a probability": (replace(TERMINATED, lambda d: d[TERMINATED].float() * 0.3), ValueError),
    "two": (replace(TERMINATED, lambda d: d[TERMINATED].long() + 1), ValueError),
    "environments": (lambda d: d.reshape(5, -1), ValueError),
    "no time": (replace(("next", "elapsed_steps"), lambda d: torch.zeros(len(d), 1)), ValueError),
    "several steps": (
        replace("steps_to_next_obs", lambda d: torch.full((len(d), 1), 3)),
        ValueError,
    ),
    "nothing": (lambda d: None, TypeError),
}


@both
@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_batch_leaves_no_trace(make, name, make_transitions):
    breaks, error = BROKEN[name]
    if make is model_free_level and name == "environments":
        pytest.skip("it stores single transitions, of any number of environments")
    level = make(*SPACES)
    for _ in range(2):
        before = snapshot(level)
        bad = breaks(make_transitions(n_steps=20))
        # At first those are as good as others.
        if name not in ("doubles", "environments") or len(level.buffer):
            with pytest.raises(error, match=r"\S{3}"):
                level.learn(bad)
        assert_same(everything(level), before)
        level.learn(make_transitions())
    assert len(level.buffer) == 120


@both
def test_what_was_stored_before_has_to_be_there_again(make, make_transitions):
    """TorchRL would store zeros: here terminations that never were."""
    level = make(*SPACES, store_keys=["weight"])
    weighted = make_transitions().set("weight", torch.ones(60))
    level.learn(weighted)
    with pytest.raises(KeyError, match="lacks 'weight'"):
        level.learn(make_transitions())
    fresh = make(*SPACES, store_keys=["weight"])
    fresh.learn(make_transitions())
    with pytest.raises(KeyError, match="adds 'weight'"):
        fresh.learn(weighted)
    assert len(fresh.buffer) == len(level.buffer) == 60


# -- which rows count -----------------------------------------------------------------------


@both
def test_rows_that_pad_trajectories_are_neither_stored_nor_counted(make, make_transitions):
    data = make_transitions(n_steps=60, episode_length=20)
    lengths = torch.tensor([20, 11, 17])
    mask = torch.arange(20) < lengths.unsqueeze(-1)
    padded = data.reshape(3, 20).clone()
    padded[~mask] = padded[~mask].apply(torch.zeros_like)
    padded["collector", "mask"] = mask
    level, plain = make(*SPACES), make(*SPACES)
    plain.load_state_dict(level.state_dict())
    for one, rows in ((level, padded), (plain, data.reshape(3, 20)[mask])):
        torch.manual_seed(0)
        assert one.learn(rows)["n_env_steps"] == 48
    assert_same(everything(level), everything(plain))
    padded["collector", "mask"] = torch.zeros_like(mask)
    assert level.learn(padded)["n_env_steps"] == 48


def test_actions_of_others_are_random_ones():
    """Those that a collector draws before it asks the level."""
    env = get_task("InvertedPendulum-v5").make(seed=0).append_transform(StepCounter(9))
    level = planner_level(env=env)
    for data in Collector(
        env,
        level,
        frames_per_batch=20,
        total_frames=60,
        init_random_frames=20,
        auto_register_policy_transforms=True,
    ):
        level.learn(data)
    random = level.buffer[:]["random_action"]
    assert random[:20].all()
    assert not random[20:].any()


def test_transitions_of_several_steps_are_refused():
    env = get_task("InvertedPendulum-v5").make(seed=0)
    level = planner_level(env=env)
    (data,) = Collector(
        env,
        level,
        frames_per_batch=30,
        total_frames=30,
        auto_register_policy_transforms=True,
        postproc=MultiStep(gamma=0.9, n_steps=3),
    )
    with pytest.raises(ValueError, match=r"up to 3 steps .*leave MultiStep out"):
        level.learn(data)
    assert not len(level.buffer)


@both
def test_ends_that_nobody_saw_are_left_out(make, make_transitions):
    """As of environments that reset themselves: NaN where the last observation should be."""
    data = make_transitions(n_steps=60, episode_length=20)
    ends = data["next", "done"].squeeze(-1)
    data["next", "observation"][ends] = torch.nan
    level = make(*SPACES)
    with pytest.warns(UserWarning, match="leaves out 3 of 60 transitions"):
        info = level.learn(data)
    assert info["n_env_steps"] == 60
    assert torch.equal(level.buffer[:]["observation"], data["observation"][~ends])


def test_only_what_is_needed_is_stored(make_transitions):
    def with_pictures(n):
        data = make_transitions(n_steps=n)
        data["pixels"] = torch.zeros(n, 64, 64, 3, dtype=torch.uint8)
        return data.set("weight", torch.rand(n))

    for make in (planner_level, model_free_level):
        level = make(*SPACES, store_keys=["weight"])
        level.learn(with_pictures(20))
        level.learn(with_pictures(20).exclude("pixels"))
        assert {"observation", "action", "weight"} <= set(level.buffer[:].keys())
        assert "pixels" not in level.buffer[:].keys()


@both
@pytest.mark.parametrize("n", [None, 3])
def test_learning_after_every_step(make, n, make_transitions):
    """What is stored is as if it had come at once, and all updates are made in the end."""
    data = make_transitions(n_steps=24, episode_length=8)
    data = data if n is None else data.reshape(n, 8)
    level, at_once = make(*SPACES), make(*SPACES)
    made = [level.learn(data[..., t : t + 1])["n_updates"] for t in range(data.shape[-1])]
    at_once.learn(data)
    assert sum(made) == 2
    assert level.n_env_steps == 24
    got, expected = (one.buffer.storage[:]["action"].flatten() for one in (level, at_once))
    assert torch.equal(got.sort()[0], expected.sort()[0])
    if make is planner_level:
        assert torch.equal(got, expected)


# -- keys -----------------------------------------------------------------------------------

OBS, ACTION, PAY = ("agents", "observation"), ("agents", "u"), ("agents", "pay")


def renamed_predictor(observation_space, action_space, **keys):
    factory = PredictorFactory(
        hidden_sizes=(8,),
        n_models=2,
        partial_encoder=partial(IdentityEncoder, in_keys=[OBS]),
        model_options={"in_keys": ["state", "context", ACTION]},
    )
    predictor = factory(observation_space[OBS], action_space)
    given = {
        "observation": OBS,
        "next_observation": ("next", *OBS),
        "action": ACTION,
        "reward": ("next", *PAY),
    }
    predictor.predictor_loss.set_keys(**given | keys)
    return predictor


def run(make, rename):
    """What a level does and learns in an environment, and the environment."""
    torch.manual_seed(0)
    env = get_task("InvertedPendulum-v5").make(seed=0)
    if rename:
        names = ["observation", "reward"], [OBS, PAY]
        env.append_transform(RenameTransform(*names, ["action"], [ACTION]))
    options = {"n_initial_random_steps": 10, "env": env}
    if make is model_free_level:
        options |= {"observation_key": OBS} if rename else {}
    else:
        options["predictor_factory"] = renamed_predictor if rename else make_factory()
    level, actions = make(**options), []
    for data in Collector(
        env, level, frames_per_batch=20, total_frames=60, auto_register_policy_transforms=True
    ):
        actions.append(data[level.action_key].clone())
        level.learn(data)
    return level, torch.cat(actions), env


def make_factory():
    return PredictorFactory(hidden_sizes=(8,), n_models=2)


@both
def test_keys_of_the_environment_can_be_renamed(make):
    (level, actions, _), (renamed, others, _) = run(make, False), run(make, True)
    assert torch.equal(others, actions)
    torch.testing.assert_close(renamed.state_dict(), level.state_dict(), rtol=0, atol=0)
    assert {OBS, ACTION} <= set(renamed.buffer[:].keys(True, True))


def test_keys_that_are_not_the_environments_are_named():
    _, _, env = run(model_free_level, True)
    options = {"env": env, "n_initial_random_steps": 10}
    with pytest.raises(KeyError, match="pass observation_key="):
        model_free_level(**options)
    for keys, message in (
        ({"reward": ("next", "reward")}, "reward has the key .* environment's has"),
        ({"observation": "observation"}, "learns from the observation 'observation'"),
        ({"action": "action"}, "learns from the action 'action'"),
    ):
        with pytest.raises(ValueError, match=message):
            planner_level(predictor_factory=partial(renamed_predictor, **keys), **options)


# -- the unit of rewards --------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(power=st.integers(-60, 60), sparse=st.booleans())
def test_the_unit_of_the_reward_does_not_matter(power, sparse):
    """Bit for bit: powers of two are exact."""
    torch.manual_seed(0)
    n = 40
    reward = torch.randn(n, 1) * (torch.rand(n, 1) < (0.1 if sparse else 1.0))
    no = torch.zeros(n, 1, dtype=torch.bool)
    after = {"observation": torch.randn(n, 2), "done": no, "terminated": no}
    now = {"observation": torch.randn(n, 2), "action": 2 * torch.rand(n, 1) - 1}
    learned = []
    for unit in (1.0, 2.0**power):
        torch.manual_seed(1)
        level = model_free_level(*SPACES)
        level.learn(TensorDict({**now, "next": {**after, "reward": reward * unit}}, [n]))
        learned.append(level.learner.state_dict())
    torch.testing.assert_close(*learned, rtol=0, atol=0)


# -- buffers --------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("buffer", "error", "message"),
    [
        (lambda: TensorDictReplayBuffer(batch_size=16), TypeError, "storage of tensors"),
        (lambda: TensorDictReplayBuffer(storage=ListStorage(9)), TypeError, "storage of tensors"),
        (lambda: TensorDictReplayBuffer(storage=LazyStackStorage(9)), TypeError, "of tensors"),
        (
            lambda: TensorDictReplayBuffer(
                storage=LazyTensorStorage(9), writer=TensorDictMaxValueWriter()
            ),
            TypeError,
            "RoundRobinWriter",
        ),
        (
            lambda: TensorDictReplayBuffer(
                storage=LazyTensorStorage(9), writer=ImmutableDatasetWriter()
            ),
            TypeError,
            "RoundRobinWriter",
        ),
        (
            lambda: TensorDictReplayBuffer(
                storage=LazyTensorStorage(9), transform=MultiStepTransform(3, 0.9)
            ),
            ValueError,
            "MultiStepTransform",
        ),
        (lambda: TensorDictReplayBuffer, TypeError, "got the class"),
    ],
)
def test_buffers_that_cannot_be_used_are_refused_at_once(make, buffer, error, message):
    with pytest.raises(error, match=message):
        make(buffer=buffer())


def test_samplers_that_would_have_no_effect_are_refused_at_once():
    for sampler in (SliceSampler(slice_len=4), object.__new__(PrioritizedSampler)):
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(9))
        buffer._sampler = sampler
        with pytest.raises(ValueError, match="use a RandomSampler"):
            model_free_level(buffer=buffer)

    class Relabels(RandomSampler):
        pass

    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(9), sampler=Relabels())
    with pytest.raises(TypeError, match=r"learn\(\) draw by"):
        planner_level(buffer=buffer)
