"""What collecting with Ray works out without a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict

from layeredrl_torchrl import make_batched
from layeredrl_torchrl.runs import Run, RunError, WorkerOptions
from layeredrl_torchrl.runs.workers import _connect, _join, _make_seeded


def test_rows_of_all_workers_in_their_order_with_ids_of_their_own():
    """Three workers with two environments each, which number their trajectories alike."""
    ids = torch.tensor([[0, 0, 2, 2], [1, 1, 1, 3]]).expand(3, 2, 4).clone()
    place = torch.arange(24).reshape(3, 2, 4)
    with torch.device("meta"):  # whatever is the default where they arrive
        found = _join(TensorDict({"place": place, "collector": {"traj_ids": ids}}, [3, 2, 4]))
    assert found.batch_size == (6, 4)
    assert torch.equal(found["place"], place.reshape(6, 4))
    pairs = {}
    for (worker, env, t), own in zip(
        torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(4)).tolist(),
        found["collector", "traj_ids"].flatten().tolist(),
        strict=True,
    ):
        assert pairs.setdefault(own, (worker, int(ids[worker, env, t]))) == (
            worker,
            int(ids[worker, env, t]),
        )
    assert len(pairs) == 3 * 4


def test_a_run_that_has_all_its_steps_needs_no_cluster(tmp_path):
    """Nobody answers at this address."""
    pytest.importorskip("ray")
    options = WorkerOptions(output=tmp_path / "run", n_workers=1, ray_address="127.0.0.1:9")
    with Run(options, 10) as run:
        run.count(torch.zeros(10))
        run.save()
    env, policy = make_batched("InvertedPendulum-v5", 1), torch.nn.Identity()
    with Run(replace(options, resume=True), 10) as run:
        assert list(run.collect(env, policy, make_env=make_batched)) == []


def test_workers_draw_by_their_seeds():
    drawn = [_make_seeded(lambda seed: (seed, torch.rand(1).item()), seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1]
    assert [seed for seed, _ in drawn] == [3, 3, 4]
    assert drawn[2][1] != drawn[0][1]


@pytest.mark.parametrize("address", ["head", ":6379", "head:", "head:port", "ray://head:10001"])
def test_an_address_that_is_none_is_named_before_anything_is_tried(address):
    pytest.importorskip("ray")
    with pytest.raises(RunError, match=r"--ray-address is '.*', expected HOST:PORT"):
        _connect(WorkerOptions(n_workers=1, ray_address=address))


@pytest.mark.parametrize(
    ("n_workers", "n_envs", "steps", "fits"),
    [(2, 2, 20, True), (2, 3, 9, False), (3, 1, 10, False)],
)
def test_steps_are_shared_among_all_environments(n_workers, n_envs, steps, fits):
    pytest.importorskip("ray")
    config = WorkerOptions(n_workers=n_workers, n_envs=n_envs, steps_per_batch=steps)
    if fits:
        config.check()
        return
    with pytest.raises(RunError, match=f"expected a multiple of the {n_workers * n_envs} env"):
        config.check()
