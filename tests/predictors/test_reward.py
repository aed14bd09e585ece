"""Learning: what it changes and what not, and problems whose answers are known."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from helpers import (
    LEARN,
    learn,
    make_buffer,
    make_predictor,
    make_transitions,
    moved,
    parameters,
    parts_moved,
)
from tensordict import TensorDict
from torch import nn
from torchrl.data import (
    Categorical,
    LazyMemmapStorage,
    LazyTensorStorage,
    OneHot,
    TensorDictReplayBuffer,
)

from layeredrl_torchrl import BootstrappedBatches, EncoderNet, ModelTraining, SharedBatch
from layeredrl_torchrl.objectives import OwnBatches

# -- what learn returns and changes -----------------------------------------------------------


def test_it_returns_the_loss_and_its_weighted_terms():
    predictor = make_predictor(
        consistency_loss_weight=0.5,
        termination_loss_weight=2.0,
        rew_loss_weight=3.0,
        value_loss_weight=7.0,
        beta_nll=0.0,  # so that the loss is the likelihood
    )
    loss, info = predictor.learn(make_buffer(), **LEARN)
    assert loss.shape == ()
    assert not loss.requires_grad
    assert all(type(value) is float for value in info.values())
    total = 0.5 * (info["loss_dynamics"] + 2.0 * info["loss_termination"])
    total += 3.0 * info["loss_reward"] + 7.0 * info["loss_value"]
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert info["loss"] == pytest.approx(total, rel=1e-5)
    assert info["loss_dynamics"] == pytest.approx(2 * 2 * info["nll"], rel=1e-5)  # members, D
    assert info["n_updates"] == info["model_updates"] == predictor.n_learn_updates.item() == 3
    assert "holdout_nll" not in info  # that is early stopping's


@pytest.mark.parametrize(
    ("storage", "shape"),
    [
        (LazyTensorStorage(50), (60,)),  # smaller than the data: a ring
        (LazyMemmapStorage(100), (60,)),
        (LazyTensorStorage(100, ndim=2), (2, 30)),
    ],
    ids=["ring", "memory-mapped", "two lanes"],
)
def test_it_learns_from_any_storage_and_does_not_change_it(storage, shape):
    buffer = TensorDictReplayBuffer(storage=storage)
    buffer.extend(make_transitions().reshape(shape))
    before, length, writes = buffer.storage[:].clone(), len(buffer), buffer.write_count
    cursor = buffer.writer._cursor
    predictor = make_predictor(k_steps=2)
    start = parameters(predictor)

    learn(predictor, buffer)

    assert (buffer.storage[:] == before).all()
    assert set(buffer.storage[:].keys(True, True)) == set(before.keys(True, True))
    assert (len(buffer), buffer.write_count, buffer.writer._cursor) == (length, writes, cursor)
    assert moved(predictor, start) == set(start)


@pytest.mark.parametrize(
    ("options", "still"),
    [
        ({"model_lr": 0.0}, {"model"}),
        ({"reward_lr": 0.0}, {"rew_func"}),
        ({"value_lr": 0.0}, {"val_func"}),
        ({"encoder_lr": 0.0}, {"encoder"}),
        ({"learn_encoder": False}, {"encoder"}),
        ({"consistency_loss_weight": 0.0}, {"model"}),
        ({"rew_loss_weight": 0.0}, {"rew_func", "encoder"}),  # which learns by it alone
        ({"value_loss_weight": 0.0}, {"val_func"}),
    ],
)
def test_an_option_leaves_its_part_as_it_is(options, still):
    predictor, buffer = make_predictor(EncoderNet((2,), 2, 0), **options), make_buffer()
    nn.init.normal_(predictor.rew_func.net[-1].weight)  # at 0 no gradient passes to the encoder
    predictor.encoder.mask[0] = True
    mask = predictor.encoder.mask.clone()
    learn(predictor, buffer)  # takes the statistics, which rescale the last layers
    assert torch.equal(predictor.encoder.mask, mask) == ("learn_encoder" in options)
    for name in ("model", "rew_func", "val_func", "encoder"):
        part = getattr(predictor, name)
        before = parameters(part)
        torch.manual_seed(0)
        learn(predictor, buffer)
        assert moved(part, before) == (set() if name in still else set(before)), name


@pytest.mark.parametrize("known", [None, lambda state, context, action: state.sum(-1)])
@pytest.mark.parametrize("name", ["rew_func", "val_func"])
def test_reward_and_value_may_be_known_or_left_out(name, known):
    predictor = make_predictor(**{name: known})
    before = parameters(predictor)
    info = learn(predictor, make_buffer())
    assert ("loss_reward" in info, "loss_value" in info) == (name != "rew_func", name != "val_func")
    assert not any(name in parameter for parameter in before)
    assert moved(predictor, before) == set(before)
    if known and name == "val_func":
        obs = torch.randn(5, 2)
        torch.testing.assert_close(predictor.value(obs), obs.sum(-1))


def test_learning_rates_are_functions_of_the_environment_steps():
    asked = []

    def schedule(n_total_env_steps):
        asked.append(n_total_env_steps)
        return 0.0 if n_total_env_steps < 100 else 1e-3

    predictor, buffer = make_predictor(reward_lr=schedule), make_buffer()
    learn(predictor, buffer)
    before = parameters(predictor)
    learn(predictor, buffer, n_total_env_steps=99)
    assert "rew_func" not in parts_moved(predictor, before)
    learn(predictor, buffer, n_total_env_steps=100)
    assert "rew_func" in parts_moved(predictor, before)
    assert asked == [60, 99, 100]


def test_gradients_are_clipped():
    """Adam divides by ``|gradient| + 1e-8``: clipped far below that, it stands almost still."""
    largest = {}
    for norm in (None, 1e-13):
        torch.manual_seed(0)
        predictor, buffer = make_predictor(clip_grad_max_norm=norm), make_buffer()
        learn(predictor, buffer)
        before = parameters(predictor)
        learn(predictor, buffer)
        largest[norm] = max(
            (p.detach() - before[k]).abs().max().item()
            for k, p in predictor.named_parameters()
            if not k.startswith("target_val_func")
        )
    assert largest[None] > 1e-3
    assert largest[1e-13] < 1e-6


def test_the_target_takes_over_a_share_tau_of_each_update():
    predictor, buffer = make_predictor(tau=0.3), make_buffer()
    learn(predictor, buffer)
    old = parameters(predictor.target_val_func)
    learn(predictor, buffer, n_updates=1)
    for name, source in predictor.val_func.named_parameters():
        target = dict(predictor.target_val_func.named_parameters())[name]
        expected = 0.7 * old[name] + 0.3 * source
        torch.testing.assert_close(target, expected, check_stride=False)


# -- statistics -------------------------------------------------------------------------------


def test_statistics_are_those_of_the_buffer():
    data = make_transitions(400)
    data["observation"].mul_(3.0).add_(5.0)
    data["next", "observation"].mul_(3.0).add_(5.0)
    data["next", "reward"].mul_(7.0).sub_(20.0)
    predictor = make_predictor()
    learn(predictor, make_buffer(data))

    delta = data["next", "observation"] - data["observation"]
    for normalizer, sample in (
        (predictor.model.scaling.state, data["observation"]),
        (predictor.model.scaling.action, data["action"]),
        (predictor.model.scaling.target, delta),
        (predictor.rew_func.inputs, torch.cat([data["observation"], data["action"]], -1)),
        (predictor.val_func.inputs, data["observation"]),
        (predictor.target_val_func.inputs, data["observation"]),
    ):
        # from a sample, so within a few standard errors
        std, mean = torch.std_mean(sample, 0)
        assert ((normalizer.loc - mean).abs() < 0.2 * std).all()
        torch.testing.assert_close(normalizer.scale, std, rtol=0.2, atol=0)
    assert predictor.rew_func.out_loc.item() == pytest.approx(-20.0, abs=1.5)
    assert predictor.rew_func.out_scale.item() == pytest.approx(7.0, rel=0.2)


def refitted(predictor, buffer):
    """Whether learning takes new statistics (from a random sample, so they do change)."""
    before = predictor.model.scaling.state.loc.clone()
    learn(predictor, buffer)
    return not torch.equal(predictor.model.scaling.state.loc, before)


@pytest.mark.parametrize("steps", [(100, 8, 2, 10, 2), (100, 8, 4, 8, 4)], ids=["1", "2"])
@pytest.mark.parametrize("capacity", [100, 1000])
def test_statistics_are_taken_again_after_another_tenth(steps, capacity):
    """Whether the buffer still grows, or is a full ring whose rows are replaced."""
    lanes = 1 if 10 in steps else 2
    storage = LazyTensorStorage(capacity, ndim=lanes)
    buffer, predictor = TensorDictReplayBuffer(storage=storage), make_predictor()
    for n_steps, expected in zip(steps, (True, False, True, False, True), strict=True):
        data = make_transitions(n_steps)
        buffer.extend(data if lanes == 1 else data.reshape(lanes, -1))
        assert refitted(predictor, buffer) == expected
        assert not refitted(predictor, buffer)


def test_another_scale_of_rewards_does_not_change_the_value():
    """The last layer takes up the change of scale, so the function stays what it was."""
    predictor = make_predictor(value_lr=lambda steps: 1e-2 if steps == 0 else 0.0)
    buffer = make_buffer()
    learn(predictor, buffer, n_updates=20, n_total_env_steps=0)
    head, scaled = predictor.val_func, buffer.storage[:].clone()
    layer, scale = head.net[-1], head.out_scale.item()
    weight, bias = layer.weight.detach() * scale, layer.bias.detach() * scale
    scaled["next", "reward"].mul_(10.0)

    learn(predictor, make_buffer(torch.cat([scaled] * 2)), n_total_env_steps=1)

    assert head.out_scale.item() == pytest.approx(10 * scale, rel=0.5)
    torch.testing.assert_close(layer.weight * head.out_scale, weight)
    torch.testing.assert_close(layer.bias * head.out_scale + head.out_loc, bias)


@pytest.mark.parametrize("member_batches", [OwnBatches(), SharedBatch(), BootstrappedBatches()])
def test_batches_of_one_row_are_enough(member_batches):
    """Whatever share of them is kept from the model, or from a member."""
    predictor = make_predictor(model_training=ModelTraining(member_batches=member_batches))
    _, info = predictor.learn(make_buffer(), 100, 1, 1, 0)
    assert info["n_updates"] == 100.0


# -- problems with known answers --------------------------------------------------------------

FORMS = {
    "one-hot": lambda choice: nn.functional.one_hot(choice, 3).bool(),
    "integer": lambda choice: choice,
    "integer column": lambda choice: choice.unsqueeze(-1),
}


@pytest.mark.parametrize("stored", FORMS)
@pytest.mark.parametrize(
    "space", [gym.spaces.Discrete(3), OneHot(3), Categorical(3)], ids=["gym", "one-hot", "integer"]
)
def test_discrete_actions_are_learned_in_every_form(space, stored):
    """Whichever form the space has and the environment stores: the losses are the same.

    The state moves by the chosen amount, which is also the reward.
    """

    def run(space, form):
        torch.manual_seed(1)
        data, choice = make_transitions(), torch.randint(3, (60,))
        step = (choice - 1.0).unsqueeze(-1)
        data["action"] = form(choice)
        data["next", "observation"], data["next", "reward"] = data["observation"] + step, step
        # which transitions are held out depends on the form of what is stored
        predictor = make_predictor(model={"action_space": space}, holdout_share=0.0)
        return learn(predictor, make_buffer(data))

    expected = run(Categorical(3), FORMS["integer"])
    assert run(space, FORMS[stored]) == pytest.approx(expected, rel=1e-5)


A = torch.tensor([[0.9, 0.2], [-0.1, 0.8]])
B = torch.tensor([[0.0], [0.5]])


def linear_system(n_steps, episode_length=5):
    """A stable linear system under random actions, reward ``x0 - 2 a``; ends where x0 > 0.5."""
    rows, state = [], torch.randn(2)
    for t in range(n_steps):
        action = 2 * torch.rand(1) - 1
        after = A @ state + B @ action
        terminated = state[:1] > 0.5
        done = terminated | ((t + 1) % episode_length == 0)
        following = {
            "observation": after,
            "reward": state[:1] - 2 * action,
            "terminated": terminated,
            "done": done,
        }
        rows.append(TensorDict({"observation": state, "action": action, "next": following}))
        state = torch.randn(2) if done else after
    return torch.stack(rows)


@pytest.mark.parametrize(("k_steps", "n_modes"), [(1, 1), (3, 2)])
def test_it_learns_a_linear_system_its_reward_and_its_end(k_steps, n_modes):
    predictor = make_predictor(
        hidden=(32,),
        model={"n_modes": n_modes},
        k_steps=k_steps,
        **dict.fromkeys(("model_lr", "reward_lr"), lambda n: 1e-2 if n == 0 else 3e-3),
    )
    buffer = make_buffer(linear_system(800))
    _, first = predictor.learn(buffer, 200, 64, 64, 0)
    _, last = predictor.learn(buffer, 100, 64, 64, 1)

    for name in ("nll", "loss_reward", "termination_bce"):
        assert last[name] < first[name], name
    test = linear_system(200)
    obs, act = test["observation"], test["action"]
    mean, weights, _, reward, term_prob = predictor.predict(obs, act)
    mean = (weights.unsqueeze(-1) * mean).sum(-2).mean(-2)
    for predicted, true in (
        (mean, test["next", "observation"]),
        (reward.unsqueeze(-1), test["next", "reward"]),
    ):
        error = (predicted - true).square().mean(0) / true.var(0)
        assert (error < 1e-2).all()
    ended = test["next", "terminated"].squeeze(-1)
    clear = (obs[:, 0] - 0.5).abs() > 0.2  # not on the border
    assert term_prob[ended & clear].mean() > 0.4
    assert term_prob[~ended & clear].mean() < 0.15


@pytest.mark.parametrize("n_steps", [1, 3])
def test_it_learns_the_value_of_a_chain(n_steps):
    """Reward 1 a step until the end of a chain of 5: the value is a finite geometric series."""
    n, gamma = 5, 0.7
    place = torch.arange(200) % n
    end = (place == n - 1).unsqueeze(-1)
    states = torch.eye(n + 1)
    following = {"observation": states[place + 1], "reward": torch.ones(200, 1)}
    following |= {"terminated": end, "done": end.clone()}
    data = {"observation": states[place], "action": torch.zeros(200, 1), "next": following}
    predictor = make_predictor(
        state_dim=n + 1, gamma=gamma, n_steps=n_steps, tau=0.1, value_lr=1e-2
    )
    predictor.learn(make_buffer(TensorDict(data, [200])), 150, 32, 8, 0)
    expected = [(1 - gamma ** (n - i)) / (1 - gamma) for i in range(n)]
    value = predictor.value(states[:n])
    torch.testing.assert_close(value, torch.tensor(expected), atol=0.1, rtol=0)


def test_the_encoder_finds_a_context_in_the_observation():
    """Reward is the difference of two entries that stay the same within an episode."""

    def episodes(n_episodes, length=10):
        hidden = torch.randn(n_episodes, 1, 2).expand(-1, length, -1)
        walk = torch.randn(n_episodes, length + 1, 2)
        obs, after = (torch.cat([w, hidden], -1) for w in (walk[:, :-1], walk[:, 1:]))
        done = torch.zeros(n_episodes, length, 1, dtype=torch.bool)
        done[:, -1] = True
        following = {
            "observation": after,
            "reward": (hidden[..., :1] - hidden[..., 1:]).clone(),
            "done": done,
            "terminated": torch.zeros_like(done),
        }
        action = torch.zeros(n_episodes, length, 1)
        data = {"observation": obs, "action": action, "next": following}
        return TensorDict(data, [n_episodes, length]).reshape(-1)

    encoder = EncoderNet((4,), latent_state_dim=2, context_dim=1)
    rates = dict.fromkeys(("encoder_lr", "reward_lr", "value_lr"), 1e-2)
    predictor = make_predictor(
        encoder, context_dim=1, hidden=(16,), gamma=0.9, tau=0.1, n_steps=2, **rates
    )
    predictor.learn(make_buffer(episodes(80)), 200, 64, 8, 0)

    assert encoder.mask.tolist() == [True, True, False, False]
    fresh = episodes(20)
    obs, truth = fresh["observation"], fresh["next", "reward"].squeeze(-1)
    for predicted in (predictor.predict_reward(obs, fresh["action"]), predictor.value(obs)):
        assert (predicted.sign() == truth.sign()).float().mean() > 0.95
    # the learned direction: the two entries with opposite weights
    weights = encoder.context_net.weight[0, 2:]
    assert (weights[0] / weights[1]).item() == pytest.approx(-1.0, abs=0.3)
