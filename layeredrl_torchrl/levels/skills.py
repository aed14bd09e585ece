"""A level that discovers skills without any reward from the environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchrl.data import Bounded, TensorSpec

from layeredrl_torchrl.levels.learners import Learner
from layeredrl_torchrl.levels.model_free import ModelFreeLevel
from layeredrl_torchrl.levels.skills_rewards import SkillReward
from layeredrl_torchrl.predictors import Predictor
from layeredrl_torchrl.specs import Space, is_discrete, to_spec

__all__ = ["SkillLevel"]


class SkillLevel(ModelFreeLevel):
    """Learns skills that the level above can predict and tell apart.

    The environment's reward plays no part in it: what it is paid for is that, by the predictor of
    the level above, what a skill does is unlike what other skills would have done. That reward
    changes as the predictor learns, so it is worked out whenever transitions are sampled. What a
    skill must not depend on, such as the goal of the task, the hierarchy's observation map hides.

    >>> skills = SkillLevel(
    ...     input_spec=Bounded(-1.0, 1.0, (2,)),
    ...     duration=10,
    ...     skill_reward=SPlaTESReward(state_dims=[0, 1]),
    ...     learner_factory=SACLearner,
    ... )
    >>> skills.duration
    10

    Args:
        input_spec: Spec (or gymnasium space) of a skill; its prior is drawn from it. Bounded, or
            choices.
        duration: Own actions in a skill.
        skill_reward: :class:`~layeredrl_torchrl.SPlaTESReward` or
            :class:`~layeredrl_torchrl.DADSReward`; one for each level.
        learner_factory: As all that follows, see :class:`~layeredrl_torchrl.ModelFreeLevel`.
        **options: Further arguments of it; ``transform`` and ``reward_func`` are not among them.

    Raises:
        TypeError, ValueError: As there; a ``skill_reward`` of another kind or of another level;
            skills without bounds.
    """

    def __init__(
        self,
        *,
        input_spec: TensorSpec | Space,
        duration: int,
        skill_reward: SkillReward,
        learner_factory: Callable[[int, TensorSpec], Learner],
        **options: Any,
    ) -> None:
        if not isinstance(skill_reward, SkillReward):
            raise TypeError(
                f"skill_reward must be a SkillReward, got {type(skill_reward).__name__}; pass "
                "SPlaTESReward() or DADSReward()"
            )
        for name in ("transform", "reward_func"):
            if name in options:
                raise TypeError(
                    f"a SkillLevel takes no {name}: its reward is skill_reward's; use a "
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
            input_spec=spec,
            duration=duration,
            learner_factory=learner_factory,
            transform=skill_reward,
            **options,
        )
        skill_reward.bind(self)
        self.skill_reward = skill_reward
        self.parent_each_step = skill_reward.each_step

    def attach(self, parent_predictor: Predictor | None) -> None:
        """As :meth:`Level.attach`; the predictor is what skills are told apart by.

        Raises:
            TypeError, ValueError: None, or one that cannot tell skills apart; see ``skill_reward``.
        """
        if parent_predictor is None:
            raise ValueError(
                f"{self.name} learns by the predictor of the level above, but that has none; put "
                "a PlannerLevel above it"
            )
        self.skill_reward.attach(parent_predictor)
        super().attach(parent_predictor)
