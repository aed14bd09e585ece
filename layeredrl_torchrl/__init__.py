"""Model-based and hierarchical reinforcement learning parts for TorchRL."""

from pathlib import Path as _Path

# On disk the tasks lie in envs/ beside this package; installed, they are layeredrl_torchrl.envs.
# Run from a checkout that is not installed, the second name has to lead to the first place.
_here = _Path(__file__).parent
if not (_here / "envs").is_dir() and (_here.parent / "envs" / "__init__.py").is_file():
    __path__.append(str(_here.parent))

from layeredrl_torchrl.imagination import PredictorEnv  # noqa: E402
from layeredrl_torchrl.models import (  # noqa: E402
    TS1,
    EnsembleDisagreement,
    Expectation,
    GaussianMixture,
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
from layeredrl_torchrl.predictors import (  # noqa: E402
    DeltaStandardizer,
    EarlyStopping,
    Predictor,
    PredictorFactory,
    RewardPredictor,
    StaticPredictor,
    get_default_predictor_factory,
)
from layeredrl_torchrl.specs import to_spec  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "TS1",
    "BootstrappedBatches",
    "DeltaStandardizer",
    "EarlyStopping",
    "Encoder",
    "EncoderNet",
    "EnsembleDisagreement",
    "Expectation",
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
    "PredictorFactory",
    "PredictorLoss",
    "ProbFCDynamics",
    "ProbabilisticEnsemble",
    "Propagation",
    "RewardNet",
    "RewardPredictor",
    "ScalarHead",
    "SharedBatch",
    "StaticPredictor",
    "TSInfinity",
    "TransitionSlices",
    "ValueNet",
    "get_default_predictor_factory",
    "n_step_targets",
    "to_spec",
]
