"""The Trainer example as a user runs it: a subprocess, real MuJoCo, small numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train_with_trainer.py"
SMALL = (
    "--total-env-steps=600",
    "--steps-per-batch=200",
    "--held-out-steps=200",
    "--updates-per-batch=80",
    "--batch-size=64",
    "--n-models=2",
    "--hidden-size=32",
    "--threads=1",
)


@pytest.mark.slow
def test_held_out_predictions_become_good(run_script, tmp_path):
    done = run_script("train_with_trainer.py", *SMALL, f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    scores = {
        name: (float(before), float(after))
        for name, before, after in re.findall(r"(\w+): (\S+) before, (\S+) after", done.stdout)
    }
    before, after = scores["held_out_nll"]
    assert after < before - 2.0  # nats per dimension
    before, after = scores["held_out_reward_error"]
    assert after < 0.5 * before
    logged = (tmp_path / "scalars" / "scalars" / "held_out_nll.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in logged] == [200, 400, 600]
    assert (tmp_path / "checkpoint" / "manifest.json").exists()
