"""Prints a table of the tasks: ``python -m layeredrl_torchrl.envs``."""

from __future__ import annotations

import sys

from layeredrl_torchrl.envs.known import never
from layeredrl_torchrl.envs.registry import TASKS
from layeredrl_torchrl.envs.task import Task

_LEGEND = """
state, context, action: their dimensions. horizon: steps of an episode. budget: real steps in which
the benchmarks learn the task. solved at: return of an episode. known reward, known end: what
`get_task(name).reward` and `.termination` tell without learning. Point mazes need the extra
robotics: in the clone, python -m pip install -e ".[robotics]"
"""
_HEAD = (
    *("task", "state", "context", "action", "horizon", "budget", "solved at"),
    *("known reward", "known end"),
)


def _known(function: object, of: str) -> str:
    """Return the cell for a function: "no" if it is unknown, "never", or its arguments."""
    if function is None:
        return "no"
    return "never" if function is never else of


def _row(task: Task) -> tuple[str, ...]:
    reward = "of next state" if task.reward_needs_next_state else "of state"
    sizes = (len(task.state_dims), len(task.context_dims), task.action_dim, task.horizon)
    solved = "" if task.solved_at is None else f"{task.solved_at:g}"
    known = (_known(task.reward, reward), _known(task.termination, "of next state"))
    return (task.name, *map(str, sizes), f"{task.budget:,}", solved, *known)


def table() -> str:
    """Return all tasks as a Markdown table: ``D``, ``C`` and ``A``, steps, known functions."""
    rows = [_HEAD, *map(_row, TASKS.values())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table() + _LEGEND)
