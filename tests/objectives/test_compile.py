"""What is compiled of a loss gives the values and the gradients of what is not."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch._dynamo.utils import counters
from torchrl.data import Bounded, Unbounded

from layeredrl_torchrl import (
    EncoderNet,
    ModelLoss,
    PredictorLoss,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    RewardNet,
    ValueNet,
)

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")

B, OBS, A = 6, 4, 2


def randomize(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def model_loss(**options):
    """Of two members with context, statistics and clipped inputs, and a batch for each."""
    model = ProbabilisticEnsemble(
        Unbounded((3,)),
        Unbounded((2,)),
        Bounded(-1.0, 1.0, (A,)),
        partial(ProbFCDynamics, hidden_sizes=(8, 8)),
        n_models=2,
        n_modes=2,
    )
    randomize(model.members)
    action = model.action_spec.rand
    model.fit_statistics(torch.randn(9, 3), torch.randn(9, 2), action((9,)), torch.randn(9, 3))
    batch = TensorDict(
        {
            "state": 2 * torch.randn(2, B, 3),
            "context": torch.randn(2, B, 2),
            "action": action((2, B)),
            "weight": torch.rand(2, B),
            "next": {"state": torch.randn(2, B, 3), "terminated": torch.rand(2, B, 1) < 0.5},
        },
        [2, B],
    )
    return ModelLoss(model, per_member=True, **options), batch


def predictor_loss(**options):
    """Of an encoder that learns, reward and value, and slices some of whose steps are not valid."""
    encoder = EncoderNet((OBS,), latent_state_dim=2, context_dim=1)
    heads = [randomize(RewardNet(2, 1, A, (8,))), randomize(ValueNet(2, 1, (8,)))]
    loss = PredictorLoss(encoder, *heads, k_steps=2, n_steps=2, **options)
    batch = TensorDict(
        {
            "observation": torch.randn(B, 4, OBS),
            "action": torch.rand(B, 4, A),
            "valid": torch.arange(4) <= (torch.arange(B) % 4)[:, None],
            "next": {
                "observation": torch.randn(B, 4, OBS),
                "reward": torch.randn(B, 4, 1),
                "terminated": torch.zeros(B, 4, 1, dtype=torch.bool),
            },
        },
        [B, 4],
    )
    return loss, batch


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
    loss.compile(fullgraph=True, backend=backend)
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
