"""Checks of the outputs and the parameters of member networks."""

from __future__ import annotations

import torch
from torch import Tensor

from layeredrl_torchrl._watch import refuse
from layeredrl_torchrl.nets import MemberOutput

__all__ = ["check_output", "check_parameters"]

_NAMES = ("mean", "std", "weights", "term_prob")
_RANGES = (
    "a term_prob outside [0, 1]; give probabilities, such as the sigmoid of logits",
    "weights that are negative or do not sum to 1 over the modes; take their softmax",
)


def check_output(out: MemberOutput, shape: tuple[int, ...], *, sign: bool = True) -> None:
    """Refuse outputs that have another shape, are not finite, or are out of range.

    Args:
        out: ``(mean [M, N, K, D], std [M, N, K, D]), weights [M, N, K], term_prob [M, N]``.
        shape: ``(M, N, K, D)``.
        sign: Whether to check mean and std too, not only weights and term_prob.

    Raises:
        ValueError: The message names the members.
    """
    (mean, std), weights, term_prob = out
    named = dict(zip(_NAMES, (mean, std, weights, term_prob), strict=True))
    expected = dict(zip(_NAMES, (shape, shape, shape[:3], shape[:2]), strict=True))
    for name, value in named.items():
        if tuple(value.shape) != expected[name]:
            raise ValueError(
                f"the members predict a {name} of shape {tuple(value.shape)}, expected "
                f"{expected[name]}: mean and std [M, N, K, D], weights [M, N, K] and term_prob "
                "[M, N] (a single network without M)"
            )
    if not sign:
        del named["mean"], named["std"]
    finite = [torch.isfinite(value.detach().flatten(1).sum(1)) for value in named.values()]
    term_prob, weights = term_prob.detach(), weights.detach()
    outside = [(term_prob < 0).any(1) | (term_prob > 1).any(1)]
    outside.append(((weights.sum(-1) - 1.0).abs() > 0.02).any(1) | (weights < 0).flatten(1).any(1))
    if sign:
        outside.append(std.detach().flatten(1).amin(1) < 0)
    bad = torch.stack((*(~one for one in finite), *outside))
    on_host = bad.device.type == "cpu"

    def error(found: Tensor) -> ValueError | None:
        for i, (name, value) in enumerate(named.items()):
            wrong = found[i].clone()
            if on_host:  # a sum of finite values may overflow
                wrong &= (~torch.isfinite(value)).flatten(1).any(1)
            if name == "std":
                wrong |= found[-1]
            members = wrong.nonzero().flatten().tolist()
            if members:
                return ValueError(
                    f"member(s) {members} of {len(value)} predict a {name} that is not finite (or "
                    "negative, for std); the model has diverged: lower its learning rate, or check "
                    "the data it was trained on"
                )
        for wrong, what in zip(found[len(named) :], _RANGES, strict=False):
            members = wrong.nonzero().flatten().tolist()
            if members:
                return ValueError(f"member(s) {members} of {len(wrong)} predict {what}")
        return None

    refuse(bad, error)


def check_parameters(parameters: list[Tensor]) -> None:
    """Refuse ``parameters [M, ...]`` that are not finite; the message names the members."""
    on_host = parameters[0].device.type == "cpu"
    if on_host:  # one number for each tensor; a failure then looks for the members
        total = torch.stack(torch._foreach_norm([p.detach() for p in parameters]))
    else:
        total = torch.stack([p.detach().flatten(1).sum(1) for p in parameters]).sum(0)

    def error(found: Tensor) -> ValueError | None:
        if on_host:
            finite = [torch.isfinite(p).flatten(1).all(1) for p in parameters]
            found = ~torch.stack(finite).all(0)
        members = found.nonzero().flatten().tolist()
        if not members:
            return None
        return ValueError(
            f"member(s) {members} of {len(found)} have parameters that are not finite; the model "
            "has diverged: lower its learning rate, or check the data it was trained on"
        )

    refuse(~torch.isfinite(total), error)
