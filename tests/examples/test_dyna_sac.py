"""The agent of `dyna_sac.py` alone."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from layeredrl_torchrl import get_task, make_batched
from layeredrl_torchrl.nets import StackedProbFCDynamics


@pytest.fixture
def make_agent(example):
    """``make_agent(task, **options)``: a small agent, and 60 real steps of two environments."""

    def build(name="Hopper-v5", **options):
        module = example("dyna_sac")
        task = get_task(name)
        env = make_batched(task, 2, seed=0)
        small = {"hidden_size": 8, "batch_size": 20, "random_steps": 0, "updates_per_step": 0.1}
        data = env.rollout(30, break_when_any_done=False)
        return module.Agent(module.Config(**small | options), task, env, 200), data

    return build


def test_imagined_episodes_start_where_real_steps_did(make_agent):
    agent, data = make_agent("Reacher-v5")  # a task with a context
    agent.learn(data)
    episodes = agent.imagine(30, 3)
    assert episodes.shape == (10, 3)
    begun = torch.cat([episodes["state"], episodes["context"]], -1)[:, 0]
    stored = torch.cat(agent.encoder(data["observation"].reshape(60, -1)), -1)
    assert (begun.unsqueeze(1) == stored).all(-1).any(-1).all()
    # What is not ended by the model goes on from where it was led, not from a real state.
    ended, later = episodes["next", "done"][:, :-1, 0], episodes["state"][:, 1:]
    assert torch.equal(later[~ended], episodes["next", "state"][:, :-1][~ended])
    assert torch.equal(episodes["context"], episodes["next", "context"])


def test_the_predicted_end_of_an_episode_ends_an_imagined_one(make_agent):
    """With an end at every step foretold, no episode reaches its second step."""
    agent, data = make_agent()
    agent.learn(data)
    assert not agent.imagine(40, 4)["next", "terminated"].all()
    with torch.no_grad():
        for members in agent.predictor.model.modules():
            if isinstance(members, StackedProbFCDynamics):
                members.biases[-1][..., -1] = 50.0
    ended = agent.imagine(40, 4)
    assert ended["next", "terminated"].all()
    stored = agent.real[:]["state"].reshape(-1, 11)
    assert (ended["state"].unsqueeze(2) == stored).all(-1).any(-1).all()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_batches_mix_real_and_imagined_steps(make_agent, share):
    agent, data = make_agent(imagined_share=share)
    agent.learn(data)
    batches = list(agent.batches(107))
    assert [batch.shape for batch in batches] == [(20,)] * 107
    # Imagined episodes start at real states, but lead elsewhere.
    real_next = agent.real[:]["next", "state"].reshape(-1, 11)
    for batch in batches:
        is_real = (batch["next", "state"].unsqueeze(1) == real_next).all(-1).any(-1)
        assert int((~is_real).sum()) == round(20 * share)
        assert batch["next", "reward"].shape == (20, 1)


def test_the_actor_learns_when_it_is_its_turn(make_agent):
    agent, data = make_agent(imagined_share=0.5)
    agent.learn(data)
    (batch,) = agent.batches(1)
    groups = {"actor": agent.loss.actor_network.parameters, "alpha": lambda: [agent.loss.log_alpha]}
    groups["critics"] = agent.loss.qvalue_network_params.parameters
    for turn in (False, True) if agent.counts["updates"] % 2 == 0 else (True, False):
        before = {name: [p.detach().clone() for p in part()] for name, part in groups.items()}
        terms = agent.update(batch)
        for name, part in groups.items():
            moved = any(not torch.equal(x, y) for x, y in zip(before[name], part(), strict=True))
            assert moved == (turn or name == "critics")
        assert all(torch.isfinite(value) for value in terms.values())


@pytest.mark.slow
def test_compiled_losses_are_the_losses(make_agent):
    def after_update(**options):
        counters.clear()
        torch.manual_seed(0)
        agent, data = make_agent(imagined_share=0.0, **options)
        agent.learn(data)
        (batch,) = agent.batches(1)
        torch.manual_seed(0)
        terms = agent.update(batch)
        compiled = counters["stats"]["unique_graphs"] > 0
        return compiled, terms, [p.detach().clone() for p in agent.loss.parameters()]

    found = {option: after_update(compile=option) for option in (False, True)}
    assert [compiled for compiled, _, _ in found.values()] == [False, True]
    for name, value in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], value, rtol=1e-4, atol=1e-4)
    for one, other in zip(found[False][2], found[True][2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-3)


def test_actions_fill_their_range(make_agent):
    """InvertedPendulum takes actions in [-3, 3]."""
    agent, data = make_agent("InvertedPendulum-v5", imagined_share=0.0)
    with torch.no_grad():
        for p in agent.loss.actor_network.parameters():
            p.mul_(30)
        action = agent.policy(data.clone())["action"]
    assert 2.5 < action.abs().max() <= 3.0


@pytest.mark.parametrize(("given", "steps"), [(None, 50), (0, 0), (70, 70)])
def test_learning_begins_after_the_random_steps(make_agent, given, steps):
    """A quarter of the 200 by default; until then experience is only stored."""
    agent, data = make_agent(random_steps=given, imagined_share=0.0)
    for n, part in zip((20, 40, 60), data.split(10, 1), strict=True):
        info = agent.learn(part.copy())
        assert ("loss_qvalue" in info) == (n >= steps)
    assert agent.counts["steps"] == 60
    assert agent.counts["updates"] == (6 if steps < 70 else 0)


def test_data_of_another_task_is_refused(make_agent):
    """Before anything is stored: the agent was built for Hopper's observations."""
    agent, _ = make_agent()
    _, other = make_agent("Reacher-v5")
    with pytest.raises(ValueError, match="built for observations of 11 values"):
        agent.learn(other)
    assert not len(agent.real)
