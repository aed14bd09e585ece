"""Options: each number has a range, which is looked at before anything is done."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path

import pytest
import torch
from gymnasium.error import UnregisteredEnv

from layeredrl_torchrl.runs import (
    Count,
    Natural,
    NotNegative,
    Number,
    Positive,
    PositiveShare,
    Run,
    RunError,
    RunOptions,
    Seed,
    Share,
    WorkerOptions,
    command,
    find_task,
)


@dataclass
class Options(RunOptions):
    """One of each kind."""

    count: Count = 1
    natural: Natural | None = None
    positive: Positive = 1.0
    share: Share = 0.5
    positive_share: PositiveShare = 0.5
    number: Number = 0.0
    not_negative: NotNegative = 0.0
    flag: bool = True
    counts: tuple[Count, ...] = (4, 4)


class Kind(Enum):
    """An option with names."""

    PLAIN = "plain"
    FANCY = "fancy"


@dataclass
class Structured(RunOptions):
    """Options that JSON gives back in another type."""

    sizes: tuple[Count, ...] = (8, 8)
    pair: tuple[Path, float] = (Path("a"), 1.0)
    paths: list[Path] = field(default_factory=list)
    data: Path | None = None
    more: tuple[int, ...] | None = None
    kind: Kind = Kind.PLAIN
    unknown: float = math.nan


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("count", [1, 10**9], [0, -1, math.nan, 2.0]),
        ("natural", [None, 0, 3], [-1]),
        ("positive", [1e-300, 5], [0.0, -1e-9, math.inf, math.nan]),
        ("share", [0.0, 1.0], [-0.1, 1.1, math.nan]),
        ("positive_share", [1e-300, 1.0], [0.0, -0.1, 1.1, math.nan]),
        ("number", [-1e300, 0], [math.inf, -math.inf, math.nan]),
        ("eval_episodes", [1], [0]),
        ("steps_per_batch", [1], [0]),
        ("threads", [1], [0]),
        ("seed", [0, 2**32 - 1], [-1, 2**32, 1.5]),
        ("counts", [(), (1, 2), [3]], [(1, 0), [0], (2.0,)]),
        ("not_negative", [0.0, 0.1], [-0.1, math.nan]),
        ("device", ["cpu"], ["gpu", "cuda:77", "meta", ""]),
    ],
)
def test_an_option_out_of_its_range_is_named(name, good, bad):
    for value in good:
        Options(**{name: value}).check()
    for value in bad:
        with pytest.raises(RunError, match=f"^--{name.replace('_', '-')}") as said:
            Options(**{name: value}).check()
        assert "\n" not in str(said.value)


def test_options_that_do_not_fit_one_another_are_named():
    with pytest.raises(RunError, match="multiple of the 3 environments"):
        Options(n_envs=3, steps_per_batch=20).check()
    for options, message in (
        ({"episodes_per_evaluation": 9}, "--episodes-per-evaluation 9 has no effect without"),
        ({"ray_address": "head:6379"}, "no effect without workers"),
        ({"n_workers": 3, "n_envs": 2, "steps_per_batch": 20}, "multiple of the 6 environments"),
    ):
        with pytest.raises(RunError, match=message):
            WorkerOptions(**options).check()
    with pytest.raises(RunError, match="--task: no task is called 'Pendulum'"):
        find_task("Pendulum")


def test_a_resumed_run_takes_its_options_from_the_folder(tmp_path, monkeypatch, capsys):
    """As a user types them: what is given goes before what was saved."""
    pytest.importorskip("tyro")
    given = []

    def main(options):
        given.append(options)
        options.check()

    saved = Options(output=tmp_path, seed=4, natural=7, flag=False).settings()
    (tmp_path / "settings.json").write_text(json.dumps(saved | {"resume": False}))

    def call(*words):
        monkeypatch.setattr("sys.argv", ["run", *words])
        command(main, Options, "A run.")
        return given[-1]

    assert call() == Options()
    found = call("--resume", "--output", str(tmp_path), "--count", "3")
    assert (found.seed, found.natural, found.flag, found.count) == (4, 7, False, 3)
    assert found.resume
    assert found.output == Path(tmp_path)
    assert {f.name for f in fields(found)} == saved.keys()
    with pytest.raises(SystemExit) as end:
        call("--share", "2")
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("--share must be")


def test_a_run_that_goes_on_for_longer_is_known_to(tmp_path, monkeypatch):
    """Cut off and resumed again, it would end where it first was to end."""
    pytest.importorskip("tyro")
    options = Options(output=tmp_path, total_env_steps=40)
    for changes in ({}, {"resume": True, "total_env_steps": 60}):
        options = replace(options, **changes)
        with Run(options, options.total_env_steps) as run:
            run.save()
    given: list[Options] = []
    monkeypatch.setattr("sys.argv", ["run", "--resume", "--output", str(tmp_path)])
    command(given.append, Options, "A run.")
    assert given == [options]


CHANGES = {
    "sizes": (3, 4, 5),
    "pair": (Path("b"), 2.0),
    "paths": [Path("x")],
    "data": Path("there"),
    "more": (1,),
    "kind": Kind.FANCY,
    "unknown": 2.0,
}


@pytest.mark.parametrize("changed", [None, *CHANGES])
def test_options_of_any_type_can_be_resumed(changed, tmp_path):
    changes = CHANGES if changed is None else {changed: CHANGES[changed]}
    for resume in (False, True):
        with Run(Structured(output=tmp_path, resume=resume, **changes), 40) as run:
            run.save()
    assert run.resumed is not None
    with (
        pytest.raises(RunError, match="was made with"),
        Run(Structured(output=tmp_path, resume=True), 40),
    ):
        pass


def test_a_command_restores_the_types_of_options(tmp_path, monkeypatch):
    pytest.importorskip("tyro")
    given = []
    saved = Structured(output=tmp_path, **CHANGES)
    (tmp_path / "settings.json").write_text(json.dumps(saved.settings()))
    words = ["run", "--resume", "--output", str(tmp_path), "--unknown", "3.0"]
    monkeypatch.setattr("sys.argv", words)
    command(given.append, Structured, "A run.")
    assert given == [replace(saved, resume=True, unknown=3.0)]


OF_ANOTHER_TYPE = {
    "task": [3, None],
    "count": [[8, 8], [], None, "8", True],
    "counts": [[4, "4"]],
    "flag": ["no", 0, None],
    "device": [None],
    "seed": [None],
}


@pytest.mark.filterwarnings("ignore")  # tyro's, of the default
@pytest.mark.parametrize("name", OF_ANOTHER_TYPE)
def test_saved_options_of_another_type_are_named(name, tmp_path, monkeypatch, capsys):
    """As an older version of a script may have saved them."""
    pytest.importorskip("tyro")
    monkeypatch.setattr("sys.argv", ["run", "--resume", "--output", str(tmp_path)])
    saved, given = Options(output=tmp_path).settings(), []
    for value in OF_ANOTHER_TYPE[name]:
        (tmp_path / "settings.json").write_text(json.dumps(saved | {name: value}))
        with pytest.raises(SystemExit) as end:
            command(given.append, Options, "A run.")
        assert end.value.code == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"--{name} must be")
        assert not given


def test_options_that_cannot_be_saved_are_named_before_anything_is_written(tmp_path):
    @dataclass
    class Odd(RunOptions):
        dtype: torch.dtype = torch.float32

    with (
        pytest.raises(TypeError, match=r"the option dtype is torch.float32, but the settings"),
        Run(Odd(output=tmp_path / "run"), 40),
    ):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt("go on"), 130, "go on"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (UnregisteredEnv("no Walker"), 1, "--task: no Walker"),
        (ModuleNotFoundError(name="matplotlib.pyplot"), 1, 'pip install -e ".[plots]"'),
        (ImportError("mazes need it", name="gymnasium_robotics"), 1, "mazes need it"),
        (PermissionError(13, "Permission denied", "/there"), 1, "--output /there/it cannot be"),
        (OSError(28, "No space left", "/there/it/curve.csv"), 1, "No space left (/there/it/curve"),
        (OSError(28, "No space left"), None, ""),
        (ValueError("natural must be at least 2, got 1"), 1, "--natural: natural must be at least"),
        (ValueError("another must be at least 2, got 1"), None, ""),
        (ValueError("level 0 (A) above B: natural must be 2, got 1"), 1, "--natural: level 0 (A)"),
        (ValueError("ratio=0.1 of natural=1 makes 0"), 1, "--natural: ratio=0.1 of"),
        (ValueError("ratio=0.1 of natural=12 makes 0"), None, ""),
        (ValueError("what is natural must be natural=77"), None, ""),
        (ModuleNotFoundError(name="something"), None, ""),
        (FileNotFoundError(2, "No such file", "/elsewhere"), None, ""),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, status, line, monkeypatch, capsys):
    pytest.importorskip("tyro")
    monkeypatch.setattr("sys.argv", ["run", "--output=/there/it", "--natural=1"])

    def main(options):
        raise error

    with pytest.raises(SystemExit if status else type(error)) as end:
        command(main, Options, "A run.")
    if status:
        assert end.value.code == status
        (said,) = capsys.readouterr().err.splitlines()
        assert line in said


def test_a_command_that_needs_an_extra_ends_before_anything_is_done(monkeypatch, capsys):
    pytest.importorskip("tyro")
    monkeypatch.setattr("sys.argv", ["run"])
    monkeypatch.setitem(sys.modules, "wandb", None)  # as Python marks what cannot be imported
    given = []
    with pytest.raises(SystemExit):
        command(given.append, Options, "A run.", needs=("json", "wandb"))
    assert 'pip install -e ".[wandb]"' in capsys.readouterr().err
    assert not given
    command(given.append, Options, "A run.", needs=("json",))
    assert given == [Options()]


def test_a_folder_without_a_run_has_no_options(tmp_path, monkeypatch):
    """The run itself says that there is nothing to go on from."""
    pytest.importorskip("tyro")
    monkeypatch.setattr("sys.argv", ["run", "--resume", "--output", str(tmp_path), "--seed", "3"])
    given = []
    command(given.append, Options, "A run.")
    assert given == [Options(output=tmp_path, resume=True, seed=3)]


def test_a_task_without_goals_is_refused_where_goals_are_needed():
    assert find_task("Reacher-Tip", with_goals=True).reports_success
    assert find_task("Reacher-v5").name == "Reacher-v5"
    with pytest.raises(RunError, match="--task: Reacher-v5 has no goals to reach"):
        find_task("Reacher-v5", with_goals=True)


def test_any_dataclass_can_be_the_options_of_a_command(monkeypatch, capsys):
    """Any dataclass can be the options."""

    @dataclass
    class Plain:
        count: Count = 1
        seeds: tuple[Seed, ...] = (0,)

    pytest.importorskip("tyro")
    monkeypatch.setattr("sys.argv", ["script", "--count", "3"])
    given = []
    command(given.append, Plain, "A script.")
    assert given == [Plain(3)]
    monkeypatch.setattr("sys.argv", ["script", "--count", "0"])
    with pytest.raises(SystemExit):
        command(given.append, Plain, "A script.")
    assert capsys.readouterr().err.startswith("--count must be")
    monkeypatch.setattr("sys.argv", ["script", "--seeds", "3", "-1"])
    with pytest.raises(SystemExit):
        command(given.append, Plain, "A script.")
    assert capsys.readouterr().err.startswith("--seeds must be")
    assert len(given) == 1
