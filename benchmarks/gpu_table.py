"""One table of the slow parts: rollouts, gradient steps, updates of `learn`, plans, control steps.

    python benchmarks/gpu_table.py                       # for this machine, in minutes
    python benchmarks/gpu_table.py --device cuda --output output/gpu.jsonl
    python benchmarks/gpu_table.py --quick               # tiny sizes: check that every row runs

Ways to run each row: only its matrix products (`products`; on CUDA in a graph); the package's code
without changes (`eager`), in the package's own CUDA graphs (`graph`; with compiled steps
`compiled graph`), compiled, and captured by torch (`captured`); rollouts also in bfloat16. Times
are medians in milliseconds of runs that take turns. If a way fails, the table shows the reason. All
rows run one way before the next, in this order, as compiling takes most of the time; ways that do
not fit in the time are left out. Each time is written to `--output` at once, as a line of JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_rows import Run, Ways, rows_of
from rollout import clock

from layeredrl_torchrl.runs import Count, Positive, RunError, command


@dataclass
class Config:
    """Options of the benchmark."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to run on."""
    minutes: Positive = 2.9
    """Time after which nothing is started."""
    repeats: Count = 15
    """Most runs per median."""
    seconds: Positive = 1.0
    """Approximate time for the runs of one way: slow ones run less often."""
    rows: tuple[str, ...] = ()
    """Only rows whose names contain one of these."""
    ways: tuple[str, ...] = ()
    """Only these ways."""
    quick: bool = False
    """Tiny sizes."""
    threads: Count = 1
    """Threads that torch may use."""
    output: Path | None = None
    """File to which a line of JSON is added for each time."""


def reason(error: BaseException) -> str:
    lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip()[:200]} ... {lines[-1].strip()[:100]}"


def measure(config: Config, ways: Ways) -> dict[str, float | str]:
    """Return the median milliseconds of each way, or the reason why it failed."""
    found: dict[str, float | str] = {}
    ready: dict[str, tuple[Run, int]] = {}
    for name, make in ways.items():
        if config.ways and name not in config.ways:
            continue
        try:
            run = make()
            for _ in range(3):  # to compile, capture and warm up
                once = clock(run, config.device)
            fits = int(1e3 * config.seconds / max(once, 1e-3))
            ready[name] = (run, max(3, min(config.repeats, fits)))
        except Exception as error:  # noqa: BLE001 - the other ways continue after any error
            found[name] = reason(error)
    times: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(config.repeats):
        for name, (run, repeats) in ready.items():
            if turn < repeats and name not in found:
                try:
                    times[name].append(clock(run, config.device))
                except Exception as error:  # noqa: BLE001
                    found[name] = reason(error)
    return found | {name: statistics.median(taken) for name, taken in times.items() if taken}


def machine(config: Config) -> dict[str, object]:
    name = "CPU"
    if torch.device(config.device).type == "cuda":
        name = torch.cuda.get_device_name(torch.device(config.device))
    known = {"device": name, "torch": torch.__version__, "threads": config.threads}
    return known | {"quick": config.quick}


PASSES = (
    ("products", "eager"),
    ("graph",),
    ("compiled graph",),
    ("compiled",),
    ("captured", "compiled captured"),
)


def note(config: Config, row: str, way: str, value: float | str, divisor: int) -> float | str:
    """Print a time, or the reason for its absence, add it to the file, and return it."""
    known: dict[str, object] = {"row": row, "way": way, **machine(config)}
    if isinstance(value, float):
        value = known["ms"] = value / divisor
        print(f"    {way:24} {value:10.3f} ms", flush=True)
    else:
        known["error"] = value
        print(f"    {way:24} {value}", flush=True)
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with config.output.open("a") as file:
            file.write(json.dumps(known) + "\n")
    return value


def table(times: dict[str, dict[str, float | str]]) -> None:
    """Print all times as Markdown."""
    ways = list(dict.fromkeys(way for row in times.values() for way in row))
    print("\n| milliseconds | " + " | ".join(ways) + " |\n|" + "---|" * (1 + len(ways)))
    for name, row in times.items():
        cells = [row.get(way, "") for way in ways]
        shown = [
            f"{cell:.3g}" if isinstance(cell, float) else "failed" * bool(cell) for cell in cells
        ]
        print(f"| {name} | " + " | ".join(shown) + " |")


def main(config: Config) -> None:
    """Time all selected rows and ways, then print the table."""
    torch.set_num_threads(config.threads)
    known = [way for ways in PASSES for way in ways]
    for way in config.ways:
        if way.removesuffix(" bf16") not in known:
            raise RunError(f"--ways: {way!r} is none of {', '.join(known)}, nor with ' bf16'")
    if not rows_of(config.device, config.rows, quick=config.quick):
        raise RunError(f"--rows: no row has one of {config.rows} in its name")
    begin, on_gpu = time.monotonic(), torch.device(config.device).type == "cuda"
    print(", ".join(f"{key} {value}" for key, value in machine(config).items()))
    times: dict[str, dict[str, float | str]] = {}
    for wanted in PASSES:
        rows = rows_of(config.device, config.rows, quick=config.quick)
        for name, (build, divisor) in rows.items():
            if time.monotonic() - begin > 60 * config.minutes:
                print(f"{name}, {wanted[0]}: left out, {config.minutes} minutes are over")
                continue
            try:
                ways = {w: f for w, f in build().items() if w.removesuffix(" bf16") in wanted}
                found = measure(config, ways)
            except Exception as error:  # noqa: BLE001 - the other rows continue
                found = {wanted[0]: reason(error)}
            if found:
                print(name)
            row = times.setdefault(name, {})
            row |= {way: note(config, name, way, value, divisor) for way, value in found.items()}
            torch.compiler.reset()
            if on_gpu:
                torch.cuda.empty_cache()
    table(times)
    print(f"{time.monotonic() - begin:.0f} seconds")


if __name__ == "__main__":
    command(main, Config, __doc__)
