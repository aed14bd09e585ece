"""The examples that collect with Ray: real workers, on a cluster of two nodes on this machine."""

from __future__ import annotations

import os
import socket
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

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

# Each worker is a new process that imports torch, MuJoCo and TorchRL.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL_DYNA = (
    "--task=InvertedPendulum-v5",
    "--random-steps=40",
    "--n-envs=2",
    "--n-workers=2",
    "--steps-per-batch=20",
    "--steps-per-checkpoint=60",
    "--eval-episodes=2",
    "--imagined-per-step=5",
    "--imagined-size=400",
    "--model-updates-per-step=0.2",
    "--updates-per-step=0.2",
    "--batch-size=16",
    "--n-models=2",
    "--model-hidden-size=8",
    "--hidden-size=8",
)
SMALL_LEVEL = (
    "--task=InvertedPendulum-v5",
    "--total-env-steps=60",
    "--random-steps=20",
    "--n-envs=2",
    "--n-workers=1",
    "--steps-per-batch=20",
    "--updates-per-step=0.2",
    "--eval-episodes=1",
    "--n-models=2",
    "--hidden-size=8",
    "--horizon=2",
    "--n-samples=16",
    "--n-iterations=1",
    "--batch-size=16",
    "--threads=1",
)


@pytest.fixture(scope="module")
def examples():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import collecting
        import dyna_sac
        import learn_to_control

        yield collecting, dyna_sac, learn_to_control


@pytest.fixture(autouse=True, scope="module")
def environment():
    """Workers see this package where it is not installed; Ray writes no token into the home."""
    root = str(EXAMPLES.parent)
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


def test_both_workers_collect_with_the_newest_weights(examples, cluster):
    """A linear policy: its actions are the weights' closed form, in each batch the newest."""
    collecting, _, _ = examples
    linear = nn.Linear(4, 1)
    policy = TensorDictModule(linear, ["observation"], ["action"])
    config = collecting.CollectorConfig(n_workers=2, ray_address=cluster.address)
    make_env = partial(make_numbered, limit=3)
    batches = []
    with collecting.collecting(
        config, make_env(0), make_env, policy, frames_per_batch=40, total_frames=120
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


def test_a_lost_machine_ends_the_run_and_a_resumed_run_goes_on(examples, cluster, curve, tmp_path):
    _, dyna_sac, _ = examples
    folder = tmp_path / "run"
    options = (*SMALL_DYNA, f"--ray-address={cluster.address}", f"--output={folder}")

    def lose_a_machine() -> None:
        deadline = time.monotonic() + 400
        while not (folder / "curve.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        (node,) = (node for node in cluster.list_all_nodes() if not node.head)
        cluster.remove_node(node, allow_graceful=False)

    accident = threading.Thread(target=lose_a_machine)
    accident.start()
    try:
        with pytest.raises(SystemExit, match=r"Ray worker [12] of 2 died[\s\S]*--resume"):
            dyna_sac.main(tyro.cli(dyna_sac.Config, args=(*options, "--total-env-steps=100000")))
    finally:
        accident.join()
        cluster.add_node(num_cpus=1, object_store_memory=80 * 1024**2)
        cluster.wait_for_nodes(60)
    rows = curve(folder)
    steps = [int(float(row["env_steps"])) for row in rows]
    assert steps == list(range(20, steps[-1] + 1, 20))
    assert steps[-1] >= 60

    more = (*options, "--resume", f"--total-env-steps={steps[-1] + 40}")
    with pytest.raises(SystemExit, match=r"was made with \{'n_workers': 2\}"):
        dyna_sac.main(tyro.cli(dyna_sac.Config, args=(*more, "--n-workers=1")))
    dyna_sac.main(tyro.cli(dyna_sac.Config, args=more))
    after = curve(folder)
    assert after[: len(rows)] == rows
    added = after[len(rows) :]
    assert [float(row["env_steps"]) for row in added] == [steps[-1] + 20, steps[-1] + 40]
    assert all(row["nll"] != "nan" for row in added)  # no second random phase


def test_a_planner_is_the_remote_policy_on_a_cluster_of_its_own(examples, curve, tmp_path):
    _, _, learn_to_control = examples
    options = (*SMALL_LEVEL, f"--output={tmp_path}")
    learn_to_control.main(tyro.cli(learn_to_control.Config, args=options))
    rows = curve(tmp_path)
    assert [float(row["env_steps"]) for row in rows] == [20, 40, 60]
    # The copy in the worker is told with the weights that the random steps are over.
    assert [float(row["random"]) for row in rows] == [1, 0, 0]


def test_a_cluster_without_room_says_so(examples, cluster, monkeypatch):
    collecting, _, _ = examples
    monkeypatch.setattr(collecting, "PLACE_SECONDS", 1)
    config = collecting.CollectorConfig(n_workers=3, ray_address=cluster.address)
    make_env = partial(make_numbered, limit=3)
    policy = TensorDictModule(nn.Linear(4, 1), ["observation"], ["action"])
    source = collecting.collecting(
        config, make_env(0), make_env, policy, frames_per_batch=60, total_frames=60
    )
    with pytest.raises(SystemExit, match=r"n_workers is 3.*of the cluster's 2 are free"), source:
        pass


def test_a_cluster_that_cannot_be_reached_says_so(examples, tmp_path):
    _, dyna_sac, _ = examples
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: nothing else can answer there
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        options = (*SMALL_DYNA, "--total-env-steps=100", f"--output={tmp_path}")
        started = time.monotonic()
        with pytest.raises(SystemExit, match=f"cannot join a Ray cluster at {address}"):
            dyna_sac.main(tyro.cli(dyna_sac.Config, args=(*options, f"--ray-address={address}")))
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n-workers=-1"], "n_workers is -1"),
        (["--n-workers=0", "--ray-address=head:6379"], "ray_address has no effect"),
        (["--n-workers=3"], "multiple of the 6 environments"),
        (["--ray-address=head"], "expected HOST:PORT"),
        (["--ray-address=ray://head:10001"], "expected HOST:PORT"),
    ],
)
def test_bad_options_say_what_to_do(options, message, examples, tmp_path):
    _, dyna_sac, _ = examples
    given = (*SMALL_DYNA, "--total-env-steps=100", f"--output={tmp_path}", *options)
    with pytest.raises(SystemExit, match=message):
        dyna_sac.main(tyro.cli(dyna_sac.Config, args=given))


def test_without_ray_it_says_what_to_install(examples, monkeypatch, tmp_path):
    _, dyna_sac, _ = examples
    monkeypatch.setitem(sys.modules, "ray", None)  # as Python marks what cannot be imported
    given = (*SMALL_DYNA, "--total-env-steps=100", f"--output={tmp_path}")
    with pytest.raises(SystemExit, match=r"pip install 'layeredrl-torchrl\[ray\]'"):
        dyna_sac.main(tyro.cli(dyna_sac.Config, args=given))
