"""What is compiled of a loss gives the values and the gradients of what is not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_conformance import TestModelLoss as ModelSuite
from test_conformance import TestPredictorLoss as PredictorSuite
from torch._dynamo.utils import counters

from layeredrl_torchrl import ModelLoss

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")


def model_loss(**options):
    """Of members with context, statistics and clipped inputs, and a batch for each."""
    loss = ModelLoss(ModelSuite().make().model, per_member=True, **options)
    batch = torch.stack([ModelSuite().batch(6) for _ in range(loss.model.n_models)])
    return loss, batch.set("weight", torch.rand(batch.shape))


def predictor_loss(**options):
    """Of an encoder that learns, reward and value, and slices some of whose steps are not valid."""
    batch = PredictorSuite().batch(6)
    batch["valid"] = torch.arange(4) <= (torch.arange(6) % 4)[:, None]
    return PredictorSuite().make(**options), batch


def values_and_gradients(loss, batch):
    loss.zero_grad()
    found = loss(batch)
    sum(value for name, value in found.items() if name.startswith("loss")).backward()
    gradients = {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}
    return found.detach().to_dict(), copy.deepcopy(gradients)


def check(loss, batch, backend):
    """Compiled in one graph, so that nothing is left out, and no other than before."""
    before = values_and_gradients(loss, batch)
    counters.clear()
    assert not loss.is_compiled
    loss.compile(fullgraph=True, backend=backend)
    assert loss.is_compiled
    after = values_and_gradients(loss, batch)
    assert counters["stats"]["unique_graphs"] > 0
    assert before[1].keys() == after[1].keys()
    assert any(gradient.abs().max() > 0 for gradient in before[1].values())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_compiled_model_loss_is_the_loss():
    check(*model_loss(), "inductor")


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_whole_model_loss_is_one_graph(beta):
    """Of which another backend than Inductor makes the same operations, in no time."""
    check(*model_loss(beta=beta), "aot_eager")


@pytest.mark.parametrize("learn_encoder", [True, False])
def test_the_whole_predictor_loss_is_one_graph(learn_encoder):
    check(*predictor_loss(learn_encoder=learn_encoder), "aot_eager")


def test_a_check_of_the_batch_still_raises_when_compiled():
    loss, batch = predictor_loss()
    loss.compile(backend="aot_eager")
    loss(batch)
    batch["observation"][1, 0, 2] = float("nan")
    with pytest.raises(ValueError, match="observation holds 1 non-finite"):
        loss(batch)


COMPILED = []


def noting(graph, inputs):
    """A backend that runs what it is given as it is."""
    COMPILED.append(graph)
    return graph


def test_copies_and_other_processes_compile_as_well():
    for make in (model_loss, predictor_loss):
        loss, batch = make()
        state, plain = list(loss.state_dict()), copy.deepcopy(loss)
        loss.compile(backend=noting)
        assert list(loss.state_dict()) == state
        for found in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            torch._dynamo.reset()  # what was compiled for one would do for its copy
            COMPILED.clear()
            found(batch)
            assert COMPILED
        COMPILED.clear()
        plain(batch)
        assert not COMPILED
