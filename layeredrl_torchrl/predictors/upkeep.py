"""What :meth:`RewardPredictor.learn` keeps up to date beside the parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from torch import Tensor

from layeredrl_torchrl._checks import check_finite
from layeredrl_torchrl.nets import EncoderNet, ScalarHead
from layeredrl_torchrl.objectives import TransitionSlices
from layeredrl_torchrl.predictors.transitions import (
    encode_transitions,
    entry,
    held_out_transitions,
)

if TYPE_CHECKING:
    from layeredrl_torchrl.predictors.reward import RewardPredictor

# Statistics are taken from this many transitions, and again whenever the buffer was written to
# by another tenth of what had been written at the last time.
N_STATISTICS = 10_000
# Updates between two calibrations, at least.
CALIBRATE_EVERY = 200


@torch.no_grad()
def calibrate(predictor: RewardPredictor, slices: TransitionSlices, n_updates: int) -> None:
    """Fit the model's calibration if it was updated often enough since the last time.

    Args:
        predictor: Whose model is calibrated.
        slices: The buffer.
        n_updates: How often the model was updated since the last call of this function.
    """
    predictor.n_since_calibration += n_updates
    if not predictor.holdout_share or int(predictor.n_since_calibration) < CALIBRATE_EVERY:
        return
    data = held_out_transitions(predictor, slices, N_STATISTICS)
    if not len(data):
        return
    keys = ("state", "context", "action", ("next", "state"))
    predictor.model.calibrate(*(data.get(key) for key in keys))
    predictor.n_since_calibration.zero_()


@torch.no_grad()
def update_statistics(
    predictor: RewardPredictor, slices: TransitionSlices, *, anew: bool = False
) -> None:
    """Refit normalisers, output scales and the encoder's mask if the data has grown.

    Args:
        predictor: Whose statistics they are.
        slices: The buffer.
        anew: Whether to do it in any case.
    """
    n_written = slices.n_written
    last = 0 if anew else int(predictor.n_written_at_statistics)
    if last and last <= n_written and 10 * n_written < 11 * last:
        return
    batch = slices.sample(min(max(len(slices), 1), N_STATISTICS), 1)[:, 0]
    reward = _rewards(predictor, batch)
    keys = predictor.predictor_loss.tensor_keys
    encoder = predictor.encoder
    encode_transitions(predictor, batch)  # raises for bad data before anything is changed
    if isinstance(encoder, EncoderNet) and predictor.learn_encoder:
        encoder.update_mask(batch.get(keys.observation), batch.get(keys.next_observation))
    data = encode_transitions(predictor, batch)
    state, context, action = (data.get(key) for key in ("state", "context", "action"))
    next_state = data.get(("next", "state"))
    predictor.model.fit_statistics(state, context, action, next_state)
    if predictor.delta_standardizer is not None:
        predictor.delta_standardizer.fit(next_state - state)
    std, mean = torch.std_mean(reward, correction=0)
    rms = reward.square().mean().sqrt()
    unit = torch.where(rms > 0, rms, torch.ones_like(rms))
    if isinstance(predictor.rew_func, ScalarHead):
        predictor.rew_func.fit_inputs(state, context, action)
        predictor.rew_func.rescale(mean, torch.where(std > 1e-3 * rms, std, unit))
    # Returns are many rewards large, but a value function that starts at 0 and is told the size of
    # one reward grows up to them from below, and so stays modest where there is no data; planners
    # seek out states whose value is overrated.
    for head in (predictor.val_func, predictor.target_val_func):
        if isinstance(head, ScalarHead):
            head.fit_inputs(state, context, action)
            head.rescale(0.0, unit)
    predictor.n_written_at_statistics.fill_(n_written)


def _rewards(predictor: RewardPredictor, batch: TensorDictBase) -> Tensor:
    key = predictor.predictor_loss.tensor_keys.reward
    reward = entry(batch, key)
    if reward.shape != (len(batch), 1):
        raise ValueError(
            f"{key!r} has shape {tuple(reward.shape[1:])} in the buffer, expected (1,) for each "
            "transition (TorchRL's layout); unsqueeze or select it"
        )
    check_finite(str(key), reward, hint="repair the environment's rewards")
    return reward.float()
