"""Settings of the test suite, and the builders of ``helpers.py`` as fixtures."""

from __future__ import annotations

import os
import re

import helpers
import pytest
import torch
from pretended import is_registered, register

from layeredrl_torchrl import get_task
from layeredrl_torchrl.runs._video import check_rendering

torch.set_num_threads(1)
# Processes that tests start inherit it: several threads in each would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_make_parametrize_id(val):
    """No addresses in the names of tests: each of several processes has to find the same ones."""
    return None if hasattr(val, "__name__") or " at 0x" not in repr(val) else type(val).__name__


@pytest.fixture(scope="session")
def renders():
    """Skip the test where MuJoCo cannot draw."""
    try:
        check_rendering(get_task("InvertedPendulum-v5"))
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def make_point():
    return helpers.make_point


def pytest_configure(config):
    """Pretend a device, except for a run of the tests of a real one."""
    if config.option.markexpr.strip() != "gpu":
        register()


def pytest_runtest_setup(item):
    """Skip tests of a GPU where there is none, or where torch was given a pretended one."""
    if item.get_closest_marker("gpu") is None:
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if is_registered():
        pytest.skip("this process has a pretended device: run with -m gpu")


@pytest.fixture(autouse=True)
def seed():
    """Seed torch before every test; a test may seed again with another number."""
    torch.manual_seed(0)
    return 0


@pytest.fixture
def make_ensemble():
    return helpers.make_ensemble


@pytest.fixture
def make_predictor():
    return helpers.make_predictor


@pytest.fixture
def make_transitions():
    return helpers.make_transitions


@pytest.fixture
def make_buffer():
    return helpers.make_buffer


@pytest.fixture
def run_examples():
    """``run_examples(page)``: run a Markdown file's Python blocks in order, in one namespace."""

    def run(page):
        names, text = {}, page.read_text()
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            # Empty lines before it, so that a traceback names the line of the page.
            code = "\n" * text.count("\n", 0, block.start(1)) + block[1]
            exec(compile(code, str(page), "exec"), names)
        return names

    return run


@pytest.fixture
def peak_bytes():
    """``peak_bytes(run)``: the highest sum of live allocations, from torch's own profiler."""

    def measure(run):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with (
            torch.no_grad(),
            torch.profiler.profile(activities=activities, profile_memory=True) as seen,
        ):
            kept = run()
        live = highest = 0
        for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                live += event.nbytes()
                highest = max(highest, live)
        del kept  # alive until here, so that what it returns counts
        return highest

    return measure


@pytest.fixture
def unchanged():
    return helpers.unchanged
