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
    make_predictor,
    make_transitions,
    parameters,
    parts_moved,
)
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import Bounded, HERReplayBuffer, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import DoubleToFloat, GymWrapper, InitTracker, TransformedEnv
from torchrl.modules import MLP, LSTMModule, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate
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


def test_a_video_of_a_planner(tmp_path):
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


def test_a_recurrent_policy_in_an_imagined_environment(imagined):
    keys = {"in_keys": ["both", "h", "c"], "out_keys": ["hidden", ("next", "h"), ("next", "c")]}
    lstm = LSTMModule(3, 8, **keys)
    both = TensorDictModule(lambda *x: torch.cat(x, -1), STATE, ["both"])
    actor = make_actor(both, lstm, keys=["hidden"], n_in=8)
    env = imagined().append_transform(InitTracker()).append_transform(lstm.make_tensordict_primer())
    for data in Collector(env, actor, frames_per_batch=120, total_frames=120):
        ended = data["next", "done"][:, :-1, 0]
        assert ended.any()
        assert not data["h"][:, 1:][ended].any()  # a new imagined episode begins without memory
        handed, got = data["next", "h"][:, :-1], data["h"][:, 1:]
        assert torch.equal(got[~ended], handed[~ended])
        assert got[~ended].any()
