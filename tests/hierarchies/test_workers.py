"""A hierarchy in TorchRL's worker processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

# The collector is still referred to when the interpreter ends, and TorchRL 0.14 stops the sharing
# of weights in a __del__ that starts a thread: without the package's help it would never end.
SCRIPT = """
from functools import partial

import torch
from torchrl.collectors import MultiSyncCollector
from torchrl.data import Bounded

from layeredrl_torchrl import (
    ActionSequenceLevel, Hierarchy, ICEMPlanner, PlannerLevel, PredictorFactory, get_task
)


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = get_task("InvertedPendulum-v5")
    upper = PlannerLevel(
        predictor_factory=PredictorFactory(hidden_sizes=(8,), n_models=2),
        planner_factory=partial(ICEMPlanner, horizon=3, n_samples=24, n_iterations=2),
        n_initial_random_steps=30, updates_per_step=0.5, batch_size=8, model_batch_size=8,
    )
    lower = ActionSequenceLevel(torch.ones(2, 1), input_spec=Bounded(-1.0, 1.0, (2,)))
    hierarchy = Hierarchy([upper, lower], env=task.make())
    collector = MultiSyncCollector(
        [task.make] * 2,
        hierarchy,
        frames_per_batch=40,
        total_frames=80,
        auto_register_policy_transforms=True,
        cat_results=-1,
    )
    for i, data in enumerate(collector):
        own, rows = hierarchy.transitions(data)
        assert len(rows) == 40
        assert ((own["next", "elapsed_steps"] == 2) | own["next", "done"]).all()
        # What learn has counted reaches the workers: they plan from the second batch on.
        assert own["random_action"].all() if i == 0 else not own["random_action"][-3:].any()
        info = hierarchy.learn(data)
        assert info["PlannerLevel/n_updates"] > 0, info
    collector.shutdown()
    print("learned from two workers")
    return collector


if __name__ == "__main__":
    kept = main()
"""


@pytest.mark.slow
def test_a_hierarchy_learns_from_two_worker_processes(tmp_path):
    script = tmp_path / "collect.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=280, check=False
    )
    assert "learned from two workers" in done.stdout, done.stderr[-3000:]
    assert done.returncode == 0


UNENDED = """
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import MultiAsyncCollector, MultiSyncCollector

from layeredrl_torchrl import get_task


def main():
    make = get_task("InvertedPendulum-v5").make
    policy = TensorDictModule(nn.Linear(4, 1), ["observation"], ["action"])
    collector = {kind}([make] * 2, policy, frames_per_batch=20, total_frames=100)
    for data in collector:
        raise RuntimeError("an error in the loop")


if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MultiSyncCollector", "MultiAsyncCollector"])
def test_after_an_error_the_process_ends_although_nobody_shut_the_workers_down(kind, tmp_path):
    script = tmp_path / "collect.py"
    script.write_text(UNENDED.format(kind=kind))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 1
    assert "an error in the loop" in done.stderr
