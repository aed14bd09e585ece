"""Learning from data as people have it: of any unit, sparse, padded, replaced, renamed.

The tests of units and of sparse changes learn; the others look at what is drawn and kept.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import learn, make_buffer, make_predictor, make_transitions
from tensordict import TensorDict
from torchrl.data import (
    Bounded,
    Categorical,
    ImmutableDatasetWriter,
    LazyTensorStorage,
    TensorDictReplayBuffer,
    TensorStorage,
    Unbounded,
)
from torchrl.envs.transforms import ObservationNorm, RenameTransform

from layeredrl_torchrl import BootstrappedBatches, PredictorFactory, TransitionSlices
from layeredrl_torchrl.objectives import OwnBatches
from layeredrl_torchrl.predictors._experience import Experience

# -- units ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "offset"), [(1e-6, 0.0), (1e-6, 1e4), (1.0, -100.0), (1e6, 0.0), (1e6, 1e4)]
)
def test_rewards_of_any_unit_are_learned_alike(scale, offset):
    """``offset`` is in units of ``scale``: what is left of a reward's digits is its spread."""
    data = make_transitions(500)
    reward = scale * (offset + data["observation"][:, :1] + data["action"])
    data["next", "reward"] = reward
    predictor = make_predictor(hidden=(32,), val_func=None)
    predictor.learn(make_buffer(data), 200, 64, 8, 0)
    error = predictor.predict_reward(data["observation"], data["action"]) - reward[:, 0]
    assert error.square().mean().sqrt() < 0.15 * reward.std()


@pytest.mark.parametrize("n_calls", [1, 40])
def test_changes_that_are_seldom_are_learned(n_calls):
    """Moves on a ring of one-hot states, of which most transitions show nothing but standing."""
    n_states, n_actions = 12, 4
    state, action = (torch.randint(n, (3000,)) for n in (n_states, n_actions))
    step = torch.tensor([1, -1, 0, 0])[action] * (state % 3 == 0)  # two thirds are held
    after = (state + step) % n_states
    obs, following = (F.one_hot(x, n_states).float() for x in (state, after))
    no = torch.zeros(3000, 1, dtype=torch.bool)
    done = {"reward": torch.zeros(3000, 1), "terminated": no, "done": no}
    data = TensorDict(
        {"observation": obs, "action": action, "next": {"observation": following, **done}}, [3000]
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(3000))
    buffer.extend(data)
    factory = PredictorFactory(hidden_sizes=(48, 48), n_models=2)
    predictor = factory(Unbounded((n_states,)), Categorical(n_actions))
    for _ in range(n_calls):  # each of which lets the variances settle at its end
        predictor.learn(buffer, 400 // n_calls, 8, 128, 0)
    guess = predictor.predict(obs, action)[0].mean((-3, -2)).argmax(-1)
    assert (guess == after).float().mean() > 0.99


@pytest.mark.parametrize("n_calls", [1, 30])
def test_a_switch_that_is_seldom_flipped_is_learned_beside_what_is_precise(n_calls):
    """One action in twenty flips it; all else of the likelihood is to be had from the drift."""
    n = 4000
    place, switch = torch.randn(n, 2), (torch.rand(n, 1) < 0.5).float()
    action = 2 * torch.rand(n, 1) - 1
    after = torch.cat([place + 0.1 * action, (switch - (action > 0.9).float()).abs()], -1)
    no = torch.zeros(n, 1, dtype=torch.bool)
    following = {"observation": after, "reward": 0.0 * action, "terminated": no, "done": no}
    now = {"observation": torch.cat([place, switch], -1), "action": action, "next": following}
    data = TensorDict(now, [n])
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(n))
    buffer.extend(data)
    predictor = PredictorFactory(hidden_sizes=(64, 64), n_models=2)(
        Unbounded((3,)), Bounded(-1.0, 1.0, (1,))
    )
    for _ in range(n_calls):
        predictor.learn(buffer, 1500 // n_calls, 8, 128, 0)
    mean = predictor.predict(data["observation"], data["action"])[0].mean((-3, -2))
    clear = (data["action"][:, 0] - 0.9).abs() > 0.03
    wrong = ((mean[:, 2] > 0.5) != (after[:, 2] > 0.5)) & clear
    assert wrong.float().mean() < 0.015  # 0.03 by never flipping it
    assert (mean - after)[clear, :2].square().mean().sqrt() < 0.01  # of steps of 0.06


@pytest.mark.parametrize("reward", ["dense", "sparse"])
def test_a_broken_reward_is_named_and_a_sparse_one_is_not(reward):
    data = make_transitions(500)
    few = (torch.arange(500) % 450 == 7).unsqueeze(-1)
    data["next", "reward"] = torch.randn(500, 1) * (reward == "dense")
    data["next", "reward"][few] = 1e5
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_predictor(val_func=None).upkeep._rescale(
            data["next", "reward"][8:],
            None,
            (data["observation"][8:], data["observation"][8:, :0], data["action"][8:]),
            data["next", "observation"][8:],
        )
    found = [str(one.message) for one in caught if "make up the spread" in str(one.message)]
    assert [one.split(":")[0] for one in found] == ["reward"] * (reward == "dense")


# -- what is drawn ----------------------------------------------------------------------------


def test_what_recurs_is_held_out_here_and_there_but_not_everywhere():
    predictor, buffer = make_predictor(), make_buffer(make_transitions(8).repeat(50))
    keys, form = predictor.predictor_loss.tensor_keys, predictor.model.action_form
    drawn = Experience(buffer, predictor.encoder, form, keys, holdout_share=0.5)
    held_out = drawn.held_out(5000)
    assert 100 < len(held_out) < 300  # of 400, each once
    batches = drawn.model_batches(
        predictor.model_loss, BootstrappedBatches(), n_rows=2000, n_ahead=1
    )
    batch = next(batches)
    trained = batch.state[0][batch.weight[0] > 0]
    assert len(held_out["state"].unique(dim=0)) == len(trained.unique(dim=0)) == 8


def test_a_batch_is_of_use_where_a_row_is_valid_and_has_a_weight():
    """Four batches of two rows side by side, for two members."""
    valid = torch.tensor([[1, 0, 0, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0, 0, 0]]).bool()
    weight = torch.tensor([[0, 1, 1, 0, 0, 0, 1, 1], [1, 1, 1, 2, 0, 0, 0, 0.0]])
    for keys, expected in (
        ({"valid": valid, "weight": weight}, [False, True, False, True]),
        ({"valid": valid}, [True, True, False, True]),
        ({"weight": weight}, [True, True, False, True]),
        ({}, [True] * 4),
    ):
        assert Experience._useful(TensorDict(keys, [2, 8]), 4) == expected


def test_padding_is_never_drawn_and_ends_a_slice():
    """``[trajectory, time]`` as TorchRL pads it, with garbage where nothing happened."""
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [0], [5]])
    data = make_transitions(30, episode_length=6).reshape(5, 6)
    data["next", "observation"][:, :-1] = data["observation"][:, 1:]
    for key in ("observation", ("next", "observation"), ("next", "reward")):
        data[key][~mask] = float("nan")
    data["collector"] = {"mask": mask}
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100, ndim=2))
    buffer.extend(data)
    rows = TransitionSlices(buffer).sample(2000, 4)
    assert rows["observation"].isfinite().all()
    expected = mask.flip(1).cumsum(1).flip(1)[mask].clamp(max=4).float()  # steps left at each start
    assert rows["valid"].sum(1).float().mean() == pytest.approx(expected.mean().item(), rel=0.1)
    predictor = make_predictor(n_steps=2)
    learn(predictor, buffer)
    real = data["observation"][mask].mean(0)
    assert (predictor.model.scaling.state.loc - real).abs().max() < 1.0
    data["collector", "mask"].zero_()
    buffer.empty()
    buffer.extend(data)
    with pytest.raises(ValueError, match="padding"):
        TransitionSlices(buffer).sample(3, 1)


@pytest.mark.parametrize("shape", [(60,), (60, 1)])
def test_rows_that_are_stored_as_not_valid_are_left_out_everywhere(shape):
    """By statistics, by the losses and as the inside of slices, together with TorchRL's mask."""
    data = make_transitions(60)
    counts = (torch.arange(60) % 5 < 3).logical_and(torch.arange(60) != 0)
    data["valid"] = counts.reshape(shape)
    for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
        data[key][~counts] = float("nan")
    rows = TransitionSlices(make_buffer(data)).sample(2000, 2)
    assert rows["observation"].isfinite().all()
    assert rows["valid"].shape == (2000, 2)
    goes_on = counts[:-1] & counts[1:] & ~data["next", "done"][:-1, 0]
    goes_on &= (data["next", "observation"][:-1] == data["observation"][1:]).all(1)
    share = (goes_on.sum() / counts.sum()).item()
    assert rows["valid"][:, 1].float().mean().item() == pytest.approx(share, abs=0.05)
    predictor = make_predictor(n_steps=2)
    learn(predictor, make_buffer(data))
    real = data["observation"][counts]
    torch.testing.assert_close(predictor.model.scaling.state.loc, real.mean(0), atol=0.3, rtol=0)
    data["collector"] = {"mask": torch.arange(60) >= 30}
    both = TransitionSlices(make_buffer(data), index_key="at").sample(500, 1)["at"].unique()
    assert both.tolist() == [i for i in range(30, 60) if counts[i]]
    data["valid"].zero_()
    with pytest.raises(ValueError, match=r"no transition; check its mask, and .* valid"):
        learn(predictor, make_buffer(data))


def test_an_entry_of_that_name_that_is_no_mask_is_refused_with_the_way_out():
    data = make_transitions(60)
    data["valid"] = torch.zeros(60, 3)
    predictor = make_predictor()
    with pytest.raises(ValueError, match=r"'valid'.*no mask.*predictor_loss\.set_keys"):
        learn(predictor, make_buffer(data))
    predictor.predictor_loss.set_keys(valid="in_slice")
    learn(predictor, make_buffer(data))


@pytest.mark.parametrize("shape", [(60,), (60, 1)])
def test_weights_of_the_buffer_count_for_the_model(shape):
    data = make_transitions(60)
    data["weight"] = (torch.arange(60) % 3).float().reshape(shape)
    predictor, buffer = make_predictor(), make_buffer(data)
    keys, form = predictor.predictor_loss.tensor_keys, predictor.model.action_form
    drawn = Experience(buffer, predictor.encoder, form, keys, holdout_share=0.5)
    for batches in (OwnBatches(), BootstrappedBatches()):
        batch = next(drawn.model_batches(predictor.model_loss, batches, n_rows=400, n_ahead=1))
        row = (batch.state[0].unsqueeze(1) == data["observation"]).all(-1).int().argmax(1)
        counts = batch.weight[0] > 0
        assert counts.any()
        assert (row[counts] % 3 > 0).all()
        if isinstance(batches, BootstrappedBatches):
            continue
        assert torch.equal(batch.weight[0][counts], (row[counts] % 3).float())
    held_out = (drawn.held_out(500)["state"].unsqueeze(1) == data["observation"]).all(-1)
    assert (held_out.int().argmax(1) % 3 > 0).all()
    data["weight"][:20] = -1.0
    with pytest.raises(ValueError, match="'weight' must be finite and at least 0"):
        learn(predictor, make_buffer(data), n_updates=50)


HOW = ["another buffer", "a smaller buffer", "refilled", "overwritten", "rescaled rewards"]


@pytest.mark.parametrize("how", HOW)
def test_statistics_follow_the_data(how):
    data, other = make_transitions(60), make_transitions(60)
    other["observation"] += 50.0
    other["next", "observation"] += 50.0
    other["next", "reward"] *= 7.0
    if how == "rescaled rewards":
        other = data.clone()
        other["next", "reward"] *= 7.0
    buffer = make_buffer(data, capacity=60)
    predictor = make_predictor()
    learn(predictor, buffer)
    if how == "overwritten":
        buffer.extend(other)
    elif "buffer" in how:
        other = other[:40] if "smaller" in how else other
        buffer = make_buffer(other, capacity=len(other))
    else:
        buffer.empty()
        buffer.extend(other)
    learn(predictor, buffer)
    scale = other["next", "reward"].std()
    assert predictor.rew_func.out_scale.item() == pytest.approx(scale.item(), rel=0.3)
    loc = other["observation"].mean(0)
    assert (predictor.model.scaling.state.loc - loc).abs().max() < 1.0


@pytest.mark.parametrize("how", ["another transform", "terminations"])
def test_statistics_follow_what_is_read_of_the_same_rows(how):
    data = make_transitions(60, episode_length=1000)
    data["next", "reward"] = 50.0 + torch.randn(60, 1)
    buffer, predictor = make_buffer(data, capacity=60), make_predictor()
    learn(predictor, buffer)
    before = predictor.val_func.out_loc.clone()
    assert before > 1000.0  # an offset of all rewards, where nothing terminates
    if how == "another transform":
        both = ["observation", ("next", "observation")]
        transform = ObservationNorm(7.0, 1.0, in_keys=both, out_keys=both)
        buffer = TensorDictReplayBuffer(storage=buffer.storage, transform=transform)
        learn(predictor, buffer)
        loc = 7.0 + data["observation"].mean(0)
        assert (predictor.model.scaling.state.loc - loc).abs().max() < 1.0
        return
    buffer.empty()
    data["next", "terminated"][::3] = True
    buffer.extend(data)
    learn(predictor, buffer)
    assert predictor.val_func.out_loc == 0.0


def test_a_buffer_may_name_its_entries_by_a_transform():
    data = make_transitions(60)
    data["next", "gain"] = data["next"].pop("reward")
    buffer = make_buffer(data)
    buffer.append_transform(RenameTransform([("next", "gain")], [("next", "reward")]))
    assert learn(make_predictor(), buffer)["n_updates"] == 3.0


# -- buffers ------------------------------------------------------------------------------------


def test_a_data_set_that_cannot_be_written_to_is_learned():
    storage = TensorStorage(make_transitions(60))
    buffer = TensorDictReplayBuffer(storage=storage, writer=ImmutableDatasetWriter(), batch_size=32)
    assert learn(make_predictor(), buffer)["n_updates"] == 3.0
