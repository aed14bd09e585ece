"""Checks of what member networks say."""

from __future__ import annotations

import torch

from layeredrl_torchrl.nets import MemberOutput

__all__ = ["check_output"]


def check_output(out: MemberOutput, *, sign: bool = True) -> None:
    """Raise if a member says nonsense.

    Args:
        out: ``(mean [M, N, K, D], std [M, N, K, D]), weights [M, N, K], term_prob [M, N]``.
        sign: Whether mean and std are looked at too, not only weights and term_prob.

    Raises:
        ValueError: Values that are not finite, or a negative std; the message names the members.
    """
    (mean, std), weights, term_prob = out
    total = weights.sum() + term_prob.sum()
    if sign:
        total = total + mean.sum() + std.sum()
    if bool(torch.isfinite(total)) and (not sign or bool((std >= 0).all())):
        return
    for name, value in (
        ("mean", mean),
        ("std", std),
        ("weights", weights),
        ("term_prob", term_prob),
    ):
        bad = ~torch.isfinite(value)
        if name == "std":
            bad = bad | (value < 0)
        members = bad.flatten(1).any(1).nonzero().flatten().tolist()
        if members:
            raise ValueError(
                f"member(s) {members} of {len(value)} predict a {name} that is not "
                "finite (or negative, for std); the model has diverged: lower its learning "
                "rate, or check the data it was trained on"
            )
