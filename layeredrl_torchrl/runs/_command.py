"""A command line with one-line errors."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from gymnasium.error import UnregisteredEnv

from layeredrl_torchrl.runs._folder import read_settings
from layeredrl_torchrl.runs.options import (
    RunError,
    RunOptions,
    check_ranges,
    restored,
)

__all__ = ["command"]

# The extra that installs each module.
_EXTRAS = {
    "gymnasium_robotics": "robotics",
    "imageio": "examples",
    "matplotlib": "plots",
    "ray": "ray",
    "tensorboard": "tensorboard",
    "tyro": "examples",
    "wandb": "wandb",
}

Options = TypeVar("Options")
AnyRunOptions = TypeVar("AnyRunOptions", bound=RunOptions)


def command(
    main: Callable[[Options], None],
    options: type[Options],
    description: str,
    *,
    needs: Sequence[str] = (),
) -> None:
    """Run ``main`` with the options of the command line.

    Errors that the user can fix end the program with one line: errors of a run, errors of the
    package about an option, a missing extra, an output that cannot be written. So does Ctrl-C. A
    resumed run takes missing options from its folder. Needs tyro, which the extra ``examples``
    installs.

    Args:
        main: The program.
        options: A dataclass; fields without a default are positional arguments. For a run, a
            subclass of :class:`RunOptions`.
        description: First text of ``--help``.
        needs: Modules of extras; if one is missing, the program ends at the start.
    """
    given: Options | None = None
    try:
        for module in ("tyro", *needs):
            importlib.import_module(module)
        given = _read(options, description)
        check_ranges(given)  # a run checks them again, but main() may read them before
        main(given)
    except RunError as error:
        _end(str(error))
    except UnregisteredEnv as error:
        _end(f"--task: {error}")
    except (TypeError, ValueError) as error:
        option = None if given is None else _option_of(error, given)
        if option is None:
            raise
        _end(f"--{option.replace('_', '-')}: {error}")
    except KeyboardInterrupt as error:
        _end(str(error) or "interrupted", 130)  # the status that shells report after Ctrl-C
    except ImportError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        if isinstance(error, ModuleNotFoundError):
            install = f'python -m pip install -e ".[{extra}]"'
            _end(f"{error.name} is not installed; install it by {install}")
        _end(str(error))
    except OSError as error:
        output = getattr(given, "output", None)
        if output is None or not _is_about_output(error, Path(output)):
            raise
        _end(f"--output {output} cannot be written: {error.strerror} ({error.filename})")


def _option_of(error: Exception, given: Any) -> str | None:
    """Return the name of the option that an error of the package is about, or ``None``.

    Its message begins with the name, perhaps after a location, or contains ``name=value``.
    """
    text = str(error)
    for name in (f.name for f in fields(given)):
        value = re.escape(repr(getattr(given, name)))
        if re.search(rf"(^|: ){name} |(^|[ (]){name}={value}(?![\w.])", text):
            return name
    return None


def _end(line: str, status: int = 1) -> NoReturn:
    print(line, file=sys.stderr)  # noqa: T201 - this is a command
    raise SystemExit(status) from None


def _read(options: type[Options], description: str) -> Options:
    import tyro

    settings = (tyro.conf.EnumChoicesFromValues, tyro.conf.PositionalRequiredArgs)
    given = tyro.cli(options, description=description, config=settings)
    if not isinstance(given, RunOptions) or not given.resume:
        return given
    saved = read_settings(given.folder)
    if saved is None:
        return given
    default: Any = replace(_with_saved(given, saved), output=given.output)
    return tyro.cli(options, description=description, config=settings, default=default)


def _with_saved(given: AnyRunOptions, saved: dict[str, Any]) -> AnyRunOptions:
    """Return ``given`` with the ``saved`` options."""
    names = {f.name for f in fields(given)}
    values = restored(type(given), saved)
    return replace(given, **{name: value for name, value in values.items() if name in names})


def _is_about_output(error: OSError, output: Path) -> bool:
    """Whether the path of an error is inside the output, or the other way round."""
    if not isinstance(error.filename, str):
        return False
    name, output = Path(error.filename).absolute(), output.absolute()
    return name.is_relative_to(output) or output.is_relative_to(name)
