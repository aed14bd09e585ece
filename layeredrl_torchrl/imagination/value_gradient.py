"""The policy's gradient through a learned model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictParams,
    dispatch,
)
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules.distributions.utils import rsample_and_log_prob
from torchrl.objectives import LossModule, ValueEstimators
from torchrl.objectives.utils import _vmap_func, default_value_kwargs, distance_loss
from torchrl.objectives.value.functional import (
    td0_return_estimate,
    vec_td_lambda_return_estimate,
)

from layeredrl_torchrl._checks import (
    check_flag,
    check_instance,
    check_number,
    check_positive_int,
    require,
)
from layeredrl_torchrl._watch import watched
from layeredrl_torchrl.imagination._following import FollowedPolicy, follow
from layeredrl_torchrl.nets import ScalarHead
from layeredrl_torchrl.predictors import Predictor

__all__ = ["ValueGradientLoss"]


def _read(tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    hint = "rename it by set_keys, or in_keys= of the predictor's model"
    return require(tensordict, key, reader="ValueGradientLoss", hint=hint)


class ValueGradientLoss(LossModule):
    """Improves a policy by the gradient of its return through a predictor.

    From each start the policy is followed for ``horizon`` imagined steps, and valued by the critics
    where it has got to. The gradient flows back through the actions, rewards, terminations and
    states of the way: value gradients (SVG, arXiv 1510.09142), with the entropy bonus of soft
    actor-critic (SAC-SVG, arXiv 2008.12775). With shares ``c_0 = 1`` and
    ``c_{h+1} = c_h * gamma * (1 - p_h)``, where ``p_h`` is the probability that step ``h``
    terminates,

        J = sum_{h<H} c_h * (r_h - alpha * log pi_h) + c_H * (Q(s_H, a_H) - alpha * log pi_H)

    and ``loss_actor`` is ``-J``. Each step of each row is sampled from one member that is newly
    drawn for it (TS-1, arXiv 1805.12114). With ``horizon=0`` this is SAC's own loss.

    ``loss_qvalue`` is the critics' error against the entry ``"value_target"``, which
    :meth:`value_targets` writes to imagined or real episodes. Where there is none, the target is
    the return of the same imagined steps (MVE, arXiv 1803.00101; DHMBPO, arXiv 2512.15439),
    bootstrapped from the target critics; it is learned at their first action. With ``horizon=0``
    it is SAC's, of the transition that the TensorDict holds.

    >>> from layeredrl_torchrl.nets import QValueOperator, TanhActor
    >>> predictor = PredictorFactory()(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))
    >>> actor = TanhActor(3, 0, Bounded(-1.0, 1.0, (1,)))
    >>> loss = ValueGradientLoss(actor, QValueOperator(3, 0, 1), predictor, horizon=5)
    >>> sorted(loss(TensorDict({"state": torch.randn(16, 3)}, [16])).keys())
    ['alpha', 'entropy', 'loss_actor', 'loss_alpha', 'loss_qvalue', 'value']

    Args:
        actor_network: The policy; it reads the predictor's state, and context, and its actions are
            reparameterised.
        qvalue_network: Reads state, context (or not) and action and writes
            ``"state_action_value" [*B, 1]``; for example :class:`QValueOperator`.
        predictor: What is imagined; it is not trained here.
        horizon: ``H``, imagined steps; 0 for none.
        num_qvalue_nets: Critics, with weights of their own. Targets take the smallest.
        mean_qvalue: Whether the actor follows the mean of the critics instead of the smallest.
        loss_function: Distance of critic and target, ``"l2"``, ``"l1"`` or ``"smooth_l1"``, in
            units of the critics' scale.
        alpha_init: Weight of the entropy at the start.
        fixed_alpha: Whether it stays so.
        target_entropy: In nats; minus the number of action dimensions by default.
        delay_qvalue: Whether targets come from delayed critics, which TorchRL's ``SoftUpdate``
            moves; else from the critics themselves.
        reduction: Of the losses over the batch: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        TypeError, ValueError: Parts of another kind; parts that read or write other keys than the
            predictor has, options outside their range.
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that ``set_keys`` may change.

        State, context and action are those of the predictor's model.
        """

        state_action_value: NestedKey = "state_action_value"
        value_target: NestedKey = "value_target"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    default_value_estimator = ValueEstimators.TDLambda
    out_keys = ["loss_actor", "loss_qvalue", "loss_alpha", "alpha", "entropy", "value"]

    actor_network: ProbabilisticTensorDictSequential
    qvalue_network: TensorDictModule
    actor_network_params: TensorDictParams
    qvalue_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams
    predictor: Predictor
    log_alpha: Tensor
    target_entropy: Tensor
    gamma: float
    lmbda: float
    bounds: Tensor

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
        super().__init__()
        check_instance("predictor", predictor, Predictor, hint="build one by PredictorFactory()")
        self.horizon = check_positive_int("horizon", horizon, minimum=0)
        self.mean_qvalue = check_flag("mean_qvalue", mean_qvalue)
        check_positive_int("num_qvalue_nets", num_qvalue_nets)
        check_number("alpha_init", alpha_init, 0.0, open_low=True)
        self.num_qvalue_nets = num_qvalue_nets
        self.loss_function = loss_function
        self.delay_qvalue = check_flag("delay_qvalue", delay_qvalue)
        self.reduction = reduction
        self._check_keys(actor_network, qvalue_network, predictor)
        if horizon:
            predictor.need("rew_func")
        # It learns by itself; its parameters are none of this loss's.
        self.__dict__["predictor"] = predictor
        self.convert_to_functional(actor_network, "actor_network", create_target_params=False)
        self.convert_to_functional(
            qvalue_network,
            "qvalue_network",
            num_qvalue_nets,
            create_target_params=delay_qvalue,
            compare_against=list(actor_network.parameters()),
        )
        self._critics = _vmap_func(self.qvalue_network, (None, 0), randomness=self.vmap_randomness)
        device = next(actor_network.parameters()).device
        log_alpha = torch.tensor(math.log(alpha_init), device=device)
        if check_flag("fixed_alpha", fixed_alpha):
            self.register_buffer("log_alpha", log_alpha)
        else:
            self.log_alpha = torch.nn.Parameter(log_alpha)
        if target_entropy is None:
            target_entropy = -float(predictor.model.action_spec.shape[-1])
        check_number("target_entropy", target_entropy, -math.inf)
        self.register_buffer("target_entropy", torch.tensor(target_entropy, device=device))
        self.register_buffer("bounds", torch.tensor([-math.inf, math.inf], device=device))
        self.make_value_estimator()

    @staticmethod
    def _check_keys(actor: Any, qvalue: Any, predictor: Predictor) -> None:
        state, context, action = predictor.model.in_keys
        for name, module, allowed in (
            ("actor_network", actor, {state, context}),
            ("qvalue_network", qvalue, {state, context, action}),
        ):
            kinds = (TensorDictModule, ProbabilisticTensorDictSequential)
            if not isinstance(module, kinds):
                raise TypeError(
                    f"{name} must be a TensorDictModule as TorchRL's losses take, got "
                    f"{type(module).__name__}"
                )
            unknown = [key for key in module.in_keys if key not in allowed]
            if unknown:
                raise ValueError(
                    f"{name} reads {unknown}, but imagined steps have {sorted(map(str, allowed))}; "
                    "build it with in_keys= of the predictor's state and context"
                )
        if action not in actor.out_keys:
            raise ValueError(
                f"actor_network writes {actor.out_keys}, but the predictor's actions are {action!r}"
            )

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams: float
    ) -> ValueGradientLoss:
        """Set how :meth:`value_targets` mixes returns of all lengths, and the discount.

        Args:
            value_type: ``TD0`` for one step, ``TD1`` for the whole episode, ``TDLambda`` (the
                default) for what lies between.
            **hyperparams: ``gamma``, of all that is discounted here, and ``lmbda`` of ``TDLambda``.

        Raises:
            NotImplementedError: Another estimator. TypeError: Another option.
        """
        kind = self.default_value_estimator if value_type is None else value_type
        fixed = {ValueEstimators.TD0: 0.0, ValueEstimators.TD1: 1.0, ValueEstimators.TDLambda: None}
        if kind not in fixed:
            raise NotImplementedError(f"{kind} is not one of {[str(k) for k in fixed]}")
        given = {"gamma": 0.99} | default_value_kwargs(kind) | hyperparams
        known = ["gamma", "lmbda"] if fixed[kind] is None else ["gamma"]
        if unknown := sorted(given.keys() - {*known, "differentiable"}):
            raise TypeError(f"{kind} has no option {unknown}; it has {known}")
        self.gamma = check_number("gamma", float(given["gamma"]), 0.0, 1.0)
        lmbda = fixed[kind]
        if lmbda is None:
            lmbda = check_number("lmbda", float(given["lmbda"]), 0.0, 1.0)
        self.lmbda = lmbda
        self.value_type = kind
        return self

    @property
    def in_keys(self) -> list[NestedKey]:
        """State and context, and what the critics learn from."""
        state, context, action = self.predictor.model.in_keys
        keys = [state, *([context] if self.predictor.context_dim else [])]
        if not self.horizon:
            names = (self.tensor_keys.reward, self.tensor_keys.terminated, state)
            keys += [action, *(("next", name) for name in names)]
        return keys

    @in_keys.setter
    def in_keys(self, value: list[NestedKey]) -> None:
        raise AttributeError("the keys are those of the predictor's model; see set_keys")

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """TorchRL's hook; there is no module to forward keys to."""

    @property
    def alpha(self) -> Tensor:
        """The weight of the entropy, without gradient."""
        return self.log_alpha.detach().exp()

    # -- losses -------------------------------------------------------------------------------

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Compute the losses at starts ``[*B]``.

        Args:
            tensordict: State ``[*B, D]``, context ``[*B, C]``; with ``"value_target" [*B, 1]`` or
                ``horizon=0`` also the action that was taken there; with ``horizon=0`` and no
                target, a transition. Gets the critics' squared errors as ``"td_error"``.

        Returns:
            ``loss_actor`` and ``loss_qvalue``, divided by the critics' scale and its square;
            ``loss_alpha``; ``alpha``, ``entropy`` (nats) and ``value`` (the mean of ``J``).
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
        if self.reduction == "none":
            return TensorDict(out, batch_size=tensordict.batch_size)
        out |= {
            "alpha": self.alpha,
            "entropy": -found["log_prob"].mean(),
            "value": found["value"].mean(),
        }
        return TensorDict(out)

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """``loss_actor`` alone, with ``log_prob`` and ``value [*B]`` of the first action."""
        return self._actor_loss(tensordict, self._imagine(tensordict))

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """``loss_qvalue`` alone, and ``td_error [*B]``."""
        episode = None
        if self._target_of(tensordict) is None and self.horizon:
            with torch.no_grad():
                episode = self._imagine(tensordict)
        return self._qvalue_loss(tensordict, episode)

    def alpha_loss(self, log_prob: Tensor, tensordict: TensorDictBase | None = None) -> Tensor:
        """``loss_alpha``, which moves the entropy towards its target, from ``log_prob [*B]``."""
        loss = -self.log_alpha * (log_prob.detach() + self.target_entropy)
        return self._reduced(loss, tensordict)

    def _actor_loss(
        self, tensordict: TensorDictBase, episode: FollowedPolicy
    ) -> tuple[Tensor, dict[str, Tensor]]:
        values = self._values(episode.last, self.qvalue_network_params.detach())
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
        state_key, context_key, action_key = self.predictor.model.in_keys
        target = self._target_of(tensordict)
        n = tensordict.batch_size.numel()
        keys = [key for key in (state_key, context_key) if tensordict.get(key, None) is not None]
        rows = tensordict.select(*keys).reshape(n)
        if target is None and episode is not None and self.horizon:
            rows.set(action_key, episode.action.detach())
            target = self._return_of(episode)
        else:
            action = _read(tensordict, action_key)
            rows.set(action_key, action.reshape(n, *action.shape[tensordict.ndim :]))
            if target is None:
                target = self._one_step(tensordict).reshape(n)
            else:
                target = target.detach().reshape(n)
        scale = self._scale()
        said = self._values(rows, self.qvalue_network_params)
        target = target.expand_as(said)
        loss = distance_loss(said / scale, target / scale, self.loss_function).sum(0)
        error = (said.detach() - target).square().mean(0)
        batch = tensordict.batch_size
        loss = self._reduced(loss.reshape(batch), tensordict)
        return loss, {"td_error": error.reshape(*batch, 1)}

    def _reduced(self, loss: Tensor, tensordict: TensorDictBase | None) -> Tensor:
        weights = None if tensordict is None else self._maybe_get_priority_weight(tensordict)
        return self._reduce_loss(loss, tensordict=tensordict, weights=weights)

    # -- values -------------------------------------------------------------------------------

    def _target_of(self, tensordict: TensorDictBase) -> Tensor | None:
        return tensordict.get(self.tensor_keys.value_target, None)

    def _scale(self) -> Tensor | float:
        """The scale of the critics' outputs; 1 of networks that have none."""
        heads = self._heads()
        return 1.0 if not heads else self.qvalue_network_params.get((*heads[0], "out_scale"))[0]

    def _heads(self) -> list[tuple[str, ...]]:
        """Where in the critic networks the heads are that can be rescaled."""
        named = self.qvalue_network.named_modules()
        return [tuple(name.split(".")) for name, m in named if isinstance(m, ScalarHead)]

    def _values(self, tensordict: TensorDictBase, params: Any) -> Tensor:
        """What each critic says, ``[critics, *B]``."""
        td = tensordict.select(*self.qvalue_network.in_keys)
        return self._critics(td, params).get(self.tensor_keys.state_action_value).squeeze(-1)

    def _targets(self) -> Any:
        return self.target_qvalue_network_params.detach()

    def _return_of(self, episode: FollowedPolicy) -> Tensor:
        """The soft return of the first action, ``[B]``, by the target critics."""
        with torch.no_grad():
            last = self._values(episode.last.detach(), self._targets()).amin(0)
            entropy = -self.alpha * episode.log_prob
            total = (episode.share[:-1] * episode.reward).sum(0)
            total = total + (episode.share[1:] * entropy[1:]).sum(0) + episode.share[-1] * last
            return self._bounded(total)

    @torch.no_grad()
    def _one_step(self, tensordict: TensorDictBase) -> Tensor:
        """SAC's target of a transition, ``[*B]``."""
        keys = self.tensor_keys
        reward, terminated = (
            _read(tensordict, ("next", key)) for key in (keys.reward, keys.terminated)
        )
        value, entropy = self._next_values(tensordict)
        alive = ~terminated.squeeze(-1)
        return self._bounded(reward.squeeze(-1) + self.gamma * alive * (value + entropy))

    def _next_values(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Target critics' value of the policy at next states, and its entropy bonus, ``[*B]``."""
        state, context, _ = self.predictor.model.in_keys
        following = tensordict.get("next").select(state, context, strict=False)
        if following.get(context, None) is None and tensordict.get(context, None) is not None:
            following.set(context, tensordict.get(context))
        with self._acting() as act:
            log_prob = act(following)
        return self._values(following, self._targets()).amin(0), -self.alpha * log_prob

    def _bounded(self, target: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(target, self.bounds[1]), self.bounds[0])

    @torch.no_grad()
    def value_targets(self, episodes: TensorDictBase) -> TensorDictBase:
        """Write soft lambda-returns ``"value_target" [*B, T, 1]`` of the actions taken.

        Steps are in order along the last batch axis, as ``env.rollout`` and collectors have them.
        Every return ends where an episode is done, or at ``T``, with the target critics' value of
        the state there, unless the episode terminated.

        Args:
            episodes: ``[*B, T]`` with state, context, action and ``("next", ...)`` state, reward,
                done and terminated.
        """
        keys = self.tensor_keys
        names = (keys.reward, keys.done, keys.terminated)
        reward, done, terminated = (_read(episodes, ("next", name)) for name in names)
        value, entropy = (x.unsqueeze(-1) for x in self._next_values(episodes))
        reward = reward + self.gamma * ~terminated * entropy
        if self.lmbda:
            target = vec_td_lambda_return_estimate(
                self.gamma, self.lmbda, value, reward, done, terminated
            )
        else:
            target = td0_return_estimate(self.gamma, value, reward, terminated)
        return episodes.set(keys.value_target, self._bounded(target))

    @torch.no_grad()
    def fit_scale(self, episodes: TensorDictBase, rate: float = 1.0) -> None:
        """Set the critics' scale, and the bounds of targets, from the rewards of ``episodes``.

        The bounds are the 1 % and 99 % quantiles of rewards and entropy bonus, for ever:
        divided by ``1 - gamma``. The scale is half of the larger one. The critics' functions stay
        what they are (PopArt, arXiv 1602.07714), as far as they are
        :class:`~layeredrl_torchrl.nets.ScalarHead`.

        Args:
            episodes: ``[*B]`` with state, context and ``("next", reward)``.
            rate: How far the bounds move from what they were, in ``(0, 1]``.

        Raises:
            ValueError: A discount of 1, which bounds no return.
        """
        check_number("rate", rate, 0.0, 1.0, open_low=True)
        if self.gamma == 1.0:
            raise ValueError("with gamma=1 returns have no bounds; leave fit_scale out")
        state, context, _ = self.predictor.model.in_keys
        reward = _read(episodes, ("next", self.tensor_keys.reward))
        with self._acting() as act:
            log_prob = act(episodes.select(state, context, strict=False))
        gain = (reward.squeeze(-1) - self.alpha * log_prob).flatten().to(self.bounds)
        ends = gain.quantile(gain.new_tensor([0.01, 0.99])) / (1.0 - self.gamma)
        bounds = torch.where(self.bounds.isfinite(), self.bounds.lerp(ends, rate), ends)
        self.bounds.copy_(bounds)
        scale = (bounds.abs().max() / 2).clamp(min=torch.finfo(bounds.dtype).tiny)
        for head in self._parts_with("rescale"):
            head.rescale(0.0, scale)

    @torch.no_grad()
    def fit_inputs(self, tensordict: TensorDictBase) -> None:
        """Set the input statistics of critics and policy from states and actions ``[*B]``.

        Of those that keep some: :class:`~layeredrl_torchrl.nets.TanhActor` and
        :class:`~layeredrl_torchrl.nets.QValueOperator` do.
        """
        state, context, action = self.predictor.model.read(tensordict)
        context = state[..., :0] if context is None else context
        n = tensordict.ndim
        sample = (x.flatten(0, n - 1) for x in (state, context, action))
        state, context, action = sample
        for part in self._parts_with("fit_inputs"):
            part.fit_inputs(state, context, action)

    def _parts_with(self, method: str) -> Iterator[Any]:
        """Parts of policy, critics and target critics that have ``method``, with their weights."""
        critics = [self.qvalue_network_params]
        if self.delay_qvalue:
            critics.append(self.target_qvalue_network_params)
        sets = [(self.actor_network, self.actor_network_params.data)]
        sets += [
            (self.qvalue_network, params.data[i])
            for params in critics
            for i in range(self.num_qvalue_nets)
        ]
        for network, params in sets:
            with params.to_module(network):
                yield from (part for part in network.modules() if hasattr(part, method))

    # -- imagination ----------------------------------------------------------------------------

    @contextmanager
    def _acting(self) -> Iterator[Callable[[TensorDictBase], Tensor]]:
        """Yield what writes reparameterised actions to a TensorDict and returns ``log_prob``."""
        action_key = self.predictor.model.in_keys[2]

        def act(tensordict: TensorDictBase) -> Tensor:
            action, log_prob = rsample_and_log_prob(self.actor_network.get_dist(tensordict))
            tensordict.set(action_key, action)
            return log_prob

        with (
            set_exploration_type(ExplorationType.RANDOM),
            self.actor_network_params.to_module(self.actor_network),
        ):
            yield act

    @watched
    def _imagine(self, tensordict: TensorDictBase) -> FollowedPolicy:
        """Follow the policy from each of the starts ``[*B]``."""
        state_key, context_key, _ = self.predictor.model.in_keys
        n = tensordict.batch_size.numel()
        state = _read(tensordict, state_key).reshape(n, -1)
        context = tensordict.get(context_key, None)
        context = state[..., :0] if context is None else context.reshape(n, -1)
        with self._acting() as act:
            return follow(self.predictor, act, (state, context), self.horizon, self.gamma)
