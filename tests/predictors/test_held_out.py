"""What is held out of a buffer, what statistics are from, and when the model is calibrated."""

from __future__ import annotations

import pytest
import torch
from helpers import make_buffer, make_predictor, make_transitions, unchanged
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_torchrl import BootstrappedBatches, EncoderNet, IdentityEncoder
from layeredrl_torchrl.predictors._experience import Experience


def experience(data, share, buffer=None, **options):
    predictor = make_predictor(**options)
    keys, form = predictor.predictor_loss.tensor_keys, predictor.model.action_form
    drawn = Experience(
        buffer or make_buffer(data), predictor.encoder, form, keys, holdout_share=share
    )
    return predictor, drawn


@pytest.mark.parametrize("weighted", [False, True])
def test_each_place_that_counts_is_held_out_once(weighted):
    """The first and the last place, too."""
    data = make_transitions(30)
    if weighted:
        data["weight"] = torch.arange(30) % 3 / 2.0
    _, drawn = experience(data, 0.9999)
    expected = [place for place in range(30) if not weighted or place % 3]
    assert drawn.held_out(3000)["storage_index"].tolist() == expected


def test_what_is_held_out_does_not_depend_on_the_members_bootstrap_samples():
    predictor, drawn = experience(make_transitions(900), 0.5, model={"n_models": 5})
    batch = next(drawn.model_batches(predictor.model_loss, BootstrappedBatches(), 10_000, 1))
    # Poisson(1) on average, of the half that is not held out.
    torch.testing.assert_close(batch.weight.mean(1), torch.full((5,), 0.5), atol=0.15, rtol=0)


@pytest.mark.parametrize(("obs_dim", "expected"), [(2, 5000), (10_000, 2000), (1_000_000, 100)])
def test_fewer_large_observations_are_drawn_at_once(obs_dim, expected):
    keys = make_predictor().predictor_loss.tensor_keys
    drawn = Experience(make_buffer(), IdentityEncoder((obs_dim,)), None, keys, holdout_share=0.0)
    assert drawn.at_most(5000) == expected


def test_the_model_is_calibrated_at_every_200th_update():
    predictor, drawn = experience(make_transitions(60), 0.5)
    predictor.upkeep.refit(drawn)
    before = predictor.model.calibration(torch.ones(2, 1, 2))
    for n_updates, calibrated in ((199, False), (1, True), (199, True), (1, True)):
        left = int(predictor.upkeep.n_since_calibration)
        predictor.upkeep.calibrate(drawn, n_updates)
        assert int(predictor.upkeep.n_since_calibration) == (left + n_updates) % 200
        after = predictor.model.calibration(torch.ones(2, 1, 2))
        assert torch.equal(after, before) != calibrated


@pytest.mark.parametrize("seed", range(8))
def test_statistics_see_what_happened_once(seed):
    """A third of the places is missed by as many draws with replacement."""
    torch.manual_seed(seed)
    data = make_transitions(400)
    data["next", "reward"] += 100.0
    data["next", "terminated"][200] = True  # so an offset is the worth of staying alive
    data["observation"][:, 1], data["next", "observation"][:, 1] = 0.0, 0.0
    data["next", "observation"][300, 1] = 1.0  # a door that opens
    predictor, drawn = experience(data, 0.0, encoder=EncoderNet((2,), 2, 0))
    predictor.upkeep.refit(drawn)
    assert predictor.val_func.out_loc == 0.0
    assert predictor.encoder.mask.all()
    torch.testing.assert_close(predictor.rew_func.out_loc, data["next", "reward"].mean())


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_each_place_that_is_no_padding_is_looked_at_once(ndim, padded):
    data = make_transitions(30)
    if padded:
        data["collector", "mask"] = torch.arange(30) % 4 != 3
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(50, ndim=ndim))
    buffer.extend(data if ndim == 1 else data.reshape(2, 15))
    _, drawn = experience(None, 0.0, buffer)
    rows = drawn.overview(30)
    # Lanes are interleaved in memory: time first.
    stored = data if ndim == 1 else data.reshape(2, 15).transpose(0, 1).reshape(-1)
    kept = torch.arange(30)
    if padded:
        kept = kept[stored["collector", "mask"]]
    assert rows["storage_index"].tolist() == kept.tolist()
    assert torch.equal(rows["observation"], stored["observation"][kept])
    assert len(drawn.overview(29)) == 29  # draws


@pytest.mark.parametrize("shape", [(60,), (60, 1)])
def test_the_models_units_are_those_of_the_rows_that_count(shape):
    """Reward and value learn from the others, too."""
    data = make_transitions()
    data["weight"] = (torch.arange(60) % 3).float().reshape(shape)
    least = data["weight"].reshape(60) > 0
    data["observation"][~least] += 1e3
    data["next", "observation"][~least] -= 1e3
    predictor, drawn = experience(data, 0.0)
    predictor.upkeep.refit(drawn)
    state, change = data["observation"], data["next", "observation"] - data["observation"]
    found = predictor.model.scaling
    torch.testing.assert_close(found.state.loc, state[least].mean(0))
    torch.testing.assert_close(found.target.scale, change[least].std(0, correction=0))
    torch.testing.assert_close(predictor.delta_standardizer.loc, change[least].mean(0))
    for head in (predictor.rew_func, predictor.val_func):
        torch.testing.assert_close(head.inputs.loc[:2], state.mean(0))


def test_rows_none_of_which_counts_leave_the_models_units_alone():
    data = make_transitions()
    data["weight"] = torch.zeros(60)
    predictor, drawn = experience(data, 0.0)
    with unchanged(predictor.model, predictor.delta_standardizer):
        predictor.upkeep.refit(drawn)
    assert predictor.rew_func.inputs.loc.any()
