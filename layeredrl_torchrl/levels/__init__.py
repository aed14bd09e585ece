"""Levels: policies, each of one time scale, that learn from their own transitions."""

from layeredrl_torchrl import _exit  # noqa: F401 - lets processes with collectors end
from layeredrl_torchrl.levels._learning import LearningLevel
from layeredrl_torchrl.levels.dqn import DQNLearner
from layeredrl_torchrl.levels.fixed import ActionSequenceLevel, ConstantLevel, RandomLevel
from layeredrl_torchrl.levels.learners import Learner
from layeredrl_torchrl.levels.level import Level
from layeredrl_torchrl.levels.loss_learner import LossLearner
from layeredrl_torchrl.levels.model_free import ModelFreeLevel
from layeredrl_torchrl.levels.planner import Planner
from layeredrl_torchrl.levels.planner_level import PlannerLevel
from layeredrl_torchrl.levels.sac import SACLearner
from layeredrl_torchrl.levels.skills import SkillLevel
from layeredrl_torchrl.levels.skills_rewards import DADSReward, SkillReward, SPlaTESReward
from layeredrl_torchrl.levels.trainer_hook import LevelHook

__all__ = [
    "ActionSequenceLevel",
    "ConstantLevel",
    "DADSReward",
    "DQNLearner",
    "Learner",
    "LearningLevel",
    "Level",
    "LevelHook",
    "LossLearner",
    "ModelFreeLevel",
    "Planner",
    "PlannerLevel",
    "RandomLevel",
    "SACLearner",
    "SPlaTESReward",
    "SkillLevel",
    "SkillReward",
]
