"""A hierarchy does what a plain loop over single steps does, and cuts it into transitions."""

from __future__ import annotations

import numpy as np
import torch
from helpers import collected
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrl.data import Unbounded

from layeredrl_torchrl import Hierarchy

ONE = Unbounded((1,))
MAPS = {
    "all": (None, lambda obs: obs),
    "some": (np.array([3, 1, 2]), lambda obs: obs[..., [3, 1, 2]]),
    "func": (lambda obs: 2 * obs[..., 2:], lambda obs: 2 * obs[..., 2:]),
}
level_options = st.fixed_dictionaries(
    {
        "duration": st.integers(1, 4),
        "until": st.sampled_from([None, 2, 3]),
        "remembers": st.booleans(),
        "each_step": st.booleans(),
    }
)


@settings(max_examples=40, deadline=None)
@given(
    options=st.lists(level_options, min_size=1, max_size=3),
    maps=st.lists(st.sampled_from(sorted(MAPS)), min_size=3, max_size=3),
    n=st.sampled_from([None, 1, 2, 4]),
    n_batches=st.integers(1, 3),
    n_steps=st.integers(1, 9),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4),
)
def test_a_hierarchy_equals_a_plain_loop(toy, options, maps, n, n_batches, n_steps, lengths):
    options = [dict(o) for o in options]
    options[0] |= {"duration": None, "until": None}
    options[-1]["each_step"] = False
    for one in options[1:]:
        one["input_spec"] = ONE
    kinds = [toy.Level if one["until"] else toy.Timed for one in options]
    levels = [kind(i + 1, **one) for i, (kind, one) in enumerate(zip(kinds, options, strict=True))]
    maps = maps[: len(levels)]
    env = toy.Env(n, lengths)
    hierarchy = Hierarchy(levels, env, observation_maps=[MAPS[m][0] for m in maps])
    batches = list(collected(env, hierarchy, n_batches, n_steps * (n or 1)))
    first = batches[0]["observation"].reshape(-1, n_steps, 4)[:, 0]
    loops = [
        toy.plain_loop(
            levels, [MAPS[m][1] for m in maps], first[e, 1], e, n_batches * n_steps, lengths
        )
        for e in range(n or 1)
    ]
    for b, data in enumerate(batches):
        for i, got in enumerate(hierarchy.transitions(data)):
            begin, end = b * n_steps, (b + 1) * n_steps
            expected = [row for loop in loops for t, row in loop[i] if begin <= t < end]
            assert got.batch_size == (len(expected),)
            if not expected:
                continue
            keys = set(got.exclude("collector").keys(True, True))
            assert keys == set(expected[0])
            for key in keys:
                assert torch.equal(got[key], torch.stack([row[key] for row in expected])), key
