"""Policy, critics and entropy weight of soft actor-critic losses in state space."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictParams,
)
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules.distributions.utils import rsample_and_log_prob
from torchrl.objectives import LossModule, ValueEstimators
from torchrl.objectives.utils import _vmap_func, default_value_kwargs
from torchrl.objectives.value.functional import (
    td0_return_estimate,
    vec_td_lambda_return_estimate,
)

from layeredrl_torchrl._checks import (
    check_finite,
    check_flag,
    check_number,
    check_positive_int,
    require,
)
from layeredrl_torchrl._padding import PADDING, masks_of, until_padding
from layeredrl_torchrl._state import load_whole
from layeredrl_torchrl.imagination._networks import check_keys, check_networks
from layeredrl_torchrl.nets import ScalarHead

__all__ = ["SoftActorCritic"]

# Returns below this count as 0.
_LEAST = 1e-20
_CHOICES = {"loss_function": ("l2", "l1", "smooth_l1"), "reduction": ("mean", "sum", "none")}


class SoftActorCritic(LossModule):
    """The common part of soft actor-critic losses: networks, policy values, targets and scales.

    Options, such as the target entropy, are not part of the state.

    Args:
        actor_network: Reads state and context; its actions are reparameterised.
        qvalue_network: Reads state, context and action, writes ``"state_action_value" [*B, 1]``.
        step_keys: Of state, context and action.
        widths: Dimensions of state, context and action.
        **options: As in :class:`~layeredrl_torchrl.ValueGradientLoss`.
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

    actor_network: ProbabilisticTensorDictSequential
    qvalue_network: TensorDictModule
    actor_network_params: TensorDictParams
    qvalue_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams
    log_alpha: Tensor
    target_entropy: Tensor
    discount: Tensor
    lmbda: float
    bounds: Tensor

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule,
        step_keys: Sequence[NestedKey],
        widths: Sequence[int],
        *,
        num_qvalue_nets: int,
        loss_function: str,
        alpha_init: float,
        fixed_alpha: bool,
        target_entropy: float | None,
        delay_qvalue: bool,
        reduction: str,
    ) -> None:
        super().__init__()
        check_positive_int("num_qvalue_nets", num_qvalue_nets)
        check_number("alpha_init", alpha_init, 0.0, open_low=True)
        for name, value in (("loss_function", loss_function), ("reduction", reduction)):
            if value not in _CHOICES[name]:
                raise ValueError(f"{name} must be one of {_CHOICES[name]}, got {value!r}")
        check_keys(actor_network, qvalue_network, step_keys)
        check_networks(actor_network, qvalue_network, step_keys, widths)
        self.step_keys = tuple(step_keys)
        self._has_context = widths[1] > 0
        self.num_qvalue_nets = num_qvalue_nets
        self.loss_function = loss_function
        self.delay_qvalue = check_flag("delay_qvalue", delay_qvalue)
        self.reduction = reduction
        self.convert_to_functional(actor_network, "actor_network", create_target_params=False)
        self.convert_to_functional(
            qvalue_network,
            "qvalue_network",
            num_qvalue_nets,
            create_target_params=delay_qvalue,
            compare_against=list(actor_network.parameters()),
        )
        named = self.qvalue_network.named_modules()
        heads = [n.split(".") for n, m in named if isinstance(m, ScalarHead)]
        # Key of the output scale in a critic's parameters.
        self._head = (*heads[0], "out_scale") if heads else None
        self._make_vmap()
        device = next(actor_network.parameters()).device
        log_alpha = torch.tensor(math.log(alpha_init), device=device)
        if check_flag("fixed_alpha", fixed_alpha):
            self.register_buffer("log_alpha", log_alpha, persistent=False)
        else:
            self.log_alpha = torch.nn.Parameter(log_alpha)
        if target_entropy is None:
            target_entropy = -float(widths[2])
        check_number("target_entropy", target_entropy, -math.inf)
        entropy = torch.tensor(target_entropy, device=device)
        self.register_buffer("target_entropy", entropy, persistent=False)
        self.register_buffer("bounds", torch.tensor([-math.inf, math.inf], device=device))
        # The discount, where compiled and captured code reads it, so that it may change.
        discount = torch.empty((), dtype=torch.float64, device=device)
        self.register_buffer("discount", discount, persistent=False)
        self.make_value_estimator()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state as a whole, or not at all."""
        load = partial(super().load_state_dict, strict=True, assign=assign)
        return load_whole(self, load, state_dict, strict=strict)

    def _make_vmap(self) -> None:
        """TorchRL's hook for ``set_vmap_randomness``."""
        self._critics = _vmap_func(self.qvalue_network, (None, 0), randomness=self.vmap_randomness)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the function that evaluates the critics of this object."""
        return {name: value for name, value in super().__getstate__().items() if name != "_critics"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, which evaluates its own critics."""
        super().__setstate__(state)
        self._make_vmap()

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams: float
    ) -> Self:
        """Set how :meth:`value_targets` mixes returns of different lengths, and the discount.

        Args:
            value_type: ``TD0`` for one step, ``TD1`` for the whole episode, ``TDLambda`` (the
                default) for what lies between.
            **hyperparams: ``gamma``, of all that is discounted here, which stays what it was where
                it is not given (0.99 at first), and ``lmbda`` of ``TDLambda``. Both may change
                while a policy learns, also when updates were compiled or captured as CUDA graphs.

        Raises:
            NotImplementedError: Another estimator. TypeError: Another option.
        """
        kind = self.default_value_estimator if value_type is None else value_type
        fixed = {ValueEstimators.TD0: 0.0, ValueEstimators.TD1: 1.0, ValueEstimators.TDLambda: None}
        if kind not in fixed:
            raise NotImplementedError(f"{kind} is not one of {[str(k) for k in fixed]}")
        given = default_value_kwargs(kind) | {"gamma": vars(self).get("_gamma", 0.99)} | hyperparams
        known = ["gamma", "lmbda"] if fixed[kind] is None else ["gamma"]
        if unknown := sorted(given.keys() - {*known, "differentiable"}):
            raise TypeError(f"{kind} has no option {unknown}; it has {known}")
        self.gamma = given["gamma"]
        lmbda = fixed[kind]
        if lmbda is None:
            lmbda = check_number("lmbda", float(given["lmbda"]), 0.0, 1.0)
        self.lmbda = lmbda
        self.value_type = kind
        return self

    @property
    def gamma(self) -> float:
        """Discount over one step."""
        return self._gamma

    @gamma.setter
    def gamma(self, value: float) -> None:
        self._gamma = check_number("gamma", float(value), 0.0, 1.0)
        self.discount.fill_(self._gamma)

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> Self:  # as TorchRL's
        super()._apply(fn)
        self.discount = self.discount.to(torch.float64).fill_(self._gamma)  # casts round it
        return self

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """Do nothing: TorchRL's hook, but there is no module to forward keys to."""

    @property
    def alpha(self) -> Tensor:
        """The weight of the entropy, without gradient."""
        return self.log_alpha.detach().exp()

    def read(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        """Return an entry; raise ``KeyError`` if it is missing, ``ValueError`` for NaN or inf."""
        hint = "rename it by set_keys, or in_keys= of the predictor's model"
        if unravel_key(key) in (self.step_keys[0], unravel_key(("next", self.step_keys[0]))):
            where = 'td["next"]' if isinstance(key, tuple) and key[0] == "next" else "td"
            hint = f"of real transitions write it by predictor.encoder({where})"
        name = type(self).__name__
        value = require(tensordict, key, reader=name, hint=hint)
        check_finite(f"{key!r} for {name}", value, hint="repair the data or the model it is from")
        return value

    def alpha_loss(self, log_prob: Tensor, tensordict: TensorDictBase | None = None) -> Tensor:
        """Return ``loss_alpha``, which moves the entropy to its target, from ``log_prob [*B]``."""
        loss = -self.log_alpha * (log_prob.detach() + self.target_entropy)
        return self._reduced(loss, tensordict)

    def _reduced(self, loss: Tensor, tensordict: TensorDictBase | None) -> Tensor:
        weights = None if tensordict is None else self._maybe_get_priority_weight(tensordict)
        return self._reduce_loss(loss, tensordict=tensordict, weights=weights)

    # -- values -------------------------------------------------------------------------------

    def _target_of(self, tensordict: TensorDictBase) -> Tensor | None:
        return tensordict.get(self.tensor_keys.value_target, None)

    def _scale(self) -> Tensor | float:
        """Return the scale of the critics' outputs; 1 for networks without one."""
        return 1.0 if self._head is None else self.qvalue_network_params.get(self._head)[0]

    def qvalues(self, tensordict: TensorDictBase, params: Any = None) -> Tensor:
        """Return each critic's values of states and actions ``[*B]``.

        Args:
            tensordict: The critics' inputs, ``[*B]``.
            params: The critics' weights; by default the trained ones, with gradients.

        Returns:
            ``[num_qvalue_nets, *B]``.
        """
        params = self.qvalue_network_params if params is None else params
        td = tensordict.select(*self.qvalue_network.in_keys)
        hint = "name what the critics write by set_keys(state_action_value=...)"
        name = type(self).__name__
        said = self._critics(td, params)
        return require(said, self.tensor_keys.state_action_value, reader=name, hint=hint).squeeze(
            -1
        )

    def _seen(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return state and context, which is empty for tasks without one."""
        state_key, context_key, _ = self.step_keys
        seen = tensordict.select(state_key, context_key, strict=False)
        state = seen.get(state_key, None)
        if not self._has_context and state is not None and seen.get(context_key, None) is None:
            seen.set(context_key, state[..., :0])
        return seen

    def _targets(self) -> Any:
        return self.target_qvalue_network_params.detach()

    def _soft_step(
        self, tensordict: TensorDictBase, reward: Tensor, terminated: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the policy's value at next states, and rewards plus entropy there, ``[*B, 1]``."""
        state, context, _ = self.step_keys
        self.read(tensordict, unravel_key(("next", state)))
        following = self._seen(tensordict.get("next"))
        if following.get(context, None) is None and tensordict.get(context, None) is not None:
            following.set(context, tensordict.get(context))
        with self._acting() as act:
            entropy = -self.alpha * act(following).unsqueeze(-1)
        value = self.qvalues(following, self._targets()).amin(0).unsqueeze(-1)
        return value, reward + self.discount * (~terminated * entropy)

    def _bounded(self, target: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(target, self.bounds[1]), self.bounds[0])

    @torch.no_grad()
    def value_targets(self, episodes: TensorDictBase) -> TensorDictBase:
        """Write soft lambda-returns ``"value_target" [*B, T, 1]`` of the actions taken.

        Steps are in order along the last batch axis, as ``env.rollout`` and collectors have them.
        Every return ends where an episode is done, at ``T``, or before what TorchRL marks as
        padding (``split_trajectories``, or the ``loss_mask_key``), with the target critics' value
        of the state there, unless the episode terminated.

        Args:
            episodes: ``[*B, T]`` with state, context, action and ``("next", ...)`` state, reward,
                done and terminated.
        """
        keys = self.tensor_keys
        names = (keys.reward, keys.done, keys.terminated)
        reward, *ends = (self.read(episodes, ("next", name)) for name in names)
        done, terminated = (end.bool() for end in ends)
        if not self.lmbda:
            return episodes.set(keys.value_target, self._one_step(episodes))
        value, reward = self._soft_step(episodes, reward, terminated)
        # The value estimators' own mask is about one target, and not about what follows.
        masks = [key for key in self._loss_mask_keys() if key != "shifted_valid"]
        done = until_padding(episodes, done, masks)
        target = vec_td_lambda_return_estimate(
            self.gamma, self.lmbda, value, reward, done, terminated
        )
        return episodes.set(keys.value_target, self._bounded(target))

    @torch.no_grad()
    def _one_step(self, tensordict: TensorDictBase) -> Tensor:
        """Return SAC's target of a transition, ``[*B, 1]``."""
        names = (self.tensor_keys.reward, self.tensor_keys.terminated)
        reward, terminated = (self.read(tensordict, ("next", name)) for name in names)
        terminated = terminated.bool()  # ~ does not negate bytes
        value, reward = self._soft_step(tensordict, reward, terminated)
        gamma = self.discount.to(value.dtype)
        return self._bounded(td0_return_estimate(gamma, value, reward, terminated))

    @torch.no_grad()
    def fit_scale(
        self, episodes: TensorDictBase, rate: float = 1.0, *, falls_cost: bool = True
    ) -> None:
        """Set the critics' scale, and the bounds of targets, from the rewards of ``episodes``.

        The bounds include the returns of receiving the 1 % and 99 % quantiles of reward plus
        entropy bonus at every step: the quantiles divided by ``1 - gamma``. They also include these
        quantiles and every reward once, since an episode may terminate. The scale is half the
        larger absolute bound, and is kept if both are 0. Before the first call, targets are not
        bounded and the scale is 1. The critics' functions do not change (PopArt, arXiv 1602.07714)
        if the critics are :class:`~layeredrl_torchrl.nets.ScalarHead`.

        Args:
            episodes: ``[*B]`` with state, context and ``("next", reward)``.
            rate: Step of the bounds from their old values, in ``(0, 1]``; single rewards are
                included immediately.
            falls_cost: If false and nearly all rewards are positive, termination is valued like the
                lowest of them forever, so that staying alive earns nothing.

        Raises:
            ValueError: A discount of 1, with which returns have no bounds. TypeError:
                ``falls_cost`` that is not a bool.
        """
        check_number("rate", rate, 0.0, 1.0, open_low=True)
        check_flag("falls_cost", falls_cost)
        if self.gamma == 1.0:
            raise ValueError("with gamma=1 returns have no bounds; leave fit_scale out")
        episodes = self._unpadded(episodes)
        self.read(episodes, self.step_keys[0])
        reward = self.read(episodes, ("next", self.tensor_keys.reward))
        with self._acting() as act:
            log_prob = act(self._seen(episodes))
        gain = (reward.squeeze(-1) - self.alpha * log_prob).flatten().to(self.bounds)
        shares = gain.new_tensor([0.01, 0.99])
        ends = gain.quantile(shares)
        forever = ends / (1.0 - self.gamma)
        bounds = torch.where(self.bounds.isfinite(), self.bounds.lerp(forever, rate), forever)
        # A fall must be able to have another value than endless bad steps, and quantiles miss the
        # bonus of a goal, so include single rewards.
        paid = reward.to(bounds)
        low = torch.stack((bounds[0], ends[0], paid.min())).min()
        high = torch.stack((bounds[1], ends[1], paid.max())).max()
        if not falls_cost:
            low = torch.where(ends[0] > 0, bounds[0], low)
        bounds = torch.stack((low, high))
        most = bounds.abs().max()
        # With a scale of almost 0, the critics' weights would explode.
        scale = torch.where(most > _LEAST, most / 2, self._scale())
        hint = "scale the rewards, such as by AffineReward, or lower gamma"
        check_finite("the bounds of returns, rewards divided by 1 - gamma,", bounds, hint=hint)
        self._ask_parts("rescale", 0.0, scale)
        self.bounds.copy_(bounds)

    @torch.no_grad()
    def fit_inputs(self, tensordict: TensorDictBase) -> None:
        """Set the input statistics of policy and critics from states and actions ``[*B]``.

        Of those that keep some: :class:`~layeredrl_torchrl.nets.TanhActor` and
        :class:`~layeredrl_torchrl.nets.QValueOperator` do. Frozen networks keep theirs, which are
        part of what they do.
        """
        state_key, context_key, action_key = self.step_keys
        tensordict = self._unpadded(tensordict)
        state = self.read(tensordict, state_key)
        context = self.read(self._seen(tensordict), context_key)
        action = self.read(tensordict, action_key)
        last = tensordict.ndim - 1
        rows = [x.flatten(0, last) for x in (state, context, action)]
        self._ask_parts("fit_inputs", *rows, trained=True)

    @torch.no_grad()
    def reset_parameters_recursive(self) -> None:
        """Draw new weights for policy and critics, and copy those of the critics to the targets.

        Everything else stays: statistics, scales, the entropy's weight, frozen parameters, and the
        predictor, which TorchRL's method would reset, too.
        """
        frozen = [p for p in self.parameters() if not p.requires_grad]
        before = [p.clone() for p in frozen]
        self._ask_parts("reset_parameters", trained=True)
        for p, value in zip(frozen, before, strict=True):
            p.copy_(value)
        if self.delay_qvalue:
            self.target_qvalue_network_params.data.update_(self.qvalue_network_params.data)

    def _unpadded(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Leave out the rows that the losses leave out; raise ``ValueError`` if none is left."""
        masks, shape = masks_of(tensordict, self._loss_mask_keys()), tensordict.batch_size
        if masks:
            counts = torch.stack([mask.reshape(shape) for mask in masks.values()]).all(0)
            tensordict = tensordict[counts]
        if not tensordict.batch_size.numel():
            raise ValueError(
                f"no row of {tuple(shape)} counts; check what is given, and its masks {list(masks)}"
            )
        return tensordict

    def _reduce_loss(
        self, loss: Tensor, tensordict: TensorDictBase | None = None, **options: Any
    ) -> Tensor:
        """Reduce as TorchRL does, but also leave out padding that is marked at the root."""
        if tensordict is not None and tensordict.get(PADDING, None) is None:
            mask = masks_of(tensordict, self._loss_mask_keys()).get(PADDING)
            if mask is not None:
                tensordict = tensordict.copy().set(PADDING, mask)
        reduced: Tensor = super()._reduce_loss(loss, tensordict, **options)
        return reduced

    def _ask_parts(self, method: str, *given: Any, trained: bool = False) -> None:
        """Call ``method`` of the parts of policy, critics and targets that have it.

        Args:
            method: Name of the method.
            *given: Arguments of the method.
            trained: Whether frozen networks are left out.
        """
        actor, critics = self.actor_network_params, [self.qvalue_network_params]
        if self.delay_qvalue:
            critics.append(self.target_qvalue_network_params)
        sets: list[tuple[torch.nn.Module, Any]] = []
        if not trained or any(p.requires_grad for p in actor.parameters()):
            sets.append((self.actor_network, actor.data))
        if not trained or any(p.requires_grad for p in critics[0].parameters()):
            sets += [
                (self.qvalue_network, params.data[i])
                for params in critics
                for i in range(self.num_qvalue_nets)
            ]
        for network, params in sets:
            with params.to_module(network):
                # Parts before what they are in. (A TensorDictModule has the attributes of what it
                # wraps.)
                for part in reversed([m for m in network.modules() if hasattr(type(m), method)]):
                    getattr(part, method)(*given)

    # -- the policy ---------------------------------------------------------------------------

    @contextmanager
    def _acting(self) -> Iterator[Callable[[TensorDictBase], Tensor]]:
        """Yield a function that writes reparameterised actions and returns their ``log_prob``."""
        action_key = self.step_keys[2]

        def act(tensordict: TensorDictBase) -> Tensor:
            action, log_prob = rsample_and_log_prob(self.actor_network.get_dist(tensordict))
            tensordict.set(action_key, action)
            return log_prob

        with (
            set_exploration_type(ExplorationType.RANDOM),
            self.actor_network_params.to_module(self.actor_network),
        ):
            yield act
