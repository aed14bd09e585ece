"""Learn a world model of a MuJoCo task from real experience, and plan in it.

A TorchRL collector stores experience in a TorchRL replay buffer; a `RewardPredictor` with a
`ProbabilisticEnsemble` learns dynamics, reward, termination and value from it; an `ICEMPlanner`
plans in the learned model and is the collector's policy. This script builds all parts itself;
`learn_to_control.py` does the same with a `PlannerLevel`.

    python examples/planning_with_model.py --task InvertedPendulum-v5 --total-env-steps 5000
    python examples/planning_with_model.py --resume
    python benchmarks/pictures.py output/planning_with_model
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase, RewardSum

from layeredrl_torchrl import (
    Expectation,
    ICEMPlanner,
    IdentityEncoder,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    RewardNet,
    RewardPredictor,
    ValueNet,
    make_batched,
    runs,
)


@dataclass
class Config(runs.RunOptions):
    """Learn a world model of a task, and control the task by planning in the model."""

    total_env_steps: runs.Count = 5000
    """Steps taken in the real environment."""
    random_steps: runs.Natural = 300
    """Number of these with random actions, at the start."""
    n_envs: runs.Count = 5
    """Environments stepped side by side; their plans are made together."""
    updates_per_step: runs.Positive = 2.0
    """Gradient steps per real step."""
    n_models: runs.Count = 5
    """Members of the ensemble."""
    hidden_size: runs.Count = 64
    """Width of the two hidden layers of all networks."""
    gamma: runs.PositiveShare = 0.99
    """Discount of the value function."""
    value_lr: runs.Positive = 1e-3
    """Learning rate of the value function."""
    tau: runs.Share = 0.01
    """Share of the value network that its target takes at each update."""
    n_steps: runs.Count = 3
    """Rewards in a value target."""
    horizon: runs.Count = 8
    """Steps of a plan."""
    n_samples: runs.Count = 100
    """Candidate plans in the first iteration."""
    n_iterations: runs.Count = 3
    """Iterations of the planner."""
    elite_ratio: runs.PositiveShare = 0.1
    """Share of the candidates to which the next iteration's distribution is fitted."""
    output: Path = Path("output/planning_with_model")
    """Folder of the learning curve, of the evaluation and of the checkpoints."""


def make_env(config: Config, n: int, seed: int, **kwargs) -> EnvBase:
    """Make `n` environments side by side, with the returns of their episodes."""
    return make_batched(config.task, n, seed=seed, **kwargs).append_transform(RewardSum())


def make_predictor(config: Config, env: EnvBase) -> RewardPredictor:
    """Make a predictor with the environment's spaces; its state is the observation."""
    observation = env.observation_spec_unbatched["observation"]
    action = env.action_spec_unbatched
    (dim,) = observation.shape
    hidden = (config.hidden_size, config.hidden_size)
    model = ProbabilisticEnsemble(
        state_space=observation,
        context_space=None,
        action_space=action,
        partial_net=partial(ProbFCDynamics, hidden_sizes=hidden),
        n_models=config.n_models,
    )
    predictor = RewardPredictor(
        model=model,
        val_func=ValueNet(dim, 0, hidden),
        rew_func=RewardNet(dim, 0, action, hidden),
        encoder=IdentityEncoder((dim,)),
        latent_state_dim=dim,
        gamma=config.gamma,
        n_steps=config.n_steps,
        tau=config.tau,
        value_lr=config.value_lr,
    )
    return predictor.to(config.device)


def make_planner(config: Config, predictor: RewardPredictor) -> ICEMPlanner:
    """Make a policy that plans in the predictor: observation in, action out."""
    return ICEMPlanner(
        predictor,
        horizon=config.horizon,
        n_samples=config.n_samples,
        n_iterations=config.n_iterations,
        elite_ratio=config.elite_ratio,
        discount=config.gamma,
        use_value_func=True,
        deterministic_mode="best",  # in evaluation as in training
        propagation=Expectation(),
    )


def main(config: Config) -> None:
    """Collect, learn and plan for all steps; then evaluate."""
    task, total, n_random = runs.find_task(config.task), config.total_env_steps, config.random_steps
    with runs.Run(config, total) as run:
        env = make_env(config, config.n_envs, config.seed)
        predictor = make_predictor(config, env)
        planner = make_planner(config, predictor)
        size = max(total, 100_000)  # a run may be resumed with more steps
        storage = LazyTensorStorage(size, ndim=2, device=config.device)
        buffer = TensorDictReplayBuffer(storage=storage)
        run.keep(predictor=predictor, optim=predictor.optim, buffer=buffer)
        for data in run.collect(env, planner, init_random_frames=n_random):
            # The value function is that of the planner, so it has to know who acted: a batch that
            # begins with random actions consists of them.
            begun = run.steps - data.numel()
            data["random_action"] = torch.full(data.shape, begun < n_random)
            buffer.extend(data.exclude("planner", ("next", "planner")))
            info: dict[str, float] = {}
            if run.steps >= n_random:
                # What was put off during the random phase is made up for at its end.
                n_new = data.numel() if begun >= n_random else run.steps
                n_updates = max(round(config.updates_per_step * n_new), 1)
                _, info = predictor.learn(buffer, n_updates, 256, 256, run.steps)
            terms = ("nll", "loss_reward", "loss_value", "value_mean")
            row = run.returns(data) | {name: info.get(name, math.nan) for name in terms}
            run.log(row | run.evaluation(partial(make_env, config), planner))
        run.finish(partial(make_env, config), planner, solved_at=task.solved_at)


if __name__ == "__main__":
    runs.command(main, Config, __doc__)
