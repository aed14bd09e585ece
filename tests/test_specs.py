"""Spaces and specs: every accepted kind, every refused one, and actions in all their forms."""

from __future__ import annotations

import math
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    Unbounded,
)

from layeredrl_torchrl import to_spec
from layeredrl_torchrl.specs import (
    ActionForm,
    action_features,
    canonical_action,
    is_discrete,
    width,
)

BATCHES = [(), (1,), (3,), (2, 3)]


def float32(*values):
    return np.array(values, dtype=np.float32)


# -- to_spec ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (
            gym.spaces.Box(float32(-1, -2), float32(3, 4)),
            Bounded(torch.tensor([-1.0, -2.0]), torch.tensor([3.0, 4.0])),
        ),
        (gym.spaces.Box(-np.inf, np.inf, (3,), np.float64), Unbounded((3,))),
        (
            gym.spaces.Box(float32(-np.inf, -np.inf), float32(np.inf, 4)),
            Bounded(torch.tensor([-math.inf] * 2), torch.tensor([math.inf, 4.0])),
        ),
        (gym.spaces.Discrete(4), Categorical(4)),
        (None, Unbounded((0,))),
        *((spec, spec) for spec in (Bounded(-1, 1, (2,)), Unbounded((2,)), OneHot(5))),
        (Bounded(-1, 1, (2,), dtype=torch.float64), Bounded(-1, 1, (2,), dtype=torch.float64)),
        (OneHot(5, dtype=torch.float32), OneHot(5, dtype=torch.float32)),
        (MultiOneHot([3]), OneHot(3)),
        (Composite(u=OneHot(3)), OneHot(3)),
    ],
)
def test_a_space_becomes_a_spec(space, expected):
    spec = to_spec(space)
    assert type(spec) is type(expected)
    assert spec == expected
    assert spec.dtype == expected.dtype


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_choice_keeps_its_shape_and_dtype(shape, dtype):
    expected = Categorical(3, shape=shape, dtype=dtype)
    assert to_spec(expected) == expected
    if shape:
        several = MultiCategorical([3], shape=shape, dtype=dtype, remove_singleton=False)
        assert to_spec(several) == to_spec(Composite({("agent", "act"): several})) == expected


def masked(spec):
    spec.update_mask(torch.tensor([True, False, True]))
    return spec


@pytest.mark.parametrize(
    ("space", "error", "message"),
    [
        (gym.spaces.Discrete(3, start=1), ValueError, r"goal_space is Discrete\(3, s.*=1\).*at 0"),
        (gym.spaces.Box(-1, 1, (2, 3)), ValueError, r"goal_space has shape \(2, 3\).*one axis"),
        (gym.spaces.Box(-1, 1, ()), ValueError, r"goal_space has shape \(\).*one axis"),
        (Unbounded((4, 2)), ValueError, r"goal_space has shape \(4, 2\).*_unbatched"),
        (Bounded(-1, 1, (4, 2)), ValueError, r"goal_space has shape \(4, 2\)"),
        (OneHot(3, shape=(2, 3)), ValueError, r"goal_space has shape \(2, 3\)"),
        (Categorical(3, shape=(2,)), ValueError, r"Categorical of shape \(2,\).*\(1,\)"),
        (Unbounded((2,), dtype=torch.int64), TypeError, r"torch\.int64.*Categorical/OneHot"),
        (gym.spaces.MultiBinary(3), TypeError, r"MultiBinary\(3\).*expected a gymnasium Box"),
        (gym.spaces.MultiDiscrete([2, 3]), TypeError, r"MultiDiscrete.*expected a gymnasium Box"),
        (gym.spaces.Dict(a=gym.spaces.Discrete(2)), TypeError, r"Dict.*expected a gymnasium Box"),
        (gym.spaces.Box(0, 5, (1,), np.int64), TypeError, r"Box of int64.*Discrete"),
        (Composite(a=Unbounded((1,)), b=OneHot(2)), TypeError, r"Composite.*'a', 'b'.*one leaf"),
        (MultiOneHot([2, 3]), TypeError, r"MultiOneHot.*several choices.*expected one choice"),
        (MultiCategorical([3, 3]), TypeError, r"MultiCategorical.*expected one choice"),
        (masked(OneHot(3)), ValueError, "goal_space has a mask"),
        (masked(Categorical(3)), ValueError, "goal_space has a mask"),
        (Binary(3), (TypeError, ValueError), r"goal_space.*expected"),
        (3, TypeError, r"goal_space is 3 \(int\).*expected a gymnasium Box"),
        ((3,), TypeError, r"goal_space is \(3,\) \(tuple\)"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str | type | tuple) else "",
)
def test_other_spaces_are_refused_by_name(space, error, message):
    with pytest.raises(error, match=r"(?s)" + message):
        to_spec(space, name="goal_space")


# -- canonical_action: continuous ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_actions_inside_their_space_pass_unchanged(dtype):
    spec = to_spec(gym.spaces.Box(float32(-1, -2), float32(1, 5)))
    for batch in BATCHES:
        action = torch.rand(*batch, 2, dtype=dtype) * torch.tensor([2, 7]) - torch.tensor([1, 2])
        assert canonical_action(spec, action, torch.Size(batch)) is action
        features = action_features(spec, action, torch.float32)
        assert features.dtype == torch.float32
        assert torch.equal(features, action.float())


@pytest.mark.parametrize(
    ("excess", "accepted"),
    [(0.0, True), (1e-6, True), (9e-5, True), (1.5e-4, False), (1.0, False)],
)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("limit", [0.1, 1.0, 100.0])
def test_rounding_outside_the_limits_is_forgiven_and_more_is_not(excess, accepted, sign, limit):
    spec = to_spec(gym.spaces.Box(-limit, limit, (2,)))
    action = torch.tensor([[0.0, 0.0], [0.0, sign * (limit + excess * max(limit, 1.0))]])
    if accepted:
        assert canonical_action(spec, action, torch.Size((2,))) is action
    else:
        with pytest.raises(ValueError, match=r"at index \[1, 1\] is outside.*project"):
            canonical_action(spec, action, torch.Size((2,)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("low", [-1, -np.inf])
@pytest.mark.parametrize("high", [1, np.inf])
def test_an_action_that_is_not_finite_is_refused_whatever_the_limits(low, high, value):
    bounds = float32(-1, low), float32(1, high)
    for space in (gym.spaces.Box(*bounds), gym.spaces.Box(low, high, (2,))):
        with pytest.raises(ValueError, match="action"):
            canonical_action(to_spec(space), torch.tensor([0.0, value]), torch.Size())


@pytest.mark.parametrize(
    ("shape", "batch"), [((2,), (3,)), ((3, 2), ()), ((3, 1), (3,)), ((4, 2), (3,)), ((), ())]
)
def test_a_continuous_action_of_another_shape_or_kind_is_refused(shape, batch):
    spec = to_spec(Unbounded((2,)))
    message = re.escape(f"action has shape {shape}, expected {(*batch, 2)}")
    with pytest.raises(ValueError, match=message):
        canonical_action(spec, torch.zeros(shape), torch.Size(batch))
    with pytest.raises(TypeError, match=r"action must be a torch\.Tensor, got list"):
        canonical_action(spec, [0.0, 0.0], torch.Size())
    for dtype in (torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=rf"action has dtype {dtype}, expected floats"):
            canonical_action(spec, torch.zeros(*batch, 2, dtype=dtype), torch.Size(batch))


def test_bounds_of_actions_are_no_saved_state_and_stay_exact():
    spec = to_spec(gym.spaces.Box(float32(-0.1, -2), float32(0.3, 5)))
    form = ActionForm(spec).to(torch.bfloat16)
    assert not form.state_dict()
    action = torch.stack([spec.space.low, spec.space.high])
    assert form(action, torch.Size((2,))) is action
    assert torch.equal(form.project(3.0 * action), action)


# -- canonical_action: discrete ------------------------------------------------------------

DISCRETE = {
    "Discrete": gym.spaces.Discrete(4),
    "Categorical": Categorical(4),
    "Categorical32": Categorical(4, dtype=torch.int32),
    "Categorical of one": Categorical(1),
    "Categorical with an axis": Categorical(4, (1,)),
    "OneHot of one": OneHot(1),
    "OneHot": OneHot(4),
    "OneHotFloat": OneHot(4, dtype=torch.float32),
}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(DISCRETE)),
    batch=st.sampled_from(BATCHES),
    form=st.sampled_from(["int", "int8", "column", "one-hot bool", "one-hot float", "one-hot int"]),
    seed=st.integers(0, 2**31),
)
def test_every_form_of_a_choice_becomes_the_form_of_the_spec(kind, batch, form, seed):
    spec = to_spec(DISCRETE[kind])
    assert is_discrete(spec)
    n = width(spec)
    if n == 1:  # then [*B, 1] is what the spec says, and 0 is the only choice
        form = "one-hot int" if isinstance(spec, OneHot) else "column"
    index = torch.randint(n, batch, generator=torch.Generator().manual_seed(seed))
    rows = torch.eye(n)[index]
    action = {
        "int": index,
        "int8": index.to(torch.int8),
        "column": index.unsqueeze(-1),
        "one-hot bool": rows.bool(),
        "one-hot float": rows,
        "one-hot int": rows.long(),
    }[form]
    if n == 1:
        with pytest.raises(ValueError, match="not 0 or 1"):
            canonical_action(spec, action + 2, torch.Size(batch))
    out = canonical_action(spec, action, torch.Size(batch))
    assert out.dtype == spec.dtype
    expected = rows if isinstance(spec, OneHot) else index.reshape((*batch, *spec.shape))
    assert out.tolist() == expected.to(spec.dtype).tolist()
    assert spec.is_in(out) if not batch else spec.expand(*batch, *spec.shape).is_in(out)

    features = action_features(spec, out, torch.float64)
    assert features.dtype == torch.float64
    assert features.tolist() == rows.tolist()


@pytest.mark.parametrize("spec", [OneHot(4), Categorical(4)], ids=["OneHot", "Categorical"])
@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (torch.tensor([0, 4, 1]), ValueError, r"span \[0, 4\].*0 to 3"),
        (torch.tensor([0, -1, 1]), ValueError, r"span \[-1, 1\].*0 to 3"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, r"dtype torch\.float32.*integers from 0 to 3"),
        (torch.zeros(3, 4), ValueError, r"\(3, 4\) is not one-hot"),
        (torch.full((3, 4), 0.25), ValueError, "not one-hot"),
        (torch.tensor([[1, 1, 0, 0]] * 3), ValueError, "not one-hot"),
        (torch.tensor([[2, -1, 0, 0]] * 3), ValueError, "not one-hot"),
        (torch.tensor([[math.nan, 1, 0, 0]] * 3), ValueError, "not one-hot"),
        (torch.zeros(3, 5), ValueError, r"\(3, 5\), expected \(3,\) or \(3, 1\).*\(3, 4\)"),
        (torch.zeros(2, dtype=torch.long), ValueError, r"\(2,\), expected \(3,\)"),
        (torch.zeros((), dtype=torch.long), ValueError, r"\(\), expected \(3,\)"),
        (2, TypeError, r"torch\.Tensor, got int"),
    ],
)
def test_choices_that_do_not_fit_are_refused(spec, action, error, message):
    with pytest.raises(error, match=message):
        canonical_action(to_spec(spec), action, torch.Size((3,)))


def test_features_of_choices_run_under_vmap():
    index = torch.tensor([[0, 2, 1], [3, 3, 0]])
    spec = to_spec(gym.spaces.Discrete(4))
    features = torch.vmap(lambda a: action_features(spec, a, torch.float32))(index)
    assert features.tolist() == torch.eye(4)[index].tolist()
