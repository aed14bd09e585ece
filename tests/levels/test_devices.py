"""Levels and hierarchies that act on an accelerator neither wait for it nor copy to it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import collected, model_free_level, planner_level
from pretended import Accelerator
from tensordict import TensorDict
from tensordict.nn import CudaGraphModule, TensorDictModuleBase
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import TensorDictPrimer

from layeredrl_torchrl import (
    ActionSequenceLevel,
    DQNLearner,
    Hierarchy,
    RandomLevel,
    _watch,
    get_task,
)

OBS, ACTIONS = Unbounded((4,)), Bounded(-1.0, 1.0, (1,))
SMALL_DQN = partial(DQNLearner, hidden_sizes=(8,))


def hierarchy(upper, spec=Bounded(-1.0, 1.0, (2,)), **options):  # noqa: B008
    lower = model_free_level(input_spec=spec, duration=3)
    return Hierarchy([upper, lower], get_task("InvertedPendulum-v5").make(), **options)


class Calm(TensorDictModuleBase):
    """A planner that is quick to pretend: it remembers the observation and does nothing."""

    def __init__(self, predictor, *, action_spec):
        super().__init__()
        self.predictor, self.action_key = predictor, "action"
        self.in_keys, self.out_keys = ["observation", "seen"], ["action", ("next", "seen")]

    def forget(self, batch=(), device=None):
        return TensorDict({"seen": torch.zeros(*batch, 4, device=device)}, batch, device=device)

    def make_tensordict_primer(self):
        return TensorDictPrimer(Composite(seen=Unbounded((4,))), expand_specs=True)

    def forward(self, tensordict):
        obs = tensordict["observation"]
        tensordict["next", "seen"] = obs.clone()
        return tensordict.set("action", obs[..., :1].tanh())


calm = partial(planner_level, OBS, ACTIONS, planner_factory=Calm)

POLICIES = {
    "own planner": calm,
    "own planner and random phases": lambda: calm(random_prob=0.3),
    "planner": lambda: planner_level(OBS, ACTIONS),
    "planner and random phases": lambda: planner_level(OBS, ACTIONS, random_prob=0.3),
    "planner of choices": lambda: planner_level(OBS, OneHot(3), random_prob=0.3),
    "always random": lambda: calm(random_prob=1.0),
    "SAC": lambda: model_free_level(OBS, ACTIONS),
    "SAC with input": lambda: model_free_level(OBS, ACTIONS, input_spec=Categorical(3), duration=3),
    "DQN": lambda: model_free_level(OBS, OneHot(3), learner_factory=SMALL_DQN),
    "hierarchy": lambda: hierarchy(planner_level(random_prob=0.3)),
    "choices and maps": lambda: hierarchy(
        planner_level(), Categorical(3), observation_maps=[None, [0, 2]]
    ),
    "fixed": lambda: hierarchy(ActionSequenceLevel(torch.rand(3, 2))),
    "random": lambda: hierarchy(RandomLevel()),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", POLICIES)
def test_acting_neither_waits_nor_copies(name, mode):
    accelerator = Accelerator()
    policy = POLICIES[name]()
    carried = policy.make_tensordict_primer().primers
    policy = accelerator.move(policy.train(mode == "train"))
    with accelerator.watched():
        given = {"device": accelerator.device}
        td = TensorDict({"observation": torch.randn(5, 4, **given)}, [5], **given)
        for key in carried.keys(True, True):
            spec = carried[key]
            td[key] = torch.zeros(5, *spec.shape, dtype=spec.dtype, **given)
        for key in set(policy.in_keys) - set(td.keys(True, True)):  # what comes from above
            td[key] = torch.zeros(5, *(() if key == "input" else (1,)), dtype=torch.int64, **given)
        for _ in range(2):
            out = policy(td.clone())
    assert out["action"].device.type == accelerator.device.type
    assert set(policy.out_keys) <= set(out.keys(True, True))


@pytest.mark.parametrize("n_initial_random_steps", [0, 5])
def test_all_are_planned_for_where_counting_would_wait(monkeypatch, n_initial_random_steps):
    """The way of an accelerator, on a CPU: the same ones are random, the rest planned."""
    level = calm(random_prob=0.4, n_initial_random_steps=n_initial_random_steps)
    runs = []
    for at_once in (("cpu",), ()):
        monkeypatch.setattr(_watch._WATCH, "at_once", at_once)
        torch.manual_seed(0)
        obs = torch.randn(300, 4)
        td = TensorDict(
            {"observation": obs, "seen": obs, "random_steps_left": obs[:, :1].long()}, [300]
        )
        torch.manual_seed(1)
        out = level(td)
        random = out["random_action"]
        assert torch.equal((out["next", "seen"] == 0).all(-1, keepdim=True), random)
        assert torch.equal(out["action"][~random], obs[:, :1].tanh()[~random])
        assert (out["action"][random] != obs[:, :1].tanh()[random]).all()
        runs.append(out.select("random_action", ("next", "random_steps_left")))
    assert (runs[0] == runs[1]).all()


# -- the environment on the host, the level anywhere ----------------------------------------

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LEARNING = {"n_initial_random_steps": 20, "updates_per_step": 0.1}
AGENTS = {
    "planner": lambda env, device: planner_level(
        env=env, device=device, random_prob=0.2, **LEARNING
    ),
    "SAC": lambda env, device: model_free_level(env=env, **LEARNING).to(device),
    "hierarchy": lambda env, device: Hierarchy(
        [
            planner_level(device=device, **LEARNING),
            model_free_level(input_spec=Categorical(3), duration=3, **LEARNING),
        ],
        env,
    ).to(device),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", AGENTS)
def test_it_learns_where_it_is_from_an_environment_on_the_host(name, device):
    env = get_task("InvertedPendulum-v5").make(seed=0)
    agent = AGENTS[name](env, device)
    devices = {value.device.type for value in agent.state_dict().values()}
    assert devices == {device}
    host = {"policy_device": device, "env_device": "cpu", "storing_device": "cpu"}
    for data in collected(env, agent, 3, 30, **host):
        info = agent.learn(data)
        assert data.device.type == "cpu"
    assert any(value > 0 for term, value in info.items() if term.endswith("n_updates"))
    levels = agent.levels if name == "hierarchy" else [agent]
    assert all(level.buffer[:]["action"].device.type == "cpu" for level in levels)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["planner", "SAC", "hierarchy", "random"])
def test_tensordicts_graphs_capture_a_policy(name):
    policy = POLICIES[name]().to("cuda").eval()
    carried = policy.make_tensordict_primer().primers.zero([5]).to("cuda")
    observation = torch.randn(5, 4, device="cuda")
    td = TensorDict({"observation": observation, **carried.to_dict()}, [5], device="cuda")
    graph = CudaGraphModule(policy)
    for _ in range(6):
        out = graph(td)
    assert ((out["action"] >= -3.0) & (out["action"] <= 3.0)).all()
