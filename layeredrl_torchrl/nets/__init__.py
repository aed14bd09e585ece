"""Networks and encoders."""

from layeredrl_torchrl.nets._averaging import move_towards
from layeredrl_torchrl.nets._gaussians import LogStdBounds, MemberOutput
from layeredrl_torchrl.nets._stacked import (
    StackedProbFCDynamics,
    hidden_layers,
    product,
    stackable,
)
from layeredrl_torchrl.nets.actor_critic import QValueNet, QValueOperator, TanhActor
from layeredrl_torchrl.nets.dynamics import ProbFCDynamics
from layeredrl_torchrl.nets.encoders import (
    Encoder,
    EncoderNet,
    FixedEncoderNet,
    IdentityEncoder,
    ObservationShape,
)
from layeredrl_torchrl.nets.functions import (
    StepFunction,
    check_step_function,
    needs_next_state,
    on_step,
    reads_next_state,
    refuse_next_state,
)
from layeredrl_torchrl.nets.heads import RewardNet, ScalarHead, ValueNet
from layeredrl_torchrl.nets.landmarks import Landmarks
from layeredrl_torchrl.nets.module_encoder import ModuleEncoder, SimNorm
from layeredrl_torchrl.nets.normalizer import Normalizer
from layeredrl_torchrl.nets.squashed_normal import Bounds, SquashedNormal

__all__ = [
    "Bounds",
    "Encoder",
    "EncoderNet",
    "FixedEncoderNet",
    "IdentityEncoder",
    "Landmarks",
    "LogStdBounds",
    "MemberOutput",
    "ModuleEncoder",
    "Normalizer",
    "ObservationShape",
    "ProbFCDynamics",
    "QValueNet",
    "QValueOperator",
    "RewardNet",
    "ScalarHead",
    "SimNorm",
    "SquashedNormal",
    "StackedProbFCDynamics",
    "StepFunction",
    "TanhActor",
    "ValueNet",
    "check_step_function",
    "hidden_layers",
    "move_towards",
    "needs_next_state",
    "on_step",
    "product",
    "reads_next_state",
    "refuse_next_state",
    "stackable",
]
