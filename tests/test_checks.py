"""Checks of arguments: every kind of value ends as documented, and the message says what came."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from layeredrl_torchrl._checks import (
    check_callable,
    check_instance,
    check_number,
    require,
)


@given(st.floats() | st.sampled_from([-1.0, 2.0]), st.booleans(), st.booleans())
def test_a_number_passes_exactly_where_the_interval_holds_it(
    value: float, open_low: bool, open_high: bool
) -> None:
    inside = math.isfinite(value) and -1.0 <= value <= 2.0
    inside = inside and not (open_low and value == -1.0) and not (open_high and value == 2.0)
    options = {"open_low": open_low, "open_high": open_high}
    if inside:
        assert check_number("x", value, -1.0, 2.0, **options) == value
    else:
        with pytest.raises(ValueError, match=r"x must be finite and lie in .-1, 2."):
            check_number("x", value, -1.0, 2.0, **options)


def test_numbers_of_numpy_are_numbers() -> None:
    assert check_number("x", np.float32(0.5), 0.0, 1.0) == 0.5
    assert check_number("x", np.int64(1), 0.0, 1.0) == 1


def test_callables_and_objects_are_told_from_what_is_not() -> None:
    check_callable("f", len)
    check_callable("f", None, optional=True)
    with pytest.raises(TypeError, match="f must be callable, got None"):
        check_callable("f", None)
    with pytest.raises(TypeError, match="f must be callable or None, got 3"):
        check_callable("f", 3, optional=True)
    with pytest.raises(TypeError, match="f must be callable, got the class list; pass an object"):
        check_callable("f", list)
    check_callable("f", list, factory=True)
    check_instance("x", 3, int, hint="")
    with pytest.raises(TypeError, match="must be an object of int or str, got the class int; why"):
        check_instance("x", int, (int, str), hint="why")


def test_a_missing_key_is_named_with_what_is_there() -> None:
    td = TensorDict({"a": torch.zeros(2), "b": {"c": torch.ones(2)}}, [2])
    assert require(td, ("b", "c"), reader="It", hint="").sum() == 2
    with pytest.raises(KeyError, match=r"It reads .*d.*, which is missing among .*b.*c.*a.*; add"):
        require(td, "d", reader="It", hint="add it")
