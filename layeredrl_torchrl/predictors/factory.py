"""Build a predictor for the spaces of an environment or of a level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from tensordict import NestedKey, unravel_key
from torchrl.data import Composite, TensorSpec, Unbounded
from torchrl.envs import CatTensors, EnvBase, Transform, TransformedEnv

from layeredrl_torchrl._checks import check_indices, own_entries
from layeredrl_torchrl.models import ProbabilisticEnsemble
from layeredrl_torchrl.nets import (
    Encoder,
    FixedEncoderNet,
    IdentityEncoder,
    ObservationShape,
    ProbFCDynamics,
    RewardNet,
    StepFunction,
    ValueNet,
    check_step_function,
)
from layeredrl_torchrl.predictors.reward import RewardPredictor
from layeredrl_torchrl.specs import ObservationSpace, Space, to_spec, width

__all__ = ["PredictorFactory", "get_default_predictor_factory"]

# The entries of a goal-based observation, in joining order.
_GOAL_KEYS = ("observation", "achieved_goal", "desired_goal")
_JOIN = f'CatTensors(in_keys={list(_GOAL_KEYS)}, out_key="observation", sort=False)'

Environment: TypeAlias = gym.Env[Any, Any] | gym.vector.VectorEnv[Any, Any, Any] | EnvBase


@dataclass(frozen=True, kw_only=True)
class PredictorFactory:
    """Builds a :class:`~layeredrl_torchrl.RewardPredictor` for given spaces.

    Observations are flat vectors ``[obs]``. Those of goal-based environments (a ``Dict`` or
    ``Composite`` of observation, achieved_goal and desired_goal) are joined in this order: the
    desired goal is the context and the rest the state. In TorchRL, join them with
    ``CatTensors(in_keys=["observation", "achieved_goal", "desired_goal"], out_key="observation",
    sort=False)``; without ``sort=False`` it sorts the keys.

    >>> factory = PredictorFactory(hidden_sizes=(64, 64), context_dims=[3, 4])
    >>> predictor = factory(Unbounded((5,)), Bounded(-1.0, 1.0, (2,)))
    >>> predictor.latent_state_dim, predictor.context_dim
    (3, 2)

    Args:
        hidden_sizes: Width of each hidden layer of the dynamics, reward and value networks.
        n_models: ``M``.
        n_modes: ``K``.
        n_particles_per_model: ``P``.
        gamma: Discount over one step.
        rew_func: A known reward; by default a :class:`~layeredrl_torchrl.RewardNet` learns it.
        val_func: A known value; by default a :class:`~layeredrl_torchrl.ValueNet` learns it.
        term_func: A known termination, as in :class:`~layeredrl_torchrl.Predictor`.
        context_dims: Dimensions of the observation that are the context: those that stay constant
            within an episode, such as a goal. All others are the state. Plans hold the context
            fixed, so anything that moves, such as a moving target, belongs to the state. With
            several entries, these are dimensions of the joined observation. Not needed for
            goal-based spaces.
        partial_encoder: Builds another encoder from the shape ``(obs,)`` of an observation, for
            example ``partial(EncoderNet, latent_state_dim=8, context_dim=2)``; with a list of keys,
            from a mapping of keys to shapes.
        observation_key: Key of the observation, possibly nested, that the encoder reads and that
            :meth:`RewardPredictor.learn` expects in the buffer. A ``partial_encoder`` names its own
            (``in_keys``). A list of keys means an observation of several entries, of any shapes,
            which the encoder joins in this order. An entry named ``"desired_goal"`` is then the
            context; rename it if it moves within an episode.
        action_key: Key of the action, likewise.
        reward_key: Key of the reward, likewise; in data it is under ``"next"``.
        ignore_context: Whether to hide the context from the dynamics networks, since physics does
            not depend on a goal. Set ``False`` where an episode ends at its goal: then termination
            does depend on it.
        model_options: Further arguments of :class:`~layeredrl_torchrl.ProbabilisticEnsemble`.
        predictor_options: Further arguments of :class:`~layeredrl_torchrl.RewardPredictor`.

    Raises:
        ValueError: Both ``context_dims`` and ``partial_encoder``.
        TypeError: A ``rew_func``, ``val_func`` or ``term_func`` that cannot be called, or that
            takes a next state without declaring it (:func:`~layeredrl_torchrl.reads_next_state`).
    """

    hidden_sizes: Sequence[int] = (128, 128)
    n_models: int = 5
    n_modes: int = 1
    n_particles_per_model: int = 1
    gamma: float = 0.99
    rew_func: StepFunction | None = None
    val_func: StepFunction | None = None
    term_func: StepFunction | None = None
    context_dims: Sequence[int] = ()
    partial_encoder: Callable[[Any], Encoder] | None = None
    observation_key: NestedKey | list[NestedKey] = "observation"
    action_key: NestedKey = "action"
    reward_key: NestedKey = "reward"
    ignore_context: bool = True
    model_options: Mapping[str, Any] = field(default_factory=dict)
    predictor_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_step_function("rew_func", self.rew_func)
        check_step_function("val_func", self.val_func, may_look_ahead=False)
        check_step_function("term_func", self.term_func)
        dims = tuple(check_indices("context_dims", self.context_dims))
        object.__setattr__(self, "context_dims", dims)
        if self.context_dims and self.partial_encoder is not None:
            raise ValueError(
                f"context_dims={list(self.context_dims)} has no effect with a partial_encoder; "
                "give one of them"
            )

    def __call__(
        self,
        observation_space: ObservationSpace,
        action_space: Space,
        device: torch.device | str | None = None,
    ) -> RewardPredictor:
        """Build a new, untrained predictor.

        Args:
            observation_space: ``Box`` or TorchRL spec of one observation ``[obs]``; a goal-based
                ``Dict``; or a ``Composite`` that has an ``"observation"``.
            action_space: Box or Discrete, or a TorchRL spec.
            device: Where the parameters are put; torch's default if ``None``.

        Raises:
            TypeError, ValueError: Spaces of another kind; the message gives the remedy.
        """
        shape: ObservationShape
        if isinstance(self.observation_key, list):
            shape, goal_dims = _entries(observation_space, self.observation_key)
        else:
            dim, goal_dims = _layout(observation_space, self.observation_key)
            shape = (dim,)
        if goal_dims and self.context_dims and list(self.context_dims) != goal_dims:
            raise ValueError(
                f"context_dims is {list(self.context_dims)}, but the desired goal of the "
                f"observation space has the dimensions {goal_dims}; leave context_dims out"
            )
        encoder = self._encoder(shape, list(self.context_dims) or goal_dims)
        state_dim, context_dim = encoder.latent_state_dim, encoder.context_dim
        net = partial(
            ProbFCDynamics, hidden_sizes=self.hidden_sizes, ignore_context=self.ignore_context
        )
        options: dict[str, Any] = {
            "partial_net": net,
            "in_keys": [*encoder.out_keys, self.action_key],
        }
        model = ProbabilisticEnsemble(
            state_space=Unbounded((state_dim,)),
            context_space=Unbounded((context_dim,)) if context_dim else None,
            action_space=action_space,
            n_models=self.n_models,
            n_modes=self.n_modes,
            n_particles_per_model=self.n_particles_per_model,
            **options | dict(self.model_options),
        )
        rew_func = self.rew_func
        if rew_func is None:
            rew_func = RewardNet(state_dim, context_dim, model.action_spec, self.hidden_sizes)
        val_func = self.val_func
        if val_func is None:
            val_func = ValueNet(state_dim, context_dim, self.hidden_sizes)
        predictor = RewardPredictor(
            model,
            val_func,
            rew_func,
            encoder,
            state_dim,
            context_dim,
            term_func=self.term_func,
            gamma=self.gamma,
            **self.predictor_options,
        )
        predictor.predictor_loss.set_keys(reward=unravel_key(("next", self.reward_key)))
        return predictor if device is None else predictor.to(device)

    def _encoder(self, shape: ObservationShape, context_dims: list[int]) -> Encoder:
        if self.partial_encoder is not None:
            return self.partial_encoder(shape)
        keys: dict[str, Any] = {}
        if not isinstance(self.observation_key, list):
            keys["in_keys"] = [self.observation_key]
        whole = IdentityEncoder(shape, **keys)
        if not context_dims:
            return whole
        state_dims = [d for d in range(whole.obs_dim) if d not in context_dims]
        return FixedEncoderNet(
            shape, latent_state_dims=state_dims, context_dims=context_dims, **keys
        )


def get_default_predictor_factory(env: Environment, **options: Any) -> PredictorFactory:
    """Return the factory for an environment; call it with the environment's spaces.

    For a goal-based environment it stores where the goal is in the joined observation, so it can be
    called with the joined space as well. A TorchRL environment may be passed before or after it is
    transformed. Transforms inside the workers of a ``SerialEnv`` or ``ParallelEnv`` are not
    visible: pass a single environment instead, or ``context_dims``.

    >>> from torchrl.envs import GymEnv
    >>> env = GymEnv("InvertedPendulum-v5")
    >>> predictor = get_default_predictor_factory(env)(env.observation_spec, env.action_spec)
    >>> predictor.latent_state_dim
    4

    Args:
        env: A gymnasium environment or vector environment, or a TorchRL environment.
        **options: Of :class:`PredictorFactory`.

    Raises:
        TypeError: Not an environment; an option that the factory does not have.
        ValueError: Goals joined in another order; and as the factory, for the observation space.
    """
    factory = PredictorFactory(**options)
    given = bool(factory.context_dims) or factory.partial_encoder is not None
    if isinstance(env, gym.vector.VectorEnv):
        space: ObservationSpace = env.single_observation_space
    elif isinstance(env, gym.Env):
        space = env.observation_space
    elif isinstance(env, EnvBase):
        space = env.observation_spec_unbatched if given else _untransformed_goals(env)
    else:
        raise TypeError(
            f"env must be a gymnasium or TorchRL environment, got {type(env).__name__}; without "
            "one, call PredictorFactory() with spaces"
        )
    if isinstance(factory.observation_key, list):
        return factory
    _, goal_dims = _layout(space, factory.observation_key)
    return factory if given else replace(factory, context_dims=tuple(goal_dims))


def _layout(space: ObservationSpace, key: NestedKey) -> tuple[int, list[int]]:
    """Return the width of (joined) observations, and the dimensions of the desired goal in them."""
    if isinstance(space, gym.spaces.Dict | Composite):
        parts = dict(space.items())
        if all(key in parts for key in _GOAL_KEYS) and (
            isinstance(space, Composite) or len(parts) == len(_GOAL_KEYS)
        ):
            widths = [_width(key, parts[key]) for key in _GOAL_KEYS]
            return sum(widths), list(range(sum(widths[:2]), sum(widths)))
        # A TorchRL environment may have further entries: step counters, pixels for recording.
        if isinstance(space, Composite) and key in space.keys(True, True):
            return _width(str(key), space[key]), []
        raise ValueError(
            f"the observation space has the entries {own_entries(space)}, expected {key!r}, one "
            f"flat observation, or {list(_GOAL_KEYS)}; name it, or a list of several, with "
            "observation_key=, or join them by "
            'TorchRL\'s CatTensors(in_keys=..., out_key="observation", sort=False), or by '
            "gymnasium's FlattenObservation (which sorts the keys)"
        )
    return _width("observation_space", space), []


def _entries(
    space: ObservationSpace, keys: list[NestedKey]
) -> tuple[dict[NestedKey, tuple[int, ...]], list[int]]:
    """Return the shapes of several entries, and the dimensions of the desired goal in them."""
    parts: dict[Any, Any] = {}
    if isinstance(space, Composite):
        parts = {key: space[key] for key in space.keys(True, True)}
    elif isinstance(space, gym.spaces.Dict):
        parts = dict(space.spaces)
    missing = [key for key in keys if unravel_key(key) not in parts]
    if missing or not keys:
        raise ValueError(
            f"the observation space has the entries {own_entries(parts)}, expected those of "
            f"observation_key={keys}, a list of at least one"
            + (f": {', '.join(map(repr, missing))} is not among them" if missing else "")
            + "; in TorchRL pass env.observation_spec_unbatched"
        )
    shapes = {unravel_key(key): tuple(parts[unravel_key(key)].shape) for key in keys}
    goal_dims: list[int] = []
    start = 0
    for key, shape in shapes.items():
        if key == "desired_goal":
            goal_dims = list(range(start, start + prod(shape)))
        start += prod(shape)
    return shapes, goal_dims


def _width(name: str, space: ObservationSpace) -> int:
    """Return the width of one flat observation of floats."""
    shape = tuple(space.shape or ())
    if isinstance(space, gym.spaces.Box | TensorSpec) and len(shape) > 1:
        raise ValueError(
            f"{name} has shape {shape}, expected one axis [obs]; turn images into features by an "
            "environment transform, flatten other arrays (TorchRL's FlattenObservation), and pass "
            "the space of a single environment, without batch axis (TorchRL's "
            "env.observation_spec_unbatched, env.action_spec_unbatched)"
        )
    if isinstance(space, gym.spaces.Box):
        floats = bool(np.issubdtype(space.dtype, np.floating))
    else:
        floats = isinstance(space, TensorSpec) and space.dtype.is_floating_point
    if not floats:
        raise TypeError(
            f"{name} is {space}, expected a Box (or TorchRL spec) of floats; cast it by TorchRL's "
            'DTypeCastTransform(torch.int64, torch.float32, in_keys=["observation"]) or the like, '
            "choices as one-hot rows (TorchRL's GymEnv makes them)"
        )
    return width(to_spec(space, name=name))


def _untransformed_goals(env: EnvBase) -> Composite:
    """Return the observation space of ``env``, without transforms that joined goals.

    Raises:
        ValueError: Goals that are left out, or joined in another order.
    """
    space = before = env.observation_spec_unbatched
    while isinstance(env, TransformedEnv):
        for transform in getattr(env.transform, "transforms", [env.transform]):
            _check_join(transform)
        env = env.base_env
        before = env.observation_spec_unbatched
    if not all(key in before.keys() for key in _GOAL_KEYS):
        return space
    n_joined, _ = _layout(before, "observation")
    n_now = space["observation"].shape[-1] if "observation" in space.keys() else 0
    as_it_was = n_now == before["observation"].shape[-1]
    if n_now != n_joined and not (as_it_was and all(key in space.keys() for key in _GOAL_KEYS)):
        raise ValueError(
            f"the environment's observation, achieved and desired goal have {n_joined} values, but "
            f"after its transforms the observation has {n_now}; join them by {_JOIN}, or pass "
            "context_dims="
        )
    return before


def _check_join(transform: Transform) -> None:
    """Raise if a transform joins the entries of goal-based observations in another order."""
    if not isinstance(transform, CatTensors) or "desired_goal" not in transform.in_keys:
        return
    if list(transform.in_keys) != list(_GOAL_KEYS) or transform.out_keys != ["observation"]:
        raise ValueError(
            f"the environment joins {list(transform.in_keys)} into {transform.out_keys}, but the "
            f"desired goal is expected at the end of {list(_GOAL_KEYS)}; use {_JOIN}, or pass "
            "context_dims="
        )
