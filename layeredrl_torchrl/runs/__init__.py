"""Long runs, each in its own folder, that can be killed at any moment and resumed."""

from layeredrl_torchrl.runs._command import command
from layeredrl_torchrl.runs._playing import play_episodes
from layeredrl_torchrl.runs.options import (
    Count,
    Natural,
    NotNegative,
    Number,
    Positive,
    PositiveShare,
    RunError,
    RunOptions,
    Seed,
    Share,
    find_task,
)
from layeredrl_torchrl.runs.run import Run
from layeredrl_torchrl.runs.workers import WorkerDiedError, WorkerOptions, collect_with_workers

__all__ = [
    "Count",
    "Natural",
    "NotNegative",
    "Number",
    "Positive",
    "PositiveShare",
    "Run",
    "RunError",
    "RunOptions",
    "Seed",
    "Share",
    "WorkerDiedError",
    "WorkerOptions",
    "collect_with_workers",
    "command",
    "find_task",
    "play_episodes",
]
