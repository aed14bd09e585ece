"""A level that plans in a predictor which it learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.data import Binary, Composite, ReplayBuffer, TensorSpec, Unbounded
from torchrl.envs import EnvBase, TensorDictPrimer
from torchrl.record.loggers import Logger

from layeredrl_torchrl._checks import check_positive_int
from layeredrl_torchrl.levels.learning import LearningLevel, spaces_of
from layeredrl_torchrl.levels.storing import check_transitions
from layeredrl_torchrl.planners import PredictorPlanner
from layeredrl_torchrl.predictors import Predictor, RewardPredictor
from layeredrl_torchrl.specs import ObservationSpace, Space

__all__ = ["PlannerLevel"]


class PlannerLevel(LearningLevel):
    """A predictor, a planner in it, random phases and a learning schedule in one policy.

    It reads what the planner reads, and writes the action, the planner's memory one step on, and
    ``random_action_key [*B, 1]``, bool: whether the action was drawn from the action spec instead
    of planned. (So a value function learns from the planner's actions only; see
    :class:`~layeredrl_torchrl.PredictorLoss`.) A random step leaves the planner nothing to start
    the next plan from.

    It acts randomly until :attr:`n_env_steps`, which :meth:`learn` counts, has reached
    ``n_initial_random_steps``, and later in random phases. In evaluation it never does: neither
    after ``level.eval()`` nor where TorchRL's ``set_exploration_type`` asks for deterministic
    actions.

    Without spaces it waits for :meth:`setup`, so that a hierarchy can put it above another level.
    An action may then take many environment steps (``("next", "elapsed_steps")``), by which values
    are discounted; one that was cut short by a time limit is not learned from, as it does not show
    where the action leads.

    To save and resume, save the level, ``level.optimizer``, ``level.buffer`` and the state of the
    random number generators (TorchRL's ``Checkpoint`` takes them as they are). Copies and pickles,
    such as those in worker processes, come without buffer and logger: they act and do not learn.

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
        predictor_factory: Called with both, gives the predictor: a
            :class:`~layeredrl_torchrl.PredictorFactory`, or a function.
        planner_factory: Called as ``planner_factory(predictor, action_spec=...)``, gives the
            planner: ``partial(ICEMPlanner, horizon=15)``.
        env: A TorchRL environment to take both spaces from, and the layout of the data.
        buffer: Where transitions are stored; one of ``buffer_size`` by default, laid out for
            ``env``, or for the first data.
        buffer_size: Transitions that the default buffer holds; 100,000 by default.
        n_initial_random_steps: Environment steps before the first plan and the first update.
        random_prob: Probability that a random phase begins at a step outside of one.
        random_duration: Steps of a random phase; its actions are independent of each other.
        updates_per_step: Updates for each transition; what makes no whole update is carried over.
        n_initial_updates: Updates at the end of the initial random steps, in place of those put
            off until then; ``None`` to make up for them.
        batch_size: Slices in a batch for reward, value and encoder.
        model_batch_size: Transitions in a batch for the dynamics model.
        logger: Gets the predictor's terms, with environment steps as the step.
        progress: Whether a bar on stderr counts the updates of each call.
        random_action_key: See above.
        state_key: Key of what random phases carry from step to step.
        reward_func: See :class:`Level`.
        each_step: See :class:`Level`.

    Raises:
        TypeError: A factory that gives something else; other types. ValueError: Numbers outside
            their range; ``env`` beside spaces, or one space without the other; ``buffer_size``
            beside a ``buffer``; a planner in another predictor or for other actions; a
            ``model_batch_size`` that the predictor's members cannot share.
    """

    def __init__(
        self,
        observation_space: ObservationSpace | None = None,
        action_space: TensorSpec | Space | None = None,
        *,
        predictor_factory: Callable[[Any, Any], Predictor],
        planner_factory: Callable[..., PredictorPlanner],
        env: EnvBase | None = None,
        buffer: ReplayBuffer | None = None,
        buffer_size: int | None = None,
        n_initial_random_steps: int = 500,
        random_prob: float = 0.0,
        random_duration: int = 10,
        updates_per_step: float = 1.0,
        n_initial_updates: int | None = None,
        batch_size: int = 256,
        model_batch_size: int = 256,
        logger: Logger | None = None,
        progress: bool = False,
        random_action_key: NestedKey = "random_action",
        state_key: NestedKey = "random_steps_left",
        reward_func: Callable[[TensorDictBase], Tensor] | None = None,
        each_step: bool = False,
    ) -> None:
        observation_space, action_space = spaces_of(observation_space, action_space, env)
        super().__init__(
            reward_func=reward_func,
            each_step=each_step,
            buffer=buffer,
            buffer_size=buffer_size,
            n_axes=None if env is None else 1 + len(env.batch_size),
            n_initial_random_steps=n_initial_random_steps,
            updates_per_step=updates_per_step,
            n_initial_updates=n_initial_updates,
            batch_size=batch_size,
            logger=logger,
            progress=progress,
        )
        if not 0.0 <= random_prob <= 1.0:
            raise ValueError(f"random_prob must lie in [0, 1], got {random_prob}")
        self.random_prob = random_prob
        self.random_duration = check_positive_int("random_duration", random_duration)
        self.model_batch_size = check_positive_int("model_batch_size", model_batch_size)
        self.random_action_key = unravel_key(random_action_key)
        self.state_key = unravel_key(state_key)
        self.predictor_factory, self.planner_factory = predictor_factory, planner_factory
        if observation_space is not None:
            self.setup(observation_space, action_space)

    def _build(self, observation_space: ObservationSpace, action_spec: TensorSpec) -> None:
        predictor = self.predictor_factory(observation_space, action_spec)
        if not isinstance(predictor, Predictor):
            raise TypeError(
                f"predictor_factory gave a {type(predictor).__name__}, expected a Predictor"
            )
        if isinstance(predictor, RewardPredictor):
            # Raises now what would otherwise be raised after the random phase.
            n_models = predictor.model.n_models
            predictor.model_training.member_batches.n_rows(self.model_batch_size, n_models)
        planner = self.planner_factory(predictor, action_spec=action_spec)
        if not isinstance(planner, PredictorPlanner):
            raise TypeError(
                f"planner_factory gave a {type(planner).__name__}, expected a PredictorPlanner "
                "like ICEMPlanner; pass partial(ICEMPlanner, horizon=...)"
            )
        if planner.predictor is not predictor:
            raise ValueError(
                "planner_factory gave a planner in another predictor than it was called with, so "
                "what is learned would not be planned in; hand its first argument on"
            )
        if planner.action_spec.cpu() != action_spec.cpu():
            raise ValueError(
                f"planner_factory gave a planner for {planner.action_spec}, but the level's "
                f"actions are {action_spec}; hand action_spec= on"
            )
        self.planner = planner
        self.observation_key = predictor.encoder.in_keys[0]
        self.action_key = planner.action_key
        self.in_keys = [*planner.in_keys, self.state_key]
        self.out_keys = [
            *planner.out_keys,
            self.random_action_key,
            unravel_key(("next", self.state_key)),
        ]

    @property
    def predictor(self) -> Predictor:
        """The predictor that is learned and planned in; ``RuntimeError`` before :meth:`setup`."""
        self.action_spec  # noqa: B018 - raises
        return self.planner.predictor

    @property
    def record(self) -> Composite:
        """Whether the action was random."""
        return Composite({self.random_action_key: Binary(1, dtype=torch.bool)})

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The predictor's; ``None`` where it has none, as a ``StaticPredictor``."""
        return getattr(self.predictor, "optim", None)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The planner's memory, and the random steps that are left, ``[1]`` int64."""
        carried = self.planner.make_tensordict_primer().primers.clone()
        carried[self.state_key] = Unbounded((1,), dtype=torch.int64)
        return TensorDictPrimer(carried, expand_specs=True)

    # -- acting -----------------------------------------------------------------------------

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action for ``[*B]``, whether it is random, and what the next step needs.

        Raises:
            KeyError: Without the observation, or without what the primer carries.
        """
        left = tensordict.get(self.state_key, None)
        if left is None:
            raise KeyError(
                f"{self.name} carries {self.state_key!r} from step to step, which is missing; "
                "append its make_tensordict_primer() to the environment (collectors do so with "
                "auto_register_policy_transforms=True)"
            )
        random, left = self._phases(left)
        if not bool(random.any()):
            self.planner(tensordict)
        else:
            self._act_randomly(tensordict, random.squeeze(-1))
        tensordict.set(self.random_action_key, random)
        tensordict.set(unravel_key(("next", self.state_key)), left)
        return tensordict

    def _phases(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """Which instances act randomly now, and their random steps left after it, ``[*B, 1]``."""
        explores = self.explores
        if explores and self.warming_up:
            return torch.ones_like(left, dtype=torch.bool), torch.zeros_like(left)
        if not explores or not self.random_prob:
            return torch.zeros_like(left, dtype=torch.bool), torch.zeros_like(left)
        starts = torch.rand(left.shape, device=left.device) < self.random_prob
        left = torch.where(starts & (left == 0), self.random_duration, left)
        return left > 0, (left - 1).clamp_min(0)

    def _act_randomly(self, tensordict: TensorDictBase, random: Tensor) -> None:
        """Draw the actions of the instances ``random [*B]``, plan those of the others."""
        batch, planner = random.shape, self.planner
        action = self.action_spec.rand(batch).to(random.device)
        memory = planner.optimizer.forget(batch, random.device)
        planned = ~random
        if bool(planned.any()):
            read = {key: tensordict.get(key) for key in planner.in_keys}
            part = planner(TensorDict(read, batch)[planned])
            action[planned] = part.get(planner.action_key)
            memory[planned] = part.get(("next", planner.plan_key))
        tensordict.set(planner.action_key, action)
        tensordict.set(unravel_key(("next", planner.plan_key)), memory)

    # -- learning ---------------------------------------------------------------------------

    def _update(self, buffer: ReplayBuffer, n_updates: int) -> dict[str, float]:
        _, terms = self.predictor.learn(
            buffer,
            n_updates,
            self.batch_size,
            self.model_batch_size,
            int(self.n_env_steps),
            logger=self.logger,
            progress=self.progress,
        )
        return terms

    def _transitions(self, data: object) -> TensorDictBase:
        """What is stored of ``data``: all but what only acting needs; checked."""
        observation = self.predictor.encoder.in_keys[0]
        read = (observation, ("next", observation), self.planner.action_key, ("next", "reward"))
        carried = (self.planner.plan_key, self.state_key)
        following = (unravel_key(("next", key)) for key in carried)
        return check_transitions(data, read).exclude(*carried, *following)
