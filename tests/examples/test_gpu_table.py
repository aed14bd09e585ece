"""The table of what an accelerator has to do fast, at tiny sizes on the CPU: every row runs."""

from __future__ import annotations

import json

import pytest

from layeredrl_torchrl.runs import RunError


def test_what_there_is_not_is_not_left_out_in_silence(benchmark):
    module = benchmark("gpu_table")
    with pytest.raises(RunError, match="--ways: 'nope' is none of products, eager, graph"):
        module.main(module.Config(ways=("eager bf16", "nope")))
    with pytest.raises(RunError, match=r"--rows: no row has one of \('nope',\)"):
        module.main(module.Config(rows=("nope",)))


@pytest.mark.slow
def test_every_row_has_its_times(run_script, tmp_path):
    file = tmp_path / "times.jsonl"
    ways = ("products", "eager", "eager bf16")
    options = ("--quick", "--device=cpu", "--repeats=1", f"--output={file}", "--ways", *ways)
    done = run_script("benchmarks/gpu_table.py", *options)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert not [line for line in lines if "error" in line]
    times = {(line["row"], line["way"]): line["ms"] for line in lines}
    rows = {row for row, _ in times}
    assert len(rows) == 9
    assert all((row, way) in times for row in rows for way in ("products", "eager"))
    assert sum(way == "eager bf16" for _, way in times) == 3
    assert all(ms > 0 for ms in times.values())
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 10
