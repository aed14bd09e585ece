"""Terms that are added up on a device that nobody waits for."""

from __future__ import annotations

import pytest
import torch

from layeredrl_torchrl.predictors import _sums
from layeredrl_torchrl.predictors._sums import Sums


def terms(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


@pytest.fixture
def late(monkeypatch):
    """Sums that learn of bad values at the end only, as on an accelerator."""
    monkeypatch.setattr(_sums, "is_at_once", lambda _: False)
    return Sums()


def test_each_term_is_added_up_and_counted_by_itself():
    sums = Sums()
    for loss in (1.0, 2.0):
        sums.add("both", terms(loss=loss, nll=10.0), terms(model=5.0))
        sums.count("both")
    sums.add("one", terms(loss=4.0), {})
    sums.count("one")
    sums.count("one")  # a replay
    assert {name: total.item() for name, total in sums.totals.items()} == {"loss": 7.0, "nll": 20.0}
    assert sums.counts == {"loss": 4, "nll": 2}
    sums.start()
    assert all(total == 0.0 for total in sums.totals.values())
    assert not sums.counts


def test_the_first_update_that_was_not_finite_is_named_at_the_end(late):
    late.check()  # nothing was added
    late.add("a", terms(loss=1.0), terms(model=2.0))
    late.add("b", terms(loss=1.5), {})
    late.check()
    late.add("a", terms(loss=3.0), terms(model=float("inf")))
    late.add("b", terms(loss=float("nan")), {})  # what comes of it
    late.add("a", terms(loss=4.0), terms(model=5.0))
    with pytest.raises(ValueError, match=r"the gradient norm of model is not finite.*'loss': 3.0"):
        late.check()
    late.start()
    late.add("a", terms(loss=1.0), terms(model=2.0))
    late.check()


def test_what_it_keeps_stays_in_its_place_and_follows_the_dtype(late):
    late.add("a", terms(loss=1.0), {})
    late.start()
    places = [x.data_ptr() for x in late.tensors()]
    late.add("a", terms(loss=2.0), {})
    assert [x.data_ptr() for x in late.tensors()] == places
    assert len(places) == 3  # a total, what was seen last, and whether something failed
    late.add("a", {"loss": torch.tensor(0.5, dtype=torch.float64)}, {})
    assert {x.dtype for x in late.tensors()} == {torch.float64, torch.bool}
    assert late.totals["loss"] == 0.5
    late.check()
