"""The ensemble's loss against a loop over members and rows, and against closed forms."""

from __future__ import annotations

import math
import re

import pytest
import torch
from densities import log_density
from model_batches import D, N, fit, gradients, make_batch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, OneHot

from layeredrl_torchrl import ModelLoss


def naive_loss(model, batch, per_member):
    """One member and one row at a time: sums over members of mean NLL and mean BCE."""
    dynamics = termination = 0.0
    loc, scale = model.scaling.target.loc, model.scaling.target.scale
    for m in range(model.n_models):
        rows = batch[m] if per_member else batch
        total = nll = bce = 0.0
        for row in rows.unbind(0):
            weight = float(row["weight"]) if "weight" in row.keys() else 1.0
            weight *= float(row["valid"]) if "valid" in row.keys() else 1.0
            inputs = (row[key].expand(model.n_models, 1, -1) for key in ("state", "context"))
            action = row["action"].expand(model.n_models, 1, *row["action"].shape)
            with torch.no_grad():
                (mean, std), modes, term = model.predict_members(*inputs, action)
            # from the state back to the units that the networks predict in
            delta = row["state"] if model.scaling.predict_delta else 0.0
            target = (row["next", "state"] - delta - loc) / scale
            mean, std = (mean[m, 0] - delta - loc) / scale, std[m, 0] / scale
            parts = zip(modes[m, 0].tolist(), mean.tolist(), std.tolist(), strict=True)
            p = float(term[m, 0])
            nll -= weight * log_density(target.tolist(), parts)
            bce -= weight * math.log(p if bool(row["next", "terminated"]) else 1.0 - p)
            total += weight
        dynamics, termination = dynamics + nll / total, termination + bce / total
    return dynamics, termination


CASES = [
    # options of the model, per_member, valid, weight
    ({"n_modes": 1}, False, False, False),
    ({"n_modes": 2}, True, True, False),
    ({"n_modes": 1}, True, True, True),
    ({"n_modes": 3}, False, True, True),
    ({"predict_delta": False}, False, False, True),
    ({"normalize_targets": False}, False, False, False),
    ({"normalize_inputs": False}, False, False, False),
    ({"action_space": OneHot(3)}, False, False, False),
    ({"action_space": Categorical(3)}, True, False, False),
]


@pytest.mark.parametrize(("options", "per_member", "valid", "weight"), CASES)
def test_the_loss_equals_a_loop_over_members_and_rows(
    make_ensemble, options, per_member, valid, weight
):
    model = fit(make_ensemble(context_dim=1, n_models=3, **options))
    batch = make_batch(model, (3, N) if per_member else (N,), valid, weight)

    out = ModelLoss(model, per_member=per_member, huber_std=None)(batch)

    dynamics, termination = naive_loss(model, batch, per_member)
    assert out["loss_dynamics"].item() == pytest.approx(dynamics, rel=1e-4)
    assert out["loss_termination"].item() == pytest.approx(termination, rel=1e-4)
    assert out["nll"].item() == pytest.approx(dynamics / 3 / D, rel=1e-4)
    assert out["termination_bce"].item() == pytest.approx(termination / 3, rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("garbage", [1e6, float("nan")])
@pytest.mark.parametrize("mask", ["valid", ("collector", "mask"), "mask"])
def test_rows_that_are_not_valid_have_no_influence(make_ensemble, mask, garbage, beta):
    model = make_ensemble(n_modes=2)
    batch = make_batch(model, valid=True)
    outside = ~batch["valid"]
    assert 0 < outside.sum() < N
    kept = batch[batch["valid"]].exclude("valid")
    batch = batch.exclude("valid").set(mask, batch["valid"])
    for key in ("state", "action", ("next", "state")):
        batch[key][outside] = garbage
    batch["next", "terminated"][outside] = True
    torch.testing.assert_close(gradients(model, batch, beta), gradients(model, kept, beta))


@pytest.mark.parametrize("space", [OneHot(3), Categorical(3), Categorical(3, (1,))])
def test_rows_that_are_not_valid_need_no_choice(make_ensemble, space):
    """Padding of one-hot actions is zeros, and of numbers often -1."""
    model = make_ensemble(action_space=space)
    batch = make_batch(model, valid=True)
    kept = batch[batch["valid"]].exclude("valid")
    batch["action"][~batch["valid"]] = 0 if isinstance(space, OneHot) else -1
    torch.testing.assert_close(gradients(model, batch), gradients(model, kept))


@pytest.mark.parametrize("space", [OneHot(3), Bounded(-1.0, 1.0, (1,))])
def test_a_member_may_have_padding_alone(make_ensemble, space):
    model = make_ensemble(n_models=2, action_space=space)
    batch = make_batch(model, (2, N), valid=True)
    alone = batch.clone()
    alone["valid"] = torch.ones(2, N, dtype=torch.bool)
    alone["valid"][1] = batch["valid"][1] = False
    alone["valid"][0] = batch["valid"][0]
    batch["action"][1] = 0 if isinstance(space, OneHot) else torch.nan
    loss = ModelLoss(model, per_member=True)
    torch.testing.assert_close(loss(batch).to_dict(), loss(alone).to_dict())


def test_float64_is_taken_as_far_as_the_model_can_tell_it_apart(make_ensemble):
    model = make_ensemble()
    batch = make_batch(model, (20,))
    wide = batch.apply(lambda x: x.double() if x.is_floating_point() else x)
    torch.testing.assert_close(gradients(model, wide), gradients(model, batch))
    state, action = wide["state"] + 1e9, wide["action"]
    wide["state"] = state
    match = r"dimension\(s\) \[0, 1\] of .*state.* vary by less than torch.float32 can tell apart"
    with pytest.raises(ValueError, match=match):
        ModelLoss(model)(wide)
    with pytest.raises(ValueError, match=match):
        model.predict(state, None, action)
    with pytest.raises(ValueError, match=match):
        model.rollout(state, None, action.unsqueeze(1))


@pytest.mark.parametrize("n", [1, 5])
def test_terminations_may_lack_their_last_axis(make_ensemble, n):
    model = make_ensemble()
    batch = make_batch(model, (n,))
    expected = gradients(model, batch)
    batch["next", "terminated"] = batch["next", "terminated"].squeeze(-1)
    torch.testing.assert_close(gradients(model, batch), expected)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("state", (N, D + 1)),
        ("state", (N, 1, D)),
        (("next", "state"), (N, 1)),  # which would broadcast
        ("action", (N, 2)),
        ("action", (N,)),
        (("next", "terminated"), (N, 2)),
    ],
)
def test_entries_of_another_shape_are_named(make_ensemble, key, shape):
    model = make_ensemble()
    batch = make_batch(model)
    batch[key] = torch.zeros(shape)
    name = str(key).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"ModelLoss: '?{name}'? has shape"):
        ModelLoss(model)(batch)


@pytest.mark.parametrize("shape", [(N,), (2, N), (2, 2)])
def test_mask_and_weights_may_keep_a_last_axis(make_ensemble, shape):
    model = make_ensemble(n_models=2)
    batch = make_batch(model, shape, valid=True, weight=True)
    loss = ModelLoss(model, per_member=len(shape) == 2)
    expected = loss(batch)
    for key in ("valid", "weight"):
        batch[key] = batch[key].unsqueeze(-1)
    torch.testing.assert_close(loss(batch).to_dict(), expected.to_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_terminations_may_be_zeros_and_ones_of_any_dtype(make_ensemble, dtype):
    loss = ModelLoss(make_ensemble())
    batch = make_batch(loss.model, (20,))
    assert {True, False} == set(batch["next", "terminated"].flatten().tolist())
    expected = loss(batch)
    batch["next", "terminated"] = batch["next", "terminated"].to(dtype)
    assert (loss(batch) == expected).all()


def test_it_is_the_loss_of_the_weights_under_training(make_ensemble):
    """Predictions may come from averaged weights; the loss does not."""
    model = make_ensemble(ema_decay=0.9)
    model.update_average()
    plain = make_ensemble(ema_decay=None)
    with torch.no_grad():
        for parameter in model.members.parameters():
            parameter.add_(0.3)
    plain.members.load_state_dict(model.members.state_dict())
    batch = make_batch(model)
    torch.testing.assert_close(ModelLoss(model)(batch).to_dict(), ModelLoss(plain)(batch).to_dict())


@pytest.mark.parametrize(
    ("per_member", "shape"), [(True, (3, N)), (True, (2, 2, N)), (False, (2, N)), (True, (N,))]
)
def test_a_batch_of_another_shape_is_refused(make_ensemble, per_member, shape):
    model = make_ensemble(n_models=2)
    batch = make_batch(model, shape, valid=True, weight=True)
    told = rf"per_member={per_member}\) takes a batch of shape .*got {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=told):
        ModelLoss(model, per_member=per_member)(batch)


@pytest.mark.parametrize("uncounted", ["valid", "weight"])
def test_a_batch_of_which_no_row_counts_is_refused(make_ensemble, uncounted):
    model = make_ensemble(n_models=2)
    batch = make_batch(model, valid=True, weight=True)
    batch[uncounted] = torch.zeros_like(batch[uncounted])
    with pytest.raises(ValueError, match="no transition"):
        ModelLoss(model)(batch)


NAN = float("nan")


def make_rows():
    """Six rows, of which each counts."""
    state = torch.randn(6, 2)
    rows = {"state": state, "context": state[:, :0], "action": torch.zeros(6, 1)}
    rows |= {"weight": torch.ones(6), "next": {"state": state, "terminated": torch.zeros(6, 1)}}
    return TensorDict(rows, [6])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (("next", "state"), NAN),
        ("state", float("inf")),
        ("action", NAN),
        (("next", "terminated"), NAN),
        (("next", "terminated"), 2.0),
    ],
)
def test_bad_rows_are_refused_unless_they_are_masked(make_ensemble, key, value):
    batch, loss = make_rows(), ModelLoss(make_ensemble())
    expected = loss(batch[1:].clone()).detach()
    batch[key][0] = value
    with pytest.raises(ValueError, match=r"finite|lie in"):
        loss(batch)
    batch["collector", "mask"] = (torch.arange(6) > 0).unsqueeze(-1)
    torch.testing.assert_close(loss(batch).detach(), expected)


@pytest.mark.parametrize("value", [NAN, float("inf"), -1.0])
def test_weights_that_no_row_can_have_are_refused(make_ensemble, value):
    batch, loss = make_rows(), ModelLoss(make_ensemble())
    loss(batch)
    batch["weight"][0] = value
    with pytest.raises(ValueError, match="'weight' must be finite and at least 0"):
        loss(batch)
