"""A loss that teaches an encoder predictable states."""

from __future__ import annotations

import copy

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor

from layeredrl_torchrl._checks import check_instance, check_number, require
from layeredrl_torchrl._watch import refuse, watched
from layeredrl_torchrl.models import ProbabilisticEnsemble
from layeredrl_torchrl.models._members import detached
from layeredrl_torchrl.nets import Encoder, move_towards
from layeredrl_torchrl.objectives.terms import TermsLoss
from layeredrl_torchrl.specs import canonical_action, is_discrete

__all__ = ["ConsistencyLoss"]


class ConsistencyLoss(TermsLoss):
    """Squared error of the predicted next state, which trains only the encoder.

    The target is the state of the next observation, without gradients, from the encoder itself or
    from a copy that follows it slowly (TD-MPC2, arXiv 2310.16828, equation 3, for one step). The
    reward loss teaches only what affects rewards soon; this loss teaches the rest. Alone it would
    be minimal for a constant state, so end the encoder with
    :class:`~layeredrl_torchrl.nets.SimNorm` or a ``LayerNorm``, and keep the reward loss. The model
    learns by its own loss.

    >>> from torch import nn
    >>> from layeredrl_torchrl.nets import ModuleEncoder, SimNorm
    >>> from layeredrl_torchrl.objectives import ConsistencyLoss
    >>> net = nn.Sequential(nn.Linear(3, 16), SimNorm())
    >>> factory = PredictorFactory(
    ...     hidden_sizes=(8,),
    ...     partial_encoder=lambda shape: ModuleEncoder(net, shape, latent_state_dim=16),
    ... )
    >>> predictor = factory(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))
    >>> loss = ConsistencyLoss(predictor.encoder, predictor.model, tau=0.01)
    >>> predictor.add_loss(loss, {"loss_consistency": 1.0})

    Args:
        encoder: The predictor's encoder.
        model: The predictor's model.
        tau: Step of the copy towards the encoder at each update; with 1, the encoder itself
            computes the targets.

    Rows that are not ``"valid"``, or that a mask of TorchRL's ``loss_mask_key`` excludes, do not
    count.

    Writes ``loss_consistency``: in squared stds of the state's change, averaged over dimensions and
    members.

    Raises:
        TypeError: Parts of another kind. ValueError: ``tau`` that is not above 0 and at most 1.
            When called: KeyError for a missing entry, ValueError for slices of another length.
    """

    out_keys = ["loss_consistency"]

    def __init__(self, encoder: Encoder, model: ProbabilisticEnsemble, *, tau: float = 1.0) -> None:
        super().__init__()
        check_instance("encoder", encoder, Encoder, hint="that of the predictor")
        check_instance("model", model, ProbabilisticEnsemble, hint="that of the predictor")
        self.tau = check_number("tau", tau, 0.0, 1.0, open_low=True)
        # The predictor registers and trains them; this loss owns only the copy.
        self.__dict__["encoder"], self.__dict__["model"] = encoder, model
        self.target_encoder: Encoder | None = None
        if tau < 1.0:
            self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries that must be present."""
        keys = [*self.encoder.in_keys, self.model.in_keys[2]]
        return [*keys, *(unravel_key(("next", key)) for key in self.encoder.in_keys)]

    @watched
    def prepare(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Join and check the observations of slices ``[B, 1]``; rows that do not count are none."""
        encoder = self.encoder
        hint = "name it by in_keys= of the predictor's encoder and model"
        for key in self.in_keys:
            require(tensordict, key, reader="ConsistencyLoss", hint=hint)
        if tensordict.ndim != 2 or tensordict.shape[1] != 1:
            raise ValueError(
                f"ConsistencyLoss takes slices of one step, [B, 1], got a batch of shape "
                f"{tuple(tensordict.shape)}; of rows [B], pass td.unsqueeze(1)"
            )
        observation, following = encoder.join(tensordict), encoder.join(tensordict.get("next"))
        action = tensordict.get(self.model.in_keys[2])
        counts = self.counted(tensordict).to(observation.device)
        refuse(~counts.any(), lambda _: ValueError("no row counts; check 'valid' and the mask"))
        # Rows that do not count may hold anything, so a row that counts replaces them.
        at = torch.arange(counts.numel(), device=counts.device)
        at = torch.where(counts.flatten(), at, counts.flatten().int().argmax())
        observation, following, action = (
            x.flatten(0, 1)[at].unflatten(0, counts.shape) for x in (observation, following, action)
        )
        for one in (observation, following):
            encoder.check(one)
        if is_discrete(self.model.action_spec):
            action = canonical_action(self.model.action_spec, action, counts.shape)
        else:
            action = action.to(self.model.floats.dtype)
        return TensorDict(
            {
                "observation": observation,
                "action": action,
                "following": following,
                "counts": counts,
            },
            counts.shape,
        )

    def terms(self, prepared: TensorDictBase) -> dict[str, Tensor]:
        """Compute ``loss_consistency`` of prepared slices ``[B, 1]``."""
        model = self.model
        rows = prepared.reshape(-1)
        state, context = self.encoder.encode_checked(rows.get("observation"))
        with torch.no_grad():
            target = self.encoder if self.target_encoder is None else self.target_encoder
            following, _ = target.encode_checked(rows.get("following"))
        n = model.n_models
        given = (x.expand(n, *x.shape) for x in (state, context, rows.get("action")))
        (mean, _), weights, _ = detached(model.members, *model.scaling.inputs(*given))
        predicted = (weights.unsqueeze(-1) * mean).sum(-2)  # [M, B, D]
        error = (predicted - model.target(state, following)).square().mean((0, 2))
        counts = rows.get("counts")
        return {"loss_consistency": (error * counts).sum() / counts.sum().clamp_min(1)}

    def after_reset(self) -> None:
        """Copy the new encoder."""
        if self.target_encoder is not None:
            self.target_encoder.load_state_dict(self.encoder.state_dict())

    def after_update(self) -> None:
        """Move the copy towards the encoder."""
        if self.target_encoder is not None:
            move_towards(self.target_encoder, self.encoder, self.tau)
