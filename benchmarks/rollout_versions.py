"""Time of eager rollouts beside that of another version of the package.

    git worktree add --detach ../base COMMIT
    python benchmarks/rollout_versions.py ../base --repeats 15

The cases are those of `rollout.py`, on one thread. The versions take turns, each in a process of
its own; times are those of the processor, so that other processes count for little.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rollout import CASES

# Run by either version: a line names a case, the answer is its milliseconds.
SERVE = """
import sys, time, torch
from rollout import ACTION, CASES, STATE
torch.set_num_threads(1)
torch.manual_seed(0)
runs = []
for case in CASES.values():
    given = torch.randn(case.batch, STATE), None, torch.rand(case.batch, case.horizon, ACTION)
    runs.append((torch.no_grad()(case.ensemble("cpu").rollout), given))
for line in sys.stdin:
    run, given = runs[int(line)]
    start = time.process_time()
    run(*given)
    print((time.process_time() - start) * 1e3, flush=True)
"""


def main() -> None:
    """Print the median times of both, and the median of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="folder of the other version")
    parser.add_argument("--repeats", type=int, default=15, help="turns that count")
    args = parser.parse_args()
    servers = []
    for root in (args.other.resolve(), Path(__file__).resolve().parents[1]):
        env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'benchmarks'}"}
        servers.append(
            subprocess.Popen(
                [sys.executable, "-c", SERVE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=env,
            )
        )
    for i, name in enumerate(CASES):
        rows = []
        for _ in range(args.repeats + 2):
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
    main()
