"""Batched environments against single ones, through the ends of episodes."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs.utils import check_env_specs

from layeredrl_torchrl.envs import get_task, make_batched


def single(task, seed, actions, **kwargs):
    """The slow twin: one environment, stepped and reset by hand, rows ``[T]``."""
    env = task.make(seed=seed, **kwargs)
    td, rows = env.reset(), []
    for action in actions:
        td["action"] = action
        td = env.step(td)
        rows.append(td.clone())
        td = env.reset() if td["next", "done"] else td["next"].exclude("reward")
    env.close()
    return torch.stack(rows)


# Hopper falls at different times in each instance; the others end by their time limit.
CASES = [
    ("Hopper-v5", {}),
    ("CartPoleSwingUp", {"max_episode_steps": 13}),
    ("Reacher-v5", {}),
    ("PointMaze-Open", {"max_episode_steps": 17}),
]


@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=[name for name, _ in CASES])
@pytest.mark.parametrize("collect", [False, True], ids=["rollout", "collector"])
def test_batched_equals_one_by_one_through_episode_ends(name, kwargs, collect):
    if name.startswith("PointMaze"):
        pytest.importorskip("gymnasium_robotics")
    task, n, steps = get_task(name), 3, 110
    env = make_batched(task if collect else name, n, seed=5, **kwargs)
    check_env_specs(make_batched(name, 2), seed=None)
    assert env.batch_size == (n,)
    if collect:
        (data,) = Collector(env, None, frames_per_batch=n * steps, total_frames=n * steps)
    else:
        data = env.rollout(steps, break_when_any_done=False)
    assert data.shape == (n, steps)
    ends = data["next", "done"].squeeze(-1)
    assert ends.any(1).all()
    for i in range(n):
        twin = single(task, 5 + i, data["action"][i], **kwargs)
        keys = [k for k in twin.keys(True, True) if k in data.keys(True, True)]
        assert ("next", "observation") in keys
        for key in keys:
            got = data[i].get(key)
            assert torch.equal(got, twin.get(key)), (key, (got != twin.get(key)).nonzero()[:1])
    # And so the last observation of an episode is neither 0 nor the next episode's first.
    last = data["next", "observation"][ends]
    assert (last != 0).any(-1).all()
    later = data["observation"][:, 1:][ends[:, :-1]]
    assert (data["next", "observation"][:, :-1][ends[:, :-1]] != later).any(-1).all()


def test_tasks_and_seeds_of_other_kinds_are_named():
    with pytest.raises(TypeError, match="task must be an object of Task"):
        make_batched(get_task, 2)
    with pytest.raises(TypeError, match="integer"):
        make_batched("CartPoleSwingUp", 2, seed=1.5)


def test_other_seeds_give_other_episodes():
    starts = [make_batched("Reacher-v5", 2, seed=s).reset()["observation"] for s in (0, 1, None)]
    assert torch.equal(starts[0][1], starts[1][0])  # instance i has seed + i
    assert not torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0][0], starts[0][1])


def test_the_global_seed_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    make_batched("InvertedPendulum-v5", 2, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_a_reset_of_some_leaves_the_others():
    env = make_batched("Reacher-v5", 3, seed=0)
    td = env.rollout(4)[:, -1]["next"].exclude("reward")
    before = td["observation"].clone()
    mask = torch.tensor([[False], [True], [False]])
    after = env.reset(TensorDict({**td, "_reset": mask}, [3]))["observation"]
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1], before[1])


def test_a_reset_with_a_tensordict_but_no_mask_resets_all():
    env, twin = make_batched("Reacher-v5", 3, seed=0), make_batched("Reacher-v5", 3, seed=0)
    td = env.rollout(4)[:, -1]["next"].exclude("reward")
    twin.rollout(4)
    assert torch.equal(env.reset(td)["observation"], twin.reset()["observation"])
