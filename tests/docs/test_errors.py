"""The manual's table of first errors: each message is what the mistake beside it leads to."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    LazyTensorStorage,
    TensorDictReplayBuffer,
    Unbounded,
)

from layeredrl_torchrl import (
    EnsembleDisagreement,
    ICEMPlanner,
    IdentityEncoder,
    PlannerLevel,
    PredictorEnv,
    PredictorFactory,
    ProbabilisticEnsemble,
    StaticPredictor,
    get_task,
)

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
STATE, ACTION = Unbounded((3,)), Bounded(-1.0, 1.0, (1,))
FACTORY = PredictorFactory(hidden_sizes=(8,), n_models=2)
OBS, ACT = torch.zeros(4, 3), torch.zeros(4, 1)


class ZeroStd(nn.Module):
    def __init__(self, *spaces):
        super().__init__()

    def forward(self, state, context, action):
        mean = state.unsqueeze(-2)
        return (mean, 0 * mean), torch.ones_like(mean[..., 0]), torch.zeros_like(state[..., 0])


def predictor():
    return FACTORY(STATE, ACTION)


def buffer(*left_out):
    no = torch.zeros(4, 1, dtype=torch.bool)
    after = {"observation": OBS, "reward": ACT, "terminated": no, "done": no}
    data = TensorDict({"observation": OBS, "action": ACT, "next": after}, [4])
    storage = TensorDictReplayBuffer(storage=LazyTensorStorage(10))
    storage.extend(data.exclude(*left_out))
    return storage


def level():
    return PlannerLevel(
        STATE,
        ACTION,
        predictor_factory=FACTORY,
        planner_factory=partial(ICEMPlanner, horizon=2),
        buffer=TensorDictReplayBuffer(storage=LazyTensorStorage(10)),
    )


def without_value():
    return StaticPredictor(
        predictor().model, None, lambda s, c, a: s[..., 0], IdentityEncoder((3,)), 3
    )


MISTAKES = {
    "only flat observations [obs] are supported": lambda: IdentityEncoder((3, 64, 64)),
    "pass the space of a single environment": lambda: FACTORY(Unbounded((8, 3)), ACTION),
    "expected a Box (or TorchRL spec) of floats": lambda: FACTORY(Categorical(5), ACTION),
    "join them by TorchRL's CatTensors": lambda: FACTORY(Composite(a=STATE, b=STATE), ACTION),
    "has no bounds; samples need a range": lambda: ICEMPlanner(FACTORY(STATE, Unbounded((1,)))),
    "was built for observations of": lambda: predictor().predict(OBS[:, :2], ACT),
    "rew_func gave shape": lambda: StaticPredictor(
        predictor().model, None, lambda s, c, a: s[..., :1], IdentityEncoder((3,)), 3
    ).predict(OBS, ACT),
    "write @reads_next_state above it": lambda: StaticPredictor(
        predictor().model, None, lambda s, c, a, next_state: s[..., 0], IdentityEncoder((3,)), 3
    ),
    "NaN or outside [0, 1]": lambda: StaticPredictor(
        *(predictor().model, None, lambda s, c, a: s[..., 0], IdentityEncoder((3,)), 3),
        term_func=lambda s, c, a: s[..., 0] - 3.0,
    ).predict(OBS, ACT),
    "the three must be equal": lambda: StaticPredictor(
        predictor().model, None, None, IdentityEncoder((4,)), 4
    ),
    "is outside the action space": lambda: predictor().predict(OBS, ACT + 2),
    "non-finite values": lambda: predictor().predict(OBS / 0, ACT),
    "the planner reads 'planner', which is missing": lambda: ICEMPlanner(predictor())(
        TensorDict({"observation": OBS}, [4])
    ),
    "the following inputs are None: {'observation'}": lambda: PredictorEnv(
        predictor(), batch_size=[4]
    ).rollout(2, TensorDictModule(nn.Linear(3, 1), ["observation"], ["action"])),
    "got an empty one, expected transitions": lambda: predictor().learn(
        TensorDictReplayBuffer(storage=LazyTensorStorage(10)), 1, 2, 2, 0
    ),
    "RewardPredictor.learn reads ('next', 'reward'), which is missing": lambda: predictor().learn(
        buffer(("next", "reward")), 1, 2, 2, 4
    ),
    "data must be a TensorDict of transitions": lambda: level().learn(None),
    "but the buffer stores 1 axes": lambda: level().learn(torch.stack([buffer()[:]] * 2)),
    "needs a predictor with a val_func": lambda: ICEMPlanner(without_value(), use_value_func=True),
    "change elite_ratio": lambda: ICEMPlanner(predictor(), n_samples=10),
    "an ensemble of 1 cannot disagree": lambda: EnsembleDisagreement(
        ProbabilisticEnsemble(STATE, None, ACTION, n_models=1)
    ),
    "it must be positive": lambda: ProbabilisticEnsemble(STATE, None, ACTION, ZeroStd),
    "the saved state does not fit": lambda: predictor().load_state_dict(
        PredictorFactory(hidden_sizes=(9,), n_models=2)(STATE, ACTION).state_dict()
    ),
    "no task is called": lambda: get_task("Halfcheetah"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_lead_to_these_messages(message):
    with pytest.raises((KeyError, TypeError, ValueError)) as error:
        MISTAKES[message]()
    assert message in error.value.args[0]


def test_the_table_has_these_messages():
    rows = re.findall(r"^\| `(.*?)` \|", PAGE.read_text(), re.MULTILINE)
    assert rows == list(MISTAKES)
