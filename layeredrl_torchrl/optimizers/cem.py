"""The cross-entropy method."""

from __future__ import annotations

from layeredrl_torchrl.optimizers.optimizer import Optimizer

__all__ = ["CEM"]


class CEM(Optimizer):
    """Fits the distribution to the best candidates with equal weights (Botev et al. 2013).

    This is what :class:`~layeredrl_torchrl.Optimizer` does by default; the arguments are the same.

    >>> cem = CEM(make_search(Bounded(-1.0, 1.0, (2,))), horizon=4)
    >>> solution = cem.optimize(lambda x: (x - 0.5).square().sum((-2, -1)))
    >>> bool((solution.mean - 0.5).abs().max() < 0.2)
    True
    """
