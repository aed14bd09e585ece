"""What ``help`` and notebooks show of the arguments of classes."""

import inspect

import pytest

from layeredrl_torchrl import (
    CEMPlanner,
    EarlyStopping,
    ICEMPlanner,
    MPPIPlanner,
    PredictorEnv,
    PredictorFactory,
    PredictorPlanner,
    RewardPredictor,
    SPlaTESReward,
    ValueGradientLoss,
)
from layeredrl_torchrl.levels import SkillReward
from layeredrl_torchrl.optimizers import CEM, ICEM, MPPI, Optimizer
from layeredrl_torchrl.predictors import ModelTraining, ReturnOptions


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


# The published results were measured with them, where no other option is named beside.
MEASURED_WITH = {
    RewardPredictor: {
        "learn_encoder": True,
        "gamma": 0.99,
        "tau": 0.005,
        "k_steps": 1,
        "n_steps": 3,
        "consistency_loss_weight": 1.0,
        "termination_loss_weight": 30.0,
        "value_loss_weight": 1.0,
        "rew_loss_weight": 1.0,
        "encoder_lr": 1e-3,
        "reward_lr": 3e-3,
        "model_lr": 7e-3,
        "value_lr": 1e-3,
        "holdout_share": 0.05,
        "clip_grad_max_norm": 200.0,
        "encoder_warm_up": 0,
        "beta_nll": 0.75,
    },
    PredictorFactory: {
        "hidden_sizes": (128, 128),
        "n_models": 5,
        "n_modes": 1,
        "n_particles_per_model": 1,
        "gamma": 0.99,
        "ignore_context": True,
    },
    ModelTraining: {"annealing": 0.4, "huber_std": 10.0, "weight_decay": 0.0},
    EarlyStopping: {"patience": 5, "every": 100, "min_delta": 0.0},
    ReturnOptions: {"discount": 1.0, "use_value_func": False, "use_term_prob": True},
    ValueGradientLoss: {"horizon": 5, "num_qvalue_nets": 2, "alpha_init": 0.1},
}


@pytest.mark.parametrize("kind", MEASURED_WITH, ids=lambda kind: kind.__name__)
def test_defaults_are_those_that_results_were_measured_with(kind):
    found = {name: parameter.default for name, parameter in shown(kind).items()}
    assert MEASURED_WITH[kind].items() <= found.items()
