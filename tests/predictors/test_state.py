"""Saving, loading and resuming predictors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrl.checkpoint import Checkpoint, CheckpointError, GlobalRNGState

from layeredrl_torchrl import EncoderNet, ProbFCDynamics

LEARN = {"n_updates": 3, "batch_size": 8, "model_batch_size": 8, "n_total_env_steps": 60}


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
    "built-in": dict,
    "modes": lambda: {"n_modes": 2},
    "custom": lambda: {"partial_net": Custom},
    "uneven": lambda: {"partial_net": uneven()},
}


@pytest.fixture(params=MODELS)
def build(request, make_predictor):
    """Build predictors of one architecture, each with other parameters."""

    def build():
        encoder = EncoderNet((3,), latent_state_dim=2, context_dim=1)
        return make_predictor(encoder, context_dim=1, model=MODELS[request.param]())

    return build


@pytest.fixture
def data(make_transitions):
    data = make_transitions(obs_dim=3)
    data["observation"][:, 2] = data["next", "observation"][:, 2] = 1.0
    return data


def answers(predictor):
    """Everything that a predictor says about fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    obs = torch.randn(5, 3, generator=generator)
    act = 2 * torch.rand(5, 4, 1, generator=generator) - 1
    torch.manual_seed(4)
    traj = predictor.rollout(obs, act)
    return (*predictor.predict(obs, act[:, 0]), predictor.value(obs), traj["next", "state"])


def assert_same(first, second):
    torch.testing.assert_close(answers(first), answers(second), rtol=0, atol=0)


def test_torch_save_round_trip(build, data, make_buffer, tmp_path):
    predictor = build()
    predictor.learn(make_buffer(data), **LEARN)
    torch.save(predictor.state_dict(), tmp_path / "predictor.pt")
    other = build()
    assert not torch.equal(answers(other)[0], answers(predictor)[0])
    other.load_state_dict(torch.load(tmp_path / "predictor.pt", weights_only=True))
    assert_same(other, predictor)
    torch.testing.assert_close(
        other.target_val_func.state_dict(), predictor.target_val_func.state_dict()
    )


@pytest.mark.parametrize("layout", ["directory", "archive"])
def test_checkpoint_round_trip(build, data, make_buffer, tmp_path, layout):
    predictor = build()
    predictor.learn(make_buffer(data), **LEARN)
    Checkpoint(predictor=predictor, format=layout).save(tmp_path / "checkpoint")
    other = build()
    Checkpoint(predictor=other, format=layout).load(tmp_path / "checkpoint")
    assert_same(other, predictor)


def test_a_resumed_run_gives_the_losses_of_one_that_was_not_interrupted(
    build, data, make_buffer, tmp_path
):
    predictor, buffer = build(), make_buffer(data)
    predictor.learn(buffer, **LEARN)
    parts = {"predictor": predictor, "optim": predictor.optim, "buffer": buffer}
    Checkpoint(**parts, rng=GlobalRNGState()).save(tmp_path / "checkpoint")
    expected = [predictor.learn(buffer, **LEARN)[1] for _ in range(2)]

    torch.manual_seed(99)
    other, other_buffer = build(), make_buffer(data[:5])
    parts = {"predictor": other, "optim": other.optim, "buffer": other_buffer}
    Checkpoint(**parts, rng=GlobalRNGState()).load(tmp_path / "checkpoint")
    resumed = [other.learn(other_buffer, **LEARN)[1] for _ in range(2)]

    assert resumed == expected
    assert_same(other, predictor)


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
@pytest.mark.parametrize("direction", ["from", "to"])
def test_a_checkpoint_of_another_architecture_is_refused(
    make_predictor, unchanged, name, direction
):
    first, second = make_predictor(), make_predictor(**OTHERS[name])
    if direction == "to":
        first, second = second, first
    with unchanged(first), pytest.raises(ValueError, match="does not fit"):
        first.load_state_dict(second.state_dict())


@pytest.mark.parametrize("name", ["wider", "members", "no value"])
def test_so_is_one_of_torchrl(make_predictor, unchanged, tmp_path, name):
    Checkpoint(predictor=make_predictor(**OTHERS[name])).save(tmp_path / "checkpoint")
    predictor = make_predictor()
    with unchanged(predictor), pytest.raises(CheckpointError, match="does not fit"):
        Checkpoint(predictor=predictor).load(tmp_path / "checkpoint")


def test_the_message_says_what_differs(make_predictor):
    first, second = make_predictor(), make_predictor(hidden=(9,))
    with pytest.raises(ValueError, match=r"val_func.*\(9, 2\).*\(8, 2\)"):
        first.load_state_dict(
            {k: v for k, v in second.state_dict().items() if k.startswith("val_func")}, strict=False
        )
    state = first.state_dict()
    del state["rew_func.net.0.weight"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"extra: not in.*rew_func\.net\.0\.weight: not saved"):
        first.load_state_dict(state)


def test_strict_false_loads_what_is_there(make_predictor):
    first, second = make_predictor(), make_predictor()
    part = {k: v for k, v in second.state_dict().items() if k.startswith("model.")}
    value = first.val_func.net[0].weight.clone()
    first.load_state_dict(part, strict=False)
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict())
    assert torch.equal(first.val_func.net[0].weight, value)


def test_learning_goes_on_in_what_was_loaded(build, data, make_buffer):
    """The optimizer and the target's update still hold the parameters that were loaded into."""
    predictor, buffer = build(), make_buffer(data)
    predictor.load_state_dict(build().state_dict())
    predictor.learn(buffer, **LEARN)
    before = {k: p.detach().clone() for k, p in predictor.named_parameters()}
    predictor.learn(buffer, **LEARN)
    still = {k for k, p in predictor.named_parameters() if torch.equal(p, before[k])}
    assert not still
