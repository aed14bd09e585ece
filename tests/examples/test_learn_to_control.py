"""The example as a user runs it: a subprocess, real MuJoCo, small numbers."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from layeredrl_torchrl import get_task

SCRIPT = Path(__file__).parents[2] / "examples" / "learn_to_control.py"
SMALL = (
    "--task=InvertedPendulum-v5",
    "--total-env-steps=160",
    "--random-steps=60",
    "--n-envs=2",
    "--steps-per-batch=20",
    "--steps-per-checkpoint=80",
    "--eval-episodes=2",
    "--updates-per-step=0.2",
    "--batch-size=16",
    "--n-models=2",
    "--hidden-size=8",
    "--horizon=3",
    "--n-samples=20",
    "--n-iterations=2",
    "--threads=1",
)


@pytest.fixture(scope="module")
def run(run_script):
    """``run(*options)``: the example as a process."""
    return partial(run_script, SCRIPT.name)


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a short run."""
    folder = tmp_path_factory.mktemp("control")
    done = run(*SMALL, f"--output={folder}")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_leaves_curve_picture_and_checkpoints(trained, curve):
    folder, out = trained
    rows = curve(folder)
    assert [float(row["env_steps"]) for row in rows] == list(range(20, 161, 20))
    # Learning and planning start when the random phase ends.
    assert [row["nll"] == "nan" for row in rows] == [True, True] + [False] * 6
    assert [float(row["random"]) for row in rows] == [1.0] * 3 + [0.0] * 5
    assert (folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((folder / "checkpoints").iterdir())) == 2
    assert "160 steps: mean return" in out
    assert "solved from 1000" in out


@pytest.mark.slow
def test_goes_on_from_the_last_checkpoint(trained, run, curve, tmp_path):
    """More steps on top of a finished run; without --resume its folder is left alone."""
    folder = tmp_path / "copy"
    shutil.copytree(trained[0], folder)
    before = curve(folder)
    refused = run(*SMALL, f"--output={folder}")
    assert refused.returncode != 0
    assert "add --resume" in refused.stderr
    assert curve(folder) == before
    done = run(*SMALL, f"--output={folder}", "--resume", "--total-env-steps=200")
    assert done.returncode == 0, done.stderr
    rows = curve(folder)
    assert rows[:8] == before
    assert [float(row["env_steps"]) for row in rows[8:]] == [180, 200]
    assert all(float(row["random"]) == 0.0 for row in rows[8:])
    assert float(rows[8]["seconds"]) > float(before[-1]["seconds"])
    other = run(*SMALL, f"--output={folder}", "--resume", "--hidden-size=9")
    assert "was made with {'hidden_size': 8}" in other.stderr


@pytest.mark.slow
def test_mazes_report_their_success(run, curve, tmp_path):
    pytest.importorskip("gymnasium_robotics")
    done = run(*SMALL, "--task=PointMaze-Open", f"--output={tmp_path / 'maze'}")
    assert done.returncode == 0, done.stderr
    assert "success rate 0." in done.stdout or "success rate 1." in done.stdout
    assert "success_rate" in curve(tmp_path / "maze")[0]


@pytest.mark.slow
def test_compile_compiles_plans_and_losses(monkeypatch):
    """Plans of compiled dynamics and reward stay within the bounds of the task's action."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import learn_to_control as example

    task = get_task("InvertedPendulum-v5")
    sizes = {"hidden_size": 8, "n_models": 2, "n_samples": 20, "n_iterations": 1, "horizon": 2}
    env = example.make_env(task, 2, 0)
    levels = [
        example.make_level(example.Config(compile=option, **sizes), task, env)
        for option in (False, True)
    ]
    env.append_transform(levels[0].make_tensordict_primer())
    data, n_graphs, losses_compiled = env.reset(), [], []
    for level in levels:
        counters.clear()
        with torch.no_grad():
            action = level.planner(data.clone())["action"]
        n_graphs.append(counters["stats"]["unique_graphs"])
        assert action.shape == (2, 1)
        assert action.abs().max() <= 3.0
        losses = (level.predictor.model_loss, level.predictor.predictor_loss)
        losses_compiled.append([hasattr(x.terms, "_torchdynamo_orig_callable") for x in losses])
    assert n_graphs == [0, 2]
    assert losses_compiled == [[False] * 2, [True] * 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task=Pendulum"], "no task is called 'Pendulum'"),
        (["--random-steps=500"], "random_steps is 500 of 160"),
        (["--resume"], "has no checkpoint"),
    ],
)
def test_bad_options_say_what_to_do(options, message, run, tmp_path):
    done = run(*SMALL, *options, f"--output={tmp_path / 'run'}")
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "run" / "curve.csv").exists()
