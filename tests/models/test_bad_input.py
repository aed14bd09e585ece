"""Each bad input gets an error that names what came in and what was expected."""

from __future__ import annotations

import math
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Categorical

from layeredrl_torchrl import Model, ProbabilisticEnsemble, ProbFCDynamics

N_MODES, D = 2, 3


# -- building ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spaces", "error", "message"),
    [
        (("a", None, 1), TypeError, r"state_space is 'a' \(str\).*expected a gymnasium Box"),
        ((2, gym.spaces.MultiBinary(2), 1), TypeError, r"context_space is MultiBinary\(2\)"),
        ((2, None, gym.spaces.MultiDiscrete([2])), TypeError, r"action_space is MultiDiscrete"),
        ((gym.spaces.Discrete(3), None, 1), TypeError, r"state_space is discrete.*expected a Box"),
        ((2, Categorical(3), 1), TypeError, r"context_space is discrete.*expected a Box"),
        ((gym.spaces.Box(0, 1, (2, 2)), None, 1), ValueError, r"state_space has shape \(2, 2\)"),
        ((2, None, gym.spaces.Discrete(3, start=1)), ValueError, r"action_space is Discrete\(3"),
        ((None, None, 1), ValueError, "state_space"),
    ],
)
def test_spaces(spaces, error, message, box):
    spaces = (box(space) if isinstance(space, int) else space for space in spaces)
    with pytest.raises(error, match=r"(?s)" + message):
        ProbabilisticEnsemble(*spaces)


@pytest.mark.parametrize(
    "keys", [{"in_keys": ["state", "action"]}, {"out_keys": [("next", "state")]}]
)
def test_the_number_of_keys(keys, box):
    with pytest.raises(ValueError, match=r"expected 3 in_keys like .* and 5 out_keys like .*got"):
        ProbabilisticEnsemble(box(2), None, box(1), **keys)


def outputs(batch=2, k=N_MODES, d=D):
    return {
        "mean": torch.zeros(batch, k, d),
        "std": torch.ones(batch, k, d),
        "weights": torch.full((batch, k), 1 / k),
        "term_prob": torch.zeros(batch),
    }


class Returns(nn.Module):
    """Returns what it was told to, for a batch of 2 (that of the check when it is built)."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, state, context, action):
        return self.out


def of(**changes):
    out = outputs() | changes
    return (out["mean"], out["std"]), out["weights"], out["term_prob"]


def build(out, box, n_models=2):
    return ProbabilisticEnsemble(box(D), box(1), box(1), lambda *_: Returns(out), n_models, N_MODES)


def test_the_outputs_that_the_others_spoil_are_accepted(box):
    assert build(of(), box).n_models == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": torch.zeros(2, D)}, r"mean of shape \(2, 3\).*expected \(2, 2, 3\)"),
        ({"mean": torch.zeros(2, D, N_MODES)}, r"mean of shape \(2, 3, 2\).*expected \(2, 2, 3\)"),
        ({"mean": torch.zeros(1, N_MODES, D)}, r"mean of shape \(1, 2, 3\).*for a batch of 2"),
        ({"std": torch.ones(2, N_MODES, 1)}, r"std of shape \(2, 2, 1\).*expected \(2, 2, 3\)"),
        ({"weights": torch.ones(2)}, r"weights of shape \(2,\).*expected \(2, 2\).*n_modes=2"),
        ({"weights": torch.ones(2, 3) / 3}, r"weights of shape \(2, 3\).*expected \(2, 2\)"),
        ({"term_prob": torch.zeros(2, 1)}, r"term_prob of shape \(2, 1\).*expected \(2,\)"),
        ({"term_prob": torch.zeros(())}, r"term_prob of shape \(\).*expected \(2,\)"),
        ({"std": torch.zeros(2, N_MODES, D)}, r"std of 0; it must be positive"),
        ({"std": -torch.ones(2, N_MODES, D)}, r"std of -1; it must be positive"),
        ({"std": torch.full((2, N_MODES, D), math.nan)}, r"std of nan; it must be positive"),
        ({"mean": torch.full((2, N_MODES, D), math.inf)}, r"mean of inf; it must be finite"),
        ({"weights": torch.full((2, N_MODES), 0.4)}, r"weights of 0.4; they must.*sum to 1"),
        ({"weights": torch.tensor([[1.5, -0.5]] * 2)}, r"weights of -0.5; they must not be"),
        ({"weights": torch.full((2, N_MODES), math.nan)}, r"weights of nan"),
        ({"term_prob": torch.tensor([0.5, 1.5])}, r"term_prob of 1.5; it must lie in"),
        ({"term_prob": torch.tensor([-0.1, 0.5])}, r"term_prob of -0.1; it must lie in"),
        ({"mean": None}, r"member 0.*mean"),
        ({"term_prob": None}, r"member 0.*term_prob"),
        ({"weights": [[0.5, 0.5]] * 2}, r"member 0.*weights"),
    ],
)
def test_a_partial_net_whose_outputs_do_not_fit(changes, message, box):
    with pytest.raises((TypeError, ValueError), match=message):
        build(of(**changes), box)


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(2, N_MODES, D),
        None,
        (torch.zeros(2, N_MODES, D), torch.ones(2, N_MODES, D)),
        (torch.zeros(2, N_MODES, D), torch.ones(2, N_MODES), torch.zeros(2), torch.zeros(2)),
    ],
    ids=["tensor", "None", "two", "four"],
)
def test_a_partial_net_that_returns_something_else(out, box):
    kind = type(out).__name__
    with pytest.raises(
        ValueError, match=rf"member 0 returned {kind}, expected \(mean, std\), weights, term_prob"
    ):
        build(out, box)


def test_the_member_that_is_wrong_is_named(box):
    outs = iter([of(), of(), of(std=-torch.ones(2, N_MODES, D))])
    with pytest.raises(ValueError, match="member 2 returned std of -1"):
        ProbabilisticEnsemble(box(D), box(1), box(1), lambda *_: Returns(next(outs)), 3, N_MODES)


@pytest.mark.parametrize("what", [None, 3, lambda state, context, action: of()])
def test_a_partial_net_that_is_no_module(what, box):
    with pytest.raises(TypeError, match=rf"torch\.nn\.Module, got {type(what).__name__}.*partial"):
        ProbabilisticEnsemble(box(D), None, box(1), lambda *_: what)


@pytest.mark.parametrize(
    "wrong", [lambda: None, lambda a, b: None, partial(ProbFCDynamics, hidden=(8,))]
)
def test_a_partial_net_that_takes_other_arguments(wrong, box):
    with pytest.raises(TypeError, match=r"called as partial_net\(state_space.*functools\.partial"):
        ProbabilisticEnsemble(box(D), None, box(1), wrong)


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


# -- predicting ----------------------------------------------------------------------------


def inputs(**changes):
    given = {
        "state": torch.zeros(4, 3),
        "context": torch.zeros(4, 2),
        "action": torch.zeros(4, 2),
    } | changes
    return tuple(given.values())


BAD = {
    "state width": (
        {"state": torch.zeros(4, 2)},
        ValueError,
        r"state has shape \(4, 2\), expected \[\.\.\., 3\].*state space has 3 dimensions",
    ),
    "state scalar": ({"state": torch.zeros(())}, ValueError, r"state has shape \(\), expected"),
    "state nan": (
        {"state": torch.tensor([[0.0, 0, 0]] * 2 + [[0, math.nan, 0]] * 2)},
        ValueError,
        r"state holds 2 non-finite values of 12 \(the first, nan, at index \[2, 1\]\)",
    ),
    "state inf": (
        {"state": torch.full((4, 3), -math.inf)},
        ValueError,
        r"state holds 12 non-finite values of 12 \(the first, -inf",
    ),
    "state integers": (
        {"state": torch.zeros(4, 3, dtype=torch.long)},
        TypeError,
        r"state must be a float tensor, got dtype torch\.int64",
    ),
    "state array": (
        {"state": np.zeros((4, 3))},
        TypeError,
        r"state must be a torch\.Tensor, got ndarray",
    ),
    "empty batch": (
        {
            "state": torch.zeros(0, 3),
            "context": torch.zeros(0, 2),
            "action": torch.zeros(0, 2),
        },
        ValueError,
        r"state has shape \(0, 3\): the batch is empty",
    ),
    "context width": (
        {"context": torch.zeros(4, 5)},
        ValueError,
        r"context has shape \(4, 5\), expected \[\.\.\., 2\].*context space has 2 dimensions",
    ),
    "context batch": (
        {"context": torch.zeros(3, 2)},
        ValueError,
        r"context has batch shape \(3,\), the state \(4,\)",
    ),
    "context without batch": (
        {"context": torch.zeros(2)},
        ValueError,
        r"context has batch shape \(\), the state \(4,\)",
    ),
    "context missing": ({"context": None}, ValueError, r"context.*expected \[\.\.\., 2\]"),
    "context nan": (
        {"context": torch.full((4, 2), math.nan)},
        ValueError,
        r"context holds 8 non-finite values",
    ),
    "action width": (
        {"action": torch.zeros(4, 3)},
        ValueError,
        r"action has shape \(4, 3\), expected \(4, 2\)",
    ),
    "action batch": (
        {"action": torch.zeros(1, 2)},
        ValueError,
        r"action has shape \(1, 2\), expected \(4, 2\)",
    ),
    "action nan": ({"action": torch.full((4, 2), math.nan)}, ValueError, "action holds NaN"),
    "action array": (
        {"action": np.zeros((4, 2))},
        TypeError,
        r"action must be a torch\.Tensor, got ndarray",
    ),
}


def test_actions_outside_their_space(fc, recorded):
    space = gym.spaces.Box(np.float32([-1, -2]), np.float32([1, 2]))
    ensemble, _ = recorded(fc, action_space=space)
    ensemble.predict(*inputs(action=torch.tensor([[1.0, -2.0]] * 4)))
    with pytest.raises(ValueError, match=r"action 2.5 at index \[3, 1\] is outside.*project"):
        ensemble.predict(*inputs(action=torch.tensor([[1.0, 2.0]] * 3 + [[1.0, 2.5]])))


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (torch.tensor([0, 1, 2, 4]), ValueError, r"span \[0, 4\], expected integers from 0 to 3"),
        (torch.tensor([0, 1, 2, -1]), ValueError, r"span \[-1, 2\], expected integers from 0 to 3"),
        (torch.tensor([0.0, 1.0, 2.0, 3.0]), TypeError, r"float32, expected integers from 0 to 3"),
        (torch.full((4, 4), 0.25), ValueError, "not one-hot"),
        (torch.zeros(4, 5), ValueError, r"\(4, 5\), expected \(4,\).*\(4, 4\) \(one-hot\)"),
    ],
)
def test_choices_outside_their_space(action, error, message, fc, recorded):
    ensemble, _ = recorded(fc, action_space=gym.spaces.Discrete(4))
    with pytest.raises(error, match=message):
        ensemble.predict(*inputs(action=action))


@pytest.mark.parametrize("call", ["__call__", "dist"])
@pytest.mark.parametrize("missing", ["state", "context", "action"])
def test_a_tensordict_without_a_key(call, missing, fc, recorded):
    ensemble, _ = recorded(fc)
    td = TensorDict(dict(zip(ensemble.in_keys, inputs(), strict=True)), batch_size=(4,))
    td = td.exclude(missing).set("reward", torch.zeros(4, 1))
    with pytest.raises(KeyError, match=rf"reads.*\['{missing}'\] is missing.*'reward'"):
        getattr(ensemble, call)(td)
    assert "next" not in td.keys()


class Says(Model):
    """Two members; the second one says what it was told to."""

    def __init__(self, box, name, value):
        super().__init__(box(D), None, box(1), n_models=2, n_modes=N_MODES)
        self.name, self.value = name, value

    def predict_members(self, state, context, action):
        out = {name: x.clone() for name, x in outputs(state.shape[1]).items()}
        out = {name: torch.stack((x, x)) for name, x in out.items()}
        out[self.name][1] = self.value
        return (out["mean"], out["std"]), out["weights"], out["term_prob"]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in outputs() for value in (math.nan, math.inf)] + [("std", -1.0)],
)
@pytest.mark.parametrize("call", ["predict", "dist", "get_log_prob"])
def test_a_member_that_has_diverged_is_named(call, name, value, box):
    model = Says(box, name, value)
    given = torch.zeros(4, D), None, torch.zeros(4, 1)
    args = {
        "predict": given,
        "dist": (TensorDict({"state": given[0], "action": given[2]}, batch_size=(4,)),),
        "get_log_prob": (*given, torch.zeros(4, D), 1.0),
    }[call]
    with pytest.raises(ValueError, match=rf"member\(s\) \[1\] of 2 predict a {name} that is not"):
        getattr(model, call)(*args)


# -- statistics ----------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(4), ids=["state", "context", "action", "next_state"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("call", ["fit_statistics", "calibrate"])
def test_statistics_of_data_that_is_not_finite_are_refused(
    call, which, value, fc, recorded, transitions, unchanged
):
    ensemble, _ = recorded(fc)
    sample = list(transitions())
    sample[which][3, 0] = value
    with unchanged(ensemble), pytest.raises(ValueError, match=r"finite|NaN"):
        getattr(ensemble, call)(*sample)


@pytest.mark.parametrize("call", ["fit_statistics", "calibrate"])
def test_statistics_of_no_data_are_refused(call, fc, recorded, transitions, unchanged):
    ensemble, _ = recorded(fc)
    with unchanged(ensemble), pytest.raises(ValueError, match=r"empty|at least one"):
        getattr(ensemble, call)(*(x[:0] for x in transitions()))


# -- checkpoints ---------------------------------------------------------------------------
