"""Imagined returns against a loop over a rollout's trajectory, and their memory."""

import itertools

import pytest
import torch
from helpers import make_predictor

from layeredrl_torchrl import TS1, EnsembleDisagreement, Expectation, StaticPredictor, TSInfinity


def start(predictor, batch, horizon, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*batch, predictor.latent_state_dim, generator=generator),
        torch.randn(*batch, predictor.context_dim, generator=generator),
        torch.randn(
            *batch, horizon, predictor.model.action_spec.shape[-1], generator=generator
        ).clamp(-1, 1),
    )


@pytest.fixture
def predictor():
    torch.manual_seed(3)
    predictor = make_predictor()
    with torch.no_grad():
        for head in (predictor.rew_func, predictor.target_val_func):
            torch.nn.init.normal_(head.net[-1].weight)
    return predictor


@pytest.mark.parametrize("propagation", [TSInfinity(), TS1(), Expectation()])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize(
    "options",
    [
        {"discount": 0.9},
        {"use_value_func": True},
        {"discount": 0.8, "use_value_func": True, "use_term_prob": False},
        {"bonus": True},
    ],
)
def test_returns_are_those_of_the_trajectory(predictor, propagation, batch, options):
    options = dict(options)
    bonus = EnsembleDisagreement(predictor.model, 0.7) if options.pop("bonus", False) else None
    state, context, actions = start(predictor, batch, 4)
    with torch.no_grad():
        torch.manual_seed(0)
        got = predictor.returns(
            state, context, actions, propagation=propagation, exploration_bonus=bonus, **options
        )
        torch.manual_seed(0)
        traj = predictor.model.rollout(state, context, actions, propagation=propagation)
    assert got.shape == traj.batch_size[:-1]
    discount = options.get("discount", 1.0)
    for index in itertools.product(*map(range, batch)):
        for m, p in itertools.product(*map(range, got.shape[-2:])):
            one = traj[(*index, m, p)]
            total, alive = 0.0, 1.0
            for h in range(4):
                inputs = (one["state"][h], one["context"][h], one["action"][h])
                gain = float(predictor.rew_func(*inputs))
                if bonus is not None:
                    mean = traj[index]["state"][..., h, :].mean((0, 1))
                    gain += float(bonus(mean, *inputs[1:]))
                total += alive * gain
                alive *= discount
                if options.get("use_term_prob", True):
                    alive *= 1.0 - float(one["next", "term_prob"][h])
            if options.get("use_value_func"):
                last = one["next", "state"][-1]
                total += alive * float(predictor.terminal_value(last, *inputs[1:]))
            assert float(got[(*index, m, p)]) == pytest.approx(total, rel=1e-4, abs=1e-4)


def test_the_memory_does_not_grow_with_the_horizon(predictor, peak_bytes):
    def peak(horizon):
        given = start(predictor, (64,), horizon)
        return peak_bytes(lambda: predictor.returns(*given))

    peak(2)
    # Rewards are computed for the particles of up to 16 of these steps at once, here 128 a step.
    assert 0 < peak(160) < 1.2 * peak(40)


@pytest.mark.parametrize("rows", [1, 13, 10_000])
def test_returns_do_not_depend_on_how_many_steps_are_rewarded_at_once(rows, predictor, monkeypatch):
    given = start(predictor, (3,), 7)
    bonus = EnsembleDisagreement(predictor.model, 0.7)
    found = []
    for n in (6, rows):  # 6 are the particles of one step
        monkeypatch.setattr("layeredrl_torchrl.predictors.returns._ROWS", n)
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(predictor.returns(*given, exploration_bonus=bonus, use_value_func=True))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.fixture
def replaced(predictor):
    """``replaced(rew_func=..., val_func=...)``: a predictor whose other parts are the same."""

    def build(**parts):
        parts = {"rew_func": predictor.rew_func, "val_func": predictor.val_func} | parts
        dims = predictor.latent_state_dim, predictor.context_dim
        model, encoder = predictor.model, predictor.encoder
        return StaticPredictor(model, parts["val_func"], parts["rew_func"], encoder, *dims)

    return build


def test_what_is_missing_is_named(predictor, replaced):
    state, context, actions = start(predictor, (2,), 3)
    with pytest.raises(ValueError, match="horizon 0"):
        predictor.returns(state, context, actions[:, :0])
    for part in ("rew_func", "val_func"):
        with pytest.raises(ValueError, match="None; give it one"):
            replaced(**{part: None}).returns(state, context, actions, use_value_func=True)


def test_returns_that_are_not_finite_name_the_member(predictor, replaced):
    def reward(state, context, action):
        out = torch.zeros(state.shape[:-1])
        out[1] = torch.nan
        return out

    with torch.no_grad(), pytest.raises(ValueError, match=r"member\(s\) \[1\]"):
        replaced(rew_func=reward).returns(*start(predictor, (2,), 3))


def test_finite_returns_whose_sum_overflows_are_finite(predictor, replaced):
    large = replaced(rew_func=lambda state, context, action: torch.full(state.shape[:-1], 3e38))
    with torch.no_grad():
        assert (large.returns(*start(predictor, (4,), 1)) == 3e38).all()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s, c, a: s[..., :1],  # would broadcast, or not, depending on the batch
        lambda s, c, a: s,
        lambda s, c, a: s.sum(),
    ],
    ids=["[*B, 1]", "[*B, D]", "[]"],
)
@pytest.mark.parametrize("part", ["rew_func", "val_func", "exploration_bonus"])
def test_a_function_that_gives_another_shape_is_named(predictor, replaced, part, wrong):
    options = {"use_value_func": True}
    if part == "exploration_bonus":
        broken, options[part] = predictor, wrong
    else:
        broken = replaced(**{part: wrong})
    given = start(predictor, (2,), 3)
    with torch.no_grad(), pytest.raises(ValueError, match=rf"^{part} gave shape .*, expected \("):
        broken.returns(*given, **options)
