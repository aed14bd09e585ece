"""Train the parts of a predictor by TorchRL's `Trainer` instead of `RewardPredictor.learn`.

Dynamics, reward and value are learned from random experience by two TorchRL loss modules: a
`ModelLoss` for the ensemble and a `PredictorLoss` for reward and value. What `learn` does besides
the gradient step becomes a hook: statistics, sampling, the average of the weights, the target
network. In the end the trained parts make a predictor that is used as any other.

    python examples/train_with_trainer.py --env InvertedPendulum-v5 --total-env-steps 2000
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from tensordict import TensorDict, TensorDictBase
from torchrl.checkpoint import Checkpoint
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import DoubleToFloat, EnvBase, GymEnv, TransformedEnv
from torchrl.objectives import LossModule, SoftUpdate
from torchrl.record.loggers import CSVLogger
from torchrl.trainers import (
    DefaultOptimizationStepper,
    ReplayBufferTrainer,
    TargetNetUpdaterHook,
    Trainer,
)

from layeredrl_torchrl import (
    IdentityEncoder,
    ModelLoss,
    PredictorLoss,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    RewardNet,
    StaticPredictor,
    TransitionSlices,
    ValueNet,
)


@dataclass
class Config:
    """Train a predictor's parts by TorchRL's Trainer."""

    env: str = "InvertedPendulum-v5"
    """Gymnasium id of the task."""
    seed: int = 0
    """Seed of everything random."""
    total_env_steps: int = 2000
    """Random steps to learn from."""
    held_out_steps: int = 500
    """Random steps to score with."""
    steps_per_batch: int = 500
    """Steps between two learning phases."""
    updates_per_batch: int = 250
    """Gradient steps of a learning phase."""
    batch_size: int = 128
    """Slices in a training batch."""
    n_models: int = 5
    """Members of the ensemble."""
    hidden_size: int = 64
    """Width of the two hidden layers of all networks."""
    n_steps: int = 3
    """Rewards in a value target."""
    lr: float = 3e-3
    """Learning rate of all parts."""
    tau: float = 0.01
    """Share of the value network that its target takes over at each update."""
    output: Path = Path("output/train_with_trainer")
    """Folder of the logged scalars and the checkpoint."""
    threads: int = 2
    """Threads that torch may use."""


class AllLosses(LossModule):
    """Both losses of slices `[B, L]`, the ensemble's of their first transitions."""

    def __init__(self, predictor: StaticPredictor, n_steps: int) -> None:
        super().__init__()
        self.encoder = predictor.encoder
        # The losses' names for what they read are free: the state of this task is its observation.
        self.model_loss = ModelLoss(predictor.model)
        self.model_loss.set_keys(state="observation", next_state=("next", "observation"))
        self.predictor_loss = PredictorLoss(
            predictor.encoder, predictor.rew_func, predictor.val_func, n_steps=n_steps
        )

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        losses = self.predictor_loss(tensordict)
        return losses.update(self.model_loss(self.encoder(tensordict[:, 0])))


def make_env(config: Config, seed: int) -> EnvBase:
    env = TransformedEnv(GymEnv(config.env), DoubleToFloat())
    env.set_seed(seed)
    return env


def make_predictor(config: Config, env: EnvBase) -> StaticPredictor:
    """Untrained parts; StaticPredictor, as its own `learn` is not used."""
    observation, action = env.observation_spec["observation"], env.action_spec
    (dim,) = observation.shape
    hidden = (config.hidden_size, config.hidden_size)
    model = ProbabilisticEnsemble(
        state_space=observation,
        context_space=None,
        action_space=action,
        partial_net=partial(ProbFCDynamics, hidden_sizes=hidden),
        n_models=config.n_models,
    )
    return StaticPredictor(
        model=model,
        val_func=ValueNet(dim, 0, hidden),
        rew_func=RewardNet(dim, 0, action, hidden),
        encoder=IdentityEncoder((dim,)),
        latent_state_dim=dim,
    )


@torch.no_grad()
def fit_statistics(predictor: StaticPredictor, buffer: TensorDictReplayBuffer) -> None:
    """Let the networks' normalised inputs and outputs fit all that was collected so far."""
    data = buffer[:]
    state, context = predictor.encode(data["observation"])
    next_state, _ = predictor.encode(data["next", "observation"])
    predictor.model.fit_statistics(state, context, data["action"], next_state)
    predictor.rew_func.fit_inputs(state, context, data["action"])
    predictor.val_func.fit_inputs(state, context, data["action"])


@torch.no_grad()
def score(predictor: StaticPredictor, held_out: TensorDictBase) -> dict[str, float]:
    """How well unseen steps are predicted: nats per dimension, and reward units."""
    obs, act = held_out["observation"], held_out["action"]
    state, context = predictor.encode(obs)
    next_state, _ = predictor.encode(held_out["next", "observation"])
    log_prob, _, _ = predictor.model.get_log_prob(state, context, act, next_state)
    error = predictor.predict_reward(obs, act) - held_out["next", "reward"].squeeze(-1)
    return {
        "held_out_nll": -log_prob.mean().item() / state.shape[-1],
        "held_out_reward_error": error.square().mean().sqrt().item(),
    }


def main(config: Config) -> None:
    """Train, and score before, in between and after."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    env = make_env(config, config.seed)
    held_out = make_env(config, config.seed + 1).rollout(
        config.held_out_steps, break_when_any_done=False
    )
    predictor = make_predictor(config, env)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(config.total_env_steps))
    slices = TransitionSlices(buffer)
    losses = AllLosses(predictor, config.n_steps)
    trained = torch.nn.ModuleList([predictor.model, predictor.rew_func, predictor.val_func])
    optim = torch.optim.Adam(
        [p for p in trained.parameters() if p.requires_grad], lr=config.lr, fused=True
    )
    trainer = Trainer(
        collector=Collector(
            env, frames_per_batch=config.steps_per_batch, total_frames=config.total_env_steps
        ),
        total_frames=config.total_env_steps,
        frame_skip=1,
        optim_steps_per_batch=config.updates_per_batch,
        loss_module=losses,
        optimizer=optim,
        optimization_stepper=DefaultOptimizationStepper(),
        clip_norm=200.0,
        logger=CSVLogger("scalars", log_dir=str(config.output)),
        log_interval=1,
        progress_bar=True,
        seed=config.seed,
    )
    length = losses.predictor_loss.k_steps + losses.predictor_loss.n_steps
    target = SoftUpdate(losses.predictor_loss, tau=config.tau)
    trainer.register_op("batch_process", ReplayBufferTrainer(buffer).extend)
    trainer.register_op("pre_optim_steps", partial(fit_statistics, predictor, buffer))
    trainer.register_op("process_optim_batch", lambda _: slices.sample(config.batch_size, length))
    trainer.register_op("post_optim", predictor.model.update_average)
    trainer.register_op("post_optim", TargetNetUpdaterHook(target))
    trainer.register_op("post_steps_log", lambda _: score(predictor, held_out) | {"log_pbar": True})

    before = score(predictor, held_out)
    trainer.train()
    after = score(predictor, held_out)
    Checkpoint(predictor=predictor, optim=optim).save(config.output / "checkpoint")
    for name in before:
        print(f"{name}: {before[name]:.3f} before, {after[name]:.3f} after")
    print(f"Scalars and checkpoint: {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
