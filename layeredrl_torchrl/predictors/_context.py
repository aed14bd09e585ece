"""A warning of contexts that change within episodes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from layeredrl_torchrl._watch import refuse
from layeredrl_torchrl.nets import Encoder, FixedEncoderNet

__all__ = ["ContextWatch"]

# A context counts as moving if it changes in more than this share of the transitions. A goal that
# is rarely drawn again outlasts a plan, and environments that reset themselves show a change at
# each reset.
_LEAST_SHARE = 0.1
# Changes below this share of the value count as rounding.
_ROUNDING = 1e-5


class ContextWatch:
    """Warns, once, of a context that moves within episodes.

    Only fixed encoders are watched: :class:`~layeredrl_torchrl.EncoderNet` finds the context
    itself, and other learned encoders compute it from the whole observation.

    Args:
        encoder: Tells which dimensions of the observation are context.
    """

    def __init__(self, encoder: Encoder) -> None:
        watched = isinstance(encoder, FixedEncoderNet) and encoder.context_dim
        self._encoder = encoder if watched else None

    def look(self, observation: Tensor, following: Tensor, goes_on: Tensor) -> None:
        """Check transitions without waiting for a device.

        Args:
            observation: ``[N, obs]``.
            following: The next observations.
            goes_on: Whether the episode goes on after each, bool ``[N, 1]``; others do not count.
        """
        if self._encoder is None:
            return
        dims = self._encoder.context_dims
        now, then = observation[:, dims], following[:, dims]
        rounding = _ROUNDING * torch.maximum(now.abs(), then.abs())
        changes = ((then - now).abs() > rounding) & goes_on
        refuse(changes.sum(0) > _LEAST_SHARE * goes_on.sum(), self._warn)

    def _warn(self, moves: Tensor) -> None:
        """Warn, with the dimensions ``[C]`` of the context that move; not an error."""
        if self._encoder is None:
            return
        dims, self._encoder = self._encoder.context_dims, None
        warnings.warn(
            f"the context (dimensions {dims.cpu()[moves].tolist()} of the observation) changes "
            "within episodes, but plans hold it fixed; make it part of the state (leave it out of "
            "context_dims=, and rename an entry 'desired_goal')",
            stacklevel=7,  # whoever called learn
        )
