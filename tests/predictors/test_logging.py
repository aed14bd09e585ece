"""What learning reports: terms to TorchRL's loggers, and a bar on the screen."""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers import learn, make_buffer, make_point, make_predictor
from torchrl.record.loggers import CSVLogger

from layeredrl_torchrl import RewardPredictor, _reporting
from layeredrl_torchrl._reporting import updates


def logged(folder):
    """Every scalar of a CSVLogger's folder: its steps and values."""
    scalars = folder / "run" / "scalars"
    found = {}
    for path in scalars.rglob("*.csv"):
        rows = [line.split(",") for line in path.read_text().splitlines()]
        name = path.relative_to(scalars).with_suffix("").as_posix()
        found[name] = [(int(step), pytest.approx(float(value))) for step, value in rows]
    return found


def test_every_term_is_logged_at_the_environment_step_below_its_predictors_name(tmp_path):
    logger, buffer, expected = CSVLogger("run", log_dir=str(tmp_path)), make_buffer(), {}
    named, nothing_to_learn = make_predictor(), make_point()
    named.name = "level 1"
    for name, predictor in (
        ("RewardPredictor", make_predictor()),
        ("level 1", named),
        ("StaticPredictor", nothing_to_learn),
    ):
        for step in (60, 120):
            info = learn(predictor, buffer, n_total_env_steps=step, logger=logger)
            for term, value in info.items():
                expected.setdefault(f"{name}/{term}", []).append((step, value))
    logger.shutdown()
    assert logged(tmp_path) == expected


def test_logging_and_the_bar_change_nothing(tmp_path, capfd):
    runs = []
    for options in ({}, {"logger": CSVLogger("run", log_dir=str(tmp_path)), "progress": True}):
        torch.manual_seed(1)
        predictor = make_predictor()
        info = learn(predictor, make_buffer(), **options)
        runs.append((info, predictor.state_dict(), torch.rand(())))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_every_term_is_documented_with_its_unit():
    rows = re.findall(r"^ +``(\w+)`` {2,}(\S.*)$", RewardPredictor.learn.__doc__, re.MULTILINE)
    assert set(learn(make_predictor(), make_buffer())) <= dict(rows).keys()


# -- the bar ------------------------------------------------------------------------------------


def test_the_bar_counts_updates_and_shows_terms(capfd):
    predictor = make_predictor()
    predictor.name = "my model"
    learn(predictor, make_buffer())
    assert capfd.readouterr() == ("", "")
    info = learn(predictor, make_buffer(), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "my model: 100%" in err
    assert "3/3" in err
    for name in ("loss", "nll", "value_mean"):
        assert f"{name}={info[name]:.3g}" in err


def count_up(n_updates):
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


def test_the_bar_reads_terms_seldom_and_shows_means_since_then(monkeypatch, capfd):
    """A read may have to wait for a GPU: there is one at the end, and else one a second."""
    assert _reporting._EVERY == 1.0
    monkeypatch.setattr(_reporting, "_EVERY", math.inf)
    assert count_up(300) == 1
    assert "300/300" in capfd.readouterr().err
    monkeypatch.setattr(_reporting, "_EVERY", -1.0)  # at every update
    assert count_up(4) == 4
    shown = re.findall(r"square=(\d+)", capfd.readouterr().err)
    assert shown[-1] == "16"  # that of the last update; over all four it is 7.5
