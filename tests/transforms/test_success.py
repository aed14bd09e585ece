"""Success per episode, and the running rate, against a loop over the steps."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs
from torchrl.testing.mocking_classes import NestedCountingEnv

from layeredrl_torchrl import SuccessRate, make_batched

# Successes in turn: every second episode; every third, at its first and at its last step.
WALKS = [{"length": 3, "reached": (0, 2)}, {"length": 4, "reached": (1, 0, 4)}]


def slow(success, done, window, finished, episode):
    """The slow twin: what is written after each step of all instances, ``[T][n]``.

    ``finished`` (outcomes so far) and ``episode`` (success so far, ``[n]``) are continued.
    """
    rows = []
    for t in range(success.shape[-1]):
        for i in range(len(episode)):
            episode[i] = episode[i] or bool(success[i, t])
        row = list(episode)
        for i in range(len(episode)):
            if done[i, t]:
                finished.append(episode[i])
                episode[i] = False
        last = finished[-window:]
        rows.append((row, sum(last) / max(len(last), 1), len(finished)))
    return rows


def check(data, window, finished, episode):
    """Compare ``[n, T]`` with the slow twin."""
    keys = ("success", "done", "episode_success", "success_rate", "episode_count")
    columns = [data["next", key].reshape(len(episode), data.shape[-1]) for key in keys]
    success, done, in_episode, rate, count = columns
    rows = slow(success, done, window, finished, episode)
    assert in_episode.T.tolist() == [row[0] for row in rows]
    for i in range(len(episode)):
        torch.testing.assert_close(rate[i], torch.tensor([row[1] for row in rows]))
        assert count[i].tolist() == [row[2] for row in rows]


@pytest.mark.parametrize("window", [100, 3, 1])
def test_rates_are_those_of_the_loop_in_rollouts_and_collectors(build, window):
    env = build(lambda: SuccessRate(window=window), WALKS)
    check_env_specs(env)
    env = build(lambda: SuccessRate(window=window), WALKS)
    n = max(env.batch_size.numel(), 1)
    inside = not isinstance(env, TransformedEnv)
    parts = [[i] for i in range(n)] if inside else [list(range(n))]  # of one transform each
    twins = [([], [False] * len(part)) for part in parts]

    # A collector's batches go on where the one before has ended, in the middle of an episode.
    seen = set()
    for batch in Collector(env, None, frames_per_batch=14 * n, total_frames=56 * n):
        rows = batch.reshape(n, 14)
        for part, twin in zip(parts, twins, strict=True):
            check(rows[part], window, *twin)
        seen |= set(rows["next", "episode_success"].flatten().tolist())
        root = rows["episode_count"]
        assert (root[:, 1:] >= rows["next", "episode_count"][:, :-1]).all()
    assert seen == {True, False}
    assert sum(len(finished) for finished, _ in twins) == sum(
        56 // walk["length"] for walk in WALKS[:n]
    )


def test_of_more_that_finish_at_once_the_window_holds_the_last():
    rate = SuccessRate("reached", window=2)
    done = torch.ones(3, 1, dtype=torch.bool)
    for reached, expected, count in (([1, 0, 1], 0.5, 3), ([1, 1, 1], 1.0, 6), ([1, 1, 0], 0.5, 9)):
        root = TensorDict({"episode_success": ~done}, [3])
        following = TensorDict(
            {"reached": torch.tensor(reached)[:, None].bool(), "done": done}, [3]
        )
        rate._step(root, following)
        assert rate.rate.item() == expected
        assert following["episode_count"].flatten().tolist() == [count] * 3


def small(n=2, max_episode_steps=2):
    """Any step counts as success, since the step count is not 0."""
    env = make_batched("CartPoleSwingUp", n, seed=0, max_episode_steps=max_episode_steps)
    env.append_transform(StepCounter())
    return env.append_transform(SuccessRate("step_count", window=10))


def test_resets_keep_the_statistics_clear_starts_over_and_they_are_saved():
    env = small()
    td = env.rollout(4, break_when_any_done=False)[:, -1]["next"].exclude("reward")
    assert td["episode_count"].flatten().tolist() == [4, 4]
    mask = torch.tensor([[True], [False]])
    some = env.reset(TensorDict({**td, "_reset": mask}, [2]))
    assert some["episode_success"].flatten().tolist() == [False, True]
    assert some["episode_count"].flatten().tolist() == [4, 4]
    everything = env.reset()
    assert everything["success_rate"].flatten().tolist() == [1.0, 1.0]
    assert not everything["episode_success"].any()
    env.transform[-1].clear()
    assert env.transform[-1].rate == 0
    cleared = env.reset()
    assert not cleared["episode_count"].any()
    assert not cleared["success_rate"].any()
    # they are saved
    env.rollout(6, break_when_any_done=False)
    other = small()
    other.transform.load_state_dict(env.transform.state_dict())
    assert other.transform[-1].rate == env.transform[-1].rate == 1.0
    assert other.reset()["episode_count"].flatten().tolist() == [6, 6]


def test_an_environment_without_success_is_an_error():
    env = TransformedEnv(GymEnv("InvertedPendulum-v5"), SuccessRate())
    with pytest.raises(KeyError, match=r"reads 'success', but the environment gives"):
        env.reset()


def test_keys_can_be_renamed_and_nested():
    """In an environment of groups, and under names of one's own."""
    out = [("data", "won"), ("data", "rate"), "ended"]
    rate = SuccessRate(("data", "states"), done_key=("data", "done"), out_keys=out)
    env = TransformedEnv(NestedCountingEnv(max_steps=3), rate)
    check_env_specs(env)
    rate.clear()
    data = env.rollout(10, break_when_any_done=False)
    ends = data["next", "data", "done"][:, 0, 0].cumsum(0)
    assert ends[-1] > 1
    for agent in range(3):
        assert torch.equal(data["next", "ended"][:, agent, 0], 3 * ends)
        assert torch.equal(data["next", "data", "rate"][:, agent, 0], (ends > 0).float())
    assert data["next", "data", "won"].all()
    assert not data["data", "won"][0].any()


def test_keys_that_do_not_fit_are_named():
    with pytest.raises(TypeError, match="out_keys must be a list of keys, got 'abc'"):
        SuccessRate(out_keys="abc")
    with pytest.raises(ValueError, match="out_keys must be three keys"):
        SuccessRate(out_keys=["a", "b"])
    env = TransformedEnv(NestedCountingEnv(), SuccessRate(("data", "states")))
    with pytest.raises(
        KeyError, match=r"counts episodes by.*but the environment ends them by.*data.*done_key="
    ):
        env.reset()
    env = TransformedEnv(NestedCountingEnv(has_root_done=True), SuccessRate(("data", "states")))
    with pytest.raises(ValueError, match=r"shape \(3, 1\), but 'done' has \(1,\)"):
        env.reset()


def test_sampled_data_are_refused():
    with pytest.raises(RuntimeError, match="in an environment only"):
        SuccessRate()(TensorDict({"success": torch.ones(1, dtype=torch.bool)}, []))


def test_the_inputs_of_other_transforms_stay():
    env = make_batched("PointMaze-Open", 2, seed=0).append_transform(StepCounter())
    env.append_transform(SuccessRate())
    assert {"step_count", "episode_success"} <= set(env.full_state_spec.keys())
