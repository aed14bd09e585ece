"""Train the parts of a predictor with TorchRL's `Trainer` instead of `RewardPredictor.learn`.

Two TorchRL loss modules train dynamics, reward and value on random experience: a `ModelLoss` for
the ensemble and a `PredictorLoss` for reward and value. Everything else that `learn` does becomes a
hook: statistics, sampling, the average of the weights, the target network. The trained predictor is
used like any other.

    python examples/train_with_trainer.py --task InvertedPendulum-v5 --total-env-steps 2000
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase
from torchrl.objectives import LossModule, SoftUpdate
from torchrl.trainers import (
    DefaultOptimizationStepper,
    ReplayBufferTrainer,
    TargetNetUpdaterHook,
    Trainer,
)

from layeredrl_torchrl import (
    CollectorState,
    IdentityEncoder,
    ModelLoss,
    PredictorLoss,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    RewardNet,
    StaticPredictor,
    TransitionSlices,
    ValueNet,
    runs,
)


@dataclass
class Config(runs.RunOptions):
    """Train a predictor's parts with TorchRL's Trainer."""

    total_env_steps: runs.Count = 2000
    """Random steps to learn from."""
    held_out_steps: runs.Count = 500
    """Random steps to score with."""
    steps_per_batch: runs.Count = 500
    """Steps between two learning phases."""
    updates_per_batch: runs.Count = 250
    """Gradient steps of a learning phase."""
    batch_size: runs.Count = 128
    """Slices in a training batch."""
    n_models: runs.Count = 5
    """Members of the ensemble."""
    hidden_size: runs.Count = 64
    """Width of the two hidden layers of all networks."""
    n_steps: runs.Count = 3
    """Rewards in a value target."""
    lr: runs.Positive = 3e-3
    """Learning rate of all parts."""
    tau: runs.Share = 0.01
    """Share of the value network that its target takes at each update."""
    output: Path = Path("output/train_with_trainer")
    """Folder of the scores (CSV) and the checkpoints."""

    # No policy acts here, and there is one environment.
    without_effect = frozenset(
        {"n_envs", "eval_episodes", "steps_per_evaluation", "episodes_per_evaluation", "video"}
    )

    def check(self) -> None:
        super().check()
        if self.n_steps >= min(self.steps_per_batch, self.total_env_steps):
            limit = "--steps-per-batch and --total-env-steps"
            raise runs.RunError(f"--n-steps is {self.n_steps}, expected fewer than {limit}")


class AllLosses(LossModule):
    """Both losses for slices `[B, L]`; the ensemble's reads only their first transitions."""

    def __init__(self, predictor: StaticPredictor, n_steps: int) -> None:
        super().__init__()
        self.encoder = predictor.encoder
        # The losses' input keys can be chosen: the state of this task is its observation.
        self.model_loss = ModelLoss(predictor.model)
        self.model_loss.set_keys(state="observation", next_state=("next", "observation"))
        self.predictor_loss = PredictorLoss(
            predictor.encoder, predictor.rew_func, predictor.val_func, n_steps=n_steps
        )

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        losses = self.predictor_loss(tensordict)
        return losses.update(self.model_loss(self.encoder(tensordict[:, 0])))


def make_predictor(config: Config, env: EnvBase) -> StaticPredictor:
    """Make untrained parts, in a StaticPredictor, as no `learn` is needed."""
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
    predictor = StaticPredictor(
        model=model,
        val_func=ValueNet(dim, 0, hidden),
        rew_func=RewardNet(dim, 0, action, hidden),
        encoder=IdentityEncoder((dim,)),
        latent_state_dim=dim,
    )
    return predictor.to(config.device)


@torch.no_grad()
def fit_statistics(predictor: StaticPredictor, buffer: TensorDictReplayBuffer, device: str) -> None:
    """Fit the normalisation of the networks' inputs and outputs to all data collected so far."""
    data = buffer[:].to(device)
    state, context = predictor.encode(data["observation"])
    next_state, _ = predictor.encode(data["next", "observation"])
    predictor.model.fit_statistics(state, context, data["action"], next_state)
    predictor.rew_func.fit_inputs(state, context, data["action"])
    predictor.val_func.fit_inputs(state, context, data["action"])


@torch.no_grad()
def score(predictor: StaticPredictor, held_out: TensorDictBase) -> dict[str, float]:
    """Scores on unseen steps: nats per dimension, and an error in reward units."""
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
    """Train; score before, during and after training."""
    task, device, total = runs.find_task(config.task), config.device, config.total_env_steps
    with runs.Run(config, total) as run:
        env, other = task.make(seed=config.seed), task.make(seed=config.seed + 1)
        held_out = other.rollout(config.held_out_steps, break_when_any_done=False).to(device)
        predictor = make_predictor(config, env)
        size = max(total, 100_000)  # a run may be resumed with more steps
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(size))
        slices, losses = TransitionSlices(buffer), AllLosses(predictor, config.n_steps)
        trained = torch.nn.ModuleList([predictor.model, predictor.rew_func, predictor.val_func])
        weights = [p for p in trained.parameters() if p.requires_grad]
        collector = Collector(env, frames_per_batch=config.steps_per_batch, total_frames=total)
        run.keep(predictor=predictor, buffer=buffer, collector=CollectorState(collector))
        trainer = Trainer(
            collector=collector,
            total_frames=total,
            frame_skip=1,
            optim_steps_per_batch=config.updates_per_batch,
            loss_module=losses,
            optimizer=torch.optim.Adam(weights, lr=config.lr, fused=True),
            optimization_stepper=DefaultOptimizationStepper(),
            clip_norm=200.0,
            progress_bar=True,
            seed=config.seed,
            # The trainer adds its own state to the run's checkpoints.
            checkpoint=run.checkpoint,
            checkpoint_rotation=run.rotation,
            checkpoint_metadata=lambda _: config.settings(),
            save_trainer_interval=config.steps_per_checkpoint,
        )
        length = losses.predictor_loss.k_steps + losses.predictor_loss.n_steps
        target = SoftUpdate(losses.predictor_loss, tau=config.tau)
        draw = partial(slices.sample, config.batch_size, length)
        trainer.register_op("batch_process", run.count)
        trainer.register_op("batch_process", ReplayBufferTrainer(buffer).extend)
        trainer.register_op("pre_optim_steps", partial(fit_statistics, predictor, buffer, device))
        trainer.register_op("process_optim_batch", lambda _: draw().to(device))
        trainer.register_op("post_optim", predictor.model.update_average)
        trainer.register_op("post_optim", TargetNetUpdaterHook(target))
        trainer.register_op("post_steps", lambda: run.log(score(predictor, held_out)))
        if run.resumed:
            trainer.load_from_file(run.resumed)
        else:
            run.log(score(predictor, held_out))
        trainer.train()
        for name in ("held_out_nll", "held_out_reward_error"):
            print(f"{name}: {run.rows[0][name]:.3f} before, {run.rows[-1][name]:.3f} after")


if __name__ == "__main__":
    runs.command(main, Config, __doc__)
