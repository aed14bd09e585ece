"""The statistics that learning keeps up to date in addition to the parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from layeredrl_torchrl._outliers import warn_of_outliers
from layeredrl_torchrl.models import ProbabilisticEnsemble
from layeredrl_torchrl.nets import Encoder, EncoderNet, ScalarHead, needs_next_state
from layeredrl_torchrl.predictors._context import ContextWatch
from layeredrl_torchrl.predictors._experience import Experience
from layeredrl_torchrl.predictors.standardizer import DeltaStandardizer

__all__ = ["N_STATISTICS", "Upkeep"]

# Number of transitions from which statistics are computed.
N_STATISTICS = 10_000
# Minimum number of updates between two calibrations.
_CALIBRATE_EVERY = 200
# Places of the storage that show whether the data behind the statistics is still there.
_N_PROBES = 64


class Upkeep(nn.Module):
    """Refits normalisers, output scales, the encoder's mask and the calibration.

    Statistics are recomputed whenever a tenth of the data is new: the buffer has grown by a tenth,
    a tenth of its contents has been overwritten, or it is another buffer; and when a part is
    trained that was not before. Weights that are not trained keep the statistics with which they
    were learned.

    Args:
        model: Has the normalisers and the calibration.
        encoder: Its context is watched.
        learn_encoder: Whether an :class:`~layeredrl_torchrl.EncoderNet` that nothing trains gets a
            mask if it has none; a trained one always has its mask updated.
        rew_func: Is scaled if it is a :class:`~layeredrl_torchrl.ScalarHead`.
        val_func: Likewise.
        target_val_func: Is scaled together with ``val_func``.
        delta_standardizer: Is fitted to changes of the state.
        gamma: Discount over one environment step.
        trains: Tells whether any part of a module is trained.
    """

    n_since_calibration: Tensor  # []: updates of the model
    n_written_at_statistics: Tensor  # []: transitions
    n_stored_at_statistics: Tensor  # []: transitions
    fingerprints: Tensor  # [64]: of what was stored
    trained_at_statistics: Tensor  # [3] bool: model, reward and value function

    def __init__(
        self,
        model: ProbabilisticEnsemble,
        encoder: Encoder,
        learn_encoder: bool,
        rew_func: Callable[..., Tensor] | None,
        val_func: Callable[..., Tensor] | None,
        target_val_func: nn.Module | None,
        delta_standardizer: DeltaStandardizer | None,
        gamma: float,
        trains: Callable[[object], bool],
    ) -> None:
        super().__init__()
        self._gamma = gamma
        # The parts belong to the predictor: a tuple keeps them from being registered twice.
        self._parts = model, encoder, rew_func, delta_standardizer
        self._learn_encoder = learn_encoder
        self._values = val_func, target_val_func
        self._trains = trains
        self._context_watch = ContextWatch(encoder)
        for name in ("n_since_calibration", "n_written_at_statistics", "n_stored_at_statistics"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))
        self.register_buffer("fingerprints", torch.zeros(_N_PROBES, dtype=torch.long))
        self.register_buffer("trained_at_statistics", torch.zeros(3, dtype=torch.bool))

    @torch.no_grad()
    def refit(self, experience: Experience, *, anew: bool = False) -> None:
        """Recompute the statistics if a tenth of the data is new, or always if ``anew``.

        Raises:
            KeyError, TypeError, ValueError: As :meth:`Experience.encode` and
                :meth:`Experience.rewards`.
        """
        if not anew and self._up_to_date(experience):
            return
        model, encoder, _, delta_standardizer = self._parts
        n_stored = len(experience)
        rows = experience.overview(N_STATISTICS)
        reward = experience.rewards(rows)
        if isinstance(encoder, EncoderNet) and self._lacks_mask(encoder):
            experience.encode(rows)  # raises for bad data before anything is changed
            encoder.update_mask(*experience.observations(rows))
        data = experience.encode(rows)
        self._context_watch.look(*experience.observations(rows), experience.goes_on(rows))
        state, context, action = (data.get(key) for key in ("state", "context", "action"))
        next_state = data.get(("next", "state"))
        # The model's statistics count only rows of positive weight; reward and value learn from
        # all.
        counted = experience.counted(data)
        if len(counted):
            before, after = counted.get("state"), counted.get(("next", "state"))
            if self._model_learns:
                model.fit_statistics(before, counted["context"], counted["action"], after)
            if delta_standardizer is not None:
                delta_standardizer.fit(after - before)
        discount = None
        if not bool((data.get(("next", "terminated")) > 0).any()):
            discount = self._gamma ** experience.elapsed_steps(rows).double().mean().item()
        self._rescale(reward, discount, (state, context, action), next_state)
        self.n_written_at_statistics.fill_(experience.n_written)
        self.n_stored_at_statistics.fill_(n_stored)
        self.fingerprints.copy_(experience.fingerprints(n_stored, _N_PROBES))
        self.trained_at_statistics.copy_(self._trained())

    @torch.no_grad()
    def calibrate(self, experience: Experience, n_updates: int) -> None:
        """Fit the model's calibration if it was updated often enough since the last time.

        Args:
            experience: Its held-out transitions are used; without any, nothing happens.
            n_updates: How often the model was updated since the last call of this function.
        """
        if not self._model_learns:
            return
        self.n_since_calibration += n_updates
        if not experience.holdout_share or int(self.n_since_calibration) < _CALIBRATE_EVERY:
            return
        data = experience.held_out(N_STATISTICS)
        if not len(data):
            return
        keys = ("state", "context", "action", ("next", "state"))
        self._parts[0].calibrate(*(data.get(key) for key in keys))
        self.n_since_calibration.zero_()

    @property
    def _model_learns(self) -> bool:
        """Whether the members are trained, or are known dynamics without anything to train."""
        members = self._parts[0].members
        return self._trains(members) or next(members.parameters(), None) is None

    def _lacks_mask(self, encoder: EncoderNet) -> bool:
        """Whether the mask has to follow the data; that of frozen weights stays."""
        if self._trains(encoder):
            return True
        if bool(encoder.mask.any()):
            return False
        if not self._learn_encoder:
            warnings.warn(
                "the encoder does not learn (learn_encoder=False) and its mask is empty, so all "
                "states are 0; call its update_mask(observation, next_observation), load a trained "
                "one, or pass learn_encoder=True",
                stacklevel=6,  # whoever called learn
            )
        return self._learn_encoder

    def _trained(self) -> Tensor:
        """Return which statistics are kept: of model, reward and value function, bool ``[3]``."""
        heads = (self._parts[2], self._values[0])
        return torch.tensor([self._model_learns, *(self._trains(head) for head in heads)])

    def _up_to_date(self, experience: Experience) -> bool:
        """Whether less than a tenth of the data is new since the statistics were taken."""
        n_written, n_stored = int(self.n_written_at_statistics), int(self.n_stored_at_statistics)
        if not n_written or len(experience) < n_stored:
            return False
        if 10 * experience.n_written >= 11 * n_written:
            return False
        if bool((self._trained() & ~self.trained_at_statistics.cpu()).any()):
            return False
        found = experience.fingerprints(n_stored, _N_PROBES)
        n_changed = int((found != self.fingerprints.cpu()).sum())
        return 10 * n_changed < _N_PROBES

    def _rescale(
        self,
        reward: Tensor,
        discount: float | None,
        taken: tuple[Tensor, Tensor, Tensor],
        next_state: Tensor,
    ) -> None:
        """Set the output scales and input statistics of the reward and value functions.

        Returns are the size of many rewards. But a value function that starts at 0, scaled to one
        reward, grows towards them from below and so stays low where there is no data; planners
        exploit overestimated values.

        Where nothing terminates, an offset of all rewards is an offset of all values. Values then
        start at it, and their unit is the size of the rest: fully if the offset is 20 times the
        rewards' spread, not at all up to 5 times. Where something terminates, the offset is the
        value of staying alive, and is kept.

        Args:
            reward: ``[N, 1]``.
            discount: Over one transition; ``None`` if some of them terminate.
            taken: State ``[N, D]``, context ``[N, C]`` and action ``[N, *]``.
            next_state: ``[N, D]``.
        """
        reward = reward.double()
        std, mean = torch.std_mean(reward, correction=0)
        warn_of_outliers("reward", reward, mean, torch.where(std > 0, std, 1.0))
        # Rewards that differ only by float32 rounding are the same.
        std = torch.where(std > 1e-6 * reward.abs().amax(), std, 0.0)
        rew_func = self._parts[2]
        if isinstance(rew_func, ScalarHead) and self._trains(rew_func):
            rew_func.fit_inputs(*taken, *((next_state,) if needs_next_state(rew_func) else ()))
            if _may_rescale(rew_func):
                rew_func.rescale(mean, torch.where(std > 0, std, _size(reward)))
        offset = forever = torch.zeros_like(mean)
        if discount is not None and discount < 1.0:
            share = ((mean.abs() - 5.0 * std) / (15.0 * std)).clamp(0.0, 1.0)
            offset = torch.where(std > 0, share * mean, 0.0)
            forever = offset / (1.0 - discount)
        val_func = self._values[0]
        if not isinstance(val_func, ScalarHead) or not self._trains(val_func):
            return
        for head in self._values:
            if isinstance(head, ScalarHead):
                head.fit_inputs(*taken)
                if _may_rescale(val_func):
                    head.rescale(forever, _size(reward - offset))


def _may_rescale(head: ScalarHead) -> bool:
    """Whether the last layer, which compensates a change of scale, may change."""
    return all(p.requires_grad for p in head.net[-1].parameters())


def _size(reward: Tensor) -> Tensor:
    """Return the root mean square, or 1 if all rewards are 0."""
    size = reward.square().mean().sqrt()
    return torch.where(size > 0, size, 1.0)
