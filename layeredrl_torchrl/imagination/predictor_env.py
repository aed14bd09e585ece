"""A predictor as a TorchRL environment."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Composite, TensorSpec, Unbounded
from torchrl.envs.model_based import ModelBasedEnvBase

from layeredrl_torchrl.predictors import Predictor
from layeredrl_torchrl.specs import Space, is_discrete, to_spec, width

__all__ = ["PredictorEnv"]

_DISCOUNT = "imagined_discount"


class PredictorEnv(ModelBasedEnvBase):
    """Steps a predictor in state space: TorchRL's planners and collectors run on it unmodified.

    The next state is the expectation over members and modes, the context is carried unchanged,
    and an episode ends where the termination probability exceeds 1/2. It has no batch size of its
    own: TensorDicts of any batch shape are stepped, all instances at once.

    Planning (``use_value_func=True``): TorchRL's planners sum rewards up to a horizon, so the
    value beyond it is given to them as potential-based shaping. With survival ``1 - p_t`` and

        reward_t = c_t * (r_t + gamma * (1 - p_t) * V(s_{t+1}) - V(s_t)),
        c_{t+1} = c_t * gamma * (1 - p_t),  c_0 = 1,

    the sum over a horizon ``H`` telescopes to the discounted return of a process that survives
    each step with ``1 - p_t``, plus ``c_H * V(s_H)``, minus the constant ``V(s_0)``. ``c_t`` is
    carried in the TensorDict under ``"imagined_discount"``, and is 1 where it is absent, as it is
    at the start of a plan.

    Args:
        predictor: What is imagined; needs a reward function.
        action_spec: Spec (or gymnasium space) of one environment's action; the predictor's by
            default.
        use_value_func: Whether rewards are shaped as above; needs a value function.
        discount: ``gamma`` of the shaping; only with ``use_value_func``.

    Raises:
        ValueError: Missing parts; a discount without ``use_value_func`` or outside ``(0, 1]``; an
            action spec that does not fit the predictor's.
    """

    def __init__(
        self,
        predictor: Predictor,
        action_spec: TensorSpec | Space | None = None,
        *,
        use_value_func: bool = False,
        discount: float | None = None,
    ) -> None:
        if predictor.rew_func is None:
            raise ValueError("PredictorEnv needs a predictor with a rew_func, got None")
        if use_value_func and predictor.val_func is None:
            raise ValueError("use_value_func=True needs a predictor with a val_func, got None")
        if discount is not None and not use_value_func:
            raise ValueError("discount= has no effect without use_value_func=True; leave it out")
        if discount is not None and not 0.0 < discount <= 1.0:
            raise ValueError(f"discount must lie in (0, 1], got {discount}")
        parameter = next(predictor.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        super().__init__(predictor, device=device)
        self.use_value_func = use_value_func
        self.discount = 0.99 if discount is None else discount
        spec = predictor.model.action_spec
        if action_spec is not None:
            spec = to_spec(action_spec, name="action_spec")
            own = predictor.model.action_spec
            if (
                spec.shape != own.shape
                or is_discrete(spec) != is_discrete(own)
                or (is_discrete(spec) and type(spec) is not type(own))
                or width(spec) != width(own)
            ):
                raise ValueError(
                    f"action_spec is {spec}, the predictor's model was built for {own}; give a "
                    "spec of the same kind and size"
                )
        self._keys: tuple[Any, ...] = tuple(predictor.model.in_keys)
        state, context, action = self._keys
        dtype = torch.get_default_dtype() if parameter is None else parameter.dtype
        observed = {
            state: Unbounded((predictor.latent_state_dim,), dtype=dtype, device=device),
            context: Unbounded((predictor.context_dim,), dtype=dtype, device=device),
        }
        if use_value_func:
            observed[_DISCOUNT] = Bounded(0.0, 1.0, (1,), dtype=dtype, device=device)
        self.observation_spec = Composite(observed, device=device)
        self.state_spec = self.observation_spec.clone()
        self.action_spec = Composite({action: spec.to(device)}, device=device)
        self.reward_spec = Unbounded((1,), dtype=dtype, device=device)
        self.done_spec = Composite(
            done=Binary(1, (1,), dtype=torch.bool, device=device),
            terminated=Binary(1, (1,), dtype=torch.bool, device=device),
            device=device,
        )

    @property
    def predictor(self) -> Predictor:
        """The predictor that is stepped."""
        return self.world_model

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        state_key, context_key, action_key = self._keys
        state, context = tensordict.get(state_key), tensordict.get(context_key)
        action = tensordict.get(action_key)
        next_state, term_prob = self._expect(state, context, action)
        reward = self.predictor.need("rew_func")(state, context, action)
        out: dict[Any, Tensor] = {}
        if self.use_value_func:
            value = self.predictor.need("terminal_value")
            so_far = tensordict.get(_DISCOUNT, None)
            so_far = torch.ones_like(reward) if so_far is None else so_far.squeeze(-1)
            survival = self.discount * (1.0 - term_prob)
            gain = survival * value(next_state, context, action)
            reward = so_far * (reward + gain - value(state, context, action))
            out[_DISCOUNT] = (so_far * survival).unsqueeze(-1)
        terminated = (term_prob > 0.5).unsqueeze(-1)
        out |= {
            state_key: next_state,
            context_key: context,
            "reward": reward.unsqueeze(-1),
            "terminated": terminated,
            "done": terminated,
        }
        return TensorDict(out, batch_size=tensordict.batch_size)

    def _expect(self, state: Tensor, context: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Expected next state ``[*B, D]`` and termination probability ``[*B]``.

        Inputs are not checked here, once a step: planners project their actions.
        """
        model = self.predictor.model
        batch = state.shape[:-1]
        rows = (x.reshape(batch.numel(), *x.shape[len(batch) :]) for x in (state, context, action))
        (mean, _), weights, term_prob = model.predict_members(
            *(x.expand(model.n_models, *x.shape) for x in rows)
        )
        mean = (weights.unsqueeze(-1) * mean).sum(-2).mean(0)
        return mean.reshape(state.shape), term_prob.mean(0).reshape(batch)

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDictBase:
        batch = self.batch_size if tensordict is None else tensordict.batch_size
        out = self.observation_spec.zero(batch)
        if self.use_value_func:
            out.set(_DISCOUNT, torch.ones_like(out.get(_DISCOUNT)))
        return out

    def maybe_reset(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Leave instances as they are: a plan that has ended must not start over."""
        return tensordict
