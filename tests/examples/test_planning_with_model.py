"""The demo as a user runs it: a subprocess, real MuJoCo, small numbers."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "planning_with_model.py"
SMALL = (
    "--total-env-steps=120",
    "--random-steps=60",
    "--n-envs=2",
    "--steps-per-batch=20",
    "--eval-episodes=2",
    "--updates-per-step=0.2",
    "--n-models=2",
    "--hidden-size=8",
    "--horizon=3",
    "--n-samples=8",
    "--n-iterations=2",
    "--elite-ratio=0.3",
    "--threads=1",
)


@pytest.fixture(scope="module")
def run(run_script):
    """``run(*options)``: the example as a process."""
    return partial(run_script, SCRIPT.name)


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a short run."""
    folder = tmp_path_factory.mktemp("demo")
    done = run(*SMALL, f"--output={folder}")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_leaves_metrics_checkpoint_and_pictures(trained):
    """All that the README promises is there and holds what it should."""
    folder, out = trained
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["env_steps"]) for row in rows] == list(range(20, 121, 20))
    # Learning starts when the random phase ends.
    assert [row["nll"] == "nan" for row in rows] == [True, True, False, False, False, False]
    for picture in ("learning_curve.png", "prediction.png"):
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG"
    animated = folder / "policy.gif"
    assert animated.exists() or "No animation: MuJoCo cannot render here" in out
    assert "mean return" in out


@pytest.mark.slow
def test_checkpoint_runs_again(trained, run, tmp_path):
    """--eval-only plays the saved predictor, to the same returns for the same seed."""
    folder, out = trained
    again = run(
        *SMALL, f"--checkpoint={folder / 'checkpoint'}", "--eval-only", f"--output={tmp_path}"
    )
    assert again.returncode == 0, again.stderr
    results = [
        next(line for line in text.splitlines() if "mean return" in line)
        for text in (out, again.stdout)
    ]
    assert results[0].split(":")[0] == results[1].split(":")[0]
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval-only"], "--eval-only needs --checkpoint"),
        (["--checkpoint=nowhere"], "nowhere"),
        (["--random-steps=500", "--total-env-steps=100"], "random_steps"),
    ],
)
def test_bad_options_say_what_to_do(options, message, run, tmp_path):
    """A wrong call ends with a message and before any work."""
    done = run(*options, f"--output={tmp_path}")
    assert done.returncode != 0
    assert message in done.stderr
    assert not any(tmp_path.iterdir())
