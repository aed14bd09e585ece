"""Options of learning: warm-up of the encoder, early stopping, weight decay, beta-NLL."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layeredrl_torchrl import EarlyStopping, EncoderNet, ModelTraining
from layeredrl_torchrl.predictors._experience import Experience

LEARN = {"n_updates": 3, "batch_size": 8, "model_batch_size": 8, "n_total_env_steps": 60}


def parameters(module):
    return {k: p.detach().clone() for k, p in module.named_parameters()}


def moved(module, before):
    return {k for k, p in module.named_parameters() if not torch.equal(p, before[k])}


# -- warm-up of the encoder ---------------------------------------------------------------------


def warming(make_predictor, n, **options):
    predictor = make_predictor(EncoderNet((2,), 2, 0), encoder_warm_up=n, **options)
    nn.init.normal_(predictor.rew_func.net[-1].weight)  # at 0 no gradient passes to the encoder
    return predictor


def test_during_the_warm_up_only_reward_and_encoder_learn(make_predictor, make_buffer, unchanged):
    predictor, buffer = (
        warming(make_predictor, 6, model_training=ModelTraining(weight_decay=0.1), beta_nll=0.0),
        make_buffer(),
    )
    predictor.learn(buffer, **LEARN | {"n_updates": 1})  # takes the statistics
    nn.init.normal_(predictor.val_func.net[-1].weight)  # so that it differs from its target
    before = parameters(predictor)
    _, info = predictor.learn(buffer, **LEARN)
    assert {name.split(".")[0] for name in moved(predictor, before)} == {"rew_func", "encoder"}
    assert int(predictor.model.n_averaged) == 0
    assert set(info) == {"loss", "loss_reward", "n_updates", "model_updates"}
    assert info["loss"] == pytest.approx(info["loss_reward"], rel=1e-6)
    assert (info["n_updates"], info["model_updates"]) == (3.0, 0.0)

    # Updates are counted over calls: two more, then all parts.
    _, info = predictor.learn(buffer, **LEARN)
    assert info["model_updates"] == 1.0
    assert int(predictor.model.n_averaged) == 1
    assert info["loss_dynamics"] == pytest.approx(2 * 2 * info["nll"], rel=1e-5)
    assert moved(predictor, before) == set(before)
    _, info = predictor.learn(buffer, **LEARN)
    assert info["model_updates"] == 3.0


def test_the_loss_of_a_warm_up_is_averaged_over_its_own_updates(make_predictor, make_buffer):
    """A mean over three updates of a term that one of them has would be a third of it."""
    buffer = make_buffer()
    runs = []
    for n_updates, warm_up in ((3, 2), (1, 0)):
        torch.manual_seed(0)
        predictor = warming(make_predictor, warm_up, model_lr=0.0, value_lr=0.0)
        runs.append(predictor.learn(buffer, **LEARN | {"n_updates": n_updates})[1])
    assert runs[0]["termination_bce"] == pytest.approx(runs[1]["termination_bce"], rel=0.5)


def test_the_warm_up_goes_on_after_loading(make_predictor, make_buffer):
    first, second, buffer = (*(warming(make_predictor, 5) for _ in range(2)), make_buffer())
    first.learn(buffer, **LEARN)
    second.load_state_dict(first.state_dict())
    assert second.learn(buffer, **LEARN)[1]["model_updates"] == 1.0


def test_statistics_are_taken_anew_when_it_is_over(make_predictor, make_transitions, make_buffer):
    """The model starts on states that are not those that the statistics were from."""
    rates = {"encoder_lr": lambda n_steps: 0.3 if n_steps == 0 else 0.0}
    predictor, data = warming(make_predictor, 10, **rates), make_transitions(400)
    buffer = make_buffer(data)

    def mismatch():
        state, _ = predictor.encode(data["observation"])
        return (predictor.model.scaling.state.scale / state.std(0)).log().abs().max().item()

    predictor.learn(buffer, **LEARN | {"n_updates": 10, "n_total_env_steps": 0})
    assert mismatch() > 0.3
    predictor.learn(buffer, **LEARN | {"n_updates": 1, "n_total_env_steps": 1})
    assert mismatch() < 0.1


def test_a_warm_up_with_nothing_to_learn_is_refused(make_predictor):
    def known(state, context, action):
        return state.sum(-1)

    with pytest.raises(ValueError, match="encoder_warm_up"):
        make_predictor(encoder_warm_up=3)  # an identity
    with pytest.raises(ValueError, match="encoder_warm_up"):
        make_predictor(EncoderNet((2,), 2, 0), encoder_warm_up=3, learn_encoder=False)
    with pytest.raises(ValueError, match="encoder_warm_up"):
        make_predictor(EncoderNet((2,), 2, 0), encoder_warm_up=3, rew_func=known)
    with pytest.raises(ValueError, match="encoder_warm_up"):
        make_predictor(EncoderNet((2,), 2, 0), encoder_warm_up=-1)


# -- early stopping -----------------------------------------------------------------------------


def test_without_a_gain_the_model_stops_and_the_others_go_on(make_predictor, make_buffer):
    stop = EarlyStopping(patience=3, every=4)
    predictor = make_predictor(model_training=ModelTraining(early_stopping=stop), model_lr=0.0)
    before = parameters(predictor)
    buffer = make_buffer()
    for _ in range(2):  # the next call starts afresh
        _, info = predictor.learn(buffer, **LEARN | {"n_updates": 30})
        assert (info["n_updates"], info["model_updates"]) == (30.0, 12.0)
    names = {name.split(".")[0] for name in moved(predictor, before)}
    assert names == {"rew_func", "val_func", "target_val_func"}
    _, info = predictor.learn(buffer, **LEARN | {"n_updates": 11})
    assert info["model_updates"] == 11.0


def test_with_nothing_else_to_learn_the_call_ends(make_predictor, make_buffer):
    stop = EarlyStopping(patience=2, every=5)
    parts = {"rew_func": None, "val_func": None}
    predictor = make_predictor(
        **parts, model_training=ModelTraining(early_stopping=stop), model_lr=0.0
    )
    _, info = predictor.learn(make_buffer(), **LEARN | {"n_updates": 1000})
    assert info["n_updates"] == info["model_updates"] == 10.0
    assert int(predictor.n_learn_updates) == 10


@pytest.mark.parametrize("n_updates", [40, 7])
def test_a_model_that_got_worse_is_put_back_with_its_moments(
    make_predictor, make_buffer, unchanged, n_updates
):
    """Whether it stopped, or the call ended between two looks."""
    rates = {"model_lr": lambda n_steps: 1e-3 if n_steps == 0 else 1.0}
    stop = EarlyStopping(patience=2, every=5)
    predictor, buffer = (
        make_predictor(model_training=ModelTraining(early_stopping=stop), **rates),
        make_buffer(),
    )
    predictor.learn(buffer, **LEARN | {"n_updates": 20, "n_total_env_steps": 0})
    model = list(predictor.model.parameters())
    moments = [dict(predictor.optim.state[p]) for p in model if p in predictor.optim.state]
    moments = [{k: v.clone() for k, v in state.items()} for state in moments]
    assert moments
    with unchanged(predictor.model):
        _, info = predictor.learn(buffer, **LEARN | {"n_updates": n_updates})
    assert info["model_updates"] == min(n_updates, 10)
    now = [predictor.optim.state[p] for p in model if p in predictor.optim.state]
    torch.testing.assert_close(now, moments, rtol=0, atol=0)


def test_the_first_models_moments_are_none(make_predictor, make_buffer):
    stop = EarlyStopping(patience=2, every=5)
    predictor = make_predictor(model_training=ModelTraining(early_stopping=stop), model_lr=1.0)
    before = parameters(predictor.model)
    predictor.learn(make_buffer(), **LEARN | {"n_updates": 20})
    assert moved(predictor.model, before) == set()
    assert not any(p in predictor.optim.state for p in predictor.model.parameters())
    assert int(predictor.model.n_averaged) == 0


def test_the_reported_number_is_what_is_predicted_with(
    make_predictor, make_buffer, make_transitions
):
    data = make_transitions(200)
    predictor = make_predictor(
        holdout_share=0.2,
        model_training=ModelTraining(early_stopping=EarlyStopping(every=10)),
        model={"n_modes": 2},
    )
    buffer = make_buffer(data)
    _, info = predictor.learn(buffer, **LEARN | {"n_updates": 100})  # not calibrated yet
    # Drawn often enough that each held-out transition is among them.
    keys, form = predictor.predictor_loss.tensor_keys, predictor.model.action_form
    rows = Experience(buffer, predictor.encoder, form, keys, holdout_share=0.2).held_out(10_000)
    assert 10 < len(rows) < 80
    with torch.no_grad():
        log_prob = predictor.model.dist(rows).log_prob(rows["next", "state"])
    # from nats of the state to nats of the normalised change
    expected = -(log_prob.mean() + predictor.model.scaling.target.scale.log().sum()) / 2
    assert info["holdout_nll"] == pytest.approx(expected.item(), rel=1e-4)


def test_it_prevents_learning_noise_by_heart(make_predictor, make_buffer, make_transitions):
    """Pure noise: whatever a large network learns beyond its spread is wrong elsewhere."""
    buffer = make_buffer(make_transitions(80))
    found = {}
    for patience in (2, 1000):
        torch.manual_seed(0)
        predictor = make_predictor(
            hidden=(64,),
            holdout_share=0.3,
            model_lr=1e-2,
            model_training=ModelTraining(early_stopping=EarlyStopping(patience=patience, every=20)),
        )
        _, info = predictor.learn(buffer, **LEARN | {"n_updates": 200, "model_batch_size": 64})
        found[patience] = info
    assert found[2]["model_updates"] < 150
    assert found[1000]["model_updates"] == 200
    assert found[2]["nll"] > found[1000]["nll"]  # on what it is trained on
    # The best model is kept either way, and patience only finds a better one.
    assert found[1000]["holdout_nll"] <= found[2]["holdout_nll"] < 1.6


def test_a_gain_below_min_delta_buys_no_time_but_is_kept(make_predictor, make_buffer):
    buffer, found = make_buffer(n_steps=200), {}
    for min_delta in (0.0, 100.0):
        torch.manual_seed(0)
        stop = EarlyStopping(patience=2, every=10, min_delta=min_delta)
        predictor = make_predictor(
            model_training=ModelTraining(early_stopping=stop), holdout_share=0.3, model_lr=1e-3
        )
        before = parameters(predictor.model)
        found[min_delta] = predictor.learn(buffer, **LEARN | {"n_updates": 60})[1]
        assert moved(predictor.model, before) == set(before)
    assert found[100.0]["model_updates"] == 20
    assert found[0.0]["model_updates"] > 20


def test_off_it_neither_draws_nor_reports(make_predictor, make_buffer):
    _, info = make_predictor().learn(make_buffer(), **LEARN)
    assert "holdout_nll" not in info
    assert info["model_updates"] == 3.0


def test_early_stopping_that_cannot_work_is_refused(make_predictor, make_buffer, unchanged):
    stop = EarlyStopping()
    with pytest.raises(ValueError, match="holdout_share"):
        make_predictor(model_training=ModelTraining(early_stopping=stop), holdout_share=0.0)
    with pytest.raises(ValueError, match="learn_encoder"):
        make_predictor(EncoderNet((2,), 2, 0), model_training=ModelTraining(early_stopping=stop))
    make_predictor(
        EncoderNet((2,), 2, 0),
        model_training=ModelTraining(early_stopping=stop),
        learn_encoder=False,
    )
    with pytest.raises(TypeError, match="EarlyStopping"):
        ModelTraining(early_stopping=10)
    predictor = make_predictor(
        model_training=ModelTraining(early_stopping=stop), holdout_share=1e-6
    )
    with unchanged(predictor, predictor.optim), pytest.raises(ValueError, match="held-out"):
        predictor.learn(make_buffer(), **LEARN)


# -- weight decay and beta-NLL ------------------------------------------------------------------


def test_weight_decay_shrinks_the_model_alone(make_predictor, make_buffer):
    """Without a loss on the model, each update multiplies by one minus rate times decay."""
    options = {"consistency_loss_weight": 0.0, "model_lr": 0.1}
    found = {}
    for decay in (0.0, 0.5):
        torch.manual_seed(0)
        predictor = make_predictor(
            **options, model_training=ModelTraining(weight_decay=decay, annealing=0.0)
        )
        start = parameters(predictor)
        predictor.learn(make_buffer(), **LEARN)
        found[decay] = parameters(predictor)
    for name, value in found[0.5].items():
        if name.startswith("model.members"):
            torch.testing.assert_close(value, start[name] * (1 - 0.1 * 0.5) ** 3)
            assert torch.equal(found[0.0][name], start[name])
        elif not name.startswith("model."):
            assert torch.equal(value, found[0.0][name]), name


def test_without_decay_it_is_adam_to_the_bit():
    """One optimizer serves the parts with and without decay."""
    results = []
    for make in (
        lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, fused=True),
    ):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(50, 7))
        optim = make([parameter])
        for _ in range(20):
            parameter.grad = torch.randn_like(parameter)
            optim.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


def test_beta_reaches_the_models_loss_alone(make_predictor, make_buffer):
    found = {}
    for beta in (0.0, 0.5):
        torch.manual_seed(0)
        predictor = make_predictor(beta_nll=beta)
        predictor.learn(make_buffer(), **LEARN)
        found[beta] = parameters(predictor)
    differ = {k for k, value in found[0.5].items() if not torch.equal(value, found[0.0][k])}
    assert differ == {k for k in differ if k.startswith("model.")} != set()
    with pytest.raises(ValueError, match="beta"):
        make_predictor(beta_nll=1.5)
