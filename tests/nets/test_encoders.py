"""Encoders: called with tensors and with TensorDicts, and what they make of bad observations."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn

from layeredrl_torchrl import Encoder, EncoderNet, FixedEncoderNet, IdentityEncoder
from layeredrl_torchrl.nets import ModuleEncoder, SimNorm

BATCHES = [(), (1,), (4,), (2, 3)]


KINDS = {
    "identity": IdentityEncoder,
    "fixed": lambda shape: FixedEncoderNet(shape, [0]),
    "net": lambda shape: EncoderNet(shape, 1, 0),
}


# -- all encoders -------------------------------------------------------------------------


@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
def test_called_with_a_tensordict_it_writes_what_it_says_of_the_tensor(build):
    encoder = build([4])
    td = TensorDict({"observation": torch.randn(2, 3, 4), "other": torch.zeros(2, 3)}, [2, 3])
    state, context = encoder(td["observation"])
    assert state.shape == (2, 3, encoder.latent_state_dim)
    assert context.shape == (2, 3, encoder.context_dim)
    assert encoder(td) is td
    assert set(td.keys()) == {"observation", "other", "state", "context"}
    assert torch.equal(td["state"], state)
    assert torch.equal(td["context"], context)
    if build is IdentityEncoder:
        assert torch.equal(state, td["observation"])


@pytest.mark.parametrize("shape", [(), (3, 64, 64), (2, 2)])
@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
def test_only_flat_observations_are_supported(build, shape):
    with pytest.raises(ValueError, match=r"mapped_env_obs_shape.*flat.*_unbatched"):
        build(shape)


class Splits(Encoder):
    """An encoder of four values into three and one, or whatever ``how`` makes of them."""

    def __init__(self, how):
        super().__init__((4,), latent_state_dim=3, context_dim=1)
        self.how = how

    def split(self, observation):
        return self.how(observation)


@pytest.mark.parametrize(
    "how",
    [
        lambda x: x,  # of a batch of two, its rows would be state and context
        lambda x: (x, x[..., 3:]),
        lambda x: (x[..., :3], x[..., :0]),
        lambda x: (x[..., :3], x[..., 3]),
        lambda x: (x[0, :3], x[0, 3:]),
        lambda x: (x[..., :3],),
    ],
    ids=["tensor", "wide", "no context", "axis", "batch", "state alone"],
)
def test_what_a_split_of_ones_own_gives_is_checked(how):
    encoder, observation = Splits(how), torch.randn(2, 4)
    expected = r"split of Splits gave .* state \(2, 3\) and context \(2, 1\)"
    for asked in (observation, TensorDict({"observation": observation}, [2])):
        with pytest.raises(ValueError, match=expected):
            encoder(asked)
    right = Splits(lambda x: (x[..., :3], x[..., 3:]))
    assert [tuple(part.shape) for part in right(observation)] == [(2, 3), (2, 1)]


@pytest.mark.parametrize(
    "keys", [{"in_keys": ["a", "b"]}, {"out_keys": ["state"]}, {"in_keys": []}]
)
def test_the_number_of_keys_is_checked(keys):
    for build in (IdentityEncoder, partial(ModuleEncoder, Halves(), latent_state_dim=2)):
        with pytest.raises(ValueError, match="one in_key and two out_keys"):
            build((3,), **keys)


# -- several entries ----------------------------------------------------------------------

ENTRIES = {"b": (2,), ("inner", "a"): (1, 2, 2), "c": (1,)}


def entries(batch):
    td = TensorDict({"b": torch.randn(*batch, 2), "c": torch.randn(*batch, 1)}, batch)
    return td.set(("inner", "a"), torch.randint(0, 256, (*batch, 1, 2, 2), dtype=torch.uint8))


@pytest.mark.parametrize("batch", BATCHES)
def test_entries_are_joined_in_order_and_decoded(batch):
    td = entries(batch)
    joined = [td["b"], td["inner", "a"].flatten(-3).float(), td["c"]]
    for encoder in (IdentityEncoder(ENTRIES), FixedEncoderNet(ENTRIES, [6, 2, 3, 1, 0], [5, 4])):
        assert encoder.in_keys == ["b", ("inner", "a"), "c"]
        state, context = encoder(torch.cat(joined, -1))
        out = encoder(td.clone())
        assert torch.equal(out["state"], state)
        assert torch.equal(out["context"], context)
        whole = encoder.decode(state, context)
        assert whole.batch_size == batch
        for key in encoder.in_keys:
            assert torch.equal(whole[key], td[key].float())


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (FixedEncoderNet((4,), [0, 2]), r"dimension\(s\) \[1, 3\] .* neither state nor context"),
        (EncoderNet((4,), 2, 0), r"EncoderNet has no inverse.*train a decoder"),
    ],
)
def test_what_has_no_inverse_says_so(encoder, message):
    with pytest.raises(ValueError, match=message):
        encoder.decode(*encoder(torch.zeros(3, 4)))


def test_entries_of_another_shape_or_none_are_refused():
    encoder, td = IdentityEncoder(ENTRIES), entries((3,))
    with pytest.raises(ValueError, match=r"'b' has shape \(3, 4\), expected \('\*B', 2\)"):
        encoder(td.clone().set("b", torch.zeros(3, 4)))
    for shape in ((), (1,), (2, 2), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"'inner', 'a'.* has shape .*expected"):
            encoder(entries(()).set(("inner", "a"), torch.zeros(shape)))
    with pytest.raises(KeyError, match="IdentityEncoder reads 'c'"):
        encoder(td.exclude("c"))
    wide = entries(()).set("b", torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"differ in their batch axes.*'b': \(5,\)"):
        encoder(wide)
    for build in (IdentityEncoder, partial(ModuleEncoder, Halves(), latent_state_dim=2)):
        with pytest.raises(ValueError, match="leave in_keys out"):
            build(ENTRIES, in_keys=["x"])
    named = ModuleEncoder(nn.Linear(3, 2), (3,), 2, in_keys=["pixels"])
    assert named(TensorDict({"pixels": torch.zeros(5, 3)}, [5]))["state"].shape == (5, 2)


def test_a_module_is_called_with_flat_batches_of_the_entries():
    class Net(nn.Module):
        def forward(self, a, b):
            assert a.shape[1:] == (1, 2, 2)
            assert a.ndim == 4
            return torch.stack([a.flatten(1).sum(1), b.prod(1)], 1), b[:, :1]

    encoder = ModuleEncoder(Net(), {"a": (1, 2, 2), "b": (2,)}, latent_state_dim=2, context_dim=1)
    for batch in BATCHES:
        a, b = torch.randn(*batch, 1, 2, 2), torch.randn(*batch, 2)
        td = encoder(TensorDict({"a": a, "b": b}, batch))
        torch.testing.assert_close(td["state"][..., 0], a.sum((-1, -2, -3)))
        torch.testing.assert_close(td["state"][..., 1], b.prod(-1))
        assert torch.equal(td["context"], b[..., :1])


class Halves(nn.Module):
    """A state, and a context that may be empty."""

    def forward(self, x):
        return x[:, :2], x[:, 2:]


@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_module_may_say_that_there_is_no_context(context_dim):
    encoder = ModuleEncoder(Halves(), (2 + context_dim,), 2, context_dim)
    obs = torch.randn(3, 2 + context_dim)
    for found, expected in zip(encoder(obs), (obs[:, :2], obs[:, 2:]), strict=True):
        assert torch.equal(found, expected)


def test_a_module_of_another_width_is_refused():
    wrong = ModuleEncoder(nn.Linear(4, 3), (4,), latent_state_dim=2)
    with pytest.raises(ValueError, match=r"gave \[\(5, 3\).*expected the state \(5, 2\)"):
        wrong(torch.zeros(5, 4))


class Own(Encoder):
    """What a user writes."""

    def split(self, observation):
        return observation[..., : self.latent_state_dim], observation[..., self.latent_state_dim :]


@pytest.mark.parametrize(
    "make", [Own, EncoderNet, partial(ModuleEncoder, Halves())], ids=["own", "linear", "module"]
)
@pytest.mark.parametrize(
    ("dims", "error", "message"),
    [
        ((0, 1), ValueError, "latent_state_dim must be at least 1, got 0"),
        ((2, -1), ValueError, "context_dim must be at least 0, got -1"),
        ((2.0, 1), TypeError, "latent_state_dim must be an int"),
        ((2, True), TypeError, "context_dim must be an int"),
    ],
)
def test_no_encoder_has_widths_that_cannot_be(make, dims, error, message):
    with pytest.raises(error, match=message):
        make((3,), *dims)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_have_the_dtype_of_the_encoder_under_autocast_too(dtype):
    observation = torch.randn(5, 3)
    for encoder in (EncoderNet((3,), 2, 1), ModuleEncoder(nn.Linear(3, 2), (3,), 2)):
        with torch.autocast("cpu", torch.bfloat16):
            found = encoder.to(dtype)(observation)
        assert [part.dtype for part in found] == [dtype, dtype]


def test_simnorm_is_a_softmax_of_each_group():
    x = torch.randn(2, 3, 12)
    out = SimNorm(4, temperature=0.5)(x)
    for first in (0, 4, 8):
        part = (x[..., first : first + 4] / 0.5).exp()
        expected = part / part.sum(-1, keepdim=True)
        torch.testing.assert_close(out[..., first : first + 4], expected)
    torch.testing.assert_close(SimNorm()(x.repeat(1, 1, 2)), SimNorm(8, 1.0)(x.repeat(1, 1, 2)))
    with pytest.raises(ValueError, match="groups of 5, but 12"):
        SimNorm(5)(x)


# -- each encoder -------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(data=st.data(), obs_dim=st.integers(1, 5), batch=st.sampled_from(BATCHES))
def test_fixed_picks_the_named_dimensions_in_order(data, obs_dim, batch):
    order = data.draw(st.permutations(range(obs_dim)))
    cut = data.draw(st.integers(1, obs_dim))
    state_dims, context_dims = order[:cut], order[cut : data.draw(st.integers(cut, obs_dim))]
    kind = data.draw(st.sampled_from([list, tuple, np.array, torch.tensor]))
    encoder = FixedEncoderNet(
        mapped_env_obs_shape=(obs_dim,),
        latent_state_dims=kind(state_dims),
        context_dims=kind(context_dims) if context_dims else (),
    )
    obs = torch.randn(*batch, obs_dim)
    state, context = encoder(obs)
    assert state.shape == (*batch, len(state_dims))
    assert context.shape == (*batch, len(context_dims))
    for position, dim in enumerate(state_dims):
        assert torch.equal(state[..., position], obs[..., dim])
    for position, dim in enumerate(context_dims):
        assert torch.equal(context[..., position], obs[..., dim])


@pytest.mark.parametrize(
    ("state_dims", "context_dims", "message"),
    [
        ([], [0], r"latent_state_dims is empty"),
        ([0, 4], [], r"latent_state_dims \[4\] are not among the 4 dimensions.*0 to 3"),
        ([0], [1, -1], r"context_dims \[-1\] are not among"),
        ([0], [4, 1], r"context_dims \[4\] are not among the 4 dimensions.*0 to 3"),
        ([0, 1, 0], [], r"latent_state_dims has \[0\] more than once"),
        ([0, 1, 2], np.array([1, 3]), r"\[1\] are in latent_state_dims and in context_dims"),
        ([0.0, 1.0], [], r"latent_state_dims must be integers"),
        (0, [], r"latent_state_dims must be integers"),
    ],
)
def test_fixed_refuses_dimensions_that_do_not_fit(state_dims, context_dims, message):
    with pytest.raises((TypeError, ValueError), match=message):
        FixedEncoderNet((4,), state_dims, context_dims)


def test_the_net_starts_with_everything_in_the_context():
    encoder = EncoderNet((3,), latent_state_dim=2, context_dim=2)
    obs = torch.randn(5, 3)
    state, context = encoder(obs)
    assert torch.equal(state, torch.zeros(5, 2))
    torch.testing.assert_close(context, obs @ encoder.context_net.weight.T)


@pytest.mark.parametrize("context_dim", [0, 1, 2])
def test_the_mask_keeps_the_two_outputs_apart(context_dim):
    encoder = EncoderNet((4,), latent_state_dim=2, context_dim=context_dim)
    # dimensions 0 and 2 move within an episode, in different rows
    obs = torch.randn(6, 4)
    after = obs.clone()
    after[1, 0] += 1
    after[4, 2] -= 1e-3
    encoder.update_mask(obs, after)
    assert encoder.mask.tolist() == [True, False, True, False]

    state, context = encoder(obs)
    assert context.shape == (6, context_dim)
    weights = encoder.state_net.weight.tolist()
    context_weights = encoder.context_net.weight.tolist() if context_dim else []
    for i, row in enumerate(obs.tolist()):
        expected = [w[0] * row[0] + w[2] * row[2] for w in weights]
        assert state[i].tolist() == pytest.approx(expected, abs=1e-5)
        expected = [w[1] * row[1] + w[3] * row[3] for w in context_weights]
        assert context[i].tolist() == pytest.approx(expected, abs=1e-5)

    moved = obs + torch.tensor([0.0, 5.0, 0.0, -5.0])
    assert torch.equal(encoder(moved)[0], state)
    moved = obs + torch.tensor([5.0, 0.0, -5.0, 0.0])
    assert torch.equal(encoder(moved)[1], context)


def test_what_the_mask_has_seen_stays():
    encoder = EncoderNet((3,), 1, 1)
    obs = torch.zeros(2, 3)
    encoder.update_mask(obs, obs)
    assert encoder.mask.tolist() == [False, False, False]
    encoder.update_mask(obs, obs + torch.tensor([0.0, 1.0, 0.0]))
    encoder.update_mask(obs, obs + torch.tensor([1.0, 0.0, 0.0]))
    assert encoder.mask.tolist() == [True, True, False]
    encoder.update_mask(obs, obs)
    assert encoder.mask.tolist() == [True, True, False]


@pytest.mark.parametrize("offset", [0.0, 1e5, 5e6, 1.7e9])
def test_what_float32_cannot_tell_apart_is_refused(offset):
    """Map coordinates and clocks in float64; a constant with rounding errors may pass."""
    x = offset + torch.rand(50, 2, dtype=torch.float64)
    constant = torch.full((50, 1), 9.81) * (1 + 1e-16 * torch.randn(50, 1, dtype=torch.float64))
    observation = torch.cat((constant, x), 1)
    encoder = IdentityEncoder((3,))
    for few in (observation[0], observation[:2]):  # which do not tell how much they vary
        assert torch.equal(encoder(few)[0], few.float())
    if offset < 1e6:
        encoder(observation)
    else:
        with pytest.raises(ValueError, match=r"dimension\(s\) \[1, 2\] of the observation"):
            encoder(observation)
    assert torch.equal(encoder.double()(observation)[0], observation)
