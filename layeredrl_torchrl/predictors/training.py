"""Options of how a predictor trains its dynamics model."""

from __future__ import annotations

from dataclasses import dataclass, field

from layeredrl_torchrl._checks import check_instance, check_number
from layeredrl_torchrl.objectives import MemberBatches, OwnBatches
from layeredrl_torchrl.predictors.early_stopping import EarlyStopping

__all__ = ["ModelTraining"]


@dataclass(frozen=True, kw_only=True)
class ModelTraining:
    """How :class:`~layeredrl_torchrl.RewardPredictor` trains its dynamics model.

    >>> training = ModelTraining(member_batches=SharedBatch(), weight_decay=1e-4)
    >>> factory = PredictorFactory(predictor_options={"model_training": training})

    Args:
        member_batches: How the ensemble's members share the model batches; by default each gets
            ``model_batch_size`` transitions of its own.
        annealing: Share of each call's updates, at its end, over which the model's learning rate
            falls linearly to a tenth: the weights settle, and the predicted variance becomes that
            of the settled weights. ``beta_nll`` falls to 0 over as many updates, but reaches 0
            earlier, by a quarter of them. For the means it falls only in dimensions where they
            explain more than nine tenths of the variance, so that rare changes are still learned. 0
            for neither.
        huber_std: See :class:`~layeredrl_torchrl.ModelLoss`.
        weight_decay: Decoupled weight decay (arXiv 1711.05101) of all the model's parameters: each
            update shrinks them by this number times the learning rate.
        early_stopping: When the model stops learning within a call; ``None`` for never. Needs
            held-out transitions and an encoder that does not learn.

    Raises:
        TypeError, ValueError: Options of another kind, or numbers outside their range.
    """

    member_batches: MemberBatches = field(default_factory=OwnBatches)
    annealing: float = 0.4
    huber_std: float | None = 10.0
    weight_decay: float = 0.0
    early_stopping: EarlyStopping | None = None

    def __post_init__(self) -> None:
        hint = "pass OwnBatches(), SharedBatch() or the like"
        check_instance("member_batches", self.member_batches, MemberBatches, hint=hint)
        check_number("annealing", self.annealing, 0.0, 1.0)
        check_number("weight_decay", self.weight_decay, 0.0)
        if self.huber_std is not None:
            check_number("huber_std", self.huber_std, 0.0, open_low=True)
        if self.early_stopping is not None:
            hint = "pass EarlyStopping() or None"
            check_instance("early_stopping", self.early_stopping, EarlyStopping, hint=hint)
