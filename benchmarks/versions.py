"""Time of rollouts, or of learning, compared with another version of the package.

    git worktree add --detach ../base COMMIT
    python benchmarks/versions.py ../base --repeats 15
    python benchmarks/versions.py ../base --what learn

The cases are those of `rollout.py` (run eagerly) and of `predictor_learn.py` (a hundred updates per
turn), on one thread. The versions take turns, each in its own process; times are CPU times, so
other processes have little effect.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import predictor_learn
import rollout

from layeredrl_torchrl.runs import Count, command

# Run by both versions: each input line is a case's number, the answer its milliseconds.
SERVE = """
import inspect, sys, tempfile, time, torch
import layeredrl_torchrl
assert layeredrl_torchrl.__file__.startswith(sys.argv[2]), layeredrl_torchrl.__file__
torch.set_num_threads(1)
torch.manual_seed(0)
folder = tempfile.TemporaryDirectory()
runs, n = [], 1
if sys.argv[1] == "rollout":
    from rollout import ACTION, CASES, STATE
    for case in CASES.values():
        given = torch.randn(case.batch, STATE), None, torch.rand(case.batch, case.horizon, ACTION)
        runs.append((torch.no_grad()(case.ensemble("cpu").rollout), given))
else:
    from predictor_learn import BATCH, CASES, make_buffer, make_predictor
    n = 100
    buffer = make_buffer(20_000, folder.name + "/buffer")
    named = inspect.signature(make_predictor).parameters
    where = {"device": "cpu"} if "device" in named else {}
    for _, options in CASES.values():
        runs.append((make_predictor(**options, **where).learn, (buffer, n, BATCH, BATCH, 0)))
print("ready", flush=True)
for line in sys.stdin:
    run, given = runs[int(line)]
    start = time.process_time()
    run(*given)
    print((time.process_time() - start) * 1e3 / n, flush=True)
"""
CASES = {
    "rollout": list(rollout.CASES),
    "learn": [what for what, _ in predictor_learn.CASES.values()],
}


@dataclass
class Config:
    """Compare two versions."""

    other: Path
    """Folder of the other version."""
    what: Literal["rollout", "learn"] = "rollout"
    """Which of the two is timed."""
    repeats: Count = 15
    """Turns that count."""


def start(root: Path, what: str) -> subprocess.Popen:
    """Start a version's process, and wait until it is ready."""
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'benchmarks'}"}
    pipe = subprocess.PIPE
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, what, str(root)],
        stdin=pipe,
        stdout=pipe,
        text=True,
        env=env,
        cwd=root,  # where `python -c` looks for modules first
    )
    while server.stdout.readline() != "ready\n":  # what others print
        if server.poll() is not None:
            raise SystemExit(f"{root} does not run")
    return server


def main(config: Config) -> None:
    """Print the median times of both, and the median of their ratios."""
    roots = config.other.resolve(), Path(__file__).resolve().parents[1]
    servers = [start(root, config.what) for root in roots]
    for i, name in enumerate(CASES[config.what]):
        rows = []
        for _ in range(config.repeats + 2):
            row = []
            for server in servers:
                print(i, file=server.stdin, flush=True)
                row.append(float(server.stdout.readline()))
            rows.append(row)
        theirs, ours = map(statistics.median, zip(*rows[2:], strict=True))
        ratio = statistics.median(our / their for their, our in rows[2:])
        print(f"{name:36} {theirs:9.2f} ms, now {ours:9.2f} ms, {ratio:.3f} times", flush=True)
    for server in servers:
        server.communicate()  # ends it


if __name__ == "__main__":
    command(main, Config, __doc__)
