"""A small run, in this process or in one of its own."""

from __future__ import annotations

import pytest

from layeredrl_torchrl import make_batched
from layeredrl_torchrl.runs import Run, RunOptions


@pytest.fixture
def small(tmp_path):
    """``small(**options)``: a run of 80 random steps in ``tmp_path / "run"``; returns it."""

    def go(after=lambda run: None, **options):
        defaults = {"steps_per_batch": 20, "steps_per_checkpoint": 40, "n_envs": 2}
        config = RunOptions(output=tmp_path / "run", **defaults | options)
        with Run(config, config.total_env_steps or 80) as run:
            env = make_batched(config.task, config.n_envs, seed=config.seed)
            for data in run.collect(env):
                run.log(
                    {
                        "reward": data["next", "reward"].sum().item(),
                        "noise": data["action"].mean().item(),
                    }
                )
                after(run)
        return run

    return go
