"""What a run plays and reports at its end, and which environments it asks for."""

from __future__ import annotations

import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.envs import RewardSum

from layeredrl_torchrl import SuccessRate, make_batched
from layeredrl_torchrl.runs import Run, RunOptions, find_task, play_episodes
from layeredrl_torchrl.runs._playing import evaluate

TASK = "InvertedPendulum-v5"


class Made:
    """Makes environments, and notes what for and which."""

    def __init__(self, task=TASK):
        self.task, self.asked, self.envs = task, [], []

    def __call__(self, seed, n):
        self.asked.append((seed, n))
        env = make_batched(self.task, n, seed=seed).append_transform(RewardSum())
        if find_task(self.task).reports_success:
            env.append_transform(SuccessRate())
        self.envs.append(env)
        return env


def leaning(gain=-2.0):
    """A poor controller, whose episodes have different lengths."""
    return TensorDictModule(lambda obs: gain * obs[..., 1:2], ["observation"], ["action"])


def still(obs):
    return torch.zeros(*obs.shape[:-1], 2)


def options(tmp_path, **more):
    return RunOptions(output=tmp_path / "run", steps_per_batch=20, **more)


@pytest.mark.parametrize("n", [1, 3])
def test_the_last_step_of_one_episode_in_each_environment_is_returned(n):
    """As in a rollout that goes on over resets, cut at the first end of each row."""
    made = Made()
    ends = play_episodes(made(5, n), leaning())
    data = made(5, n).rollout(60, leaning(), break_when_any_done=False)
    done = data["next", "done"].squeeze(-1)
    assert done.any(-1).all()
    first = done.int().argmax(-1)
    assert n == 1 or len(first.unique()) > 1
    assert ends.batch_size == (n,)
    for key in ("episode_reward", "observation"):
        assert torch.equal(ends[key], data["next", key][torch.arange(n), first])
    assert [env.is_closed for env in made.envs] == [True, False]


@pytest.mark.parametrize(("seed", "expected"), [(None, 10_004), (7, 7)])
def test_the_evaluation_at_the_end_is_written_and_said(seed, expected, tmp_path, capsys):
    made = Made()
    with Run(options(tmp_path, seed=4, eval_episodes=3), 60) as run:
        run.log({"return": 1.0})
        run.rows[-1]["seconds"] = 90.0
        run.finish(made, leaning(), seed=seed, solved_at=950.5)
    assert made.asked == [(expected, 3)]
    lines = (run.folder / "evaluation.csv").read_text().splitlines()
    returns = [float(line) for line in lines[1:]]
    assert lines[0] == "return"
    assert len(set(returns)) > 1
    mean = sum(returns) / 3
    assert (
        f"{TASK}, seed 4, 0 steps in 1.5 minutes: mean return {mean:.2f} over 3 episodes (lowest "
        f"{min(returns):.2f}, highest {max(returns):.2f}, solved from 950.5); {run.folder}"
    ) in capsys.readouterr().out
    assert not (run.folder / "video.gif").exists()


@pytest.mark.parametrize("shape", [(), (4,)])
def test_goals_are_reported_under_a_name_of_their_own(shape, tmp_path, capsys):
    success = torch.rand(*shape, 1) < 0.5
    ends = {"episode_reward": torch.randn(*shape, 1), "episode_success": success}
    with Run(options(tmp_path), 60) as run:
        run.report(TensorDict(ends, shape), how="asleep")
    header, *lines = (run.folder / "evaluation_asleep.csv").read_text().splitlines()
    assert header == "return,success"
    expected = zip(ends["episode_reward"].flatten(), success.flatten(), strict=True)
    found = [tuple(map(float, line.split(","))) for line in lines]
    assert found == [(float(paid), float(reached)) for paid, reached in expected]
    said = capsys.readouterr().out
    assert f"0.0 minutes, asleep: mean return {ends['episode_reward'].mean():.2f} over" in said
    assert f"), success rate {success.float().mean():.2f}; " in said
    assert "solved" not in said
    assert not (run.folder / "evaluation.csv").exists()


def test_evaluations_on_the_way_are_the_same_episodes_of_goals_never_trained_on(tmp_path):
    made = Made("Reacher-Tip")
    policy = TensorDictModule(still, ["observation"], ["action"])
    given = {"steps_per_evaluation": 20, "episodes_per_evaluation": 2, "seed": 3}
    with Run(options(tmp_path, task="Reacher-Tip", **given), 60) as run:
        rows = []
        for _ in range(3):
            run.count(torch.zeros(10))
            rows.append(run.evaluation(made, policy))
            run.log(rows[-1])
    assert made.asked == [(20_003, 1)]
    assert all(math.isnan(rows[i][k]) for i in (0, 2) for k in rows[0])
    assert rows[1].keys() == {"evaluation", "evaluation_success"}
    assert math.isfinite(rows[1]["evaluation"])
    assert rows[1]["evaluation_success"] in (0.0, 0.5, 1.0)
    assert all(env.is_closed for env in made.envs)


@pytest.mark.parametrize("ended", [[], [1], [0, 1]])
def test_returns_are_of_ended_episodes_or_of_the_last_row(ended, tmp_path):
    """Of two environments and three steps, of which the second may end an episode."""
    so_far = torch.tensor([[1.0, 2.0, 4.0], [10.0, 20.0, 40.0]]).unsqueeze(-1)
    done = torch.zeros(2, 3, 1, dtype=torch.bool)
    done[ended, 1] = True
    data = TensorDict({"next": {"episode_reward": so_far, "done": done}}, [2, 3])
    with Run(options(tmp_path), 60) as run:
        assert math.isnan(run.returns(data)["return"]) == (not ended)
        for value in (5.0, 6.0, 7.0):
            run.log({"return": value})
        found = run.returns(data)
    expected = {0: 7.0, 1: 20.0, 2: 11.0}[len(ended)]
    assert found == {"episodes": len(ended), "return": expected, "return_so_far": 22.0}


# -- the beginning --------------------------------------------------------------------------


def test_everything_random_is_seeded_and_threads_are_set(tmp_path):
    before, drawn = torch.get_num_threads(), []
    try:
        for i, seed in enumerate((2**32 - 1, 2**32 - 1, 0)):
            with Run(RunOptions(output=tmp_path / f"a/{i}", seed=seed, threads=2), 60):
                drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))  # noqa: NPY002
                assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    first, same, other = drawn
    assert same == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_the_first_steps_may_be_random(tmp_path):
    policy = TensorDictModule(
        lambda obs: torch.full_like(obs[..., :1], 0.25), ["observation"], ["action"]
    )
    env = make_batched(TASK, 2, seed=0)
    with Run(options(tmp_path, n_envs=2), 60) as run:
        calm = [
            bool((data["action"] == 0.25).all())
            for data in run.collect(env, policy, init_random_frames=20)
        ]
    assert calm == [False, True, True]


def test_environments_are_closed_where_a_run_is_left_early(tmp_path):
    env, made, calls = make_batched(TASK, 2, seed=0), Made(), []
    with Run(options(tmp_path, n_envs=2), 60) as run:
        assert next(run.collect(env)).shape == (2, 10)
        assert not env.is_closed
    assert env.is_closed

    def stop(obs):
        calls.append(obs)
        return obs[..., :1] if len(calls) < 5 else 1 / 0

    policy = TensorDictModule(stop, ["observation"], ["action"])
    with pytest.raises(ZeroDivisionError):
        evaluate(partial(made, 0, 1), policy, 1, seed=0, device="cpu")
    assert made.envs[0].is_closed


def test_rows_of_other_columns_are_refused(tmp_path):
    with Run(options(tmp_path), 60) as run:
        run.log({"a": 1.0})
        with pytest.raises(ValueError, match=r"has columns \['env_steps', 'a', .*got .*'b'"):
            run.log({"b": 1.0})
        run.log({"a": 2.0})
    assert [row["a"] for row in run.rows] == [1.0, 2.0]
