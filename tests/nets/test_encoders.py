"""Encoders: called with tensors and with TensorDicts, and what they make of bad observations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.envs import GymEnv

from layeredrl_torchrl import EncoderNet, FixedEncoderNet, IdentityEncoder

BATCHES = [(), (1,), (4,), (2, 3)]


def make(kind, obs=4, **keys):
    """An encoder of each kind; a learned one with a mask that lets both outputs through."""
    if kind == "identity":
        return IdentityEncoder((obs,), **keys)
    if kind == "fixed":
        return FixedEncoderNet((obs,), latent_state_dims=[2, 0], context_dims=[3], **keys)
    encoder = EncoderNet((obs,), latent_state_dim=3, context_dim=2, **keys)
    encoder.mask[:2] = True
    return encoder


KINDS = ["identity", "fixed", "net"]


# -- all encoders -------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), batch=st.sampled_from(BATCHES), seed=st.integers(0, 2**31))
def test_tensor_and_tensordict_calls_agree_and_batched_equals_one_by_one(kind, batch, seed):
    encoder = make(kind)
    obs = torch.randn(*batch, 4, generator=torch.Generator().manual_seed(seed))
    state, context = encoder(obs)
    assert state.shape == (*batch, encoder.latent_state_dim)
    assert context.shape == (*batch, encoder.context_dim)

    td = TensorDict({"observation": obs, "other": torch.zeros(batch)}, batch_size=batch)
    out = encoder(td)
    assert out is td
    assert set(td.keys()) == {"observation", "other", "state", "context"}
    assert torch.equal(td["state"], state)
    assert torch.equal(td["context"], context)
    assert torch.equal(td["observation"], obs)

    rows = (
        zip(
            obs.reshape(-1, 4),
            state.reshape(-1, state.shape[-1]),
            context.flatten(0, -2),
            strict=True,
        )
        if batch
        else [(obs, state, context)]
    )
    for row, one_state, one_context in rows:
        got_state, got_context = encoder(row)
        torch.testing.assert_close(got_state, one_state)
        torch.testing.assert_close(got_context, one_context)


def test_observations_of_a_real_environment():
    env = GymEnv("InvertedPendulum-v5")
    td = env.rollout(3)
    encoder = IdentityEncoder(env.observation_spec["observation"].shape)
    state, context = encoder(td["observation"])
    assert td["observation"].dtype == torch.float64
    assert state.dtype == torch.get_default_dtype()
    assert torch.equal(state, td["observation"].float())
    assert context.numel() == 0


@pytest.mark.parametrize("shape", [(), (3, 64, 64), (2, 2)])
@pytest.mark.parametrize(
    "build",
    [
        IdentityEncoder,
        lambda shape: FixedEncoderNet(shape, [0]),
        lambda shape: EncoderNet(shape, 1, 0),
    ],
    ids=KINDS,
)
def test_only_flat_observations_are_supported(build, shape):
    with pytest.raises(ValueError, match=r"mapped_env_obs_shape.*flat.*_unbatched"):
        build(shape)


@pytest.mark.parametrize(
    "keys", [{"in_keys": ["a", "b"]}, {"out_keys": ["state"]}, {"in_keys": []}]
)
def test_the_number_of_keys_is_checked(keys):
    with pytest.raises(ValueError, match="one in_key and two out_keys"):
        IdentityEncoder((3,), **keys)


# -- each encoder -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [torch.Size((4,)), (4,), [4]])
def test_identity(shape):
    encoder = IdentityEncoder(shape)
    obs = torch.randn(2, 4)
    state, context = encoder(obs)
    assert torch.equal(state, obs)
    assert context.shape == (2, 0)
    assert context.numel() == 0
    assert (encoder.latent_state_dim, encoder.context_dim) == (4, 0)


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


def test_what_the_mask_has_seen_stays_and_is_saved():
    encoder = EncoderNet((3,), 1, 1)
    obs = torch.zeros(2, 3)
    encoder.update_mask(obs, obs)
    assert encoder.mask.tolist() == [False, False, False]
    encoder.update_mask(obs, obs + torch.tensor([0.0, 1.0, 0.0]))
    encoder.update_mask(obs, obs + torch.tensor([1.0, 0.0, 0.0]))
    assert encoder.mask.tolist() == [True, True, False]
    encoder.update_mask(obs, obs)
    assert encoder.mask.tolist() == [True, True, False]
    other = EncoderNet((3,), 1, 1)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other.mask, encoder.mask)


def test_gradients_reach_both_maps():
    encoder = make("net")
    state, context = encoder(torch.randn(5, 4))
    (state.square().sum() + context.square().sum()).backward()
    # dimensions 0 and 1 are the state's, 2 and 3 the context's
    assert (encoder.state_net.weight.grad[:, :2] != 0).all()
    assert (encoder.state_net.weight.grad[:, 2:] == 0).all()
    assert (encoder.context_net.weight.grad[:, 2:] != 0).all()
    assert (encoder.context_net.weight.grad[:, :2] == 0).all()


@pytest.mark.parametrize("offset", [0.0, 1e5, 5e6, 1.7e9])
def test_what_float32_cannot_tell_apart_is_refused(offset):
    """Map coordinates and clocks in float64; a constant with rounding errors may pass."""
    x = offset + torch.rand(50, 2, dtype=torch.float64)
    constant = torch.full((50, 1), 9.81) * (1 + 1e-16 * torch.randn(50, 1, dtype=torch.float64))
    observation = torch.cat((constant, x), 1)
    encoder = IdentityEncoder((3,))
    if offset < 1e6:
        encoder(observation)
    else:
        with pytest.raises(ValueError, match=r"dimension\(s\) \[1, 2\] of the observation"):
            encoder(observation)
    assert torch.equal(encoder.double()(observation)[0], observation)
