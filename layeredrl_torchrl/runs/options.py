"""Options of a run: their names and ranges."""

from __future__ import annotations

import importlib.util
import json
import types
from dataclasses import asdict, dataclass
from enum import Enum
from numbers import Integral
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, Union, get_args, get_origin
from typing import get_type_hints as type_hints

import torch

from layeredrl_torchrl._checks import check_number
from layeredrl_torchrl.envs import Task, get_task
from layeredrl_torchrl.runs._video import check_rendering

__all__ = [
    "Count",
    "Natural",
    "NotNegative",
    "Number",
    "Positive",
    "PositiveShare",
    "RunError",
    "RunOptions",
    "Seed",
    "Share",
    "find_task",
]


class RunError(RuntimeError):
    """An error that ends a run; its message names the cause and the remedy in one line."""


@dataclass(frozen=True)
class _Range:
    """The range of an option."""

    low: float
    high: float = float("inf")
    open_low: bool = False
    whole: bool = False

    def __repr__(self) -> str:
        left = "(" if self.open_low else "["
        return f"'from {left}{self.low:g}, {self.high:g}]'"


Count: TypeAlias = Annotated[int, _Range(1, whole=True)]
"""At least 1."""
Natural: TypeAlias = Annotated[int, _Range(0, whole=True)]
"""At least 0."""
NotNegative: TypeAlias = Annotated[float, _Range(0.0)]
"""At least 0."""
Positive: TypeAlias = Annotated[float, _Range(0.0, open_low=True)]
"""Above 0."""
PositiveShare: TypeAlias = Annotated[float, _Range(0.0, 1.0, open_low=True)]
"""Above 0, at most 1: a planner's discount."""
Seed: TypeAlias = Annotated[int, _Range(0, 2**32 - 1, whole=True)]
"""A seed of any random generator."""
Number: TypeAlias = Annotated[float, _Range(float("-inf"))]
"""Any finite number."""
Share: TypeAlias = Annotated[float, _Range(0.0, 1.0)]
"""Between 0 and 1, both included."""


_KINDS = {
    "Count": Count,
    "Natural": Natural,
    "NotNegative": NotNegative,
    "Number": Number,
    "Positive": Positive,
    "PositiveShare": PositiveShare,
    "Seed": Seed,
    "Share": Share,
}


@dataclass
class RunOptions:
    """Options of every run; a subclass adds options and may change the defaults.

    Each number has one of the types ``Count``, ``Natural``, ``NotNegative``, ``Number``,
    ``Positive``, ``PositiveShare``, ``Seed`` and ``Share``; :meth:`check` uses their ranges.

    >>> RunOptions(n_envs=0).check()
    Traceback (most recent call last):
    layeredrl_torchrl.runs.options.RunError: --n-envs must be finite and lie in [1, inf), got 0
    """

    task: str = "InvertedPendulum-v5"
    """Name of the task."""
    seed: Seed = 0
    """Seed of everything random."""
    total_env_steps: Count | None = None
    """Steps taken in the real environment; the task's budget by default."""
    n_envs: Count = 1
    """Environments stepped side by side."""
    steps_per_batch: Count = 100
    """Real steps between two learning phases."""
    eval_episodes: Count = 10
    """Episodes of the final evaluation."""
    steps_per_evaluation: Natural = 0
    """Real steps between two evaluations during training; 0 for none."""
    episodes_per_evaluation: Count = 3
    """Episodes of each of them."""
    logger: Literal["csv", "tensorboard", "wandb"] = "csv"
    """Where the learning curve goes beside `curve.csv`; csv for nowhere."""
    video: bool = False
    """Whether an episode is recorded at the end, as `video.gif`."""
    steps_per_checkpoint: Count = 1000
    """Real steps between two checkpoints; the last two are kept."""
    output: Path = Path("output/run")
    """Folder of the learning curve and the checkpoints."""
    resume: bool = False
    """Go on from the last checkpoint in the output folder, with the options saved there."""
    device: str = "cpu"
    """Where networks learn and act; the environments stay on the CPU."""
    threads: Count = 1
    """Threads that torch may use."""

    #: Options that a resumed run may change; all others must equal those of its checkpoint.
    free: ClassVar[frozenset[str]] = frozenset(
        {
            "total_env_steps",
            "eval_episodes",
            "logger",
            "video",
            "steps_per_checkpoint",
            "output",
            "resume",
            "device",
            "threads",
        }
    )

    #: Options that nothing of this program reads; others than their defaults are refused. A
    #: subclass for which that depends on its other options makes it a property.
    without_effect: ClassVar[frozenset[str]] = frozenset()

    @property
    def folder(self) -> Path:
        """The folder of this run; a subclass may use subfolders of ``output`` for several runs."""
        return self.output

    def settings(self) -> dict[str, Any]:
        """Return the options in the form that JSON restores: paths as text, tuples as lists.

        Raises:
            TypeError: An option that JSON cannot store.
        """
        return {name: _plain(name, value) for name, value in asdict(self).items()}

    def check(self) -> None:
        """Check every option; a subclass adds checks that involve several.

        Raises:
            RunError: An option out of range, or without effect; the message names it, its value
                and its range.
        """
        check_ranges(self)
        for name in sorted(self.without_effect):
            value, default = getattr(self, name), getattr(type(self), name)
            if value != default:
                option = "--" + name.replace("_", "-")
                raise RunError(f"{option} {value} has no effect here; leave it out ({default})")
        often, default = self.episodes_per_evaluation, type(self).episodes_per_evaluation
        if often != default and not self.steps_per_evaluation:
            raise RunError(
                f"--episodes-per-evaluation {often} has no effect without evaluations on the way; "
                "add --steps-per-evaluation"
            )
        if self.logger != "csv" and importlib.util.find_spec(self.logger) is None:
            raise RunError(
                f"--logger {self.logger} needs a package that is not installed; install the extra "
                f'`{self.logger}`, as in pip install -e ".[{self.logger}]"'
            )
        if self.steps_per_batch % self.n_envs:
            raise RunError(
                f"--steps-per-batch is {self.steps_per_batch}, expected a multiple of the "
                f"{self.n_envs} environments (--n-envs)"
            )
        if self.video:
            try:
                check_rendering(find_task(self.task))
            except RuntimeError as error:
                raise RunError(f"--video: {error}") from error


def check_ranges(options: object) -> None:
    """Check the numbers and choices of a dataclass of options whose types give their ranges.

    If it has a ``device``, torch must be able to use that.

    Raises:
        RunError: An option out of range; the message names it, its value and its range.
    """
    # Scripts run from strings, as in notebooks, have no module to look up names.
    for name, hint in type_hints(type(options), None, _KINDS, include_extras=True).items():
        bounds = _range_of(hint)
        value: Any = getattr(options, name, None)
        option = "--" + name.replace("_", "-")
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise RunError(f"{option} must be one of {', '.join(get_args(hint))}; got {value!r}")
        if hint in (str, bool) and not isinstance(value, hint):
            raise RunError(f"{option} must be of type {hint.__name__}, got {value!r}")
        if bounds is None or (value is None and type(None) in get_args(hint)):
            continue
        try:
            for one in value if _holds_several(hint) and value is not None else (value,):
                check_number(option, one, bounds.low, bounds.high, open_low=bounds.open_low)
                if bounds.whole and not isinstance(one, Integral):
                    raise TypeError(f"{option} must be a whole number, got {one!r}")
        except (TypeError, ValueError) as error:
            raise RunError(str(error)) from None
    device = getattr(options, "device", "cpu")
    try:
        if torch.device(device).type != "cpu":
            torch.zeros(1, device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"--device {device} cannot be used: {reason}") from None


def find_task(name: str, *, with_goals: bool = False) -> Task:
    """Return the task with that name; :class:`RunError` with similar names if there is none.

    Args:
        name: Name in the registry.
        with_goals: Whether a task that does not report success is an error.
    """
    try:
        task = get_task(name)
    except KeyError as error:
        raise RunError(f"--task: {error.args[0]}") from None
    if with_goals and not task.reports_success:
        raise RunError(
            f"--task: {task.name} has no goals to reach; choose a point maze or Reacher-Tip"
        )
    return task


def _plain(name: str, value: object) -> object:
    def text(part: object) -> object:
        if isinstance(part, PurePath):
            return str(part)
        if isinstance(part, Enum):
            return part.value
        raise TypeError(
            f"the option {name} is {value!r}, but the settings of a run hold numbers, texts, "
            f"paths, and lists of them, no {type(part).__name__}; make it a name that is looked up"
        )

    return json.loads(json.dumps(value, default=text))


def restored(options: type, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the ``saved`` settings that ``options`` has, as values of their types."""
    hints = type_hints(options, None, _KINDS)
    return {name: _typed(value, hints[name]) for name, value in saved.items() if name in hints}


def _typed(value: Any, hint: Any) -> Any:
    """Return a value restored from JSON as a value of the type ``hint``."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return next((new for part in parts if (new := _typed(value, part)) is not value), value)
    if origin in (tuple, list) and isinstance(value, list):
        kinds = parts if origin is tuple and parts[-1] is not Ellipsis else parts[:1] * len(value)
        return origin(_typed(one, kind) for one, kind in zip(value, kinds, strict=True))
    if isinstance(hint, type) and issubclass(hint, PurePath | Enum) and value is not None:
        return hint(value)
    return value


def _holds_several(hint: object) -> bool:
    """Whether the type is a tuple or list, optional or not."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return any(get_origin(kind) in (tuple, list) for kind in kinds)


def _range_of(hint: object) -> _Range | None:
    """Return the range in ``Annotated[...]``, also in optional types and in tuples."""
    if get_origin(hint) is Annotated:
        return next((found for found in get_args(hint)[1:] if isinstance(found, _Range)), None)
    if get_origin(hint) in (Union, types.UnionType, tuple):
        return next((r for part in get_args(hint) if (r := _range_of(part)) is not None), None)
    return None
