"""A level that discovers skills without any reward from the environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, TensorSpec

from layeredrl_torchrl._checks import check_instance
from layeredrl_torchrl.levels._learning import LearningOptions
from layeredrl_torchrl.levels.learners import Learner
from layeredrl_torchrl.levels.model_free import ModelFreeLevel
from layeredrl_torchrl.levels.skills_rewards import SkillReward
from layeredrl_torchrl.predictors import Predictor
from layeredrl_torchrl.specs import Space, is_discrete, to_spec

__all__ = ["SkillLevel"]


class SkillLevel(ModelFreeLevel):
    """Learns skills that the level above can predict and tell apart.

    It does not use the environment's reward. A skill is rewarded, by the predictor of the level
    above, for outcomes that other skills would not have had. That reward changes as the predictor
    learns, so it is computed anew whenever transitions are sampled. Use the hierarchy's observation
    map to hide what a skill must not depend on, such as the goal of the task.

    >>> skills = SkillLevel(
    ...     input_spec=Bounded(-1.0, 1.0, (2,)),
    ...     duration=10,
    ...     skill_reward=SPlaTESReward(state_dims=[0, 1]),
    ...     learner_factory=SACLearner,
    ... )
    >>> skills.duration
    10

    Args:
        input_spec: Spec (or gymnasium space) of a skill, bounded or of choices. The prior of skills
            is uniform over it.
        duration: Own actions in a skill.
        skill_reward: :class:`~layeredrl_torchrl.SPlaTESReward` or
            :class:`~layeredrl_torchrl.DADSReward`.
        learner_factory: See :class:`~layeredrl_torchrl.ModelFreeLevel`.
        **options: Those of :class:`LearningLevel`, without ``reward_func``.

    Raises:
        TypeError, ValueError: As :class:`~layeredrl_torchrl.ModelFreeLevel`; a ``skill_reward`` of
            another kind; skills without bounds.
    """

    scales_rewards = False  # nats need no unit

    def __init__(
        self,
        *,
        input_spec: TensorSpec | Space,
        duration: int,
        skill_reward: SkillReward,
        learner_factory: Callable[[int, TensorSpec], Learner],
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
        self.skill_reward = skill_reward
        self.parent_each_step = skill_reward.each_step

    def attach(self, parent_predictor: Predictor | None) -> None:
        """Give the level access to the predictor that tells skills apart; see :meth:`Level.attach`.

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

    def rate(self, observation: Tensor, skill: Tensor, next_observation: Tensor) -> Tensor:
        """Return the current reward ``[N]`` of skills, in nats.

        Args:
            observation: ``[N, obs]`` of the level above, where the predictor's step begins.
            skill: ``[N, Z]``, or discrete ``[N]``.
            next_observation: ``[N, obs]``, where it ends.
        """
        reward: Tensor = self.skill_reward(
            self.parent_predictor,
            self.input_spec,
            observation,
            skill,
            next_observation,
            int(self.n_env_steps),
        )
        return reward

    @property
    def stored_keys(self) -> tuple[list[NestedKey], list[NestedKey]]:
        """Add the observations of the level above."""
        required, optional = super().stored_keys
        return [*required, "parent_observation", ("next", "parent_observation")], optional

    def _sampled(self, data: TensorDictBase) -> TensorDictBase:
        """Replace the reward of sampled transitions ``[N]``."""
        key = self.next_reward_key
        n_actions: Tensor = data.get("n_actions")
        reward = torch.zeros_like(data.get(key))
        pays: Tensor = self.skill_reward.pays(n_actions, self.duration or 1)
        paid = pays.squeeze(-1).nonzero().squeeze(-1)
        if len(paid):
            read = ("parent_observation", self.input_key, ("next", "parent_observation"))
            value = self.rate(*(data.get(k)[paid] for k in read))
            reward[paid] = value.unsqueeze(-1).to(reward)
        return data.set(key, reward)
