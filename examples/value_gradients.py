"""Learn any task of `layeredrl_torchrl.envs` by gradients through a learned world model.

`ValueGradientLoss` rolls out the policy in the model for a few steps with gradients, and adds the
critics' value. Critics learn from lambda-returns of long imagined episodes, whose states are the
starts of the short rollouts (DHMBPO, arXiv 2512.15439). One update per real step is enough.

    python examples/value_gradients.py --task Hopper-v5
    python examples/value_gradients.py --resume
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule, TensorDictSequential
from torch.optim.lr_scheduler import LinearLR
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase, ExplorationType, RewardSum, set_exploration_type
from torchrl.objectives import SoftUpdate

import layeredrl_torchrl as lt
from layeredrl_torchrl import runs
from layeredrl_torchrl.imagination import OutOfRange, TruncateWhere
from layeredrl_torchrl.nets import QValueOperator, TanhActor


@dataclass
class Config(runs.RunOptions):
    """Learn to control a task by value gradients."""

    task: str = "HalfCheetah-v5"
    """Name of the task."""
    random_steps: runs.Natural | None = None
    """Random real steps at the start; by default 1,000, at most a quarter of the total."""
    known_termination: bool = False
    """Whether the task's own termination function is used instead of a learned one."""
    gamma: runs.PositiveShare = 0.99
    """Discount."""
    late_gamma: runs.PositiveShare | None = None
    """Discount after the first quarter; by default 0.995 on Hopper-v5, 0.998 on Walker2d-v5."""
    horizon: runs.Count = 5
    """Imagined steps that the policy's gradient flows through."""
    episode_steps: runs.Count = 40
    """Steps of the imagined episodes that the critics learn from."""
    n_episodes: runs.Count = 96
    """Episodes that are imagined every 20 updates; the last five sets are kept."""
    updates_per_step: runs.Positive = 1.0
    """Updates of the policy per real step; the critics make twice as many."""
    model_updates_per_step: runs.Positive = 1.0
    """Gradient steps of the model per real step."""
    batch_size: runs.Count = 256
    """Steps in a batch, for the critics and for each member of the ensemble."""
    hidden_size: runs.Count = 128
    """Width of the two hidden layers of policy and critics."""
    model_size: runs.Count = 160
    """Width of the three hidden layers of the model's networks."""
    lr: runs.Positive = 1e-3
    """Learning rate of policy and critics, which falls to a tenth over the run."""
    falls_cost: bool = False
    """Whether critics learn that a fall ends the reward for staying alive: see the manual."""
    compile: bool = False
    """Whether to compile model and loss, and on a GPU to capture updates as CUDA graphs."""
    steps_per_batch: runs.Count = 250
    """Real steps between two learning phases."""
    steps_per_evaluation: runs.Natural = 1000
    """Real steps between two evaluations during training; 0 for none."""
    output: Path = Path("output/value_gradients")
    """Folder of the learning curve, of the evaluation and of the checkpoints."""


LATE_GAMMA = {"Hopper-v5": 0.995, "Walker2d-v5": 0.998}  # from the start, they would stand
REAL_KEYS = ("observation", "action", "next", ("collector", "traj_ids"))
KEYS = ("state", "context", "action", "value_target")
TERMS = ("nll", "loss_reward", "loss_qvalue", "value", "entropy", "alpha")


class Agent:
    """Everything that learns or stores."""

    def __init__(self, config: Config, task: lt.Task, env: EnvBase, total: int) -> None:
        self.config, self.quarter, n_random = config, total // 4, config.random_steps
        n_random = min(1000, self.quarter) if n_random is None else n_random
        self.late_gamma = config.late_gamma or LATE_GAMMA.get(task.name, config.gamma)
        dims = {"latent_state_dims": task.state_dims, "context_dims": task.context_dims}
        make_predictor = lt.PredictorFactory(
            hidden_sizes=(config.model_size,) * 3,
            n_models=4,
            gamma=config.gamma,
            partial_encoder=partial(lt.FixedEncoderNet, **dims),
            term_func=task.term_func() if config.known_termination else None,
            predictor_options={"value_loss_weight": 0.0},
        )
        spaces = env.observation_spec_unbatched, env.action_spec_unbatched
        self.predictor = make_predictor(*spaces, device=config.device)
        sizes = len(task.state_dims), len(task.context_dims), spaces[1], (config.hidden_size,) * 2
        self.actor = TanhActor(*sizes).to(config.device)
        q = QValueOperator(*sizes).to(config.device)
        options = {"horizon": config.horizon, "target_entropy": -spaces[1].shape[-1] / 2}
        self.loss = lt.ValueGradientLoss(self.actor, q, self.predictor, mean_qvalue=True, **options)
        self.loss.make_value_estimator(gamma=config.gamma, lmbda=0.97)
        self.policy = TensorDictSequential(self.predictor.encoder, self.actor)
        self.target = SoftUpdate(self.loss, tau=0.02)
        nets = [p for name, p in self.loss.named_parameters() if name != "log_alpha"]
        on_gpu = torch.device(config.device).type == "cuda"
        rate = partial(torch.tensor, device=config.device) if on_gpu else float  # for graphs
        groups = [{"params": nets, "lr": rate(config.lr)}]
        groups += [{"params": [self.loss.log_alpha], "lr": rate(3e-4)}]
        self.optim = torch.optim.Adam(groups, fused=True, capturable=on_gpu)
        self.schedule = LinearLR(self.optim, 1.0, 0.1, total // config.steps_per_batch or 1)
        if config.compile:
            self.predictor.compile(cudagraphs=True)
            self.loss.compile(dynamic=False)
        graph = config.compile and on_gpu
        self.take = CudaGraphModule(self.update, in_keys=[], out_keys=[]) if graph else self.update
        store = partial(LazyTensorStorage, device=config.device)
        self.real = TensorDictReplayBuffer(storage=store(max(total, 100_000), ndim=2))
        n_imagined = config.n_episodes * config.episode_steps
        self.imagined = TensorDictReplayBuffer(storage=store(5 * n_imagined))
        self.counts = {"steps": 0, "updates": 0, "random_steps": n_random}
        names = ["loss", "optim", "schedule", "real", "imagined", "counts", "predictor"]
        self.parts = {n: vars(self)[n] for n in names} | {"model_optim": self.predictor.optim}

    def learn(self, data: TensorDictBase) -> dict[str, float]:
        """Store real experience `[env, T]`; then update the model, the critics and the policy."""
        config, counts, n_steps = self.config, self.counts, data.numel()
        self.real.extend(data.select(*REAL_KEYS, strict=False).to(config.device))
        counts["steps"] += n_steps
        if counts["steps"] < counts["random_steps"]:
            return {}
        self.loss.gamma = self.late_gamma if counts["steps"] > self.quarter else config.gamma
        n_steps = n_steps if counts["updates"] else counts["steps"]  # first for random steps, too
        n_fits, n = max(round(config.model_updates_per_step * n_steps), 1), config.batch_size
        _, info = self.predictor.learn(self.real, n_fits, n, n, counts["steps"])
        self.loss.fit_inputs(self.predictor.encoder(self.real[:]))
        self.imagined.empty()  # predictions of the model before its update
        terms, n_updates = [], max(round(config.updates_per_step * n_steps), 1)
        for i in range(n_updates):
            if i % 20 == 0:
                self.imagine()
            terms.append(self.take(self.imagined.sample(5 * config.batch_size // 2)))
        counts["updates"] += n_updates
        self.schedule.step()
        return info | {name: term.item() for name, term in torch.stack(terms).mean().items()}

    @torch.no_grad()
    def imagine(self) -> None:
        """Imagine episodes of the policy from real states, and store them with their returns."""
        config, starts = self.config, lt.FromBuffer(self.real, self.predictor)
        options = {"initial_states": starts, "batch_size": [config.n_episodes]}
        env = lt.PredictorEnv(self.predictor, propagation=lt.TS1(), **options)
        env = env.append_transform(TruncateWhere(OutOfRange(self.predictor.model)))
        with set_exploration_type(ExplorationType.RANDOM):
            episodes = env.rollout(config.episode_steps, self.actor, break_when_any_done=False)
        self.loss.fit_scale(episodes, rate=0.05, falls_cost=config.falls_cost)
        self.imagined.extend(self.loss.value_targets(episodes).select(*KEYS).reshape(-1))

    def update(self, rows: TensorDictBase) -> TensorDict:
        """Update the critics twice, then policy and entropy's weight, each with its own steps."""
        *for_critics, for_actor = rows.split(self.config.batch_size)
        for batch in for_critics:
            loss, _ = self.loss.qvalue_loss(batch)
            self.step(loss)
            self.target.step()
        loss_actor, outputs = self.loss.actor_loss(for_actor)
        self.step(loss_actor + self.loss.alpha_loss(outputs["log_prob"]))
        terms = {"value": outputs["value"].mean(), "entropy": -outputs["log_prob"].mean()}
        return TensorDict({"loss_qvalue": loss.detach(), "alpha": self.loss.alpha, **terms})

    def step(self, loss: torch.Tensor) -> None:
        """Make one gradient step of all parameters that the loss depends on."""
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()


def main(config: Config) -> None:
    """Learn, save checkpoints and evaluate; then evaluate with more episodes."""
    task = runs.find_task(config.task)
    total = config.total_env_steps or task.budget

    def make_env(seed: int, n: int, **kwargs) -> EnvBase:
        return lt.make_batched(task, n, seed=seed, **kwargs).append_transform(RewardSum())

    with runs.Run(config, total) as run:
        env = make_env(config.seed, config.n_envs)
        agent = Agent(config, task, env, total)
        run.keep(**agent.parts)
        for data in run.collect(env, agent.policy, init_random_frames=agent.counts["random_steps"]):
            row = dict.fromkeys(TERMS, float("nan")) | agent.learn(data)
            row = run.returns(data) | {name: row[name] for name in TERMS}
            run.log(row | run.evaluation(make_env, agent.policy))
        run.finish(make_env, agent.policy, solved_at=task.solved_at)


if __name__ == "__main__":
    runs.command(main, Config, __doc__)
