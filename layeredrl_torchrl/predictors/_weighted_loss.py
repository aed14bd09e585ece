"""A loss with the weights of its terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from layeredrl_torchrl._checks import check_instance, check_number
from layeredrl_torchrl.objectives.terms import TermsLoss

__all__ = ["WeightedLoss"]


@dataclass(frozen=True)
class WeightedLoss:
    """A loss with the weights of its terms.

    Args:
        loss: Computes the terms.
        weights: Weights of the terms that begin with ``"loss_"``, each at least 0.

    Raises:
        TypeError, ValueError: Not a :class:`~layeredrl_torchrl.objectives.TermsLoss`; a weight that
            is not a finite number of at least 0.
    """

    loss: TermsLoss
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        check_instance("loss", self.loss, TermsLoss, hint="subclass it and write terms()")
        for name, weight in self.weights.items():
            check_number(f"the weight of {name}", weight, 0.0)

    def __call__(self, prepared: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the weighted terms to minimise, and all terms of a prepared batch.

        Raises:
            ValueError: A term without a weight.
        """
        terms = self.loss.terms(prepared)
        minimised = [name for name in terms if name.startswith("loss_")]
        missing = [name for name in minimised if name not in self.weights]
        if missing:
            raise ValueError(
                f"{type(self.loss).__name__} gives {missing}, which have no weight among "
                f"{sorted(self.weights)}; add one (0.0 to leave a term out)"
            )
        return [self.weights[name] * terms[name] for name in minimised], terms
