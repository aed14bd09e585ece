"""Planners and imagined environments in TorchRL's ways to collect and to evaluate."""

from __future__ import annotations

import pytest
from helpers import SMALL_FACTORY, SMALL_PLANNER
from tensordict import TensorDict
from torchrl.collectors import (
    AsyncBatchedCollector,
    Evaluator,
    MultiAsyncCollector,
    MultiSyncCollector,
)
from torchrl.collectors.distributed import DistributedCollector

from layeredrl_torchrl import CEMPlanner, ICEMPlanner, MPPIPlanner, get_task

TASK = get_task("InvertedPendulum-v5")
AUTO = {"auto_register_policy_transforms": True}


def make_planner(env=None):
    """An untrained one."""
    env = env or TASK.make()
    return SMALL_PLANNER(SMALL_FACTORY(env.observation_spec, env.action_spec))


def make_primed():
    """The task, with the transform that carries a planner's memory."""
    return TASK.make().append_transform(make_planner().make_tensordict_primer())


def check(collector, n_batches):
    """So many batches of 20 steps that a planner has planned come out of it."""
    batches = [data.clone() for data in collector]
    collector.shutdown()
    assert len(batches) == n_batches
    for data in batches:
        assert data.numel() == 20
        assert TASK.make().action_spec.is_in(data["action"])
        assert data["action"].std() > 0
        assert data["planner", "warm"].any()  # the memory has got from one step to the next


def test_one_planner_acts_in_the_many_environments_of_an_asynchronous_collector():
    collector = AsyncBatchedCollector(
        [make_primed] * 2,
        policy=make_planner(),
        frames_per_batch=20,
        total_frames=20,
        env_backend="threading",
    )
    check(collector, 1)


def test_an_evaluator_in_a_thread_plays_with_a_planner():
    evaluator = Evaluator(
        TASK.make(), make_planner(), num_trajectories=2, max_steps=5, collector_kwargs=AUTO
    )
    found = evaluator.evaluate()
    assert 0 < found["eval/episode_length"] <= 5
    evaluator.shutdown()


def test_an_evaluator_that_does_not_carry_the_memory_is_told_how():
    evaluator = Evaluator(TASK.make(), make_planner(), num_trajectories=2, max_steps=5)
    with pytest.raises(KeyError, match="make_tensordict_primer"):
        evaluator.evaluate()
    evaluator.shutdown()


@pytest.mark.slow
def test_an_evaluator_in_a_process_plays_with_a_planner():
    evaluator = Evaluator(
        TASK.make,
        policy_factory=make_planner,
        num_trajectories=2,
        max_steps=5,
        backend="process",
        collector_kwargs=AUTO,
    )
    found = evaluator.evaluate()
    assert 0 < found["eval/episode_length"] <= 5
    evaluator.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [(MultiSyncCollector, {"cat_results": 0}), (MultiAsyncCollector, {})],
    ids=["synchronous", "asynchronous"],
)
def test_a_planner_acts_in_two_worker_processes(kind, options):
    collector = kind(
        [TASK.make] * 2,
        make_planner(),
        frames_per_batch=20,
        total_frames=40,
        **options,
        **AUTO,
    )
    check(collector, 2)


@pytest.mark.parametrize("kind", [CEMPlanner, ICEMPlanner, MPPIPlanner])
def test_the_weights_of_a_planner_can_be_sent(kind):
    """Torch's gloo refuses tensors that are not contiguous."""
    env = TASK.make()
    planner = kind(SMALL_FACTORY(env.observation_spec, env.action_spec), horizon=3, n_samples=24)
    weights = TensorDict.from_module(planner)
    assert all(x.is_contiguous() for x in weights.values(True, True))


@pytest.mark.slow
def test_a_planner_acts_in_two_workers_that_talk_by_torch_distributed():
    collector = DistributedCollector(
        [TASK.make] * 2,
        make_planner(),
        frames_per_batch=20,
        total_frames=40,
        launcher="mp",
        sync=True,
        collector_kwargs=AUTO,
    )
    check(collector, 2)
