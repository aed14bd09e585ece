"""Bad input to ``learn``: a clear error, and nothing of the predictor is changed."""

from __future__ import annotations

import pytest
import torch
from helpers import learn, make_buffer, make_predictor, make_transitions, unchanged
from tensordict import TensorDict
from torchrl.data import (
    HERReplayBuffer,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    ReplayBufferEnsemble,
    TensorDictReplayBuffer,
)

from layeredrl_torchrl import EncoderNet, ModelTraining
from layeredrl_torchrl.objectives import MemberBatches

NAN, INF = float("nan"), float("inf")
NEXT, REWARD, TERMINATED, DONE = (
    ("next", key) for key in ("observation", "reward", "terminated", "done")
)


def without(key):
    return lambda data: data.exclude(key)


def with_(key, change):
    return lambda data: data.set(key, change(data[key]))


def twice(x):
    return torch.cat([x, x], -1)


BAD = {
    "no observation": (without("observation"), KeyError, "observation"),
    "no next observation": (without(NEXT), KeyError, "observation"),
    "no action": (without("action"), KeyError, "action"),
    "no reward": (without(REWARD), KeyError, "reward"),
    "no terminated": (without(TERMINATED), KeyError, "terminated"),
    "no done": (without(DONE), KeyError, "done"),
    "misnamed action": (lambda d: d.rename_key_("action", "act"), KeyError, "action.*act"),
    "NaN observation": (with_("observation", lambda x: x * NAN), ValueError, "observation"),
    "NaN next observation": (with_(NEXT, lambda x: x * NAN), ValueError, "observation"),
    "NaN reward": (with_(REWARD, lambda x: x * NAN), ValueError, "reward"),
    "infinite reward": (with_(REWARD, lambda x: x * INF), ValueError, "reward"),
    "NaN action": (with_("action", lambda x: x * NAN), ValueError, "action"),
    "action outside": (with_("action", lambda x: x * 0 + 1.5), ValueError, "action.*outside"),
    "float terminated": (with_(TERMINATED, torch.Tensor.float), ValueError, "terminated.*bool"),
    "float done": (with_(DONE, torch.Tensor.float), ValueError, "done.*bool"),
    "wide observation": (
        lambda data: with_(NEXT, twice)(with_("observation", twice)(data)),
        ValueError,
        "observation.*4.*expected.*2",
    ),
    "wide action": (with_("action", twice), ValueError, "action.*shape.*2.*expected.*1"),
    "flat reward": (with_(REWARD, lambda x: x.squeeze(-1)), ValueError, "reward"),
    "wide reward": (with_(REWARD, twice), ValueError, "reward"),
    "several steps": (
        lambda data: data.set("steps_to_next_obs", torch.full((60, 1), 3)),
        ValueError,
        r"3 steps.*MultiStep.*n_steps",
    ),
}


@pytest.fixture(params=["new", "trained"])
def predictor(request):
    """Before its first call it takes statistics; a trained one on as much data does not."""
    predictor = make_predictor(EncoderNet((2,), latent_state_dim=2, context_dim=0))
    if request.param == "trained":
        learn(predictor, make_buffer())
    return predictor


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused(predictor, name):
    spoil, error, match = BAD[name]
    buffer = make_buffer(spoil(make_transitions()))
    with unchanged(predictor, predictor.optim), pytest.raises(error, match=match):
        learn(predictor, buffer)


@pytest.mark.parametrize("key", ["observation", "action", REWARD, NEXT])
def test_one_bad_row_is_found_and_nothing_is_half_updated(predictor, key):
    """Wherever among the batches it is met: the updates before it are not kept."""
    data = make_transitions()
    data[key][30] = NAN
    with unchanged(predictor, predictor.optim), pytest.raises(ValueError, match=r"nan|NaN"):
        learn(predictor, make_buffer(data), n_updates=20)


def test_it_can_go_on_after_an_error():
    found = []
    for rewards in ([1.0], [NAN, 1.0]):
        torch.manual_seed(1)
        predictor, data = make_predictor(), make_transitions()
        if len(rewards) == 2:
            with pytest.raises(ValueError, match="reward"):
                learn(predictor, make_buffer(with_(REWARD, lambda x: x * NAN)(data.clone())))
        torch.manual_seed(2)
        found.append(learn(predictor, make_buffer(data)))
    assert found[0] == found[1]


@pytest.mark.parametrize(("k_steps", "n_steps"), [(1, 3), (4, 2)])
def test_a_buffer_shorter_than_a_slice_is_refused(k_steps, n_steps):
    predictor = make_predictor(k_steps=k_steps, n_steps=n_steps)
    length = k_steps + n_steps
    told = f"got {length - 1} rows along time, expected at least length={length}"
    with unchanged(predictor, predictor.optim), pytest.raises(ValueError, match=told):
        learn(predictor, make_buffer(n_steps=length - 1))
    learn(predictor, make_buffer(n_steps=length))


class Flipping(TensorDictReplayBuffer):
    def _sample(self, *args, **kwargs):
        data, info = super()._sample(*args, **kwargs)
        return -data, info


TENSORS = {"storage": LazyTensorStorage(100)}
NO_BUFFERS = {
    "list": [TensorDict({}, [])],
    "list storage": ReplayBuffer(storage=ListStorage(10)),
    "storage": LazyTensorStorage(10),
    "none": None,
    "hindsight": HERReplayBuffer(lambda td: td["reward"], **TENSORS),
    "own": Flipping(**TENSORS),
    "ensemble": ReplayBufferEnsemble(TensorDictReplayBuffer(**TENSORS)),
    "default storage": TensorDictReplayBuffer(batch_size=16),
}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        *(({"buffer": b}, TypeError, "buffer") for b in NO_BUFFERS.values()),
        ({"buffer": TensorDictReplayBuffer(**TENSORS)}, ValueError, "empty"),
        *(
            ({name: value}, error, name)
            for name in ("n_updates", "batch_size", "model_batch_size")
            for value, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError))
        ),
        ({"logger": "tensorboard"}, TypeError, r"torchrl.*Logger.*got str"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, error, match):
    predictor = make_predictor()
    with unchanged(predictor, predictor.optim), pytest.raises(error, match=match):
        learn(predictor, **{"buffer": make_buffer()} | arguments)


def test_a_key_that_was_not_renamed_with_the_others_is_named():
    data = make_transitions()
    data.rename_key_("observation", "pixels")
    data["next"].rename_key_("observation", "pixels")
    predictor = make_predictor()
    predictor.predictor_loss.set_keys(observation="pixels")  # and not next_observation
    with unchanged(predictor), pytest.raises(KeyError, match=r"next.*observation"):
        learn(predictor, make_buffer(data))


def test_a_loss_that_diverged_reaches_no_parameter(capfd):
    predictor, buffer = make_predictor(), make_buffer()
    learn(predictor, buffer)
    with torch.no_grad():
        predictor.rew_func.net[-1].bias.fill_(INF)
    with unchanged(predictor, predictor.optim), pytest.raises(ValueError, match="loss"):
        learn(predictor, buffer, progress=True)
    assert capfd.readouterr().err.endswith("\n")  # the bar is closed


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["model", "logger"])
def test_whatever_is_raised_is_undone(predictor, error, where):
    """Wherever it comes from: here from the middle of an update, or from the logger at the end."""

    class Broken:
        def log_metrics(self, *args, **kwargs):
            raise error

    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise error

    if where == "model":
        predictor.model.members.register_forward_hook(fail)
    with unchanged(predictor, predictor.optim), pytest.raises(error):
        learn(predictor, make_buffer(), logger=Broken() if where == "logger" else None)


class Assigns(MemberBatches):
    """Batches of one's own, shared in a way that ``how`` has."""

    def __init__(self, how):
        self.how = how

    def n_rows(self, batch_size, n_models):
        return batch_size

    def assign(self, batch, n_models):
        return self.how(batch)


@pytest.mark.parametrize(
    "how",
    [
        lambda batch: batch,
        lambda batch: batch.expand(3, *batch.shape),
        lambda batch: batch.expand(2, *batch.shape)[:, 1:],
        lambda batch: batch["state"],
    ],
    ids=["not shared", "three", "part", "tensor"],
)
def test_batches_of_ones_own_are_checked(how):
    training = ModelTraining(member_batches=Assigns(how))
    predictor = make_predictor(model_training=training)
    message = r"assign of Assigns gave .*expected a TensorDict \[2, N\]"
    with unchanged(predictor), pytest.raises(ValueError, match=message):
        predictor.learn(make_buffer(), 3, 8, 7, n_total_env_steps=60)
