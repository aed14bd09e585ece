"""Policy gradients through a learned model."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor
from torchrl.objectives.utils import distance_loss

from layeredrl_torchrl._checks import check_flag, check_instance, check_positive_int
from layeredrl_torchrl._dispatch import dispatched
from layeredrl_torchrl._watch import watched
from layeredrl_torchrl.imagination._following import FollowedPolicy, compile_following, follow
from layeredrl_torchrl.imagination._networks import check_bounds
from layeredrl_torchrl.imagination._soft_actor_critic import SoftActorCritic
from layeredrl_torchrl.predictors import Predictor
from layeredrl_torchrl.specs import is_discrete

__all__ = ["ValueGradientLoss"]


class ValueGradientLoss(SoftActorCritic):
    """Improves a policy by the gradient of its return through a predictor.

    From each start the loss follows the policy for ``horizon`` imagined steps; critics value the
    last state. The gradient flows back through the actions, rewards, terminations and states of
    these steps: value gradients (SVG, arXiv 1510.09142), with the entropy bonus of soft
    actor-critic (SAC-SVG, arXiv 2008.12775). With shares ``c_0 = 1`` and
    ``c_{h+1} = c_h * gamma * (1 - p_h)``, where ``p_h`` is the probability that step ``h``
    terminates,

        J = sum_{h<H} c_h * (r_h - alpha * log pi_h) + c_H * (Q(s_H, a_H) - alpha * log pi_H)

    and ``loss_actor`` is ``-J``. Each step of each row is sampled from one newly drawn member
    (TS-1, arXiv 1805.12114). With ``horizon=0`` this is SAC's loss.

    ``loss_qvalue`` is the critics' error against the entry ``"value_target"``, which
    :meth:`value_targets` writes to imagined or real episodes. Without this entry, the target is the
    return of the same imagined steps (MVE, arXiv 1803.00101; DHMBPO, arXiv 2512.15439),
    bootstrapped from the target critics; the critics learn it at the first action. With
    ``horizon=0`` it is SAC's target for the transition in the TensorDict.

    >>> from layeredrl_torchrl.nets import QValueOperator, TanhActor
    >>> predictor = PredictorFactory()(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))
    >>> actor = TanhActor(3, 0, Bounded(-1.0, 1.0, (1,)))
    >>> loss = ValueGradientLoss(actor, QValueOperator(3, 0, 1), predictor, horizon=5)
    >>> sorted(loss(TensorDict({"state": torch.randn(16, 3)}, [16])).keys())
    ['alpha', 'entropy', 'loss_actor', 'loss_alpha', 'loss_qvalue', 'value']

    Args:
        actor_network: The policy; it reads the predictor's state and context, and its actions are
            reparameterised.
        qvalue_network: Reads state, context (or not) and action and writes
            ``"state_action_value" [*B, 1]``; for example :class:`QValueOperator`.
        predictor: The predictor to imagine with; it is not trained here.
        horizon: ``H``, imagined steps; 0 for none.
        num_qvalue_nets: Number of critics, each with its own weights. Targets take the minimum.
        mean_qvalue: Whether the actor maximises the critics' mean instead of their minimum.
        loss_function: Distance of critic and target, ``"l2"``, ``"l1"`` or ``"smooth_l1"``, in
            units of the critics' scale.
        alpha_init: Initial weight of the entropy.
        fixed_alpha: Whether this weight stays fixed.
        target_entropy: In nats; minus the number of action dimensions by default.
        delay_qvalue: Whether targets come from delayed critics, updated by TorchRL's
            ``SoftUpdate``, instead of the critics themselves.
        reduction: Reduction of the losses over the batch: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        TypeError, ValueError: Parts of another kind; parts with other keys or widths than the
            predictor's; a policy without a density; discrete actions, or actions outside the
            predictor's bounds; options outside their range. When called: states of another shape,
            or not finite.
    """

    out_keys = ["loss_actor", "loss_qvalue", "loss_alpha", "alpha", "entropy", "value"]

    predictor: Predictor

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule,
        predictor: Predictor,
        *,
        horizon: int = 5,
        num_qvalue_nets: int = 2,
        mean_qvalue: bool = False,
        loss_function: str = "l2",
        alpha_init: float = 0.1,
        fixed_alpha: bool = False,
        target_entropy: float | None = None,
        delay_qvalue: bool = True,
        reduction: str = "mean",
    ) -> None:
        check_instance("predictor", predictor, Predictor, hint="build one by PredictorFactory()")
        if is_discrete(predictor.model.action_spec):
            raise ValueError(
                f"the actions are choices, {predictor.model.action_spec}, but value gradients flow "
                "through continuous ones; use TorchRL's DiscreteSACLoss on imagined steps instead"
            )
        width = predictor.model.action_spec.shape[-1]
        super().__init__(
            actor_network,
            qvalue_network,
            predictor.model.in_keys,
            (predictor.model.state_dim, predictor.model.context_dim, width),
            num_qvalue_nets=num_qvalue_nets,
            loss_function=loss_function,
            alpha_init=alpha_init,
            fixed_alpha=fixed_alpha,
            target_entropy=target_entropy,
            delay_qvalue=delay_qvalue,
            reduction=reduction,
        )
        check_bounds(actor_network, predictor.model.in_keys[2], predictor.model.action_spec)
        self.horizon = check_positive_int("horizon", horizon, minimum=0)
        self.mean_qvalue = check_flag("mean_qvalue", mean_qvalue)
        if horizon:
            predictor.need("rew_func")
        # It learns separately, so its parameters are not registered here.
        self.__dict__["predictor"] = predictor
        self._compile_options: dict[str, Any] | None = None

    def compile(self, **options: Any) -> None:
        """Compile the imagined steps: this halves their time on a CPU.

        Compiling takes a minute or two at the first batch of each shape in each process; copies
        compile too. Parts that ``torch.compile`` cannot trace raise its error then.

        Args:
            **options: Of ``torch.compile``, for example ``dynamic=False``.
        """
        self._compile_options = options

    @property
    def in_keys(self) -> list[NestedKey]:
        """State, context and the entries from which the critics learn."""
        state, context, action = self.step_keys
        keys = [state, *([context] if self.predictor.context_dim else [])]
        if not self.horizon:
            names = (self.tensor_keys.reward, self.tensor_keys.terminated, state)
            keys += [action, *(unravel_key(("next", name)) for name in names)]
        return keys

    @in_keys.setter
    def in_keys(self, value: list[NestedKey]) -> None:
        raise AttributeError("the keys are those of the predictor's model; see set_keys")

    # -- losses -------------------------------------------------------------------------------

    @dispatched
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Compute the losses at starts ``[*B]``.

        Args:
            tensordict: State ``[*B, D]``, context ``[*B, C]``; with ``"value_target" [*B, 1]`` or
                ``horizon=0`` also the action taken there; with ``horizon=0`` and no target, a
                transition. The critics' squared errors are written to it as ``"td_error"``.

        Returns:
            ``loss_actor`` and ``loss_qvalue``, divided by the critics' scale and its square
            respectively; ``loss_alpha``; ``alpha``, ``entropy`` (nats) and ``value`` (the mean of
            ``J``). With ``reduction="none"`` all are ``[*B]``, and 0 at padding but for ``alpha``.
        """
        episode = self._imagine(tensordict)
        loss_qvalue, critic = self._qvalue_loss(tensordict, episode)
        tensordict.set(self.tensor_keys.priority, critic["td_error"])
        loss_actor, found = self._actor_loss(tensordict, episode)
        out = {
            "loss_actor": loss_actor,
            "loss_qvalue": loss_qvalue,
            "loss_alpha": self.alpha_loss(found["log_prob"], tensordict),
        }
        rows = self.reduction == "none"
        batch, reduction = (tensordict.batch_size, "none") if rows else (torch.Size([]), "mean")
        out |= {
            "alpha": self.alpha.expand(batch),
            # Padding does not count, as in the losses.
            "entropy": self._reduce_loss(-found["log_prob"], tensordict, reduction=reduction),
            "value": self._reduce_loss(found["value"], tensordict, reduction=reduction),
        }
        return TensorDict(out, batch_size=batch)

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute only ``loss_actor``, with ``log_prob`` and ``value [*B]`` of the first action."""
        return self._actor_loss(tensordict, self._imagine(tensordict))

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute only ``loss_qvalue``, with ``td_error [*B, 1]``."""
        episode = None
        if self._target_of(tensordict) is None and self.horizon:
            with torch.no_grad():
                episode = self._imagine(tensordict)
        return self._qvalue_loss(tensordict, episode)

    def _actor_loss(
        self, tensordict: TensorDictBase, episode: FollowedPolicy
    ) -> tuple[Tensor, dict[str, Tensor]]:
        values = self.qvalues(episode.last, self.qvalue_network_params.detach())
        value = values.mean(0) if self.mean_qvalue else values.amin(0)
        soft = value - self.alpha * episode.log_prob[-1]
        gains = episode.reward - self.alpha * episode.log_prob[:-1]
        value = (episode.share[:-1] * gains).sum(0) + episode.share[-1] * soft
        batch = tensordict.batch_size
        loss = self._reduced((-value / self._scale()).reshape(batch), tensordict)
        log_prob = episode.log_prob[0].detach().reshape(batch)
        return loss, {"log_prob": log_prob, "value": value.detach().reshape(batch)}

    def _qvalue_loss(
        self, tensordict: TensorDictBase, episode: FollowedPolicy | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        action_key = self.step_keys[2]
        target = self._target_of(tensordict)
        n = tensordict.batch_size.numel()
        rows = self._seen(tensordict).reshape(n)
        if target is None and episode is not None and self.horizon:
            rows.set(action_key, episode.action.detach())
            target = self._return_of(episode)
        else:
            action = self.read(tensordict, action_key)
            rows.set(action_key, action.reshape(n, *action.shape[tensordict.ndim :]))
            if target is None:
                target = self._one_step(tensordict).reshape(n)
            else:
                target = self._given_target(tensordict).reshape(n)
        scale = self._scale()
        said = self.qvalues(rows)
        target = target.expand_as(said)
        loss = distance_loss(said / scale, target / scale, self.loss_function).sum(0)
        error = (said.detach() - target).square().mean(0)
        batch = tensordict.batch_size
        loss = self._reduced(loss.reshape(batch), tensordict)
        return loss, {"td_error": error.reshape(*batch, 1)}

    def _given_target(self, tensordict: TensorDictBase) -> Tensor:
        key, batch = self.tensor_keys.value_target, tuple(tensordict.batch_size)
        target = self.read(tensordict, key).detach()
        if tuple(target.shape) not in (batch, (*batch, 1)):
            raise ValueError(
                f"{key!r} has shape {tuple(target.shape)}, expected {(*batch, 1)}: one number for "
                "each step, as value_targets() writes it"
            )
        return target

    def _return_of(self, episode: FollowedPolicy) -> Tensor:
        """Return the soft return of the first action, ``[B]``, by the target critics."""
        with torch.no_grad():
            last = self.qvalues(episode.last.detach(), self._targets()).amin(0)
            entropy = -self.alpha * episode.log_prob
            total = (episode.share[:-1] * episode.reward).sum(0)
            total = total + (episode.share[1:] * entropy[1:]).sum(0) + episode.share[-1] * last
            return self._bounded(total)

    # -- imagination ----------------------------------------------------------------------------

    @watched
    def _imagine(self, tensordict: TensorDictBase) -> FollowedPolicy:
        """Follow the policy from each of the starts ``[*B]``."""
        state_key, context_key, _ = self.step_keys
        model, seen = self.predictor.model, self._seen(tensordict)
        state = self._start(seen, state_key, model.state_dim)
        context = self._start(seen, context_key, model.context_dim)
        with self._acting():
            return follow(
                self.predictor,
                self.actor_network,
                (state, context),
                self.horizon,
                self.discount,
                compile_following(self, self._compile_options),
            )

    def _start(self, tensordict: TensorDictBase, key: NestedKey, width: int) -> Tensor:
        """Return state or context ``[B, width]`` of starts ``[*B]``; check the shape."""
        value = self.read(tensordict, key)
        expected = (*tensordict.batch_size, width)
        if value.shape != expected:
            raise ValueError(
                f"{key!r} has shape {tuple(value.shape)}, expected {expected}: what the "
                "predictor's encoder writes, in a TensorDict of its batch size"
            )
        return value.reshape(tensordict.batch_size.numel(), width)
