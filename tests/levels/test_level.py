"""What all levels share, and those that do not learn."""

from __future__ import annotations

from functools import partial

import gymnasium as gym
import pytest
import torch
from helpers import make_predictor
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from layeredrl_torchrl import ActionSequenceLevel, ConstantLevel, Level, RandomLevel, get_task

OBS, BOX = Unbounded((2,)), Bounded(-2.0, 3.0, (2,))


class Constant(Level):
    """The smallest level: always the same action, and nothing to learn."""

    def __init__(self, action_space, **options):
        super().__init__(**options)
        self.setup(Unbounded((2,)), action_space)

    def forward(self, tensordict):
        action = self.action_spec.zero(tensordict.batch_size)
        return tensordict.set("action", action)

    def learn(self, data):
        return {}


def test_a_level_without_a_predictor_has_its_specs_and_nothing_to_learn():
    level = Constant(gym.spaces.Discrete(3), input_spec=OneHot(4))
    assert level.predictor is level.optim is level.parent_predictor is None
    assert level.action_spec.n == 3
    assert level.input_spec == OneHot(4)
    assert level.name == "Constant"
    assert level(TensorDict(batch_size=[5]))["action"].shape == (5,)


def test_a_parent_predictor_is_no_part_of_the_level():
    level, predictor = Constant(Bounded(-1.0, 1.0, (2,))), make_predictor()
    level.attach(predictor)
    assert level.parent_predictor is predictor
    assert not level.state_dict()
    assert not list(level.parameters())
    level.double()
    assert next(predictor.parameters()).dtype == torch.float32
    level.attach(None)
    assert level.parent_predictor is None


# -- levels that do not learn ----------------------------------------------------------------


def setup(level, action_spec):
    level.setup(OBS, action_spec)
    return level


def seen(*batch, **more):
    return TensorDict({"observation": torch.randn(*batch, 2), **more}, batch)


@pytest.mark.parametrize("spec", [BOX, OneHot(3), Categorical(3)])
def test_random_actions_are_of_the_spec(spec):
    level = setup(RandomLevel(), spec)
    for batch in ((), (4,), (2, 3)):
        action = level(seen(*batch))["action"]
        assert action.shape == (*batch, *spec.shape)
        assert spec.is_in(action)
        assert action.dtype == spec.dtype


def test_random_actions_are_uniform_in_evaluation_too():
    level = setup(RandomLevel(), BOX).eval()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = level(seen(4000))["action"]
    # Mean 1/2 and variance 25/12, within four standard errors.
    assert (action.mean(0) - 0.5).abs().max() < 4 * (25 / 12 / 4000) ** 0.5
    assert (action.var(0) - 25 / 12).abs().max() < 4 * ((625 / 80 - (25 / 12) ** 2) / 4000) ** 0.5


def test_random_actions_without_bounds_are_normal_and_clipped():
    inf = torch.inf
    some = Bounded(torch.tensor([-1.0, 0.0, -inf, -inf]), torch.tensor([3.0, inf, 1.0, inf]), (4,))
    for spec, below in ((some, [0.25, 0.0, 0.5, 0.5]), (Unbounded((4,)), [0.5] * 4)):
        action = setup(RandomLevel(), spec)(seen(4000))["action"]
        assert spec.is_in(action)
        share = (action < 0).float().mean(0)
        assert (share - torch.tensor(below)).abs().max() < 4 * (0.25 / 4000) ** 0.5
        assert abs(action[:, 3].std() - 1.0) < 0.05


@pytest.mark.parametrize(
    ("spec", "action"),
    [(BOX, [0.5, -1.0]), (OneHot(3), [0, 1, 0]), (OneHot(3), 1), (Categorical(3), 2)],
)
def test_a_constant_action_is_the_same_for_every_batch(spec, action):
    level = setup(ConstantLevel(torch.tensor(action)), spec)
    expected = torch.tensor([0, 1, 0] if isinstance(spec, OneHot) else action)
    for batch in ((), (4,), (2, 3)):
        out = level(seen(*batch))["action"]
        assert spec.is_in(out)
        assert (out == expected).all()
        assert out.shape == (*batch, *spec.shape)
        out.zero_()  # what is written belongs to the caller
    assert level.learn(seen(3)) == {}


def test_a_sequence_starts_at_each_input_and_then_hands_back():
    actions = torch.arange(6.0).reshape(3, 2) / 5
    level = setup(ActionSequenceLevel(actions, input_spec=OneHot(4)), BOX)
    n_actions = torch.tensor([[0], [1], [2], [3], [7]])
    td = seen(5, n_actions=n_actions)
    assert level.hands_back(td).squeeze(-1).tolist() == [False, False, False, True, True]
    assert torch.equal(level(td)["action"], actions[[0, 1, 2, 2, 2]])
    assert not level.make_tensordict_primer().primers.keys()
    assert level.out_keys == ["action"]
    # A duration of its own cuts it, or makes it hold the last action.
    for duration in (2, 5):
        other = ActionSequenceLevel(actions, input_spec=OneHot(4), duration=duration)
        assert torch.equal(other.hands_back(td), n_actions >= duration)


def test_alone_a_sequence_starts_at_each_reset_and_holds_its_end():
    env = get_task("InvertedPendulum-v5").make(seed=0)
    actions = torch.tensor([[0.5], [-0.5], [1.0], [0.0]])
    level = ActionSequenceLevel(actions)
    level.setup(env.observation_spec_unbatched["observation"], env.action_spec_unbatched)
    assert level.out_keys == ["action", ("next", "n_played")]
    env = TransformedEnv(env, level.make_tensordict_primer())
    torch.manual_seed(0)
    data = env.rollout(60, level, break_when_any_done=False)
    assert data["next", "done"].sum() > 2
    position = 0
    for row in data:
        assert row["action"] == actions[min(position, 3)]
        assert row["n_played"] == position
        position = 0 if row["next", "done"] else position + 1


def test_a_sequence_of_choices_is_given_in_the_form_of_the_spec():
    level = setup(ActionSequenceLevel(torch.tensor([2, 0])), OneHot(3))
    out = level(seen(3, n_played=torch.tensor([[0], [1], [2]])))
    assert out["action"].long().tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0]]
    assert out["next", "n_played"].tolist() == [[1], [2], [3]]


# -- bad input ------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match=r"action_spec is 3 .*expected a gymnasium Box"):
        Constant(3)
    with pytest.raises(ValueError, match=r"input_spec has shape \(2, 2\)"):
        Constant(OneHot(3), input_spec=Bounded(0.0, 1.0, (2, 2)))
    with pytest.raises(TypeError, match=r"got Constant; pass the upper level's \.predictor"):
        Constant(OneHot(3)).attach(Constant(OneHot(3)))
    with pytest.raises(ValueError, match=r"action has shape \(3,\), expected \(2,\)"):
        setup(ConstantLevel(torch.zeros(3)), BOX)
    with pytest.raises(ValueError, match="outside the action space"):
        setup(ConstantLevel(torch.full((2,), 4.0)), BOX)
    with pytest.raises(ValueError, match=r"action has shape \(4, 3\), expected \(4, 2\)"):
        setup(ActionSequenceLevel(torch.zeros(4, 3)), BOX)
    with pytest.raises(ValueError, match=r"actions has shape \(0, 2\), expected \[n, A\]"):
        ActionSequenceLevel(torch.zeros(0, 2))
    for make in (
        partial(ActionSequenceLevel, torch.zeros(4, 2)),
        partial(ConstantLevel, torch.zeros(2)),
        RandomLevel,
    ):
        with pytest.raises(ValueError, match="duration=3 is for an input from above"):
            make(duration=3)
    with pytest.raises(RuntimeError, match="has no spaces yet"):
        RandomLevel()(seen(3))
    for level in (RandomLevel(), ConstantLevel(torch.zeros(2))):
        with pytest.raises(KeyError, match="reads 'observation', which is missing"):
            setup(level, BOX)(TensorDict(batch_size=[3]))
    with pytest.raises(KeyError, match="reads 'n_played', which is missing"):
        setup(ActionSequenceLevel(torch.zeros(4, 2)), BOX)(seen(3))
