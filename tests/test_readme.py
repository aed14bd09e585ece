"""The README's example runs as it stands there."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs_and_gives_what_its_comments_say(run_examples):
    """Its variables have the shapes that its comments claim."""
    names = run_examples(README)
    assert names["traj"].batch_size == (8, 5, 1, 10)
    assert names["spread"].shape == (8, 10, 4)
    assert names["level"].n_env_steps == 500
    assert names["level"].learn(names["data"])["n_updates"] > 0
