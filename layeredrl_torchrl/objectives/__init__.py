"""Losses of models and predictors as TorchRL loss modules, and the data they learn from."""

from layeredrl_torchrl.objectives.batches import (
    BootstrappedBatches,
    MemberBatches,
    OwnBatches,
    PartitionedBatch,
    SharedBatch,
)
from layeredrl_torchrl.objectives.consistency import ConsistencyLoss
from layeredrl_torchrl.objectives.model_loss import ModelLoss
from layeredrl_torchrl.objectives.predictor_loss import PredictorLoss
from layeredrl_torchrl.objectives.slices import TransitionSlices
from layeredrl_torchrl.objectives.targets import NStepTargets, n_step_targets
from layeredrl_torchrl.objectives.terms import TermsLoss

__all__ = [
    "BootstrappedBatches",
    "ConsistencyLoss",
    "MemberBatches",
    "ModelLoss",
    "NStepTargets",
    "OwnBatches",
    "PartitionedBatch",
    "PredictorLoss",
    "SharedBatch",
    "TermsLoss",
    "TransitionSlices",
    "n_step_targets",
]
