"""Joined goal observations: where each entry goes, through resets of single instances."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Composite, Unbounded
from torchrl.envs import Compose, DoubleToFloat, EnvBase, SerialEnv, TransformedEnv
from torchrl.envs.utils import check_env_specs

from layeredrl_torchrl import FixedEncoderNet, JoinGoals, get_task


def expected(t, episode):
    """What ``Walk`` observes at step ``t``: observation, achieved goal, desired goal."""
    rows = [[k, 0.25 * k, 10.0 + k, *[100.0 + e] * 3] for k, e in zip(t, episode, strict=True)]
    return torch.tensor(rows)


def test_goals_are_joined_in_environments_and_collectors(build):
    walks = [{"length": 3, "turn": 0.25}, {"length": 5, "turn": 0.25}]
    env = build(lambda: Compose(JoinGoals(), DoubleToFloat()), walks)
    check_env_specs(env)
    steps = 9
    n = max(env.batch_size.numel(), 1)
    collector = Collector(env, None, frames_per_batch=n * steps, total_frames=n * steps)
    (data,) = collector
    assert not {"achieved_goal", "desired_goal"} & set(data.keys())
    rows = data["observation"].reshape(n, steps, 6)
    following = data["next", "observation"].reshape(n, steps, 6)
    for i, length in enumerate((3, 5)[:n]):
        start = int(rows[i, 0, 3].item()) - 100  # episodes that the specs and the check have used
        episode = [start + k // length for k in range(steps)]
        assert torch.equal(rows[i], expected([k % length for k in range(steps)], episode))
        assert torch.equal(following[i], expected([k % length + 1 for k in range(steps)], episode))


def test_ranges_lead_the_encoder_to_its_parts(build):
    join = JoinGoals()
    env = build(lambda: join, [{"turn": 0.25}])
    if env.batch_size == (1,) and not isinstance(env, TransformedEnv):
        pytest.skip("inside worker environments the transform has no outside")
    assert join.index_ranges == {
        "observation": range(2),
        "achieved_goal": range(2, 3),
        "desired_goal": range(3, 6),
    }
    assert (join.state_dims, join.context_dims) == ([0, 1, 2], [3, 4, 5])
    obs = env.rollout(3)["next", "observation"].float()
    state, context = FixedEncoderNet((6,), join.state_dims, join.context_dims)(obs)
    assert state.reshape(3, 3)[1].tolist() == [2.0, 0.5, 12.0]
    assert (context == context.flatten()[0]).all()


def test_keys_are_joined_in_the_order_that_is_given(build):
    make = lambda: JoinGoals(["achieved_goal"], ["desired_goal"], "joined", del_keys=False)  # noqa: E731
    env = build(make, [{}, {}])
    check_env_specs(env)
    data = env.rollout(2)
    assert {"joined", "observation", "achieved_goal", "desired_goal"} <= set(data.keys())
    cat = torch.cat([data["achieved_goal"], data["desired_goal"]], -1)
    assert torch.equal(data["joined"], cat)
    swapped = build(lambda: JoinGoals(["achieved_goal", "observation"], []), [{}, {}]).rollout(2)
    assert torch.equal(swapped["observation"][..., 0] - 10, swapped["observation"][..., 1])
    assert swapped["observation"].shape[-1] == 3
    assert "desired_goal" in swapped.keys()


def test_it_finds_the_dims_of_the_point_maze():
    pytest.importorskip("gymnasium_robotics")
    from torchrl.envs import GymWrapper

    task = get_task("PointMaze-U")
    env = TransformedEnv(GymWrapper(task.make_gym()), join := JoinGoals())
    assert env.observation_spec["observation"].shape == (task.observation_dim,)
    assert join.context_dims == list(task.context_dims)
    assert join.state_dims == [*task.state_dims, 4, 5]  # and the place once more


class Stateless(EnvBase):
    """Keeps nothing: a step begins at the entries that it is given."""

    widths = {"observation": 2, "achieved_goal": 1, "desired_goal": 3}

    def __init__(self, declared):
        super().__init__()
        self.observation_spec = Composite({key: Unbounded((n,)) for key, n in self.widths.items()})
        if declared:
            self.state_spec = self.observation_spec.clone()
        self.action_spec, self.reward_spec = Unbounded((1,)), Unbounded((1,))

    def _reset(self, tensordict=None, **kwargs):
        return self.observation_spec.rand()

    def _step(self, tensordict):
        after = tensordict.select(*self.observation_spec.keys()).clone()
        after["achieved_goal"] += tensordict["action"]
        gap = (after["desired_goal"] - after["achieved_goal"]).sum(-1, keepdim=True)
        return after.update({"reward": gap, "done": torch.zeros_like(gap, dtype=torch.bool)})

    def _set_seed(self, seed):
        torch.manual_seed(seed)


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("out_key", ["observation", ("agent", "joined")])
def test_an_environment_without_a_state_gets_its_entries_back(declared, out_key):
    env = TransformedEnv(Stateless(declared), JoinGoals(out_key=out_key))
    check_env_specs(env)
    data = env.rollout(4)
    first, after = data[out_key], data["next", *unravel(out_key)]
    torch.testing.assert_close(after[:, 2:3], first[:, 2:3] + data["action"])
    for kept in (slice(0, 2), slice(3, 6)):
        assert torch.equal(after[:, kept], first[:1, kept].expand(4, -1))
    torch.testing.assert_close(
        data["next", "reward"], (after[:, 3:] - after[:, 2:3]).sum(-1, keepdim=True)
    )
    if declared:
        serial = SerialEnv(2, lambda: TransformedEnv(Stateless(True), JoinGoals(out_key=out_key)))
        data = serial.rollout(3)
        moved = data["next", *unravel(out_key)][..., 2:3] - data[out_key][..., 2:3]
        torch.testing.assert_close(moved, data["action"])


class Wider(Stateless):
    """As wide in all, with other parts."""

    widths = {"observation": 3, "achieved_goal": 2, "desired_goal": 1}


def test_in_another_environment_it_knows_the_new_places():
    join = JoinGoals()
    for kind in (Stateless, Wider):
        join.reset_parent()
        env = TransformedEnv(kind(False), join)
        data = env.rollout(3)
        moved = data["next", "observation"] - data["observation"]
        at = join.index_ranges["achieved_goal"]
        assert [len(places) for places in join.index_ranges.values()] == list(kind.widths.values())
        torch.testing.assert_close(moved[:, list(at)], data["action"].expand(3, len(at)))
        rest = [i for i in range(6) if i not in at]
        assert not moved[:, rest].any()


@pytest.mark.parametrize("del_keys", [False, True])
def test_entries_that_are_joined_are_inputs_only_where_they_stay(del_keys):
    env = TransformedEnv(Stateless(True), JoinGoals(out_key="joined", del_keys=del_keys))
    stays = set() if del_keys else set(Stateless.widths)
    assert set(env.full_state_spec.keys()) == {"joined"} | stays
    assert set(env.reset().keys()) - set(env.done_keys) == {"joined"} | stays


class Still(EnvBase):
    """Observes the same entries at each step."""

    def __init__(self, entries):
        super().__init__()
        self.entries = entries
        specs = {key: Unbounded(value.shape, dtype=value.dtype) for key, value in entries.items()}
        self.observation_spec = Composite(specs)
        self.action_spec, self.reward_spec = Unbounded((1,)), Unbounded((1,))

    def _reset(self, tensordict=None, **kwargs):
        return TensorDict({key: value.clone() for key, value in self.entries.items()})

    def _step(self, tensordict):
        return self._reset().update({"reward": torch.zeros(1), "done": torch.zeros(1).bool()})

    def _set_seed(self, seed):
        pass


@pytest.mark.parametrize("dtypes", permutations([torch.int64, torch.float32, torch.float64]))
def test_entries_of_several_dtypes_lose_nothing(dtypes):
    """Batched environments write into memory of the dtype that the spec says."""
    keys = ["observation", "achieved_goal", "desired_goal"]
    parts = {k: torch.tensor([3.25, 7.75]).to(kind) for k, kind in zip(keys, dtypes, strict=True)}
    expected = [x for key in keys for x in parts[key].tolist()]

    def make():
        return TransformedEnv(Still(parts), JoinGoals())

    check_env_specs(make())
    for env in (make(), SerialEnv(2, make)):
        assert env.observation_spec["observation"].dtype == torch.float64
        data = env.rollout(2)
        for found in (data["observation"], data["next", "observation"]):
            assert found.dtype == torch.float64
            assert (found == torch.tensor(expected)).all()


def unravel(key):
    return key if isinstance(key, tuple) else (key,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: JoinGoals().index_ranges, RuntimeError, "needs an environment"),
        (lambda: JoinGoals([], ["goal"]), ValueError, "each key once"),
        (lambda: JoinGoals(["a", "b"], ["a"]), ValueError, "each key once"),
        (lambda: JoinGoals("observation"), TypeError, "state_keys must be a list of keys"),
        (lambda: JoinGoals(context_keys="goal"), TypeError, "context_keys must be a list"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_missing_entry_is_named():
    env = get_task("Reacher-v5").make()
    env.append_transform(join := JoinGoals())
    with pytest.raises(KeyError, match=r"observes \['observation'\], but JoinGoals joins"):
        join.index_ranges  # noqa: B018
    env.close()


@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_entries_that_are_no_vectors_are_named(shape):
    parts = {"observation": torch.zeros(3), "achieved_goal": torch.zeros(shape)}
    env = TransformedEnv(Still(parts | {"desired_goal": torch.zeros(2)}), JoinGoals())
    with pytest.raises(ValueError, match=r"joins vectors .*'achieved_goal': \(.*flatten"):
        env.reset()
