"""Stopping the model's updates when it no longer improves on what it is not trained on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from layeredrl_torchrl._checks import check_positive_int
from layeredrl_torchrl.objectives import TransitionSlices
from layeredrl_torchrl.predictors.transitions import held_out_transitions

if TYPE_CHECKING:
    from layeredrl_torchrl.predictors.reward import RewardPredictor

__all__ = ["EarlyStopping", "HoldoutWatch"]


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """When the dynamics model stops learning within a call of ``RewardPredictor.learn``.

    Every ``every`` updates, the held-out transitions are predicted as a user would: with the
    averaged weights, the calibration and all members as one mixture. After ``patience`` such
    looks in a row without a gain of ``min_delta``, the model's updates of this call end; reward
    and value function go on. At the end of a call, stopped or not, the model is the best one that
    was seen in it, the one at its start included.

    ``model_lr_annealing`` makes the weights settle in the last updates of a call, which the looks
    before that do not see: with it, ``patience * every`` should not be far below the updates
    of a call.

    >>> factory = PredictorFactory(predictor_options={"early_stopping": EarlyStopping(patience=3)})
    >>> factory(Unbounded((3,)), Bounded(-1.0, 1.0, (1,))).early_stopping.every
    100

    Args:
        patience: Looks without a gain.
        every: Updates between two looks.
        min_delta: The least gain that counts, in nats per dimension.

    Raises:
        TypeError, ValueError: Counts that are no positive integers, or a negative ``min_delta``.
    """

    patience: int = 5
    every: int = 100
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int("patience", self.patience)
        check_positive_int("every", self.every)
        if not 0.0 <= self.min_delta < float("inf"):
            raise ValueError(f"min_delta must be finite and at least 0, got {self.min_delta}")


class HoldoutWatch:
    """Looks at the held-out transitions during one call, and keeps the best model.

    Args:
        predictor: Whose model is watched.
        slices: The buffer.
        n_sampled: Transitions to draw; those that are held out are looked at.
        options: When to stop.

    Raises:
        ValueError: Nothing in the buffer is held out.
    """

    def __init__(
        self,
        predictor: RewardPredictor,
        slices: TransitionSlices,
        n_sampled: int,
        options: EarlyStopping,
    ) -> None:
        self._predictor = predictor
        self._options = options
        self._data = held_out_transitions(predictor, slices, n_sampled)
        if not len(self._data):
            raise ValueError(
                f"early_stopping found no held-out transition among the {len(slices)} stored, with "
                f"holdout_share={predictor.holdout_share}; collect more before learning, or raise "
                "the share"
            )
        self._n_updates = self._n_without_gain = 0
        self._best = self._last = self._to_beat = self._nll()
        self._kept = self._copy()

    @property
    def stopped(self) -> bool:
        """Whether the model's updates of this call are over."""
        return self._n_without_gain >= self._options.patience

    def after_update(self) -> None:
        """Count an update of the model, and look if it is time."""
        self._n_updates += 1
        if self._n_updates % self._options.every == 0:
            self._look()

    def finish(self) -> float:
        """Put the best model back; returns its negative log-likelihood."""
        if self._n_updates % self._options.every:
            self._look()
        if self._last > self._best:
            self._restore()
        return self._best

    def _look(self) -> None:
        self._last = self._nll()
        if self._last < self._best:
            self._best, self._kept = self._last, self._copy()
        # Small gains are kept, but only a large one, or several small ones, buy more time.
        if self._last < self._to_beat - self._options.min_delta:
            self._to_beat, self._n_without_gain = self._last, 0
        else:
            self._n_without_gain += 1

    @torch.no_grad()
    def _nll(self) -> float:
        """Negative log-likelihood of the ensemble, in nats per dimension of the model's target."""
        model, data = self._predictor.model, self._data
        keys = ("state", "context", "action", ("next", "state"))
        log_prob, _, _ = model.get_log_prob(*(data.get(key) for key in keys))
        in_target_units = log_prob.mean() + model.target_normalizer.scale.log().sum()
        return float(-in_target_units) / model.state_dim

    def _moments(self) -> dict[Any, dict[str, torch.Tensor]]:
        """The optimizer's state of the model's parameters."""
        optim = self._predictor.optim
        groups = [g["params"] for g in optim.param_groups if g["name"] == "model"]
        return {p: optim.state[p] for group in groups for p in group if p in optim.state}

    def _copy(self) -> tuple[dict[str, Any], dict[Any, dict[str, torch.Tensor]]]:
        moments = {
            p: {name: value.clone() for name, value in state.items()}
            for p, state in self._moments().items()
        }
        return copy.deepcopy(self._predictor.model.state_dict()), moments

    def _restore(self) -> None:
        weights, moments = self._kept
        self._predictor.model.load_state_dict(weights)
        for p in list(self._moments()):
            if p in moments:
                self._predictor.optim.state[p] = moments[p]
            else:
                del self._predictor.optim.state[p]
