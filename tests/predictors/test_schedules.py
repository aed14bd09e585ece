"""Options of learning: warm-up of the encoder, early stopping, weight decay, beta-NLL."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import (
    learn,
    make_buffer,
    make_predictor,
    make_transitions,
    moved,
    parameters,
    parts_moved,
    unchanged,
)
from torch import nn

from layeredrl_torchrl import EarlyStopping, EncoderNet, ModelTraining
from layeredrl_torchrl.predictors._experience import Experience

# -- warm-up of the encoder ---------------------------------------------------------------------


def warming(n, **options):
    predictor = make_predictor(EncoderNet((2,), 2, 0), encoder_warm_up=n, **options)
    nn.init.normal_(predictor.rew_func.net[-1].weight)  # at 0 no gradient passes to the encoder
    return predictor


def test_during_the_warm_up_only_reward_and_encoder_learn():
    predictor = warming(6, model_training=ModelTraining(weight_decay=0.1), beta_nll=0.0)
    buffer = make_buffer()
    learn(predictor, buffer, n_updates=1)  # takes the statistics
    nn.init.normal_(predictor.val_func.net[-1].weight)  # so that it differs from its target
    before = parameters(predictor)
    info = learn(predictor, buffer)
    assert parts_moved(predictor, before) == {"rew_func", "encoder"}
    assert int(predictor.model.n_averaged) == 0
    assert set(info) == {"loss", "loss_reward", "n_updates", "model_updates"}
    assert info["loss"] == pytest.approx(info["loss_reward"], rel=1e-6)
    assert (info["n_updates"], info["model_updates"]) == (3.0, 0.0)

    # Updates are counted over calls, also of a state that is loaded: two more, then all parts.
    resumed = warming(6, beta_nll=0.0)
    resumed.load_state_dict(predictor.state_dict())
    assert learn(resumed, buffer)["model_updates"] == 1.0
    info = learn(predictor, buffer)
    assert info["model_updates"] == 1.0
    assert int(predictor.model.n_averaged) == 1
    assert info["loss_dynamics"] == pytest.approx(2 * 2 * info["nll"], rel=1e-5)
    assert moved(predictor, before) == set(before)
    assert learn(predictor, buffer)["model_updates"] == 3.0


def test_the_loss_of_a_warm_up_is_averaged_over_its_own_updates():
    """A mean over three updates of a term that one of them has would be a third of it."""
    buffer = make_buffer()
    runs = []
    for n_updates, warm_up in ((3, 2), (1, 0)):
        torch.manual_seed(0)
        predictor = warming(warm_up, model_lr=0.0, value_lr=0.0)
        runs.append(learn(predictor, buffer, n_updates=n_updates))
    assert runs[0]["termination_bce"] == pytest.approx(runs[1]["termination_bce"], rel=0.5)


def test_statistics_are_taken_anew_when_it_is_over():
    """The model starts on states that are not those that the statistics were from."""
    predictor = warming(10, encoder_lr=lambda n_steps: 0.3 if n_steps == 0 else 0.0)
    data = make_transitions(400)
    buffer = make_buffer(data)

    def mismatch():
        state, _ = predictor.encode(data["observation"])
        return (predictor.model.scaling.state.scale / state.std(0)).log().abs().max().item()

    learn(predictor, buffer, n_updates=10, n_total_env_steps=0)
    assert mismatch() > 0.3
    learn(predictor, buffer, n_updates=1, n_total_env_steps=1)
    assert mismatch() < 0.1


# -- early stopping -----------------------------------------------------------------------------


def stopping(patience=5, every=100, min_delta=0.0, **options):
    stop = EarlyStopping(patience=patience, every=every, min_delta=min_delta)
    return make_predictor(model_training=ModelTraining(early_stopping=stop), **options)


def test_without_a_gain_the_model_stops_and_the_others_go_on():
    predictor, buffer = stopping(3, 4, model_lr=0.0), make_buffer()
    before = parameters(predictor)
    for _ in range(2):  # the next call starts afresh
        info = learn(predictor, buffer, n_updates=30)
        assert (info["n_updates"], info["model_updates"]) == (30.0, 12.0)
    assert parts_moved(predictor, before) == {"rew_func", "val_func", "target_val_func"}
    assert learn(predictor, buffer, n_updates=11)["model_updates"] == 11.0


def test_with_nothing_else_to_learn_the_call_ends():
    predictor = stopping(2, 5, rew_func=None, val_func=None, model_lr=0.0)
    info = learn(predictor, make_buffer(), n_updates=1000)
    assert info["n_updates"] == info["model_updates"] == 10.0
    assert int(predictor.n_learn_updates) == 10


@pytest.mark.parametrize("n_before", [20, 0])
@pytest.mark.parametrize("n_updates", [40, 7])
def test_a_model_that_got_worse_is_put_back_with_its_moments(n_before, n_updates):
    """Whether it stopped, or the call ended between two looks; at first there are no moments."""
    rates = {"model_lr": lambda n_steps: 1e-3 if n_steps == 0 else 1.0}
    predictor, buffer = stopping(2, 5, **rates), make_buffer()
    if n_before:
        learn(predictor, buffer, n_updates=n_before, n_total_env_steps=0)
    model = list(predictor.model.parameters())

    def moments():
        states = [predictor.optim.state[p] for p in model if p in predictor.optim.state]
        return [{name: value.clone() for name, value in state.items()} for state in states]

    kept, before = moments(), parameters(predictor.model)
    assert bool(kept) == bool(n_before)
    n_averaged = int(predictor.model.n_averaged)
    info = learn(predictor, buffer, n_updates=n_updates)
    assert info["model_updates"] == min(n_updates, 10)
    assert not moved(predictor.model, before)
    assert int(predictor.model.n_averaged) == n_averaged
    torch.testing.assert_close(moments(), kept, rtol=0, atol=0)


def test_the_reported_number_is_what_is_predicted_with():
    predictor = stopping(5, 10, holdout_share=0.2, model={"n_modes": 2})
    buffer = make_buffer(make_transitions(200))
    info = learn(predictor, buffer, n_updates=100)  # not calibrated yet
    # Drawn often enough that each held-out transition is among them.
    keys, form = predictor.predictor_loss.tensor_keys, predictor.model.action_form
    rows = Experience(buffer, predictor.encoder, form, keys, holdout_share=0.2).held_out(10_000)
    assert 10 < len(rows) < 80
    with torch.no_grad():
        log_prob = predictor.model.dist(rows).log_prob(rows["next", "state"])
    # from nats of the state to nats of the normalised change
    expected = -(log_prob.mean() + predictor.model.scaling.target.scale.log().sum()) / 2
    assert info["holdout_nll"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_gain_below_min_delta_buys_no_time_but_is_kept():
    buffer, found = make_buffer(n_steps=200), {}
    for min_delta in (0.0, 100.0):
        torch.manual_seed(0)
        predictor = stopping(2, 10, min_delta, holdout_share=0.3, model_lr=1e-3)
        before = parameters(predictor.model)
        found[min_delta] = learn(predictor, buffer, n_updates=60)
        assert moved(predictor.model, before) == set(before)
    assert found[100.0]["model_updates"] == 20
    assert found[0.0]["model_updates"] > 20


def test_what_cannot_work_is_refused():
    learned = partial(EncoderNet, (2,), 2, 0)

    def known(state, context, action):
        return state[..., 0]

    for build, message in (
        (lambda: make_predictor(encoder_warm_up=3), "encoder_warm_up"),  # an identity
        (lambda: warming(3, learn_encoder=False), "encoder_warm_up"),
        (lambda: make_predictor(learned(), encoder_warm_up=3, rew_func=known), "encoder_warm_up"),
        (lambda: stopping(holdout_share=0.0), "holdout_share"),
        (lambda: stopping(encoder=learned()), "learn_encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    stopping(encoder=learned(), learn_encoder=False)
    predictor = stopping(holdout_share=1e-6)
    with unchanged(predictor, predictor.optim), pytest.raises(ValueError, match="held-out"):
        learn(predictor, make_buffer())


# -- weight decay and beta-NLL ------------------------------------------------------------------


def test_weight_decay_shrinks_the_model_alone():
    """Without a loss on the model, each update multiplies by one minus rate times decay."""
    options = {"consistency_loss_weight": 0.0, "model_lr": 0.1}
    found = {}
    for decay in (0.0, 0.5):
        torch.manual_seed(0)
        training = ModelTraining(weight_decay=decay, annealing=0.0)
        predictor = make_predictor(**options, model_training=training)
        start = parameters(predictor)
        learn(predictor, make_buffer())
        found[decay] = parameters(predictor)
    for name, value in found[0.5].items():
        if name.startswith("model.members"):
            torch.testing.assert_close(value, start[name] * (1 - 0.1 * 0.5) ** 3)
            assert torch.equal(found[0.0][name], start[name])
        elif not name.startswith("model."):
            assert torch.equal(value, found[0.0][name]), name


def test_beta_reaches_the_models_loss_alone():
    found = []
    for beta in (0.0, 0.5):
        torch.manual_seed(0)
        predictor = make_predictor(beta_nll=beta)
        learn(predictor, make_buffer())
        found.append(parameters(predictor))
    assert parts_moved(predictor, found[0]) == {"model"}


def test_rates_and_beta_are_annealed_over_the_end_of_a_call():
    """Of 20 updates over the last 8; beta as long, and it is 0 in the last 2 of them."""
    training = ModelTraining(annealing=0.4)
    predictor = make_predictor(model_training=training, model_lr=0.02, beta_nll=0.5)
    terms, seen = predictor.model_loss.terms, []

    def noted(prepared):
        rates = {group["name"]: group["lr"] for group in predictor.optim.param_groups}
        seen.append((rates["model"], rates["reward"], prepared.beta))
        return terms(prepared)

    predictor.model_loss.terms = noted
    learn(predictor, make_buffer(), n_updates=20)
    falling = [(7.5 - k) / 8 for k in range(8)]
    rates, others, betas = zip(*seen, strict=True)
    assert rates == pytest.approx([0.02 * (0.1 + 0.9 * f) for f in [1.0] * 12 + falling])
    assert betas == pytest.approx([0.5 * f for f in [1.0] * 10 + falling + [0.0] * 2])
    assert others == (3e-3,) * 20
    # Numbers, and not tensors: those are for accelerators.
    assert all(type(rate) is float for rate in rates)
    assert not any(group["capturable"] for group in predictor.optim.param_groups)
