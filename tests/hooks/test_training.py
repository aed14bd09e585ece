"""TorchRL's Trainer, buffers, loggers, recorder and recurrent policies with our parts."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import (
    LEARN,
    SMALL_FACTORY,
    SMALL_PLANNER,
    learn,
    make_buffer,
    make_point,
    make_predictor,
    make_transitions,
    parameters,
    parts_moved,
    planner_level,
)
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import Bounded, HERReplayBuffer, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import DoubleToFloat, GymEnv, GymWrapper, InitTracker, TransformedEnv
from torchrl.modules import MLP, LSTMModule, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate
from torchrl.objectives.value import TDLambdaEstimator
from torchrl.record import CSVLogger, VideoRecorder
from torchrl.record.loggers import get_logger
from torchrl.trainers import (
    CountFramesLog,
    DefaultOptimizationStepper,
    LogScalar,
    ReplayBufferTrainer,
    TargetNetUpdaterHook,
    Trainer,
)

from layeredrl_torchrl.levels import LevelHook
from layeredrl_torchrl.predictors import value_operator

STATE = ["state", "context"]


def make_actor(*before, keys=STATE, n_in=3):
    """A Gaussian policy, behind other modules if any."""
    net = TensorDictModule(MLP(n_in, 2, depth=1, num_cells=8), keys, ["params"])
    split = TensorDictModule(NormalParamExtractor(), ["params"], ["loc", "scale"])
    return ProbabilisticActor(
        TensorDictSequential(*before, net, split),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        spec=Bounded(-1.0, 1.0, (1,)),
    )


def make_sac():
    critic = ValueOperator(MLP(4, 1, depth=1, num_cells=8), in_keys=[*STATE, "action"])
    loss = SACLoss(make_actor(), critic)
    loss.make_value_estimator(gamma=0.9)
    return loss


def make_trainer(env, folder, loss):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(500), batch_size=16)
    acting = loss.get_stateful_net("actor_network")
    trainer = Trainer(
        collector=Collector(env, acting, frames_per_batch=60, total_frames=180),
        total_frames=180,
        frame_skip=1,
        optim_steps_per_batch=2,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), 1e-2),
        optimization_stepper=DefaultOptimizationStepper(),
        logger=CSVLogger("run", log_dir=str(folder)),
        log_interval=1,
        progress_bar=False,
    )
    ReplayBufferTrainer(buffer, flatten_tensordicts=True).register(trainer)
    TargetNetUpdaterHook(SoftUpdate(loss, tau=0.1)).register(trainer, "target_net")
    LogScalar(("next", "reward"), logname="reward").register(trainer)
    CountFramesLog(frame_skip=1).register(trainer)
    return trainer


def test_a_trainer_learns_from_imagined_data_and_logs(imagined, tmp_path):
    loss = make_sac()
    before = parameters(loss)
    make_trainer(imagined(), tmp_path, loss).train()
    assert not [name for name, p in loss.named_parameters() if torch.equal(p, before[name])]
    rows = (tmp_path / "run" / "scalars" / "reward.csv").read_text().splitlines()
    assert len(rows) == 3


def test_learning_is_logged_by_any_of_torchrls_loggers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = get_logger("tensorboard", str(tmp_path), "run")
    info = learn(make_predictor(), make_buffer(), logger=logger)
    logger.experiment.close()
    (folder,) = {path.parent for path in tmp_path.rglob("events*")}
    found = EventAccumulator(str(folder)).Reload()
    for term, value in info.items():
        (row,) = found.Scalars(f"RewardPredictor/{term}")
        assert row.step == LEARN["n_total_env_steps"]
        assert row.value == pytest.approx(value, rel=1e-4)


def test_a_level_learns_as_a_hook_of_a_trainer(tmp_path):
    def make(level_options):
        torch.manual_seed(0)
        env = GymEnv("Pendulum-v1")
        env.set_seed(0)
        level = planner_level(env=env, n_initial_random_steps=20, **level_options)
        options = {"frames_per_batch": 20, "total_frames": 60}
        collector = Collector(env, level, auto_register_policy_transforms=True, **options)
        return level, collector

    level, collector = make({})
    trainer = Trainer(
        collector=collector,
        total_frames=60,
        frame_skip=1,
        optim_steps_per_batch=0,
        loss_module=torch.nn.Identity(),
        progress_bar=False,
        logger=CSVLogger("run", log_dir=str(tmp_path)),
        log_interval=1,
        save_trainer_file=str(tmp_path / "trainer.pt"),
    )
    LevelHook(level).register(trainer)
    trainer.train()

    by_hand, collector = make({})
    for data in collector:
        info = by_hand.learn(data)
    collector.shutdown()
    for a, b in zip(level.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b)
    (logged,) = tmp_path.rglob("PlannerLevel/nll.csv")
    assert float(logged.read_text().split(",")[-1]) == pytest.approx(info["nll"], rel=1e-5)

    other, collector = make({})
    collector.shutdown()
    saved = torch.load(tmp_path / "trainer.pt", weights_only=False)
    LevelHook(other).load_state_dict(saved["level"])
    assert int(other.n_env_steps) == len(other.buffer) == 60
    for a, b in zip(level.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(TypeError, match="level must be a"):
        LevelHook(level.planner)


def test_the_value_function_serves_torchrls_estimators(imagined):
    """Lambda-returns of imagined episodes, against the recursion by hand."""
    env = imagined()
    predictor = env.predictor
    values = value_operator(predictor)
    data = env.rollout(5, break_when_any_done=False)
    with torch.no_grad():
        TDLambdaEstimator(gamma=0.9, lmbda=0.8, value_network=values)(data)
        later = values(data["next"].clone())["state_value"]
        target = later[:, -1]
        for t in reversed(range(5)):
            alive = (~data["next", "terminated"][:, t]).float()
            over = data["next", "done"][:, t] | torch.tensor(t == 4)
            mixed = torch.where(over, later[:, t], 0.2 * later[:, t] + 0.8 * target)
            target = data["next", "reward"][:, t] + 0.9 * alive * mixed
            torch.testing.assert_close(data["value_target"][:, t], target)
    state, context = data["state"], data["context"]
    expected = predictor.terminal_value(state, context, None).unsqueeze(-1)
    torch.testing.assert_close(values(data)["state_value"], expected)
    with pytest.raises(ValueError, match="val_func=None"):
        value_operator(make_point())


def hindsight(td):
    return -(td["next", "achieved_goal"] - td["desired_goal"]).abs()


def test_the_model_learns_beside_a_policy_that_learns_in_hindsight():
    """A second buffer on the same storage, since what is relabelled is no longer in order."""
    data = make_transitions()
    for at in (data, data["next"]):
        at["achieved_goal"] = at["observation"][..., :1]
        at["desired_goal"] = torch.ones_like(at["achieved_goal"])
    storage = LazyTensorStorage(100)
    relabelled = HERReplayBuffer(hindsight, storage=storage, batch_size=16)
    relabelled.extend(data)
    assert (relabelled.sample()["desired_goal"] != 1).any()
    predictor = make_predictor()
    before = parameters(predictor)
    with pytest.raises(TypeError, match="HERReplayBuffer"):
        learn(predictor, relabelled)
    learn(predictor, TensorDictReplayBuffer(storage=storage))
    assert {"model", "rew_func", "val_func"} <= parts_moved(predictor, before)


class Dot(gym.Env):
    """A point on a line that draws itself."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    render_mode = "rgb_array"
    metadata = {"render_modes": ["rgb_array"]}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = np.zeros(2, np.float32)
        return self.at, {}

    def step(self, action):
        self.at = np.clip(self.at + 0.1 * action, -1, 1).astype(np.float32)
        return self.at, 0.0, False, False, {}

    def render(self):
        picture = np.zeros((16, 16, 3), np.uint8)
        picture[8, int(7.5 * (1 + self.at[0]))] = 255
        return picture


def test_a_video_recorder_records_a_planner(tmp_path):
    logger = CSVLogger("run", log_dir=str(tmp_path), video_format="pt")
    env = TransformedEnv(GymWrapper(Dot(), from_pixels=True, pixels_only=False), DoubleToFloat())
    spec = env.observation_spec["observation"]
    planner = SMALL_PLANNER(SMALL_FACTORY(spec, env.action_spec))
    env.append_transform(planner.make_tensordict_primer())
    env.append_transform(VideoRecorder(logger, tag="planned", skip=1))
    data = env.rollout(6, planner)
    env.transform.dump()
    (video,) = tmp_path.rglob("*.pt")
    frames = torch.load(video)
    assert frames.shape[-4:] == (7, 3, 16, 16)  # the first observation, and one after each step
    assert data["planner", "warm"][1:].all()


def test_a_recurrent_policy_begins_each_imagined_episode_without_memory(imagined):
    keys = {"in_keys": ["both", "h", "c"], "out_keys": ["hidden", ("next", "h"), ("next", "c")]}
    lstm = LSTMModule(3, 8, **keys)
    both = TensorDictModule(lambda *x: torch.cat(x, -1), STATE, ["both"])
    actor = make_actor(both, lstm, keys=["hidden"], n_in=8)
    env = imagined().append_transform(InitTracker()).append_transform(lstm.make_tensordict_primer())
    (data,) = Collector(env, actor, frames_per_batch=120, total_frames=120)
    ended = data["next", "done"][:, :-1, 0]
    assert ended.any()
    assert not data["h"][:, 1:][ended].any()  # a new imagined episode begins without memory
    handed, got = data["next", "h"][:, :-1], data["h"][:, 1:]
    assert torch.equal(got[~ended], handed[~ended])
    assert got[~ended].any()
