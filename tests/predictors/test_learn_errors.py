"""Bad input to ``learn``: a clear error, and nothing of the predictor is changed."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ListStorage, ReplayBuffer, TensorDictReplayBuffer

from layeredrl_torchrl import EncoderNet

LEARN = {"n_updates": 20, "batch_size": 8, "model_batch_size": 8, "n_total_env_steps": 0}
NAN = float("nan")


def without(key):
    def spoil(data):
        del data[key]

    return spoil


def filled(key, value):
    def spoil(data):
        data[key].fill_(value)

    return spoil


def renamed(key, new):
    def spoil(data):
        data.rename_key_(key, new)

    return spoil


def as_float(key):
    def spoil(data):
        data[key] = data[key].float()

    return spoil


def wider(*keys):
    def spoil(data):
        for key in keys:
            data[key] = torch.cat([data[key]] * 2, -1)

    return spoil


def flattened(key):
    def spoil(data):
        data[key] = data[key].squeeze(-1)

    return spoil


BAD = {
    "no observation": (without("observation"), KeyError, "observation"),
    "no next observation": (without(("next", "observation")), KeyError, "observation"),
    "no action": (without("action"), KeyError, "action"),
    "no reward": (without(("next", "reward")), KeyError, "reward"),
    "no terminated": (without(("next", "terminated")), KeyError, "terminated"),
    "no done": (without(("next", "done")), KeyError, "done"),
    "misnamed action": (renamed("action", "act"), KeyError, "action.*act"),
    "NaN observation": (filled("observation", NAN), ValueError, "observation"),
    "NaN next observation": (filled(("next", "observation"), NAN), ValueError, "observation"),
    "NaN reward": (filled(("next", "reward"), NAN), ValueError, "reward"),
    "infinite reward": (filled(("next", "reward"), float("inf")), ValueError, "reward"),
    "NaN action": (filled("action", NAN), ValueError, "action"),
    "action outside": (filled("action", 1.5), ValueError, "action.*outside"),
    "float terminated": (as_float(("next", "terminated")), ValueError, "terminated.*bool"),
    "float done": (as_float(("next", "done")), ValueError, "done.*bool"),
    "wide observation": (
        wider("observation", ("next", "observation")),
        ValueError,
        "observation.*4.*expected.*2",
    ),
    "wide action": (wider("action"), ValueError, "action.*shape.*2.*expected.*1"),
    "flat reward": (flattened(("next", "reward")), ValueError, "reward"),
    "wide reward": (wider(("next", "reward")), ValueError, "reward"),
}


@pytest.fixture(params=["new", "trained"])
def predictor(request, make_predictor, make_buffer):
    """Before its first call it takes statistics; a trained one on as much data does not."""
    encoder = EncoderNet((2,), latent_state_dim=2, context_dim=0)
    predictor = make_predictor(encoder)
    if request.param == "trained":
        predictor.learn(make_buffer(), **LEARN | {"n_updates": 2})
    return predictor


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused(predictor, make_transitions, make_buffer, unchanged, name):
    spoil, error, match = BAD[name]
    data = make_transitions()
    spoil(data)
    buffer = make_buffer(data)
    with unchanged(predictor, predictor.optim), pytest.raises(error, match=match):
        predictor.learn(buffer, **LEARN)


@pytest.mark.parametrize(
    "key", ["observation", "action", ("next", "reward"), ("next", "observation")]
)
@pytest.mark.parametrize("seed_", range(3))
def test_one_bad_row_is_found_and_nothing_is_half_updated(
    predictor, make_transitions, make_buffer, unchanged, key, seed_
):
    """Wherever among the batches it is met: the updates before it are not kept."""
    data = make_transitions()
    data[key][30] = NAN
    buffer = make_buffer(data)
    torch.manual_seed(seed_)
    with unchanged(predictor, predictor.optim), pytest.raises(ValueError, match=r"nan|NaN"):
        predictor.learn(buffer, **LEARN)


def test_it_can_go_on_after_an_error(make_predictor, make_transitions, make_buffer):
    def learn(*buffers):
        torch.manual_seed(1)
        predictor = make_predictor()
        for buffer in buffers[:-1]:
            with pytest.raises(ValueError, match="reward"):
                predictor.learn(buffer, **LEARN)
        torch.manual_seed(2)
        return predictor.learn(buffers[-1], **LEARN)[1]

    data = make_transitions()
    bad = data.clone()
    bad["next", "reward"].fill_(NAN)
    assert learn(make_buffer(bad), make_buffer(data)) == learn(make_buffer(data))


def test_an_empty_buffer_is_refused(predictor, unchanged):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10))
    with unchanged(predictor, predictor.optim), pytest.raises(ValueError, match="empty"):
        predictor.learn(buffer, **LEARN)


@pytest.mark.parametrize(("k_steps", "n_steps"), [(1, 3), (4, 2)])
def test_a_buffer_shorter_than_a_slice_is_refused(
    make_predictor, make_buffer, unchanged, k_steps, n_steps
):
    predictor = make_predictor(k_steps=k_steps, n_steps=n_steps)
    length = k_steps + n_steps
    with unchanged(predictor, predictor.optim), pytest.raises(ValueError, match=str(length)):
        predictor.learn(make_buffer(n_steps=length - 1), **LEARN)
    predictor.learn(make_buffer(n_steps=length), **LEARN)


@pytest.mark.parametrize(
    "buffer",
    [
        [TensorDict({}, [])],
        ReplayBuffer(storage=ListStorage(10)),
        LazyTensorStorage(10),
        None,
    ],
    ids=["list", "list storage", "storage", "none"],
)
def test_what_is_not_a_tensor_replay_buffer_is_refused(predictor, unchanged, buffer):
    with unchanged(predictor, predictor.optim), pytest.raises(TypeError, match="buffer"):
        predictor.learn(buffer, **LEARN)


@pytest.mark.parametrize("name", ["n_updates", "batch_size", "model_batch_size"])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_counts_that_are_none_are_refused(predictor, make_buffer, unchanged, name, value, error):
    with unchanged(predictor, predictor.optim), pytest.raises(error, match=name):
        predictor.learn(make_buffer(), **LEARN | {name: value})


@pytest.mark.parametrize(
    "names",
    [
        {"observation": "pixels", "next_observation": ("next", "pixels")},
        {"action": "act", "reward": ("next", "gain"), "terminated": ("next", "ended")},
        {"valid": "belongs"},
    ],
    ids=["observation", "others", "valid"],
)
def test_renamed_keys_are_read(make_predictor, make_transitions, make_buffer, names):
    """The same data under other keys gives the same losses."""

    def run(names):
        torch.manual_seed(1)
        predictor, data = make_predictor(), make_transitions()
        for name, new in names.items():
            if name != "valid":  # written by whoever samples the slices
                data.rename_key_(getattr(predictor.predictor_loss.tensor_keys, name), new)
        predictor.predictor_loss.set_keys(**names)
        return predictor.learn(make_buffer(data), **LEARN)[1]

    assert run(names) == run({})


def test_a_key_that_was_not_renamed_with_the_others_is_named(
    make_predictor, make_transitions, make_buffer, unchanged
):
    data = make_transitions()
    data.rename_key_("observation", "pixels")
    data["next"].rename_key_("observation", "pixels")
    predictor = make_predictor()
    predictor.predictor_loss.set_keys(observation="pixels")  # and not next_observation
    with unchanged(predictor), pytest.raises(KeyError, match=r"next.*observation"):
        predictor.learn(make_buffer(data), **LEARN)


def test_a_loss_that_diverged_reaches_no_parameter(make_predictor, make_buffer, unchanged):
    predictor, buffer = make_predictor(), make_buffer()
    predictor.learn(buffer, **LEARN)
    with torch.no_grad():
        predictor.rew_func.net[-1].bias.fill_(float("inf"))
    with unchanged(predictor, predictor.optim), pytest.raises(ValueError, match="loss"):
        predictor.learn(buffer, **LEARN)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError, SystemExit])
@pytest.mark.parametrize("where", ["model", "logger"])
def test_whatever_is_raised_is_undone(predictor, make_buffer, unchanged, error, where):
    """Wherever it comes from: here from the middle of an update, or from the logger at the end."""

    class Broken:
        def log_metrics(self, *args, **kwargs):
            raise error

    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise error

    logger = Broken() if where == "logger" else None
    if where == "model":
        predictor.model.members.register_forward_hook(fail)
    torch.manual_seed(1)
    with unchanged(predictor, predictor.optim), pytest.raises(error):
        predictor.learn(make_buffer(), **LEARN, logger=logger)
