"""What levels store of anybody's data, and what they refuse with nothing changed."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers import SPACES, both, collected, make_transitions, model_free_level, planner_level
from level_states import assert_same, everything
from tensordict import TensorDict
from torchrl.data import MultiStep
from torchrl.envs import StepCounter

from layeredrl_torchrl import TransitionSlices, get_task

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
def test_learning_after_every_step_stores_and_updates_as_learning_at_once(make, n):
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
