"""Collect data with the workers of a Ray cluster.

A worker is TorchRL's ``Collector`` in a Ray actor with its own environments. ``RayCollector`` asks
all workers for a batch at the same time, and the learner sends its weights before each batch. This
module either starts a cluster on this machine, or joins one of one or many machines.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from layeredrl_torchrl.runs.options import Natural, RunError, RunOptions

__all__ = ["WorkerDiedError", "WorkerOptions", "collect_with_workers"]

CONNECT_SECONDS = 10  # Ray itself would try for more than five minutes
PLACE_SECONDS = 30
OBJECT_STORE_BYTES = 128 * 1024**2  # batches and weights are small; Ray's default is a third of RAM


class WorkerDiedError(RuntimeError):
    """A worker or its machine has died."""


@dataclass
class WorkerOptions(RunOptions):
    """Options of a run that may collect with Ray.

    >>> WorkerOptions(ray_address="head:6379").check()
    Traceback (most recent call last):
    layeredrl_torchrl.runs.options.RunError: --ray-address has no effect without ...
    """

    n_workers: Natural = 0
    """Ray workers, each with `n_envs` environments and one CPU; 0 to collect in this process."""
    ray_address: str | None = None
    """HOST:PORT of a running Ray cluster; by default a new cluster on this machine alone."""

    free: ClassVar[frozenset[str]] = RunOptions.free | {"ray_address"}

    def check(self) -> None:
        """Check the options of workers too."""
        super().check()
        if not self.n_workers:
            if self.ray_address is not None:
                raise RunError("--ray-address has no effect without workers; add --n-workers")
            return
        n_envs = self.n_workers * self.n_envs
        if self.steps_per_batch % n_envs:
            raise RunError(
                f"--steps-per-batch is {self.steps_per_batch}, expected a multiple of the {n_envs} "
                f"environments ({self.n_workers} workers with {self.n_envs} each)"
            )
        if importlib.util.find_spec("ray") is None:
            raise RunError(
                "--n-workers needs Ray, which is not installed; install the extra `ray`, as in "
                'pip install -e ".[ray]"'
            )


@contextmanager
def collect_with_workers(
    options: WorkerOptions,
    make_env: Callable[[int], EnvBase],
    policy: TensorDictModuleBase,
    *,
    frames_per_batch: int,
    total_frames: int,
    init_random_frames: int = 0,
) -> Iterator[Iterator[TensorDictBase]]:
    """Yield batches ``[env, T]`` that workers collect, each with the newest weights.

    Every batch has the rows of the first worker's environments first, then those of the second
    worker, and so on; trajectory ids are unique across workers.

    Args:
        options: Number of workers, and the cluster.
        make_env: Returns the environments ``[env]`` of a worker for its seed.
        policy: The policy; each worker has a copy on its CPU.
        frames_per_batch: Steps in a batch, over all workers.
        total_frames: Steps to collect.
        init_random_frames: Steps with random actions at the start.

    Raises:
        RunError: A cluster that cannot be reached or has too few free CPUs.
        WorkerDiedError: During the iteration.
    """
    import ray
    from torchrl.collectors.distributed import RayCollector

    n = options.n_workers
    acting = policy
    if torch.device(options.device).type != "cpu":
        acting = copy.deepcopy(policy).to("cpu")
    _connect(options)
    try:
        # Send a script's functions as code, so that other machines need only the package.
        script = sys.modules[getattr(make_env, "func", make_env).__module__]
        if not script.__name__.startswith("layeredrl_torchrl"):
            ray.cloudpickle.register_pickle_by_value(script)
        # Draw seeds from the learner's generator, which a checkpoint restores, so that a resumed
        # run does not repeat its first random numbers.
        seeds = torch.randint(2**31, (n,)).tolist()
        ray_collector = RayCollector(
            [partial(_make_seeded, make_env, seed) for seed in seeds],
            acting,
            frames_per_batch=frames_per_batch,
            total_frames=total_frames,
            # Rounded up, since each worker takes its share in whole steps.
            init_random_frames=-(-init_random_frames // n) * n,
            sync=True,  # the replay buffers are `[env, T]`: every batch needs all rows
            postproc=_join,
            collector_kwargs={"auto_register_policy_transforms": True},
            remote_configs={"num_cpus": 1, "scheduling_strategy": _reserve_cpus(options)},
            # TorchRL's own transport of weights opens a second network in addition to Ray's. For it
            # all host names must resolve, and it times out after a minute.
            weight_sync_schemes={},
        )
        try:
            yield _batches(ray_collector, policy)
        finally:
            ray_collector.shutdown()
    finally:
        ray.shutdown()


def _connect(options: WorkerOptions) -> None:
    """Join the cluster, or start one."""
    import ray

    # A hundred lines that describe the collector would precede each line printed by a worker;
    # errors arrive without log_to_driver.
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    address = options.ray_address
    if address is None:
        with _loopback():
            ray.init(
                address="local",
                num_cpus=options.n_workers,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise RunError(
            f"--ray-address is {address!r}, expected HOST:PORT of a cluster's head, as "
            "`ray start --head` prints it"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, **quiet)
    except (OSError, OverflowError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise RunError(
            f"cannot join a Ray cluster at {address}: {error}; start its head there with "
            f"`ray start --head --port={port}`, or correct --ray-address"
        ) from error


@contextmanager
def _loopback() -> Iterator[None]:
    """Make clusters started in the block listen only on this machine's loopback.

    By default Ray listens on all interfaces, and anybody who can connect can run code.
    """
    from ray._private import ray_constants

    # Ray's own switch for systems where it does not support clusters of several machines.
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    given = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(name)
        if given is not None:
            os.environ[name] = given


def _reserve_cpus(options: WorkerOptions) -> Any:
    """Reserve a CPU for every worker, spread over all machines; wait until they are free."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{"CPU": 1}] * options.n_workers, strategy="SPREAD")
    if not group.wait(PLACE_SECONDS):
        free, cpus = ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)
        raise RunError(
            f"--n-workers is {options.n_workers}, and each takes a CPU, but {free:g} of the "
            f"cluster's {cpus:g} are free; lower --n-workers, or add machines with "
            f"`ray start --address={options.ray_address}`"
        )
    return PlacementGroupSchedulingStrategy(group)


def _make_seeded(make_env: Callable[[int], EnvBase], seed: int) -> EnvBase:
    """Make a worker's environments, and seed its policy so that workers draw different noise."""
    torch.manual_seed(seed)
    return make_env(seed)


def _join(data: TensorDictBase) -> TensorDictBase:
    """Reshape `[worker, env, T]` to `[worker * env, T]`, and make trajectory ids unique."""
    n = data.shape[0]
    ids = data["collector", "traj_ids"]
    data["collector", "traj_ids"] = ids * n + torch.arange(n, device=ids.device).reshape(-1, 1, 1)
    return data.flatten(0, 1)


def _batches(collector: Any, policy: TensorDictModuleBase) -> Iterator[TensorDictBase]:
    import ray

    actors = [actor._actor_id.hex() for actor in collector.remote_collectors]
    batches = iter(collector)
    while True:
        try:
            state = policy.state_dict()
            weights = ray.put({name: _on_cpu(value) for name, value in state.items()})
            collector.map_fn("policy.load_state_dict", [(weights,)] * len(actors))
            with warnings.catch_warnings():
                # TorchRL warns that its own transport of weights is not used.
                warnings.filterwarnings("ignore", "RayCollector iteration started before")
                data = next(batches, None)
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            dead = getattr(error, "actor_id", None)
            which = actors.index(dead) + 1 if dead in actors else "?"
            raise WorkerDiedError(f"Ray worker {which} of {len(actors)} died: {error}") from error
        if data is None:
            return
        yield data


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value
