"""What benchmarks make of runs that are cut off, have just begun, or came from elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from layeredrl_torchrl import SafeCheckpoint, SafeRotation, get_task, make_batched

ROOT = Path(__file__).parents[2]

EXAMPLE = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
try:
    (folder / "ready").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    (folder / "saved").touch()
"""
BENCHMARK = """
import pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from control import learn
folder = pathlib.Path(sys.argv[1])
learn(folder / "example.py", [str(folder)], folder)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal to a group of processes")
def test_ctrl_c_lets_the_example_save(tmp_path):
    (tmp_path / "example.py").write_text(EXAMPLE)
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    command = [sys.executable, "-c", BENCHMARK, str(tmp_path)]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": path}, start_new_session=True
    )
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) != 0
    assert (tmp_path / "saved").exists()


def test_an_example_that_fails_or_has_ended(benchmark, tmp_path):
    learn = benchmark("control").learn
    (tmp_path / "example.py").write_text("import sys; sys.exit(len(sys.argv))")
    for resumed, status in ((False, 2), (True, 3)):
        if resumed:
            (tmp_path / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        with pytest.raises(SystemExit) as end:
            learn(tmp_path / "example.py", ["word"], tmp_path)
        assert end.value.code == status
    (tmp_path / "evaluation.csv").touch()
    learn(tmp_path / "example.py", ["word"], tmp_path)


def test_a_run_that_has_just_begun_has_no_curve_yet(benchmark, tmp_path):
    module = benchmark("control")
    config = module.Config(task=("InvertedPendulum-v5",), output=tmp_path)
    folder = config.output / "InvertedPendulum-v5-0"
    folder.mkdir(parents=True)
    (folder / "curve.csv").touch()
    with pytest.raises(SystemExit, match="holds no runs"):
        module.picture(config)


def test_runs_of_other_machines_are_drawn_on_the_cpu(benchmark, tmp_path):
    module = benchmark("pictures")
    options = benchmark("dyna_sac").Config(device="cuda:7", seed=3, output=tmp_path / "there")
    (tmp_path / "settings.json").write_text(json.dumps(options.settings()))
    example, found = module.example_of(tmp_path)
    assert example.__name__ == "dyna_sac"
    assert (found.device, found.seed, found.output) == ("cpu", 3, tmp_path / "there")


def test_a_run_of_another_task_has_no_arm(benchmark, tmp_path):
    options = benchmark("skill_hierarchy").Config(task="PointMaze-U")
    (tmp_path / "settings.json").write_text(json.dumps(options.settings()))
    with pytest.raises(SystemExit, match="a run on PointMaze-U, expected one on Reacher-Tip"):
        benchmark("reacher").restored(tmp_path)


@pytest.mark.slow
def test_a_run_that_was_moved_is_drawn_where_it_is(run, benchmark, tmp_path):
    pytest.importorskip("gymnasium_robotics")
    run("hindsight", f"--output={tmp_path / 'there'}")
    shutil.move(tmp_path / "there", tmp_path / "here")
    module = benchmark("pictures")
    module.main(module.Config(folders=(tmp_path / "here" / "her",)))
    assert (tmp_path / "here" / "success.png").exists()
    drawn = {path.name for path in (tmp_path / "here" / "her").glob("*.png")}
    assert drawn == {"learning_curve.png", "plans.png"}


def test_without_a_discount_values_are_known_of_episodes_that_terminate(benchmark):
    module, example = benchmark("policy_limits"), benchmark("value_gradients")
    task = get_task("InvertedPendulum-v5")
    env = make_batched(task, 1, seed=0)
    config = example.Config(task=task.name, hidden_size=8, model_size=8)
    agent = example.Agent(config, task, env, 80)
    episode = env.rollout(500, break_when_any_done=True)[0]
    assert episode["next", "terminated"][-1]
    said, came = module.values(agent, episode, 1.0)
    assert said.shape == came.shape == (len(episode),)
    assert came[0] == episode["next", "reward"].sum()
    said, came = module.values(agent, episode[:-1], 1.0)
    assert said.shape == came.shape == (0,)


@pytest.mark.parametrize(
    ("name", "late", "steps", "expected"),
    [
        ("InvertedPendulum-v5", 0.9, 21, 0.9),
        ("InvertedPendulum-v5", 0.9, 20, 0.8),
        ("InvertedPendulum-v5", None, 21, 0.8),
        ("Hopper-v5", None, 21, 0.995),
        ("Hopper-v5", 0.9, 21, 0.9),
    ],
)
def test_the_discount_of_a_run_is_the_one_it_ended_with(
    name, late, steps, expected, benchmark, tmp_path
):
    """Of 80 steps, the first quarter have the lower discount; some tasks have a higher one then."""
    options = {"gamma": 0.8, "late_gamma": late, "hidden_size": 8, "model_size": 8}
    config = benchmark("value_gradients").Config(task=name, **options)
    task = get_task(name)
    agent = benchmark("value_gradients").Agent(config, task, make_batched(task, 1, seed=0), 80)
    saved = {"steps": steps, "updates": steps, "random_steps": 0}
    rotation = SafeRotation(tmp_path / "checkpoints", keep_last=2)
    rotation.save(SafeCheckpoint(counts=saved), step=steps)
    benchmark("pictures").restore(tmp_path, counts=agent.counts)
    assert benchmark("pictures").discount_of(agent, config) == expected


@pytest.mark.slow
def test_what_is_there_is_not_learned_again(run_script, tmp_path):
    jobs = ("reach", "in_order", "stay_away", "follow")
    for agent in ("skills", "forces", "forces_ways", "sac"):
        for i, job in enumerate(jobs):
            folder = tmp_path / "0" / agent / (job if agent == "sac" else "")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"evaluation_{job}.csv").write_text(f"return\n{i}.5\n")
    done = run_script("benchmarks/many_tasks.py", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ", 1)[1] for line in done.stdout.splitlines()[2:]]
    assert rows == ["0.5 | 1.5 | 2.5 | 3.5 |"] * 4
