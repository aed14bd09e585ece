"""Reward and value loss against loops over single steps, and what their gradients reach."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import OneHot
from torchrl.objectives import SoftUpdate

from layeredrl_torchrl import EncoderNet, PredictorLoss, RewardNet, ValueNet, reads_next_state

# TorchRL warns that nothing updates the target: most of these tests want none that does.
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")

B, OBS, A, GAMMA = 6, 4, 2, 0.9


def randomize(module):
    """Take the zeros out of a head, and give it statistics that are neither 0 nor 1."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    n_inputs = module.inputs.loc.numel()
    module.inputs.fit(2.0 * torch.randn(20, n_inputs) + 1.0)
    module.rescale(0.7, 3.0)
    return module


def make_encoder(context_dim=1):
    """A linear encoder whose mask puts the first two dimensions into the state."""
    encoder = EncoderNet((OBS,), latent_state_dim=2, context_dim=context_dim)
    encoder.mask[:2] = True
    return encoder


class ActionValue(ValueNet):
    """A value of the action, too."""

    def forward(self, state, context, action):
        return super().forward(state, context, action) + action[..., 0]


def make_loss(k_steps=2, n_steps=3, value=ValueNet, **kwargs):
    encoder = make_encoder()
    d, c = encoder.latent_state_dim, encoder.context_dim
    parts = {
        "rew_func": randomize(RewardNet(d, c, A, (8,))),
        "val_func": randomize(value(d, c, (8,))),
        "target_val_func": randomize(value(d, c, (8,))),
    }
    options = {"gamma": GAMMA, "k_steps": k_steps, "n_steps": n_steps}
    return PredictorLoss(encoder, **parts | options | kwargs)


def make_slices(length, elapsed=False, random=False):
    """Random slices: each is valid up to a random step, where some of them terminate."""
    observation = torch.randn(B, length + 1, OBS)
    last = torch.arange(B) % length  # every number of valid steps occurs
    steps = torch.arange(length)
    following = {
        "observation": observation[:, 1:].clone(),
        "reward": torch.randn(B, length, 1),
        "terminated": ((steps == last[:, None]) & (torch.arange(B) % 2 == 0)[:, None])[..., None],
    }
    extra = {"random_action": torch.rand(B, length, 1) < 0.3} if random else {}
    if elapsed:
        following["elapsed_steps"] = torch.randint(1, 4, (B, length, 1))
    data = {
        "observation": observation[:, :-1].clone(),
        "action": torch.rand(B, length, A),
        "next": following,
        "valid": steps <= last[:, None],
        **extra,
    }
    return TensorDict(data, [B, length])


def naive_targets(loss, batch):
    """n-step targets of single steps, each bootstrapped by its own call of the target network."""
    k, n = loss.k_steps, loss.n_steps
    targets, counts = torch.zeros(B, k), torch.zeros(B, k, dtype=torch.bool)

    def chosen(b, i):
        """Whether the step belongs to the slice and its action was not drawn at random."""
        random = batch.get("random_action", None)
        return bool(batch["valid"][b, i]) and not (random is not None and bool(random[b, i]))

    for b in range(B):
        for j in range(k):
            if not chosen(b, j):
                continue
            total, discount, i = 0.0, 1.0, j
            while i < j + n and chosen(b, i):
                total += discount * float(batch["next", "reward"][b, i])
                span = batch.get(("next", "elapsed_steps"), None)
                discount *= loss.gamma ** (1 if span is None else int(span[b, i]))
                i += 1
            if not batch["next", "terminated"][b, i - 1]:
                state, context = loss.encoder(batch["next", "observation"][b, i - 1])
                # What follows a slice is padding: no action was taken there.
                action = batch["action"][b, i if batch["valid"][b, i] else i - 1]
                total += discount * float(loss.target_val_func(state, context, action).detach())
            targets[b, j], counts[b, j] = total, True
    return targets, counts


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("elapsed", [False, True])
@pytest.mark.parametrize(("k_steps", "n_steps"), [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_the_losses_equal_a_loop_over_single_steps(k_steps, n_steps, elapsed, random):
    loss = make_loss(k_steps, n_steps, value=ActionValue)
    batch = make_slices(k_steps + n_steps, elapsed, random)

    out = loss(batch)

    targets, counts = naive_targets(loss, batch)
    assert counts.any()
    reward_error = value_error = count = 0.0
    for b in range(B):
        _, context = loss.encoder(batch["observation"][b, 0])  # that of the slice's first step
        for j in range(k_steps):
            if not batch["valid"][b, j]:
                continue
            state, _ = loss.encoder(batch["observation"][b, j])
            inputs = state, context, batch["action"][b, j]
            reward = float(batch["next", "reward"][b, j])
            # In units of the heads' scales, which are 3.
            reward_error += ((loss.rew_func(*inputs).item() - reward) / 3.0) ** 2
            if counts[b, j]:
                error = loss.val_func(*inputs).item() - float(targets[b, j])
                value_error += (error / 3.0) ** 2
            count += 1
    assert out["loss_reward"].item() == pytest.approx(reward_error / count, rel=1e-4)
    assert out["loss_value"].item() == pytest.approx(value_error / int(counts.sum()), rel=1e-4)
    target, where = loss.value_target(batch)
    assert torch.equal(where, counts)
    torch.testing.assert_close(target[counts], targets[counts])


def test_the_only_valid_step_counts_in_full():
    loss, batch = make_loss(1, 1), make_slices(2)[:1]
    batch["valid"] = torch.tensor([[True, False]])
    state, context = loss.encoder(batch["observation"][0, 0])
    error = loss.rew_func(state, context, batch["action"][0, 0]) - batch["next", "reward"][0, 0]
    expected = (error.item() / 3.0) ** 2
    assert loss(batch)["loss_reward"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("space", [None, OneHot(3)])
def test_padding_counts_nowhere_whatever_stands_in_it(space):
    """Also whole slices of it, and the action after the last step."""
    loss = make_loss(value=ActionValue)
    if space is not None:
        rew_func = randomize(RewardNet(2, 1, space, (8,)))
        loss = make_loss(value=ActionValue, rew_func=rew_func, action_spec=space)
    batch = make_slices(5)
    if space is not None:
        batch["action"] = space.rand((B, 5))
    batch["valid"][1] = False
    kept = batch[torch.arange(B) != 1]
    spoiled, outside = batch.clone(), ~batch["valid"]
    for key in ("observation", ("next", "observation"), ("next", "reward")):
        spoiled[key][outside] = torch.nan
    spoiled["action"][outside] = 0 if space is not None else torch.nan

    found, expected = loss(spoiled), loss(kept)
    for name in ("loss_reward", "loss_value"):
        torch.testing.assert_close(found[name], expected[name])
    target, counts = loss.value_target(spoiled)
    targets, chosen = naive_targets(loss, batch)
    assert torch.equal(counts, chosen)
    torch.testing.assert_close(target[counts], targets[counts])


@pytest.mark.parametrize("mask", ["valid", ("collector", "mask"), "mask"])
def test_steps_that_are_not_valid_have_no_influence(mask):
    loss, batch = make_loss(), make_slices(5)
    spoiled = batch.clone()
    outside = ~batch["valid"]
    spoiled["next", "reward"][outside] = float("nan")
    if mask != "valid":
        # at the root as TorchRL's split_trajectories writes it
        spoiled[mask] = spoiled["valid"].unsqueeze(-1) if mask != "mask" else spoiled["valid"]
        spoiled["valid"] = torch.ones_like(spoiled["valid"])
    else:
        spoiled["valid"] = spoiled["valid"].unsqueeze(-1)
    # encoders refuse NaN, so what is encoded is only made large
    for key in ("observation", "action", ("next", "observation")):
        spoiled[key][outside] = 1e3

    results = []
    for data in (batch, spoiled):
        loss.zero_grad()
        out = loss(data)
        (out["loss_reward"] + out["loss_value"]).backward()
        gradients = {k: p.grad.clone() for k, p in loss.named_parameters() if p.requires_grad}
        results.append({k: v.detach() for k, v in out.items() if "loss" in k} | gradients)

    torch.testing.assert_close(results[1], results[0])


def reached(loss, key, batch):
    """Names of the parts of ``loss`` that the gradient of one of its terms reaches."""
    loss.zero_grad(set_to_none=True)
    loss(batch)[key].backward()
    parts = ("encoder", "rew_func", "val_func", "target_val_func")
    return {
        part
        for part in parts
        if any(p.grad is not None and bool(p.grad.any()) for p in getattr(loss, part).parameters())
    }


@pytest.mark.parametrize("learn_encoder", [False, True])
def test_gradients_reach_the_head_of_each_loss_and_the_encoder_by_the_reward(learn_encoder):
    loss, batch = make_loss(learn_encoder=learn_encoder), make_slices(5)
    encoder = {"encoder"} if learn_encoder else set()
    assert reached(loss, "loss_reward", batch) == {"rew_func"} | encoder
    assert reached(loss, "loss_value", batch) == {"val_func"}
    if learn_encoder:
        loss(batch)["loss_reward"].backward()
        assert loss.encoder.state_net.weight.grad.any()
        assert loss.encoder.context_net.weight.grad.any()


@pytest.mark.parametrize("copied", [False, True])
def test_the_target_moves_only_by_soft_update(copied, unchanged):
    tau, loss = 0.4, make_loss(target_val_func=None)  # then it is a copy of the value
    loss = copy.deepcopy(loss) if copied else loss
    torch.testing.assert_close(loss.target_val_func.state_dict(), loss.val_func.state_dict())
    parts = nn.ModuleList([loss.encoder, loss.rew_func, loss.val_func])
    assert {id(p) for p in loss.parameters() if p.requires_grad} == {*map(id, parts.parameters())}
    update = SoftUpdate(loss, tau=tau)
    optim = torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], lr=0.1)
    with unchanged(loss.target_val_func):
        out = loss(make_slices(5))
        (out["loss_reward"] + out["loss_value"]).backward()
        optim.step()
    source = {k: p.detach().clone() for k, p in loss.val_func.named_parameters()}
    old = {k: p.detach().clone() for k, p in loss.target_val_func.named_parameters()}
    assert any(not torch.equal(source[k], old[k]) for k in old)

    update.step()

    for name, parameter in loss.target_val_func.named_parameters():
        expected = (1 - tau) * old[name] + tau * source[name]
        torch.testing.assert_close(parameter.detach(), expected)
    for name, parameter in loss.val_func.named_parameters():
        assert torch.equal(parameter, source[name])


def test_without_a_chosen_action_there_is_no_value_to_learn():
    loss, batch = make_loss(), make_slices(5, random=True)
    batch["random_action"].fill_(True)
    out, plain = loss(batch), loss(batch.exclude("random_action"))
    assert out["loss_value"].item() == 0.0
    torch.testing.assert_close(out["loss_reward"], plain["loss_reward"])


def known(state, context, action):
    return state.sum(-1)


@pytest.mark.parametrize(
    ("parts", "terms"),
    [
        ({"rew_func": known, "val_func": known, "target_val_func": None}, set()),
        ({"rew_func": known}, {"loss_value"}),
        ({"rew_func": None}, {"loss_value"}),
        ({"val_func": None, "target_val_func": None}, {"loss_reward"}),
    ],
)
def test_plain_callables_are_known_and_not_trained(parts, terms):
    out = make_loss(**parts)(make_slices(5))
    assert {key for key in out.keys() if key.startswith("loss_")} == terms


class Sum(nn.Module):
    """A reward or value of one's own, which tells no scale of its values."""

    def forward(self, state, context, action):
        return state.sum(-1) + context.sum(-1)


class Column(Sum):
    """With an axis too many, which broadcasts over the other slices' rewards."""

    def forward(self, state, context, action):
        return super().forward(state, context, action).unsqueeze(-1)


@pytest.mark.parametrize("name", ["rew_func", "val_func", "target_val_func"])
def test_what_a_module_of_ones_own_gives_is_checked(name):
    loss = make_loss(**{name: Column()})
    with pytest.raises(ValueError, match=rf"{name} gave shape \({B}, 2, 1\), expected \({B}, 2\)"):
        loss(make_slices(5))


def test_a_target_network_of_no_trained_value_is_refused():
    with pytest.raises(ValueError, match="target_val_func is the target network of a val_func"):
        make_loss(val_func=known)


def test_by_default_single_steps_count_and_modules_of_ones_own_in_the_unit_of_rewards():
    batch = make_slices(2)
    batch["valid"][:] = True
    loss = PredictorLoss(make_encoder(), Sum(), Sum(), gamma=0.5)
    out = loss(batch)
    value = Sum()(*loss.encoder(batch["observation"][:, 0]), None)
    after = Sum()(*loss.encoder(batch["next", "observation"][:, 0]), None)
    reward = batch["next", "reward"][:, 0, 0]
    target = reward + 0.5 * after * ~batch["next", "terminated"][:, 0, 0]
    torch.testing.assert_close(out["loss_reward"], (value - reward).square().mean())
    torch.testing.assert_close(out["loss_value"], (value - target).square().mean())
    torch.testing.assert_close(out["value_mean"], value.mean())


def spoil(key, change):
    def spoiled(batch):
        batch[key] = change(batch[key])
        return batch

    return spoiled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch[:, :4], "k_steps"),
        (lambda batch: torch.cat([batch, batch[:, :1]], 1), "k_steps"),
        (spoil(("next", "reward"), lambda x: x / 0), "reward"),
        (spoil("valid", torch.zeros_like), "valid"),
        (spoil("valid", torch.Tensor.float), r"'valid' is torch.float32 .*, expected torch.bool"),
        (spoil("valid", lambda x: x[..., None].expand(*x.shape, 2)), "'valid' is .*, expected"),
        # else [B, 1] - [B] broadcasts to [B, B] and trains on other slices' rewards
        (spoil(("next", "reward"), lambda x: x.squeeze(-1)), "reward"),
    ],
)
@pytest.mark.parametrize("with_value", [False, True])
def test_slices_that_do_not_fit_are_refused(with_value, change, message):
    loss = make_loss() if with_value else make_loss(val_func=None, target_val_func=None)
    with pytest.raises(ValueError, match=message):
        loss(change(make_slices(5)))


def test_flags_of_random_actions_are_bool():
    batch = make_slices(5)
    batch["random_action"] = torch.zeros(*batch.shape, 1)
    with pytest.raises(ValueError, match=r"'random_action' is torch.float32, expected torch.bool"):
        make_loss()(batch)


@pytest.mark.parametrize("name", ["rew_func", "val_func"])
def test_functions_that_cannot_be_called_are_refused(name):
    with pytest.raises(TypeError, match=f"{name} must be"):
        make_loss(**{name: "a value", "target_val_func": None})


def test_a_value_of_the_next_state_is_refused():
    @reads_next_state
    def value(state, context, action, next_state):
        return next_state[..., 0]

    with pytest.raises(ValueError, match="val_func was declared to read the next state"):
        make_loss(val_func=value, target_val_func=None)
