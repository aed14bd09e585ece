"""Inputs for members, and the comparison of members together with each by itself."""

from __future__ import annotations

from functools import partial

import torch

from layeredrl_torchrl import ProbFCDynamics

D, C, A = 3, 2, 2
FC = partial(ProbFCDynamics, ignore_context=False)


def inputs(n_models, n=4, d=D, c=C, a=A, dtype=torch.float32):
    return tuple(torch.randn(n_models, n, k, dtype=dtype) for k in (d, c, a))


def flat(out):
    (mean, std), weights, term_prob = out
    return mean, std, weights, term_prob


def assert_members_are(members, nets, given):
    """Row block m of every output is what net m says of row block m."""
    got = flat(members(*given))
    for m, net in enumerate(nets):
        for x, y in zip(got, flat(net(*(g[m] for g in given))), strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(x[m], y)
