"""Losses of models and predictors, as TorchRL ``LossModule``s, and the data they learn from."""

from layeredrl_torchrl.objectives.model_loss import ModelLoss
from layeredrl_torchrl.objectives.predictor_loss import PredictorLoss
from layeredrl_torchrl.objectives.slices import TransitionSlices
from layeredrl_torchrl.objectives.targets import NStepTargets, n_step_targets

__all__ = ["ModelLoss", "NStepTargets", "PredictorLoss", "TransitionSlices", "n_step_targets"]
