"""A run in a folder of its own, which can be killed at any moment and resumed."""

from __future__ import annotations

import json
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.checkpoint import Checkpoint, CheckpointError, GlobalRNGState
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from tqdm import tqdm

from layeredrl_torchrl.checkpoints import CollectorState, SafeCheckpoint, SafeRotation
from layeredrl_torchrl.runs._files import Curve, lock, write_rows, write_whole
from layeredrl_torchrl.runs.options import RunError, RunOptions, read_settings, settings_path
from layeredrl_torchrl.runs.workers import WorkerDiedError, WorkerOptions, collect_with_workers

__all__ = ["Run"]


class Run:
    """A run that collects, learns and saves, in a folder that belongs to it alone.

    Entered, it checks the options, seeds torch, and locks the folder. The parts that
    :meth:`keep` is given are in every checkpoint; in a run that is resumed they are loaded at
    once. :meth:`collect` yields batches, and saves between them: parts, environments, random
    numbers and the learning curve. So a run that was killed goes on bit for bit as if it had not
    been (on the same machine, versions and device).

    ======================  ================================================================
    ``settings.json``       options that the run was started with
    ``curve.csv``           rows of :meth:`log`, written one by one
    ``checkpoints/``        the last two, by :class:`SafeRotation`
    ``lock``                held by the process that writes here
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
        RunError: An option is wrong; the folder holds a run that is not to be resumed, or one with
            other options, or another process writes to it; no checkpoint is sound.
    """

    def __init__(self, options: RunOptions, total: int) -> None:
        self.options, self.total = options, total
        self.folder = options.folder
        self.curve = Curve(self.folder / "curve.csv")
        self._counts = {"env_steps": 0}
        self.checkpoint = SafeCheckpoint(run=self._counts, curve=self.curve, rng=GlobalRNGState())
        self.rotation = SafeRotation(self.folder / "checkpoints", keep_last=2)
        self.resumed: Path | None = None
        self._saved = 0
        self._start = 0.0
        self._stack = ExitStack()

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
        options = self.options
        options.check()
        saved = read_settings(self.folder)
        begun = (self.folder / "checkpoints").is_dir() and any(
            self.rotation.directory.glob("[!.]*")
        )
        if begun and not options.resume:
            raise RunError(f"{self.folder} holds a run; add --resume, or choose another --output")
        if options.resume and saved is None:
            raise RunError(f"--resume: {self.folder} holds no run; leave it out")
        if options.resume and saved is not None:
            now = options.settings()
            other = {k: v for k, v in saved.items() if now.get(k) != v and k not in options.free}
            if other:
                raise RunError(f"--resume: {self.folder} was made with {other}; use the same")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        random.seed(options.seed)
        np.random.seed(options.seed % 2**32)  # noqa: NPY002 - what others draw from
        self.rotation.clear()
        if options.resume:
            self._find_checkpoint()
        if self.resumed is None:
            write_whole(settings_path(self.folder), json.dumps(options.settings(), indent=1))
            self.curve.rewrite()
        self._start = time.monotonic() - (self.rows[-1]["seconds"] if self.rows else 0.0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        if isinstance(error, CheckpointError):
            raise RunError(str(error)) from error

    def _lock(self) -> None:
        """Hold a lock that ends with this process, whatever ends it."""
        file = self._stack.enter_context((self.folder / "lock").open("w"))
        try:
            lock(file.fileno())
        except OSError:
            self._stack.close()
            raise RunError(
                f"another process runs in {self.folder}; wait for it, or choose another --output"
            ) from None

    def _find_checkpoint(self) -> None:
        with warnings.catch_warnings(record=True) as damaged:
            warnings.simplefilter("always")
            try:
                self.resumed = self.rotation.latest()
            except CheckpointError as error:
                raise RunError(str(error)) from None
        for warning in damaged:
            tqdm.write(str(warning.message))
        if self.resumed is None:
            tqdm.write(f"{self.folder} has no checkpoint yet: starting from the beginning")
            return
        self._load("run", "curve")
        self._saved = self.steps

    # -- the curve --------------------------------------------------------------------------

    def log(self, row: Mapping[str, float]) -> None:
        """Add a row to the learning curve, with ``env_steps`` before and ``seconds`` after it."""
        seconds = time.monotonic() - self._start
        self.curve.add({"env_steps": float(self.steps), **row, "seconds": seconds})

    def returns(self, data: TensorDictBase) -> dict[str, float]:
        """Of a batch ``[env, T]`` with ``RewardSum``: what a row of the curve says of returns.

        ``"episodes"`` that ended in it, their mean ``"return"`` (that of the row before where none
        has ended), and the mean ``"return_so_far"`` of those that go on.
        """
        so_far = data["next", "episode_reward"]
        ended = so_far[data["next", "done"]]
        last = self.rows[-1]["return"] if self.rows else math.nan
        return {
            "episodes": float(len(ended)),
            "return": ended.mean().item() if len(ended) else last,
            "return_so_far": so_far[:, -1].mean().item(),
        }

    def report(
        self, ends: TensorDictBase, *, how: str = "", solved_at: float | None = None
    ) -> None:
        """Print how good the episodes of an evaluation were; write them to ``evaluation.csv``.

        Args:
            ends: Their last steps ``[n]``, as :func:`play_episodes` gives them, with ``RewardSum``
                and, where there are goals, ``SuccessRate``.
            how: How it was acted; also part of the file's name.
            solved_at: Mean return from which the task counts as solved.
        """
        returns = ends["episode_reward"].squeeze(-1)
        columns = {"return": returns.tolist()}
        goal = "" if solved_at is None else f", solved from {solved_at:g}"
        rate = ""
        if "episode_success" in ends.keys():
            success = ends["episode_success"].squeeze(-1).float()
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
        """Save these parts with the run; where it is resumed, load them now.

        Args:
            **parts: As ``Checkpoint`` takes them; those that are ``None`` are left out.

        Raises:
            RunError: The checkpoint has no such part, or it does not fit.
        """
        for name, part in parts.items():
            if part is None:
                continue
            self.checkpoint.register(name, part)
            if self.resumed is not None:
                self._load(name)

    def _load(self, *names: str) -> None:
        try:
            # It was verified when it was found. Parts copy what they are given to where they are.
            Checkpoint.load(self.checkpoint, self.resumed, components=names, map_location="cpu")
        except CheckpointError as error:
            raise RunError(f"--resume: {error}") from error

    def count(self, data: TensorDictBase) -> TensorDictBase:
        """Count the steps in a batch that was collected by other means; returns it."""
        self._counts["env_steps"] += data.numel()
        return data

    def save(self) -> None:
        """Save a checkpoint now."""
        self.rotation.save(self.checkpoint, step=self.steps, metadata=self.options.settings())
        self._saved = self.steps

    # -- collecting -------------------------------------------------------------------------

    def collect(
        self,
        env: EnvBase,
        policy: TensorDictModuleBase | None = None,
        *,
        make_env: Callable[[int], EnvBase] | None = None,
        init_random_frames: int = 0,
    ) -> Iterator[TensorDictBase]:
        """Yield batches ``[env, T]`` until all steps are taken; save when it is due.

        With Ray workers (``n_workers`` of the options) environments are theirs, and a run that is
        resumed goes on with new episodes.

        Args:
            env: Environments ``[env]`` of this process.
            policy: What acts; random actions by default.
            make_env: Called with a seed in each worker, gives its environments ``[env]``.
            init_random_frames: Steps with random actions at the start.

        Raises:
            RunError: The environment cannot be saved; a worker died.
        """
        options = self.options
        frames = {"frames_per_batch": options.steps_per_batch}
        if isinstance(options, WorkerOptions) and options.n_workers:
            if make_env is None or policy is None:
                raise ValueError("workers need make_env= and a policy")
            left = {
                "total_frames": self.total - self.steps,
                "init_random_frames": max(init_random_frames - self.steps, 0),
            }
            if self.resumed is not None:
                self._load("rng")
                tqdm.write("Workers begin new episodes: not the run that was stopped, bit for bit")
            batches = self._stack.enter_context(
                collect_with_workers(options, make_env, policy, **frames, **left)
            )
        else:
            places: dict[str, Any] = {}
            if torch.device(options.device).type != "cpu":
                places = {"policy_device": options.device}
                places |= {"env_device": "cpu", "storing_device": "cpu"}
            collector = Collector(
                env,
                policy,
                **frames,
                total_frames=self.total,
                init_random_frames=init_random_frames,
                auto_register_policy_transforms=True,
                **places,
            )
            self._stack.callback(collector.shutdown)
            try:
                self.keep(collector=CollectorState(collector))
            except TypeError as error:
                raise RunError(f"{options.task}: {error}") from error
            if self.resumed is not None:
                self._load("rng")
            batches = iter(collector)
        yield from self._counted(batches)

    def _counted(self, batches: Iterator[TensorDictBase]) -> Iterator[TensorDictBase]:
        with tqdm(total=self.total, initial=self.steps, unit="step", desc=self.folder.name) as bar:
            while self.steps < self.total:
                try:
                    data = next(batches)
                except WorkerDiedError as error:
                    raise self._explain(error) from error
                yield self.count(data)
                bar.update(data.numel())
                if self.rows:
                    last = {k: v for k, v in self.rows[-1].items() if math.isfinite(v)}
                    bar.set_postfix({k: f"{v:.3g}" for k, v in list(last.items())[1:4]})
                due = self.steps - self._saved >= self.options.steps_per_checkpoint
                if due or self.steps >= self.total:
                    self.save()

    def _explain(self, error: WorkerDiedError) -> RunError:
        if self.steps > self._saved:
            self.save()
        if self.rotation.latest() is None:
            return RunError(f"{error}; nothing was learned yet: start again")
        return RunError(
            f"{error}; all that was learned is in the last checkpoint: when the cluster has room "
            "for the worker again, go on with --resume"
        )
