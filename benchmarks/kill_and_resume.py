"""Kill each example at random moments, resume it, and compare it with a run that was not killed.

    python benchmarks/kill_and_resume.py                     # 20 kills of each example
    python benchmarks/kill_and_resume.py --examples dyna_sac --kills 3

A run is a fork of this process, which has imported everything. It is killed (SIGKILL) at a random
moment of the time of a whole run (every fourth run while it writes a checkpoint), and resumed to
the end. Equal means: the same learning curve (except for the seconds), the same evaluation, and the
same bytes in the last checkpoint. The exit status is 1 if any run differs.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from layeredrl_torchrl.runs import Count, RunError, Seed, command

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

PENDULUM = (
    "--task InvertedPendulum-v5 --n-envs 2 --eval-episodes 1 --steps-per-evaluation 60 "
    "--episodes-per-evaluation 1"
)
PLANS = "--horizon 2 --n-samples 20 --n-models 2 --hidden-size 8"
OPTIONS = {
    "planning_with_model": f"{PENDULUM} {PLANS} --total-env-steps 300 --random-steps 100 "
    "--steps-per-batch 50 --steps-per-checkpoint 50 --updates-per-step 0.1",
    "learn_to_control": f"{PENDULUM} {PLANS} --total-env-steps 300 --random-steps 100 "
    "--steps-per-batch 50 --steps-per-checkpoint 50 --updates-per-step 0.1 --random-prob 0.1",
    "dyna_sac": f"{PENDULUM} --total-env-steps 120 --random-steps 40 --steps-per-batch 20 "
    "--steps-per-checkpoint 20 --updates-per-step 0.3 --batch-size 16 --hidden-size 8 --horizon 3",
    "value_gradients": f"{PENDULUM} --total-env-steps 120 --random-steps 40 --steps-per-batch 20 "
    "--steps-per-checkpoint 20 --updates-per-step 0.3 --batch-size 16 --hidden-size 8 "
    "--model-size 8 --n-episodes 4 --episode-steps 5 --horizon 3",
    "skill_hierarchy": f"{PLANS} --n-envs 2 --total-env-steps 500 --skill-steps 300 --duration 5 "
    "--steps-per-batch 100 --steps-per-checkpoint 100 --eval-episodes 2 "
    "--sac-updates-per-step 0.1 --model-updates-per-action 0.2 --symmetry-breaking-steps 300 "
    "--steps-per-evaluation 200 --episodes-per-evaluation 1",
    "hindsight": "--task PointMaze-Open-Sparse --n-envs 2 --total-env-steps 500 "
    "--steps-per-batch 100 --steps-per-checkpoint 100 --updates-per-step 0.1 --hidden-size 8 "
    "--eval-episodes 2 --steps-per-evaluation 200 --episodes-per-evaluation 1",
    "many_tasks": "--n-envs 2 --total-env-steps 600 --skill-steps 400 --steps-per-batch 100 "
    "--steps-per-checkpoint 100 --horizon 2 --eval-episodes 2",
    "train_with_trainer": "--task InvertedPendulum-v5 --total-env-steps 600 --steps-per-batch 100 "
    "--steps-per-checkpoint 50 --held-out-steps 100 --updates-per-batch 20 --batch-size 32 "
    "--n-models 2 --hidden-size 8",
}


@dataclass
class Config:
    """Options of the benchmark."""

    examples: tuple[str, ...] = tuple(OPTIONS)
    """Names of the examples."""
    kills: Count = 20
    """Killed runs of each example."""
    seed: Seed = 0
    """Seed of the moments."""
    output: Path = Path("output/kill_and_resume")
    """Folder of the runs; emptied if it contains nothing else."""


def start(name: str, folder: Path, resume: bool) -> int:
    """Start an example in a new process, and return the process id."""
    import tyro

    example = importlib.import_module(name)
    options = [*OPTIONS[name].split(), "--output", str(folder), *(["--resume"] * resume)]
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            example.main(tyro.cli(example.Config, args=options))
            status = 0
        except BaseException as error:  # noqa: BLE001 - the child ends here after any error
            print(repr(error))
        sys.stdout.flush()
    os._exit(status)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def saves(folder: Path) -> bool:
    """Return whether a run is writing a checkpoint."""
    for place in (folder / "checkpoints", *folder.glob("*/checkpoints")):
        with contextlib.suppress(FileNotFoundError):
            return any(".stage-" in name for name in os.listdir(place))
    return False


def kill(pid: int, folder: Path, delay: float, saving: bool) -> bool:
    """Kill a run after a delay, or at its next save after that; return False if it ended before."""
    end = time.monotonic() + delay
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        late = time.monotonic() >= end
        if late and (not saving or saves(folder)):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True
        time.sleep(0.0005)
    return False


def content(folder: Path) -> dict[str, object]:
    """Return the content of a run's files, without times."""
    found: dict[str, object] = {}
    for table in folder.rglob("*.csv"):
        with table.open() as file:
            rows = [
                {k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)
            ]
        found[str(table.relative_to(folder))] = rows
    newest = max(folder.rglob("checkpoint-*/checksums.json")).parent
    for path in newest.rglob("*"):
        name = str(path.relative_to(newest))
        if "-curve/" in name or name in ("manifest.json", "checksums.json") or path.is_dir():
            continue
        data = path.read_bytes()
        found[f"{newest.name}/{name}"] = plain(json.loads(data)) if path.suffix == ".json" else data
    settings = next(folder.rglob("settings.json"))
    found["settings"] = json.loads(settings.read_text()) | {"resume": None, "output": None}
    return found


def plain(tree: object) -> object:
    """Return JSON without entries that differ between processes and have no effect.

    These are the generators of spaces, which are not used, and the paths of a maze's model.
    """
    if isinstance(tree, str) and tree.startswith("{"):
        return plain(json.loads(tree))
    if isinstance(tree, dict):
        return {k: plain(v) for k, v in tree.items() if not k.endswith(("_space", "path"))}
    return [plain(item) for item in tree] if isinstance(tree, list) else tree


def steps_in(folder: Path) -> int:
    """Return the steps of the last checkpoint, 0 without one."""
    names = [path.parent.name for path in folder.rglob("checkpoint-*/checksums.json")]
    return int(max(names).split("-")[1]) if names else 0


def compare(config: Config, name: str) -> int:
    """Kill and resume one example, print a row of the table, and return how many runs differ."""
    root = config.output / name
    alone = root / "alone"
    root.mkdir(parents=True)
    begun = time.monotonic()
    if wait(start(name, alone, False)):
        raise SystemExit(f"{name} failed: {(root / 'alone.log').read_text()[-2000:]}")
    seconds = alone_for = time.monotonic() - begun
    expected = content(alone)
    moments, killed, equal, dead, from_start = random.Random(config.seed), 0, 0, 0, 0
    while killed < config.kills:
        folder, begun = root / f"{killed}", time.monotonic()
        delay = moments.uniform(0.0, seconds)
        if not kill(start(name, folder, False), folder, delay, killed % 4 == 3):
            # This run was faster than the first, and ended before it could be killed.
            seconds = min(seconds, time.monotonic() - begun)
            shutil.rmtree(folder)
            continue
        killed += 1
        begun_again = not any(folder.rglob("settings.json"))
        from_start += steps_in(folder) == 0
        if wait(start(name, folder, not begun_again)):
            dead += 1
            log = folder.with_name(f"{folder.name}.log").read_text()
            print(f"  {folder}: {log.splitlines()[-1]}")
            continue
        found = content(folder)
        other = [k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)]
        equal += not other
        if other:
            print(f"  {folder} differs in {sorted(other)[:5]}")
        else:
            shutil.rmtree(folder)
    row = (name, f"{alone_for:.1f}", killed, from_start, dead, equal)
    print("| " + " | ".join(map(str, row)) + " |", flush=True)
    return killed - equal


def empty(output: Path) -> None:
    """Remove the files of an earlier call; raise if the folder contains anything else."""
    runs = [path for path in output.glob("*/*") if path.stem != "alone" and not path.stem.isdigit()]
    for path in [path for path in output.glob("*") if path.name not in OPTIONS] + runs:
        raise RunError(f"--output would be emptied, and holds {path}; choose another folder")
    shutil.rmtree(output, ignore_errors=True)


def main(config: Config) -> None:
    """Print the table."""
    for name in config.examples:
        if name not in OPTIONS:
            raise RunError(f"--examples: {name!r} is none of {', '.join(OPTIONS)}")
    empty(config.output)
    print("| example | seconds alone | killed | before the first checkpoint | dead ends ", end="")
    print("| equal to the run left alone |\n|---|---|---|---|---|---|")
    for name in config.examples:
        importlib.import_module(name)
    if sum(compare(config, name) for name in config.examples):
        raise SystemExit(1)


if __name__ == "__main__":
    command(main, Config, __doc__)
