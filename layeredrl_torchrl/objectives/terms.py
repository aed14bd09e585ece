"""The base of the package's losses, which keeps their arithmetic apart from their checks."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import LossModule

__all__ = ["TermsLoss"]


class TermsLoss(LossModule):
    """A loss that first prepares a batch, with all its checks, and then computes its terms.

    Several batches can be prepared at once, and the terms can be compiled. Own losses of a
    predictor are such (:meth:`~layeredrl_torchrl.RewardPredictor.add_loss`):

    >>> class SmallStates(TermsLoss):
    ...     def __init__(self, encoder):
    ...         super().__init__()
    ...         self.encoder = encoder
    ...
    ...     def terms(self, prepared):
    ...         state, context = self.encoder(prepared["observation"])
    ...         return {"loss_size": state.square().mean()}
    >>> loss = SmallStates(IdentityEncoder((3,)))
    >>> loss(TensorDict({"observation": torch.ones(7, 1, 3)}, [7, 1]))["loss_size"]
    tensor(1.)
    """

    length: int = 1  # steps of the slices that it takes
    _compile_options: dict[str, Any] | None = None

    def prepare(self, tensordict: TensorDictBase) -> Any:
        """Check slices ``[B, length]`` and precompute what needs no gradient.

        By default nothing is done. What is returned has a method ``split(batch_size)`` that
        undoes the joining of several batches, as TensorDicts have.
        """
        return tensordict

    @abstractmethod
    def terms(self, prepared: Any) -> dict[str, Tensor]:
        """The terms of a prepared batch, scalars; those that begin with ``"loss_"`` are minimised.

        The others are for the log.
        """

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Compute the terms of a batch, whose shape is that of :meth:`prepare`."""
        return TensorDict(self.terms(self.prepare(tensordict)))

    @property
    def functional(self) -> bool:
        """The parts are used as they are, with their own parameters."""
        return False

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`terms` is compiled."""
        return self._compile_options is not None

    def compile(self, **options: Any) -> None:
        """Compile :meth:`terms` and its gradients, instead of ``forward`` as other modules do.

        ``benchmarks/training_step.py`` and ``benchmarks/predictor_learn.py`` have both times.
        Compiling takes some ten seconds at the first batch and at the first of another size, in
        each process, and needs a C++ compiler.

        Args:
            **options: Of ``torch.compile``, for example ``dynamic=False``.
        """
        self._compile_options = options
        self.__dict__["terms"] = torch.compile(type(self).terms.__get__(self), **options)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: without what was compiled, which is bound to this one."""
        return {name: value for name, value in super().__getstate__().items() if name != "terms"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, which is compiled if this one was."""
        super().__setstate__(state)
        if self._compile_options is not None:
            self.compile(**self._compile_options)
