"""Ends of episodes below nested keys, as environments of several agents have them."""

from __future__ import annotations

import pytest
import torch
from helpers import both, collected, learn, make_buffer, model_free_level
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from layeredrl_torchrl import FromBuffer, Hierarchy, PredictorFactory
from layeredrl_torchrl.levels._rows import end_keys

OBS, ENDS = ("agents", "observation"), (("agents", "done"), ("agents", "terminated"))


class Agents(EnvBase):
    """Ends episodes of a group of agents, as nested done keys have it, or at the ``root`` too."""

    def __init__(self, *groups, root=False):
        super().__init__()
        agents = {"observation": Unbounded((2,))}
        self.observation_spec = Composite(agents=Composite(agents))
        self.action_spec = Bounded(-1.0, 1.0, (1,))
        flags = {name: Binary(1, dtype=torch.bool) for name in ("done", "terminated")}
        done = {name: Composite(flags) for name in ("agents", *groups)}
        self.done_spec = Composite(done | (flags if root else {}))
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict):
        return TensorDict({"agents": {"observation": torch.zeros(2)}})

    def _step(self, tensordict):
        end = torch.rand(1) < 0.3
        agents = {"observation": torch.randn(2), "done": end, "terminated": end.clone()}
        return TensorDict({"agents": agents, "reward": torch.randn(1)})

    def _set_seed(self, seed):
        torch.manual_seed(seed)


@both
def test_ends_of_episodes_may_be_nested(make):
    env = Agents()
    options = {"env": env, "n_initial_random_steps": 10}
    if make is model_free_level:
        options["observation_key"] = OBS
    else:
        options["predictor_factory"] = PredictorFactory(
            hidden_sizes=(8,), n_models=2, observation_key=OBS
        )
    level = make(**options)
    hierarchy = Hierarchy([make(n_initial_random_steps=10)], env, observation_key=OBS)
    for policy, lowest in ((level, level), (hierarchy, hierarchy.levels[0])):
        (data,) = collected(env, policy, 1)
        policy.learn(data)
        stored = lowest.buffer[:]
        assert stored["next", "terminated"].any()
        for name, key in (("done", ENDS[0]), ("terminated", ENDS[1])):
            assert torch.equal(stored["next", name], data["next", *key])
    options["env"] = Agents("others")
    with pytest.raises(ValueError, match=r"ends episodes by .*others.*expected one 'done'"):
        make(**options)


@pytest.mark.parametrize("groups", [(), ("others",)])
def test_an_end_at_the_root_goes_before_those_of_groups(groups):
    assert end_keys(Agents(*groups, root=True)) == ("done", "terminated")
    assert end_keys(Agents()) == ENDS


def test_a_predictor_learns_and_imagines_from_nested_ends():
    env = Agents()
    factory = PredictorFactory(hidden_sizes=(8,), n_models=2, observation_key=OBS)
    predictor = factory(env.observation_spec, env.action_spec)
    buffer = make_buffer(env.rollout(30, break_when_any_done=False))
    with pytest.raises(KeyError, match=r"none of the key \('next', 'done'\).*agents"):
        learn(predictor, buffer)
    ends = {name: ("next", *key) for name, key in zip(("done", "terminated"), ENDS, strict=True)}
    predictor.predictor_loss.set_keys(**ends)
    assert learn(predictor, buffer)["n_updates"] == 3
    starts = FromBuffer(buffer, predictor, **{f"{name}_key": key for name, key in ends.items()})
    assert starts(4)["state"].shape == (4, 2)
