"""The disagreement of an ensemble's members, as an exploration bonus."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from layeredrl_torchrl._checks import check_number
from layeredrl_torchrl.models.ensemble import ProbabilisticEnsemble

__all__ = ["EnsembleDisagreement"]


class EnsembleDisagreement(TensorDictModuleBase):
    """``scale`` times the std over members of their mean next state, averaged over dimensions.

    Each dimension is in units of the std of its change (of the state itself with
    ``predict_delta=False``), so that dimensions with large numbers do not dominate. The bonus is 0
    where all members agree. Disagreement is as in arXiv 1906.04161, with a std in place of the
    variance.

    Planners (``exploration_bonus=``) and ``PredictorEnv`` call it with tensors, like a reward
    function. Called with a TensorDict, for example in the pipeline of an environment or a loss, it
    reads ``in_keys`` and writes ``out_keys``.

    >>> model = ProbabilisticEnsemble(Unbounded((3,)), None, Bounded(-1.0, 1.0, (1,)))
    >>> bonus = EnsembleDisagreement(model, scale=0.1)
    >>> bonus(torch.zeros(7, 3), None, torch.zeros(7, 1)).shape
    torch.Size([7])

    Args:
        model: The ensemble, of at least two members.
        scale: Reward units per unit of disagreement; with a model built with
            ``normalize_targets=False``, disagreement is in the units of the state.
        out_keys: The key that is written when called with a TensorDict.

    Shapes:
        state ``[*B, D]``, context ``[*B, C]``, action ``[*B, A]`` -> ``[*B]`` (``[*B, 1]`` in a
        TensorDict).

    Raises:
        TypeError: A model of another kind. ValueError: fewer than two members.
    """

    def __init__(
        self,
        model: ProbabilisticEnsemble,
        scale: float = 1.0,
        *,
        out_keys: Sequence[NestedKey] = ("exploration_bonus",),
    ) -> None:
        super().__init__()
        if not isinstance(model, ProbabilisticEnsemble):
            raise TypeError(
                f"EnsembleDisagreement needs a ProbabilisticEnsemble, got {type(model).__name__}"
            )
        if model.n_models < 2:
            raise ValueError(
                f"an ensemble of {model.n_models} cannot disagree; build it with n_models >= 2"
            )
        # Not registered: the owner of the model saves and trains it.
        self.__dict__["model"] = model
        self.scale = check_number("scale", scale)
        self.in_keys = list(model.in_keys)
        self.out_keys = list(out_keys)

    def forward(
        self,
        state: Tensor | TensorDictBase,
        context: Tensor | None = None,
        action: Tensor | None = None,
    ) -> Tensor | TensorDictBase:
        """Compute the bonus; shapes in the class docstring."""
        if isinstance(state, TensorDictBase):
            values = self.model.read(state)
            return state.set(self.out_keys[0], self._bonus(*values).unsqueeze(-1))
        return self._bonus(state, context, action)

    def _bonus(self, state: Tensor, context: Tensor | None, action: Tensor | None) -> Tensor:
        model = self.model
        if action is None:
            raise ValueError(f"EnsembleDisagreement reads {self.in_keys}; the action is missing")
        batch, rows = model.prepare(state, context, action)
        flat = (x.expand(model.n_models, *x.shape) for x in rows)
        (mean, _), weights, _ = model.predict_members(*flat)
        mean = (weights.unsqueeze(-1) * mean).sum(-2) / model.scaling.target.scale
        std = torch.std(mean, dim=0, correction=0)  # [N, D]
        return self.scale * std.mean(-1).reshape(batch)
