"""The examples with small numbers, in this process or as a user runs them."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parents[2]
PENDULUM = (
    "--task=InvertedPendulum-v5 --total-env-steps=80 --random-steps=40 --n-envs=2 "
    "--steps-per-batch=20 --steps-per-checkpoint=40 --eval-episodes=2 --hidden-size=8 "
    "--steps-per-evaluation=60 --episodes-per-evaluation=1 "
)
PLANS = "--n-models=2 --horizon=2 --n-samples=24 --n-iterations=1 "
SMALL = {
    "planning_with_model": PENDULUM + PLANS + "--updates-per-step=0.2",
    "learn_to_control": PENDULUM + PLANS + "--updates-per-step=0.2 --batch-size=16",
    "dyna_sac": PENDULUM + "--updates-per-step=0.2 --batch-size=16 --horizon=3",
    "value_gradients": PENDULUM + "--updates-per-step=0.2 --batch-size=16 --model-size=8 "
    "--n-episodes=4 --episode-steps=5 --horizon=2",
    "skill_hierarchy": PLANS + "--total-env-steps=400 --skill-steps=200 --n-envs=2 "
    "--steps-per-batch=100 --steps-per-checkpoint=200 --symmetry-breaking-steps=300 --duration=25 "
    "--sac-updates-per-step=0.1 --model-updates-per-action=0.2 --hidden-size=8 --eval-episodes=2 "
    "--steps-per-evaluation=300 --episodes-per-evaluation=1",
    "hindsight": "--task=PointMaze-Open-Sparse --total-env-steps=400 --n-envs=2 "
    "--steps-per-batch=100 --steps-per-checkpoint=200 --updates-per-step=0.1 --hidden-size=8 "
    "--eval-episodes=2 --steps-per-evaluation=300 --episodes-per-evaluation=1",
    "many_tasks": "--total-env-steps=600 --skill-steps=400 --n-envs=2 --steps-per-batch=200 "
    "--steps-per-checkpoint=200 --horizon=2 --eval-episodes=2",
    "offline": "--n-transitions=500 --n-updates=60 --eval-episodes=2 --hidden-size=16",
    "train_with_trainer": "--total-env-steps=600 --steps-per-batch=200 --steps-per-checkpoint=200 "
    "--held-out-steps=200 --updates-per-batch=80 --batch-size=64 --n-models=2 --hidden-size=32",
}

# What `skill_hierarchy` refuses without skills, as by default.
FLAT = ("--agent=planner", "--skill-steps=30000", "--symmetry-breaking-steps=15000")
FLAT += ("--duration=20", "--sac-updates-per-step=0.25")


@pytest.fixture
def flat():
    """The options of a planner over forces."""
    return FLAT


@pytest.fixture
def example(monkeypatch):
    """``example(name)``: an example as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


@pytest.fixture
def benchmark(example, monkeypatch):
    """``benchmark(name)``: a benchmark as a module, which may import examples."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "disable"))  # left as it is
    return example


@pytest.fixture
def run(example):
    """``run(name, *options)``: an example in this process, with small numbers."""

    def call(name: str, *options: str) -> None:
        module = example(name)
        module.main(tyro.cli(module.Config, args=(*SMALL[name].split(), *options)))

    return call


@pytest.fixture(scope="session")
def run_script():
    """``run_script(path, *options)``: a script of the checkout in a process of its own."""

    def call(path: str, *options: str) -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / path), *options]
        environment = os.environ | environment
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=280, check=False
        )

    return call


@pytest.fixture(scope="session")
def curve():
    """``curve(folder)``: the rows of the learning curve."""

    def read(folder: Path) -> list[dict[str, float]]:
        with (folder / "curve.csv").open() as file:
            return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]

    return read
