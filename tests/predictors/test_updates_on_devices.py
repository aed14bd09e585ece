"""Learning on a GPU: a pretended one that notes waits and copies, and a real one if any."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers import make_transitions
from pretended import Accelerator
from tensordict import TensorDict
from tensordict.nn import CudaGraphModule
from torch import nn
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer, Unbounded

from layeredrl_torchrl import (
    BootstrappedBatches,
    EarlyStopping,
    EncoderNet,
    ModelLoss,
    ModelTraining,
    PredictorFactory,
)
from layeredrl_torchrl.objectives.terms import TermsLoss

OBS, ACTIONS = 4, 2
ENCODER = partial(EncoderNet, latent_state_dim=3, context_dim=1)


def build(*, encoder=None, **options):
    torch.manual_seed(0)
    factory = PredictorFactory(
        hidden_sizes=(8, 8), n_models=3, partial_encoder=encoder, predictor_options=options
    )
    return factory(Unbounded((OBS,)), Bounded(-1.0, 1.0, (ACTIONS,)))


def transitions(n, device="cpu"):
    data = make_transitions(n, obs_dim=OBS, action_dim=ACTIONS, episode_length=n + 1)
    data["next", "observation"] = data["observation"] + 0.1
    return data.to(device)


def buffer(device="cpu", n=200):
    torch.manual_seed(1)
    made = TensorDictReplayBuffer(storage=LazyTensorStorage(n, device=device))
    made.extend(transitions(n))
    return made


def move(accelerator, predictor):
    """A pretended copy, whose optimizer holds the pretended parameters as after ``.to(device)``."""
    there = accelerator.move(predictor)
    names = {id(parameter): name for name, parameter in predictor.named_parameters()}
    groups = zip(predictor.optim.param_groups, there.optim.param_groups, strict=True)
    for ours, theirs in groups:
        theirs["params"] = [there.get_parameter(names[id(p)]) for p in ours["params"]]
    there.optim.step = lambda: None  # torch has none for a device that only has a name
    return there


@pytest.mark.filterwarnings("ignore:.*make up the spread")
@pytest.mark.parametrize("encoder", [None, ENCODER])
@pytest.mark.parametrize("on_device", [False, True])
def test_what_learning_waits_for_does_not_grow_with_its_updates(on_device, encoder):
    accelerator = Accelerator()

    def notes(n_updates):
        data = buffer()
        if on_device:
            stored = data.storage._storage
            data.storage._storage = stored.apply(accelerator._there, device=accelerator.device)
        predictor = build(encoder=encoder, holdout_share=0.0)
        predictor = move(accelerator, predictor)
        with accelerator.noted() as found:
            predictor.learn(data, n_updates, 16, 16, 0)
        return found

    few, many = notes(2), notes(6)
    assert many == few


def test_losses_are_compiled_once_for_all_updates():
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    predictor, data = build(), buffer()
    predictor.model_loss.compile(backend=backend)
    predictor.predictor_loss.compile(backend=backend)
    counts = []
    for _ in range(2):
        predictor.learn(data, 12, 16, 16, 0)  # with an annealed learning rate and beta
        counts.append(len(compiled))
    assert 0 < counts[0] == counts[1] < 5


class Big(TermsLoss):
    """An own loss with parameters, whose batches are TensorDicts."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(OBS, 1)

    def terms(self, prepared):
        return {"loss_own": self.layer(prepared["observation"]).square().mean()}


SCHEDULES = {
    "plain": {},
    "warm-up": {"encoder": ENCODER, "encoder_warm_up": 6},
    "stopping": {
        "model_training": ModelTraining(
            early_stopping=EarlyStopping(every=4, patience=1, min_delta=1.0),
            member_batches=BootstrappedBatches(),
            annealing=0.5,
        )
    },
}


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_captured_updates_are_what_they_are_one_by_one(schedule, where):
    data = buffer(where)

    def learned(*, captured):
        predictor = build(**SCHEDULES[schedule])
        predictor.add_loss(Big(), {"loss_own": 0.1})
        predictor.cuda()
        if captured:
            predictor.compile(cudagraphs=True, backend="eager")
        infos = []
        for seed in range(3):
            torch.manual_seed(seed)
            infos.append(predictor.learn(data, 20, 16, 16, 0)[1])
            # Another optimizer's state, and parameters of an earlier time, are seen by graphs.
            predictor.optim.load_state_dict(predictor.optim.state_dict())
        assert not captured or len(predictor.updates.graphs) > 0
        return predictor, infos

    (eager, expected), (captured, infos) = learned(captured=False), learned(captured=True)
    torch.testing.assert_close(infos, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(captured.state_dict(), eager.state_dict(), rtol=1e-3, atol=1e-4)
    assert captured.model.predicting_averages


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_what_is_not_finite_on_a_gpu_is_named_and_undone(captured):
    predictor = build(model_lr=lambda n_steps: 1e30 if n_steps else 1e-3).cuda()
    if captured:
        predictor.compile(cudagraphs=True, backend="eager")
    data = buffer("cuda")
    predictor.learn(data, 10, 16, 16, 0)
    before = copy.deepcopy(predictor.state_dict())
    with pytest.raises(ValueError, match=r"the loss, .*loss_dynamics.* is not finite"):
        predictor.learn(data, 10, 16, 16, 1)
    torch.testing.assert_close(predictor.state_dict(), before, rtol=0, atol=0)
    predictor.learn(data, 10, 16, 16, 0)
    another = copy.deepcopy(predictor)  # captures for itself
    another.learn(data, 10, 16, 16, 0)
    assert int(another.n_learn_updates) == int(predictor.n_learn_updates) + 10


@pytest.mark.gpu
def test_gradient_steps_of_a_user_can_be_captured():
    def losses(*, captured):
        model = build().cuda().model
        loss = ModelLoss(model)
        optim = torch.optim.AdamW(model.members.parameters(), lr=1e-3, capturable=True)

        def step(td):
            out = loss(td)
            optim.zero_grad()
            (out["loss_dynamics"] + out["loss_termination"]).backward()
            nn.utils.clip_grad_norm_(model.members.parameters(), 10.0)
            optim.step()
            return out.detach()

        torch.manual_seed(3)
        call = CudaGraphModule(step, in_keys=[], out_keys=[]) if captured else step
        found = []
        for _ in range(8):
            td = transitions(16, device="cuda")
            state = td["observation"]
            rows = {"state": state, "context": state[:, :0], "action": td["action"]}
            rows["next"] = {"state": td["next", "observation"]}
            rows["next"]["terminated"] = td["next", "terminated"]
            found.append(call(TensorDict(rows, [16], device="cuda"))["loss_dynamics"].item())
        return found

    assert losses(captured=True) == pytest.approx(losses(captured=False), rel=1e-4)
