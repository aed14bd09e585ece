"""Predictors behind encoders of several entries, of images, and of any module."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers import (
    LEARN,
    SMALL_PLANNER,
    collected,
    learn,
    make_buffer,
    make_predictor,
    make_transitions,
    moved,
    observed,
    parameters,
    planner_level,
)
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import GymEnv, RenameTransform, TransformedEnv

from layeredrl_torchrl import FromBuffer, PredictorFactory
from layeredrl_torchrl.nets import ModuleEncoder, SimNorm
from layeredrl_torchrl.objectives import ConsistencyLoss

SPEC = Composite(pole=Unbounded((1,)), desired_goal=Unbounded((1,)), cart=Unbounded((2,)))
KEYS = ["pole", "desired_goal", "cart"]


def apart(data):
    """The same transitions ``[T]`` with the observation ``[T, 4]`` in three entries."""
    data = data.clone()
    for td in (data, data["next"]):
        pole, goal, cart = td.pop("observation").split([1, 1, 2], -1)
        td.update({"pole": pole, "desired_goal": goal, "cart": cart})
    return data


def test_several_entries_are_learned_as_one_joined_vector_is():
    data = make_transitions(obs_dim=4)
    action, found = Bounded(-1.0, 1.0, (1,)), []
    for several in (True, False):
        options = {"observation_key": KEYS} if several else {"context_dims": [1]}
        torch.manual_seed(0)
        factory = PredictorFactory(hidden_sizes=(8,), n_models=2, **options)
        predictor = factory(SPEC if several else Unbounded((4,)), action)
        buffer = make_buffer(apart(data) if several else data)
        learn(predictor, buffer)
        obs = apart(data).select(*KEYS) if several else data["observation"]
        planner = SMALL_PLANNER(predictor)
        td = observed(planner, data["observation"])
        td = td.exclude("observation").update(obs) if several else td
        torch.manual_seed(1)
        start = FromBuffer(buffer, predictor)(5)
        found.append([*predictor.predict(obs, data["action"]), planner(td)["action"], start])
    for a, b in zip(*found, strict=True):
        assert (a == b).all()


def test_a_level_learns_from_an_environment_with_several_entries():
    env = GymEnv("Pendulum-v1")
    env = TransformedEnv(env, RenameTransform(["observation"], ["again"], create_copy=True))
    env.set_seed(0)
    keys = ["observation", "again"]
    factory = PredictorFactory(hidden_sizes=(8,), n_models=2, observation_key=keys)
    level = planner_level(env=env, predictor_factory=factory)
    for data in collected(env, level, 2):
        info = level.learn(data)
    assert info["n_updates"] == 2
    assert level.predictor.latent_state_dim == 6
    n_stored = len(level.buffer)
    with pytest.raises(KeyError, match="again"):
        level.learn(data.exclude(("next", "again")))
    for at in ("again", ("next", "again")):
        wide = data.clone().set(at, torch.zeros(*data.shape, 4))
        with pytest.raises(ValueError, match=r"again.*\b4\b"):
            level.learn(wide)
    assert len(level.buffer) == n_stored


def images(n):
    """Images of bytes with a bright column that the action moves; the reward is its place."""
    place, action = torch.randint(8, (n,)), torch.randint(-1, 2, (n, 1))
    after = (place + action.squeeze(-1)).clamp(0, 7)

    def image(x):
        return (
            (255 * nn.functional.one_hot(x, 8)).to(torch.uint8).view(n, 1, 1, 8).expand(n, 1, 8, 8)
        )

    no, yes = torch.zeros(n, 1, dtype=torch.bool), torch.ones(n, 1, dtype=torch.bool)
    following = {"pixels": image(after), "reward": place.unsqueeze(-1) / 2, "terminated": no}
    following |= {"done": yes, "truncated": yes.clone()}
    rows = {"pixels": image(place), "action": action.float(), "next": following}
    return TensorDict(rows, [n]).contiguous()


class Pixels(nn.Module):
    """A small convolutional network that ends in SimNorm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, 2)
        self.head = nn.Sequential(nn.SiLU(), nn.Flatten(), nn.Linear(36, 16), SimNorm(4))

    def forward(self, pixels):
        return self.head(self.conv(pixels / 255))


def of_images(tau):
    factory = PredictorFactory(
        hidden_sizes=(32,),
        n_models=2,
        observation_key=["pixels"],
        partial_encoder=lambda shapes: ModuleEncoder(Pixels(), shapes, latent_state_dim=16),
        predictor_options={"encoder_lr": 3e-3},
    )
    spec = Composite(pixels=Unbounded((1, 8, 8), dtype=torch.uint8))
    predictor = factory(spec, Bounded(-1.0, 1.0, (1,)))
    loss = ConsistencyLoss(predictor.encoder, predictor.model, tau=tau)
    predictor.add_loss(loss, {"loss_consistency": 1.0})
    return predictor, loss


def test_rewards_after_two_steps_are_learned_from_images():
    torch.manual_seed(0)
    predictor, _ = of_images(1.0)
    numbers = LEARN | {"n_updates": 400, "batch_size": 64, "model_batch_size": 64}
    predictor.learn(make_buffer(images(600)), **numbers)
    test = images(200)
    plan = test["action"].unsqueeze(1).expand(-1, 2, -1)
    traj = predictor.rollout(test.select("pixels"), plan, deterministic=True)
    seen = traj["next", "reward"].squeeze(-1).mean((1, 2))
    now = test["next", "reward"]
    expected = torch.cat([now, (now + test["action"] / 2).clamp(0, 3.5)], 1)
    error = (seen - expected).square().mean(0).sqrt() / expected.std(0)
    assert (error < 0.3).all(), error  # 1 would be a guess


@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_the_consistency_loss_is_the_error_of_the_next_state_and_moves_the_encoder_alone(tau):
    torch.manual_seed(0)
    encoder = ModuleEncoder(nn.Linear(2, 2), (2,), 2)
    predictor, buffer = make_predictor(encoder), make_buffer()
    learn(predictor, buffer)
    predictor.zero_grad()
    loss = ConsistencyLoss(encoder, predictor.model, tau=tau)
    rows = buffer[:5].unsqueeze(1)
    found = loss(rows)["loss_consistency"]
    model, total = predictor.model, 0.0
    state = encoder.module(rows["observation"][:, 0])
    following = encoder.module(rows["next", "observation"][:, 0]).detach()
    members = (
        state.expand(2, 5, 2),
        state[..., :0].expand(2, 5, 0),
        rows["action"][:, 0].expand(2, 5, 1),
    )
    (mean, _), _, _ = model.predict_normalized(*members)  # one mode
    for member in range(2):
        total += (mean[member, :, 0] - model.target(state, following)).square().sum() / 20
    torch.testing.assert_close(found, total)
    for key in ("valid", ("collector", "mask")):
        padded = torch.cat(
            [rows.apply(lambda x: x * torch.nan if x.is_floating_point() else x), rows]
        )
        padded[key] = (torch.arange(10) >= 5).unsqueeze(1)
        torch.testing.assert_close(loss(padded)["loss_consistency"], total)
    padded[key].zero_()
    with pytest.raises(ValueError, match="no row counts"):
        loss(padded)
    for key in ("observation", ("next", "observation")):
        broken = rows.clone()
        broken[key][2] = torch.nan
        with pytest.raises(ValueError, match="non-finite"):
            loss(broken)
    assert not any(p.requires_grad for p in loss.parameters())  # the encoder is the predictor's
    found.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    mine = encoder.module.weight.grad.clone()
    encoder.zero_grad()
    total.backward()
    torch.testing.assert_close(mine, encoder.module.weight.grad)

    predictor.add_loss(loss, {"loss_consistency": 100.0})
    old, before = copy.deepcopy(encoder), parameters(predictor)
    learn(predictor, buffer, n_updates=1)
    assert {f"encoder.module.{name}" for name in ("weight", "bias")} <= moved(predictor, before)
    if tau < 1.0:
        for new, was, copied in zip(
            encoder.parameters(), old.parameters(), loss.target_encoder.parameters(), strict=True
        ):
            torch.testing.assert_close(copied, was + tau * (new - was))


def test_the_slow_copy_is_saved_with_the_predictor():
    make, data = partial(of_images, 0.5), make_buffer(images(60))
    predictor, loss = make()
    learn(predictor, data)
    resumed, other = make()
    resumed.load_state_dict(predictor.state_dict())
    for a, b in zip(loss.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


class OwnNet(nn.Module):
    """A member somebody wrote; ``extra`` makes members differ, and ``tied`` uses a weight twice."""

    def __init__(self, *_, extra=0, tied=False):
        super().__init__()
        self.torso, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.extra = nn.Parameter(torch.zeros(extra))
        if tied:
            self.head.weight = self.torso.weight

    def forward(self, state, context, action):
        out = self.head(torch.tanh(self.torso(torch.cat([state, action], -1))))
        mean, ones = out[..., :2].unsqueeze(-2), torch.ones_like(out[..., :1])
        return (mean, torch.ones_like(mean)), ones, out[..., 2].sigmoid()


@pytest.mark.parametrize("kind", ["vmap", "different", "tied"])
def test_the_consistency_loss_takes_members_of_any_kind(kind):
    torch.manual_seed(0)
    sizes = iter([1, 2])

    def partial_net(*spaces):
        return OwnNet(*spaces, extra=next(sizes) if kind == "different" else 0, tied=kind == "tied")

    encoder = ModuleEncoder(nn.Linear(2, 2), (2,), 2)
    predictor, buffer = make_predictor(encoder, model={"partial_net": partial_net}), make_buffer()
    loss = ConsistencyLoss(encoder, predictor.model)
    predictor.add_loss(loss, {"loss_consistency": 1.0})
    learn(predictor, buffer)
    predictor.zero_grad()
    rows, model = buffer[:5].unsqueeze(1), predictor.model
    found = loss(rows)["loss_consistency"]
    state, context = encoder(rows["observation"][:, 0])
    following, _ = encoder(rows["next", "observation"][:, 0])
    given = (x.expand(2, *x.shape) for x in (state, context, rows["action"][:, 0]))
    (mean, _), _, _ = model.predict_normalized(*given)
    expected = (mean[:, :, 0] - model.target(state, following.detach())).square().mean()
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    ours = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    expected.backward()
    for one, p in zip(ours, encoder.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)
