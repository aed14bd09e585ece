"""Collecting with Ray: real workers, on a cluster of two nodes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import tyro
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import RewardSum, StepCounter

from layeredrl_torchrl import make_batched
from layeredrl_torchrl.runs import RunError, WorkerOptions, collect_with_workers, workers

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

# Each worker is a new process that imports torch, MuJoCo and TorchRL.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
SMALL = (
    "--task=InvertedPendulum-v5",
    "--n-envs=2",
    "--steps-per-batch=20",
    "--steps-per-checkpoint=60",
    "--eval-episodes=2",
    "--updates-per-step=0.2",
    "--batch-size=16",
    "--hidden-size=8",
)
PLANS = ("--n-models=2", "--horizon=2", "--n-samples=16", "--n-iterations=1", "--random-steps=20")


@pytest.fixture
def example(monkeypatch):
    """``example(name, *options)``: run an example in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))

    def call(name: str, *options: str) -> None:
        module = __import__(name)
        module.main(tyro.cli(module.Config, args=options))

    return call


@pytest.fixture
def curve():
    def read(folder: Path) -> list[list[str]]:
        return [line.split(",") for line in (folder / "curve.csv").read_text().splitlines()]

    return read


@pytest.fixture(autouse=True, scope="module")
def environment():
    """Workers see this package where it is not installed; Ray writes no token into the home."""
    root = str(ROOT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def cluster(environment):
    """A head and one more node, each with one CPU; both are stopped whatever happens."""
    small = {"num_cpus": 1, "object_store_memory": 80 * 1024**2, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=small)
    try:
        found.add_node(num_cpus=1, object_store_memory=80 * 1024**2)
        found.wait_for_nodes(60)
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


@pytest.fixture(autouse=True)
def disconnected():
    """What a test leaves open would hide in the next one."""
    yield
    was_open = ray.is_initialized()
    ray.shutdown()
    assert not was_open


def make_numbered(seed: int, *, limit: int):
    """Two environments; episodes of `limit` steps at most."""
    env = make_batched("InvertedPendulum-v5", 2, seed=seed)
    env.append_transform(RewardSum())
    env.append_transform(StepCounter(limit))
    return env


def test_both_workers_collect_with_the_newest_weights(cluster):
    """A linear policy: its actions are the weights' closed form, in each batch the newest."""
    linear = nn.Linear(4, 1)
    policy = TensorDictModule(linear, ["observation"], ["action"])
    options = WorkerOptions(n_workers=2, ray_address=cluster.address)
    make_env, batches = partial(make_numbered, limit=3), []
    with collect_with_workers(
        options, make_env, policy, frames_per_batch=40, total_frames=120
    ) as source:
        for data in source:
            assert data.shape == (4, 10)
            expected = data["observation"] @ linear.weight.T + linear.bias
            torch.testing.assert_close(data["action"], expected.detach())
            batches.append(data)
            with torch.no_grad():
                linear.weight.normal_()
                linear.bias.normal_()
    assert len(batches) == 3
    found = torch.cat(batches, 1)

    # The rows stay in order: each goes on where its part of the last batch ended, and both the
    # seeds of the workers and those of their environments differ.
    ids, done = found["collector", "traj_ids"], found["next", "done"].squeeze(-1)
    after, before = found["observation"][:, 1:], found["next", "observation"][:, :-1]
    going_on = ~done[:, :-1]
    assert going_on.any(1).all()
    assert done.any(1).all()
    assert torch.equal(after[going_on], before[going_on])
    assert len(found["observation"][:, 0].unique(dim=0)) == 4

    # A trajectory is one row's, without a gap, and ends where its episode does.
    assert torch.equal(ids[:, 1:] == ids[:, :-1], going_on)
    assert len(ids.unique()) == int(done[:, :-1].sum()) + 4


def test_a_lost_machine_ends_the_run_and_a_resumed_run_goes_on(example, cluster, curve, tmp_path):
    folder = tmp_path / "run"
    small = (*SMALL, "--n-workers=2", "--random-steps=40", f"--output={folder}")
    options = (*small, f"--ray-address={cluster.address}")

    def lose_a_machine() -> None:
        deadline = time.monotonic() + 400
        while not list(folder.glob("checkpoints/checkpoint-*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        (node,) = (node for node in cluster.list_all_nodes() if not node.head)
        cluster.remove_node(node, allow_graceful=False)

    accident = threading.Thread(target=lose_a_machine)
    accident.start()
    try:
        with pytest.raises(RunError, match=r"Ray worker [12] of 2 died[\s\S]*--resume"):
            example("dyna_sac", *options, "--total-env-steps=100000")
    finally:
        accident.join()
        cluster.add_node(num_cpus=1, object_store_memory=80 * 1024**2)
        cluster.wait_for_nodes(60)
    rows = curve(folder)
    steps = [int(float(row[0])) for row in rows[1:]]
    assert steps == list(range(20, steps[-1] + 1, 20))
    assert steps[-1] >= 60

    more = (*options, "--resume", f"--total-env-steps={steps[-1] + 40}")
    with pytest.raises(RunError, match=r"was made with \{'n_workers': 2\}"):
        example("dyna_sac", *more, "--n-workers=1")
    example("dyna_sac", *more)
    after, nll = curve(folder), rows[0].index("nll")
    assert after[: len(rows)] == rows
    assert [int(float(row[0])) for row in after[len(rows) :]] == [steps[-1] + 20, steps[-1] + 40]
    assert all(row[nll] != "nan" for row in after[len(rows) :])  # no second random phase


def test_a_planner_is_the_remote_policy_on_a_cluster_of_its_own(example, curve, tmp_path):
    options = (*SMALL, *PLANS, "--n-workers=1", "--total-env-steps=60", f"--output={tmp_path}")
    example("learn_to_control", *options)
    rows = curve(tmp_path)
    assert [float(row[0]) for row in rows[1:]] == [20, 40, 60]
    # The copy in the worker is told with the weights that the random steps are over.
    random = rows[0].index("random")
    assert [float(row[random]) for row in rows[1:]] == [1, 0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's table of sockets")
def test_a_cluster_of_its_own_listens_on_loopback_only(tmp_path):
    """In a process of its own: every listening socket of it and of its children."""
    code = """
import ray
import psutil  # Ray brings it
from layeredrl_torchrl.runs import WorkerOptions
from layeredrl_torchrl.runs.workers import _connect
_connect(WorkerOptions(n_workers=1))
me = psutil.Process()
found = [c.laddr.ip for p in [me, *me.children(recursive=True)] for c in p.net_connections("tcp")
         if c.status == psutil.CONN_LISTEN]
ray.shutdown()
print("listens on", sorted(set(found)), len(found))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("listens on"))
    assert int(line.split()[-1]) > 3
    assert not {"::", "0.0.0.0"} & set(line.replace("'", " ").replace(",", " ").split()), line
    assert "127.0.0.1" in line


def test_a_cluster_without_room_says_so(cluster, monkeypatch):
    monkeypatch.setattr(workers, "PLACE_SECONDS", 1)
    options = WorkerOptions(n_workers=3, ray_address=cluster.address)
    policy = TensorDictModule(nn.Linear(4, 1), ["observation"], ["action"])
    source = collect_with_workers(
        options, partial(make_numbered, limit=3), policy, frames_per_batch=60, total_frames=60
    )
    with pytest.raises(RunError, match=r"--n-workers is 3.*of the cluster's 2 are free"), source:
        pass


@pytest.mark.parametrize("address", ["head", "ray://head:10001", None])
def test_a_cluster_that_cannot_be_reached_says_so(address, example, tmp_path, monkeypatch):
    """Before Ray is asked to join it, which would try for minutes."""
    asked = []
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: nothing else can answer there
        where = address or f"127.0.0.1:{taken.getsockname()[1]}"
        options = (*SMALL, "--n-workers=2", f"--ray-address={where}", f"--output={tmp_path}/run")
        message = "expected HOST:PORT" if address else f"cannot join a Ray cluster at {where}"
        with pytest.raises(RunError, match=message):
            example("dyna_sac", *options, "--total-env-steps=100")
    assert not asked


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as Python marks what cannot be imported
    with pytest.raises(RunError, match=r'pip install -e "\.\[ray\]"'):
        WorkerOptions(n_workers=2, n_envs=1, steps_per_batch=100).check()
