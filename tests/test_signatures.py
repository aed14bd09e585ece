"""What ``help`` and notebooks show of the arguments of classes."""

import inspect

import pytest

from layeredrl_torchrl import (
    CEMPlanner,
    ICEMPlanner,
    MPPIPlanner,
    PredictorEnv,
    PredictorPlanner,
    SPlaTESReward,
)
from layeredrl_torchrl.levels import SkillReward
from layeredrl_torchrl.optimizers import CEM, ICEM, MPPI, Optimizer
from layeredrl_torchrl.predictors import ReturnOptions


def shown(item):
    return dict(inspect.signature(item).parameters)


def keywords(item):
    return {n: p for n, p in shown(item).items() if p.kind == inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("planner", [CEMPlanner, ICEMPlanner, MPPIPlanner])
def test_planners_show_all_of_their_options(planner):
    names = set(shown(planner))
    assert names >= {"horizon", "n_samples", "initial_sigma", "risk", "callback"}
    assert names >= set(keywords(ReturnOptions)) | set(keywords(PredictorPlanner))
    assert not names & {"options", "scoring", "kind", "own", "optimizer"}
    for name in ("n_samples", "n_iterations", "elite_ratio", "momentum"):
        assert shown(planner)[name].default == shown(Optimizer)[name].default


@pytest.mark.parametrize(
    ("planner", "optimizer"), [(CEMPlanner, CEM), (ICEMPlanner, ICEM), (MPPIPlanner, MPPI)]
)
def test_an_optimizer_alone_has_the_defaults_of_its_planner(planner, optimizer):
    alone = shown(Optimizer) | shown(optimizer)
    common = (set(alone) & set(shown(planner))) - {"options"}
    assert common >= {"horizon", "n_samples", "n_iterations", "elite_ratio", "momentum"}
    for name in common:
        assert alone[name].default == shown(planner)[name].default, name


def test_an_own_default_comes_before_that_of_the_base():
    assert shown(ICEMPlanner)["return_mode"].default is not shown(CEMPlanner)["return_mode"].default


def test_rewards_of_skills_show_the_options_of_all():
    assert keywords(SPlaTESReward).items() >= keywords(SkillReward).items()
    assert "options" not in shown(SPlaTESReward)


def test_an_environment_shows_its_own_arguments_and_a_subclass_its_own():
    class Brief(PredictorEnv):
        def __init__(self, predictor, *, length):
            super().__init__(predictor)

    assert list(shown(PredictorEnv))[:2] == ["predictor", "action_spec"]
    assert list(shown(Brief)) == ["predictor", "length"]
