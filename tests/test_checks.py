"""Checks of arguments: every kind of value ends as documented, and the message says what came."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from layeredrl_torchrl._checks import (
    check_callable,
    check_indices,
    check_instance,
    check_key,
    check_keys,
    check_number,
    check_per_item,
    check_positive_int,
    check_probability,
    check_resolution,
    check_sizes,
    check_trainable,
    check_width,
    own_entries,
    refuse_mask,
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
        interval = f"{'(' if open_low else '['}-1, 2{')' if open_high else ']'}"
        with pytest.raises(ValueError, match=re.escape(f"x must be finite and lie in {interval},")):
            check_number("x", value, -1.0, 2.0, **options)


def test_an_interval_without_ends_is_open() -> None:
    assert check_number("x", -1e300) == -1e300
    with pytest.raises(ValueError, match=r"lie in \(-inf, inf\), got nan; do this"):
        check_number("x", math.nan, hint="do this")


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


F32 = torch.float32
MASKED = TensorDict({"a": {"action_mask": torch.ones(2)}, "action": torch.zeros(2)}, [2])
WIDE = torch.tensor(  # the last is a constant but for rounding
    [[1e6 + 1e-3 * i, 1e6 + i, 1e-6 * i, 1e6 + 1.2e-10 * (i % 2)] for i in range(8)],
    dtype=torch.float64,
)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: check_positive_int("n", 1), 1),
        (lambda: check_positive_int("n", 0), "n must be at least 1, got 0"),
        (lambda: check_positive_int("n", 2, minimum=2), 2),
        (lambda: check_positive_int("n", 1, minimum=2), "n must be at least 2, got 1"),
        (lambda: check_positive_int("n", True), r"n must be an int, got True \(bool\)"),
        (lambda: check_indices("i", np.array([2, 0])), [2, 0]),
        (lambda: check_indices("i", range(3), 3), [0, 1, 2]),
        (lambda: check_indices("i", [3], 3), r"i \[3\] are not among the 3 dimensions from 0 to 2"),
        (lambda: check_indices("i", [-1, 9]), r"i \[-1\] are not among 0 and above"),
        (lambda: check_indices("i", [1, 0, 1]), r"i has \[1\] more than once"),
        (lambda: check_sizes("s", [1, 2]), (1, 2)),
        (lambda: check_sizes("s", [2, 0]), r"s\[1\] must be at least 1"),
        (lambda: check_key("k", "a"), "a"),
        (lambda: check_key("k", ("a", ("b",))), ("a", "b")),
        (lambda: check_key("k", ("a", 3)), "k must be a key"),
        (lambda: check_keys("k", ("a", ("b", "c"))), ["a", ("b", "c")]),
        (lambda: check_keys("k", "abc"), "k must be a list of keys"),
        (lambda: check_keys("k", 3), "k must be a list of keys"),
        (lambda: check_width("w", torch.zeros(2, 3), 3, hint=""), None),
        (lambda: check_width("w", torch.zeros(3), 3, hint=""), None),
        (lambda: check_width("w", torch.zeros(3, 2), 3, hint=""), r"w has shape \(3, 2\)"),
        (lambda: check_width("w", torch.zeros(()), 1, hint="why"), r"w has shape \(\).*; why"),
        (lambda: check_width("w", torch.zeros(3).int(), 3, hint=""), "w must be a float tensor"),
        (lambda: check_per_item("f", torch.zeros(2, 3), [2, 3]).shape, (2, 3)),
        (lambda: check_per_item("f", torch.zeros(3), [2, 3]), r"f gave shape \(3,\)"),
        (lambda: check_per_item("f", 1.0, [2]), "f gave a float, expected a tensor"),
        (lambda: check_probability("p", torch.tensor([0.0, 1.0]), [2], F32).tolist(), [0.0, 1.0]),
        (lambda: check_probability("p", torch.tensor([True]), [1], F32).dtype, F32),
        (lambda: check_probability("p", torch.tensor([0.5, 1.001]), [2], F32), "outside"),
        (lambda: check_probability("p", torch.tensor([0.5, -0.001]), [2], F32), "outside"),
        (lambda: check_probability("p", torch.tensor([0.5, math.nan]), [2], F32), "outside"),
        (lambda: check_probability("p", torch.tensor([1]), [1], F32), "p gave torch.int64"),
        (lambda: check_trainable("It", torch.zeros((), requires_grad=True)), None),
        (lambda: check_trainable("It", torch.zeros(())), "It cannot learn"),
        (lambda: refuse_mask(MASKED, "action"), None),
        (lambda: refuse_mask(MASKED, ("b", "action")), None),
        (lambda: refuse_mask(MASKED, ("a", "action")), "masks actions"),
        (lambda: refuse_mask(MASKED["a"], "action"), "masks actions"),
        (lambda: own_entries({"x": 0, "planner": 0, ("is_init", "y"): 0, "b": 0}), ["b", "x"]),
        (lambda: check_resolution("it", WIDE, F32), r"dimension\(s\) \[0\] of it vary by less"),
        (lambda: check_resolution("it", WIDE.view(2, 4, 4), F32), r"dimension\(s\) \[0\] of it"),
        (lambda: check_resolution("it", WIDE[:7], F32), None),  # too few to tell
        (lambda: check_resolution("it", WIDE, torch.float64), None),
        (lambda: check_resolution("it", WIDE[:, :0], F32), None),
        (lambda: check_resolution("it", WIDE.long(), F32), None),
    ],
)
def test_each_check_at_the_ends_of_what_passes(
    call: Callable[[], object], expected: object
) -> None:
    """A text is the message of an error."""
    if isinstance(expected, str) and expected != "a":
        with pytest.raises((TypeError, ValueError, RuntimeError), match=expected):
            call()
    else:
        assert call() == expected
