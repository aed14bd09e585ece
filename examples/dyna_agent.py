"""The agent of `dyna_sac.py`: a world model, SAC, and what both learn from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.checkpoint import Checkpoint, GlobalRNGState
from torchrl.data import LazyTensorStorage, MultiStep, TensorDictReplayBuffer
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate

from layeredrl_torchrl import (
    TS1,
    FixedEncoderNet,
    FromBuffer,
    ICEMPlanner,
    PolicyProposal,
    PredictorEnv,
    PredictorFactory,
    RewardPredictor,
    StaticPredictor,
    Task,
)


@dataclass
class AgentConfig:
    """How the agent learns."""

    random_steps: int | None = None
    """Real steps with random actions at the start; a quarter of all by default."""
    imagined_share: float = 0.9
    """Share of a batch for SAC that is imagined; 0 for SAC alone, without a model."""
    horizon: int = 1
    """Steps of an imagined episode, from a tenth of the run on; targets sum up their rewards."""
    imagined_per_step: int = 100
    """Imagined steps for every real step."""
    imagined_size: int = 100_000
    """Imagined steps that are kept: older ones were met by older policies and models."""
    model_updates_per_step: float = 1.0
    """Gradient steps of the world model for every real step."""
    n_models: int = 5
    """Members of the ensemble."""
    model_hidden_size: int = 128
    """Width of the two hidden layers of the world model's networks."""
    updates_per_step: float = 20.0
    """Gradient steps of SAC's critics for every real step."""
    updates_per_actor_update: int = 2
    """Updates of the critics for one of the actor and of the entropy's weight."""
    batch_size: int = 256
    """Steps in a batch, for SAC and for each member of the ensemble."""
    hidden_size: int = 128
    """Width of the two hidden layers of actor and critics."""
    lr: float = 1e-3
    """Learning rate of SAC."""
    gamma: float = 0.99
    """Discount."""
    tau: float = 0.01
    """Share of the critics that their targets take over at each update."""
    entropy_per_action: float = -0.5
    """Entropy that SAC aims at for each dimension of the action scaled to [-1, 1], in nats."""
    alpha_init: float = 0.1
    """Weight of the entropy at the start."""
    compile: bool = False
    """Compile SAC's losses: a third of the time of an update, after a minute or two."""
    plan_horizon: int = 4
    """Steps that are planned ahead."""
    plan_samples: int = 64
    """Candidate plans in the first iteration, beside the policy's."""


# What SAC learns from. State and context are the predictor's, and the encoder gives the real ones.
READ = ("state", "context", "action")
FOLLOWING = (*READ[:2], "reward", "done", "terminated")
KEYS = (*READ, "steps_to_next_obs", *(("next", key) for key in FOLLOWING))
# What is stored of real steps: the predictor learns from observations.
REAL_KEYS = (*KEYS, "observation", ("next", "observation"), ("collector", "traj_ids"))


class Agent:
    """Everything that learns or stores; `predictor` is None for SAC alone.

    `total` is the number of real steps that it is going to learn from.
    """

    def __init__(self, config: AgentConfig, task: Task, env: EnvBase, total: int) -> None:
        self.config, self.total = config, total
        # A model that has seen little leads HalfCheetah onto its back, where it stays.
        self.random_steps = total // 4 if config.random_steps is None else config.random_steps
        encoder = partial(
            FixedEncoderNet,
            latent_state_dims=list(task.state_dims),
            context_dims=list(task.context_dims),
        )
        self.encoder = encoder((task.observation_dim,))
        self.loss = make_loss(config, task, env)
        self.critic_loss, self.actor_loss = self.loss.qvalue_v2_loss, self.loss.actor_loss
        if config.compile:
            # Inductor's own random numbers take longer to draw.
            compiled = partial(torch.compile, options={"fallback_random": True})
            self.critic_loss = compiled(self.critic_loss)
            self.actor_loss = compiled(self.actor_loss)
        self.actor = self.loss.actor_network
        self.policy = TensorDictSequential(self.encoder, self.actor)
        self.target = SoftUpdate(self.loss, tau=config.tau)
        self.optim = torch.optim.Adam(self.loss.parameters(), lr=config.lr, fused=True)
        size = max(total, 100_000)  # a run may be resumed with more steps
        self.real = TensorDictReplayBuffer(storage=LazyTensorStorage(size, ndim=2))
        self.imagined = TensorDictReplayBuffer(storage=LazyTensorStorage(config.imagined_size))
        self.counters = {"env_steps": 0, "updates": 0}
        self.predictor: RewardPredictor | None = None
        if config.imagined_share:
            factory = PredictorFactory(
                hidden_sizes=(config.model_hidden_size,) * 2,
                n_models=config.n_models,
                gamma=config.gamma,
                partial_encoder=encoder,
                predictor_options={"n_steps": 1},
            )
            self.predictor = factory(env.observation_spec_unbatched, env.action_spec_unbatched)

    def checkpoint(self) -> Checkpoint:
        parts = {
            "loss": self.loss,
            "optim": self.optim,
            "real": self.real,
            "counters": self.counters,
            "rng": GlobalRNGState(),
        }
        if self.predictor is not None:
            model = {"predictor": self.predictor, "model_optim": self.predictor.optim}
            parts |= {**model, "imagined": self.imagined}
        return Checkpoint(**parts)

    @property
    def random_steps_left(self) -> int:
        """None once it has learned, even if a resumed run is longer and so is its quarter."""
        done = self.counters["updates"] > 0
        return 0 if done else max(self.random_steps - self.counters["env_steps"], 0)

    def learn(self, data: TensorDictBase) -> dict[str, float]:
        """Store real experience `[env, T]`, then update the model, imagine, and update SAC."""
        config, n_steps = self.config, data.numel()
        self.encoder(data)
        self.encoder(data["next"])
        data["steps_to_next_obs"] = torch.ones(data.shape, dtype=torch.int64)
        self.real.extend(data.select(*REAL_KEYS, strict=False))
        self.counters["env_steps"] += n_steps
        steps = self.counters["env_steps"]
        info: dict[str, float] = {}
        if self.random_steps_left:
            return info
        # The first phase makes up for those in which there was nothing to learn for.
        if not self.counters["updates"]:
            n_steps = steps
        if self.predictor is not None:
            n_updates = math.ceil(config.model_updates_per_step * n_steps)
            _, info = self.predictor.learn(
                self.real, n_updates, config.batch_size, config.batch_size, steps
            )
            # Errors add up over imagined steps, and at first they are large.
            grown = min(1.0, 10 * steps / self.total)
            horizon = 1 + round((config.horizon - 1) * grown)
            n_imagined = min(config.imagined_per_step * n_steps, config.imagined_size)
            imagined = sum_rewards(self.imagine(n_imagined, horizon), config.gamma)
            self.imagined.extend(imagined.select(*KEYS).reshape(-1))
            info["horizon"] = float(horizon)
        n_updates = round(config.updates_per_step * n_steps)
        totals: dict[str, Tensor] = {}
        for batch in self.batches(n_updates):
            self.counters["updates"] += 1
            with_actor = self.counters["updates"] % config.updates_per_actor_update == 0
            for name, value in self.update(batch, with_actor).items():
                totals[name] = totals.get(name, 0) + value
        info |= {name: float(value) / n_updates for name, value in totals.items()}
        return info | {"alpha": self.loss.log_alpha.exp().item()}

    @torch.no_grad()
    def imagine(self, n: int, horizon: int) -> TensorDict:
        """About `n` steps of episodes of the policy that start where real steps did, `[N, T]`."""
        env = PredictorEnv(
            self.predictor,
            propagation=TS1(),
            sample_termination=True,
            initial_states=FromBuffer(self.real, self.predictor),
            batch_size=[max(n // horizon, 1)],
        )
        with set_exploration_type(ExplorationType.RANDOM):
            return env.rollout(horizon, self.actor, break_when_any_done=False)

    def batches(self, n: int, at_once: int = 100) -> Iterator[TensorDict]:
        """`n` batches of real and imagined steps; drawing many at once takes hardly longer."""
        size = self.config.batch_size
        n_imagined = round(self.config.imagined_share * size)
        shares = ((self.real, size - n_imagined), (self.imagined, n_imagined))
        if n_imagined and not len(self.imagined):
            raise RuntimeError("nothing was imagined yet; call learn(), which does so")
        for start in range(0, n, at_once):
            count = min(at_once, n - start)
            parts = [
                buffer.sample(count * share).select(*KEYS).reshape(count, share)
                for buffer, share in shares
                if share
            ]
            yield from torch.cat(parts, 1).unbind(0)

    def update(self, batch: TensorDictBase, with_actor: bool) -> dict[str, Tensor]:
        """One gradient step of the critics, and of the actor if it is its turn."""
        loss, found = self.critic_loss(batch)
        terms = {"loss_qvalue": loss.detach(), "td_error": found["td_error"].mean()}
        if with_actor:
            loss_actor, found = self.actor_loss(batch)
            loss = loss + loss_actor + self.loss.alpha_loss(found["log_prob"]).mean()
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()
        self.target.step()
        return terms

    @torch.no_grad()
    def value(self, state: Tensor, context: Tensor, action: Tensor) -> Tensor:
        """The lower of the critics' values `[*B]` of what the policy does in a state.

        (A predictor's value function is also given the action before it, which is not read here.)
        """
        td = TensorDict({"state": state, "context": context}, state.shape[:-1])
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            self.actor(td)
        found = []
        for params in self.loss.qvalue_network_params.unbind(0):
            with params.to_module(self.loss.qvalue_network):
                found.append(self.loss.qvalue_network(td)["state_action_value"].squeeze(-1))
        return torch.minimum(*found)


def sum_rewards(data: TensorDictBase, gamma: float) -> TensorDictBase:
    """From each step of `data [N, T]` on to the end of its episode or of the data, at once."""
    ends = data["next"].select("done", "terminated")
    data = MultiStep(gamma=gamma, n_steps=data.shape[1])(data)
    # It moves the states and sums the rewards, but the ends stay with the first step.
    last = torch.arange(data.shape[1]) + data["steps_to_next_obs"] - 1
    data["next"].update(ends.gather(1, last))
    return data


def make_loss(config: AgentConfig, task: Task, env: EnvBase) -> SACLoss:
    """SAC's actor and two critics; layer norm keeps many updates per step from diverging.

    SiLU, because ReLU keeps a mask for the backward pass, which Inductor writes one bool at a time.
    """
    spec = env.full_action_spec_unbatched["action"]
    n_in, n_act = task.observation_dim, task.action_dim
    widths = [config.hidden_size] * 2
    mlp = partial(MLP, num_cells=widths, activation_class=nn.SiLU)
    norm = {"norm_class": nn.LayerNorm, "norm_kwargs": [{"normalized_shape": n} for n in widths]}
    actor = ProbabilisticActor(
        TensorDictSequential(
            TensorDictModule(mlp(n_in, 2 * n_act), ["state", "context"], ["params"]),
            TensorDictModule(NormalParamExtractor(), ["params"], ["loc", "scale"]),
        ),
        in_keys=["loc", "scale"],
        spec=spec,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": spec.space.low, "high": spec.space.high},
    )
    critic = ValueOperator(mlp(n_in + n_act, 1, **norm), in_keys=list(READ))
    half_range = (spec.space.high - spec.space.low) / 2
    entropy = (config.entropy_per_action + half_range.log()).sum().item()
    # TorchRL's smooth_l1 bounds the gradients: values of hundreds would take long to learn.
    loss = SACLoss(
        actor,
        critic,
        loss_function="l2",
        alpha_init=config.alpha_init,
        target_entropy=entropy,
    )
    loss.make_value_estimator(gamma=config.gamma)
    return loss


def make_planner(config: AgentConfig, agent: Agent) -> ICEMPlanner:
    """Plans in the world model that try what the policy does, and end in what the critics say."""
    known = agent.predictor
    guided = StaticPredictor(
        model=known.model,
        val_func=agent.value,
        rew_func=known.rew_func,
        encoder=known.encoder,
        latent_state_dim=known.latent_state_dim,
        context_dim=known.context_dim,
    )
    return ICEMPlanner(
        guided,
        horizon=config.plan_horizon,
        n_samples=config.plan_samples,
        n_iterations=3,
        discount=config.gamma,
        use_value_func=True,
        proposal=PolicyProposal(guided, agent.actor),
    )
