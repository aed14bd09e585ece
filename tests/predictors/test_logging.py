"""What learning reports: terms to TorchRL's loggers, and a bar on the screen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torchrl.record.loggers import CSVLogger, TensorboardLogger

from layeredrl_torchrl import RewardPredictor
from layeredrl_torchrl._reporting import updates

LEARN = {"n_updates": 3, "batch_size": 8, "model_batch_size": 8}


def from_csv(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of a CSVLogger's folder: its steps and values."""
    scalars = folder / "run" / "scalars"
    found = {}
    for path in scalars.rglob("*.csv"):
        rows = [line.split(",") for line in path.read_text().splitlines()]
        name = path.relative_to(scalars).with_suffix("").as_posix()
        found[name] = [(int(step), float(value)) for step, value in rows]
    return found


def from_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of tensorboard's event files."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "run")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def csv_logger(folder):
    return CSVLogger("run", log_dir=str(folder))


def tensorboard_logger(folder):
    pytest.importorskip("tensorboard")
    return TensorboardLogger("run", log_dir=str(folder))


LOGGERS = {"csv": (csv_logger, from_csv), "tensorboard": (tensorboard_logger, from_tensorboard)}


@pytest.mark.parametrize("kind", LOGGERS)
def test_every_term_is_logged_at_the_environment_step(make_predictor, make_buffer, tmp_path, kind):
    make, read = LOGGERS[kind]
    predictor, buffer, logger = make_predictor(), make_buffer(), make(tmp_path)
    infos = {}
    for step in (60, 120):
        _, infos[step] = predictor.learn(buffer, **LEARN, n_total_env_steps=step, logger=logger)
    logger.shutdown()
    logged = read(tmp_path)
    assert set(logged) == {f"RewardPredictor/{term}" for term in infos[60]}
    for name, rows in logged.items():
        term = name.removeprefix("RewardPredictor/")
        expected = [(step, pytest.approx(info[term], rel=1e-6)) for step, info in infos.items()]
        assert rows == expected, name


@pytest.mark.parametrize("kind", [pytest.param("process", marks=pytest.mark.slow), "static"])
def test_other_loggers_and_predictors(make_predictor, make_point, make_buffer, tmp_path, kind):
    """A logger in a process of its own, and a predictor that has nothing to learn."""
    options = {"service_backend": "process"} if kind == "process" else {}
    predictor = make_predictor() if kind == "process" else make_point()
    logger = CSVLogger("run", log_dir=str(tmp_path), **options)
    _, info = predictor.learn(make_buffer(), **LEARN, n_total_env_steps=7, logger=logger)
    logger.shutdown()
    name = type(predictor).__name__
    expected = {f"{name}/{term}": [(7, pytest.approx(v, rel=1e-6))] for term, v in info.items()}
    assert from_csv(tmp_path) == expected


def test_two_predictors_are_told_apart_by_name(make_predictor, make_buffer, tmp_path):
    logger = csv_logger(tmp_path)
    for name in ("level 0", "level 1"):
        predictor = make_predictor()
        predictor.name = name
        predictor.learn(make_buffer(), **LEARN, n_total_env_steps=0, logger=logger)
    assert {name.split("/")[0] for name in from_csv(tmp_path)} == {"level 0", "level 1"}


def test_logging_and_the_bar_change_nothing(make_predictor, make_buffer, tmp_path, capfd):
    runs = []
    for options in ({}, {"logger": csv_logger(tmp_path), "progress": True}):
        torch.manual_seed(1)
        predictor = make_predictor()
        _, info = predictor.learn(make_buffer(), **LEARN, n_total_env_steps=0, **options)
        runs.append((info, predictor.state_dict(), torch.rand(())))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_every_term_is_documented_with_its_unit(make_predictor, make_buffer):
    _, info = make_predictor().learn(make_buffer(), **LEARN, n_total_env_steps=0)
    rows = re.findall(r"^ +``(\w+)`` {2,}(\S.*)$", RewardPredictor.learn.__doc__, re.MULTILINE)
    assert set(info) <= dict(rows).keys()


@pytest.mark.parametrize("make", ["make_predictor", "make_point"])
def test_what_is_no_logger_is_refused_before_anything_is_learned(
    make, request, make_buffer, unchanged
):
    predictor = request.getfixturevalue(make)()
    with unchanged(predictor), pytest.raises(TypeError, match=r"torchrl.*Logger.*got str"):
        predictor.learn(make_buffer(), **LEARN, n_total_env_steps=0, logger="tensorboard")


# -- the bar ------------------------------------------------------------------------------------


def test_the_bar_counts_updates_and_shows_terms(make_predictor, make_buffer, capfd):
    predictor = make_predictor()
    predictor.name = "my model"
    _, info = predictor.learn(make_buffer(), **LEARN, n_total_env_steps=0, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "my model: 100%" in err
    assert "3/3" in err
    for name in ("loss", "nll", "value_mean"):
        assert f"{name}={info[name]:.3g}" in err


def test_nothing_is_printed_without_it(make_predictor, make_buffer, capfd):
    make_predictor().learn(make_buffer(), **LEARN, n_total_env_steps=0)
    assert capfd.readouterr() == ("", "")


def count_up(n_updates: int) -> int:
    """Sum up the squares of 1 to ``n_updates`` under a bar; returns how often it read the sum."""
    reads = []

    class Sum(torch.Tensor):
        def __float__(self):
            reads.append(self.item())
            return self.item()

    totals, counts = {}, {}
    for i in updates(n_updates, totals, counts, bar="squares"):
        counts["square"] = i + 1
        so_far = sum((j + 1.0) ** 2 for j in range(i + 1))
        totals["square"] = torch.tensor(so_far).as_subclass(Sum)
    return len(reads)


def test_the_bar_reads_terms_seldom(capfd):
    """A read may have to wait for a GPU: there is one at the end, and one a second before."""
    assert count_up(300) <= 3
    assert "300/300" in capfd.readouterr().err


def test_the_bar_shows_means_since_it_last_looked(monkeypatch, capfd):
    monkeypatch.setattr("layeredrl_torchrl._reporting._EVERY", -1.0)  # at every update
    assert count_up(4) == 4
    shown = re.findall(r"square=(\d+)", capfd.readouterr().err)
    assert shown[-1] == "16"  # that of the last update; over all four it is 7.5


def test_a_bar_is_closed_when_learning_fails(make_predictor, make_buffer, capfd):
    predictor, buffer = make_predictor(), make_buffer()
    predictor.learn(buffer, **LEARN, n_total_env_steps=0)
    with torch.no_grad():
        predictor.rew_func.net[-1].bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="loss"):
        predictor.learn(buffer, **LEARN, n_total_env_steps=0, progress=True)
    assert capfd.readouterr().err.endswith("\n")  # what is printed next starts on its own line
