"""The base class of the package's losses, which separates arithmetic from checks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import LossModule

from layeredrl_torchrl._dispatch import dispatched
from layeredrl_torchrl._padding import check_mask, masks_of
from layeredrl_torchrl._state import draw_anew, load_whole

__all__ = ["TermsLoss"]


class TermsLoss(LossModule):
    """A loss that first prepares a batch, with all checks, and then computes its terms.

    Several batches can be prepared at once, and the terms can be compiled. Subclass it to give a
    predictor a loss of your own (:meth:`~layeredrl_torchrl.RewardPredictor.add_loss`):

    >>> class SmallStates(TermsLoss):
    ...     def __init__(self, encoder):
    ...         super().__init__()
    ...         self.encoder = encoder
    ...
    ...     def terms(self, prepared):
    ...         state, context = self.encoder(prepared["observation"])
    ...         return {"loss_size": state.square().mean()}
    >>> factory = PredictorFactory(hidden_sizes=(8,), n_models=2)
    >>> predictor = factory(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))
    >>> loss = SmallStates(predictor.encoder)
    >>> loss(TensorDict({"observation": torch.ones(7, 1, 3)}, [7, 1]))["loss_size"]
    tensor(1.)
    >>> predictor.add_loss(loss, {"loss_size": 0.1})
    """

    length: int = 1  # steps of its slices
    _compile_options: dict[str, Any] | None = None

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state completely or not at all."""
        load = partial(super().load_state_dict, strict=True, assign=assign)
        return load_whole(self, load, state_dict, strict=strict)

    def prepare(self, tensordict: TensorDictBase) -> Any:
        """Check slices ``[B, length]`` and precompute what needs no gradient.

        By default it returns the slices unchanged. The result must have a method
        ``split(batch_size)``, as TensorDicts have, which separates joined batches again.
        """
        return tensordict

    @abstractmethod
    def terms(self, prepared: Any) -> dict[str, Tensor]:
        """Compute the terms of a prepared batch, all scalars.

        Terms whose names begin with ``"loss_"`` are minimised; the others are only logged.
        """

    def counted(self, tensordict: TensorDictBase, key: NestedKey = "valid") -> Tensor:
        """Return which rows ``[*B]`` count, bool: valid ones that no mask of TorchRL excludes.

        Args:
            tensordict: Rows, with the masks that ``loss_mask_key`` names (by default
                ``("collector", "mask")``, which is false for padding, also at the root) where it
                has them.
            key: Which of them are valid; all are where it is missing.

        Raises:
            ValueError: Masks of another dtype or shape.
        """
        counts = torch.ones(tensordict.shape, dtype=torch.bool, device=tensordict.device)
        for name, mask in masks_of(tensordict, (key, *self._loss_mask_keys())).items():
            check_mask(name, mask, counts.shape)
            counts = counts.to(mask.device) & mask.reshape(counts.shape)
        return counts

    def after_update(self) -> None:
        """Update, after a gradient step, what is not a parameter, such as a target network.

        A hook of :meth:`~layeredrl_torchrl.RewardPredictor.add_loss`; by default it does nothing.
        Change tensors in place, so that an update can be captured as a CUDA graph.
        """

    @dispatched
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Compute the terms of a batch, of the shape that :meth:`prepare` takes."""
        return TensorDict(self.terms(self.prepare(tensordict)))

    def reset_parameters_recursive(self) -> None:
        """Draw new weights, by ``reset_parameters`` of the parts; frozen ones keep theirs."""
        # TorchRL's method looks only for the parts of functional losses, and finds none here.
        draw_anew(self)
        self.after_reset()

    def after_reset(self) -> None:
        """Renew copies of other parts, such as a target network, after new weights were drawn.

        A predictor calls it too, for each of its losses. By default it does nothing.
        """

    @property
    def functional(self) -> bool:
        """Whether a TensorDict passes in parameters. Never; the modules keep theirs."""
        return False

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`terms` is compiled."""
        return self._compile_options is not None

    def compile(self, **options: Any) -> None:
        """Compile :meth:`terms` and its gradients, instead of ``forward`` as other modules do.

        ``benchmarks/training_step.py`` and ``benchmarks/predictor_learn.py`` time the gain.
        Compiling needs a C++ compiler. It takes about ten seconds in each process at the first
        batch, and again at the first batch of another size.

        Args:
            **options: Of ``torch.compile``, for example ``dynamic=False``.
        """
        self._compile_options = options
        self.__dict__["terms"] = torch.compile(type(self).terms.__get__(self), **options)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the compiled terms, which are bound to this object."""
        return {name: value for name, value in super().__getstate__().items() if name != "terms"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, and compile it if the original was compiled."""
        super().__setstate__(state)
        if self._compile_options is not None:
            self.compile(**self._compile_options)
