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
from level_states import assert_same, everything
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyStackStorage,
    LazyTensorStorage,
    ListStorage,
    MultiStep,
    PrioritizedSampler,
    RandomSampler,
    ReplayBuffer,
    SliceSampler,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
)
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter
from torchrl.envs import Compose, MultiStepTransform, RenameTransform, StepCounter, Transform

from layeredrl_torchrl import (
    AffineReward,
    PredictorFactory,
    TransitionSlices,
    get_task,
)
from layeredrl_torchrl.transforms import RelabelGoals

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


class Doubled(Transform):
    """Doubles observations in place, and counts the rows that it is given."""

    n_rows = 0

    def forward(self, tensordict):
        self.n_rows += len(tensordict)
        for key in ("observation", ("next", "observation")):
            tensordict[key].mul_(2.0)
        return tensordict


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize("room", [13, 30, 100])
def test_a_model_free_level_knows_the_units_that_the_buffers_transforms_give(storage, room):
    before, data = make_transitions(8), make_transitions(40)
    doubled = Doubled()
    reward = AffineReward(1000.0, 7.0, in_keys=[("next", "reward")])
    buffer = TensorDictReplayBuffer(storage=storage(room), transform=Compose(doubled, reward))
    level = model_free_level(*SPACES, buffer=buffer, n_initial_random_steps=1000)
    required, _ = level.stored_keys
    ReplayBuffer.extend(buffer, before.select(*required))
    first, second = data[:20], data[20:]
    for rows in (first, second):
        level.learn(rows)
    # Those that were written over before they were seen were not learned from either.
    seen = torch.cat([torch.cat([before, first])[-room:], second[-room:]])
    assert doubled.n_rows == len(seen)
    mean = 2.0 * seen["observation"].mean(0)
    torch.testing.assert_close(level.features.normalizer.loc, mean)
    paid = 1000.0 * seen["next", "reward"].double() + 7.0
    torch.testing.assert_close(level.reward_scale.square, paid.square().mean(), rtol=1e-5, atol=0)
    stored = buffer.storage[:]
    for key in ("observation", ("next", "reward")):
        expected = torch.cat([before, data])[-room:][key]
        assert torch.equal(stored[key].sort(0).values, expected.sort(0).values)


def test_the_goals_of_a_hindsight_buffer_are_as_stored_to_the_units():
    reached = lambda achieved, desired: (achieved == desired).float()  # noqa: E731
    hindsight = RelabelGoals(2, achieved=[0], desired=[1], reward_func=reached)
    levels = [
        model_free_level(*SPACES, buffer=own, n_initial_random_steps=1000)
        for own in (None, hindsight.make_buffer(storage=LazyTensorStorage(100)))
    ]
    for data in (make_transitions(), make_transitions(20)):
        for level in levels:
            level.learn(data)
    assert_same(*({**level.features.state_dict()} for level in levels))
    assert_same(*({**level.reward_scale.state_dict()} for level in levels))


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


@pytest.mark.parametrize("n_steps", [1, 20])
def test_ends_that_nobody_saw_do_not_shorten_the_lanes_of_environments(n_steps):
    """In batches with and without them; what is stored in their place is an episode of its own."""
    level = planner_level(*SPACES)
    seen, n_unseen = [], 0
    for i in range(4):
        data = TensorDict.stack(
            [make_transitions(n_steps=n_steps, episode_length=7) for _ in range(2)]
        )
        if i in (0, 2):  # of one environment only where there is but one step
            unseen = data["next", "done"].squeeze(-1).clone()
            unseen[0, -1] = n_steps > 1
            unseen[1, -1] = True
            data["next", "done"][unseen] = True
            data["next", "observation"][unseen] = torch.nan
            n_unseen += int(unseen.sum())
            with pytest.warns(UserWarning, match=f"{int(unseen.sum())} of {data.numel()}"):
                level.learn(data)
        else:
            level.learn(data)
        seen.append(data.reshape(-1))
    stored, seen = level.buffer.storage[:].reshape(-1), torch.cat(seen)
    assert len(stored) == int(level.n_env_steps) == 8 * n_steps
    known = seen[~seen["next", "observation"].isnan().any(-1)]
    assert len(known) == len(seen) - n_unseen
    kinds = ["observation", "action", ("next", "observation"), ("next", "reward")]
    rows, all_known = (torch.cat([d[k] for k in kinds], -1) for d in (stored, known))
    found = (rows.unsqueeze(1) == all_known).all(-1)
    assert found.any(1).all()
    assert found.any(0).all()  # nothing that is known is missing
    slices = TransitionSlices(level.buffer).sample(500, 2)
    follows = slices["next", "observation"][:, 0] == slices["observation"][:, 1]
    assert follows.all(-1)[slices["valid"][:, 1]].all()


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

    with pytest.raises(TypeError, match=r"sample on their own"):
        planner_level(buffer=buffer(sampler=Relabels()))
