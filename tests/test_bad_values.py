"""Every option of the public classes refuses values that mean nothing, when the object is built.

A row says which values an option takes; the bad ones are derived from it. An error is a
``TypeError`` or ``ValueError`` that names the option.
"""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from test_conformance import ACTIONS
from test_conformance import TestRewardPredictor as PredictorSuite
from torchrl.data import OneHot, Unbounded

import layeredrl_torchrl as lrl
from layeredrl_torchrl import imagination, nets, objectives, optimizers, predictors

NAN, INF = float("nan"), float("inf")
NO_NUMBER = ["1", True, [0.5], torch.ones(2)]

COUNT = [0, -1, 1.5, NAN, None, *NO_NUMBER]  # 1, 2, ...
COUNT0 = [-1, 1.5, NAN, *NO_NUMBER]
SHARE = [-0.1, 1.1, NAN, INF, *NO_NUMBER]  # [0, 1]
BELOW_1 = [*SHARE, 1.0]  # [0, 1)
ABOVE_0 = [*SHARE, 0.0]  # (0, 1]
POSITIVE = [0.0, -1.0, NAN, INF, *NO_NUMBER]
NOT_NEGATIVE = [-1.0, NAN, INF, *NO_NUMBER]
NUMBER = [NAN, INF, *NO_NUMBER]
FLAG = ["no", 1, 0, 2.0, torch.ones(2)]
FUNCTION = [3, "TS1", torch.ones(2)]
OBJECT = [3, "best", torch.ones(2), int]
SIZES = [(), (0,), (4, -1), (4.0,), 4, "44"]

SEARCH = optimizers.make_search(ACTIONS)
OPTIMIZER = {
    "horizon": COUNT,
    "n_samples": COUNT,
    "n_iterations": COUNT,
    "elite_ratio": [*ABOVE_0, 0.001],  # of which no two are elites
    "momentum": BELOW_1,
}
LEARNER = {"hidden_sizes": SIZES, "gamma": SHARE, "lr": POSITIVE, "tau": ABOVE_0}
LEVEL = {
    "buffer_size": [v for v in COUNT if v is not None],
    "n_initial_random_steps": COUNT0,
    "updates_per_step": NOT_NEGATIVE,
    "n_initial_updates": COUNT0,
    "batch_size": COUNT,
    "progress": FLAG,
    "logger": OBJECT,
    "reward_func": FUNCTION,
    "each_step": FLAG,
}
SCORING = {
    "discount": ABOVE_0,
    "use_value_func": FLAG,
    "use_term_prob": FLAG,
    "deterministic": FLAG,
    "exploration_bonus": FUNCTION,
    "propagation": [*OBJECT, lrl.TS1],
}
RATE = [-1.0, NAN, INF, "1", True, None]
SKILL_REWARD = {
    "n_skill_samples": COUNT,
    "std": [0.0, -1.0, NAN, INF, "1", True, [0.0]],
    "state_dims": [[], [1, 1]],
    "n_symmetry_breaking_steps": COUNT0,
    "clip": [(1.0, 1.0), (1.0,), 3.0, ("0", 1.0), (NAN, 1.0), None],
    "normalize": FLAG,
    "offset": NUMBER,
}


def predictor(**options):
    suite = PredictorSuite()
    part = suite.make()
    parts = (part.model, part.val_func, part.rew_func, part.encoder)
    return lrl.RewardPredictor(*parts, part.latent_state_dim, part.context_dim, **options)


def ensemble(**options):
    return lrl.ProbabilisticEnsemble(
        Unbounded((3,)), None, ACTIONS, partial(lrl.ProbFCDynamics, hidden_sizes=(4,)), **options
    )


def planner_level(**options):
    factory = lrl.PredictorFactory(hidden_sizes=(4,), n_models=2)
    planner = partial(lrl.ICEMPlanner, horizon=2, n_samples=24)
    given = {"predictor_factory": factory, "planner_factory": planner}
    return lrl.PlannerLevel(Unbounded((3,)), ACTIONS, **given | options)


def model_free_level(**options):
    learner = partial(lrl.SACLearner, hidden_sizes=(4,))
    return lrl.ModelFreeLevel(Unbounded((3,)), ACTIONS, **{"learner_factory": learner} | options)


TABLE = {
    optimizers.GaussianSearch: (
        partial(optimizers.GaussianSearch, -torch.ones(2), torch.ones(2)),
        {"sigma": [0.0, -1.0, NAN, INF, "1", True, [0.0, 1.0], [INF, 1.0], [1.0, NAN]]},
    ),
    optimizers.CategoricalSearch: (
        partial(optimizers.CategoricalSearch, 3),
        {"uniform": ABOVE_0},
    ),
    optimizers.CEM: (partial(optimizers.CEM, SEARCH), OPTIMIZER),
    optimizers.ICEM: (
        partial(optimizers.ICEM, SEARCH),
        OPTIMIZER
        | {"beta": NOT_NEGATIVE, "decay": [0.5, NAN, INF, *NO_NUMBER], "keep_ratio": SHARE},
    ),
    optimizers.MPPI: (partial(optimizers.MPPI, SEARCH), OPTIMIZER | {"temperature": POSITIVE}),
    lrl.CEMPlanner: (
        lambda **options: lrl.CEMPlanner(PredictorSuite().make(), **options),
        OPTIMIZER
        | SCORING
        | {
            "initial_sigma": [0.0, -1.0, NAN, INF, "1", True],
            "return_mode": ["worst", 3],
            "deterministic_mode": ["worst", 3],
            "risk": [3, "CVaR", lrl.CVaR],
            "callback": FUNCTION,
            "proposal": FUNCTION,
        },
    ),
    lrl.PredictorEnv: (
        lambda **options: lrl.PredictorEnv(
            PredictorSuite().make(), **{"use_value_func": "discount" in options} | options
        ),
        {
            "propagation": [*OBJECT, lrl.TS1],
            "sample_termination": FLAG,
            "exploration_bonus": FUNCTION,
            "initial_states": FUNCTION,
            "batch_size": [[-1], [1.5], ["3"]],
            "use_value_func": FLAG,
            "discount": ABOVE_0,
        },
    ),
    lrl.CVaR: (lambda alpha=0.5: lrl.CVaR(alpha), {"alpha": ABOVE_0}),
    lrl.ProbFCDynamics: (
        partial(lrl.ProbFCDynamics, Unbounded((3,)), None, ACTIONS),
        {
            "n_modes": COUNT,
            "hidden_sizes": SIZES,
            "nonlinearity": FUNCTION,
            "ignore_context": FLAG,
            "log_std_bounds": [(1.0, -1.0), (1.0, 1.0), (NAN, 1.0), (0.0, INF), 3],
        },
    ),
    lrl.RewardNet: (
        partial(lrl.RewardNet, 3, 0, ACTIONS),
        {"hidden_sizes": SIZES, "nonlinearity": FUNCTION, "layer_norm": FLAG},
    ),
    nets.QValueNet: (
        partial(nets.QValueNet, state_dim=3, context_dim=0, action_dim=2),
        {"state_dim": COUNT, "context_dim": COUNT0},
    ),
    nets.Landmarks: (
        partial(nets.Landmarks, dim=2, radius=0.5),
        {
            "dim": COUNT,
            "radius": POSITIVE,
            "scale": POSITIVE,
            "top": NUMBER,
            "capacity": COUNT,
        },
    ),
    nets.SimNorm: (nets.SimNorm, {"size": COUNT, "temperature": POSITIVE}),
    nets.ModuleEncoder: (
        partial(nets.ModuleEncoder, torch.nn.Identity(), (3,), 3),
        {"context_dim": COUNT0},
    ),
    lrl.ValueNet: (
        partial(lrl.ValueNet, state_dim=3, context_dim=0),
        {"state_dim": COUNT, "context_dim": COUNT0},
    ),
    lrl.EncoderNet: (
        partial(lrl.EncoderNet, (3,), latent_state_dim=2, context_dim=0),
        {"latent_state_dim": COUNT, "context_dim": COUNT0},
    ),
    lrl.ProbabilisticEnsemble: (
        ensemble,
        {
            "n_models": COUNT,
            "n_modes": COUNT,
            "n_particles_per_model": COUNT,
            "predict_delta": [*FLAG, [True, False]],
            "normalize_targets": FLAG,
            "normalize_inputs": FLAG,
            "clip_inputs": FLAG,
            "ema_decay": [-0.1, 1.0, NAN, INF, "1", True],
        },
    ),
    lrl.EnsembleDisagreement: (partial(lrl.EnsembleDisagreement, ensemble()), {"scale": NUMBER}),
    imagination.OutOfRange: (partial(imagination.OutOfRange, ensemble()), {"limit": POSITIVE}),
    imagination.Disagrees: (
        partial(imagination.Disagrees, ensemble(), limit=1.0),
        {"limit": POSITIVE},
    ),
    objectives.ConsistencyLoss: (
        partial(objectives.ConsistencyLoss, lrl.EncoderNet((3,), 3, 0), ensemble()),
        {"tau": ABOVE_0},
    ),
    predictors.DeltaStandardizer: (
        partial(predictors.DeltaStandardizer, dim=3),
        {"dim": COUNT, "min_eigenvalue": ABOVE_0},
    ),
    lrl.ModelLoss: (
        partial(lrl.ModelLoss, ensemble()),
        {"per_member": FLAG, "beta": SHARE, "huber_std": POSITIVE},
    ),
    lrl.PredictorLoss: (
        lambda **options: lrl.PredictorLoss(
            lrl.IdentityEncoder((3,)), lrl.RewardNet(3, 0, 2, (4,)), None, **options
        ),
        {"gamma": SHARE, "k_steps": COUNT, "n_steps": COUNT, "learn_encoder": FLAG},
    ),
    lrl.RewardPredictor: (
        predictor,
        {
            "term_func": FUNCTION,
            "learn_encoder": FLAG,
            "gamma": SHARE,
            "tau": SHARE,
            "k_steps": COUNT,
            "n_steps": COUNT,
            "consistency_loss_weight": NOT_NEGATIVE,
            "termination_loss_weight": NOT_NEGATIVE,
            "value_loss_weight": NOT_NEGATIVE,
            "rew_loss_weight": NOT_NEGATIVE,
            "encoder_lr": RATE,
            "reward_lr": RATE,
            "model_lr": RATE,
            "value_lr": RATE,
            "holdout_share": BELOW_1,
            "clip_grad_max_norm": POSITIVE,
            "delta_standardizer": FLAG,
            "encoder_warm_up": COUNT0,
            "beta_nll": SHARE,
            "model_training": OBJECT,
        },
    ),
    predictors.ModelTraining: (
        predictors.ModelTraining,
        {
            "member_batches": [*OBJECT, lrl.SharedBatch],
            "annealing": SHARE,
            "huber_std": POSITIVE,
            "weight_decay": NOT_NEGATIVE,
            "early_stopping": OBJECT,
        },
    ),
    lrl.EarlyStopping: (
        lrl.EarlyStopping,
        {"patience": COUNT, "every": COUNT, "min_delta": NOT_NEGATIVE},
    ),
    lrl.BootstrappedBatches: (lrl.BootstrappedBatches, {"seed": [1.5, NAN, "1", True]}),
    lrl.SACLearner: (
        partial(lrl.SACLearner, 3, ACTIONS),
        LEARNER | {"n_critics": COUNT, "alpha_init": POSITIVE, "target_entropy": NUMBER},
    ),
    lrl.DQNLearner: (
        partial(lrl.DQNLearner, 3, OneHot(3)),
        LEARNER | {"epsilon": SHARE, "double": FLAG},
    ),
    lrl.PlannerLevel: (
        planner_level,
        LEVEL
        | {
            "predictor_factory": FUNCTION,
            "planner_factory": FUNCTION,
            "random_prob": SHARE,
            "random_duration": COUNT,
            "model_batch_size": COUNT,
        },
    ),
    lrl.ModelFreeLevel: (
        model_free_level,
        LEVEL
        | {
            "learner_factory": FUNCTION,
            "duration": [v for v in COUNT if v is not None],
            "input_ends": FLAG,
        },
    ),
    lrl.DADSReward: (lrl.DADSReward, SKILL_REWARD),
    lrl.SPlaTESReward: (lrl.SPlaTESReward, SKILL_REWARD | {"potential_difference": FLAG}),
    lrl.AffineReward: (lrl.AffineReward, {"scale": [0.0, *NUMBER], "offset": NUMBER}),
    lrl.LogReward: (
        partial(lrl.LogReward, floor=0.1),
        {"floor": POSITIVE, "scale": [0.0, *NUMBER], "offset": NUMBER},
    ),
    lrl.FlipTermination: (
        lambda **options: lrl.FlipTermination(**{"tilt": lrl.Angle(0)} | options),
        {"tilt": FUNCTION, "limit": POSITIVE},
    ),
    lrl.Angle: (partial(lrl.Angle, index=1), {"index": [1.5, NAN, "1", None]}),
    lrl.QuaternionTilt: (partial(lrl.QuaternionTilt, first=1), {"first": [1.5, NAN, "1", None]}),
    lrl.SuccessRate: (lrl.SuccessRate, {"window": COUNT}),
    lrl.make_batched: (partial(lrl.make_batched, "Reacher-v5", n=1), {"n": COUNT}),
}
CASES = [(name, option) for name, (_, options) in TABLE.items() for option in options]


def ending(make, option, value):
    """How it ends, or nothing where it ends as it should."""
    # As a word; a planner's initial_sigma is a search's sigma.
    name = rf"\b(initial_)?{option.removeprefix('initial_')}\b"
    try:
        make(**{option: value})
    except (TypeError, ValueError) as error:
        return "" if re.search(name, str(error)) else f"{value!r}: {error}"
    except Exception as error:  # noqa: BLE001 - to say for which value
        return f"{value!r}: {type(error).__name__}: {error}"
    return f"{value!r} is accepted"


@pytest.mark.parametrize(
    ("kind", "option"), CASES, ids=[f"{kind.__name__}-{option}" for kind, option in CASES]
)
def test_a_bad_value_is_refused_by_name(kind, option):
    make, options = TABLE[kind]
    endings = [ending(make, option, value) for value in options[option]]
    assert not any(endings), "\n".join(filter(None, endings))


def test_the_other_values_of_a_row_are_accepted():
    """That is, the errors above are about the one value that differs."""
    for make, _ in TABLE.values():
        make()


# What lies at the ends of the ranges above, and just inside of those that are open.
ENDS = (
    (COUNT0, [0]),
    (SHARE, [0.0, 1.0]),
    (BELOW_1, [0.0, 0.999]),
    (ABOVE_0, [1.0, 0.001]),
    (POSITIVE, [0.001]),
    (NOT_NEGATIVE, [0.0, 0.001]),
    (RATE, [0.0, 0.001]),
)


ENDED = [
    (kind, option, value)
    for kind, option in CASES
    for of, values in ENDS
    for value in values
    if TABLE[kind][1][option] is of
]


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    ENDED,
    ids=[f"{kind.__name__}-{option}-{value}" for kind, option, value in ENDED],
)
def test_the_ends_of_a_range_are_accepted(kind, option, value):
    TABLE[kind][0](**{option: value})
