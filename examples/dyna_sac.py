"""Learn any task of `layeredrl_torchrl.envs` by SAC on the imagined data of a learned world model.

Model-based policy optimisation (MBPO, arXiv 1906.08253) with TorchRL's own parts: `SACLoss` learns
from two replay buffers. A collector fills one with real experience. `PredictorEnv` steps a
predictor to fill the other with short imagined episodes that start at states of the first.

    python examples/dyna_sac.py --task HalfCheetah-v5
    python examples/dyna_sac.py --resume
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase, ExplorationType, RewardSum, set_exploration_type
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate

import layeredrl_torchrl as lt
from layeredrl_torchrl import runs


@dataclass
class Config(runs.WorkerOptions):
    """Learn to control a task by SAC on real and imagined experience."""

    task: str = "HalfCheetah-v5"
    """Name of the task."""
    random_steps: runs.Natural | None = None
    """Real steps with random actions at the start; by default a quarter of the total."""
    imagined_share: runs.Share = 0.9
    """Imagined share of SAC's batches; 0 for SAC alone, without a model."""
    horizon: runs.Count = 1
    """Steps of an imagined episode, after a tenth of the run; targets sum their rewards."""
    hidden_size: runs.Count = 128
    """Width of the two hidden layers of all networks."""
    updates_per_step: runs.Positive = 20.0
    """Gradient steps of SAC's critics per real step; the model makes one."""
    updates_per_actor_update: runs.Count = 2
    """Updates of the critics per update of the actor and of the entropy's weight."""
    batch_size: runs.Count = 256
    """Steps in a batch, for SAC and for each member of the ensemble."""
    gamma: runs.Share = 0.99
    """Discount."""
    compile: bool = False
    """Compile SAC's losses: updates take a third of the time, after a minute or two."""
    output: Path = Path("output/dyna_sac")
    """Folder of the learning curve, of the evaluation and of the checkpoints."""


def make_loss(config: Config, task: lt.Task, env: EnvBase) -> SACLoss:
    """SAC's actor and two critics; layer norm prevents divergence with many updates per step."""
    spec, widths = env.full_action_spec_unbatched["action"], [config.hidden_size] * 2
    n_in, n_act = task.observation_dim, task.action_dim
    # ReLU keeps a mask for the backward pass, which Inductor writes one bool at a time.
    mlp = partial(MLP, num_cells=widths, activation_class=nn.SiLU)
    norm = {"norm_class": nn.LayerNorm, "norm_kwargs": [{"normalized_shape": n} for n in widths]}
    net = mlp(n_in, 2 * n_act).append(NormalParamExtractor())
    net = TensorDictModule(net, ["state", "context"], ["loc", "scale"])
    tanh = partial(TanhNormal, low=spec.space.low, high=spec.space.high)
    actor = ProbabilisticActor(net, ["loc", "scale"], spec=spec, distribution_class=tanh)
    critic = ValueOperator(mlp(n_in + n_act, 1, **norm), in_keys=["state", "context", "action"])
    # Half a nat below a uniform distribution's, for each dimension of an action in [-1, 1].
    entropy = (((spec.space.high - spec.space.low) / 2).log() - 0.5).sum().item()
    # TorchRL's smooth_l1 bounds the gradients: it would take long to learn values of hundreds.
    loss = SACLoss(actor, critic, loss_function="l2", alpha_init=0.1, target_entropy=entropy)
    loss.make_value_estimator(gamma=config.gamma)
    return loss.to(config.device)


# SAC learns from KEYS. Real steps are stored with REAL_KEYS: the predictor learns from
# observations.
FOLLOWING = tuple(("next", key) for key in ("state", "context", "reward", "done", "terminated"))
KEYS = ("state", "context", "action", "steps_to_next_obs", *FOLLOWING)
REAL_KEYS = (*KEYS, "observation", ("next", "observation"), ("collector", "traj_ids"))


class Agent:
    """Everything that learns or stores; SAC alone has no `predictor`."""

    def __init__(self, config: Config, task: lt.Task, env: EnvBase, total: int) -> None:
        self.config, self.total = config, total
        dims = {"latent_state_dims": task.state_dims, "context_dims": task.context_dims}
        encoder = partial(lt.FixedEncoderNet, **dims)
        self.encoder = encoder((task.observation_dim,)).to(config.device)
        self.loss = make_loss(config, task, env)
        self.policy = TensorDictSequential(self.encoder, self.loss.actor_network)
        losses = (self.loss.qvalue_v2_loss, self.loss.actor_loss)
        if config.compile:  # (Inductor's own random numbers are slower.)
            losses = [torch.compile(loss, options={"fallback_random": True}) for loss in losses]
        self.critic_loss, self.actor_loss = losses
        self.target = SoftUpdate(self.loss, tau=0.01)
        self.optim = torch.optim.Adam(self.loss.parameters(), lr=1e-3, fused=True)
        store = partial(LazyTensorStorage, device=config.device)
        self.real = TensorDictReplayBuffer(storage=store(max(total, 100_000), ndim=2))
        # With too little data, the model leads HalfCheetah onto its back, and it stays there.
        n_random = total // 4 if config.random_steps is None else config.random_steps
        self.counts = {"steps": 0, "updates": 0, "random_steps": n_random}
        self.parts = {name: vars(self)[name] for name in ("optim", "real", "counts", "loss")}
        if config.imagined_share:
            options = {"gamma": config.gamma, "predictor_options": {"n_steps": 1}}
            options |= {"hidden_sizes": (config.hidden_size,) * 2, "partial_encoder": encoder}
            spaces = env.observation_spec_unbatched, env.action_spec_unbatched
            self.predictor = lt.PredictorFactory(**options)(*spaces).to(config.device)
            self.imagined = TensorDictReplayBuffer(storage=store(100_000))
            self.parts |= {"predictor": self.predictor, "imagined": self.imagined}
            self.parts["model_optim"] = self.predictor.optim

    def learn(self, data: TensorDictBase) -> dict[str, float]:
        """Store real experience `[env, T]`, then update the model, imagine, and update SAC."""
        config, counts, n_steps = self.config, self.counts, data.numel()
        data = data.to(config.device)
        self.encoder(data), self.encoder(data["next"])
        data["steps_to_next_obs"] = torch.ones_like(data["next", "done"][..., 0], dtype=torch.int64)
        self.real.extend(data.select(*REAL_KEYS, strict=False))
        counts["steps"] += n_steps
        if counts["steps"] < counts["random_steps"]:
            return {}
        # The first phase also makes the updates for all random steps.
        n_steps, info = (n_steps if counts["updates"] else counts["steps"]), {}
        if config.imagined_share:
            sizes = (config.batch_size, config.batch_size)
            _, info = self.predictor.learn(self.real, n_steps, *sizes, counts["steps"])
            grown = min(1.0, 10 * counts["steps"] / self.total)  # errors are large at first
            info["horizon"] = 1 + round((config.horizon - 1) * grown)
            episodes = self.imagine(min(100 * n_steps, 100_000), info["horizon"])
            episodes = lt.sum_rewards(episodes, config.gamma).select(*KEYS)
            self.imagined.extend(episodes.reshape(-1))
        n_updates = max(round(config.updates_per_step * n_steps), 1)
        terms = reduce(add, map(self.update, self.batches(n_updates)))
        return info | {name: value.item() / n_updates for name, value in terms.items()}

    @torch.no_grad()
    def imagine(self, n: int, horizon: int) -> TensorDict:
        """Imagine about `n` steps of the policy, in episodes `[N, T]` from real states."""
        starts, batch = lt.FromBuffer(self.real, self.predictor), [max(n // horizon, 1)]
        options = {"propagation": lt.TS1(), "sample_termination": True, "initial_states": starts}
        env = lt.PredictorEnv(self.predictor, batch_size=batch, **options)
        with set_exploration_type(ExplorationType.RANDOM):
            return env.rollout(horizon, self.loss.actor_network, break_when_any_done=False)

    def batches(self, n: int):
        """Yield `n` batches of real and imagined steps, sampled many at once, which is faster."""
        n_imagined = round(self.config.imagined_share * self.config.batch_size)
        shares = {"real": self.config.batch_size - n_imagined, "imagined": n_imagined}
        for count in (min(100, n - start) for start in range(0, n, 100)):
            drawn = [(vars(self)[name].sample(count * k), k) for name, k in shares.items() if k]
            parts = [data.select(*KEYS).reshape(count, k) for data, k in drawn]
            yield from torch.cat(parts, 1).unbind(0)

    def update(self, batch: TensorDictBase) -> TensorDict:
        """Make one gradient step of the critics, and of the actor if it is due."""
        self.counts["updates"] += 1
        loss, _ = self.critic_loss(batch)
        terms = {"loss_qvalue": loss.detach(), "alpha": self.loss.log_alpha.detach().exp()}
        if self.counts["updates"] % self.config.updates_per_actor_update == 0:
            loss_actor, outputs = self.actor_loss(batch)
            loss = loss + loss_actor + self.loss.alpha_loss(outputs["log_prob"]).mean()
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()
        self.target.step()
        return TensorDict(terms)


def main(config: Config) -> None:
    """Learn and save checkpoints; then evaluate."""
    task = runs.find_task(config.task)
    total = config.total_env_steps or task.budget
    if config.horizon > 1 and not config.imagined_share:
        raise runs.RunError(f"--horizon {config.horizon} has no effect with --imagined-share 0")
    terms = ("horizon", "nll", "loss_reward", "loss_termination", "loss_qvalue", "alpha")

    def make_env(seed: int, n: int = config.n_envs, **kwargs) -> EnvBase:
        return lt.make_batched(task, n, seed=seed, **kwargs).append_transform(RewardSum())

    with runs.Run(config, total) as run:
        env = make_env(config.seed)
        agent = Agent(config, task, env, total)
        run.keep(**agent.parts)
        n_random = agent.counts["random_steps"]
        for data in run.collect(env, agent.policy, make_env=make_env, init_random_frames=n_random):
            row = dict.fromkeys(terms, math.nan) | agent.learn(data)
            row = run.returns(data) | {name: row[name] for name in terms}
            run.log(row | run.evaluation(make_env, agent.policy))
        run.finish(make_env, agent.policy, solved_at=task.solved_at)


if __name__ == "__main__":
    runs.command(main, Config, __doc__)
