"""Checks of values that are looked at one call later, on devices that one has to wait for."""

import pytest
import torch

from layeredrl_torchrl._checks import check_finite
from layeredrl_torchrl._watch import Watch, refuse


@pytest.fixture
def late() -> Watch:
    """Treats the CPU as a device that has to be waited for."""
    return Watch(at_once=())


def members(bad: torch.Tensor) -> ValueError:
    return ValueError(f"members {bad.nonzero().flatten().tolist()} of {len(bad)}")


def test_what_a_call_finds_is_raised_when_the_next_begins(late) -> None:
    ran = []

    @late.watched
    def inner(*bad: int) -> None:
        flags = torch.zeros(4, dtype=torch.bool)
        flags[list(bad)] = True
        late.refuse(torch.zeros(2, 3, dtype=torch.bool), members)
        late.refuse(flags, members)
        ran.append(bad)

    @late.watched
    def outer(*bad: int) -> None:
        ran.append("outer")
        inner(*bad)
        inner()

    outer()
    outer(1, 3)
    with pytest.raises(ValueError, match=r"members \[1, 3\] of 4; it was found after the call"):
        outer()
    assert ran == ["outer", (), (), "outer", (1, 3), ()]  # the next call has not begun
    outer()
    inner(2)
    with pytest.raises(ValueError, match=r"members \[2\] of 4"):
        late.flush()
    late.flush()


def test_flags_of_a_call_that_failed_otherwise_are_dropped(late) -> None:
    @late.watched
    def call(fails: bool) -> None:
        late.refuse(torch.tensor([True]), members)
        if fails:
            raise RuntimeError("other")

    with pytest.raises(RuntimeError, match="other"):
        call(True)
    late.flush()


def test_gathered_flags_are_those_of_the_call_and_the_callers_own(late) -> None:
    @late.watched
    def call() -> tuple[str, int]:
        late.refuse(torch.tensor([True, False]), members)
        own = torch.tensor([False, True])
        result, flags = late.gather(lambda: late.refuse(own, members) or "x")
        assert [(bad.tolist(), error) for bad, error in flags] == [([False, True], members)]
        with pytest.raises(KeyError):
            late.gather({}.popitem)
        late.refuse(torch.tensor([False, False, True]), members)
        return result, len(flags)

    assert call() == ("x", 1)
    with pytest.raises(ValueError, match=r"members \[0\] of 2"):
        late.flush()


def test_a_cpu_raises_at_once_and_a_closer_look_may_find_nothing() -> None:
    with pytest.raises(ValueError, match="members"):
        refuse(torch.tensor([False, True]), members)
    refuse(torch.tensor([True]), lambda bad: None)
    check_finite("x", torch.full((9,), 3e38), hint="")  # whose sum overflows
    with pytest.raises(ValueError, match=r"x holds 1 non-finite values of 9 .* index \[2\]\); do"):
        check_finite("x", torch.ones(9).index_fill(0, torch.tensor([2]), float("nan")), hint="do")


def test_traced_checks_leave_what_is_not_finite_in_the_results() -> None:
    def root(x: torch.Tensor) -> torch.Tensor:
        y = x.sqrt()
        check_finite("y", y, hint="")
        return y

    x = torch.tensor([4.0, -1.0])
    compiled = torch.compile(root, fullgraph=True, backend="eager")
    for found in (torch.vmap(root)(x), compiled(x)):
        torch.testing.assert_close(found, torch.tensor([2.0, float("nan")]), equal_nan=True)
