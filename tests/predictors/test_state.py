"""Saving, loading and resuming predictors."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    learn,
    make_buffer,
    make_predictor,
    make_transitions,
    moved,
    parameters,
    unchanged,
)
from torch import nn
from torchrl.checkpoint import Checkpoint, CheckpointError, GlobalRNGState
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_torchrl import BootstrappedBatches, EncoderNet, ModelTraining, ProbFCDynamics


class Custom(nn.Module):
    """A member that is not the built-in network, so that members run through vmap."""

    def __init__(self, *spaces, width=4):
        super().__init__()
        self.inner = ProbFCDynamics(*spaces, hidden_sizes=(width,))

    def forward(self, state, context, action):
        return self.inner(state, context, action)


def uneven():
    """Members of different widths, which run one after the other."""
    sizes = iter([4, 8] * 10)
    return lambda *spaces: Custom(*spaces, width=next(sizes))


MODELS = {
    "modes": lambda: {"n_modes": 2},
    "custom": lambda: {"partial_net": Custom},
    "uneven": lambda: {"partial_net": uneven()},
}


def files(folder):
    """What every file of a folder holds."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "storage", "layout"),
    [
        ("modes", LazyTensorStorage, "directory"),
        ("custom", LazyMemmapStorage, "directory"),
        ("uneven", LazyTensorStorage, "archive"),
    ],
)
def test_a_resumed_run_gives_the_losses_of_one_that_was_not_interrupted(
    tmp_path, name, storage, layout
):
    """Again and again: going on writes nothing into the files of a checkpoint."""
    batches = [make_transitions(n, obs_dim=3) for n in (60, 20)]
    for data in batches:
        data["observation"][:, 2] = data["next", "observation"][:, 2] = 1.0

    def start():
        encoder = EncoderNet((3,), latent_state_dim=2, context_dim=1)
        training = ModelTraining(member_batches=BootstrappedBatches())
        options = {"model": MODELS[name](), "model_training": training, "tau": 0.3}
        predictor = make_predictor(encoder, context_dim=1, **options)
        buffer = TensorDictReplayBuffer(storage=storage(70))
        parts = {"predictor": predictor, "optim": predictor.optim, "buffer": buffer}
        checkpoint = Checkpoint(**parts, rng=GlobalRNGState(), format=layout)
        return predictor, buffer, checkpoint

    def go_on(predictor, buffer):
        buffer.extend(batches[1])
        return [learn(predictor, buffer, n_updates=8) for _ in range(2)]  # "modes" is calibrated

    predictor, buffer, checkpoint = start()
    buffer.extend(batches[0])
    learn(predictor, buffer, n_updates=190 if name == "modes" else 10)
    checkpoint.save(tmp_path / "checkpoint")
    saved, expected = files(tmp_path), go_on(predictor, buffer)
    for seed in (99, 100):
        torch.manual_seed(seed)
        other, buffer, checkpoint = start()
        checkpoint.load(tmp_path / "checkpoint")
        before = parameters(other)
        assert go_on(other, buffer) == expected
        torch.testing.assert_close(other.state_dict(), predictor.state_dict(), rtol=0, atol=0)
        assert moved(other, before) == set(before)  # the optimizer holds what was loaded into
        assert files(tmp_path) == saved


OTHERS = {
    "wider": {"hidden": (9,)},
    "deeper": {"hidden": (8, 8)},
    "members": {"model": {"n_models": 3}},
    "modes": {"model": {"n_modes": 2}},
    "state": {"state_dim": 3},
    "actions": {"model": {"action_space": 2}},
    "no value": {"val_func": None},
    "known reward": {"rew_func": lambda state, context, action: state.sum(-1)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, name):
    first, second = make_predictor(), make_predictor(**OTHERS[name])
    for one, other in ((first, second), (second, first)):
        with unchanged(one), pytest.raises(ValueError, match="does not fit"):
            one.load_state_dict(other.state_dict())
    path = Checkpoint(predictor=second).save(tmp_path / "checkpoint")
    with unchanged(first), pytest.raises(CheckpointError, match="does not fit"):
        Checkpoint(predictor=first).load(path)


def test_an_optimizer_of_another_architecture_is_not_loaded(tmp_path):
    """Components are loaded in alphabetical order, so the optimizer before the predictor."""
    first, second, buffer = make_predictor(), make_predictor(hidden=(9,)), make_buffer()
    learn(first, buffer)
    path = Checkpoint(predictor=first, optim=first.optim).save(tmp_path / "checkpoint")
    message = r"optim.*model.*\(8,.*\(9,.*sizes they were saved with"
    for other in (second, copy.deepcopy(second)):
        checkpoint = Checkpoint(predictor=other, optim=other.optim)
        with unchanged(other, other.optim), pytest.raises(CheckpointError, match=message):
            checkpoint.load(path)
        learn(other, buffer)  # and it still learns


def test_the_message_says_what_differs():
    first, second = make_predictor(), make_predictor(hidden=(9,))
    part = {k: v for k, v in second.state_dict().items() if k.startswith("val_func")}
    with pytest.raises(ValueError, match=r"val_func.*\(9, 2\).*\(8, 2\).*sizes it was saved with"):
        first.load_state_dict(part, strict=False)
    state = first.state_dict()
    del state["rew_func.net.0.weight"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"extra: not in.*rew_func\.net\.0\.weight: not saved"):
        first.load_state_dict(state)
    for module in (first, first.model):
        saved = {name: value.clone() for name, value in module.state_dict().items()}
        name = next(name for name, _ in module.named_parameters())
        saved[name].view(-1)[0] = float("nan")
        with unchanged(module), pytest.raises(ValueError, match=f"not finite.*{name}"):
            module.load_state_dict(saved)


def test_strict_false_loads_what_is_there():
    first, second = make_predictor(), make_predictor()
    part = {k: v for k, v in second.state_dict().items() if k.startswith("model.")}
    value = first.val_func.net[0].weight.clone()
    first.load_state_dict(part, strict=False)
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict())
    assert torch.equal(first.val_func.net[0].weight, value)


@pytest.mark.parametrize("part", [None, "model", "rew_func", "model_loss", "predictor_loss"])
def test_by_default_all_is_loaded_and_parameters_stay_the_same_objects(part):
    first, second = (getattr(p, part) if part else p for p in (make_predictor(), make_predictor()))
    before, state = list(first.parameters()), second.state_dict()
    first.load_state_dict(state)
    torch.testing.assert_close(first.state_dict(), state, rtol=0, atol=0)
    assert all(a is b for a, b in zip(first.parameters(), before, strict=True))
    del state[next(iter(state))]
    with unchanged(first), pytest.raises(ValueError, match="not saved"):
        first.load_state_dict(state)
