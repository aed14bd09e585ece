"""A predictor as a TorchRL environment."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torchrl.data import Binary, Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.model_based import ModelBasedEnvBase

from layeredrl_torchrl._checks import (
    check_callable,
    check_finite,
    check_flag,
    check_instance,
    check_number,
    check_positive_int,
    require,
)
from layeredrl_torchrl._signatures import SignatureOfInit
from layeredrl_torchrl._watch import refuse, watched
from layeredrl_torchrl.imagination._members import (
    draw_members,
    step_by_any,
    step_by_mean,
    step_by_members,
)
from layeredrl_torchrl.imagination.starts import check_start, draw_starts
from layeredrl_torchrl.models import TS1, Expectation, Propagation, TSInfinity
from layeredrl_torchrl.nets import check_step_function
from layeredrl_torchrl.predictors import Predictor
from layeredrl_torchrl.predictors._functions import value_of_state
from layeredrl_torchrl.specs import ActionForm, Space, is_discrete, to_spec, width

__all__ = ["PredictorEnv"]

_DISCOUNT = "imagined_discount"
_MEMBER = "imagined_member"
_DONE = ("done", "terminated")


class PredictorEnv(ModelBasedEnvBase):
    """Steps a predictor in state space, for TorchRL's own planners and collectors.

    The context stays unchanged. Reward and termination functions that read the next state get the
    state that the step leads to. ``propagation`` determines this state:

    - :class:`~layeredrl_torchrl.Expectation`: the mean over members and modes.
    - :class:`~layeredrl_torchrl.TS1`: a sample from one member's mixture; each entry of a batch is
      one particle, and a new member is drawn at every step.
    - :class:`~layeredrl_torchrl.TSInfinity`: likewise, but an entry keeps its member for an
      episode, in the TensorDict under ``"imagined_member"``, int64 ``[*B, 1]``. If the key is
      absent, as in a plan, the member is drawn at the first step. A reset keeps the member that it
      is given.

    For planning, leave out ``batch_size`` and ``initial_states``: the environment steps TensorDicts
    of any batch shape, and never resets within a plan. For imagined data, give both: then this is
    an environment like any other, for ``env.rollout`` and TorchRL's collectors, which reset single
    instances when they end; TorchRL's ``StepCounter`` limits the horizon. Random numbers are
    torch's: ``torch.manual_seed`` reproduces an episode, and ``set_seed`` has no effect.

    >>> from torchrl.collectors import Collector
    >>> from torchrl.envs import StepCounter, TransformedEnv
    >>> model = ProbabilisticEnsemble(Unbounded((2,)), None, Bounded(-1.0, 1.0, (1,)), n_models=3)
    >>> cost = lambda state, context, action: -state.square().sum(-1)
    >>> predictor = StaticPredictor(model, None, cost, IdentityEncoder((2,)), 2)
    >>> env = PredictorEnv(
    ...     predictor,
    ...     propagation=TSInfinity(),
    ...     initial_states=lambda n: predictor.encoder(
    ...         TensorDict({"observation": torch.randn(n, 2)}, [n])
    ...     ),
    ...     batch_size=[8],
    ... )
    >>> env = TransformedEnv(env, StepCounter(max_steps=5))
    >>> for data in Collector(env, frames_per_batch=80, total_frames=80):
    ...     print(data["state"].shape, data["imagined_member"].shape)
    torch.Size([8, 10, 2]) torch.Size([8, 10, 1])

    Planning with a value (``use_value_func=True``): TorchRL's planners sum rewards up to a horizon,
    so they get the value beyond it by potential-based shaping. With survival ``1 - p_t`` and

        reward_t = c_t * (r_t + gamma * (1 - p_t) * V(s_{t+1}) - V(s_t)),
        c_{t+1} = c_t * gamma * (1 - p_t),  c_0 = 1,

    the sum over a horizon ``H`` telescopes to the discounted return of a process that survives
    each step with ``1 - p_t``, plus ``c_H * V(s_H)``, minus the constant ``V(s_0)``. ``c_t`` is
    stored in the TensorDict under ``"imagined_discount"``; if the key is absent, as at the start of
    a plan, it is 1.

    Args:
        predictor: The predictor to step; needs a reward function.
        action_spec: Spec (or gymnasium space) of one environment's action; the predictor's by
            default.
        propagation: As above, without ``n_particles``; ``Expectation()`` by default.
        sample_termination: Whether an episode ends with the predicted probability, instead of
            where that exceeds 1/2. Not with ``use_value_func``, whose rewards count survival.
        exploration_bonus: ``(state, context, action) -> [*B]``, added to the reward; for example
            :class:`~layeredrl_torchrl.EnsembleDisagreement`.
        initial_states: Called with a number ``n`` at resets, returns a TensorDict ``[n]`` with
            state ``[n, D]`` and context ``[n, C]``; for example
            :class:`~layeredrl_torchrl.FromBuffer`. Without it, resets give zeros, and instances
            that have ended continue. Under a transform they start over at zeros, with a warning.
        batch_size: Batch size of the environment; empty by default, as TorchRL's planners need it.
        use_value_func: Whether to shape rewards as above; needs a value function.
        discount: ``gamma`` of the shaping; only with ``use_value_func``.

    Raises:
        TypeError: No predictor; a propagation of another kind; parts that are not callable.
        ValueError: Missing parts; a number of particles; a discount without ``use_value_func`` or
            outside ``(0, 1]``; ``sample_termination`` with ``use_value_func``; an action spec that
            does not fit the predictor's. When stepped or reset: KeyError for a given state without
            its context; ValueError for an action outside its space; a prediction that is not finite
            (the message names the member); a reward, termination, bonus, members or initial states
            of another shape.
    """

    __signature__ = SignatureOfInit()

    def __init__(
        self,
        predictor: Predictor,
        action_spec: TensorSpec | Space | None = None,
        *,
        propagation: Propagation | None = None,
        sample_termination: bool = False,
        exploration_bonus: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        initial_states: Callable[[int], TensorDictBase] | None = None,
        batch_size: Sequence[int] = (),
        use_value_func: bool = False,
        discount: float | None = None,
    ) -> None:
        check_instance("predictor", predictor, Predictor, hint="of a level: level.predictor")
        check_flag("sample_termination", sample_termination)
        check_flag("use_value_func", use_value_func)
        if not isinstance(batch_size, Sequence):
            raise TypeError(f"batch_size must be a sequence of int, like [8], got {batch_size!r}")
        batch_size = [check_positive_int(f"batch_size[{i}]", n) for i, n in enumerate(batch_size)]
        propagation = Expectation() if propagation is None else propagation
        if type(propagation) not in (Expectation, TS1, TSInfinity):  # advance() is not called
            raise TypeError(
                f"propagation must be Expectation(), TS1() or TSInfinity(), got {propagation!r}"
            )
        if (n := getattr(propagation, "n_particles", None)) is not None:
            raise ValueError(
                f"propagation has n_particles={n}, but each entry of a batch "
                "is one particle here; leave n_particles out, and step larger batches"
            )
        check_step_function("exploration_bonus", exploration_bonus, may_look_ahead=False)
        check_callable("initial_states", initial_states, optional=True)
        if predictor.rew_func is None:
            raise ValueError("PredictorEnv needs a predictor with a rew_func, got None")
        if use_value_func and predictor.val_func is None:
            raise ValueError("use_value_func=True needs a predictor with a val_func, got None")
        if use_value_func and sample_termination:
            raise ValueError(
                "sample_termination=True with use_value_func=True would count termination twice, "
                "since shaped rewards are weighted by survival; leave one of them out"
            )
        if discount is not None and not use_value_func:
            raise ValueError("discount= has no effect without use_value_func=True; leave it out")
        if discount is not None:
            check_number("discount", discount, 0.0, 1.0, open_low=True)
        floats = next(predictor.parameters(), predictor.model.floats)
        super().__init__(predictor, device=floats.device, batch_size=torch.Size(batch_size))
        self.propagation = propagation
        self.sample_termination = sample_termination
        self.exploration_bonus = exploration_bonus
        self.initial_states = initial_states
        self.use_value_func = use_value_func
        self.discount = 0.99 if discount is None else discount
        self._keys: tuple[Any, ...] = tuple(predictor.model.in_keys)
        spec = _action_spec(predictor, action_spec)
        self._action_form = ActionForm(spec).to(floats.device)
        self._set_specs(spec, floats.dtype)

    def _set_specs(self, action_spec: TensorSpec, dtype: torch.dtype) -> None:
        state, context, action = self._keys
        device = self.device
        observed = {
            state: Unbounded((self.predictor.latent_state_dim,), dtype=dtype, device=device),
            context: Unbounded((self.predictor.context_dim,), dtype=dtype, device=device),
        }
        if self.use_value_func:
            observed[_DISCOUNT] = Bounded(0.0, 1.0, (1,), dtype=dtype, device=device)
        if isinstance(self.propagation, TSInfinity):
            n_models = self.predictor.model.n_models
            observed[_MEMBER] = Categorical(n_models, (1,), dtype=torch.int64, device=device)
        done = {key: Binary(1, (1,), dtype=torch.bool, device=device) for key in _DONE}
        batch = self.batch_size
        self.observation_spec = Composite(observed, device=device).expand(batch)
        needed = self.observation_spec.clone()
        if not self.predictor.context_dim:
            del needed[context]  # so that a transform can remove it
        self.state_spec = needed
        self.action_spec = Composite({action: action_spec.to(device)}, device=device).expand(batch)
        self.reward_spec = Unbounded((*batch, 1), dtype=dtype, device=device)
        self.done_spec = Composite(done, device=device).expand(batch)

    def set_specs_from_env(self, env: EnvBase) -> None:
        """Raise ``RuntimeError``: the specs are those of the predictor's state space."""
        raise RuntimeError(
            "PredictorEnv has the specs of its predictor's state space, not of an environment's "
            "observations; pass action_spec= where only the actions are the environment's"
        )

    @property
    def predictor(self) -> Predictor:
        """The predictor that is stepped."""
        return self.world_model

    @watched
    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        state_key, context_key, action_key = self._keys
        hint = (
            "it steps in state space, so transforms and specs must leave the predictor's keys as "
            "they are; rename them with in_keys= of its model and out_keys= of its encoder"
        )

        def read(key: NestedKey) -> Tensor:
            return require(tensordict, key, reader="a step of PredictorEnv", hint=hint)

        state = read(state_key)
        # An empty context may be missing: a memory map cannot store it.
        left_out = not self.predictor.context_dim and tensordict.get(context_key, None) is None
        context = state[..., :0] if left_out else read(context_key)
        action = self._action_form(read(action_key), state.shape[:-1])
        member = self._member(tensordict)
        model = self.predictor.model
        if member is not None:
            next_state, term_prob = step_by_members(model, member, state, context, action)
        elif isinstance(self.propagation, Expectation):
            next_state, term_prob = step_by_mean(model, state, context, action)
        else:
            next_state, term_prob = step_by_any(model, state, context, action)
        taken = state, context, action, next_state
        term_prob = self.predictor.term_prob_of(*taken, term_prob)
        reward = self._reward(*taken)
        out: dict[Any, Tensor] = {}
        if self.use_value_func:
            value = self.predictor.need("terminal_value")
            so_far = tensordict.get(_DISCOUNT, None)
            so_far = torch.ones_like(reward) if so_far is None else so_far.squeeze(-1)
            survival = self.discount * (1.0 - term_prob)
            before, after = (
                value_of_state(value, x, context).to(reward) for x in (state, next_state)
            )
            reward = so_far * (reward + survival * after - before)
            out[_DISCOUNT] = (so_far * survival).unsqueeze(-1)
        if member is not None:
            out[_MEMBER] = member
        limit = torch.rand_like(term_prob) if self.sample_termination else 0.5
        terminated = (term_prob > limit).unsqueeze(-1)
        hint = "shorten the episodes, or train the predictor on data like these states and actions"
        check_finite("the imagined reward", reward, hint=hint)
        out |= {
            state_key: next_state,
            context_key: context,
            "reward": reward.unsqueeze(-1),
            "terminated": terminated,
            "done": terminated.clone(),
        }
        return TensorDict(out, batch_size=tensordict.batch_size)

    def _member(self, tensordict: TensorDictBase) -> Tensor | None:
        """Return which member moves each entry, ``[*B, 1]``; ``None`` unless ``TSInfinity``."""
        if not isinstance(self.propagation, TSInfinity):
            return None
        kept = tensordict.get(_MEMBER, None)
        if kept is not None:
            return kept
        return draw_members(self.predictor.model, tensordict.batch_size, self.device)

    def _reward(self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        """Return reward plus bonus, ``[*B]``."""
        reward = self.predictor.reward_of(state, context, action, next_state)
        if self.exploration_bonus is None:
            return reward
        bonus = self.exploration_bonus(state, context, action)
        if bonus.shape != reward.shape:
            raise ValueError(
                f"exploration_bonus gave a bonus of shape {tuple(bonus.shape)} for rewards of "
                f"shape {tuple(reward.shape)}; it must return one number for each entry, [*B]"
            )
        return reward + bonus

    @watched
    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDictBase:
        batch = self.batch_size if tensordict is None else tensordict.batch_size
        # The zeros of a spec have its batch size, if it has one; the rest of the shape is given.
        out = self.observation_spec.zero(batch[self.observation_spec.ndim :])
        if self.use_value_func:
            out.set(_DISCOUNT, torch.ones_like(out.get(_DISCOUNT)))
        if isinstance(self.propagation, TSInfinity):
            out.set(_MEMBER, draw_members(self.predictor.model, batch, self.device))
        chosen = None if tensordict is None else tensordict.get("_reset", None)
        widths: dict[Any, int] = {key: out.get(key).shape[-1] for key in self._keys[:2]}
        if chosen is None and tensordict is not None:
            given = {key: tensordict.get(key, None) for key in widths}
            if any(value is not None for value in given.values()):
                member = {_MEMBER} & set(out.keys())
                out.update(tensordict.select(*member, strict=False))
                return out.update(_checked_starts(given, out))
        if self.initial_states is None:
            if chosen is not None:
                refuse(chosen.any(), _warn_of_zeros)
            return out
        if chosen is None:
            chosen = torch.ones(batch, dtype=torch.bool, device=self.device)
        chosen = chosen.reshape(batch)
        # Counting the instances would wait for an accelerator, so there all of them get a start.
        counted = chosen.device.type == "cpu" and not isinstance(chosen, FakeTensor)
        n = int(chosen.sum()) if counted else batch.numel()
        # TorchRL keeps the entries of the other instances, whatever is returned for them.
        dtype = out.get(self._keys[0]).dtype
        for key, starts in draw_starts(self.initial_states, n, widths, dtype).items():
            value = out.get(key)
            starts = starts.to(value)
            if counted:
                value = value.clone()
                value[chosen] = starts
                out.set(key, value)
            else:
                out.set(key, starts.reshape(value.shape))
        return out

    def maybe_reset(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Reset only with initial states; a plan that has ended must not restart."""
        if self.initial_states is None:
            return tensordict
        return super().maybe_reset(tensordict)


def _warn_of_zeros(_: Tensor) -> None:
    warnings.warn(
        "an imagined episode has ended and starts over in a state and context of zeros, since a "
        "transformed PredictorEnv is reset and there are no initial_states: give them, or stop at "
        "the end (break_when_any_done=True). A planner does not count what comes after the end",
        stacklevel=6,
    )


def _checked_starts(given: dict[Any, Tensor | None], like: TensorDictBase) -> dict[Any, Tensor]:
    """Return the states and contexts given to a reset, in the form of ``like``.

    Raises:
        KeyError: One without the other, unless that is empty: it would silently be zeros.
    """
    found = {}
    for key, value in given.items():
        own = like.get(key)
        if value is not None:
            found[key] = check_start(key, value, own.shape[-1], own.dtype).to(own.device)
        elif own.shape[-1]:
            raise KeyError(
                f"a reset was given {[k for k, v in given.items() if v is not None]} without "
                f"{key!r}; give both as predictor.encode() returns them, or none"
            )
    return found


def _action_spec(predictor: Predictor, given: TensorSpec | Space | None) -> TensorSpec:
    """Return the given spec, by default the predictor's; raise if it does not fit that."""
    own = predictor.model.action_spec
    if given is None:
        return own
    spec = to_spec(given, name="action_spec")
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
    return spec
