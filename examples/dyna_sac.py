"""Learn any task of `layeredrl_torchrl.envs` by SAC on what a learned world model imagines.

Model-based policy optimisation (MBPO, arXiv 1906.08253) out of TorchRL's own parts: `SACLoss`
learns from two `TensorDictReplayBuffer`s. A `Collector` fills one with real experience, the other
gets short imagined episodes that branch off from there: a `RewardPredictor` stepped by
`PredictorEnv`, an environment like any other.

    python examples/dyna_sac.py --task HalfCheetah-v5
    python examples/dyna_sac.py --task HalfCheetah-v5 --imagined-share 0 --output output/sac
    python examples/dyna_sac.py --task HalfCheetah-v5 --resume --plan
    python examples/dyna_sac.py --task HalfCheetah-v5 --n-workers 2 --output output/ray
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
from dyna_agent import Agent, AgentConfig, make_planner
from runs import load_latest, read_csv, rotation_of, write_csv
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase, ExplorationType, RewardSum, set_exploration_type
from tqdm import tqdm

from layeredrl_torchrl import ICEMPlanner, Task, get_task, make_batched


@dataclass
class Config(AgentConfig, CollectorConfig):
    """Learn to control a task by SAC on real and imagined experience."""

    task: str = "HalfCheetah-v5"
    """Name of the task."""
    seed: int = 0
    """Seed of everything random."""
    total_env_steps: int | None = None
    """Steps taken in the real environment; the task's budget by default."""
    n_envs: int = 1
    """Real environments stepped side by side (in each worker)."""
    steps_per_batch: int = 100
    """Real steps between two learning phases."""
    eval_episodes: int = 10
    """Episodes of the final evaluation."""
    plan: bool = False
    """Evaluate also plans that start from the policy's and end in the critics' values."""
    steps_per_checkpoint: int = 1000
    """Real steps between two checkpoints; the last two are kept."""
    output: Path = Path("output/dyna_sac")
    """Folder of the learning curve (CSV and picture) and of the checkpoints."""
    resume: bool = False
    """Go on from the last checkpoint in the output folder."""
    threads: int = 1
    """Threads that torch may use."""


# What a resumed run shares with its checkpoint, which would not fit, or brings its own.
SHAPE = (
    "task",
    "n_envs",
    "n_workers",
    "imagined_share",
    "imagined_size",
    "n_models",
    "model_hidden_size",
    "hidden_size",
    "gamma",
    "entropy_per_action",
)
NAN = float("nan")


def make_env(task: Task, n: int, seed: int) -> EnvBase:
    env = make_batched(task, n, seed=seed)
    env.append_transform(RewardSum())
    return env


def row_of(
    data: TensorDictBase, info: dict[str, float], steps: int, last: float
) -> dict[str, float]:
    """A row of the learning curve; `last` is the return to repeat where no episode has ended."""
    so_far = data["next", "episode_reward"]
    returns = so_far[data["next", "done"]]
    row = {
        "env_steps": float(steps),
        "episodes": float(len(returns)),
        "return": returns.mean().item() if len(returns) else last,
        "return_so_far": so_far[:, -1].mean().item(),
    }
    terms = ("horizon", "nll", "loss_reward", "loss_termination", "loss_qvalue", "td_error")
    return row | {name: info.get(name, NAN) for name in (*terms, "alpha")}


def learn(
    config: Config, task: Task, agent: Agent, env: EnvBase, total: int, rows: list[dict[str, float]]
) -> None:
    """Collect and learn until `total` steps are taken; a row of `rows` for each batch."""
    rotation = rotation_of(config.output)
    checkpoint = agent.checkpoint()
    steps = saved = agent.counters["env_steps"]
    start = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)

    def save() -> None:
        write_csv(config.output / "curve.csv", rows)
        metadata = {**asdict(config), "output": str(config.output)}
        rotation.save(checkpoint, step=steps, metadata=metadata)

    source = collecting(
        config,
        env,
        partial(make_env, task, config.n_envs),
        agent.policy,
        frames_per_batch=config.steps_per_batch,
        total_frames=total - steps,
        init_random_frames=agent.random_steps_left,
    )
    try:
        with (
            source as batches,
            tqdm(total=total, initial=steps, unit="step", desc=config.task) as bar,
        ):
            for data in batches:
                info = agent.learn(data)
                steps = agent.counters["env_steps"]
                row = row_of(data, info, steps, rows[-1]["return"] if rows else NAN)
                rows.append(row | {"seconds": time.monotonic() - start})
                bar.set_postfix(ended=f"{row['return']:.1f}", so_far=f"{row['return_so_far']:.1f}")
                bar.update(data.numel())
                # TorchRL cannot save a buffer that was not written to, as the imagined one at
                # first.
                due = steps - saved >= config.steps_per_checkpoint and agent.counters["updates"] > 0
                if due or steps >= total:
                    save()
                    saved = steps
    except WorkerDiedError as error:
        new = steps > saved and agent.counters["updates"] > 0
        raise save_and_explain(error, save if new else None, rotation) from error


@torch.no_grad()
def evaluate(config: Config, task: Task, policy: TensorDictModuleBase) -> Tensor:
    """Returns of `eval_episodes` episodes of the middle of a policy, side by side."""
    env = make_env(task, config.eval_episodes, config.seed + 10_000)
    if isinstance(policy, ICEMPlanner):
        env.append_transform(policy.make_tensordict_primer())
    data, returns = env.reset(), torch.full((config.eval_episodes,), NAN)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        while returns.isnan().any():
            data, following = env.step_and_maybe_reset(policy(data))
            ended = data["next", "done"].squeeze(-1) & returns.isnan()
            returns[ended] = data["next", "episode_reward"].squeeze(-1)[ended]
            data = following
    env.close()
    return returns


def report(
    config: Config, task: Task, agent: Agent, policy: TensorDictModuleBase, how: str
) -> float:
    """Evaluate a policy and print it in a line; returns the mean return."""
    returns = evaluate(config, task, policy)
    goal = "" if task.solved_at is None else f", solved from {task.solved_at:g}"
    print(
        f"{config.task}, seed {config.seed}, {agent.counters['env_steps']} steps, {how}mean return "
        f"{returns.mean():.2f} over {len(returns)} episodes (lowest {returns.min():.2f}, highest "
        f"{returns.max():.2f}{goal})"
    )
    return returns.mean().item()


def resume(config: Config, agent: Agent) -> list[dict[str, float]]:
    """Load the last checkpoint of the output folder; returns the curve up to it."""
    load_latest(config.output, agent.checkpoint(), asdict(config), SHAPE)
    return read_csv(config.output / "curve.csv", agent.counters["env_steps"])


def main(config: Config) -> None:
    """Run the example."""
    try:
        task = get_task(config.task)
    except KeyError as error:
        raise SystemExit(error.args[0]) from None
    total = task.budget if config.total_env_steps is None else config.total_env_steps
    if config.random_steps is not None and config.random_steps >= total:
        raise SystemExit(
            f"random_steps is {config.random_steps} of {total} steps: nothing would be learned; "
            "lower --random-steps"
        )
    if not 0.0 <= config.imagined_share <= 1.0:
        raise SystemExit(f"imagined_share is {config.imagined_share}, expected one in [0, 1]")
    if config.plan and not config.imagined_share:
        raise SystemExit("plan needs a world model, but imagined_share is 0; leave one of them out")
    if (config.output / "checkpoints").exists() and not config.resume:
        raise SystemExit(f"{config.output} holds a run; add --resume, or choose another --output")
    check_options(config)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    env = make_env(task, config.n_envs, config.seed)
    agent = Agent(config, task, env, total)
    rows = resume(config, agent) if config.resume else []
    config.output.mkdir(parents=True, exist_ok=True)
    if agent.counters["env_steps"] < total:
        learn(config, task, agent, env, total, rows)
    mean = report(config, task, agent, agent.policy, "")
    how = "SAC on imagined experience" if config.imagined_share else "SAC on real experience"
    picture = config.output / "learning_curve.png"
    pictures.learning_curve(rows, mean, picture, config.task, how)
    if config.plan:
        report(config, task, agent, make_planner(config, agent), "planned, ")
    minutes = rows[-1]["seconds"] / 60
    print(f"Learned in {minutes:.1f} minutes; curve and checkpoints: {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
