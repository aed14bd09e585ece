"""Options: each number has a range, which is looked at before anything is done."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from layeredrl_torchrl.runs import (
    Count,
    Natural,
    NotNegative,
    Number,
    Positive,
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
    number: Number = 0.0
    not_negative: NotNegative = 0.0
    flag: bool = True


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("count", [1, 10**9], [0, -1, math.nan]),
        ("natural", [None, 0, 3], [-1]),
        ("positive", [1e-300, 5], [0.0, -1e-9, math.inf, math.nan]),
        ("share", [0.0, 1.0], [-0.1, 1.1, math.nan]),
        ("number", [-1e300, 0], [math.inf, -math.inf, math.nan]),
        ("eval_episodes", [1], [0]),
        ("steps_per_batch", [1], [0]),
        ("threads", [1], [0]),
        ("seed", [0, 2**32 - 1], [-1, 2**32]),
        ("not_negative", [0.0, 0.1], [-0.1, math.nan]),
        ("device", ["cpu"], ["gpu", "cuda:77"]),
    ],
)
def test_ranges(name, good, bad):
    for value in good:
        Options(**{name: value}).check()
    for value in bad:
        with pytest.raises(RunError, match=f"^--{name.replace('_', '-')}") as said:
            Options(**{name: value}).check()
        assert "\n" not in str(said.value)


def test_options_that_depend_on_others():
    with pytest.raises(RunError, match="multiple of the 3 environments"):
        Options(n_envs=3, steps_per_batch=20).check()
    for options, message in (
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


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt("go on"), 130, "go on"),
        (ModuleNotFoundError(name="matplotlib.pyplot"), 1, "pip install -e '.[plots]'"),
        (ImportError("mazes need it", name="gymnasium_robotics"), 1, "mazes need it"),
        (PermissionError(13, "Permission denied", "/there"), 1, "--output /there/it cannot be"),
        (ValueError("natural must be at least 2, got 1"), 1, "--natural: natural must be at least"),
        (ValueError("another must be at least 2, got 1"), None, ""),
        (ModuleNotFoundError(name="something"), None, ""),
        (FileNotFoundError(2, "No such file", "/elsewhere"), None, ""),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, status, line, monkeypatch, capsys):
    pytest.importorskip("tyro")
    monkeypatch.setattr("sys.argv", ["run", "--output=/there/it"])

    def main(options):
        raise error

    with pytest.raises(SystemExit if status else type(error)) as end:
        command(main, Options, "A run.")
    if status:
        assert end.value.code == status
        (said,) = capsys.readouterr().err.splitlines()
        assert line in said


def test_a_command_without_a_run(monkeypatch, capsys):
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
