"""Model-based and hierarchical reinforcement learning parts for TorchRL."""

from pathlib import Path as _Path

# On disk the tasks are in envs/, next to this package; installed, they are layeredrl_torchrl.envs.
# In a checkout that is not installed, this name must also lead to envs/.
_here = _Path(__file__).parent
if not (_here / "envs").is_dir() and (_here.parent / "envs" / "__init__.py").is_file():
    __path__.append(str(_here.parent))

from layeredrl_torchrl.checkpoints import (  # noqa: E402
    CollectorState,
    SafeCheckpoint,
    SafeRotation,
)
from layeredrl_torchrl.envs import (  # noqa: E402
    TASKS,
    Task,
    get_task,
    make_batched,
    point_maze,
)
from layeredrl_torchrl.hierarchies import Hierarchy  # noqa: E402
from layeredrl_torchrl.imagination import (  # noqa: E402
    FromBuffer,
    PredictorEnv,
    ValueGradientLoss,
)
from layeredrl_torchrl.levels import (  # noqa: E402
    ActionSequenceLevel,
    ConstantLevel,
    DADSReward,
    DQNLearner,
    Level,
    ModelFreeLevel,
    PlannerLevel,
    RandomLevel,
    SACLearner,
    SkillLevel,
    SPlaTESReward,
)
from layeredrl_torchrl.models import (  # noqa: E402
    TS1,
    EnsembleDisagreement,
    Expectation,
    Model,
    ProbabilisticEnsemble,
    Propagation,
    TSInfinity,
)
from layeredrl_torchrl.nets import (  # noqa: E402
    Encoder,
    EncoderNet,
    FixedEncoderNet,
    IdentityEncoder,
    ProbFCDynamics,
    RewardNet,
    ScalarHead,
    ValueNet,
    reads_next_state,
)
from layeredrl_torchrl.objectives import (  # noqa: E402
    BootstrappedBatches,
    ModelLoss,
    PredictorLoss,
    SharedBatch,
    TermsLoss,
    TransitionSlices,
)
from layeredrl_torchrl.optimizers import (  # noqa: E402
    CEM,
    ICEM,
    MPPI,
    Optimizer,
    make_search,
)
from layeredrl_torchrl.planners import (  # noqa: E402
    CEMPlanner,
    CVaR,
    ICEMPlanner,
    MPPIPlanner,
    PolicyProposal,
    PredictorPlanner,
    WorstCase,
    best_plan,
    mean_plan,
)
from layeredrl_torchrl.predictors import (  # noqa: E402
    EarlyStopping,
    ModelTraining,
    Predictor,
    PredictorFactory,
    RewardPredictor,
    StaticPredictor,
    get_default_predictor_factory,
)
from layeredrl_torchrl.specs import to_spec  # noqa: E402
from layeredrl_torchrl.transforms import (  # noqa: E402
    AffineReward,
    Angle,
    FlipTermination,
    JoinGoals,
    LogReward,
    QuaternionTilt,
    SuccessRate,
    sum_rewards,
)

__version__ = "0.1.0"

__all__ = [
    "CEM",
    "ICEM",
    "MPPI",
    "TASKS",
    "TS1",
    "ActionSequenceLevel",
    "AffineReward",
    "Angle",
    "BootstrappedBatches",
    "CEMPlanner",
    "CVaR",
    "CollectorState",
    "ConstantLevel",
    "DADSReward",
    "DQNLearner",
    "EarlyStopping",
    "Encoder",
    "EncoderNet",
    "EnsembleDisagreement",
    "Expectation",
    "FixedEncoderNet",
    "FlipTermination",
    "FromBuffer",
    "Hierarchy",
    "ICEMPlanner",
    "IdentityEncoder",
    "JoinGoals",
    "Level",
    "LogReward",
    "MPPIPlanner",
    "Model",
    "ModelFreeLevel",
    "ModelLoss",
    "ModelTraining",
    "Optimizer",
    "PlannerLevel",
    "PolicyProposal",
    "Predictor",
    "PredictorEnv",
    "PredictorFactory",
    "PredictorLoss",
    "PredictorPlanner",
    "ProbFCDynamics",
    "ProbabilisticEnsemble",
    "Propagation",
    "QuaternionTilt",
    "RandomLevel",
    "RewardNet",
    "RewardPredictor",
    "SACLearner",
    "SPlaTESReward",
    "SafeCheckpoint",
    "SafeRotation",
    "ScalarHead",
    "SharedBatch",
    "SkillLevel",
    "StaticPredictor",
    "SuccessRate",
    "TSInfinity",
    "Task",
    "TermsLoss",
    "TransitionSlices",
    "ValueGradientLoss",
    "ValueNet",
    "WorstCase",
    "best_plan",
    "get_default_predictor_factory",
    "get_task",
    "make_batched",
    "make_search",
    "mean_plan",
    "point_maze",
    "reads_next_state",
    "sum_rewards",
    "to_spec",
]
