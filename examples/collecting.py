"""Where the examples' experience comes from: this process, or the workers of a Ray cluster.

A worker is TorchRL's `Collector` in a Ray actor with environments of its own; `RayCollector` asks
all of them for a batch at once, and the learner sends its weights before each. The cluster is
started here, or joined where it runs, on one machine or on many.
"""

from __future__ import annotations

import importlib.util
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.checkpoint import CheckpointRotation
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

CONNECT_SECONDS = 10  # Ray itself goes on trying for more than five minutes
PLACE_SECONDS = 30
OBJECT_STORE_BYTES = 128 * 1024**2  # batches and weights are small; Ray takes a third of the memory


@dataclass
class CollectorConfig:
    """Where real experience is collected."""

    n_workers: int = 0
    """Ray workers, each with `n_envs` environments and one CPU; 0 to collect in this process."""
    ray_address: str | None = None
    """HOST:PORT of a running Ray cluster; a cluster on this machine alone by default."""


class WorkerDiedError(RuntimeError):
    """A worker, or the machine that it ran on, is gone."""


def check_options(config: Any) -> None:
    """Refuse what no collector can be made of; `config` has also `n_envs`, `steps_per_batch`."""
    if config.n_workers < 0:
        raise SystemExit(f"n_workers is {config.n_workers}, expected at least 0")
    if not config.n_workers:
        if config.ray_address is not None:
            raise SystemExit("ray_address has no effect without workers; add --n-workers")
        return
    n_envs = config.n_workers * config.n_envs
    if config.steps_per_batch % n_envs:
        raise SystemExit(
            f"steps_per_batch is {config.steps_per_batch}, expected a multiple of the {n_envs} "
            f"environments ({config.n_workers} workers with {config.n_envs} each)"
        )
    if importlib.util.find_spec("ray") is None:
        raise SystemExit(
            "n_workers needs Ray, which is not installed; install the extra `ray`, as in "
            "pip install 'layeredrl-torchrl[ray]'"
        )


@contextmanager
def collecting(
    config: CollectorConfig,
    env: EnvBase,
    make_env: Callable[[int], EnvBase],
    policy: TensorDictModuleBase,
    *,
    frames_per_batch: int,
    total_frames: int,
    init_random_frames: int = 0,
) -> Iterator[Iterator[TensorDictBase]]:
    """Batches `[env, T]` that a policy collects, each with the weights it has when asked for.

    With workers, the rows are those of the first worker's environments, then of the second's, and
    so on, in every batch; trajectory ids tell all of them apart.

    Args:
        config: Where to collect.
        env: Environments `[env]` for collecting in this process; left open.
        make_env: Called with a seed in each worker, gives its environments `[env]`.
        policy: What acts. A worker has a copy.
        frames_per_batch: Steps in a batch, over all workers.
        total_frames: Steps to collect.
        init_random_frames: Steps with random actions at the start.

    Raises:
        SystemExit: A cluster that cannot be reached or has too few free CPUs.
        WorkerDiedError: In the middle of the iteration.
    """
    options = {
        "frames_per_batch": frames_per_batch,
        "total_frames": total_frames,
        "init_random_frames": init_random_frames,
    }
    primers = {"auto_register_policy_transforms": True}
    if not config.n_workers:
        collector = Collector(env, policy, **options, **primers)
        try:
            yield iter(collector)
        finally:
            collector.shutdown(close_env=False)
        return

    import ray
    from torchrl.collectors.distributed import RayCollector

    n = config.n_workers
    _connect(config)
    try:
        # Functions of the examples travel as code: other machines need the package alone.
        for function in (_make_seeded, getattr(make_env, "func", make_env)):
            ray.cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
        # From the learner's generator, which a checkpoint restores: a resumed run goes on with
        # other random numbers than it began with.
        seeds = torch.randint(2**31, (n,)).tolist()
        # Rounded up, as without workers: each of them takes its share in whole steps.
        options["init_random_frames"] = -(-init_random_frames // n) * n
        ray_collector = RayCollector(
            [partial(_make_seeded, make_env, seed) for seed in seeds],
            policy,
            **options,
            sync=True,  # the replay buffers are `[env, T]`: every row needs its part of a batch
            postproc=_join,
            collector_kwargs=primers,
            remote_configs={"num_cpus": 1, "scheduling_strategy": _place(config)},
            # TorchRL's own way to send weights opens a second network beside Ray's, for which all
            # host names must resolve and which gives up after a minute.
            weight_sync_schemes={},
        )
        try:
            yield _batches(ray_collector, policy)
        finally:
            ray_collector.shutdown()
    finally:
        ray.shutdown()


def save_and_explain(
    error: WorkerDiedError, save: Callable[[], None] | None, rotation: CheckpointRotation
) -> SystemExit:
    """What to end with when a worker died; `save` is None where nothing was learned since."""
    if save is not None:
        save()
    if rotation.latest() is None:
        return SystemExit(f"{error}\nNothing was learned yet: start again.")
    return SystemExit(
        f"{error}\nAll that was learned is in the last checkpoint: when the cluster has "
        "room for the worker again, go on with the same options and --resume."
    )


def _connect(config: CollectorConfig) -> None:
    """Join the cluster, or start one."""
    import ray

    # What workers print would come with the collector's description, a hundred lines, before each
    # line; their errors arrive all the same.
    quiet = {"logging_level": "error", "log_to_driver": False}
    address = config.ray_address
    if address is None:
        ray.init(
            address="local",
            num_cpus=config.n_workers,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            **quiet,
        )
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise SystemExit(
            f"ray_address is {address!r}, expected HOST:PORT of a cluster's head, as "
            "`ray start --head` prints it"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, **quiet)
    except (OSError, OverflowError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise SystemExit(
            f"cannot join a Ray cluster at {address}: {error}; start its head there with "
            f"`ray start --head --port={port}`, or correct --ray-address"
        ) from error


def _place(config: CollectorConfig) -> Any:
    """Room for every worker, on as many machines as there are; waits until it is free."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{"CPU": 1}] * config.n_workers, strategy="SPREAD")
    if not group.wait(PLACE_SECONDS):
        free, cpus = ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)
        raise SystemExit(
            f"n_workers is {config.n_workers}, and each takes a CPU, but {free:g} of the "
            f"cluster's {cpus:g} are free; lower --n-workers, or add machines with "
            f"`ray start --address={config.ray_address}`"
        )
    return PlacementGroupSchedulingStrategy(group)


def _make_seeded(make_env: Callable[[int], EnvBase], seed: int) -> EnvBase:
    """A worker's environments; also seeds its policy, or all would draw the same noise."""
    torch.manual_seed(seed)
    return make_env(seed)


def _join(data: TensorDictBase) -> TensorDictBase:
    """`[worker, env, T]` to `[worker * env, T]`; each worker counts its trajectories from zero."""
    n = data.shape[0]
    ids = data["collector", "traj_ids"]
    data["collector", "traj_ids"] = ids * n + torch.arange(n).reshape(-1, 1, 1)
    return data.flatten(0, 1)


def _batches(collector: Any, policy: TensorDictModuleBase) -> Iterator[TensorDictBase]:
    import ray

    actors = [actor._actor_id.hex() for actor in collector.remote_collectors]
    batches = iter(collector)
    while True:
        try:
            weights = ray.put(policy.state_dict())
            collector.map_fn("policy.load_state_dict", [(weights,)] * len(actors))
            with warnings.catch_warnings():
                # That its own way of sending weights is not used.
                warnings.filterwarnings("ignore", "RayCollector iteration started before")
                data = next(batches, None)
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            dead = getattr(error, "actor_id", None)
            which = actors.index(dead) + 1 if dead in actors else "?"
            raise WorkerDiedError(f"Ray worker {which} of {len(actors)} died: {error}") from error
        if data is None:
            return
        yield data
