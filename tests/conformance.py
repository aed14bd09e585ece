"""What every part of the package keeps to: a suite that a class joins by saying how it is made.

A subclass overrides :meth:`~Conformance.make` and :meth:`~Conformance.inputs`, and whatever else
differs. ``test_conformance.py`` and ``test_conformance_of_policies.py`` hold one for each public
class.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn

BAD = {
    "missing": lambda x: None,
    "NaN": lambda x: x.clone().index_fill_(0, torch.tensor([1]), torch.nan),
    "infinite": lambda x: x.clone().index_fill_(0, torch.tensor([1]), torch.inf),
    "wider": lambda x: torch.cat([x, x[..., :1]], -1),
    "integers": lambda x: x.long(),
}
DOES_NOT_FIT = "size mismatch|does not fit|Failed to update"
COPIES = [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))]


def stir(part):
    """Give every parameter a random value: untrained heads say 0, whatever they are asked."""
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.3)
    return part


def leaves(td):
    return {key: td[key] for key in td.keys(True, True)}


def double(td):
    return td.apply(lambda x: x.double() if x.is_floating_point() else x)


def rename(td, names):
    td = td.clone()
    for old, new in names.items():
        if old in td.keys(True):
            td.rename_key_(old, new)
    return td


def assert_same(got, expected, **tolerance):
    got, expected = leaves(got), leaves(expected)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, msg=lambda m, k=key: f"{k}: {m}", **tolerance)


class Conformance:
    """The promises of a part that is called with a TensorDict ``[*B]``."""

    #: The class under test.
    kind: type
    #: Batch shapes that are compared with their items one by one; none for what draws at random.
    batches = [(), (1,), (3,), (2, 3)]
    #: Default keys, and what :meth:`make_renamed` calls them instead.
    renamed: dict = {}
    #: Keys of what has to be there, of the right width, in floats and finite.
    checked: list = []
    #: Whether it has a state that differs between two of them.
    stateful = True
    #: Whether all that it writes is float64 once it is; actions have the dtype of their spec.
    doubles = True
    #: Whether it brings inputs to the dtype of its weights.
    converts = True

    def __init_subclass__(cls):
        """Leave out the tests of what a suite does not promise, which could not fail."""
        super().__init_subclass__()
        promised = {
            "test_batched_equals_one_by_one": cls.batches,
            "test_in_float64_it_says_the_same": cls.batches,
            "test_keys_can_be_renamed": cls.renamed,
            "test_bad_input_is_named_and_changes_nothing": cls.checked,
            "test_a_state_dict_holds_all_that_counts_once": cls.stateful,
            "test_a_state_of_another_size_is_refused": (
                cls.make_others is not Conformance.make_others
            ),
        }
        for name, applies in promised.items():
            setattr(cls, name, getattr(Conformance, name) if applies else None)

    def make(self):
        """One small part; two calls give parts with other parameters."""
        raise NotImplementedError

    def make_renamed(self, part):
        """The same with the keys of ``renamed``; its state is loaded afterwards."""
        raise NotImplementedError

    def make_others(self):
        """Parts of the same class whose state dicts do not fit."""
        return []

    def inputs(self, part, batch):
        """A random TensorDict ``[*B]``."""
        raise NotImplementedError

    def compare(self, part, td):
        """Its answer, without draws that would differ between a batch and its items."""
        return self.run(part, td)

    def run(self, part, td):
        """Its answer to the TensorDict, as a TensorDict ``[*B]``."""
        return part(td)

    def answer(self, part, td):
        torch.manual_seed(5)
        return self.run(part, td.clone()).detach().clone()

    # -- the promises -----------------------------------------------------------------------

    def test_batched_equals_one_by_one(self):
        part = self.make()
        for batch in self.batches:
            td = self.inputs(part, batch)
            out = self.compare(part, td.clone())
            assert out.batch_size == batch
            for index in itertools.product(*map(range, batch)):
                one = self.compare(part, td[index].clone())
                assert_same(out[index], one, rtol=1e-4, atol=1e-4)

    def test_keys_can_be_renamed(self):
        part = self.make()
        other = self.make_renamed(part)
        if isinstance(part, nn.Module):
            other.load_state_dict(part.state_dict())
        td = self.inputs(part, (3,))
        expected = rename(self.answer(part, td), self.renamed)
        got = self.answer(other, rename(td, self.renamed))
        assert_same(got, expected)
        if isinstance(part, nn.Module):
            read_and_written = {*other.in_keys, *other.out_keys}
            assert not read_and_written & set(self.renamed), "a default key is still declared"

    def test_a_call_changes_nothing_but_what_it_writes(self, unchanged):
        part = self.make()
        td = self.inputs(part, (3,))
        given = td.clone()
        with unchanged(*[part.train()] if isinstance(part, nn.Module) else []):
            self.run(part, given)
        read = set(leaves(td)) - set(getattr(part, "out_keys", ()))
        assert_same(given.select(*read), td.select(*read), rtol=0, atol=0)

    @pytest.mark.parametrize("kind", BAD)
    def test_bad_input_is_named_and_changes_nothing(self, kind, unchanged):
        part = self.make()
        for key in self.checked:
            if kind == "integers" and key == "action":  # which are numbers, too
                continue
            td = self.inputs(part, (3,))
            bad = BAD[kind](td[key])
            td = td.exclude(key) if bad is None else td.set(key, bad)
            with unchanged(part), pytest.raises((KeyError, TypeError, ValueError), match=key):
                self.run(part, td)

    @pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle"])
    def test_copies_answer_alike_and_share_nothing(self, duplicate):
        part = self.make()
        td = self.inputs(part, (3,))
        expected = self.answer(part, td)
        other = duplicate(part)
        assert_same(self.answer(other, td), expected, rtol=0, atol=0)
        if isinstance(part, nn.Module):
            with torch.no_grad():
                for value in other.state_dict().values():
                    value.zero_()
            assert_same(self.answer(part, td), expected, rtol=0, atol=0)

    def test_a_state_dict_holds_all_that_counts_once(self):
        part, other = self.make(), self.make()
        td = self.inputs(part, (3,))
        expected, before = self.answer(part, td), self.answer(other, td)
        state = part.state_dict()
        assert any(not torch.equal(before[key], expected[key]) for key in leaves(expected))
        places = [value.data_ptr() for value in state.values() if value.numel()]
        assert len(places) == len(set(places))
        saved = io.BytesIO()
        torch.save(state, saved)
        saved.seek(0)
        other.load_state_dict(torch.load(saved, weights_only=True))
        assert_same(self.answer(other, td), expected, rtol=0, atol=0)

    def test_a_state_of_another_size_is_refused(self, unchanged):
        for other in self.make_others():
            part = self.make()
            with (
                unchanged(part),
                pytest.raises((RuntimeError, ValueError), match=DOES_NOT_FIT),
            ):
                part.load_state_dict(other.state_dict())

    def test_in_float64_it_says_the_same(self):
        part = self.make()
        td = self.inputs(part, (3,))
        if self.converts:
            out = self.compare(part, double(td))
            written = set(leaves(out)) - set(leaves(td))
            assert written
            assert all(out[k].dtype != torch.float64 for k in written), "the weights' dtype decides"
        expected = self.compare(part, td.clone())
        part = part.double() if isinstance(part, nn.Module) else part
        out = self.compare(part, double(td))
        assert_same(double(out), double(expected), rtol=1e-3, atol=1e-3)
        if self.doubles:
            assert not any(value.dtype == torch.float32 for value in leaves(out).values())


class LossConformance:
    """The promises of a loss ``[N] -> `` terms."""

    kind: type

    def make(self):
        raise NotImplementedError

    def make_others(self):
        return []

    def batch(self, n):
        """``[n]`` rows that count alike."""
        raise NotImplementedError

    def terms(self, loss, batch):
        out = loss(batch.clone())
        return out.select(*[key for key in out.keys() if key.startswith("loss_")])

    def test_it_is_the_mean_over_rows(self):
        loss, batch = self.make(), self.batch(4)
        one_by_one = torch.stack([self.terms(loss, batch[i : i + 1]) for i in range(4)])
        assert_same(self.terms(loss, batch), one_by_one.mean(0), rtol=1e-4, atol=1e-5)

    def test_it_is_pure(self, unchanged):
        loss, batch = self.make().train(), self.batch(4)
        before, rng = batch.clone(), torch.get_rng_state()
        with unchanged(loss):
            out = loss(batch)
            sum(self.terms(loss, batch).values()).backward()
            again = loss(batch)
        assert torch.equal(torch.get_rng_state(), rng)
        assert (batch == before).all()
        assert_same(out.detach(), again.detach(), rtol=0, atol=0)

    def test_keys_can_be_renamed(self):
        loss, batch = self.make(), self.batch(4)
        expected = loss(batch)
        keys = {name: ("deep", name) for name in loss.tensor_keys.__dataclass_fields__}
        names = {getattr(loss.tensor_keys, name): new for name, new in keys.items()}
        renamed = TensorDict(
            {names[key]: value for key, value in leaves(batch).items()}, batch.batch_size
        )
        loss.set_keys(**keys)
        assert_same(loss(renamed), expected)
        assert not set(loss.in_keys) & set(names)

    def test_a_missing_key_is_named(self):
        loss = self.make()
        for key in loss.in_keys:
            last = key if isinstance(key, str) else key[-1]
            with pytest.raises(KeyError, match=last):
                loss(self.batch(4).exclude(key))

    @pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle"])
    def test_copies_answer_alike_and_share_nothing(self, duplicate):
        loss, batch = self.make(), self.batch(4)
        expected = loss(batch).detach()
        other = duplicate(loss)
        assert_same(other(batch).detach(), expected, rtol=0, atol=0)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert_same(loss(batch).detach(), expected, rtol=0, atol=0)

    def test_a_state_dict_holds_all_that_counts(self, unchanged):
        loss, other, batch = self.make(), self.make(), self.batch(4)
        expected, before = self.terms(loss, batch), self.terms(other, batch)
        assert not any(torch.equal(before[key], value) for key, value in expected.items())
        other.load_state_dict(loss.state_dict())
        assert_same(other(batch).detach(), loss(batch).detach(), rtol=0, atol=0)
        for another in self.make_others():
            with unchanged(loss), pytest.raises((RuntimeError, ValueError), match=DOES_NOT_FIT):
                loss.load_state_dict(another.state_dict())

    def test_in_float64_it_says_the_same(self):
        loss, batch = self.make(), self.batch(4)
        expected = loss(batch).detach()
        out = loss.double()(double(batch)).detach()
        terms = [key for key in out.keys() if key.startswith("loss_")]
        assert all(out[key].dtype == torch.float64 for key in terms)
        assert_same(double(out), double(expected), rtol=1e-3, atol=1e-3)
