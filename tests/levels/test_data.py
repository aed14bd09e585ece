"""What levels learn from anybody's data: stored right, or refused with nothing changed."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import (
    SMALL_FACTORY,
    SPACES,
    both,
    collected,
    make_transitions,
    model_free_level,
    planner_level,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
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
)
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter
from torchrl.envs import MultiStepTransform, RenameTransform, StepCounter

from layeredrl_torchrl import Hierarchy, PredictorFactory, get_task


def everything(level):
    """All that learning changes, as copies."""
    writer, storage = level.buffer.writer.state_dict(), level.buffer.storage
    rows = storage[:].to_dict() if len(storage) else None
    optim = {str(i): s for i, s in level.optim.state_dict()["state"].items()}
    state = {"level": dict(level.state_dict()), "optim": optim, "writer": writer, "rows": rows}
    return torch.utils._pytree.tree_map(
        lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state
    )


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


# -- gradients and casts ----------------------------------------------------------------------


@both
@pytest.mark.parametrize("how", ["no_grad", "inference", "data", "cast"])
def test_learning_does_not_depend_on_gradients_or_casts_around_it(make, how):
    """Gradients that are off, data that have some, a level that was cast: all as ever."""
    twins = [make(*SPACES) for _ in range(2)]
    twins[1].load_state_dict(twins[0].state_dict())
    batches = [make_transitions() for _ in range(3)]
    contexts = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    for i, data in enumerate(batches):
        torch.manual_seed(i)
        twins[0].learn(data.clone())
        torch.manual_seed(i)
        if how == "data":
            data = data.clone()
            for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
                data.get(key).requires_grad_()
        if how == "cast":
            twins[1].double().float()
        with contexts.get(how, nullcontext)():
            twins[1].learn(data)
    assert_same(everything(twins[1]), everything(twins[0]))
    assert not twins[1].buffer[:]["observation"].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_levels_in_low_precision_are_those_of_the_data(dtype):
    """Of 4,000 rows, rewards up to 10,000: counts and squares beyond what these types hold."""
    exact, cast = model_free_level(*SPACES), model_free_level(*SPACES).to(dtype)
    data = make_transitions(n_steps=4000)
    data["next", "reward"] *= 3000.0
    for level in (exact, cast):
        level.updates_per_step = 1e-5
        for part in data.split(50):
            level.learn(part)
    for part in ("features.mean", "features.square", "reward_scale.square", "updates_due"):
        found, expected = (level.get_buffer(part) for level in (cast, exact))
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    given = data["next", "reward"][:9]
    torch.testing.assert_close(
        cast.reward_scale(given), exact.reward_scale(given), rtol=0.01, atol=0.01
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
def test_after_an_error_in_an_update_it_is_as_if_nothing_had_been_learned(make, error):
    """In a ring that is full, where rows were overwritten; and the next call is as ever."""
    twins = [make(*SPACES, logger=Logger(), buffer_size=50) for _ in range(2)]
    twins[1].load_state_dict(twins[0].state_dict())
    batches = [make_transitions(n_steps=30, episode_length=10) for _ in range(4)]
    for level in twins:
        for i, data in enumerate(batches[:3]):
            torch.manual_seed(i)
            level.learn(data)
    tried, spared = twins
    before = everything(tried)
    tried.logger.error = error
    with pytest.raises(type(error)):
        tried.learn(batches[0])
    assert_same(everything(tried), before)
    tried.logger.error = None
    for level in twins:
        torch.manual_seed(9)
        level.learn(batches[3])
    assert_same(everything(tried), everything(spared))


@both
def test_after_a_first_batch_that_failed_the_next_may_be_of_another_kind(make):
    level = make(*SPACES, logger=Logger())
    level.logger.error = OSError("disk full")
    first = make_transitions().set("weight", torch.ones(60))
    with pytest.raises(OSError, match="disk full"):
        level.learn(first)
    level.logger.error = None
    level.learn(make_transitions().reshape(2, 30))
    assert len(level.buffer) == 60
    assert "weight" not in level.buffer[:].keys()


def test_an_error_of_the_lowest_level_undoes_what_the_highest_learned():
    env = get_task("InvertedPendulum-v5").make(seed=0)
    lower = model_free_level(input_spec=Bounded(-1.0, 1.0, (1,)), duration=2)
    agent = Hierarchy([planner_level(), lower], env)
    (data,) = collected(env, agent, 1, 30)
    agent.learn(data)
    before = [everything(level) for level in agent.levels]
    lower.logger = Logger()
    lower.logger.error = OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        agent.learn(data)
    for level, was in zip(agent.levels, before, strict=True):
        assert_same(everything(level), was)


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
    "no action": (lambda d: d.exclude("action"), KeyError),
    "no reward": (lambda d: d.exclude(REWARD), KeyError),
    "no termination": (lambda d: d.exclude(TERMINATED), KeyError),
    "no done": (lambda d: d.exclude(DONE), KeyError),
    "no next": (lambda d: d.exclude(NEXT), KeyError),
    "a probability": (replace(TERMINATED, lambda d: d[TERMINATED].float() * 0.3), ValueError),
    "two": (replace(TERMINATED, lambda d: d[TERMINATED].long() + 1), ValueError),
    "environments": (lambda d: d.reshape(5, -1), ValueError),
    "no time": (replace(("next", "elapsed_steps"), lambda d: torch.zeros(len(d), 1)), ValueError),
    "half a step": (
        replace(("next", "elapsed_steps"), lambda d: torch.full((len(d), 1), 1.5)),
        ValueError,
    ),
    "no steps": (
        replace(("next", "elapsed_steps"), lambda d: torch.arange(len(d)).unsqueeze(-1)),
        ValueError,
    ),
    "several steps": (
        replace("steps_to_next_obs", lambda d: torch.full((len(d), 1), 3)),
        ValueError,
    ),
    "one row": (lambda d: d[0], ValueError),
    "no rows": (lambda d: d[:0], ValueError),
    "nothing": (lambda d: None, TypeError),
}


@both
@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_batch_leaves_no_trace(make, name):
    breaks, error = BROKEN[name]
    if make is model_free_level and name == "environments":
        pytest.skip("it stores single transitions, of any number of environments")
    level = make(*SPACES)
    for _ in range(2):
        before = everything(level)
        bad = breaks(make_transitions(n_steps=20))
        # At first those are as good as others.
        if name not in ("doubles", "environments") or len(level.buffer):
            with pytest.raises(error, match=r"\S{3}"):
                level.learn(bad)
        assert_same(everything(level), before)
        level.learn(make_transitions())
    assert len(level.buffer) == 120


def test_what_comes_from_above_is_needed_too():
    data = make_transitions(n_steps=20)
    data["input"], data["n_actions"] = torch.rand(20, 1), torch.zeros(20, 1, dtype=torch.int64)
    data["next", "input_done"] = data["next", "done"].clone()
    options = {"input_spec": Bounded(-1.0, 1.0, (1,)), "duration": 4}
    level = model_free_level(*SPACES, **options)
    for key in ("input", "n_actions", ("next", "input_done")):
        last = key if isinstance(key, str) else key[-1]
        with pytest.raises(KeyError, match=f"learn reads .*{last}.*, which is missing"):
            level.learn(data.exclude(key))
    assert not len(level.buffer)
    # Without an end of the input, nobody has to say where it is.
    model_free_level(*SPACES, **options, input_ends=False).learn(data.exclude(key))


@both
def test_what_was_stored_before_has_to_be_there_again(make):
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
@pytest.mark.parametrize("key", [("collector", "mask"), "mask"])  # with a collector, and without
def test_rows_that_pad_trajectories_are_neither_stored_nor_counted(make, key):
    data = make_transitions(n_steps=60, episode_length=20)
    lengths = torch.tensor([20, 11, 17])
    mask = torch.arange(20) < lengths.unsqueeze(-1)
    padded = data.reshape(3, 20).clone()
    padded[~mask] = padded[~mask].apply(torch.zeros_like)
    padded[key] = mask
    level, plain = make(*SPACES), make(*SPACES)
    plain.load_state_dict(level.state_dict())
    for one, rows in ((level, padded), (plain, data.reshape(3, 20)[mask])):
        torch.manual_seed(0)
        assert one.learn(rows)["n_env_steps"] == 48
    assert_same(everything(level), everything(plain))
    padded[key] = torch.zeros_like(mask)
    assert level.learn(padded)["n_env_steps"] == 48
    fresh = make(*SPACES, updates_per_step=1.0)
    assert fresh.learn(padded)["n_env_steps"] == 0  # nothing is learned of nothing


def test_actions_of_others_are_random_ones():
    """Those that a collector draws before it asks the level."""
    env = get_task("InvertedPendulum-v5").make(seed=0).append_transform(StepCounter(9))
    level = planner_level(env=env)
    for data in collected(env, level, 3, init_random_frames=20):
        level.learn(data)
    random = level.buffer[:]["random_action"]
    assert random[:20].all()
    assert not random[20:].any()


@pytest.mark.parametrize("flags", [torch.zeros(60), torch.zeros(60, 1)])
def test_flags_of_random_actions_are_bool(flags):
    level, data = planner_level(*SPACES), make_transitions()
    data["random_action"] = flags
    with pytest.raises(
        ValueError, match=r"'random_action' is torch.float32 .*, expected torch.bool"
    ):
        level.learn(data)
    assert not len(level.buffer)


def test_a_model_free_level_knows_the_units_of_what_was_stored_before():
    before, data = make_transitions(), make_transitions(20)
    for key in ("observation", ("next", "observation")):
        before[key] += 50.0
    before["next", "reward"] *= 30.0
    stored = model_free_level(*SPACES)
    required, _ = stored.stored_keys
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100))
    buffer.extend(before.select(*required))
    level = model_free_level(*SPACES, buffer=buffer)
    both = torch.cat([before, data])
    for rows in (data[:12], data[12:]):
        level.learn(rows)
    torch.testing.assert_close(level.features.normalizer.loc, both["observation"].mean(0))
    square = both["next", "reward"].double().square().mean()
    torch.testing.assert_close(level.reward_scale.square, square, rtol=1e-5, atol=0)


def test_transitions_of_several_steps_are_refused():
    env = get_task("InvertedPendulum-v5").make(seed=0)
    level = planner_level(env=env)
    (data,) = collected(env, level, 1, 30, postproc=MultiStep(gamma=0.9, n_steps=3))
    with pytest.raises(ValueError, match=r"up to 3 steps .*leave MultiStep out"):
        level.learn(data)
    assert not len(level.buffer)


@pytest.mark.parametrize(
    ("make", "shape"), [(planner_level, 60), (model_free_level, 60), (model_free_level, (3, 20))]
)
def test_ends_that_nobody_saw_are_left_out(make, shape):
    """As of environments that reset themselves: NaN where the last observation should be."""
    data = make_transitions(n_steps=60, episode_length=20)
    unseen = data["next", "done"].squeeze(-1).clone()
    unseen[-1] = False
    data["next", "observation"][unseen] = torch.nan
    level = make(*SPACES)
    with pytest.warns(UserWarning, match="leaves out 2 of 60 transitions"):
        info = level.learn(data.reshape(shape))
    assert info["n_env_steps"] == 60
    assert torch.equal(level.buffer[:]["observation"], data["observation"][~unseen])


@both
def test_only_what_is_needed_is_stored(make):
    level, data = make(*SPACES, store_keys=["weight"]), make_transitions(n_steps=20)
    data["pixels"] = torch.zeros(20, 64, 64, 3, dtype=torch.uint8)
    data["weight"] = torch.rand(20)
    level.learn(data)
    level.learn(data.exclude("pixels"))
    assert {"observation", "action", "weight"} <= set(level.buffer[:].keys())
    assert "pixels" not in level.buffer[:].keys()


@both
@pytest.mark.parametrize("n", [None, 3])
def test_learning_after_every_step(make, n):
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


RENAMED = {"observation_key": OBS, "action_key": ACTION, "reward_key": PAY}


def renamed_predictor(observation_space, action_space, **keys):
    factory = PredictorFactory(hidden_sizes=(8,), n_models=2, **RENAMED)
    predictor = factory(observation_space, action_space)
    predictor.predictor_loss.set_keys(**keys)
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
        options["predictor_factory"] = renamed_predictor if rename else SMALL_FACTORY
    level, actions = make(**options), []
    for data in collected(env, level, 3):
        actions.append(data[level.action_key])
        level.learn(data)
    return level, torch.cat(actions), env


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


def buffer(storage=LazyTensorStorage, **options):
    return TensorDictReplayBuffer(storage=storage(9), **options)


@both
@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: TensorDictReplayBuffer(batch_size=16), TypeError, "storage of tensors"),
        (lambda: buffer(ListStorage), TypeError, "storage of tensors"),
        (lambda: buffer(LazyStackStorage), TypeError, "storage of tensors"),
        (lambda: buffer(writer=TensorDictMaxValueWriter()), TypeError, "RoundRobinWriter"),
        (lambda: buffer(writer=ImmutableDatasetWriter()), TypeError, "RoundRobinWriter"),
        (lambda: buffer(transform=MultiStepTransform(3, 0.9)), ValueError, "MultiStepTransform"),
        (lambda: TensorDictReplayBuffer, TypeError, "got the class"),
    ],
)
def test_buffers_that_cannot_be_used_are_refused_at_once(make, build, error, message):
    with pytest.raises(error, match=message):
        make(buffer=build())


def test_samplers_that_would_have_no_effect_are_refused_at_once():
    for sampler in (SliceSampler(slice_len=4), object.__new__(PrioritizedSampler)):
        own = buffer()
        own._sampler = sampler
        with pytest.raises(ValueError, match="use a RandomSampler"):
            model_free_level(buffer=own)

    class Relabels(RandomSampler):
        pass

    with pytest.raises(TypeError, match=r"learn\(\) draw by"):
        planner_level(buffer=buffer(sampler=Relabels()))
