"""The learning curve in TorchRL's loggers, beside the one in `curve.csv`."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from layeredrl_torchrl.runs import Run, RunError, RunOptions


class StopError(Exception):
    """As a kill."""


def log(folder, kind, steps, stop_at=0, **options):
    """A run that logs a square and a NaN, a checkpoint every 20 steps."""
    config = RunOptions(output=folder, logger=kind, steps_per_checkpoint=20, **options)
    with Run(config, steps) as run:
        while run.steps < steps:
            run.count(torch.zeros(10))
            run.log({"square": float(run.steps**2), "unknown": math.nan})
            if run.steps == stop_at:
                raise StopError
            if run.steps % 20 == 0:
                run.save()
    return run


def test_tensorboard_goes_on_where_the_run_does(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def found():
        log = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
        assert log.Tags()["scalars"] == ["square"]
        return [(event.step, event.value) for event in log.Scalars("square")]

    with pytest.raises(StopError):
        log(tmp_path / "run", "tensorboard", 60, stop_at=30)
    assert found() == [(10, 100), (20, 400), (30, 900)]
    run = log(tmp_path / "run", "tensorboard", 60, resume=True)  # from 20 on
    assert found() == [(step, step**2) for step in range(10, 61, 10)]
    assert [row["env_steps"] for row in run.rows] == [step for step, _ in found()]


@pytest.fixture
def offline_wandb(monkeypatch):
    """W&B, where it is installed, without a network."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.usefixtures("offline_wandb")
def test_weights_and_biases_goes_on_in_the_same_run(tmp_path):
    with pytest.raises(StopError):
        log(tmp_path / "run", "wandb", 60, stop_at=30)
    begun = (tmp_path / "run" / "wandb_id").read_text()
    log(tmp_path / "run", "wandb", 60, resume=True)
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(begun) for folder in folders)


@pytest.mark.usefixtures("offline_wandb")
def test_weights_and_biases_begins_anew_where_the_run_does(tmp_path):
    """Killed before its first checkpoint; W&B takes back no rows, perhaps of other options."""
    with pytest.raises(StopError):
        log(tmp_path / "run", "wandb", 60, stop_at=10)
    begun = (tmp_path / "run" / "wandb_id").read_text()
    log(tmp_path / "run", "wandb", 20)
    assert (tmp_path / "run" / "wandb_id").read_text() != begun


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_at_the_start(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)  # as Python marks what cannot be imported
    with pytest.raises(RunError, match=f"--logger {kind} .*install the extra `{kind}`") as said:
        log(tmp_path / "run", kind, 20)
    assert "\n" not in str(said.value)
    assert not (tmp_path / "run").exists()


def test_other_loggers_are_refused(tmp_path):
    with pytest.raises(RunError, match="--logger must be one of csv, tensorboard, wandb; got 'x'"):
        log(tmp_path / "run", "x", 20)


def test_names_that_the_run_adds_itself_are_refused(tmp_path):
    with Run(RunOptions(output=tmp_path / "run"), 10) as run:
        run.count(torch.zeros(10))
        for name in ("env_steps", "seconds"):
            with pytest.raises(ValueError, match=f"'{name}'.* log\\(\\) adds; use other names"):
                run.log({name: 5.0})
        run.log({"one, two": 1.0})
        before = run.curve.path.read_text()
        run.curve.rewrite()
        assert run.curve.path.read_text() == before
