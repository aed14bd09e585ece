"""The example in a real maze with small numbers: once as a user runs it, then in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("gymnasium_robotics")

SCRIPT = Path(__file__).parents[2] / "examples" / "skill_hierarchy.py"
SMALL = {
    "skill_steps": 200,
    "total_env_steps": 400,
    "n_envs": 2,
    "steps_per_batch": 100,
    "steps_per_checkpoint": 200,
    "symmetry_breaking_steps": 300,
    "duration": 25,
    "sac_updates_per_step": 0.1,
    "model_updates_per_action": 0.2,
    "n_models": 2,
    "hidden_size": 8,
    "horizon": 2,
    "n_samples": 24,
    "n_iterations": 1,
    "eval_episodes": 2,
}


@pytest.fixture
def example(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return pytest.importorskip("skill_hierarchy")


@pytest.mark.slow
def test_discovers_plans_and_goes_on(tmp_path, example, run_script, curve):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    done = run_script(SCRIPT.name, "--agent=hierarchy", *options, f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "PointMaze-U, hierarchy, seed 0, 400 steps" in done.stdout
    assert "of 2 new goals reached" in done.stdout
    folder = tmp_path / "hierarchy"
    before = curve(folder)
    assert [float(row["env_steps"]) for row in before] == [100, 200, 300, 400]
    assert all(row["skill_reward"] != "nan" for row in before)
    for picture in (folder / "skills.png", folder / "plans.png", tmp_path / "success.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG"

    more = SMALL | {"output": tmp_path, "total_env_steps": 500}
    with pytest.raises(SystemExit, match="add --resume"):
        example.main(example.Config(**more))
    with pytest.raises(SystemExit, match=r"was made with \{'hidden_size': 8\}"):
        example.main(example.Config(**more | {"hidden_size": 9, "resume": True}))
    example.main(example.Config(**more, resume=True))
    assert curve(folder)[:4] == before
    assert [float(row["env_steps"]) for row in curve(folder)[4:]] == [500]


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["planner", "sac"])
def test_flat_agents(agent, tmp_path, example, curve, capsys):
    options = SMALL | {"total_env_steps": 200, "output": tmp_path}
    example.main(example.Config(agent=example.Agent(agent), **options))
    assert f"PointMaze-U, {agent}, seed 0, 200 steps" in capsys.readouterr().out
    rows = curve(tmp_path / agent)
    assert all(row["skill_reward"] == "nan" for row in rows)
    assert (rows[-1]["nll"] == "nan") == (agent == "sac")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "Reacher-v5"}, "choose a point maze"),
        ({"task": "PointMaze"}, "no task is called 'PointMaze'"),
        ({"resume": True}, "has no checkpoint"),
    ],
)
def test_bad_options_say_what_to_do(options, message, tmp_path, example):
    with pytest.raises(SystemExit, match=message):
        example.main(example.Config(**SMALL, **options, output=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
