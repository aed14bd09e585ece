"""The updates of one call of :meth:`RewardPredictor.learn`."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from layeredrl_torchrl import _reporting as reporting
from layeredrl_torchrl.objectives import TransitionSlices
from layeredrl_torchrl.objectives.model_loss import ModelInputs
from layeredrl_torchrl.objectives.predictor_loss import PreparedSlices
from layeredrl_torchrl.predictors import upkeep
from layeredrl_torchrl.predictors.early_stopping import EarlyStopping, HoldoutWatch
from layeredrl_torchrl.predictors.optim import annealing, gradient_norms
from layeredrl_torchrl.predictors.transitions import model_batches, slice_batches

if TYPE_CHECKING:
    from layeredrl_torchrl.predictors.reward import RewardPredictor

__all__ = ["check_schedule", "gradient_step", "run_updates"]


# Batches that are drawn and prepared at once: for small ones it is most of an update's time.
N_AHEAD = 8


def _moves(predictor: RewardPredictor) -> bool:
    """Whether the encoder learns."""
    return predictor.learn_encoder and any(p.requires_grad for p in predictor.encoder.parameters())


def check_schedule(predictor: RewardPredictor) -> None:
    """Refuse a warm-up and early stopping that cannot do what they are for."""
    moves = _moves(predictor)
    if predictor.encoder_warm_up and not (moves and isinstance(predictor.rew_func, nn.Module)):
        raise ValueError(
            f"encoder_warm_up={predictor.encoder_warm_up} trains reward function and encoder, but "
            "one of them has nothing to train; leave it at 0, or give an EncoderNet, "
            "learn_encoder=True and a reward module"
        )
    if predictor.early_stopping is None:
        return
    if not isinstance(predictor.early_stopping, EarlyStopping):
        raise TypeError(
            "early_stopping must be an EarlyStopping or None, got "
            f"{type(predictor.early_stopping).__name__}"
        )
    if not predictor.holdout_share:
        raise ValueError("early_stopping looks at held-out transitions; raise holdout_share")
    if moves:
        raise ValueError(
            "early_stopping needs states that stay the same, but the encoder learns; pass "
            "learn_encoder=False"
        )


def run_updates(
    predictor: RewardPredictor,
    slices: TransitionSlices,
    n_updates: int,
    batch_size: int,
    model_batch_size: int,
    rates: dict[str, float],
    bar: str | None,
) -> tuple[Tensor, dict[str, float]]:
    """Update all parts; returns the mean loss and the terms.

    Args:
        predictor: Whose parts are updated.
        slices: The buffer.
        n_updates: How often.
        batch_size: Slices in a batch.
        model_batch_size: Transitions in a batch for the model.
        rates: Learning rate of each group of the optimizer.
        bar: What the progress bar is called; ``None`` for no bar.
    """
    n_rows = predictor.member_batches.n_rows(model_batch_size, predictor.model.n_models)
    stop = predictor.early_stopping
    watch = None if stop is None else HoldoutWatch(predictor, slices, upkeep.N_STATISTICS, stop)
    model_alone = all(group["name"] == "model" for group in predictor.optim.param_groups)
    # Updates of the warm-up that are left.
    warm_up = predictor.encoder_warm_up - int(predictor.n_learn_updates)
    n_ahead = min(N_AHEAD, n_updates)
    batches = slice_batches(predictor, slices, batch_size, n_ahead)
    # States that an encoder learns are old by the next update.
    for_model = model_batches(predictor, slices, n_rows, 1 if _moves(predictor) else n_ahead)
    totals: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    for i in reporting.updates(n_updates, totals, counts, bar=bar):
        if watch is not None and watch.stopped and model_alone:
            break
        if predictor.encoder_warm_up and i == warm_up:
            upkeep.update_statistics(predictor, slices, anew=True)
        for group in predictor.optim.param_groups:
            group["lr"] = rates[group["name"]]
            if group["name"] == "model":
                group["lr"] *= annealing(i, n_updates, predictor.model_lr_annealing)
        batch, model_batch = next(batches), None
        if i >= warm_up and not (watch is not None and watch.stopped):
            model_batch = next(for_model)
        terms = gradient_step(predictor, batch, model_batch, with_value=i >= warm_up)
        if watch is not None and model_batch is not None:
            watch.after_update()
        for name, value in terms.items():
            totals[name] = totals[name] + value if name in totals else value
        counts.update(terms.keys())
    info = {name: float(total) / counts[name] for name, total in totals.items()}
    info |= {"n_updates": float(counts["loss"]), "model_updates": float(counts["nll"])}
    if watch is not None:
        info["holdout_nll"] = watch.finish()
    return totals["loss"] / counts["loss"], info


def gradient_step(
    predictor: RewardPredictor,
    batch: PreparedSlices,
    model_batch: ModelInputs | None,
    *,
    with_value: bool,
) -> dict[str, Tensor]:
    """Take one gradient step; returns the detached terms.

    Args:
        predictor: Whose parts are updated.
        batch: For reward, value and encoder.
        model_batch: For the model; without, it is not updated.
        with_value: Whether the value function is updated.
    """
    if not with_value:
        batch = batch._replace(value=None)
    terms = predictor.predictor_loss.terms(batch)
    weights = {"loss_reward": predictor.rew_loss_weight}
    if with_value:
        weights["loss_value"] = predictor.value_loss_weight
    if model_batch is not None:
        terms |= predictor.model_loss.terms(model_batch)
        weights["loss_dynamics"] = predictor.consistency_loss_weight
        weights["loss_termination"] = (
            predictor.consistency_loss_weight * predictor.termination_loss_weight
        )
    loss = sum(weight * terms[name] for name, weight in weights.items() if name in terms)
    predictor.optim.zero_grad()
    loss.backward()
    grads, norms = gradient_norms(predictor.optim)
    # Read together: on a GPU every look waits for what is under way.
    value, *sizes = torch.stack([loss.detach(), *norms]).tolist()
    if not math.isfinite(value + sum(sizes)):
        raise ValueError(
            f"the loss is {value} ({ {k: v.item() for k, v in terms.items()} }) and the norms of "
            f"its gradients are {sizes}; it reached no parameter. Lower the learning rate or check "
            "the data's scale"
        )
    limit = predictor.clip_grad_max_norm
    for group, size in zip(grads, sizes, strict=True):
        if limit is not None and size > limit:
            torch._foreach_mul_(group, limit / size)
    predictor.optim.step()
    if model_batch is not None:
        predictor.model.update_average()
    if with_value:
        predictor.update_target()
    predictor.n_learn_updates += 1
    return {"loss": loss.detach(), **{name: value.detach() for name, value in terms.items()}}
