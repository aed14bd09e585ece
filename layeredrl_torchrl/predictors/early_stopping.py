"""Stop the model's updates when it no longer improves on held-out data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDictBase

from layeredrl_torchrl._checks import check_number, check_positive_int
from layeredrl_torchrl._state import Snapshot
from layeredrl_torchrl.models import ProbabilisticEnsemble

__all__ = ["EarlyStopping", "HoldoutWatch"]


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """When the dynamics model stops learning within a call of ``RewardPredictor.learn``.

    Every ``every`` updates, the model is evaluated on the held-out transitions in the way it is
    used: with the averaged weights, the calibration and all members as one mixture. After
    ``patience`` evaluations in a row without a gain of ``min_delta``, the model's updates of this
    call end; reward and value function continue to learn. At the end of a call, stopped or not, the
    best model of the call is restored; the model at its start counts too.

    ``annealing`` of :class:`~layeredrl_torchrl.ModelTraining` makes the weights settle in the last
    updates of a call, which earlier evaluations cannot show. With it, ``patience * every`` should
    not be far below the number of updates of a call.

    >>> training = ModelTraining(early_stopping=EarlyStopping(patience=3))
    >>> factory = PredictorFactory(predictor_options={"model_training": training})
    >>> factory(Unbounded((3,)), Bounded(-1.0, 1.0, (1,))).model_training.early_stopping.every
    100

    Args:
        patience: Evaluations without a gain.
        every: Updates between two evaluations.
        min_delta: The least gain that counts, in nats per dimension.

    Raises:
        TypeError, ValueError: Counts that are not positive integers, or a negative ``min_delta``.
    """

    patience: int = 5
    every: int = 100
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int("patience", self.patience)
        check_positive_int("every", self.every)
        check_number("min_delta", self.min_delta, 0.0)


class HoldoutWatch:
    """Evaluates a model on held-out transitions during one call, and keeps the best one.

    Args:
        model: The model to evaluate.
        optim: Its optimizer; the moments of the model's parameters are kept with the best model.
        data: Encoded transitions ``[N]`` that the model is not trained on.
        options: When to stop.

    Raises:
        ValueError: No transitions.
    """

    def __init__(
        self,
        model: ProbabilisticEnsemble,
        optim: torch.optim.Optimizer,
        data: TensorDictBase,
        options: EarlyStopping,
    ) -> None:
        if not len(data):
            raise ValueError(
                "early_stopping found no held-out transition among those stored; collect more "
                "before learning, or raise holdout_share"
            )
        self._model, self._optim, self._data, self._options = model, optim, data, options
        self._n_updates = self._n_without_gain = 0
        self._best = self._last = self._to_beat = self._nll()
        self._kept = self._snapshots()

    @property
    def stopped(self) -> bool:
        """Whether the model's updates of this call are over."""
        return self._n_without_gain >= self._options.patience

    @property
    def is_due(self) -> bool:
        """Whether the model is evaluated after the next update."""
        return (self._n_updates + 1) % self._options.every == 0

    def after_update(self) -> None:
        """Count an update of the model, and evaluate the model if it is due."""
        self._n_updates += 1
        if self._n_updates % self._options.every == 0:
            self._evaluate()

    def finish(self) -> float:
        """Restore the best model, and return its negative log-likelihood."""
        if self._n_updates % self._options.every:
            self._evaluate()
        if self._last > self._best:
            for snapshot in self._kept:
                snapshot.restore()
        return self._best

    def _evaluate(self) -> None:
        self._last = self._nll()
        if self._last < self._best:
            self._best, self._kept = self._last, self._snapshots()
        # Small gains are kept, but only a large gain, or several small ones, reset the patience.
        if self._last < self._to_beat - self._options.min_delta:
            self._to_beat, self._n_without_gain = self._last, 0
        else:
            self._n_without_gain += 1

    @torch.no_grad()
    def _nll(self) -> float:
        """Return the ensemble's negative log-likelihood, in nats per dimension of its target."""
        keys = ("state", "context", "action", ("next", "state"))
        log_prob, _, _ = self._model.get_log_prob(*(self._data.get(key) for key in keys))
        in_target_units = log_prob.mean() + self._model.scaling.target.scale.log().sum()
        return float(-in_target_units) / self._model.state_dim

    def _snapshots(self) -> tuple[Snapshot, Snapshot]:
        return Snapshot(self._model), Snapshot(self._optim, self._model.parameters())
