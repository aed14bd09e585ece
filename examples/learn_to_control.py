"""Learn any task of `layeredrl_torchrl.envs` from scratch by planning in a learned world model.

A `PlannerLevel` is the whole agent: it first acts randomly, then plans with iCEM in a predictor,
which learns after each batch of the collector. `python -m layeredrl_torchrl.envs` lists the tasks.

    python examples/learn_to_control.py --task InvertedPendulum-v5
    python examples/learn_to_control.py --task Reacher-v5 --horizon 15 --output output/reacher
    python examples/learn_to_control.py --output output/reacher --resume
    python examples/learn_to_control.py --task Reacher-v5 --n-workers 2 --output output/ray
    python benchmarks/pictures.py output/reacher
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tensordict import TensorDictBase
from torchrl.envs import EnvBase, RewardSum

from layeredrl_torchrl import (
    FixedEncoderNet,
    ICEMPlanner,
    PlannerLevel,
    PredictorFactory,
    SuccessRate,
    Task,
    make_batched,
)
from layeredrl_torchrl.runs import (
    Count,
    Natural,
    Positive,
    PositiveShare,
    Run,
    Share,
    WorkerOptions,
    command,
    find_task,
)


@dataclass
class Config(WorkerOptions):
    """Learn to control a task."""

    n_envs: Count = 5
    """Environments stepped side by side (in each worker); their plans are made together."""
    random_steps: Natural = 300
    """Real steps with random actions at the start."""
    random_prob: Share = 0.0
    """Probability that a random phase begins, at each later step."""
    random_duration: Count = 10
    """Steps of a random phase."""
    updates_per_step: Positive = 2.0
    """Gradient steps per real step."""
    batch_size: Count = 256
    """Slices in a batch, and transitions for each member of the ensemble."""
    n_models: Count = 5
    """Members of the ensemble."""
    hidden_size: Count = 64
    """Width of the two hidden layers of all networks."""
    gamma: PositiveShare = 0.99
    """Discount of the value function and of plans."""
    value_lr: Positive = 1e-3
    """Learning rate of the value function."""
    tau: Share = 0.01
    """Share of the value network that its target takes at each update."""
    n_steps: Count = 3
    """Rewards in a value target."""
    horizon: Count = 8
    """Steps of a plan; the value function estimates the return after them."""
    use_value: bool = True
    """Whether plans include the value of their last state."""
    n_samples: Count = 100
    """Candidate plans in the first iteration."""
    n_iterations: Count = 3
    """Iterations of the planner."""
    compile: bool = False
    """Compile model, reward and losses: faster, after minutes of compiling."""
    output: Path = Path("output/learn_to_control")
    """Folder of the learning curve, of the evaluation and of the checkpoints."""

    @property
    def without_effect(self) -> frozenset[str]:
        """What nothing reads: how long random phases are, where there are none."""
        return frozenset() if self.random_prob else frozenset({"random_duration"})


def make_level(config: Config, task: Task, env: EnvBase) -> PlannerLevel:
    """Make the agent; the task defines which observations are its state and its context."""
    encoder = partial(
        FixedEncoderNet,
        latent_state_dims=list(task.state_dims),
        context_dims=list(task.context_dims),
    )
    level = PlannerLevel(
        env=env,
        predictor_factory=PredictorFactory(
            hidden_sizes=(config.hidden_size, config.hidden_size),
            n_models=config.n_models,
            gamma=config.gamma,
            partial_encoder=encoder,
            predictor_options={
                "n_steps": config.n_steps,
                "tau": config.tau,
                "value_lr": config.value_lr,
            },
        ),
        planner_factory=partial(
            ICEMPlanner,
            horizon=config.horizon,
            n_samples=config.n_samples,
            n_iterations=config.n_iterations,
            discount=config.gamma,
            use_value_func=config.use_value,
            deterministic_mode="best",  # in evaluation as in training
        ),
        n_initial_random_steps=config.random_steps,
        random_prob=config.random_prob,
        random_duration=config.random_duration,
        updates_per_step=config.updates_per_step,
        batch_size=config.batch_size,
        model_batch_size=config.batch_size,
    )
    if config.compile:
        predictor = level.predictor
        losses = predictor.model_loss, predictor.predictor_loss
        for part in (predictor.model, predictor.rew_func, *losses):
            part.compile()
    return level.to(config.device)


def make_env(task: Task, n: int, seed: int, **kwargs) -> EnvBase:
    env = make_batched(task, n, seed=seed, **kwargs).append_transform(RewardSum())
    return env.append_transform(SuccessRate()) if task.reports_success else env


def row_of(data: TensorDictBase, info: dict[str, float]) -> dict[str, float]:
    """The learning curve's entries for a batch, except its returns."""
    row = {"random": data["random_action"].float().mean().item()}
    if ("next", "success_rate") in data.keys(True):
        row["success_rate"] = data["next", "success_rate"][:, -1].mean().item()
    terms = ("nll", "loss_reward", "loss_value", "value_mean")
    return row | {name: info.get(name, float("nan")) for name in terms}


def main(config: Config) -> None:
    """Learn and save checkpoints; then evaluate."""
    task = find_task(config.task)
    total = config.total_env_steps or task.budget
    with Run(config, total) as run:
        env = make_env(task, config.n_envs, config.seed)
        level = make_level(config, task, env)
        run.keep(level=level, optim=level.optim, buffer=level.buffer)
        make_batch = partial(make_env, task, config.n_envs)
        for data in run.collect(env, level, make_env=make_batch):
            row = run.returns(data) | row_of(data, level.learn(data))
            run.log(row | run.evaluation(partial(make_env, task), level))
        run.finish(partial(make_env, task), level, solved_at=task.solved_at)


if __name__ == "__main__":
    command(main, Config, __doc__)
