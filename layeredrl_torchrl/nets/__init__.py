"""Networks and encoders."""

from layeredrl_torchrl.nets.averaging import move_towards
from layeredrl_torchrl.nets.dynamics import ProbFCDynamics
from layeredrl_torchrl.nets.encoders import Encoder, EncoderNet, FixedEncoderNet, IdentityEncoder
from layeredrl_torchrl.nets.gaussians import LogStdBounds, MemberOutput
from layeredrl_torchrl.nets.heads import RewardNet, ScalarHead, ValueNet
from layeredrl_torchrl.nets.normalizer import Normalizer
from layeredrl_torchrl.nets.stacked import StackedProbFCDynamics, hidden_layers, product

__all__ = [
    "Encoder",
    "EncoderNet",
    "FixedEncoderNet",
    "IdentityEncoder",
    "LogStdBounds",
    "MemberOutput",
    "Normalizer",
    "ProbFCDynamics",
    "RewardNet",
    "ScalarHead",
    "StackedProbFCDynamics",
    "ValueNet",
    "hidden_layers",
    "move_towards",
    "product",
]
