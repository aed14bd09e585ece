"""Random actions at the start of a run: which they are, and that there is one start."""

from __future__ import annotations

import pytest
import torch
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_torchrl import SafeCheckpoint, SafeRotation, get_task


@pytest.mark.filterwarnings("ignore:init_random_frames")
def test_random_actions_are_stored_as_such(run, tmp_path):
    """Three batches of 20 begin before step 50, and the collector acts randomly in all of them."""
    run("planning_with_model", "--random-steps=50", f"--output={tmp_path}")
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100_000, ndim=2))
    SafeRotation(tmp_path / "checkpoints", keep_last=2).load_latest(SafeCheckpoint(buffer=buffer))
    (random,) = buffer[:]["random_action"].unique(dim=0)
    assert torch.equal(random, torch.arange(40) < 30)  # of each of two environments


@pytest.mark.parametrize("name", ["dyna_sac", "value_gradients"])
def test_a_run_that_goes_on_for_longer_has_no_second_random_phase(name, example, tmp_path):
    """Its number of random steps is by default a share of all steps."""
    module, task = example(name), get_task("InvertedPendulum-v5")
    env = task.make(seed=0)
    config = module.Config(task=task.name, hidden_size=8)
    short, long = (module.Agent(config, task, env, total) for total in (80, 400))
    assert short.counts["random_steps"] == 20
    assert long.counts["random_steps"] == 100
    path = SafeCheckpoint(counts=short.parts["counts"]).save(tmp_path / "checkpoint")
    SafeCheckpoint(counts=long.parts["counts"]).load(path)
    assert long.counts["random_steps"] == 20
