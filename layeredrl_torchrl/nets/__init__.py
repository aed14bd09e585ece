"""Networks and encoders."""

from layeredrl_torchrl.nets.dynamics import MemberOutput, ProbFCDynamics, StackedProbFCDynamics
from layeredrl_torchrl.nets.encoders import Encoder, EncoderNet, FixedEncoderNet, IdentityEncoder
from layeredrl_torchrl.nets.heads import RewardNet, ScalarHead, ValueNet
from layeredrl_torchrl.nets.normalizer import Normalizer

__all__ = [
    "Encoder",
    "EncoderNet",
    "FixedEncoderNet",
    "IdentityEncoder",
    "MemberOutput",
    "Normalizer",
    "ProbFCDynamics",
    "RewardNet",
    "ScalarHead",
    "StackedProbFCDynamics",
    "ValueNet",
]
