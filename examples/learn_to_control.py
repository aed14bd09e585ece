"""Learn any task of `layeredrl_torchrl.envs` from scratch by planning in a learned world model.

A `PlannerLevel` is the whole agent: it acts randomly first, then plans with iCEM in the predictor
that it learns between the collector's batches. `python -m layeredrl_torchrl.envs` lists the tasks.

    python examples/learn_to_control.py --task InvertedPendulum-v5
    python examples/learn_to_control.py --task Reacher-v5 --horizon 15 --output output/reacher
    python examples/learn_to_control.py --task Reacher-v5 --output output/reacher --resume
    python examples/learn_to_control.py --task Reacher-v5 --n-workers 2 --output output/ray
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pictures
import torch
import tyro
from collecting import CollectorConfig, WorkerDiedError, check_options, collecting, save_and_explain
from runs import load_latest, read_csv, rotation_of, write_csv
from tensordict import TensorDictBase
from torchrl.checkpoint import Checkpoint, GlobalRNGState
from torchrl.envs import EnvBase, RewardSum, TransformedEnv
from tqdm import tqdm

from layeredrl_torchrl import (
    FixedEncoderNet,
    ICEMPlanner,
    PlannerLevel,
    PredictorFactory,
    SuccessRate,
    Task,
    get_task,
    make_batched,
)


@dataclass
class Config(CollectorConfig):
    """Learn to control a task."""

    task: str = "InvertedPendulum-v5"
    """Name of the task."""
    seed: int = 0
    """Seed of everything random."""
    total_env_steps: int | None = None
    """Steps taken in the real environment; the task's budget by default."""
    n_envs: int = 5
    """Environments stepped side by side (in each worker); one plan serves them all."""
    steps_per_batch: int = 100
    """Real steps between two learning phases."""
    random_steps: int = 300
    """Real steps with random actions at the start."""
    random_prob: float = 0.0
    """Probability at each later step that a random phase begins."""
    random_duration: int = 10
    """Steps of a random phase."""
    updates_per_step: float = 2.0
    """Gradient steps for every real step."""
    batch_size: int = 256
    """Slices, and transitions for each member of the ensemble, in a batch."""
    n_models: int = 5
    """Members of the ensemble."""
    hidden_size: int = 64
    """Width of the two hidden layers of all networks."""
    gamma: float = 0.99
    """Discount of the value function and of plans."""
    value_lr: float = 1e-3
    """Learning rate of the value function."""
    tau: float = 0.01
    """Share of the value network that its target takes over at each update."""
    n_steps: int = 3
    """Rewards in a value target."""
    horizon: int = 8
    """Steps that are planned ahead; what comes after is left to the value function."""
    use_value: bool = True
    """Whether plans count the value of the state they end in."""
    n_samples: int = 100
    """Candidate plans in the first iteration."""
    n_iterations: int = 3
    """Iterations of the planner."""
    compile: bool = False
    """Compile what is planned with and the losses: faster, after minutes of compiling."""
    eval_episodes: int = 10
    """Episodes of the final evaluation."""
    steps_per_checkpoint: int = 1000
    """Real steps between two checkpoints; the last two are kept."""
    output: Path = Path("output/learn_to_control")
    """Folder of the learning curve (CSV and picture), of the evaluation and of the checkpoints."""
    resume: bool = False
    """Go on from the last checkpoint in the output folder."""
    threads: int = 2
    """Threads that torch may use."""


# What a checkpoint does not fit if it is another.
SHAPE = (
    "task",
    "n_envs",
    "n_workers",
    "n_models",
    "hidden_size",
    "horizon",
    "use_value",
    "n_samples",
    "n_iterations",
)
NAN = float("nan")


def make_level(config: Config, task: Task, env: EnvBase) -> PlannerLevel:
    """The agent; what it sees as state and as context is the task's to say."""
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
        ),
        n_initial_random_steps=config.random_steps,
        random_prob=config.random_prob,
        random_duration=config.random_duration,
        updates_per_step=config.updates_per_step,
        batch_size=config.batch_size,
        model_batch_size=config.batch_size,
    )
    if config.compile:
        known = level.predictor
        for part in (known.model, known.rew_func, known.model_loss, known.predictor_loss):
            part.compile()
    return level


def make_env(task: Task, n: int, seed: int) -> TransformedEnv:
    env = make_batched(task, n, seed=seed)
    env.append_transform(RewardSum())
    if task.reports_success:
        env.append_transform(SuccessRate())
    return env


def row_of(data: TensorDictBase, info: dict[str, float], last: float) -> dict[str, float]:
    """A row of the learning curve; `last` is the return to repeat where no episode has ended."""
    done, so_far = data["next", "done"], data["next", "episode_reward"]
    returns = so_far[done]
    row = {
        "env_steps": info["n_env_steps"],
        "episodes": float(len(returns)),
        "return": returns.mean().item() if len(returns) else last,
        "return_so_far": so_far[:, -1].mean().item(),
        "random": data["random_action"].float().mean().item(),
    }
    if ("next", "success_rate") in data.keys(True):
        row["success_rate"] = data["next", "success_rate"][:, -1].mean().item()
    terms = ("nll", "loss_reward", "loss_value", "value_mean")
    return row | {name: info.get(name, NAN) for name in terms}


def learn(
    config: Config,
    task: Task,
    level: PlannerLevel,
    env: EnvBase,
    total: int,
    rows: list[dict[str, float]],
) -> None:
    """Collect and learn until `total` steps are taken; a row of `rows` for each batch."""
    rotation = rotation_of(config.output)
    checkpoint = checkpoint_of(level)
    steps = saved = int(level.n_env_steps)
    start = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)

    def save() -> None:
        write_csv(config.output / "curve.csv", rows)
        metadata = {**asdict(config), "output": str(config.output)}
        rotation.save(checkpoint, step=steps, metadata=metadata)

    source = collecting(
        config,
        env,
        partial(make_env, task, config.n_envs),
        level,
        frames_per_batch=config.steps_per_batch,
        total_frames=total - steps,
    )
    try:
        with (
            source as batches,
            tqdm(total=total, initial=steps, unit="step", desc=config.task) as bar,
        ):
            for data in batches:
                info = level.learn(data)
                row = row_of(data, info, rows[-1]["return"] if rows else NAN)
                rows.append(row | {"seconds": time.monotonic() - start})
                bar.set_postfix(ended=f"{row['return']:.1f}", so_far=f"{row['return_so_far']:.1f}")
                bar.update(data.numel())
                steps = int(level.n_env_steps)
                if steps - saved >= config.steps_per_checkpoint or steps >= total:
                    save()
                    saved = steps
    except WorkerDiedError as error:
        raise save_and_explain(error, save if steps > saved else None, rotation) from error


def checkpoint_of(level: PlannerLevel) -> Checkpoint:
    return Checkpoint(level=level, optim=level.optim, buffer=level.buffer, rng=GlobalRNGState())


@torch.no_grad()
def evaluate(
    config: Config, task: Task, level: PlannerLevel
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns, and successes where the task has them, of `eval_episodes` episodes side by side."""
    env = make_env(task, config.eval_episodes, config.seed + 10_000)
    env.append_transform(level.make_tensordict_primer())
    level.eval()
    data, returns = env.reset(), torch.full((config.eval_episodes,), NAN)
    success = torch.zeros(config.eval_episodes) if task.reports_success else None
    with tqdm(total=task.horizon, unit="step", desc="evaluation") as bar:
        while returns.isnan().any():
            data, following = env.step_and_maybe_reset(level(data))
            ended = data["next", "done"].squeeze(-1) & returns.isnan()
            returns[ended] = data["next", "episode_reward"].squeeze(-1)[ended]
            if success is not None:
                success[ended] = data["next", "episode_success"].squeeze(-1)[ended].float()
            data = following
            bar.update(1)
    level.train()
    env.close()
    return returns, success


def resume(config: Config, level: PlannerLevel) -> list[dict[str, float]]:
    """Load the last checkpoint of the output folder; returns the curve up to it."""
    load_latest(config.output, checkpoint_of(level), asdict(config), SHAPE)
    return read_csv(config.output / "curve.csv", int(level.n_env_steps))


def main(config: Config) -> None:
    """Run the example."""
    try:
        task = get_task(config.task)
    except KeyError as error:
        raise SystemExit(error.args[0]) from None
    total = task.budget if config.total_env_steps is None else config.total_env_steps
    if config.random_steps >= total:
        raise SystemExit(
            f"random_steps is {config.random_steps} of {total} steps: nothing would be planned; "
            "lower --random-steps"
        )
    if (config.output / "checkpoints").exists() and not config.resume:
        raise SystemExit(f"{config.output} holds a run; add --resume, or choose another --output")
    check_options(config)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    env = make_env(task, config.n_envs, config.seed)
    level = make_level(config, task, env)
    rows = resume(config, level) if config.resume else []
    config.output.mkdir(parents=True, exist_ok=True)
    if int(level.n_env_steps) < total:
        learn(config, task, level, env, total, rows)
    returns, success = evaluate(config, task, level)
    mean = returns.mean().item()
    episodes = [{"return": value} for value in returns.tolist()]
    if success is not None:
        episodes = [row | {"success": s} for row, s in zip(episodes, success.tolist(), strict=True)]
    write_csv(config.output / "evaluation.csv", episodes)
    picture = config.output / "learning_curve.png"
    pictures.learning_curve(rows, mean, picture, config.task)
    goal = "" if task.solved_at is None else f", solved from {task.solved_at:g}"
    rate = "" if success is None else f", success rate {success.mean():.2f}"
    print(
        f"{config.task}, seed {config.seed}, {int(level.n_env_steps)} steps: mean return "
        f"{mean:.2f} over {len(returns)} episodes (lowest {returns.min():.2f}, highest "
        f"{returns.max():.2f}{goal}){rate}"
    )
    print(f"Curve and checkpoints: {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
