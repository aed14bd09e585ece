"""Each bad input gets an error that names what came in and what was expected."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Categorical

from layeredrl_torchrl import (
    Expectation,
    IdentityEncoder,
    Model,
    PredictorEnv,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    StaticPredictor,
)

N_MODES, D = 2, 3


# -- building ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spaces", "error", "message"),
    [
        (("a", None, 1), TypeError, r"state_space is 'a' \(str\).*expected a gymnasium Box"),
        ((2, None, gym.spaces.MultiDiscrete([2])), TypeError, r"action_space is MultiDiscrete"),
        ((gym.spaces.Discrete(3), None, 1), TypeError, r"state_space is discrete.*expected a Box"),
        ((2, Categorical(3), 1), TypeError, r"context_space is discrete.*expected a Box"),
        ((None, None, 1), ValueError, "state_space"),
    ],
)
def test_spaces_of_another_kind_are_refused(spaces, error, message, box):
    spaces = (box(space) if isinstance(space, int) else space for space in spaces)
    with pytest.raises(error, match=r"(?s)" + message):
        ProbabilisticEnsemble(*spaces)


@pytest.mark.parametrize(
    "keys", [{"in_keys": ["state", "action"]}, {"out_keys": [("next", "state")]}]
)
def test_another_number_of_keys_is_refused(keys, box):
    with pytest.raises(ValueError, match=r"expected 3 in_keys like .* and 5 out_keys like .*got"):
        ProbabilisticEnsemble(box(2), None, box(1), **keys)


class Returns(nn.Module):
    """Returns what it was told to, for a batch of 2 (that of the check when it is built)."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, state, context, action):
        return self.out


def outputs(batch=2, k=N_MODES, d=D):
    return {
        "mean": torch.zeros(batch, k, d),
        "std": torch.ones(batch, k, d),
        "weights": torch.full((batch, k), 1 / k),
        "term_prob": torch.zeros(batch),
    }


def of(**changes):
    out = outputs() | changes
    return (out["mean"], out["std"]), out["weights"], out["term_prob"]


def build(box, *outs):
    nets = iter([Returns(out) for out in outs])
    spaces = box(D), box(1), box(1)
    return ProbabilisticEnsemble(*spaces, lambda *_: next(nets), len(outs), N_MODES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": torch.zeros(2, D)}, r"mean of shape \(2, 3\).*expected \(2, 2, 3\)"),
        ({"mean": torch.zeros(1, N_MODES, D)}, r"mean of shape \(1, 2, 3\).*for a batch of 2"),
        ({"std": torch.ones(2, N_MODES, 1)}, r"std of shape \(2, 2, 1\).*expected \(2, 2, 3\)"),
        ({"weights": torch.ones(2, 3) / 3}, r"weights of shape \(2, 3\).*\(2, 2\).*n_modes=2"),
        ({"term_prob": torch.zeros(2, 1)}, r"term_prob of shape \(2, 1\).*expected \(2,\)"),
        ({"std": torch.zeros(2, N_MODES, D)}, r"std of 0; it must be positive"),
        ({"std": torch.full((2, N_MODES, D), math.nan)}, r"std of nan; it must be positive"),
        ({"mean": torch.full((2, N_MODES, D), math.inf)}, r"mean of inf; it must be finite"),
        ({"weights": torch.full((2, N_MODES), 0.4)}, r"weights of 0.4; they must.*sum to 1"),
        ({"weights": torch.tensor([[1.5, -0.5]] * 2)}, r"weights of -0.5; they must not be"),
        ({"weights": torch.full((2, N_MODES), math.nan)}, r"weights of nan"),
        ({"term_prob": torch.tensor([0.5, 1.5])}, r"term_prob of 1.5; it must lie in"),
        ({"term_prob": torch.tensor([-0.1, 0.5])}, r"term_prob of -0.1; it must lie in"),
        ({"mean": None}, r"mean of shape NoneType"),
        ({"weights": [[0.5, 0.5]] * 2}, r"weights of shape list"),
    ],
)
def test_the_member_whose_outputs_do_not_fit_is_named(changes, message, box):
    assert build(box, of(), of()).n_models == 2
    with pytest.raises(ValueError, match="member 1 returned " + message):
        build(box, of(), of(**changes))


NO_TUPLE = r"member 0 returned {}, expected \(mean, std\), weights, term_prob"
CALLED = r"called as partial_net\(state_space.*functools\.partial"


@pytest.mark.parametrize(
    ("partial_net", "error", "message"),
    [
        (lambda *_: Returns(torch.zeros(2, D)), ValueError, NO_TUPLE.format("Tensor")),
        (lambda *_: Returns(None), ValueError, NO_TUPLE.format("NoneType")),
        (lambda *_: Returns(of()[:2]), ValueError, NO_TUPLE.format("tuple")),
        (lambda *_: Returns((*of(), 0)), ValueError, NO_TUPLE.format("tuple")),
        (lambda *_: None, TypeError, r"torch\.nn\.Module, got NoneType.*partial"),
        (lambda *_: of, TypeError, r"torch\.nn\.Module, got function.*partial"),
        (lambda a, b: None, TypeError, CALLED),
        (partial(ProbFCDynamics, hidden=(8,)), TypeError, CALLED),
    ],
)
def test_a_partial_net_that_makes_no_member_is_refused(partial_net, error, message, box):
    with pytest.raises(error, match=message):
        ProbabilisticEnsemble(box(D), None, box(1), partial_net, 2, N_MODES)


def test_checking_the_members_draws_no_random_number_and_keeps_their_mode(box):
    class Noisy(Returns):
        def forward(self, state, context, action):
            return of(mean=torch.randn(2, N_MODES, D))

    nets = [Noisy(None).eval(), Noisy(None).train()]
    in_turn = iter(nets)
    before = torch.get_rng_state()
    ProbabilisticEnsemble(box(D), None, box(1), lambda *_: next(in_turn), 2, N_MODES)
    assert torch.equal(torch.get_rng_state(), before)
    assert [net.training for net in nets] == [False, True]


# -- calling -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"state": torch.zeros(4, 2)},
            ValueError,
            r"\(4, 2\), expected \[\.\.\., 3\].*3 dimensions",
        ),
        ({"state": torch.zeros(())}, ValueError, r"state has shape \(\), expected"),
        (
            {"state": torch.full((4, 3), -math.inf)},
            ValueError,
            r"state holds 12 non-finite .* -inf",
        ),
        ({"state": np.zeros((4, 3))}, TypeError, r"state must be a torch\.Tensor, got ndarray"),
        ({"state": torch.zeros(0, 3)}, ValueError, r"state has shape \(0, 3\): the batch is empty"),
        ({"context": torch.zeros(3, 2)}, ValueError, r"batch shape \(3,\), the state \(4,\)"),
        ({"context": torch.zeros(2)}, ValueError, r"batch shape \(\), the state \(4,\)"),
        ({"context": torch.full((4, 2), math.nan)}, ValueError, r"context holds 8 non-finite"),
        ({"context": None}, ValueError, r"context has shape \(4, 0\), expected \[\.\.\., 2\]"),
        ({"action": torch.full((4, 5, 2), math.nan)}, ValueError, "action holds NaN"),
        ({"action": torch.zeros(4, 5, 3)}, ValueError, r"action has shape .*3\), expected .*2\)"),
        ({"action": torch.zeros(1, 5, 2)}, ValueError, r"action has shape \(1, .*expected \(4, "),
        ({"action": np.zeros((4, 5, 2))}, (TypeError, ValueError), "must be a .*ensor"),
    ],
)
@pytest.mark.parametrize("call", ["predict", "rollout"])
def test_inputs_that_do_not_fit_are_refused(call, changes, error, message, fc, recorded):
    ensemble, _ = recorded(fc)
    given = {"state": torch.zeros(4, 3), "context": torch.zeros(4, 2)}
    state, context, actions = (given | {"action": torch.zeros(4, 5, 2)} | changes).values()
    if call == "predict":
        actions = actions[:, 0]
    with pytest.raises(error, match=message):
        getattr(ensemble, call)(state, context, actions)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 0, 2), r"horizon 0.*at least one step"),
        ((4,), r"actions must be a tensor \[\*B, H, A\] with \*B = \(4,\), got \(4,\)"),
        ((4, 2), r"action has shape \(4, 2\), expected \(4, 2, 2\)"),
    ],
)
def test_plans_of_another_shape_are_refused(shape, message, fc, recorded):
    ensemble, _ = recorded(fc)
    with pytest.raises(ValueError, match=message):
        ensemble.rollout(torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(shape))


def test_actions_outside_their_space_are_refused(fc, recorded):
    space = gym.spaces.Box(np.float32([-1, -2]), np.float32([1, 2]))
    ensemble, _ = recorded(fc, action_space=space)
    given = torch.zeros(4, 3), torch.zeros(4, 2)
    ensemble.predict(*given, torch.tensor([[1.0, -2.0]] * 4))
    with pytest.raises(ValueError, match=r"action 2.5 at index \[3, 1\] is outside.*project"):
        ensemble.predict(*given, torch.tensor([[1.0, 2.0]] * 3 + [[1.0, 2.5]]))
    ensemble, _ = recorded(fc, action_space=gym.spaces.Discrete(4))
    for index in (4, -1):
        with pytest.raises(ValueError, match="integers from 0 to 3"):
            ensemble.rollout(*given, torch.tensor([[0, 1, index]] * 4))


@pytest.mark.parametrize("call", ["__call__", "dist"])
@pytest.mark.parametrize("missing", ["state", "context", "action"])
def test_a_key_that_a_tensordict_lacks_is_named(call, missing, fc, recorded):
    ensemble, _ = recorded(fc)
    td = TensorDict(state=torch.zeros(4, 3), context=torch.zeros(4, 2), action=torch.zeros(4, 2))
    td = td.auto_batch_size_(1).exclude(missing).set("reward", torch.zeros(4, 1))
    with pytest.raises(KeyError, match=rf"reads.*\['{missing}'\] is missing.*'reward'"):
        getattr(ensemble, call)(td)
    assert "next" not in td.keys()


# -- members that have diverged ------------------------------------------------------------


class Spoiled(nn.Module):
    """A member that was fine when it was built; then one of its outputs is ``value``."""

    name = value = None

    def forward(self, state, context, action):
        mean = state.unsqueeze(-2).expand(*state.shape[:-1], N_MODES, D)
        out = {
            "mean": mean.clone(),
            "std": torch.ones_like(mean),
            "weights": torch.full_like(mean[..., 0], 1 / N_MODES),
            "term_prob": torch.zeros_like(state[..., 0]),
        }
        if self.name:
            out[self.name].fill_(self.value)
        return (out["mean"], out["std"]), out["weights"], out["term_prob"]


class OwnModel(Model):
    """Two members, each a network as above."""

    def __init__(self, box, nets):
        super().__init__(box(D), None, box(1), n_models=2, n_modes=N_MODES)
        self.nets = nn.ModuleList(nets)

    def predict_members(self, *given):
        outs = [net(*(x[m] for x in given)) for m, net in enumerate(self.nets)]
        mean, std = (torch.stack([out[0][i] for out in outs]) for i in range(2))
        return (mean, std), *(torch.stack([out[i] for out in outs]) for i in (1, 2))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in outputs() for value in (math.nan, math.inf)] + [("std", -1.0)],
)
@pytest.mark.parametrize("own", [False, True])
def test_a_member_that_has_diverged_is_named_by_every_call(own, name, value, box):
    nets = [Spoiled(), Spoiled()]
    in_turn = iter(nets)
    if own:
        model = OwnModel(box, nets)
    else:
        spaces = box(D), None, box(1)
        model = ProbabilisticEnsemble(*spaces, lambda *_: next(in_turn), 2, N_MODES)
    state, action = torch.zeros(4, D), torch.zeros(4, 1)
    calls = [
        lambda: model.predict(state, None, action),
        lambda: model.dist(TensorDict(state=state, action=action, batch_size=4)),
        lambda: model.get_log_prob(state, None, action, state, std=1.0),
    ]
    rollout = partial(model.rollout, state, None, action.unsqueeze(1))
    for call in (*calls, rollout):
        call()
    nets[1].name, nets[1].value = name, value
    for call in calls:
        with pytest.raises(
            ValueError, match=rf"member\(s\) \[1\] of 2 predict a {name} that is not"
        ):
            call()
    if not own or value != -1.0:  # a sample does not tell of a sign
        with pytest.raises(ValueError, match=r"member(\(s\) \[1\]| 1 diverged)"):
            rollout()


class Says(Model):
    """One member that says the same of all rows."""

    def __init__(self, box, **changes):
        super().__init__(box(D), None, box(1), n_modes=N_MODES)
        self.changes = changes

    def predict_members(self, state, context, action):
        n = state.shape[1]
        out = {name: value.unsqueeze(0) for name, value in outputs(n).items()}
        out |= {name: change(out[name]) for name, change in self.changes.items()}
        return (out["mean"], out["std"]), out["weights"], out["term_prob"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": lambda x: x[:, :, 0]}, r"mean of shape \(1, 4, 3\), expected \(1, 4, 2, 3\)"),
        ({"std": lambda x: x[..., :1]}, r"std of shape \(1, 4, 2, 1\), expected \(1, 4, 2, 3\)"),
        ({"weights": lambda x: x[..., :1]}, r"weights of shape \(1, 4, 1\), expected \(1, 4, 2\)"),
        ({"term_prob": lambda x: x.unsqueeze(-1)}, r"term_prob of shape \(1, 4, 1\)"),
        ({"term_prob": lambda x: x - 3.0}, r"member\(s\) \[0\] of 1 predict a term_prob outside"),
        ({"term_prob": lambda x: x + 1.1}, r"member\(s\) \[0\] of 1 predict a term_prob outside"),
        ({"weights": lambda x: 2.0 * x}, r"weights that are negative or do not sum to 1"),
        (
            {"weights": lambda x: x + torch.tensor([1.0, -1.0])},
            r"weights that are negative or do not sum to 1",
        ),
    ],
)
def test_what_an_own_model_says_is_checked(changes, message, box):
    state, plan = torch.zeros(4, D), torch.zeros(4, 2, 1)
    assert Says(box).rollout(state, None, plan).shape == (4, 1, 1, 2)
    model = Says(box, **changes)
    reward = StaticPredictor(model, None, lambda s, c, a: s[..., 0], IdentityEncoder((D,)), D)
    for call in (
        lambda: model.predict(state, None, plan[:, 0]),
        lambda: model.rollout(state, None, plan),
        lambda: model.rollout(state, None, plan, propagation=Expectation()),
        lambda: reward.returns(state, None, plan),
        lambda: PredictorEnv(reward).rollout(2),
    ):
        with pytest.raises(ValueError, match=message.replace("4", "[14]")):
            call()


def test_ends_for_sure_and_modes_that_are_never_taken_are_fine(box):
    certain = {"term_prob": torch.ones(2), "weights": torch.tensor([[1.0, 0.0]] * 2)}
    build(box, of(**certain))
    model = Says(box, term_prob=lambda x: x + 1.0, weights=lambda x: x + torch.tensor([0.5, -0.5]))
    _, weights, _, term_prob = model.predict(torch.zeros(4, D), None, torch.zeros(4, 1))
    assert (term_prob == 1.0).all()
    assert weights.unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("value", [3e38, math.inf])
def test_large_values_are_finite_even_if_their_sum_is_not(value, box):
    nets = [Spoiled(), Spoiled()]
    model = OwnModel(box, nets)
    nets[0].name, nets[0].value = "mean", value
    state, action = torch.zeros(4, D), torch.zeros(4, 1)
    with pytest.raises(ValueError, match="mean") if value == math.inf else nullcontext():
        model.predict(state, None, action)


# -- statistics ----------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(4), ids=["state", "context", "action", "next_state"])
@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("call", ["fit_statistics", "calibrate"])
def test_statistics_of_no_data_or_of_what_is_not_finite_are_refused(
    call, which, value, fc, recorded, transitions, unchanged
):
    ensemble, _ = recorded(fc)
    sample = list(transitions())
    if value is None:
        sample = [x[:0] for x in sample]
    else:
        sample[which][3, 0] = value
    with unchanged(ensemble), pytest.raises(ValueError, match=r"finite|NaN|at least one"):
        getattr(ensemble, call)(*sample)
