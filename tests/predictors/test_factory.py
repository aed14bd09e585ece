"""Factories: predictors that fit the spaces of real environments, and errors for the others."""

from __future__ import annotations

from functools import partial

import gymnasium as gym
import pytest
import torch
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    LazyTensorStorage,
    OneHot,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs import (
    CatTensors,
    Compose,
    DoubleToFloat,
    ExcludeTransform,
    GymEnv,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)

from layeredrl_torchrl import (
    EncoderNet,
    FixedEncoderNet,
    IdentityEncoder,
    ModelFreeLevel,
    PredictorFactory,
    RewardPredictor,
    SACLearner,
    get_default_predictor_factory,
)

SMALL = {"hidden_sizes": (8,), "n_models": 2}
KEYS = ["observation", "achieved_goal", "desired_goal"]
JOIN = {"in_keys": KEYS, "out_key": "observation", "sort": False}
BOX = gym.spaces.Box(-1.0, 1.0, (3,))
ACTION = gym.spaces.Box(-2.0, 2.0, (1,))


def learn_from(env, predictor, n_steps=100):
    """Random actions of a TorchRL environment, through a collector, into ``learn``."""
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(1000))
    collector = Collector(env, None, frames_per_batch=n_steps, total_frames=n_steps)
    for data in collector:
        buffer.extend(data.reshape(-1))
    collector.shutdown()
    return data, predictor.learn(buffer, 2, 8, 8, n_steps)[1]


# -- environments -------------------------------------------------------------------------------

PENDULUM = {
    "gym": lambda: gym.make("Pendulum-v1"),
    "vector": lambda: gym.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync"),
    "torchrl": lambda: GymEnv("Pendulum-v1"),
    "counted": lambda: TransformedEnv(GymEnv("Pendulum-v1"), StepCounter(50)),
    "serial": lambda: SerialEnv(2, lambda: GymEnv("Pendulum-v1")),
}


@pytest.mark.parametrize("ignore_context", [True, False])
def test_the_dynamics_see_the_context_where_they_are_told_to(ignore_context):
    factory = PredictorFactory(**SMALL, context_dims=[2], ignore_context=ignore_context)
    model = factory(BOX, ACTION).model
    state, action = torch.zeros(1, 2), torch.zeros(1, 1)
    near, far = (model.predict(state, torch.full((1, 1), c), action)[3] for c in (0.0, 5.0))
    assert torch.equal(near, far) == ignore_context


@pytest.mark.parametrize("kind", PENDULUM)
def test_an_environment_of_any_kind_gives_a_predictor_of_its_sizes(kind):
    env = PENDULUM[kind]()
    factory = get_default_predictor_factory(env, **SMALL)
    assert factory == PredictorFactory(**SMALL)
    if kind in ("torchrl", "counted", "serial"):
        spaces = env.observation_spec_unbatched, env.action_spec_unbatched
    elif kind == "vector":
        spaces = env.single_observation_space, env.single_action_space
    else:
        spaces = env.observation_space, env.action_space
    predictor = factory(*spaces)
    assert isinstance(predictor.encoder, IdentityEncoder)
    assert (predictor.latent_state_dim, predictor.context_dim) == (3, 0)
    mean, *_ = predictor.predict(torch.randn(4, 3), torch.rand(4, 1))
    assert mean.shape == (4, 2, 1, 3)
    with pytest.raises(ValueError, match="outside"):  # the bounds came along
        predictor.predict(torch.randn(4, 3), torch.full((4, 1), 2.5))


@pytest.mark.parametrize("categorical", [False, True])
def test_discrete_actions_of_either_encoding_are_taken(categorical):
    env = GymEnv("CartPole-v1", categorical_action_encoding=categorical)
    predictor = PredictorFactory(**SMALL)(env.observation_spec, env.action_spec)
    assert learn_from(env, predictor)[1]["n_updates"] == 2.0
    assert predictor.predict_reward(torch.zeros(2, 4), torch.tensor([0, 1])).shape == (2,)


@pytest.fixture(scope="module")
def maze():
    """A point maze of gymnasium-robotics: observation 4, achieved and desired goal 2 each."""
    robotics = pytest.importorskip("gymnasium_robotics")
    gym.register_envs(robotics)
    env = GymEnv("PointMaze_UMaze-v3")
    yield env
    env.close()


def test_a_desired_goal_is_the_context(maze):
    env = TransformedEnv(maze, Compose(CatTensors(**JOIN, del_keys=False), DoubleToFloat()))
    factory = get_default_predictor_factory(env, **SMALL)
    assert list(factory.context_dims) == [6, 7]
    predictor = factory(Unbounded((8,)), env.action_spec)
    data, info = learn_from(env, predictor)
    assert info["n_updates"] == 2.0
    state, context = predictor.encode(data["observation"])
    assert torch.equal(context, data["desired_goal"])
    assert torch.equal(state[..., 4:], data["achieved_goal"])
    assert torch.equal(state[..., :2], data["achieved_goal"])  # in a maze, the position


@pytest.mark.parametrize(
    "transforms",
    [
        [],
        [lambda: CatTensors(**JOIN)],
        [lambda: CatTensors(**JOIN), DoubleToFloat],
        [lambda: CatTensors(**JOIN, del_keys=False)],
        [lambda: StepCounter(50)],
        [lambda: CatTensors(["observation"], "copy", del_keys=False)],
    ],
    ids=["plain", "joined", "joined twice over", "kept", "counted", "another"],
)
def test_goals_are_found_before_and_after_they_are_joined(maze, transforms):
    env = maze
    for transform in transforms:
        env = TransformedEnv(env, transform())
    expected = PredictorFactory(**SMALL, context_dims=(6, 7))
    assert get_default_predictor_factory(env, **SMALL) == expected


def test_goals_are_found_in_either_librarys_spaces(maze):
    gym_env = maze._env
    factory = get_default_predictor_factory(gym_env, **SMALL)
    assert factory == PredictorFactory(**SMALL, context_dims=(6, 7))
    for predictor in (
        factory(gym_env.observation_space, gym_env.action_space),
        factory(maze.observation_spec, maze.action_spec),
        # a goal-based space says itself where its goal is
        PredictorFactory(**SMALL)(gym_env.observation_space, ACTION),
    ):
        assert isinstance(predictor.encoder, FixedEncoderNet)
        assert predictor.encoder.latent_state_dims.tolist() == [0, 1, 2, 3, 4, 5]
        assert predictor.encoder.context_dims.tolist() == [6, 7]


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        # TorchRL sorts the keys unless told otherwise, which puts the observation last.
        (CatTensors(in_keys=KEYS, out_key="observation"), r"achieved_goal.*sort=False"),
        (CatTensors(in_keys=KEYS, out_key="all", sort=False), r"'all'"),
        (ExcludeTransform("achieved_goal", "desired_goal"), r"8 values.*has 4.*CatTensors"),
    ],
)
def test_goals_that_are_elsewhere_are_refused(maze, transform, message):
    env = TransformedEnv(maze, transform.clone())
    with pytest.raises(ValueError, match=message):
        get_default_predictor_factory(env)
    if "sort" in message:  # unless it is told where
        factory = get_default_predictor_factory(env, **SMALL, context_dims=(2, 3))
        assert list(factory.context_dims) == [2, 3]


# -- options ------------------------------------------------------------------------------------


def test_every_option_reaches_its_part():
    factory = PredictorFactory(
        hidden_sizes=(5, 6),
        n_models=3,
        n_modes=2,
        n_particles_per_model=4,
        gamma=0.5,
        context_dims=(0,),
        model_options={"predict_delta": False},
        predictor_options={"k_steps": 2, "tau": 0.01},
    )
    predictor = factory(BOX, ACTION)
    assert predictor.rollout(torch.randn(3), torch.rand(2, 1)).shape == (3, 4, 2)
    assert predictor.model.n_modes == 2
    assert not predictor.model.scaling.predict_delta
    assert (predictor.predictor_loss.gamma, predictor.predictor_loss.k_steps) == (0.5, 2)
    assert predictor.tau == 0.01
    assert predictor.encoder.latent_state_dims.tolist() == [1, 2]
    for head in (predictor.val_func, predictor.rew_func):
        layers = [layer for layer in head.net if isinstance(layer, nn.Linear)]
        assert [layer.out_features for layer in layers] == [5, 6, 1]
    members = PredictorFactory(hidden_sizes=(5, 6))(BOX, ACTION).model.members.state_dict()
    assert {5, 6} < {n for p in members.values() for n in p.shape}


def test_a_learned_encoder_is_built_with_its_sizes():
    make = partial(EncoderNet, latent_state_dim=4, context_dim=2)
    predictor = PredictorFactory(**SMALL, partial_encoder=make)(BOX, ACTION)
    assert isinstance(predictor.encoder, EncoderNet)
    assert (predictor.model.state_dim, predictor.model.context_dim) == (4, 2)
    with pytest.raises(ValueError, match="context_dims"):
        PredictorFactory(partial_encoder=make, context_dims=(1,))


@pytest.mark.parametrize(
    ("key", "dim"), [(("agent", "sight"), 3), ([("agent", "sight"), "desired_goal"], 5)]
)
def test_observations_may_be_nested(key, dim):
    spec = Composite(agent=Composite(sight=Unbounded((3,))), desired_goal=Unbounded((2,)))
    predictor = PredictorFactory(**SMALL, observation_key=key)(spec, ACTION)
    assert predictor.encoder.in_keys == (key if isinstance(key, list) else [key])
    assert (predictor.encoder.obs_dim, predictor.latent_state_dim) == (dim, 3)


def test_predictors_of_one_factory_share_nothing():
    factory = PredictorFactory(**SMALL)
    first, second = factory(BOX, ACTION), factory(BOX, ACTION)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


@pytest.mark.parametrize("device", [None, "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_device_is_where_the_parameters_are(device):
    predictor = PredictorFactory(**SMALL)(BOX, ACTION, device=device)
    assert isinstance(predictor, RewardPredictor)
    assert {value.device.type for value in predictor.state_dict().values()} == {device or "cpu"}
    # The optimizer still has the parameters that the predictor computes with.
    trained = {id(p) for group in predictor.optim.param_groups for p in group["params"]}
    assert trained == {id(p) for p in predictor.parameters() if p.requires_grad}


# -- spaces that do not fit ---------------------------------------------------------------------

GOALS = dict.fromkeys(KEYS, BOX)
BAD = {
    "dict": (gym.spaces.Dict({"a": BOX, "b": BOX}), ValueError, r"\['a', 'b'\].*CatTensors"),
    "goals and more": (gym.spaces.Dict(GOALS | {"pixels": BOX}), ValueError, "pixels"),
    "composite": (Composite(place=Unbounded((3,))), ValueError, r"place.*CatTensors.*sort=False"),
    "image": (gym.spaces.Box(0, 255, (64, 64, 3), dtype="uint8"), ValueError, "images"),
    "image spec": (Bounded(0, 1, (3, 64, 64)), ValueError, "images"),
    "batched spec": (Unbounded((8, 3)), ValueError, "observation_spec_unbatched"),
    "image goal": (
        gym.spaces.Dict(GOALS | {"observation": gym.spaces.Box(0, 1, (8, 8))}),
        ValueError,
        r"observation has shape \(8, 8\)",
    ),
    "bytes": (gym.spaces.Box(0, 255, (128,), dtype="uint8"), TypeError, "floats.*cast"),
    "choice": (gym.spaces.Discrete(16), TypeError, "one-hot"),
    "choice spec": (Categorical(16), TypeError, "one-hot"),
    "one-hot spec": (OneHot(16), TypeError, "cast"),
    "choices": (gym.spaces.MultiDiscrete([2, 3]), TypeError, "one-hot"),
    "tuple": (gym.spaces.Tuple([BOX, BOX]), TypeError, "expected a Box"),
}


class Env(gym.Env):
    """An environment with whatever observations."""

    action_space = ACTION

    def __init__(self, observation_space):
        self.observation_space = observation_space


@pytest.mark.parametrize("name", BAD)
def test_other_observations_are_refused(name):
    space, error, match = BAD[name]
    with pytest.raises(error, match=match):
        PredictorFactory(**SMALL)(space, ACTION)
    if isinstance(space, gym.Space):
        with pytest.raises(error, match=match):
            get_default_predictor_factory(Env(space))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: PredictorFactory(**SMALL)(BOX, gym.spaces.MultiDiscrete([2, 2])),
            TypeError,
            "action_space",
        ),
        (
            lambda: PredictorFactory(**SMALL)(BOX, gym.spaces.Box(0, 1, (2, 2))),
            ValueError,
            "action_space",
        ),
        (lambda: get_default_predictor_factory(BOX), TypeError, r"Box.*PredictorFactory"),
        (lambda: get_default_predictor_factory(Env(BOX), n_members=3), TypeError, "n_members"),
        (
            lambda: PredictorFactory(context_dims=(3,))(BOX, ACTION),
            ValueError,
            r"\[3\].*observation",
        ),
        (
            lambda: PredictorFactory(context_dims=(0,))(gym.spaces.Dict(GOALS), ACTION),
            ValueError,
            r"\[0\].*desired goal.*\[6, 7, 8\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_known_value_is_asked_and_not_trained():
    def far(state, context, action):
        return -state.square().sum(-1)

    space, action = Unbounded((3,)), Bounded(-1.0, 1.0, (1,))
    predictor = PredictorFactory(hidden_sizes=(8,), n_models=2, val_func=far)(space, action)
    obs = torch.randn(5, 3)
    torch.testing.assert_close(predictor.value(obs), -obs.square().sum(-1))
    assert predictor.target_val_func is None
    with pytest.raises(TypeError, match="val_func"):
        PredictorFactory(val_func=1.0)


def test_messages_name_the_entries_of_the_environment_and_what_is_missing():
    memory = Composite(mean=Unbounded((4,)), warm=Unbounded((1,)))
    space = Composite(
        place=Unbounded((2,)), speed=Unbounded((2,)), planner=memory, is_init=Unbounded((1,))
    )
    named = r"entries \['place', 'speed'\]"
    with pytest.raises(ValueError, match=rf"{named}.*: 'goal' is not among them"):
        PredictorFactory(observation_key=["place", "goal"])(space, Bounded(-1.0, 1.0, (1,)))
    with pytest.raises(ValueError, match=named):
        PredictorFactory()(space, Bounded(-1.0, 1.0, (1,)))
    with pytest.raises(KeyError, match=r"observes \['place', 'speed'\]"):
        ModelFreeLevel(space, Bounded(-1.0, 1.0, (1,)), learner_factory=SACLearner)
