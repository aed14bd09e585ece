"""Model-based and hierarchical reinforcement learning parts for TorchRL."""

from pathlib import Path as _Path

# On disk the tasks lie in envs/ beside this package; installed, they are layeredrl_torchrl.envs.
# Run from a checkout that is not installed, the second name has to lead to the first place.
_here = _Path(__file__).parent
if not (_here / "envs").is_dir() and (_here.parent / "envs" / "__init__.py").is_file():
    __path__.append(str(_here.parent))

from layeredrl_torchrl.imagination import PredictorEnv  # noqa: E402
from layeredrl_torchrl.models import GaussianMixture, Model, ProbabilisticEnsemble  # noqa: E402
from layeredrl_torchrl.nets import (  # noqa: E402
    Encoder,
    EncoderNet,
    FixedEncoderNet,
    IdentityEncoder,
    Normalizer,
    ProbFCDynamics,
    RewardNet,
    ScalarHead,
    ValueNet,
)
from layeredrl_torchrl.objectives import (  # noqa: E402
    BootstrappedBatches,
    MemberBatches,
    ModelLoss,
    OwnBatches,
    PartitionedBatch,
    PredictorLoss,
    SharedBatch,
    TransitionSlices,
    n_step_targets,
)
from layeredrl_torchrl.predictors import Predictor, RewardPredictor, StaticPredictor  # noqa: E402
from layeredrl_torchrl.specs import to_spec  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "BootstrappedBatches",
    "Encoder",
    "EncoderNet",
    "FixedEncoderNet",
    "GaussianMixture",
    "IdentityEncoder",
    "MemberBatches",
    "Model",
    "ModelLoss",
    "Normalizer",
    "OwnBatches",
    "PartitionedBatch",
    "Predictor",
    "PredictorEnv",
    "PredictorLoss",
    "ProbFCDynamics",
    "ProbabilisticEnsemble",
    "RewardNet",
    "RewardPredictor",
    "ScalarHead",
    "SharedBatch",
    "StaticPredictor",
    "TransitionSlices",
    "ValueNet",
    "n_step_targets",
    "to_spec",
]
