"""A level that learns a policy without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Unpack

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.data import (
    Composite,
    HERReplayBuffer,
    PrioritizedSampler,
    ReplayBuffer,
    SliceSampler,
    TensorSpec,
)
from torchrl.envs import EnvBase

from layeredrl_torchrl._checks import (
    check_callable,
    check_finite,
    check_flag,
    check_instance,
    check_resolution,
    check_width,
    own_entries,
    refuse_mask,
    require,
)
from layeredrl_torchrl._reporting import log_terms, updates
from layeredrl_torchrl._watch import flush, watched
from layeredrl_torchrl.levels._features import InputFeatures
from layeredrl_torchrl.levels._keys import KeysOf
from layeredrl_torchrl.levels._learning import LearningLevel, LearningOptions, spaces_of
from layeredrl_torchrl.levels._random_actions import RandomActions
from layeredrl_torchrl.levels._reward_scale import RewardScale
from layeredrl_torchrl.levels._rows import (
    check_choice,
    check_flags,
    check_numbers,
    check_observations,
    end_keys,
    with_known_ends,
)
from layeredrl_torchrl.levels._storing import newest
from layeredrl_torchrl.levels._trial import try_out
from layeredrl_torchrl.levels.learners import Learner
from layeredrl_torchrl.specs import ObservationSpace, Space, is_discrete, to_spec, width

__all__ = ["ModelFreeLevel"]

# Number of updates whose batches are drawn and turned into features together.
_N_AHEAD = 16
_NEXT_COUNT = ("next", "n_actions")
_HINT = "pass what a collector of this level yields; what comes from above is given by a Hierarchy"


class ModelFreeLevel(LearningLevel):
    """A policy, trained by one of TorchRL's losses on a replay buffer.

    As a lower level it reads the observation, the input, and the remaining share of its duration (a
    skill that is rewarded at its last step needs to know when that is). By default its value ends
    with the input. Used alone, it is a policy for any TorchRL collector; pass ``env=`` then.

    With ``each_step=True`` and an input, a transition may end in the middle of an action. A
    hierarchy then also gives ``("next", "n_actions")``, the number of actions finished at its end,
    so that the next value is evaluated at the remaining share of the next action.

    After the initial random steps (1,000 by default) its learner explores; evaluation has neither.
    Rewards are divided by their root mean square, so their scale does not matter; nor does a large
    offset where nothing terminates.

    A subclass may override ``_sampled(data [N]) -> data``, which prepares every sampled batch, for
    example to compute rewards that change while other levels learn.

    >>> env = get_task("InvertedPendulum-v5").make(seed=0)
    >>> level = ModelFreeLevel(env=env, learner_factory=SACLearner, n_initial_random_steps=10)
    >>> data = env.append_transform(level.make_tensordict_primer()).rollout(4, level)
    >>> level.learn(data)["n_env_steps"]
    4.0

    Args:
        observation_space: Spec (or gymnasium space) of one observation ``[obs]``; of a
            ``Composite``, the entry ``observation_key`` is used.
        action_space: Spec or space of one action.
        learner_factory: Called as ``learner_factory(n_features, action_spec)``, returns the
            :class:`~layeredrl_torchrl.levels.Learner`: ``partial(SACLearner, gamma=0.98)`` for
            bounded actions, ``partial(DQNLearner, ...)`` for discrete ones, or a function that
            builds a :class:`~layeredrl_torchrl.levels.LossLearner` for any other loss of TorchRL.
        env: A TorchRL environment; gives both spaces and the keys of action, reward and ends.
        observation_key: Key of the observation.
        input_spec: See :class:`Level`.
        duration: See :class:`Level`; only with an ``input_spec``.
        input_ends: Whether the end of an input (``("next", "input_done")``) ends the return. With
            ``False`` the value continues as if the same input were given again.
        **options: Options of :class:`LearningLevel`: the buffer, the schedule, ``batch_size``,
            ``logger``.

    Raises:
        TypeError: A factory that returns something else; other types. ValueError: Numbers outside
            their range; options without effect; spaces that do not fit the learner or its networks;
            a buffer with a sampler of slices or of priorities, which this level does not update.
    """

    #: Whether to divide rewards by the root mean square of the stored ones.
    scales_rewards: bool = True
    in_keys: list[NestedKey]
    _in_keys = KeysOf(
        lambda self: [
            self.observation_key,
            *([] if self.input_spec is None else [self.input_key, "n_actions"]),
        ]
    )
    _out_keys = _out_keys_apparent = KeysOf(
        lambda self: [self.action_key, *self.record.keys(True, True)]
    )

    def __init__(
        self,
        observation_space: ObservationSpace | None = None,
        action_space: TensorSpec | Space | None = None,
        *,
        learner_factory: Callable[[int, TensorSpec], Learner],
        env: EnvBase | None = None,
        observation_key: NestedKey = "observation",
        input_spec: TensorSpec | Space | None = None,
        duration: int | None = None,
        input_ends: bool = True,
        **options: Unpack[LearningOptions],
    ) -> None:
        observation_space, action_space = spaces_of(observation_space, action_space, env)
        check_flag("input_ends", input_ends)
        if input_spec is None and not input_ends:
            raise ValueError(
                "input_ends is for an input from above, which needs an input_spec; "
                "pass input_spec=, or leave input_ends out"
            )
        options = {"n_initial_random_steps": 1000, **options}
        super().__init__(input_spec=input_spec, duration=duration, n_axes=1, **options)
        sampler = None if self.buffer is None else self.buffer.sampler
        if isinstance(sampler, PrioritizedSampler | SliceSampler):
            raise ValueError(
                f"buffer has a {type(sampler).__name__}, but a {self.name} learns from single "
                "transitions and updates no priorities; use a RandomSampler"
            )
        check_callable("learner_factory", learner_factory, factory=True)
        self.learner_factory = learner_factory
        self.input_ends = input_ends
        self.observation_key = unravel_key(observation_key)
        if env is not None:
            self.action_key, self.reward_key = env.action_key, env.reward_key
            self.done_key, self.terminated_key = end_keys(env)
        if observation_space is not None:
            self.setup(observation_space, action_space)

    def _build(self, observation_space: ObservationSpace, action_spec: TensorSpec) -> None:
        if isinstance(observation_space, Composite):
            if self.observation_key not in observation_space.keys(True):
                raise KeyError(
                    f"{self.name} reads {self.observation_key!r}, but the environment observes "
                    f"{own_entries(observation_space)}; pass observation_key=, or join them by "
                    "TorchRL's CatTensors"
                )
            observation_space = observation_space[self.observation_key]
        spec = to_spec(observation_space, name="observation_space")
        if is_discrete(spec):
            raise TypeError(
                f"observation_space is {spec}, expected a vector of floats; cast choices to "
                "one-hot floats in the environment (DTypeCastTransform)"
            )
        self.observation_dim = width(spec)
        features = InputFeatures(self.observation_dim, self.input_spec, self.duration)
        learner = self.learner_factory(features.dim, action_spec)
        hint = "pass partial(SACLearner, ...), or a function that returns a LossLearner"
        check_instance("the result of learner_factory", learner, Learner, hint=hint)
        try_out(learner, features.dim, action_spec)
        self.features, self.learner = features, learner
        self.random_actions, self.reward_scale = RandomActions(action_spec), RewardScale()

    @property
    def optim(self) -> torch.optim.Optimizer | None:
        """The learner's optimizer; ``RuntimeError`` before :meth:`setup`, ``None`` in a copy."""
        self.action_spec  # noqa: B018 - raises
        return self.learner.optim

    # -- acting -----------------------------------------------------------------------------

    @watched
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action for ``[*B]``.

        Raises:
            KeyError: The observation or the input from above is missing.
            TypeError, ValueError: Observations or inputs of another width or kind, or not finite;
                masked actions.
            RuntimeError: Before :meth:`setup`.
        """
        self.action_spec  # noqa: B018 - raises
        read = [require(tensordict, k, reader=self.name, hint=_HINT) for k in self.in_keys]
        refuse_mask(tensordict, self.action_key)
        self._check_read(*read[:2])
        batch, device = read[0].shape[:-1], read[0].device
        random = self.explores and self.warming_up
        if random is True:
            action = self.random_actions(batch).to(device)
        else:
            action = self.learner.act(self._features(*read), explore=self.explores)
        if isinstance(random, Tensor):
            action = torch.where(random, self.random_actions(batch).to(device), action)
        return tensordict.set(self.action_key, action)

    def _check_read(self, observation: Tensor, given: Tensor | None = None) -> None:
        """Raise unless observation and input fit the level's spaces."""
        key, hint = str(self.observation_key), "repair it in the environment"
        check_width(key, observation, self.observation_dim, hint=hint)
        check_finite(key, observation, hint=hint)
        if given is not None and self.input_spec is not None and not is_discrete(self.input_spec):
            hint = "it is the action of the level above"
            check_width(str(self.input_key), given, width(self.input_spec), hint=hint)
            check_finite(str(self.input_key), given, hint=hint)

    def _features(
        self, observation: Tensor, given: Tensor | None = None, n_actions: Tensor | None = None
    ) -> Tensor:
        features: Tensor = self.features(observation, given, n_actions)
        return features

    # -- learning ---------------------------------------------------------------------------

    @property
    def stored_keys(self) -> tuple[list[NestedKey], list[NestedKey]]:
        """Keys that the networks read, and keys of the ends of transitions."""
        done = ["terminated", "done"]
        if self.input_spec is not None and self.input_ends:
            done.append("input_done")
        ends = [("next", key) for key in done]
        following = unravel_key(("next", self.observation_key))
        keys = [*self.in_keys, self.action_key, following, self.next_reward_key, *ends]
        if self._counts_ahead:
            keys.append(_NEXT_COUNT)
        return [*keys, *self.record.keys(True, True)], []

    def _checked(self, data: TensorDictBase) -> TensorDictBase:
        """Return ``data`` with one axis."""
        rows = data.reshape(-1)
        required, _ = self.stored_keys
        flags = [("next", key) for key in ("terminated", "done", "input_done")]
        check_flags(rows, [key for key in flags if key in required], self.name, _HINT)
        check_observations(rows, self.observation_key, self.observation_dim, self.name, _HINT)
        rows = with_known_ends(rows, self.observation_key, self.name)
        check_numbers(rows, required, self.name, _HINT)
        floats = self.features.normalizer.loc.dtype
        check_resolution(str(self.observation_key), rows.get(self.observation_key), floats)
        check_width(str(self.next_reward_key), rows.get(self.next_reward_key), 1, hint="[*B, 1]")
        action = rows.get(self.action_key)
        check_choice(str(self.action_key), self.action_spec, action, rows.shape)
        if self.input_spec is not None:
            given = rows.get(self.input_key)
            check_choice(str(self.input_key), self.input_spec, given, rows.shape)
        return rows

    def _observe(self, data: TensorDictBase) -> None:
        if self.buffer is not None:
            # The first time include rows that were stored before, such as demonstrations.
            n = len(data) if int(self.features.n_seen) else None
            data = newest(self.buffer, data, n)
        data = data.to(self.features.mean.device)
        self.features.observe(*self._arguments(data))
        if self.scales_rewards:
            ended = data.get(("next", "terminated"))
            if self.input_ends and self.input_spec is not None:
                ended = ended | data.get(("next", "input_done"))
            self.reward_scale.observe(data.get(self.next_reward_key), ended)

    def _sampled(self, data: TensorDictBase) -> TensorDictBase:
        """Prepare sampled transitions ``[N]`` for learning; a hook that does nothing by default."""
        return data

    def _sampled_terms(self) -> dict[str, float]:
        """Return terms about the sampled data; a hook, by default there are none."""
        return {}

    def _arguments(self, data: TensorDictBase) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the entries of transitions ``[N]`` from which features are computed."""
        observation: Tensor = data.get(self.observation_key)
        if self.input_spec is None:
            return observation, None, None
        return observation, data.get(self.input_key), data.get("n_actions")

    def _update(self, buffer: ReplayBuffer, n_updates: int) -> dict[str, float]:
        totals: dict[str, Tensor] = {}
        counts: Counter[str] = Counter()
        own_name = self.logs_as or self.name
        bar = own_name if self.progress else None
        batches: list[TensorDictBase] = []
        self.learner.begin(int(self.n_env_steps))
        for i in updates(n_updates, totals, counts, bar=bar):
            if not batches:
                n = min(_N_AHEAD, n_updates - i)
                drawn = buffer.sample(n * self.batch_size)
                if isinstance(buffer, HERReplayBuffer):
                    # It relabels the first rows of the draw; every batch should get some of them.
                    drawn = drawn[torch.randperm(len(drawn), device=drawn.device)]
                batches = list(self._prepare(drawn).split(self.batch_size))
            terms = self.learner.update(batches.pop())
            for name, value in terms.items():
                totals[name] = totals[name] + value if name in totals else value
            counts.update(terms.keys())
        flush()
        info = {name: float(total) / counts[name] for name, total in totals.items()}
        info |= self._sampled_terms()
        log_terms(self.logger, own_name, info, int(self.n_env_steps))
        return info | {"n_updates": float(n_updates)}

    @torch.no_grad()
    def _prepare(self, data: TensorDictBase) -> TensorDict:
        """Return the inputs of the loss for transitions ``[N]``."""
        data = self._sampled(data.to(self.features.mean.device))
        observation, given, n_actions = self._arguments(data)
        following = data.get(unravel_key(("next", self.observation_key)))
        terminated = data.get(("next", "terminated"))
        n_next = None
        if n_actions is not None:
            n_next, ended = self._counted(data)
            if self.input_ends:
                # A time limit in the middle of an input does not end the input.
                done = data.get(("next", "done"))
                terminated = terminated | (data.get(("next", "input_done")) & (ended | ~done))
            else:
                n_next = n_next.masked_fill(ended, 0)
        after = {
            "features": self._features(following, given, n_next),
            "reward": self.reward_scale(data.get(self.next_reward_key)),
            "terminated": terminated,
            "done": data.get(("next", "done")) | terminated,
        }
        features = self._features(observation, given, n_actions)
        action = self.learner.prepare(data.get(self.action_key))
        if action.is_floating_point():  # networks concatenate it with the features
            action = action.to(features.dtype)
        now = {"features": features, "action": action}
        return TensorDict({**now, "next": TensorDict(after, data.batch_size)}, data.batch_size)

    @property
    def _counts_ahead(self) -> bool:
        """Whether transitions may be shorter than an action, and so store the next count."""
        return self.each_step and self.input_spec is not None

    def _counted(self, data: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Return the number of actions on the input at the end of transitions ``[N]``.

        Also return whether an action ends there and the level hands control back; both ``[N, 1]``.
        """
        given, n_actions = data.get(self.input_key), data.get("n_actions")
        following = data.get(unravel_key(("next", self.observation_key)))
        n_next: Tensor = data.get(_NEXT_COUNT) if self._counts_ahead else n_actions + 1
        record = {key: data.get(key) for key in self.record.keys(True, True)}
        ended = self._input_ended(following, given, n_next, record)
        return n_next, ended & (n_next > n_actions)

    def _input_ended(
        self,
        observation: Tensor,
        given: Tensor | None,
        n_actions: Tensor,
        record: dict[NestedKey, Tensor],
    ) -> Tensor:
        """Return after which transitions control goes back up, bool ``[N, 1]``."""
        asked = {self.observation_key: observation, self.input_key: given, "n_actions": n_actions}
        return self.hands_back(TensorDict(asked | record, observation.shape[:-1]))
