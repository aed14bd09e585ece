"""The README's example runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_example_runs():
    """Its variables have the shapes that its comments claim."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["traj"].batch_size == (8, 5, 1, 10)
    assert names["spread"].shape == (8, 10, 4)
    assert torch.isfinite(names["loss"])
    assert names["imagined"].batch_size == ()
