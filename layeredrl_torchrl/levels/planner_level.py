"""A level that learns a predictor and plans with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.data import Binary, Bounded, Composite, ReplayBuffer, TensorSpec, Unbounded
from torchrl.envs import EnvBase, TensorDictPrimer

from layeredrl_torchrl._checks import (
    check_callable,
    check_instance,
    check_number,
    check_positive_int,
    check_width,
    refuse_mask,
    require,
)
from layeredrl_torchrl._reporting import Renamed
from layeredrl_torchrl._watch import is_at_once, watched
from layeredrl_torchrl.levels._learning import LearningLevel, LearningOptions, spaces_of
from layeredrl_torchrl.levels._random_actions import RandomActions
from layeredrl_torchrl.levels._random_phases import random_phases
from layeredrl_torchrl.levels._rows import (
    check_choice,
    check_flags,
    check_numbers,
    check_observations,
    end_keys,
    with_known_ends,
)
from layeredrl_torchrl.levels._storing import n_rows_along_time
from layeredrl_torchrl.levels.planner import Planner, check_planner
from layeredrl_torchrl.objectives import TransitionSlices
from layeredrl_torchrl.predictors import Predictor, RewardPredictor
from layeredrl_torchrl.specs import ObservationSpace, Space

__all__ = ["PlannerLevel"]

_HINT = "pass what a collector of this level yields"


class PlannerLevel(LearningLevel):
    """A predictor, its planner, random phases and a learning schedule in one policy.

    It reads the planner's ``in_keys``. It writes the action, the planner's memory for the next
    step, and ``random_action_key [*B, 1]``, bool: whether the action was drawn at random instead of
    planned. A value function then learns only from the planner's actions (see
    :class:`~layeredrl_torchrl.PredictorLoss`). A random step clears the planner's memory. Actions
    that this level did not choose, such as those of a collector's ``init_random_frames``, are
    stored as random.

    It acts randomly during the initial random steps (500 by default), and later in random phases,
    but never in evaluation.

    Without spaces it waits for :meth:`setup`, so that a hierarchy can put it above another level.
    An action may then take many environment steps (``("next", "elapsed_steps")``); values are
    discounted by these. The level does not learn from actions cut short by a time limit, since they
    do not show where the action leads.

    >>> from functools import partial
    >>> from torchrl.collectors import Collector
    >>> env = get_task("InvertedPendulum-v5").make(seed=0)
    >>> level = PlannerLevel(
    ...     env=env,
    ...     predictor_factory=PredictorFactory(hidden_sizes=(8,), n_models=2),
    ...     planner_factory=partial(ICEMPlanner, horizon=3, n_samples=32),
    ...     n_initial_random_steps=10,
    ...     updates_per_step=0.1,
    ... )
    >>> for data in Collector(
    ...     env, level, frames_per_batch=10, total_frames=20, auto_register_policy_transforms=True
    ... ):
    ...     info = level.learn(data)
    >>> info["n_env_steps"], info["n_updates"]
    (20.0, 1.0)

    Args:
        observation_space: Space or spec of one observation, as the predictor factory takes it.
        action_space: Space or spec of one action.
        predictor_factory: Returns the predictor for both spaces: a
            :class:`~layeredrl_torchrl.PredictorFactory`, or a function.
        planner_factory: Called as ``planner_factory(predictor, action_spec=...)``, returns the
            planner: ``partial(ICEMPlanner, horizon=15)``, or another policy with ``action_key``,
            ``make_tensordict_primer()`` and ``forget(batch, device)``.
        env: A TorchRL environment; gives both spaces and the axes of the data.
        random_prob: Probability that a random phase begins at a step outside of one.
        random_duration: Steps of a random phase; its actions are independent of each other.
        model_batch_size: Transitions in a batch for the dynamics model; ``batch_size`` is in
            slices, for reward, value and encoder.
        device: Device to move predictor and planner to; by default they are not moved.
        random_action_key: See above; the predictor's loss gets the same key.
        state_key: Key of the state of random phases, which is passed from step to step: 0 until the
            level has acted, then 1 plus the remaining random steps.
        **options: Options of :class:`LearningLevel`: the buffer, the schedule, ``batch_size``,
            ``logger``.

    Raises:
        TypeError: A factory that returns something else; other types. ValueError: Numbers outside
            their range; ``env`` together with spaces, or only one space; ``buffer_size`` together
            with a ``buffer``; a planner with another predictor or for other actions; keys that
            differ from the environment's; a ``model_batch_size`` that the predictor's members
            cannot share.
    """

    def __init__(
        self,
        observation_space: ObservationSpace | None = None,
        action_space: TensorSpec | Space | None = None,
        *,
        predictor_factory: Callable[[Any, Any], Predictor],
        planner_factory: Callable[..., Planner],
        env: EnvBase | None = None,
        random_prob: float = 0.0,
        random_duration: int = 10,
        model_batch_size: int = 256,
        device: torch.device | str | None = None,
        random_action_key: NestedKey = "random_action",
        state_key: NestedKey = "random_steps_left",
        **options: Unpack[LearningOptions],
    ) -> None:
        observation_space, action_space = spaces_of(observation_space, action_space, env)
        super().__init__(n_axes=None if env is None else 1 + len(env.batch_size), **options)
        if self.buffer is not None:
            TransitionSlices(self.buffer)  # raises for samplers that learning would bypass
        self.random_prob = check_number("random_prob", random_prob, 0.0, 1.0)
        self.random_duration = check_positive_int("random_duration", random_duration)
        self.model_batch_size = check_positive_int("model_batch_size", model_batch_size)
        self.random_action_key = unravel_key(random_action_key)
        self.state_key = unravel_key(state_key)
        check_callable("predictor_factory", predictor_factory, factory=True)
        check_callable("planner_factory", planner_factory, factory=True)
        self.predictor_factory, self.planner_factory = predictor_factory, planner_factory
        self._device = device
        if observation_space is not None:
            self.setup(observation_space, action_space)
        if env is not None:
            self._check_keys(env)
            self.done_key, self.terminated_key = end_keys(env)

    def _build(self, observation_space: ObservationSpace, action_spec: TensorSpec) -> None:
        predictor = self.predictor_factory(observation_space, action_spec)
        hint = "predictor_factory has to return one"
        check_instance("predictor", predictor, Predictor, hint=hint)
        _check_range(predictor.model.action_spec, action_spec)
        if isinstance(predictor, RewardPredictor):
            # Raises now instead of after the initial random steps.
            n_models = predictor.model.n_models
            predictor.model_training.member_batches.n_rows(self.model_batch_size, n_models)
        if self._device is not None:
            predictor = predictor.to(self._device)
        planner = self.planner_factory(predictor, action_spec=action_spec)
        holds_predictor = check_planner(planner, predictor, action_spec)
        self.planner = planner
        # If the planner holds the predictor, do not register and save it again.
        if holds_predictor:
            self.__dict__["_predictor"] = predictor
        else:
            self._predictor = predictor
        self.random_actions = RandomActions(action_spec)
        if self._device is not None:
            self.to(self._device)
        self.observation_key = predictor.encoder.in_keys[0]
        self.action_key = unravel_key(planner.action_key)
        self.in_keys = [*planner.in_keys, self.state_key]
        self.out_keys = [
            *planner.out_keys,
            self.random_action_key,
            unravel_key(("next", self.state_key)),
        ]
        self._check_learned_keys(predictor)

    def _check_learned_keys(self, predictor: Predictor) -> None:
        """Raise unless the predictor learns from the level's entries."""
        loss = getattr(predictor, "predictor_loss", None)
        if loss is None:
            return
        keys = loss.tensor_keys
        # The key is optional for the loss, which would silently value random actions without it.
        if unravel_key(keys.random_action) != self.random_action_key:
            if keys.random_action != type(loss).default_keys().random_action:
                raise ValueError(
                    f"the predictor learns which actions are random from {keys.random_action!r}, "
                    f"but the level writes it to {self.random_action_key!r}; pass "
                    f"random_action_key={keys.random_action!r}"
                )
            loss.set_keys(random_action=self.random_action_key)
        if predictor.encoder.joins:
            return
        following = unravel_key(("next", self.observation_key))
        for name, own, learned in (
            ("observation", self.observation_key, keys.observation),
            ("next_observation", following, keys.next_observation),
            ("action", self.action_key, keys.action),
        ):
            if unravel_key(learned) != own:
                raise ValueError(
                    f"the predictor learns from the {name} {learned!r}, but the level has it below "
                    f"{own!r}; name it by predictor.predictor_loss.set_keys({name}=...)"
                )

    def _check_keys(self, env: EnvBase) -> None:
        """Raise unless predictor and planner use the keys of ``env``."""
        _, reward_key = self._learned_keys()
        seen = list(env.observation_keys)
        for what, own, there in (
            *(("observation", key, seen) for key in self.predictor.encoder.in_keys),
            ("action", self.action_key, [env.action_key]),
            ("reward", reward_key, [unravel_key(("next", env.reward_key))]),
        ):
            if own not in [unravel_key(key) for key in there]:
                raise ValueError(
                    f"the level's {what} has the key {own!r}, but the environment's has "
                    f"{there}; give the predictor this key (PredictorFactory and the keys of its "
                    "losses), or rename the environment's by TorchRL's RenameTransform"
                )

    @property
    def predictor(self) -> Predictor:
        """The level's predictor; ``RuntimeError`` before :meth:`setup`."""
        self.action_spec  # noqa: B018 - raises
        return self._predictor

    @property
    def record(self) -> Composite:
        """Spec of the flag that marks random actions."""
        return Composite({self.random_action_key: Binary(1, dtype=torch.bool)})

    @property
    def optim(self) -> torch.optim.Optimizer | None:
        """The predictor's optimizer; ``None`` if it has none, like a ``StaticPredictor``."""
        return getattr(self.predictor, "optim", None)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Return the transform for the planner's memory and the remaining random steps."""
        carried = self.planner.make_tensordict_primer().primers.clone()
        carried[self.state_key] = Unbounded((1,), dtype=torch.int64)
        return TensorDictPrimer(carried, expand_specs=True)

    # -- acting -----------------------------------------------------------------------------

    @watched
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action for ``[*B]``, whether it is random, and the memory for the next step.

        Raises:
            KeyError: The observation or the memory is missing. ValueError: Masked actions.
        """
        hint = (
            "env = env.append_transform(level.make_tensordict_primer()) adds it (collectors do so "
            "with auto_register_policy_transforms=True)"
        )
        refuse_mask(tensordict, self.action_key)
        carried = require(tensordict, self.state_key, reader=self.name, hint=hint)
        warming_up = self.explores and self.warming_up
        prob = self.random_prob if self.explores else 0.0
        left = (carried - 1).clamp_min(0)
        random, left = random_phases(left, warming_up, prob, self.random_duration)
        if random is None:
            self.planner(tensordict)
            random = torch.zeros_like(left, dtype=torch.bool)
        else:
            nothing_to_plan = warming_up is True or self.random_prob == 1.0
            self._act_randomly(tensordict, random.squeeze(-1), nothing_to_plan)
        tensordict.set(self.random_action_key, random)
        tensordict.set(unravel_key(("next", self.state_key)), left + 1)
        return tensordict

    def _act_randomly(
        self, tensordict: TensorDictBase, random: Tensor, nothing_to_plan: bool
    ) -> None:
        """Draw actions for the instances ``random [*B]``, and plan for the others."""
        batch, planner = random.shape, self.planner
        read = [require(tensordict, k, reader=self.name, hint=_HINT) for k in planner.in_keys]
        action = self.random_actions(batch).to(random.device)
        memory = planner.forget(batch, random.device)
        if not nothing_to_plan:
            planned = ~random
            part = TensorDict(dict(zip(planner.in_keys, read, strict=True)), batch)
            if is_at_once(random):
                # Plan for the other instances only.
                if bool(planned.any()):
                    part = planner(part[planned])
                    action[planned] = part.get(planner.action_key)
                    memory[planned] = part.get("next").select(*memory.keys())
            else:
                part = planner(part)
                action = _where(random, action, part.get(planner.action_key))
                after = part.get("next").select(*memory.keys())
                memory = memory.apply(lambda none, new: _where(random, none, new), after)
        tensordict.set(planner.action_key, action)
        for key in memory.keys(True, True):
            tensordict.set(unravel_key(("next", key)), memory.get(key))

    # -- learning ---------------------------------------------------------------------------

    @property
    def next_reward_key(self) -> NestedKey:
        """The key of the reward from which the predictor learns."""
        return self._learned_keys()[1]

    def _learned_keys(self) -> tuple[list[NestedKey], NestedKey]:
        """Return the entries that the predictor's losses read, and the key of the reward."""
        loss = getattr(self.predictor, "predictor_loss", None)
        if loss is None:
            return [], unravel_key(("next", "reward"))
        keys = dict(vars(loss.tensor_keys))
        reward = unravel_key(keys["reward"])
        keys.pop("valid")  # computed when slices are drawn
        return [unravel_key(key) for key in keys.values()], reward

    @property
    def stored_keys(self) -> tuple[list[NestedKey], list[NestedKey]]:
        """Keys that the predictor's losses read, and those that separate trajectories."""
        read, reward = self._learned_keys()
        observation = self.observation_key
        required = [observation, ("next", observation), self.action_key, reward]
        for key in self.predictor.encoder.in_keys[1:]:
            required += [key, unravel_key(("next", key))]
        required += [("next", "done"), ("next", "terminated")]
        optional = [("next", "truncated"), ("next", "elapsed_steps"), ("collector", "traj_ids")]
        return required, [*optional, self.random_action_key, "weight", *read]

    def _checked(self, data: TensorDictBase) -> TensorDictBase:
        """Return ``data`` with the actions of other policies marked as random."""
        (observation, following, action, *numbers), _ = self.stored_keys
        flags: list[NestedKey] = [("next", key) for key in ("done", "terminated")]
        if data.get(self.random_action_key, None) is not None:
            flags.append(self.random_action_key)
        check_flags(data, flags, self.name, _HINT)
        encoder = self.predictor.encoder
        if encoder.joins:
            for key in encoder.in_keys:
                for at in (key, unravel_key(("next", key))):
                    require(data, at, reader=f"{self.name}.learn", hint=_HINT)
            for rows in (data, data.get("next")):
                encoder.join(rows)  # raises for other shapes
        else:
            check_observations(data, observation, encoder.obs_dim, self.name, _HINT)
        data = with_known_ends(data, observation, self.name)
        read = [observation, following, action, *(key for key in numbers if key not in flags)]
        check_numbers(data, read, self.name, _HINT)
        check_width(str(numbers[0]), data.get(numbers[0]), 1, hint="a reward is [*B, 1]")
        check_choice(str(action), self.action_spec, data.get(action), data.shape)
        random = data.get(self.random_action_key, None)
        acted = data.get(unravel_key(("next", self.state_key)), None)
        if random is not None and acted is not None:
            # 0, the primer's default, means that the level was not called.
            data = data.copy().set(self.random_action_key, random | (acted == 0))
        return data

    def _can_update(self, buffer: ReplayBuffer) -> bool:
        """Return whether the buffer is long enough for the slices of an update."""
        return n_rows_along_time(buffer) >= self.predictor.n_steps_needed

    def _update(self, buffer: ReplayBuffer, n_updates: int) -> dict[str, float]:
        logger: Any = self.logger
        if logger is not None and self.logs_as is not None:
            logger = Renamed(logger, self.predictor.name, self.logs_as)
        _, terms = self.predictor.learn(
            buffer,
            n_updates,
            self.batch_size,
            self.model_batch_size,
            int(self.n_env_steps),
            logger=logger,
            progress=self.progress,
        )
        return terms


def _check_range(known: TensorSpec, planned: TensorSpec) -> None:
    """Raise ``ValueError`` for actions outside the bounds of the predictor's model."""
    if not (isinstance(known, Bounded) and isinstance(planned, Bounded)):
        return  # building the planner finds other differences
    low, high, own = planned.space.low.cpu(), planned.space.high.cpu(), known.space
    if known.shape == planned.shape and bool(((low < own.low) | (high > own.high)).any()):
        raise ValueError(
            f"its actions go from {low.tolist()} to {high.tolist()}, but the predictor's model was "
            f"built for {own.low.tolist()} to {own.high.tolist()}; build the model for all of them"
        )


def _where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Apply ``torch.where`` to a mask ``[*B]`` and values ``[*B, ...]``."""
    return torch.where(mask.reshape(mask.shape + (1,) * (yes.ndim - mask.ndim)), yes, no)
