"""Learning from data as people have it: of any unit, sparse, padded, replaced, renamed.

The tests of units and of sparse changes learn; the others look at what is drawn and kept.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    HERReplayBuffer,
    ImmutableDatasetWriter,
    LazyTensorStorage,
    OneHot,
    ReplayBuffer,
    ReplayBufferEnsemble,
    TensorDictReplayBuffer,
    TensorStorage,
    Unbounded,
)

from layeredrl_torchrl import (
    BootstrappedBatches,
    ModelLoss,
    PredictorFactory,
    TransitionSlices,
)
from layeredrl_torchrl.predictors._experience import Experience

SMALL = {"batch_size": 8, "model_batch_size": 8, "n_total_env_steps": 0}


def experience(predictor, buffer, **options):
    keys, form = predictor.predictor_loss.tensor_keys, predictor.model.action_form
    return Experience(buffer, predictor.encoder, form, keys, **options)


# -- units ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "offset"), [(1e-6, 0.0), (1e-6, 1e4), (1.0, -100.0), (1e6, 0.0), (1e6, 1e4)]
)
def test_rewards_of_any_unit_are_learned_alike(
    make_predictor, make_transitions, make_buffer, scale, offset
):
    """``offset`` is in units of ``scale``: what is left of a reward's digits is its spread."""
    data = make_transitions(500)
    reward = scale * (offset + data["observation"][:, :1] + data["action"])
    data["next", "reward"] = reward
    predictor = make_predictor(hidden=(32,), val_func=None)
    predictor.learn(make_buffer(data), 200, 64, 8, 0)
    error = predictor.predict_reward(data["observation"], data["action"]) - reward[:, 0]
    assert error.square().mean().sqrt() < 0.15 * reward.std()


def test_an_untrained_head_starts_at_the_mean(make_predictor, make_transitions, make_buffer):
    data = make_transitions(100)
    data["next", "reward"] += 1e3
    predictor = make_predictor(reward_lr=0.0)
    predictor.learn(make_buffer(data), 1, **SMALL)
    expected = torch.full((100,), data["next", "reward"].mean().item())
    said = predictor.predict_reward(data["observation"], data["action"])
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=0)


def test_changes_that_are_seldom_are_learned():
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
    predictor.learn(buffer, 400, 8, 128, 0)
    guess = predictor.predict(obs, action)[0].mean((-3, -2)).argmax(-1)
    assert (guess == after).float().mean() > 0.99


# -- what is drawn ----------------------------------------------------------------------------


@pytest.mark.parametrize("batches", ["held out", "bootstrapped"])
def test_what_recurs_is_left_out_here_and_there_but_not_everywhere(
    make_predictor, make_transitions, make_buffer, batches
):
    few = make_transitions(8)
    buffer = make_buffer(few.repeat(50))
    rows = experience(make_predictor(), buffer, holdout_share=0.5).sample(5000)
    if batches == "held out":
        left_out = experience(make_predictor(), buffer, holdout_share=0.5)
        seen = left_out.held_out(5000)["state"].unique(dim=0)
        assert 100 < len(left_out.held_out(5000)) < 300  # of 400, each once
        kept = left_out.model_batches(
            make_predictor().model_loss, BootstrappedBatches(), n_rows=2000, n_ahead=1
        )
        state = next(kept)
        trained = state.state[0][state.weight[0] > 0].unique(dim=0)
        assert len(seen) == len(trained) == 8
    else:
        weight = BootstrappedBatches().assign(rows.clone(), 2)["weight"]
        places = rows["storage_index"].reshape(2, -1)
        for m in range(2):
            assert 0.2 < (weight[m] == 0).float().mean() < 0.55  # exp(-1)
            assert len((places[m][weight[m] > 0] % 8).unique()) == 8


def test_padding_is_never_drawn_and_ends_a_slice(make_predictor, make_transitions):
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
    predictor.learn(buffer, 3, **SMALL)
    real = data["observation"][mask].mean(0)
    assert (predictor.model.scaling.state.loc - real).abs().max() < 1.0
    data["collector", "mask"].zero_()
    buffer.empty()
    buffer.extend(data)
    with pytest.raises(ValueError, match="padding"):
        TransitionSlices(buffer).sample(3, 1)


@pytest.mark.parametrize("how", ["another buffer", "refilled", "overwritten", "rescaled rewards"])
def test_statistics_follow_the_data(make_predictor, make_transitions, make_buffer, how):
    data, other = make_transitions(60), make_transitions(60)
    other["observation"] += 50.0
    other["next", "observation"] += 50.0
    other["next", "reward"] *= 7.0
    if how == "rescaled rewards":
        other = data.clone()
        other["next", "reward"] *= 7.0
    buffer = make_buffer(data, capacity=60)
    predictor = make_predictor()
    predictor.learn(buffer, 1, **SMALL)
    if how == "overwritten":
        buffer.extend(other)
    elif how == "another buffer":
        buffer = make_buffer(other, capacity=60)
    else:
        buffer.empty()
        buffer.extend(other)
    predictor.learn(buffer, 1, **SMALL)
    scale = other["next", "reward"].std()
    assert predictor.rew_func.out_scale.item() == pytest.approx(scale.item(), rel=0.3)
    loc = other["observation"].mean(0)
    assert (predictor.model.scaling.state.loc - loc).abs().max() < 1.0


def test_statistics_are_kept_while_the_data_are(make_predictor, make_buffer, make_transitions):
    data = make_transitions(60)
    buffer, predictor = make_buffer(data, capacity=1000), make_predictor()
    predictor.learn(buffer, 1, **SMALL)
    before = predictor.model.scaling.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    buffer.extend(make_transitions(5))
    predictor.learn(buffer, 1, **SMALL)
    torch.testing.assert_close(predictor.model.scaling.state_dict(), before, rtol=0, atol=0)


# -- buffers ------------------------------------------------------------------------------------


def test_a_data_set_that_cannot_be_written_to_is_learned(make_predictor, make_transitions):
    storage = TensorStorage(make_transitions(60))
    buffer = TensorDictReplayBuffer(storage=storage, writer=ImmutableDatasetWriter(), batch_size=32)
    assert make_predictor().learn(buffer, 2, **SMALL)[1]["n_updates"] == 2.0


class Flipping(TensorDictReplayBuffer):
    def _sample(self, *args, **kwargs):
        data, info = super()._sample(*args, **kwargs)
        return -data, info


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: HERReplayBuffer(lambda td: td["reward"], **k),
        Flipping,
        lambda **k: ReplayBufferEnsemble(TensorDictReplayBuffer(**k)),
        lambda storage: TensorDictReplayBuffer(batch_size=16),
    ],
    ids=["hindsight", "own", "ensemble", "default storage"],
)
def test_what_would_be_passed_over_is_refused(make_predictor, unchanged, make):
    buffer = make(storage=LazyTensorStorage(100))
    predictor = make_predictor()
    with unchanged(predictor), pytest.raises(TypeError, match=r"buffer: got .*storage"):
        predictor.learn(buffer, 2, **SMALL)


def test_several_steps_in_one_are_refused(make_predictor, make_transitions, make_buffer, unchanged):
    data, predictor = make_transitions(60), make_predictor()
    data["steps_to_next_obs"] = torch.full((60, 1), 3)
    with unchanged(predictor), pytest.raises(ValueError, match=r"3 steps.*MultiStep.*n_steps"):
        predictor.learn(make_buffer(data), 2, **SMALL)


# -- names, dtypes, modes -------------------------------------------------------------------------


def test_renamed_and_nested_keys_learn_the_same(make_transitions):
    names = [("observation", "action"), (("agents", "see"), ("agents", "do"))]
    found = []
    for observation, action in names:
        torch.manual_seed(0)
        data = make_transitions(60)
        data = data.rename_key_("observation", observation).rename_key_("action", action)
        data["next"].rename_key_("observation", observation)
        buffer = ReplayBuffer(storage=LazyTensorStorage(60))
        buffer.extend(data)
        space = Composite(shape=())
        space[observation] = Unbounded((2,))
        factory = PredictorFactory(
            hidden_sizes=(8,), n_models=2, observation_key=observation, action_key=action
        )
        predictor = factory(space, Bounded(-1.0, 1.0, (1,)))
        found.append(predictor.learn(buffer, 3, **SMALL)[1])
        imagined = predictor(data.clone())
        assert imagined["next", "reward"].shape == (60, 1)
        assert predictor.in_keys == [observation, action]
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_predictor_that_was_cast_learns_and_predicts(make_predictor, make_buffer, dtype):
    predictor = make_predictor().to(dtype)
    predictor.learn(make_buffer(), 2, **SMALL)
    mean = predictor.predict(torch.randn(4, 2), torch.zeros(4, 1))[0]
    assert mean.dtype == dtype
    assert mean.isfinite().all()


def test_the_default_dtype_of_a_script_is_not_that_of_a_predictor(make_predictor, make_buffer):
    predictor, buffer = make_predictor(), make_buffer()
    torch.set_default_dtype(torch.float64)
    try:
        predictor.learn(buffer, 2, **SMALL)
        assert predictor.predict_reward(torch.zeros(3, 2), torch.zeros(3, 1)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_learning_turns_gradients_on_by_itself(make_predictor, make_buffer, mode):
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        predictor, buffer = make_predictor(), make_buffer()
        with (
            mode(mode=bool(found))
            if mode is torch.inference_mode
            else torch.set_grad_enabled(not found)
        ):
            found.append(predictor.learn(buffer, 3, **SMALL)[1])
    assert found[0] == found[1]


@pytest.mark.parametrize("spec", [Categorical(3), OneHot(3)])
def test_choices_in_any_form_are_one_choice(make_ensemble, spec):
    """Integers with and without a last axis, and one-hot rows, in the loss and the calibration."""
    index, state = torch.randint(3, (40,)), torch.randn(40, 2)
    forms = [index, index.unsqueeze(-1), F.one_hot(index, 3), F.one_hot(index, 3).float()]
    found = []
    for action in forms:
        torch.manual_seed(0)
        model = make_ensemble(action_space=spec)
        context, after = state[:, :0], {"state": 0.9 * state, "terminated": torch.zeros(40, 1)}
        model.fit_statistics(state, context, action, after["state"])
        model.calibrate(state, context, action, after["state"])
        batch = {"state": state, "context": context, "action": action, "next": after}
        found.append(ModelLoss(model)(TensorDict(batch, [40])).to_dict())
        found[-1]["calibration"] = model.calibration.shift
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


# -- bad numbers --------------------------------------------------------------------------------


BAD_ROWS = {
    "NaN next state": (("next", "state"), float("nan")),
    "infinite state": ("state", float("inf")),
    "NaN action": ("action", float("nan")),
    "NaN termination": (("next", "terminated"), float("nan")),
    "termination of 2": (("next", "terminated"), 2.0),
    "NaN weight": ("weight", float("nan")),
    "negative weight": ("weight", -1.0),
}


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("mask", [None, "valid", ("collector", "mask")])
def test_bad_rows_of_a_loss_are_refused_unless_they_are_masked(make_ensemble, name, mask):
    key, value = BAD_ROWS[name]
    state = torch.randn(6, 2)
    rows = {
        "state": state,
        "context": state[:, :0],
        "action": torch.zeros(6, 1),
        "weight": torch.ones(6),
        "next": {"state": state, "terminated": torch.zeros(6, 1)},
    }
    batch = TensorDict(rows, [6])
    loss = ModelLoss(make_ensemble())
    expected = loss(batch[1:].clone())
    batch[key][0] = value
    if mask is None or key == "weight":
        with pytest.raises(ValueError, match=r"finite|lie in|at least 0"):
            loss(batch)
        return
    batch[mask] = (torch.arange(6) > 0).unsqueeze(-1)
    found = loss(batch)
    found["loss_dynamics"].backward()
    torch.testing.assert_close(found.detach(), expected.detach())
    assert all(p.grad.isfinite().all() for p in loss.parameters() if p.grad is not None)


@pytest.mark.parametrize("part", ["model", "predictor"])
def test_weights_that_are_not_finite_or_of_another_size_are_not_loaded(
    make_predictor, unchanged, part
):
    predictor = make_predictor()
    module = predictor.model if part == "model" else predictor
    saved = {name: value.clone() for name, value in module.state_dict().items()}
    name = next(n for n, _ in module.named_parameters())
    saved[name].view(-1)[0] = float("nan")
    other = make_predictor(hidden=(9,))
    other = other.model if part == "model" else other
    with unchanged(module):
        with pytest.raises(ValueError, match=f"not finite.*{name}"):
            module.load_state_dict(saved)
        with pytest.raises(ValueError, match=r"does not fit.*sizes it was saved with"):
            module.load_state_dict(other.state_dict())
