"""From stored transitions to the batches that the dynamics model learns from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from layeredrl_torchrl.objectives import TransitionSlices
from layeredrl_torchrl.objectives.batches import fingerprint, hashed_uniform
from layeredrl_torchrl.objectives.model_loss import ModelInputs
from layeredrl_torchrl.objectives.predictor_loss import PreparedSlices
from layeredrl_torchrl.specs import canonical_action

if TYPE_CHECKING:
    from layeredrl_torchrl.predictors.reward import RewardPredictor

__all__ = [
    "encode_transitions",
    "entry",
    "held_out",
    "held_out_transitions",
    "model_batches",
    "slice_batches",
]


def entry(batch: TensorDictBase, key: NestedKey) -> Tensor:
    """What ``batch``, sampled from the buffer, has under ``key``; ``KeyError`` if nothing."""
    value = batch.get(key, None)
    if value is None:
        names = sorted(map(str, batch.keys(True, True)))
        raise KeyError(
            f"the buffer has no entry {key!r}; it has {names}. Name the one to read with "
            "predictor_loss.set_keys()"
        )
    return value


@torch.no_grad()
def encode_transitions(predictor: RewardPredictor, batch: TensorDictBase) -> TensorDict:
    """The model's inputs and targets ``[N]`` of stored transitions ``[N]``.

    Raises:
        KeyError: An entry that the buffer does not have.
        TypeError, ValueError: As the encoder and
            :func:`~layeredrl_torchrl.specs.canonical_action` raise them.
    """
    keys = predictor.predictor_loss.tensor_keys
    observation, stored_action = entry(batch, keys.observation), entry(batch, keys.action)
    next_observation = entry(batch, keys.next_observation)
    state, context = predictor.encoder(observation)
    next_state, _ = predictor.encoder(next_observation)
    action = canonical_action(predictor.model.action_spec, stored_action, batch.batch_size)
    return TensorDict(
        {
            "state": state,
            "context": context,
            "action": action,
            "fingerprint": fingerprint(observation, stored_action, next_observation),
            "next": {"state": next_state, "terminated": entry(batch, keys.terminated)},
        },
        batch_size=batch.batch_size,
    )


def held_out(predictor: RewardPredictor, fingerprints: Tensor) -> Tensor:
    """Which transitions the model is not trained on: a fixed share, by their content."""
    return hashed_uniform(fingerprints, salt=-2) < predictor.holdout_share


def held_out_transitions(
    predictor: RewardPredictor, slices: TransitionSlices, n_sampled: int
) -> TensorDict:
    """Those of ``n_sampled`` transitions that are held out, each once; may be none."""
    data = encode_transitions(predictor, slices.sample(n_sampled, 1)[:, 0])
    data = data[held_out(predictor, data.get("fingerprint"))]
    # Drawn with replacement: each transition counts once.
    _, first = np.unique(data.get("fingerprint").cpu().numpy(), return_index=True)
    return data[torch.from_numpy(first)]


def model_batches(
    predictor: RewardPredictor, slices: TransitionSlices, n_rows: int, n_ahead: int
) -> Iterator[ModelInputs]:
    """Batches for the model without end, each with something that counts for a member.

    Args:
        predictor: Whose model learns.
        slices: The buffer.
        n_rows: Transitions of a batch, for all members together.
        n_ahead: Batches that are drawn, encoded and checked at once.

    Raises:
        ValueError: A hundred draws in a row of which nothing counts.
    """
    n_missed = 0
    while n_missed < 100:
        data = encode_transitions(predictor, slices.sample(n_rows * n_ahead, 1)[:, 0])
        if predictor.holdout_share:
            data.set("valid", ~held_out(predictor, data.get("fingerprint")))
        batch = predictor.member_batches.assign(data, predictor.model.n_models)
        valid, weight = batch.get("valid", None), batch.get("weight", None)
        counts = torch.ones(batch.shape, dtype=torch.bool) if valid is None else valid
        if weight is not None:
            counts = counts.to(weight.device) & (weight > 0)
        useful = counts.unflatten(1, (n_ahead, -1)).any(-1).any(0).tolist()
        if not any(useful):
            n_missed += 1
            continue
        n_missed = 0
        inputs = predictor.model_loss.prepare(batch).split(batch.shape[1] // n_ahead)
        yield from (one for one, use in zip(inputs, useful, strict=True) if use)
    raise ValueError(
        f"none of the transitions sampled count for the model: all are held out with "
        f"holdout_share={predictor.holdout_share}, or left out by member_batches; lower the share, "
        "or collect more data"
    )


def slice_batches(
    predictor: RewardPredictor, slices: TransitionSlices, batch_size: int, n_ahead: int
) -> Iterator[PreparedSlices]:
    """Batches of slices for reward, value and encoder without end; arguments as above."""
    loss = predictor.predictor_loss
    while True:
        drawn = slices.sample(batch_size * n_ahead, loss.k_steps + loss.n_steps)
        yield from loss.prepare(drawn).split(batch_size)
