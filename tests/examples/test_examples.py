"""Every example with real MuJoCo and small numbers: what it leaves, and what it refuses."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest
import torch

from layeredrl_torchrl.runs import RunError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
NAMES = [path.stem for path in EXAMPLES]
BENCHMARKS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))
SCRIPTS = [path for path in (*EXAMPLES, *BENCHMARKS) if "class Config" in path.read_text()]
RUNS = [name for name in NAMES if name != "offline"]  # which takes no real steps to go on from
OF_A_TASK = [name for name in RUNS if name != "many_tasks"]
LEARNS = [name for name in OF_A_TASK if name not in ("hindsight", "train_with_trainer")]
WITH_RANDOM = [name for name in LEARNS if name != "skill_hierarchy"]
MAZES = ("hindsight", "many_tasks", "skill_hierarchy")


@pytest.mark.parametrize("path", EXAMPLES, ids=NAMES)
def test_an_example_is_short_and_imports_no_other(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 200
    assert not [name for name in NAMES if f"import {name}" in text or f"from {name}" in text]


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNS)
def test_an_example_leaves_a_curve_and_a_resumed_one_goes_on(name, run, curve, capsys, tmp_path):
    if name == "skill_hierarchy":
        pytest.importorskip("gymnasium_robotics")
    folder = tmp_path / "hierarchy" if name == "skill_hierarchy" else tmp_path
    run(name, f"--output={tmp_path}")
    rows = curve(folder)
    every = 100 if name == "skill_hierarchy" else 20
    assert [row["env_steps"] for row in rows] == [every * (i + 1) for i in range(len(rows))]
    total = int(rows[-1]["env_steps"])
    # Models are learned when the random phase ends.
    learned = [not math.isnan(row["nll"]) for row in rows]
    assert learned == sorted(learned)
    assert learned[-1]
    assert not learned[0]
    evaluated = [not math.isnan(row["evaluation"]) for row in rows]
    assert evaluated == [row["env_steps"] == 3 * every for row in rows]
    assert f"{total} steps" in capsys.readouterr().out
    assert len((folder / "evaluation.csv").read_text().splitlines()) == 3
    assert len(list((folder / "checkpoints").iterdir())) == 2

    with pytest.raises(RunError, match="add --resume"):
        run(name, f"--output={tmp_path}")
    with pytest.raises(RunError, match=r"was made with \{'hidden_size': 8\}"):
        run(name, f"--output={tmp_path}", "--resume", "--hidden-size=9")
    run(name, f"--output={tmp_path}", "--resume", f"--total-env-steps={total + every}")
    assert str(curve(folder)[:-1]) == str(rows)  # there are NaNs in it
    assert curve(folder)[-1]["env_steps"] == total + every
    assert not math.isnan(curve(folder)[-1]["nll"])  # no second random phase


@pytest.mark.slow
@pytest.mark.usefixtures("renders")
@pytest.mark.parametrize("name", [name for name in LEARNS if name != "skill_hierarchy"])
def test_an_example_logs_to_tensorboard_and_records_a_video(name, run, tmp_path):
    """Not of the maze, whose episodes have 300 steps."""
    pytest.importorskip("tensorboard")
    run(name, f"--output={tmp_path}", "--logger=tensorboard", "--video")
    assert (tmp_path / "video.gif").exists()
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_stored_data_are_learned_from(run, capsys, tmp_path):
    run("offline", f"--output={tmp_path}")
    rows = [line.rsplit(",", 1) for line in (tmp_path / "results.csv").read_text().splitlines()]
    assert [name for name, _ in rows[1:]] == ["data", "cloned", "planned", "imagined SAC"]
    assert all(-100 < float(value) < 0 for _, value in rows[1:])


def test_stored_data_of_no_whole_episode_are_refused(run, tmp_path):
    """Their mean return would be that of nothing."""
    with pytest.raises(RunError, match="--n-transitions is 490, ten episodes have 500"):
        run("offline", "--n-transitions=490", f"--output={tmp_path}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs_on_a_gpu_and_goes_on_on_the_cpu(name, run, capsys, tmp_path):
    """With the environments on the CPU; what was saved there goes on here."""
    if name in MAZES:
        pytest.importorskip("gymnasium_robotics")
    run(name, "--device=cuda", f"--output={tmp_path}")
    more = {"many_tasks": 800, "train_with_trainer": 800} | dict.fromkeys(MAZES[::2], 500)
    more = more.get(name, 180)
    run(name, "--device=cpu", f"--output={tmp_path}", "--resume", f"--total-env-steps={more}")


@pytest.mark.slow
def test_a_resumed_trainer_goes_on_as_if_it_had_not_been_stopped(run, curve, tmp_path):
    small = ("--steps-per-batch=40", "--updates-per-batch=2", "--held-out-steps=20")
    small += ("--hidden-size=8", "--n-models=2")
    for name, total in (("resumed", 80), ("at_once", 160)):
        run(
            "train_with_trainer",
            *small,
            f"--output={tmp_path / name}",
            f"--total-env-steps={total}",
        )
    again = ("train_with_trainer", *small, f"--output={tmp_path / 'resumed'}", "--resume")
    run(*again, "--total-env-steps=160")
    rows = [
        [{**row, "seconds": 0.0} for row in curve(tmp_path / name)]
        for name in ("resumed", "at_once")
    ]
    assert len(rows[0]) == 5
    assert rows[0] == rows[1]
    with pytest.raises(RunError, match=r"was made with \{'n_models': 2\}"):
        run(*again, "--n-models=3")


@pytest.mark.slow
def test_the_trainer_learns_to_predict(run, capsys, tmp_path):
    run("train_with_trainer", f"--output={tmp_path}")
    lines = capsys.readouterr().out.splitlines()
    found = [line.split() for line in lines if line.startswith("held_out")]
    nll, reward = ([float(line[1]), float(line[3])] for line in found)
    assert nll[1] < nll[0] - 2.0  # nats per dimension
    assert reward[1] < 0.5 * reward[0]


@pytest.mark.slow
def test_a_planner_without_skills_learns_in_the_maze(run, flat, curve, capsys, tmp_path):
    pytest.importorskip("gymnasium_robotics")
    run("skill_hierarchy", *flat, "--total-env-steps=200", f"--output={tmp_path}")
    assert "success rate" in capsys.readouterr().out
    rows = curve(tmp_path / "planner")
    assert all(math.isnan(row["skill_reward"]) for row in rows)
    assert not math.isnan(rows[-1]["nll"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder"), [("skill_hierarchy", "hierarchy"), ("hindsight", "her")]
)
def test_an_arm_is_a_task_with_goals_as_well_as_a_maze(name, folder, run, curve, capsys, tmp_path):
    """The same code as for mazes, without gymnasium-robotics."""
    options = ["--landmarks=0.03"] if name == "skill_hierarchy" else []
    run(name, "--task=Reacher-Tip", *options, f"--output={tmp_path}")
    assert "success rate" in capsys.readouterr().out
    rows = curve(tmp_path / folder)
    assert any(row["success"] >= 0.0 for row in rows)
    learned = "skill_reward" if name == "skill_hierarchy" else "loss_qvalue"
    assert not math.isnan(rows[-1][learned])


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["hierarchy", "planner"])
def test_landmarks_are_saved_with_the_run(agent, flat, example, run, curve, tmp_path):
    pytest.importorskip("gymnasium_robotics")
    options = ("--landmarks=0.3", "--task=PointMaze-U-Sparse")
    explores = ("--random-prob=0.1", "--symmetry-breaking-steps=100")
    options += flat if agent == "planner" else explores
    run("skill_hierarchy", *options, f"--output={tmp_path}/whole")
    run("skill_hierarchy", *options, f"--output={tmp_path}/parts", "--total-env-steps=200")
    run("skill_hierarchy", *options, f"--output={tmp_path}/parts", "--resume")
    whole, parts = (curve(tmp_path / name / agent) for name in ("whole", "parts"))
    for row in (*whole, *parts):
        del row["seconds"]
    assert str(whole) == str(parts)  # there are NaNs in it


def test_new_places_are_planned_for_once_there_are_skills_and_until_there_is_a_task(example):
    pytest.importorskip("gymnasium_robotics")
    module = example("skill_hierarchy")
    config = module.Config(landmarks=0.3, random_prob=0.1, hidden_size=8, n_models=2)
    task = module.runs.find_task("PointMaze-U-Sparse", with_goals=True)
    agent = module.make_agent(config, task, module.make_env(task, 2, 0))
    planner, skills = agent.levels
    known, ways = planner.predictor, planner.landmarks
    at_goal = torch.zeros(1, 4), torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 4)
    for steps, prob, value, paid in (
        (0, 1.0, ways.value, 1.0),
        (14_999, 1.0, ways.value, 1.0),
        (15_000, 0.1, ways.novelty, 0.0),
        (29_999, 0.1, ways.novelty, 0.0),
        (30_000, 0.0, ways.value, 1.0),
    ):
        module.set_phase(config, task, agent, steps)
        assert planner.random_prob == prob
        assert known.val_func == value
        assert known.reward_of(*at_goal) == paid
        assert (skills.updates_per_step > 0) == (steps < 30_000)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.8])
def test_an_agent_that_learns_in_hindsight_is_resumed_with_all_it_stored(
    share, run, curve, capsys, tmp_path
):
    """What is stored for relabelling, and which goals are drawn, is resumed with all else."""
    pytest.importorskip("gymnasium_robotics")
    agent, share = "her" if share else "sac", f"--hindsight-share={share}"
    run("hindsight", share, f"--output={tmp_path}/whole")
    assert "success rate" in capsys.readouterr().out
    run("hindsight", share, f"--output={tmp_path}/parts", "--total-env-steps=200")
    run("hindsight", share, f"--output={tmp_path}/parts", "--total-env-steps=400", "--resume")
    whole, parts = (curve(tmp_path / name / agent) for name in ("whole", "parts"))
    for row in (*whole, *parts):
        del row["seconds"]
    assert str(whole) == str(parts)  # there are NaNs in it
    assert not math.isnan(whole[-1]["loss_qvalue"])
    evaluated = [not math.isnan(row["evaluation_success"]) for row in whole]
    assert evaluated == [False, False, True, False]


@pytest.mark.slow
def test_jobs_are_done_after_one_phase_without_a_reward(run, curve, capsys, tmp_path):
    pytest.importorskip("gymnasium_robotics")
    run("many_tasks", f"--output={tmp_path}")
    said = [line for line in capsys.readouterr().out.splitlines() if "mean return" in line]
    names = ["reach", "in_order", "stay_away", "follow"]
    assert [name in line for name, line in zip(names, said, strict=True)] == [True] * 4
    returns = [path.read_text() for path in sorted(tmp_path.glob("evaluation_*.csv"))]
    assert not math.isnan(curve(tmp_path)[-1]["nll"])
    # All has been learned before: the jobs can be done again, and take no more steps.
    run("many_tasks", f"--output={tmp_path}", "--resume")
    assert len(curve(tmp_path)) == 3
    assert len(returns) == len(list(tmp_path.glob("evaluation_*.csv"))) == 4


def test_a_job_pays_and_shows_what_it_says(example):
    pytest.importorskip("gymnasium_robotics")
    module = example("many_tasks")
    for name, job in module.JOBS.items():
        env = module.make_env(job, 3, seed=0)
        data = env.rollout(60, break_when_any_done=False)
        now, after = data["observation"], data["next", "observation"]
        target, stage = now[..., 4:6], now[..., 6]
        assert torch.equal(target[:, 0], job.places[:1].expand(3, 2))
        away = (after[..., :2] - target).norm(dim=-1)
        paid = torch.exp(-away)
        if name == "in_order":
            paid = (paid + stage) / 4
        if name == "stay_away":
            paid = paid - 10.0 * ((after[..., :2] - module.DOOR).norm(dim=-1) < 0.7)
        torch.testing.assert_close(data["next", "reward"].squeeze(-1), paid)
        gone = after[..., 6] - stage
        if name == "follow":
            torch.testing.assert_close(gone, torch.full_like(gone, 0.004))
            torch.testing.assert_close((after[..., 4:6] - target).norm(dim=-1), 4.0 * gone)
        else:
            n = len(job.places)
            assert torch.equal(gone, ((away <= 0.45) & (stage < n)).float())
            assert torch.equal(after[..., 4:6], job.places[after[..., 6].long().clamp(max=n - 1)])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *((name, "--task=Pendulum", "no task is called 'Pendulum'") for name in OF_A_TASK),
        *((name, "--eval-episodes=0", "--eval-episodes must be") for name in RUNS),
        *((name, "--steps-per-batch=0", "--steps-per-batch must be") for name in RUNS),
        *((name, "--resume", "holds no run") for name in RUNS),
        *((name, "--horizon=0", "--horizon must be") for name in LEARNS),
        *((name, "--random-steps=500", "--random-steps is 500 of 80") for name in WITH_RANDOM),
        *((name, "--random-steps=80", "or more --total-env-steps") for name in WITH_RANDOM),
        *((name, "--steps-per-evaluation=-1", "--steps-per-evaluation must") for name in RUNS),
        *((name, "--gamma=0", "--gamma must be") for name in LEARNS if name != "dyna_sac"),
        ("train_with_trainer", "--steps-per-evaluation=9", "evaluation 9 has no effect"),
        ("train_with_trainer", "--n-envs=2", "--n-envs 2 has no effect"),
        ("many_tasks", "--task=Reacher-v5", "--task Reacher-v5 has no effect"),
        ("many_tasks", "--video", "--video True has no effect"),
        ("train_with_trainer", "--n-steps=500", "--n-steps is 500, expected fewer than"),
        ("dyna_sac", "--imagined-share=1.5", "--imagined-share must be"),
        ("dyna_sac", "--imagined-share=0", "--horizon 3 has no effect with --imagined-share 0"),
        ("learn_to_control", "--random-duration=5", "--random-duration 5 has no effect"),
        ("skill_hierarchy", "--random-prob=0.5", "--random-prob 0.5 has no effect"),
        ("skill_hierarchy", "--agent=planner", "--duration 25 has no effect"),
        ("skill_hierarchy", "--duration=999", "--duration is 999, episodes have 300 steps"),
        ("skill_hierarchy", "--landmarks=-1", "--landmarks must be"),
        ("hindsight", "--hindsight-share=1.5", "--hindsight-share must be"),
        *((name, "--task=Reacher-v5", "choose a point maze") for name in MAZES[::2]),
    ],
)
def test_bad_options_end_it_before_anything_is_done(name, options, message, run, tmp_path):
    with pytest.raises(RunError, match=message) as said:
        run(name, options, f"--output={tmp_path / 'run'}")
    assert "\n" not in str(said.value)
    assert not (tmp_path / "run").exists()


def test_options_that_exclude_each_other_are_refused(run, tmp_path):
    with pytest.raises(RunError, match="--gamma is 1, expected less with --landmarks"):
        run("skill_hierarchy", "--gamma=1", "--landmarks=0.3", f"--output={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_number_among_the_options_of_a_script_has_a_range(path):
    """The fields of its Config, read as text, since not every machine has what it imports."""
    (config,) = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name == "Config"
    ]
    found = [ast.unparse(node) for node in config.body if isinstance(node, ast.AnnAssign)]
    assert found
    assert not [field for field in found if re.search(r"\b(int|float)\b", field)]


@pytest.mark.slow
def test_a_user_sees_one_line(run_script, tmp_path):
    done = run_script("examples/learn_to_control.py", "--n-envs=0", f"--output={tmp_path}/run")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("--n-envs must be")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["note.txt", "dyna_sac/curve.csv", ".hidden/file", "dyna_sac/0.d"])
def test_a_benchmark_empties_no_folder_of_others(name, run_script, tmp_path):
    """Nor its own for an example that there is not."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    example = "nope" if name.endswith("0.d") else "dyna_sac"
    words = ("--kills=1", f"--output={tmp_path}", "--examples", example)
    done = run_script("benchmarks/kill_and_resume.py", *words)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("--examples: 'nope'" if example == "nope" else "--output would be")
    assert file.exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("pictures.py nowhere", "nowhere holds no run"),
        ("pictures.py --if-any nowhere", ""),
        ("mazes.py --agents nope", "--agents: 'nope' is none of hierarchy, "),
        ("mazes.py --no-run --output=nowhere", "nowhere holds no complete runs; leave --no-run"),
        ("model_quality.py --task=CartPole-v1", "--task: CartPole-v1 has actions Discrete(2)"),
        ("predictor_quality.py --task=FrozenLake-v1", "--task: FrozenLake-v1 has observations"),
    ],
)
def test_what_a_benchmark_cannot_use_is_one_line(words, line, run_script):
    script, *options = words.split()
    done = run_script(f"benchmarks/{script}", *options)
    assert done.returncode == (1 if line else 0)
    assert done.stderr.count("\n") == bool(line)
    assert done.stderr.startswith(line)


@pytest.mark.slow
def test_killed_runs_go_on_bit_for_bit(run_script, tmp_path):
    """A short version of the benchmark, of one example that plans and one that imagines."""
    options = ("--kills=2", "--examples", "learn_to_control", "dyna_sac")
    done = run_script("benchmarks/kill_and_resume.py", *options, f"--output={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line[-5:] for line in done.stdout.splitlines()[-2:]] == ["| 2 |"] * 2
