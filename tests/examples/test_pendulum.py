"""The scripts of "Add a model to your script": few lines are changed, and each of them runs."""

from __future__ import annotations

import difflib
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "pendulum"
PAGE = (ROOT / "docs" / "add_a_model.md").read_text()
WITH_MODEL = ("sac_with_model", "planner")


def lines_of(name):
    return (FOLDER / f"{name}.py").read_text().splitlines()


def changes(name):
    """Lines that are written, and lines that go."""
    lines = list(difflib.ndiff(lines_of("sac"), lines_of(name)))
    return [sum(line.startswith(sign) for line in lines) for sign in ("+ ", "- ")]


def test_few_lines_are_changed():
    written, removed = changes("sac_with_model")
    assert written + removed <= 25
    written, _ = changes("planner")  # actor, critic, loss and optimizer go
    assert written <= 25
    assert len(lines_of("sac")) <= 85


@pytest.mark.parametrize("name", WITH_MODEL)
def test_the_page_says_how_many_lines_are_changed(name):
    written, removed = changes(name)
    assert f"{written} lines more, {removed} fewer" in PAGE


def test_the_page_shows_the_difference():
    shown = re.findall(r"^```diff\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for name, text in zip(WITH_MODEL, shown, strict=True):
        found = difflib.unified_diff(lines_of("sac"), lines_of(name), n=0, lineterm="")
        found = ["" if line.startswith("@@") else line for line in list(found)[2:]]
        assert text.splitlines() == found[1:]


@pytest.mark.parametrize("name", ["sac", *WITH_MODEL])
@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--seed=-1", "--seed must be from 0"),
        ("--seed=4294967296", "--seed must be from 0"),
        ("--random-steps=-1", "no number below 0"),
        ("--updates-per-step=-1", "no number below 0"),
        ("--total-env-steps=0", "must be at least 1"),
        ("--steps-per-evaluation=0", "must be at least 1"),
        ("--steps-per-evaluation=120", "--steps-per-evaluation a multiple of 50"),
        ("--total-env-steps=many", "invalid int value"),
    ],
)
def test_what_an_option_cannot_be_is_one_line(name, option, line, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, option])
    with pytest.raises(SystemExit):
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert line in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sac", *WITH_MODEL])
def test_each_script_learns_from_the_steps_that_it_takes(name, monkeypatch, capsys):
    steps = ("--total-env-steps=100", "--random-steps=50", "--steps-per-evaluation=100")
    monkeypatch.setattr("sys.argv", [name, *steps, "--updates-per-step=1"])
    used = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert len(used["buffer"]) == 100
    said = re.search(r"^100 steps: return (-\d+)$", capsys.readouterr().out, re.MULTILINE)
    # Of the task itself, whose steps pay -16.3 at worst; a tenth of that is learned from.
    assert -3260 < float(said[1]) < -300
    stored = used["buffer"][:]
    assert -1.63 <= stored["next", "reward"].min() < -0.3
    if name == "sac_with_model":
        # Imagined steps start where real ones did, and lead elsewhere.
        imagined = used["imagined"][:]
        apart = (imagined["observation"][:50, None] - stored["observation"]).abs().sum(-1)
        assert (apart.min(-1).values == 0).all()
        first = imagined[:5000]  # of one policy
        assert len(first["observation"].unique(dim=0)) <= 50
        assert len(first["action"].unique()) > 1000  # drawn, not the mean
        assert (imagined["next", "observation"] != imagined["observation"]).any(-1).all()
    if name == "planner":
        assert used["level"].n_env_steps == 100
        assert not stored["random_action"][50:].any()
        assert stored["random_action"][:50].all()
