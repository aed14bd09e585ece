"""Evaluations on the way, which the run does not notice, and the one at its end."""

from __future__ import annotations

import csv
import math
import shutil
from dataclasses import dataclass
from functools import partial

import imageio
import numpy as np
import pytest
import torch
from helpers import SMALL_FACTORY, SMALL_PLANNER
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    ExplorationType,
    GymEnv,
    RewardSum,
    TransformedEnv,
    exploration_type,
    set_exploration_type,
)

from layeredrl_torchrl import make_batched
from layeredrl_torchrl.runs import Run, RunOptions
from layeredrl_torchrl.runs._playing import _success, evaluate
from layeredrl_torchrl.runs._video import record

TASK = "InvertedPendulum-v5"


def make_env(seed, n, **kwargs):
    return make_batched(TASK, n, seed=seed, **kwargs).append_transform(RewardSum())


def swaying():
    """A poor controller, whose episodes have different lengths."""
    return TensorDictModule(lambda obs: 2.0 * obs[..., 1:2], ["observation"], ["action"])


def make_planner():
    env = make_env(0, 1)
    return SMALL_PLANNER(SMALL_FACTORY(env.observation_spec_unbatched, env.action_spec_unbatched))


def test_an_evaluation_is_the_mean_of_whole_episodes():
    """Against a loop over gymnasium's own steps; the collector resets twice before it acts."""
    policy = swaying()
    found = evaluate(partial(make_env, 7, 1), policy, 4, seed=0, device="cpu")
    env = make_env(7, 1)
    gym = env.base_env._env.envs[0]
    env.reset()
    returns, lengths = [], []
    for _ in range(4):
        obs, rewards, over = gym.reset()[0], [], False
        while not over:
            obs, reward, ended, cut, _ = gym.step(2.0 * obs[1:2].astype("float32"))
            rewards.append(reward)
            over = ended or cut
        returns.append(sum(rewards))
        lengths.append(len(rewards))
    assert len(set(returns)) > 1
    assert found["num_episodes"] == 4
    assert found["reward"] == pytest.approx(sum(returns) / 4)
    assert found["episode_length"] == pytest.approx(sum(lengths) / 4)


def test_an_evaluation_leaves_generators_and_modes_as_they_were():
    planner = make_planner()
    planner.predictor.eval()
    planner.predictor.model.train()

    def make():
        """As environments that are seeded by everybody's generators."""
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        return make_env(7, 1)

    modes = [module.training for module in planner.modules()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    by_numpy = np.random.RandomState(3).rand()
    found, drawn = [], []
    for _ in range(2):
        found.append(evaluate(make, planner, 8, seed=5, device="cpu"))
        drawn.append(torch.rand(1))
    with pytest.raises(ZeroDivisionError):
        evaluate(lambda: (make(), 1 / 0), planner, 8, seed=5, device="cpu")
    drawn.append(torch.rand(1))
    assert torch.equal(torch.cat(drawn), expected)
    assert np.random.rand() == by_numpy  # noqa: NPY002
    assert [module.training for module in planner.modules()] == modes
    assert found[0]["reward"] == found[1]["reward"]  # whatever was drawn before


class Running(torch.nn.Module):
    """Counts in training mode what it is shown, as running statistics do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, obs):
        self.count += self.training
        return obs[..., :1]


def test_running_statistics_stay_as_they_were():
    policy = TensorDictModule(Running(), ["observation"], ["action"]).train()
    evaluate(partial(make_env, 7, 1), policy, 1, seed=0, device="cpu")
    assert policy.module.count == 0
    assert policy.module.training


def test_what_makes_no_environment_is_named(tmp_path):
    every = {"steps_per_evaluation": 20, "episodes_per_evaluation": 1}
    with Run(Options(output=tmp_path / "run", **every), 20) as run:
        run.count(torch.zeros(20))
        for call in (run.evaluation, run.finish):
            with pytest.raises(TypeError, match=r"is an environment; .* make_env\(seed=, n=\)"):
                call(make_env(0, 1), swaying())
            with pytest.raises(TypeError, match=r"what make_env\(seed=, n=\) returns .* NoneType"):
                call(lambda seed, n: None, swaying())


def test_a_video_without_pictures_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"render_mode None.* make_env pass on"):
        record(make_env(0, 1), swaying(), tmp_path / "video.gif", "cpu")


def test_actions_are_deterministic():
    seen = []

    def act(obs):
        seen.append(exploration_type())
        return obs[..., :1]

    policy = TensorDictModule(act, ["observation"], ["action"])
    with set_exploration_type(ExplorationType.RANDOM):
        evaluate(partial(make_env, 0, 1), policy, 1, seed=0, device="cpu")
    assert set(seen[1:]) == {ExplorationType.DETERMINISTIC}  # the first asks for the keys


def test_success_is_that_of_episodes():
    ids = torch.tensor([[3, 3, 3, 8, 8, 9]])
    reached = torch.tensor([0, 1, 0, 0, 0, 1]).reshape(1, 6, 1)  # in two of three
    data = {"next": {"success": reached}, "collector": {"traj_ids": ids}}
    assert _success(TensorDict(data, [1, 6])) == {"success": pytest.approx(2 / 3)}
    assert _success(TensorDict({"next": {}}, [1, 6])) == {}


def test_goals_of_which_nobody_says_whether_they_were_reached_are_named(tmp_path):
    every = {"steps_per_evaluation": 20, "episodes_per_evaluation": 1}
    with Run(Options(task="Reacher-Tip", output=tmp_path / "run", **every), 20) as run:
        run.count(torch.zeros(20))
        with pytest.raises(KeyError, match=r"Reacher-Tip has goals, .* lacks .*'success'"):
            run.evaluation(make_env, swaying())


class StopError(Exception):
    """As a kill."""


@dataclass
class Options(RunOptions):
    """A run of 80 steps with evaluations at 45 and 80 or so."""

    total_env_steps: int = 80
    n_envs: int = 2
    steps_per_batch: int = 20
    steps_per_checkpoint: int = 40
    eval_episodes: int = 3


def run_planner(folder, stop_at=0, **options):
    config = Options(output=folder, seed=3, **options)
    with Run(config, 80) as run:
        env = make_env(config.seed, config.n_envs)
        planner = make_planner()
        run.keep(planner=planner)
        for data in run.collect(env, planner):
            noise = {"noise": torch.rand(1).item(), "act": data["action"].mean().item()}
            run.log(run.returns(data) | noise | run.evaluation(make_env, planner))
            if run.steps == stop_at:
                raise StopError
        run.finish(make_env, planner)
    return run


def rows(folder):
    with (folder / "curve.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_a_run_goes_on_as_if_it_had_not_been_evaluated(tmp_path):
    every = {"steps_per_evaluation": 35, "episodes_per_evaluation": 2}
    torch.manual_seed(0)
    run_planner(tmp_path / "alone")
    run_planner(tmp_path / "evaluated", **every)
    alone, evaluated = rows(tmp_path / "alone"), rows(tmp_path / "evaluated")
    values = [float(row.pop("evaluation")) for row in evaluated]
    assert [math.isnan(value) for value in values] == [True, False, True, False]  # at 35 and 70
    assert evaluated == alone
    final = [(tmp_path / name / "evaluation.csv").read_text() for name in ("alone", "evaluated")]
    assert final[0] == final[1]
    assert len(final[0].splitlines()) == 4

    expected = rows(tmp_path / "evaluated")
    for stop_at in (20, 40, 80):
        shutil.rmtree(tmp_path / "evaluated")
        with pytest.raises(StopError):
            run_planner(tmp_path / "evaluated", stop_at, **every)
        torch.rand(7)
        run_planner(tmp_path / "evaluated", resume=True, **every)
        assert rows(tmp_path / "evaluated") == expected


def make_single(seed, n, **kwargs):
    """An environment without a batch axis, as GymEnv makes it."""
    env = TransformedEnv(GymEnv(TASK, **kwargs), Compose(DoubleToFloat(), RewardSum()))
    env.set_seed(seed)
    return env


def test_an_environment_without_a_batch_axis_is_evaluated(tmp_path):
    config = Options(output=tmp_path / "run", steps_per_evaluation=40)
    with Run(config, 80) as run:
        env = make_single(0, 1)
        for data in run.collect(env):
            assert data.ndim == 1
            run.log(run.returns(data) | run.evaluation(make_single, swaying()))
            so_far = data["next", "episode_reward"]
            assert run.rows[-1]["return_so_far"] == so_far[-1].item()
            assert run.rows[-1]["episodes"] == data["next", "done"].sum()
        run.finish(make_single, swaying())
    header, *lines = (run.folder / "evaluation.csv").read_text().splitlines()
    assert header == "return"
    assert [float(line) > 0 for line in lines] == [True]


def test_returns_that_nobody_sums_are_named(tmp_path):
    with Run(Options(output=tmp_path / "run"), 80) as run:
        env = make_batched(TASK, 2, seed=0)
        with pytest.raises(KeyError, match=r"append torchrl.envs.RewardSum\(\)"):
            run.returns(env.rollout(3))
        with pytest.raises(KeyError, match=r"append torchrl.envs.RewardSum\(\)"):
            run.finish(lambda n, seed: make_batched(TASK, n, seed=seed), swaying())


@pytest.mark.usefixtures("renders")
@pytest.mark.parametrize("fps", [None, 10])
def test_an_environment_without_a_batch_axis_is_recorded(fps, tmp_path):
    """And of one that does not know its own pace."""
    env = make_single(0, 1, render_mode="rgb_array")
    env.base_env._env.metadata["render_fps"] = fps
    seen = []
    act = swaying()
    act.register_forward_pre_hook(lambda *_: seen.append(None))
    record(env, act, tmp_path / "video.gif", "cpu")
    with imageio.get_reader(tmp_path / "video.gif") as video:
        assert len(list(video)) == len(seen) + 1
        assert video.get_meta_data()["duration"] == pytest.approx(1000 / (fps or 25))


@pytest.mark.usefixtures("renders")
def test_a_finished_run_can_be_recorded(tmp_path):
    """The policy is a planner, whose memory the environments of the end carry."""
    run = run_planner(tmp_path / "run", eval_episodes=1)
    assert not (run.folder / "video.gif").exists()
    run_planner(tmp_path / "run", resume=True, video=True)
    assert (run.folder / "video.gif").read_bytes().startswith(b"GIF89a")
