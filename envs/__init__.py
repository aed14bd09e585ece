"""Tasks for the package; installed as ``layeredrl_torchrl.envs``.

``python -m layeredrl_torchrl.envs`` lists them.
"""

from layeredrl_torchrl.envs.batched import make_batched
from layeredrl_torchrl.envs.mazes import point_maze
from layeredrl_torchrl.envs.registry import TASKS, get_task
from layeredrl_torchrl.envs.success import SuccessReader
from layeredrl_torchrl.envs.task import Task

__all__ = ["TASKS", "SuccessReader", "Task", "get_task", "make_batched", "point_maze"]
