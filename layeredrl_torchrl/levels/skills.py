"""A level that discovers skills without the environment's reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Composite, ReplayBuffer, TensorSpec

from layeredrl_torchrl._checks import check_instance, check_number
from layeredrl_torchrl.levels._learning import LearningOptions
from layeredrl_torchrl.levels.learners import Learner
from layeredrl_torchrl.levels.model_free import ModelFreeLevel
from layeredrl_torchrl.levels.skills_rewards import SkillReward
from layeredrl_torchrl.predictors import Predictor
from layeredrl_torchrl.specs import Space, is_discrete, to_spec

__all__ = ["SkillLevel"]


class SkillLevel(ModelFreeLevel):
    """Learns skills that the level above can predict and tell apart.

    It does not use the environment's reward. The predictor of the level above rewards a skill for
    outcomes that other skills would not have had. This reward changes as the predictor learns, so
    it is recomputed whenever transitions are sampled. Use the hierarchy's observation map to hide
    entries on which skills must not depend, such as the goal of the task.

    The terms of :meth:`learn` include ``reward``: the mean reward of its updates over the rewarded
    actions, in nats, before normalisation and offset.

    >>> skills = SkillLevel(
    ...     input_spec=Bounded(-1.0, 1.0, (2,)),
    ...     duration=10,
    ...     skill_reward=SPlaTESReward(state_dims=[0, 1]),
    ...     learner_factory=SACLearner,
    ... )
    >>> skills.duration
    10

    Args:
        input_spec: Spec (or gymnasium space) of a skill, bounded or discrete. The prior of skills
            is uniform over it.
        duration: Number of actions in a skill.
        skill_reward: :class:`~layeredrl_torchrl.SPlaTESReward` or
            :class:`~layeredrl_torchrl.DADSReward`.
        learner_factory: See :class:`~layeredrl_torchrl.ModelFreeLevel`.
        end_prob: Probability that a skill ends after an action, before its ``duration``; in
            evaluation too, since the level above has learned where such skills lead.
        **options: Options of :class:`LearningLevel`, except ``reward_func``.

    Raises:
        TypeError, ValueError: As :class:`~layeredrl_torchrl.ModelFreeLevel`; a ``skill_reward`` of
            another kind; skills without bounds.
    """

    scales_rewards = False  # nats need no unit
    ended_key: NestedKey = "ended"

    def __init__(
        self,
        *,
        input_spec: TensorSpec | Space,
        duration: int,
        skill_reward: SkillReward,
        learner_factory: Callable[[int, TensorSpec], Learner],
        end_prob: float = 0.0,
        **options: Unpack[LearningOptions],
    ) -> None:
        hint = "pass SPlaTESReward() or DADSReward()"
        check_instance("skill_reward", skill_reward, SkillReward, hint=hint)
        if "reward_func" in options:
            raise TypeError(
                "a SkillLevel takes no reward_func: its reward is skill_reward's; use a "
                "ModelFreeLevel for another"
            )
        spec = to_spec(input_spec, name="input_spec")
        if not is_discrete(spec):
            ends = (spec.space.low, spec.space.high) if isinstance(spec, Bounded) else ()
            if not ends or not all(bool(end.isfinite().all()) for end in ends):
                raise ValueError(
                    f"input_spec is {input_spec}, but the prior of skills is uniform over it; pass "
                    "finite bounds like Bounded(-1.0, 1.0, (2,)), or a OneHot or Categorical spec"
                )
        if duration is None:
            raise ValueError("duration is None, but skills have to end; give a number of actions")
        super().__init__(
            input_spec=spec, duration=duration, learner_factory=learner_factory, **options
        )
        self._end_prob = check_number("end_prob", end_prob, 0.0, 1.0)
        self.skill_reward = skill_reward
        self._rated: list[Tensor] = []  # rewards of the updates of a call
        self.parent_each_step = skill_reward.each_step

    def attach(self, parent_predictor: Predictor | None) -> None:
        """Give the level access to the predictor that rates its skills; see :meth:`Level.attach`.

        Raises:
            TypeError, ValueError: ``None``, or a predictor that the ``skill_reward`` cannot use.
        """
        if parent_predictor is None:
            raise ValueError(
                f"{self.name} learns by the predictor of the level above, but that has none; put "
                "a PlannerLevel above it"
            )
        self.skill_reward.prepare(parent_predictor, self.input_spec)
        super().attach(parent_predictor)

    # -- random ends ------------------------------------------------------------------------

    @property
    def record(self) -> Composite:
        """Spec of the flag that marks the action after which a skill ends at random."""
        if not self._end_prob:
            return Composite()
        return Composite({self.ended_key: Binary(1, dtype=torch.bool)})

    @property
    def ends_by_duration(self) -> bool:
        """See :attr:`Level.ends_by_duration`."""
        own = getattr(self.hands_back, "__func__", None) is not SkillLevel.hands_back
        return not own and not self._end_prob

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action for ``[*B]``, and with ``end_prob`` whether the skill ends with it."""
        super().forward(tensordict)
        if self._end_prob:
            n_actions = tensordict.get("n_actions")
            draw = torch.rand(n_actions.shape, device=n_actions.device)
            tensordict.set(self.ended_key, draw < self._end_prob)
        return tensordict

    def hands_back(self, tensordict: TensorDictBase) -> Tensor:
        """See :meth:`Level.hands_back`; a skill also ends where that was drawn at random."""
        done = super().hands_back(tensordict)
        return done | tensordict.get(self.ended_key) if self._end_prob else done

    # -- learning ---------------------------------------------------------------------------

    def rate(
        self,
        observation: Tensor,
        skill: Tensor,
        next_observation: Tensor,
        since: Tensor | None = None,
    ) -> Tensor:
        """Return the current reward ``[N]`` of skills, in nats, not normalised.

        Args:
            observation: ``[N, obs]`` of the level above, where the predictor's step begins.
            skill: ``[N, Z]``, or discrete ``[N]``.
            next_observation: ``[N, obs]``, where it ends.
            since: ``[N, obs]``; if given, return the difference to the reward for reaching it.
        """
        reward: Tensor = self.skill_reward(
            self.parent_predictor,
            self.input_spec,
            observation,
            skill,
            next_observation,
            int(self.n_env_steps),
            since,
        )
        return reward

    @property
    def stored_keys(self) -> tuple[list[NestedKey], list[NestedKey]]:
        """Add the observations of the level above."""
        required, optional = super().stored_keys
        required += ["parent_observation", ("next", "parent_observation")]
        if self.skill_reward.difference:
            required.append("parent_sees")
        return required, optional

    def _update(self, buffer: ReplayBuffer, n_updates: int) -> dict[str, float]:
        self._rated = []
        return super()._update(buffer, n_updates)

    def _sampled_terms(self) -> dict[str, float]:
        rated, self._rated = self._rated, []
        return {"reward": torch.cat(rated).mean().item()} if rated else {}

    def _sampled(self, data: TensorDictBase) -> TensorDictBase:
        """Replace the reward of sampled transitions ``[N]``."""
        key, reward_of = self.next_reward_key, self.skill_reward
        duration, (_, ended) = self.duration or 1, self._counted(data)
        # Use the level's own rule, which may end skills earlier or later than the duration.
        n_actions = data.get("n_actions").clamp_max(duration - 2)
        n_actions = n_actions.masked_fill(ended, duration - 1)
        reward = torch.zeros_like(data.get(key))
        paid = reward_of.pays(n_actions, duration).squeeze(-1).nonzero().squeeze(-1)
        if len(paid):
            read = ["parent_observation", self.input_key, ("next", "parent_observation")]
            if reward_of.difference:
                read.append("parent_sees")
            value = self.rate(*(data.get(k)[paid] for k in read))
            self._rated.append(value)
            if reward_of.moments is not None:
                reward_of.moments.observe(value)
                value = reward_of.moments(value)
            reward[paid] = value.unsqueeze(-1).to(reward)
        return data.set(key, reward + reward_of.offset)
