"""Learn a world model of a MuJoCo task from real experience, and plan in it.

A TorchRL collector gathers experience into a TorchRL replay buffer; a `RewardPredictor` around a
`ProbabilisticEnsemble` learns dynamics, reward, termination and value from it; an `ICEMPlanner`
plans in the learned model, and is the collector's policy.

    python examples/planning_with_model.py --env InvertedPendulum-v5 --total-env-steps 5000
    python examples/planning_with_model.py --eval-only --checkpoint output/demo/checkpoint
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

if sys.platform == "linux" and not {"MUJOCO_GL", "DISPLAY"} & os.environ.keys():
    # Without a screen MuJoCo renders through EGL; it fails on import where told to and EGL is not
    # there, so it is told only where it is.
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError:
        pass
    else:
        os.environ["MUJOCO_GL"] = "egl"

import pictures
import torch
import tyro
from runs import write_csv
from torchrl.checkpoint import Checkpoint
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    EnvBase,
    GymEnv,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from tqdm import tqdm

from layeredrl_torchrl import (
    Expectation,
    ICEMPlanner,
    IdentityEncoder,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    RewardNet,
    RewardPredictor,
    ValueNet,
)


@dataclass
class Config:
    """Learn a world model of a task and control the task by planning in it."""

    env: str = "InvertedPendulum-v5"
    """Gymnasium id of the task."""
    seed: int = 0
    """Seed of everything random."""
    total_env_steps: int = 5000
    """Steps taken in the real environment."""
    random_steps: int = 300
    """Of these, how many with random actions at the start."""
    n_envs: int = 5
    """Environments stepped side by side; one plan serves them all."""
    steps_per_batch: int = 100
    """Real steps between two learning phases."""
    updates_per_step: float = 2.0
    """Gradient steps for every real step."""
    eval_episodes: int = 10
    """Episodes of the final evaluation."""
    n_models: int = 5
    """Members of the ensemble."""
    hidden_size: int = 64
    """Width of the two hidden layers of all networks."""
    gamma: float = 0.99
    """Discount of the value function."""
    value_lr: float = 1e-3
    """Learning rate of the value function."""
    tau: float = 0.01
    """Share of the value network that its target takes over at each update."""
    n_steps: int = 3
    """Rewards in a value target."""
    horizon: int = 8
    """Steps that are planned ahead."""
    n_samples: int = 100
    """Candidate plans in each iteration."""
    n_iterations: int = 3
    """Iterations of the planner."""
    elite_ratio: float = 0.1
    """Share of the candidates that the next iteration is fitted to."""
    output: Path = Path("output/planning_with_model")
    """Folder of the metrics, the checkpoint and the pictures."""
    checkpoint: Path | None = None
    """A checkpoint of this script to start from."""
    eval_only: bool = False
    """Evaluate the checkpoint and learn nothing."""
    threads: int = field(default=2)
    """Threads that torch may use."""


def make_env(name: str, n_envs: int) -> EnvBase:
    """`n_envs` environments side by side, with episode returns and float32 observations."""
    env = SerialEnv(n_envs, partial(GymEnv, name))
    return TransformedEnv(env, Compose(DoubleToFloat(), StepCounter(), RewardSum()))


def make_predictor(config: Config, env: EnvBase) -> RewardPredictor:
    """A predictor that fits the environment."""
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
    return RewardPredictor(
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


def make_policy(config: Config, predictor: RewardPredictor) -> ICEMPlanner:
    """A planner on the predictor: observation in, action out."""
    return ICEMPlanner(
        predictor,
        horizon=config.horizon,
        n_samples=config.n_samples,
        n_iterations=config.n_iterations,
        elite_ratio=config.elite_ratio,
        discount=config.gamma,
        use_value_func=True,
        propagation=Expectation(),
    )


def finished_returns(data) -> list[float]:
    """Returns of the episodes that ended in a batch of experience."""
    done = data["next", "done"]
    return data["next", "episode_reward"][done].tolist()


def learn(config: Config, predictor: RewardPredictor) -> list[dict[str, float]]:
    """Collect, learn and plan until the steps are spent; returns a row of metrics a batch."""
    env = make_env(config.env, config.n_envs)
    env.set_seed(config.seed)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(config.total_env_steps, ndim=2))
    collector = Collector(
        env,
        make_policy(config, predictor),
        frames_per_batch=config.steps_per_batch,
        total_frames=config.total_env_steps,
        init_random_frames=config.random_steps,
        auto_register_policy_transforms=True,
    )
    rows, start, steps, last = [], time.monotonic(), 0, float("nan")
    with tqdm(total=config.total_env_steps, unit="step", desc=config.env) as bar:
        for data in collector:
            steps += data.numel()
            # The value function is that of the planner, so it has to know who acted.
            data["random_action"] = torch.full(data.shape, steps <= config.random_steps)
            buffer.extend(data.exclude("planner", ("next", "planner")))
            info: dict[str, float] = {}
            if steps >= config.random_steps:
                n_updates = round(config.updates_per_step * data.numel())
                # What was put off during the random phase is made up for at its end.
                if not rows or rows[-1]["env_steps"] < config.random_steps:
                    n_updates = round(config.updates_per_step * steps)
                _, info = predictor.learn(buffer, max(n_updates, 1), 256, 256, steps)
            returns = finished_returns(data)
            last = sum(returns) / len(returns) if returns else last
            so_far = data["next", "episode_reward"][:, -1].mean().item()
            rows.append(
                {"env_steps": steps, "seconds": time.monotonic() - start, "return": last}
                | {"episodes": len(returns), "return_so_far": so_far}
                | {name: info.get(name, float("nan")) for name in ("nll", "loss_reward")}
                | {name: info.get(name, float("nan")) for name in ("loss_value", "value_mean")}
            )
            bar.set_postfix(
                ended=f"{last:.1f}", so_far=f"{so_far:.1f}", nll=f"{rows[-1]['nll']:.2f}"
            )
            bar.update(data.numel())
    collector.shutdown()
    return rows


@torch.no_grad()
def evaluate(config: Config, predictor: RewardPredictor):
    """Play `eval_episodes` episodes side by side; returns their returns and the experience."""
    env = make_env(config.env, config.eval_episodes)
    env.set_seed(config.seed + 10_000)
    policy = make_policy(config, predictor.eval())
    env.append_transform(policy.make_tensordict_primer())
    data, returns = env.reset(), torch.full((config.eval_episodes,), float("nan"))
    steps = []
    with tqdm(unit="step", desc="evaluation") as bar:
        while returns.isnan().any():
            data, following = env.step_and_maybe_reset(policy(data))
            ended = data["next", "done"].squeeze(-1) & returns.isnan()
            returns[ended] = data["next", "episode_reward"].squeeze(-1)[ended]
            steps.append(data.select("observation", "action", "next").clone())
            data = following
            bar.update(1)
    env.close()
    return returns, torch.stack(steps, -1)


def main(config: Config) -> None:
    """Run the demo."""
    if config.eval_only and config.checkpoint is None:
        raise SystemExit("--eval-only needs --checkpoint FOLDER, one that this script has written")
    if config.random_steps >= config.total_env_steps and not config.eval_only:
        raise SystemExit(
            f"random_steps is {config.random_steps} of {config.total_env_steps} total_env_steps: "
            "nothing would be planned; lower --random-steps"
        )
    if config.checkpoint is not None and not Checkpoint.is_checkpoint(config.checkpoint):
        raise SystemExit(f"{config.checkpoint} is no checkpoint of this script")
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    if config.checkpoint is not None:
        saved = Checkpoint.manifest(config.checkpoint)["metadata"]
        shape = ("env", "n_models", "hidden_size", "gamma", "n_steps")
        for name in shape:
            setattr(config, name, saved[name])
    config.output.mkdir(parents=True, exist_ok=True)
    predictor = make_predictor(config, make_env(config.env, 1))
    checkpoint = Checkpoint(predictor=predictor, optim=predictor.optim)
    if config.checkpoint is not None:
        checkpoint.load(config.checkpoint)
    rows: list[dict[str, float]] = []
    if not config.eval_only:
        rows = learn(config, predictor)
        write_csv(config.output / "metrics.csv", rows)
        metadata = {
            f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("output",)
        }
        metadata["checkpoint"] = None
        checkpoint.save(config.output / "checkpoint", metadata=metadata)
    returns, played = evaluate(config, predictor)
    if rows:
        pictures.learning_curve(
            rows, returns.mean().item(), config.output / "learning_curve.png", config.env
        )
    print(
        f"{config.env}, seed {config.seed}: mean return {returns.mean():.1f} over "
        f"{len(returns)} episodes (lowest {returns.min():.1f}, highest {returns.max():.1f})"
    )
    pictures.prediction(predictor, played, config.output / "prediction.png", config.env)
    policy = make_policy(config, predictor)
    pictures.animation(config.env, policy, config.output / "policy.gif", config.seed + 20_000)
    print(f"Pictures, metrics and checkpoint: {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
