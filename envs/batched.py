"""Several environments as one."""

from __future__ import annotations

from functools import partial
from typing import Any

from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torchrl.envs import EnvBase

from layeredrl_torchrl._checks import check_instance, check_positive_int
from layeredrl_torchrl.envs.registry import get_task
from layeredrl_torchrl.envs.task import Task

__all__ = ["make_batched"]


def make_batched(task: Task | str, n: int, *, seed: int | None = None, **kwargs: Any) -> EnvBase:
    """Make ``n`` environments of a task as one TorchRL environment of batch size ``[n]``.

    The observation at the end of an episode is the true final one. (``GymEnv(num_envs=n)`` gives
    zeros there and a step that never happened, because gymnasium's vectorised environments reset
    themselves by default. Here this is switched off, and TorchRL resets them one by one.) All
    environments run in this process, which is faster than worker processes for MuJoCo's small
    tasks.

    >>> make_batched("InvertedPendulum-v5", 4, seed=0).rollout(3).shape
    torch.Size([4, 3])

    Args:
        task: A task, or the name of one in the registry.
        n: Number of environments, at least 1.
        seed: Environment ``i`` behaves like ``task.make(seed=seed + i)``.
        **kwargs: Keyword arguments of ``Task.make``.

    Raises:
        KeyError: A name that is not in the registry. TypeError: Neither name nor task; a number or
            a seed that is no integer. ValueError: ``n`` below 1.
    """
    check_positive_int("n", n)
    if isinstance(task, str):
        task = get_task(task)
    check_instance("task", task, Task, hint="pass a Task, or the name of one")
    makers = [partial(task.make_gym, **kwargs)] * n
    return task.wrap(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED), seed)
