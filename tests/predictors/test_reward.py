"""Learning: what it changes and what not, and problems whose answers are known."""

from __future__ import annotations

import copy

import gymnasium as gym
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import (
    Categorical,
    LazyMemmapStorage,
    LazyTensorStorage,
    OneHot,
    ReplayBuffer,
    TensorDictReplayBuffer,
)

from layeredrl_torchrl import (
    BootstrappedBatches,
    EncoderNet,
    ModelTraining,
    ProbFCDynamics,
    SharedBatch,
)
from layeredrl_torchrl.objectives import OwnBatches

LEARN = {"n_updates": 3, "batch_size": 8, "model_batch_size": 8, "n_total_env_steps": 60}


def parameters(module):
    """Copies of the parameters (not of the statistics, which are buffers)."""
    return {k: p.detach().clone() for k, p in module.named_parameters()}


def moved(module, before):
    return {k for k, p in module.named_parameters() if not torch.equal(p, before[k])}


# -- what learn returns and changes -----------------------------------------------------------


def test_it_returns_the_loss_and_its_weighted_terms(make_predictor, make_buffer):
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
    assert info["n_updates"] == 3.0
    assert predictor.n_learn_updates.item() == 3


def flat(data):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(50))  # smaller than the data: a ring
    buffer.extend(data)
    return buffer


def memory_mapped(data):
    buffer = ReplayBuffer(storage=LazyMemmapStorage(100))
    buffer.extend(data)
    return buffer


def two_lanes(data):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100, ndim=2))
    buffer.extend(data.reshape(2, -1))
    return buffer


@pytest.mark.parametrize("make", [flat, memory_mapped, two_lanes])
def test_it_learns_from_any_storage_and_does_not_change_it(make_predictor, make_transitions, make):
    buffer = make(make_transitions())
    before, length, writes = buffer.storage[:].clone(), len(buffer), buffer.write_count
    cursor = buffer.writer._cursor
    predictor = make_predictor(k_steps=2)
    start = parameters(predictor)

    predictor.learn(buffer, **LEARN)

    assert (buffer.storage[:] == before).all()
    assert set(buffer.storage[:].keys(True, True)) == set(before.keys(True, True))
    assert (len(buffer), buffer.write_count, buffer.writer._cursor) == (length, writes, cursor)
    assert moved(predictor, start) == set(start)


PARTS = {"model": "model_lr", "rew_func": "reward_lr", "val_func": "value_lr"}


@pytest.mark.parametrize("still", ["model", "rew_func", "val_func", "encoder"])
def test_a_learning_rate_moves_its_part_alone(make_predictor, make_buffer, still):
    rates = {"encoder": "encoder_lr"} | PARTS
    encoder = EncoderNet((2,), 2, 0)
    predictor = make_predictor(encoder, **{rates[still]: 0.0})
    nn.init.normal_(predictor.rew_func.net[-1].weight)  # at 0 no gradient passes to the encoder
    buffer = make_buffer()
    predictor.learn(buffer, **LEARN)  # takes the statistics, which rescale the last layers
    before = {name: parameters(getattr(predictor, name)) for name in rates}

    predictor.learn(buffer, **LEARN)

    for name in rates:
        changed = moved(getattr(predictor, name), before[name])
        assert changed == (set() if name == still else set(before[name])), name


def test_an_encoder_that_is_not_learned_stays(make_predictor, make_buffer, unchanged):
    encoder = EncoderNet((2,), 2, 0)
    encoder.mask.fill_(True)
    predictor = make_predictor(encoder, learn_encoder=False)
    before = parameters(predictor)
    with unchanged(encoder):
        predictor.learn(make_buffer(), **LEARN)
    assert moved(predictor, before) == {k for k in before if not k.startswith("encoder.")}


def test_plain_callables_are_used_as_they_are(make_predictor, make_buffer):
    def known(state, context, action):
        return state.sum(-1)

    predictor = make_predictor(rew_func=known, val_func=known)
    before = parameters(predictor)
    _, info = predictor.learn(make_buffer(), **LEARN)
    assert "loss_reward" not in info
    assert "loss_value" not in info
    assert all(name.startswith("model.") for name in before)
    assert moved(predictor, before) == set(before)
    obs = torch.randn(5, 2)
    torch.testing.assert_close(predictor.value(obs), obs.sum(-1))


@pytest.mark.parametrize("name", ["rew_func", "val_func"])
def test_parts_may_be_left_out(make_predictor, make_buffer, name):
    _, info = make_predictor(**{name: None}).learn(make_buffer(), **LEARN)
    assert ("loss_reward" in info, "loss_value" in info) == (name != "rew_func", name != "val_func")


@pytest.mark.parametrize(
    ("weight", "part"),
    [
        ("consistency_loss_weight", "model"),
        ("rew_loss_weight", "rew_func"),
        ("value_loss_weight", "val_func"),
    ],
)
def test_a_loss_weight_of_zero_trains_nothing(make_predictor, make_buffer, weight, part):
    predictor, buffer = make_predictor(**{weight: 0.0}), make_buffer()
    predictor.learn(buffer, **LEARN)
    before = {name: parameters(getattr(predictor, name)) for name in PARTS}
    predictor.learn(buffer, **LEARN)
    for name in PARTS:
        changed = moved(getattr(predictor, name), before[name])
        assert changed == (set() if name == part else set(before[name]))


def test_learning_rates_are_functions_of_the_environment_steps(make_predictor, make_buffer):
    asked = []

    def schedule(n_total_env_steps):
        asked.append(n_total_env_steps)
        return 0.0 if n_total_env_steps < 100 else 1e-3

    predictor, buffer = make_predictor(reward_lr=schedule), make_buffer()
    predictor.learn(buffer, **LEARN)
    before = parameters(predictor.rew_func)
    predictor.learn(buffer, **LEARN | {"n_total_env_steps": 99})
    assert moved(predictor.rew_func, before) == set()
    predictor.learn(buffer, **LEARN | {"n_total_env_steps": 100})
    assert moved(predictor.rew_func, before) == set(before)
    assert asked == [60, 99, 100]


def test_gradients_are_clipped(make_predictor, make_buffer):
    """Adam divides by ``|gradient| + 1e-8``: clipped far below that, it stands almost still."""
    largest = {}
    for norm in (None, 1e-13):
        torch.manual_seed(0)
        predictor, buffer = make_predictor(clip_grad_max_norm=norm), make_buffer()
        predictor.learn(buffer, **LEARN)
        before = parameters(predictor)
        predictor.learn(buffer, **LEARN)
        largest[norm] = max(
            (p.detach() - before[k]).abs().max().item()
            for k, p in predictor.named_parameters()
            if not k.startswith("target_val_func")
        )
    assert largest[None] > 1e-3
    assert largest[1e-13] < 1e-6


def test_the_target_takes_over_a_share_tau_of_each_update(make_predictor, make_buffer):
    predictor, buffer = make_predictor(tau=0.3), make_buffer()
    predictor.learn(buffer, **LEARN)
    old = parameters(predictor.target_val_func)
    predictor.learn(buffer, **LEARN | {"n_updates": 1})
    for name, source in predictor.val_func.named_parameters():
        target = dict(predictor.target_val_func.named_parameters())[name]
        expected = 0.7 * old[name] + 0.3 * source
        torch.testing.assert_close(target, expected, check_stride=False)


def test_the_same_seed_gives_the_same_losses(make_predictor, make_buffer):
    def run(seed):
        torch.manual_seed(seed)
        predictor, buffer = make_predictor(), make_buffer()
        losses = [predictor.learn(buffer, **LEARN)[0].item() for _ in range(2)]
        return losses, predictor.state_dict()

    first, second, other = run(3), run(3), run(4)
    assert first[0] == second[0]
    torch.testing.assert_close(first[1], second[1], rtol=0, atol=0)
    assert first[0] != other[0]


def test_a_deep_copy_learns_like_the_original(make_predictor, make_buffer):
    buffer, predictor = make_buffer(), make_predictor(tau=0.3)
    predictor.learn(buffer, **LEARN)
    twin = copy.deepcopy(predictor)
    results = []
    for learner in (predictor, twin):
        torch.manual_seed(5)
        results.append(learner.learn(buffer, **LEARN)[1])
    assert results[0] == results[1]
    torch.testing.assert_close(twin.state_dict(), predictor.state_dict(), rtol=0, atol=0)


# -- statistics -------------------------------------------------------------------------------


def test_statistics_are_those_of_the_buffer(make_predictor, make_buffer, make_transitions):
    data = make_transitions(400)
    data["observation"].mul_(3.0).add_(5.0)
    data["next", "observation"].mul_(3.0).add_(5.0)
    data["next", "reward"].mul_(7.0).sub_(20.0)
    predictor = make_predictor()
    predictor.learn(make_buffer(data), **LEARN)

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


def statistics(predictor):
    return {k: v.clone() for k, v in predictor.named_buffers() if "scaling" in k}


def refitted(predictor, buffer):
    """Whether learning takes new statistics (from a random sample, so they do change)."""
    before = statistics(predictor)
    predictor.learn(buffer, **LEARN)
    after = statistics(predictor)
    return any(not torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("capacity", [100, 1000])
def test_statistics_are_taken_again_after_another_tenth(
    make_predictor, make_transitions, lanes, capacity
):
    """Whether the buffer still grows, or is a full ring whose rows are replaced."""
    storage = LazyTensorStorage(capacity, ndim=1 if lanes == 1 else 2)
    buffer = TensorDictReplayBuffer(storage=storage)

    def extend(n_steps):
        data = make_transitions(n_steps)
        buffer.extend(data if lanes == 1 else data.reshape(lanes, -1))

    predictor = make_predictor()
    extend(100)
    assert refitted(predictor, buffer)
    assert not refitted(predictor, buffer)
    extend(8)
    assert not refitted(predictor, buffer)
    extend(8)  # 116 written
    assert refitted(predictor, buffer)
    assert not refitted(predictor, buffer)
    extend(8)  # 124 of 116
    assert not refitted(predictor, buffer)
    extend(8)  # 132 of 116
    assert refitted(predictor, buffer)


@pytest.mark.parametrize("n_steps", [10, 100])
def test_a_tenth_is_a_tenth(make_predictor, make_buffer, make_transitions, n_steps):
    predictor, buffer = make_predictor(), make_buffer(n_steps=n_steps)
    assert refitted(predictor, buffer)
    buffer.extend(make_transitions(n_steps // 10))
    assert refitted(predictor, buffer)


def test_another_scale_of_rewards_does_not_change_the_value(make_predictor, make_buffer):
    """The last layer takes up the change of scale, so the function stays what it was."""
    predictor = make_predictor(value_lr=lambda steps: 1e-2 if steps == 0 else 0.0)
    buffer = make_buffer()
    predictor.learn(buffer, **LEARN | {"n_updates": 20, "n_total_env_steps": 0})
    head, scaled = predictor.val_func, buffer.storage[:].clone()
    layer, scale = head.net[-1], head.out_scale.item()
    weight, bias = layer.weight.detach() * scale, layer.bias.detach() * scale
    scaled["next", "reward"].mul_(10.0)

    predictor.learn(make_buffer(torch.cat([scaled] * 2)), **LEARN | {"n_total_env_steps": 1})

    assert head.out_scale.item() == pytest.approx(10 * scale, rel=0.5)
    torch.testing.assert_close(layer.weight * head.out_scale, weight)
    torch.testing.assert_close(layer.bias * head.out_scale + head.out_loc, bias)


@pytest.mark.parametrize("member_batches", [OwnBatches(), SharedBatch(), BootstrappedBatches()])
def test_small_batches_are_enough(make_predictor, make_buffer, member_batches):
    """Whatever share of them is kept from the model, or from a member."""
    predictor = make_predictor(model_training=ModelTraining(member_batches=member_batches))
    _, info = predictor.learn(make_buffer(), 100, 1, 1, 0)
    assert info["n_updates"] == 100.0


# -- actions in the forms that environments store ---------------------------------------------


def choices(data):
    """The state moves by the chosen amount, which is also the reward."""
    choice = torch.randint(3, data.shape)
    step = (choice - 1.0).unsqueeze(-1)
    data["next", "observation"] = data["observation"] + step
    data["next", "reward"] = step
    return choice


@pytest.mark.parametrize("stored", ["one-hot", "integer", "integer column"])
@pytest.mark.parametrize(
    "space", [gym.spaces.Discrete(3), OneHot(3), Categorical(3)], ids=["gym", "one-hot", "integer"]
)
def test_discrete_actions_are_learned_in_every_form(
    make_predictor, make_buffer, make_transitions, space, stored
):
    """Whichever form the space has and the environment stores: the losses are the same."""

    def run(space, form):
        torch.manual_seed(1)
        data = make_transitions()
        data["action"] = form(choices(data))
        # which transitions are held out depends on the form of what is stored
        predictor = make_predictor(model={"action_space": space}, holdout_share=0.0)
        return predictor.learn(make_buffer(data), **LEARN)[1]

    forms = {
        "one-hot": lambda choice: nn.functional.one_hot(choice, 3).bool(),
        "integer": lambda choice: choice,
        "integer column": lambda choice: choice.unsqueeze(-1),
    }
    expected = run(Categorical(3), forms["integer"])
    assert run(space, forms[stored]) == pytest.approx(expected, rel=1e-5)


def test_it_learns_what_discrete_actions_do(make_predictor, make_buffer, make_transitions):
    data = make_transitions(300)
    data["action"] = nn.functional.one_hot(choices(data), 3)
    rates = {"model_lr": 1e-2, "reward_lr": 1e-2}
    predictor = make_predictor(hidden=(16,), model={"action_space": OneHot(3)}, **rates)
    predictor.learn(make_buffer(data), 150, 32, 32, 0)
    obs, act = torch.zeros(3, 2), torch.arange(3)
    expected = torch.tensor([-1.0, 0.0, 1.0])
    mean = predictor.predict(obs, act)[0].mean((1, 2))
    torch.testing.assert_close(mean, expected[:, None].expand(3, 2), atol=0.35, rtol=0)
    torch.testing.assert_close(predictor.predict_reward(obs, act), expected, atol=0.35, rtol=0)


# -- problems with known answers --------------------------------------------------------------

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
def test_it_learns_a_linear_system_its_reward_and_its_end(
    make_predictor, make_buffer, k_steps, n_modes
):
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
def test_it_learns_the_value_of_a_chain(make_predictor, make_buffer, n_steps):
    """Reward 1 a step until the end of a chain of 5: the value is a finite geometric series."""
    n, gamma = 5, 0.7
    place = torch.arange(200) % n
    end = (place == n - 1).unsqueeze(-1)
    states = torch.eye(n + 1)
    data = TensorDict(
        {
            "observation": states[place],
            "action": torch.zeros(200, 1),
            "next": {
                "observation": states[place + 1],
                "reward": torch.ones(200, 1),
                "terminated": end,
                "done": end.clone(),
            },
        },
        [200],
    )
    predictor = make_predictor(
        state_dim=n + 1, gamma=gamma, n_steps=n_steps, tau=0.1, value_lr=1e-2
    )
    predictor.learn(make_buffer(data), 150, 32, 8, 0)
    expected = [(1 - gamma ** (n - i)) / (1 - gamma) for i in range(n)]
    value = predictor.value(states[:n])
    torch.testing.assert_close(value, torch.tensor(expected), atol=0.1, rtol=0)


def test_the_encoder_finds_a_context_in_the_observation(make_predictor, make_buffer):
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


def test_members_of_any_class_are_learned(make_predictor, make_buffer):
    """A custom network goes through vmap, and its parameters are trained as the built-in's are."""

    class Net(nn.Module):
        def __init__(self, *spaces):
            super().__init__()
            self.inner = ProbFCDynamics(*spaces, hidden_sizes=(8,))

        def forward(self, state, context, action):
            return self.inner(state, context, action)

    predictor = make_predictor(model={"partial_net": Net})
    before = parameters(predictor.model)
    predictor.learn(make_buffer(), **LEARN)
    assert moved(predictor.model, before) == set(before)
