"""A level that learns a policy from its transitions, without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Composite, ReplayBuffer, TensorSpec
from torchrl.envs import EnvBase, Transform
from torchrl.record.loggers import Logger

from layeredrl_torchrl._checks import check_width
from layeredrl_torchrl._reporting import log_terms, updates
from layeredrl_torchrl.levels.features import InputFeatures
from layeredrl_torchrl.levels.learners import Learner
from layeredrl_torchrl.levels.learning import LearningLevel, spaces_of
from layeredrl_torchrl.levels.storing import check_transitions
from layeredrl_torchrl.specs import ObservationSpace, Space, is_discrete, to_spec, width

__all__ = ["ModelFreeLevel"]

# Updates whose batches are drawn, and turned into features, at once.
_N_AHEAD = 16


class ModelFreeLevel(LearningLevel):
    """A policy, trained by one of TorchRL's losses on a replay buffer.

    As a lower level it reads the observation, the input, and which share of its duration is left
    (a skill that is paid at its last step has to know when that is). Its value does not look beyond
    the end of an input, unless you say so. Alone it is a policy for any TorchRL collector; give it
    ``env=`` then.

    It acts randomly until :attr:`n_env_steps` has reached ``n_initial_random_steps``, and later
    explores as its learner does. In evaluation it does neither: after ``level.eval()``, and where
    TorchRL's ``set_exploration_type`` asks for deterministic actions.

    To save and resume, see :class:`~layeredrl_torchrl.PlannerLevel`. Copies and pickles act and do
    not learn.

    >>> env = get_task("InvertedPendulum-v5").make(seed=0)
    >>> level = ModelFreeLevel(env=env, learner_factory=SACLearner, n_initial_random_steps=10)
    >>> data = env.append_transform(level.make_tensordict_primer()).rollout(4, level)
    >>> level.learn(data)["n_env_steps"]
    4.0

    Args:
        observation_space: Spec (or gymnasium space) of one observation ``[obs]``.
        action_space: Spec or space of one action.
        learner_factory: Called as ``learner_factory(n_features, action_spec)``, gives the
            :class:`~layeredrl_torchrl.Learner`: ``partial(SACLearner, gamma=0.98)`` for actions
            within bounds, ``partial(DQNLearner, ...)`` for choices.
        env: A TorchRL environment to take both spaces from.
        input_spec: See :class:`Level`.
        duration: See :class:`Level`; only with an ``input_spec``.
        transform: A TorchRL transform that sampled transitions ``[N]`` pass through, where rewards
            that change as others learn are worked out. It is appended to the buffer.
        input_ends: Whether an end of the input (``("next", "input_done")``) ends the return. With
            ``False`` the value goes on as if the same input were given again.
        sees_time_left: Whether the share of the duration that is left is read (where there is a
            duration).
        buffer: Where transitions are stored, one axis ``[N]``; one of ``buffer_size`` by default.
        buffer_size: Transitions that the default buffer holds; 100,000 by default.
        n_initial_random_steps: Environment steps before the first update, with random actions.
        updates_per_step: Updates for each transition; what makes no whole update is carried over.
        n_initial_updates: Updates at the end of the initial random steps, in place of those put
            off until then; ``None`` to make up for them.
        batch_size: Transitions in an update.
        logger: Gets the terms, with environment steps as the step.
        progress: Whether a bar on stderr counts the updates of each call.
        reward_func: See :class:`Level`.
        each_step: See :class:`Level`.

    Raises:
        TypeError: A factory that gives something else; other types. ValueError: Numbers outside
            their range; options without effect; spaces that the learner cannot work with.
    """

    def __init__(
        self,
        observation_space: ObservationSpace | None = None,
        action_space: TensorSpec | Space | None = None,
        *,
        learner_factory: Callable[[int, TensorSpec], Learner],
        env: EnvBase | None = None,
        input_spec: TensorSpec | Space | None = None,
        duration: int | None = None,
        transform: Transform | None = None,
        input_ends: bool = True,
        sees_time_left: bool = True,
        buffer: ReplayBuffer | None = None,
        buffer_size: int | None = None,
        n_initial_random_steps: int = 1000,
        updates_per_step: float = 1.0,
        n_initial_updates: int | None = None,
        batch_size: int = 256,
        logger: Logger | None = None,
        progress: bool = False,
        reward_func: Callable[[TensorDictBase], Tensor] | None = None,
        each_step: bool = False,
    ) -> None:
        observation_space, action_space = spaces_of(observation_space, action_space, env)
        for name, has_effect in (("duration", duration is None), ("input_ends", input_ends)):
            if input_spec is None and not has_effect:
                raise ValueError(
                    f"{name} is about an input from above, and without an input_spec there is "
                    f"none; pass input_spec=, or leave {name} out"
                )
        super().__init__(
            input_spec=input_spec,
            duration=duration,
            reward_func=reward_func,
            each_step=each_step,
            buffer=buffer,
            buffer_size=buffer_size,
            n_axes=1,
            n_initial_random_steps=n_initial_random_steps,
            updates_per_step=updates_per_step,
            n_initial_updates=n_initial_updates,
            batch_size=batch_size,
            logger=logger,
            progress=progress,
        )
        self.learner_factory = learner_factory
        self.input_ends = input_ends
        self.sees_time_left = sees_time_left
        if transform is not None and self.buffer is not None:
            self.buffer.append_transform(transform)
        self.out_keys = [self.action_key]
        self.in_keys = [self.observation_key]
        if self.input_spec is not None:
            self.in_keys += [self.input_key, "n_actions"]
        if observation_space is not None:
            self.setup(observation_space, action_space)

    def _build(self, observation_space: ObservationSpace, action_spec: TensorSpec) -> None:
        if isinstance(observation_space, Composite):
            observation_space = observation_space[self.observation_key]
        spec = to_spec(observation_space, name="observation_space")
        if is_discrete(spec):
            raise TypeError(
                f"observation_space is {spec}, expected a vector of floats; cast choices to "
                "one-hot floats in the environment (DTypeCastTransform)"
            )
        duration = self.duration if self.sees_time_left else None
        self.observation_dim = width(spec)
        features = InputFeatures(self.observation_dim, self.input_spec, duration)
        learner = self.learner_factory(features.dim, action_spec)
        if not isinstance(learner, Learner):
            raise TypeError(
                f"learner_factory gave a {type(learner).__name__}, expected a Learner; pass "
                "partial(SACLearner, ...) or partial(DQNLearner, ...)"
            )
        self.features, self.learner = features, learner

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The learner's; ``RuntimeError`` before :meth:`setup`, ``None`` in a copy."""
        self.action_spec  # noqa: B018 - raises
        return self.learner.optim

    # -- acting -----------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action for ``[*B]``.

        Raises:
            KeyError: Without the observation, or without what comes from above.
            RuntimeError: Before :meth:`setup`.
        """
        spec = self.action_spec
        if self.explores and self.warming_up:
            observation = self._read(tensordict, self.observation_key)
            action = spec.rand(observation.shape[:-1]).to(observation.device)
        else:
            read = (self._read(tensordict, key) for key in self.in_keys)
            action = self.learner.act(self._features(*read), explore=self.explores)
        return tensordict.set(self.action_key, action)

    def _read(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        value = tensordict.get(key, None)
        if value is None:
            names = sorted(map(str, tensordict.keys(True, True)))
            raise KeyError(
                f"{self.name} reads {key!r}, which is missing; it got {names}. What comes from "
                "above is given by a Hierarchy"
            )
        return value

    def _features(
        self, observation: Tensor, given: Tensor | None = None, n_actions: Tensor | None = None
    ) -> Tensor:
        features: Tensor = self.features(observation, given, n_actions)
        return features

    # -- learning ---------------------------------------------------------------------------

    def _transitions(self, data: object) -> TensorDictBase:
        """``data`` as it is, with one axis; checked."""
        self.action_spec  # noqa: B018 - raises
        done = [("next", key) for key in ("terminated", "done")]
        read = [*self.in_keys, self.action_key, ("next", self.observation_key), ("next", "reward")]
        if self.input_spec is not None and self.input_ends:
            done.append(("next", "input_done"))
        checked = check_transitions(data, [*read, *done]).reshape(-1)
        hint = "the level was set up for observations of this width"
        observation = checked.get(self.observation_key)
        check_width("observation", observation, self.observation_dim, hint=hint)
        return checked

    def _observe(self, data: TensorDictBase) -> None:
        self.features.observe(*self._arguments(data))

    def _arguments(self, data: TensorDictBase) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the features are made of, of transitions ``[N]``."""
        observation: Tensor = data.get(self.observation_key)
        if self.input_spec is None:
            return observation, None, None
        return observation, data.get(self.input_key), data.get("n_actions")

    def _update(self, buffer: ReplayBuffer, n_updates: int) -> dict[str, float]:
        totals: dict[str, Tensor] = {}
        counts: Counter[str] = Counter()
        bar = self.name if self.progress else None
        batches: list[TensorDictBase] = []
        for i in updates(n_updates, totals, counts, bar=bar):
            if not batches:
                n = min(_N_AHEAD, n_updates - i)
                ahead = self._prepare(buffer.sample(n * self.batch_size))
                batches = list(ahead.split(self.batch_size))
            terms = self.learner.update(batches.pop())
            for name, value in terms.items():
                totals[name] = totals[name] + value if name in totals else value
            counts.update(terms.keys())
        info = {name: float(total) / counts[name] for name, total in totals.items()}
        log_terms(self.logger, self.name, info, int(self.n_env_steps))
        return info | {"n_updates": float(n_updates)}

    @torch.no_grad()
    def _prepare(self, data: TensorDictBase) -> TensorDict:
        """What the loss reads of transitions ``[N]``."""
        observation, given, n_actions = self._arguments(data)
        following = data.get(("next", self.observation_key))
        terminated = data.get(("next", "terminated"))
        n_next = None
        if n_actions is not None:
            n_next = n_actions + 1
            ended = self._input_ended(following, given, n_next)
            if self.input_ends:
                # A time limit in the middle of an input is no end of it.
                done = data.get(("next", "done"))
                terminated = terminated | (data.get(("next", "input_done")) & (ended | ~done))
            else:
                n_next = n_next.masked_fill(ended, 0)
        after = {
            "features": self._features(following, given, n_next),
            "reward": data.get(("next", "reward")),
            "terminated": terminated,
            "done": data.get(("next", "done")) | terminated,
        }
        now = {
            "features": self._features(observation, given, n_actions),
            "action": self.learner.prepare(data.get(self.action_key)),
        }
        return TensorDict({**now, "next": TensorDict(after, data.batch_size)}, data.batch_size)

    def _input_ended(self, observation: Tensor, given: Tensor | None, n_actions: Tensor) -> Tensor:
        """Where control goes back, bool ``[N, 1]``."""
        asked = {self.observation_key: observation, self.input_key: given, "n_actions": n_actions}
        return self.hands_back(TensorDict(asked, observation.shape[:-1]))
