"""A run in its own folder that can be killed at any moment and resumed."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.checkpoint import CheckpointError, GlobalRNGState
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.modules.utils import get_primers_from_module
from torchrl.record.loggers import Logger
from tqdm import tqdm

from layeredrl_torchrl._checks import check_positive_int, require
from layeredrl_torchrl.checkpoints import CollectorState, SafeCheckpoint, SafeRotation
from layeredrl_torchrl.runs._checkpoints import RunCheckpoints
from layeredrl_torchrl.runs._files import Curve, write_rows
from layeredrl_torchrl.runs._folder import RunFolder
from layeredrl_torchrl.runs._interrupts import Interrupts
from layeredrl_torchrl.runs._loggers import open_logger
from layeredrl_torchrl.runs._playing import (
    collector_options,
    evaluate,
    make_checked,
    play_episodes,
)
from layeredrl_torchrl.runs._video import record
from layeredrl_torchrl.runs.options import (
    RunError,
    RunOptions,
    find_task,
)
from layeredrl_torchrl.runs.workers import WorkerDiedError, WorkerOptions, collect_with_workers

__all__ = ["Run"]

_SUMMED = {
    "reader": "a run",
    "hint": "append torchrl.envs.RewardSum() to the environment, which sums returns",
}
_NO_ESTIMATE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Run:
    """A run that collects, learns and saves in its own folder.

    As a context manager, it checks the options, seeds torch, and locks the folder. Every checkpoint
    contains the parts passed to :meth:`keep`, which a resumed run loads at once. :meth:`collect`
    yields batches and saves checkpoints between them: parts, environments, random numbers and the
    learning curve. So a killed and resumed run continues bit for bit as if it had not been killed
    (on the same machine, versions and device).

    ======================  ================================================================
    ``settings.json``       options that the run was last started with
    ``curve.csv``           rows of :meth:`log`, written one by one
    ``evaluation.csv``      returns of :meth:`finish`, ``evaluation_at_N.csv`` once it goes on
    ``video.gif``           an episode, with the option ``video``
    ``tensorboard/``        or ``wandb/``: the rows again, with the option ``logger``
    ``checkpoints/``        the last two, by :class:`SafeRotation`
    ``lock``                locked by the process that writes here
    ======================  ================================================================

    >>> from pathlib import Path
    >>> options = RunOptions(output=Path("run"), total_env_steps=40, steps_per_batch=20)
    >>> env = make_batched(options.task, 1, seed=0)
    >>> with Run(options, total=40) as run:
    ...     for data in run.collect(env):
    ...         run.log({"reward": data["next", "reward"].mean().item()})
    >>> [row["env_steps"] for row in run.rows]
    [20.0, 40.0]

    Args:
        options: Options of the run.
        total: Real steps to take.

    Raises:
        TypeError, ValueError: A total that is no integer of at least 1.
        RunError: An option is wrong, or ``random_steps``, if it is one, takes all steps; the folder
            holds a run that is not to be resumed, one with other options, or files of something
            else, or another process writes to it; no checkpoint is sound.
    """

    def __init__(self, options: RunOptions, total: int) -> None:
        self.options, self.total = options, check_positive_int("total", total)
        self._own = RunFolder(options, ("curve.csv", "evaluation.csv", "video.gif"))
        self.folder = self._own.path
        self.curve = Curve(self.folder / "curve.csv")
        self._counts = {"env_steps": 0}
        parts = {"run": self._counts, "curve": self.curve, "rng": GlobalRNGState()}
        self._checkpoints = RunCheckpoints(self.folder / "checkpoints", **parts)
        self._start = 0.0
        self._logger: Logger | None = None
        self._stack = ExitStack()

    @property
    def checkpoint(self) -> SafeCheckpoint:
        """The checkpoint with all parts of the run."""
        return self._checkpoints.checkpoint

    @property
    def rotation(self) -> SafeRotation:
        """The last checkpoints in the folder."""
        return self._checkpoints.rotation

    @property
    def resumed(self) -> Path | None:
        """The checkpoint from which this run was resumed; ``None`` if it started from scratch."""
        return self._checkpoints.resumed

    @property
    def steps(self) -> int:
        """Real steps taken so far."""
        return self._counts["env_steps"]

    @property
    def rows(self) -> list[dict[str, float]]:
        """The learning curve so far."""
        return self.curve.rows

    # -- the folder -------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.options.check()
        n_random = getattr(self.options, "random_steps", None)
        if n_random is not None and n_random >= self.total:
            raise RunError(
                f"--random-steps is {n_random} of {self.total} steps: nothing would be learned; "
                "give fewer, or more --total-env-steps"
            )
        self._own.check(any_saved=self._checkpoints.any_saved)
        self._stack.enter_context(self._own.locked())
        try:
            self._begin()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _begin(self) -> None:
        """Seed, load the saved state and open the logs, with the folder locked."""
        options = self.options
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        random.seed(options.seed)
        np.random.seed(options.seed)  # noqa: NPY002 - other packages draw from it
        self.rotation.clear()
        if options.resume:
            self._resume()
        self._own.write_settings()  # also those that a resumed run has changed
        if self.resumed is None:
            self.curve.rewrite()
        self._logger = open_logger(options.logger, self.folder, options.settings(), self.steps)
        if self._logger is not None:
            self._stack.callback(self._logger.close)
        if getattr(options, "compile", False):
            tqdm.write("--compile: the first learning phase takes minutes longer, for compiling")
        self._start = time.monotonic() - (self.rows[-1]["seconds"] if self.rows else 0.0)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        if isinstance(error, CheckpointError):
            raise RunError(str(error)) from error
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(self._how_to_continue()) from None

    def _how_to_continue(self) -> str:
        if not self._checkpoints.any_saved:
            return f"interrupted at step {self.steps}, before the first checkpoint: start again"
        return (
            f"interrupted at step {self.steps} of {self.total}; continue from the last checkpoint "
            f"in {self.folder} with the same command and --resume"
        )

    def _resume(self) -> None:
        self._checkpoints.find()
        if self.resumed is None:
            tqdm.write(f"{self.folder} has no checkpoint yet: starting from the beginning")
            return
        metadata = SafeCheckpoint.manifest(self.resumed)["metadata"]
        own = self.options.settings()  # a Trainer also stores its counts in the metadata
        told = {name: value for name, value in metadata.items() if name in own}
        self._own.refuse_others(told, self.resumed)
        self._checkpoints.load("run", "curve")
        self._checkpoints.saved_at = self.steps

    # -- the curve --------------------------------------------------------------------------

    def log(self, row: Mapping[str, float]) -> None:
        """Add a row to the learning curve, between the columns ``env_steps`` and ``seconds``.

        The ``logger`` of the options also gets the finite numbers.

        Raises:
            TypeError: A value that is not a number. ValueError: A row with one of these two names,
                or with other columns than the first row.
        """
        if own := {"env_steps", "seconds"} & row.keys():
            raise ValueError(f"a row has {sorted(own)}, which log() adds; use other names")
        seconds = time.monotonic() - self._start
        self.curve.add({"env_steps": float(self.steps), **row, "seconds": seconds})
        if self._logger is not None:
            known = {name: value for name, value in row.items() if math.isfinite(value)}
            self._logger.log_metrics(known, step=self.steps)

    def returns(self, data: TensorDictBase) -> dict[str, float]:
        """Summarize the returns in a batch ``[env, T]`` or ``[T]`` with ``RewardSum``, for a row.

        Returns:
            The number of ``"episodes"`` that ended, their mean ``"return"`` (that of the previous
            row if none ended), and the mean ``"return_so_far"`` of the others.
        """
        so_far = require(data, ("next", "episode_reward"), **_SUMMED)
        ended = so_far[data["next", "done"]]
        last = self.rows[-1]["return"] if self.rows else math.nan
        return {
            "episodes": float(len(ended)),
            "return": ended.mean().item() if len(ended) else last,
            "return_so_far": so_far[..., -1, :].mean().item(),
        }

    # -- evaluation -------------------------------------------------------------------------

    def evaluation(
        self, make_env: Callable[..., EnvBase], policy: TensorDictModuleBase
    ) -> dict[str, float]:
        """Evaluate the policy if it is due, for a row of the curve.

        TorchRL's ``Evaluator`` plays the same episodes each time. This does not affect the run.

        Args:
            make_env: ``make_env(seed=, n=)`` returns environments ``[n]``.
            policy: The policy.

        Returns:
            The mean return, ``"evaluation"``, and for tasks with goals the share of reached goals,
            ``"evaluation_success"``; NaN between two evaluations. Empty without
            ``steps_per_evaluation``.
        """
        options, every = self.options, self.options.steps_per_evaluation
        if not every:
            return {}
        columns = {"evaluation": "reward"}
        if find_task(options.task).reports_success:
            columns["evaluation_success"] = "success"
        last = int(self.rows[-1]["env_steps"]) if self.rows else 0
        if self.steps // every == last // every:
            return dict.fromkeys(columns, math.nan)
        seed, n = options.seed + 20_000, options.episodes_per_evaluation
        make = partial(make_checked, make_env, seed=seed, n=1)
        found = evaluate(make, policy, n, seed=seed, device=options.device)
        if "success" in columns.values() and "success" not in found:
            raise KeyError(
                f"{options.task} has goals, but the environment of the evaluation lacks ('next', "
                "'success'); make one of this task, or read it with SuccessReader"
            )
        return {column: found[name] for column, name in columns.items()}

    def finish(
        self,
        make_env: Callable[..., EnvBase],
        policy: TensorDictModuleBase,
        *,
        seed: int | None = None,
        solved_at: float | None = None,
    ) -> None:
        """Evaluate the final policy, report, and with the option ``video`` record an episode.

        Args:
            make_env: ``make_env(seed=, n=)`` returns environments ``[n]`` with ``RewardSum``; for a
                video it also gets ``render_mode=``, as ``make_batched`` takes it.
            policy: The policy; stays in evaluation mode.
            seed: Seed of the environments; by default the run's seed plus 10,000.
            solved_at: As in :meth:`report`.
        """
        options, policy = self.options, policy.eval()
        seed = options.seed + 10_000 if seed is None else seed

        def make(n: int, **kwargs: Any) -> EnvBase:
            env = make_checked(make_env, seed=seed, n=n, **kwargs)
            primer = get_primers_from_module(policy, False)
            return env if primer is None else env.append_transform(primer)

        ends = play_episodes(make(options.eval_episodes), policy, options.device)
        self.report(ends, solved_at=solved_at)
        if options.video:
            path = self.folder / "video.gif"
            record(make(1, render_mode="rgb_array"), policy, path, options.device)
            tqdm.write(f"{path}: an episode of this policy")

    def report(
        self, ends: TensorDictBase, *, how: str = "", solved_at: float | None = None
    ) -> None:
        """Print a summary of evaluation episodes, and write them to ``evaluation.csv``.

        Args:
            ends: Last steps ``[n]`` or ``[]`` from :func:`play_episodes`, with ``RewardSum`` and,
                for tasks with goals, ``SuccessRate``.
            how: Description of the policy; also part of the file name.
            solved_at: Mean return at which the task counts as solved.
        """
        returns = require(ends, "episode_reward", **_SUMMED).reshape(-1)
        columns = {"return": returns.tolist()}
        goal = "" if solved_at is None else f", solved from {solved_at:g}"
        rate = ""
        if "episode_success" in ends.keys():
            success = ends["episode_success"].reshape(-1).float()
            columns["success"] = success.tolist()
            rate = f", success rate {success.mean():.2f}"
        name = f"evaluation_{how}.csv" if how else "evaluation.csv"
        write_rows(self.folder / name, list(columns), zip(*columns.values(), strict=True))
        minutes = self.rows[-1]["seconds"] / 60 if self.rows else 0.0
        acted = f", {how}" if how else ""
        tqdm.write(
            f"{self.options.task}, seed {self.options.seed}, {self.steps} steps in {minutes:.1f} "
            f"minutes{acted}: mean return {returns.mean():.2f} over {len(returns)} episodes "
            f"(lowest {returns.min():.2f}, highest {returns.max():.2f}{goal}){rate}; {self.folder}"
        )

    # -- checkpoints ------------------------------------------------------------------------

    def keep(self, **parts: Any) -> None:
        """Save these parts with the run; a resumed run loads them now.

        Args:
            **parts: Components of a ``Checkpoint``; ``None`` is ignored.

        Raises:
            RunError: The checkpoint has no such part, or it does not fit.
        """
        for name, part in parts.items():
            if part is not None:
                self._checkpoints.keep(name, part)

    def count(self, data: TensorDictBase) -> TensorDictBase:
        """Count the steps of a batch collected in another way, and return it."""
        self._counts["env_steps"] += data.numel()
        return data

    def save(self) -> None:
        """Save a checkpoint now."""
        self._checkpoints.save(self.steps, self.options.settings())

    # -- collecting -------------------------------------------------------------------------

    def collect(
        self,
        env: EnvBase,
        policy: TensorDictModuleBase | None = None,
        *,
        make_env: Callable[[int], EnvBase] | None = None,
        init_random_frames: int = 0,
    ) -> Iterator[TensorDictBase]:
        """Yield batches ``[env, T]`` until all steps are taken; save checkpoints when due.

        With Ray workers (``n_workers`` of the options) each worker has its own environments, and a
        resumed run continues with new episodes.

        Args:
            env: Environments ``[env]`` of this process.
            policy: The policy; random actions by default.
            make_env: Returns the environments ``[env]`` of a worker for its seed.
            init_random_frames: Steps with random actions at the start.

        Raises:
            RunError: The environment cannot be saved; a worker died.
        """
        options = self.options
        frames = {"frames_per_batch": options.steps_per_batch}
        if isinstance(options, WorkerOptions) and options.n_workers:
            if make_env is None or policy is None:
                raise ValueError("workers need make_env= and a policy")
            if self.steps >= self.total:
                return  # no cluster is needed to evaluate
            left = {
                "total_frames": self.total - self.steps,
                "init_random_frames": max(init_random_frames - self.steps, 0),
            }
            if self.resumed is not None:
                self._checkpoints.load("rng")
                tqdm.write("Workers start new episodes: this run differs from an uninterrupted one")
            batches = self._stack.enter_context(
                collect_with_workers(options, make_env, policy, **frames, **left)
            )
        else:
            collector = Collector(
                env,
                policy,
                **frames,
                total_frames=self.total,
                init_random_frames=init_random_frames,
                **collector_options(options.device),
            )
            self._stack.callback(collector.shutdown)
            try:
                self.keep(collector=CollectorState(collector))
            except TypeError as error:
                raise RunError(f"{options.task}: {error}") from error
            if self.resumed is not None:
                self._checkpoints.load("rng")
            batches = iter(collector)
        yield from self._counted(batches)

    def _counted(self, batches: Iterator[TensorDictBase]) -> Iterator[TensorDictBase]:
        name, begun = self.folder.name, self.steps
        if begun < self.total:
            self._set_aside_evaluations()
        bar = tqdm(total=self.total, initial=begun, unit="step", bar_format=_NO_ESTIMATE)
        # Not in a with block: this generator may be closed long after its loop has ended.
        interrupts = self._stack.enter_context(Interrupts())
        with bar:
            while self.steps < self.total:
                bar.set_description(f"{name}: acting")
                try:
                    data = next(batches)
                except WorkerDiedError as error:
                    raise self._explain(error) from error
                bar.set_description(f"{name}: learning")
                yield self.count(data)
                bar.update(data.numel())
                if self.rows:
                    last = {k: v for k, v in self.rows[-1].items() if math.isfinite(v)}
                    shown = [k for k in last if k not in ("env_steps", "episodes", "seconds")]
                    bar.set_postfix({k: f"{last[k]:.3g}" for k in shown[:3]}, refresh=False)
                    # Before learning starts, the remaining time cannot be estimated.
                    if any(k == "nll" or k.startswith("loss") for k in last):
                        bar.bar_format = None
                unsaved = self.steps - self._checkpoints.saved_at
                due = unsaved >= self.options.steps_per_checkpoint or self.steps >= self.total
                if due or interrupts.noted:
                    bar.set_description(f"{name}: saving")
                    self.save()
                if interrupts.noted:
                    raise KeyboardInterrupt
        interrupts.close()

    def _set_aside_evaluations(self) -> None:
        """Add the steps so far to the names of evaluations: the run goes on beyond them."""
        for path in self.folder.glob("evaluation*.csv"):
            if "_at_" not in path.stem:
                path.replace(path.with_stem(f"{path.stem}_at_{self.steps}"))

    def _explain(self, error: WorkerDiedError) -> RunError:
        if self.steps > self._checkpoints.saved_at:
            self.save()
        if self.rotation.latest() is None:
            return RunError(f"{error}; nothing was learned yet: start again")
        return RunError(
            f"{error}; all that was learned is in the last checkpoint: when the cluster has room "
            "for the worker again, continue with --resume"
        )
