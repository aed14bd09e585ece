"""The features that a model-free level's networks read, and their statistics."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrl.data import Categorical

from layeredrl_torchrl.levels._features import InputFeatures


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), scale=st.sampled_from([1e-3, 50]))
def test_statistics_do_not_depend_on_portions(sizes, scale):
    torch.manual_seed(sum(sizes))
    x = 3.0 + scale * torch.randn(sum(sizes), 2)
    features = InputFeatures(2, None, None)
    for part in x.split(sizes):
        features.observe(part, None, None)
    torch.testing.assert_close(features.normalizer.loc, x.mean(0))
    if len(x) > 1:
        torch.testing.assert_close(
            features.normalizer.scale, x.std(0, correction=0), rtol=1e-3, atol=0
        )
    expected = (x - x.mean(0)) / features.normalizer.scale
    torch.testing.assert_close(features(x, None, None), expected, rtol=1e-3, atol=1e-3)


def test_features_are_observation_input_and_time_left():
    features = InputFeatures(2, Categorical(3), 4)
    assert features.dim == 2 + 3 + 1
    obs = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    out = features(obs, torch.tensor([2, 0]), torch.tensor([[0], [3]]))
    assert out.tolist() == [[1, 2, 0, 0, 1, 1], [1, 2, 1, 0, 0, 0.25]]
    assert out.dtype == torch.float32
    # What never varies is centred and not blown up; what lies far out is cut off.
    for sign in (1.0, -1.0):
        features = InputFeatures(2, Categorical(3), 4)
        rest = torch.tensor([2, 2]), torch.tensor([[1], [1]])
        features.observe(sign * obs, *rest)
        out = features(sign * obs + torch.tensor([0.5, 1e6]), *rest)
        assert out[0].tolist() == [0.5, 10, 0, 0, 0, 0]


@pytest.mark.parametrize("size", [1, 7, 500])
def test_a_broken_reading_is_named_however_the_rows_come(size):
    x = 3.0 + torch.randn(500, 2)
    x[:, 1] = 3.0
    broken = x.clone()
    broken[400] = 1e6  # beside what is constant it spoils nothing
    for rows, warns in ((x, False), (broken, True)):
        features = InputFeatures(2, None, None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for part in rows.split(size):
                features.observe(part, None, None)
        assert [str(one.message).split(";")[0] for one in caught] == warns * [
            f"observation: a few of {min(500, -(-401 // size) * size)} rows make up the spread of "
            "dimension(s) [0] (up to 1e+06)"
        ]
