"""Benefit of planning over a policy: plans try the policy and end in its critics' value.

    python benchmarks/plan_with_policy.py output/value_gradients --eval-episodes 3

Evaluates the policy of a run of `examples/value_gradients.py` or `examples/dyna_sac.py`, and iCEM
in its world model with the policy as a proposal, on the same episodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pictures import discount_of, example_of, restore
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs import ExplorationType, RewardSum, set_exploration_type

from layeredrl_torchrl import ICEMPlanner, PolicyProposal, StaticPredictor, make_batched
from layeredrl_torchrl.runs import Count, command, find_task, play_episodes


@dataclass
class Config:
    """Plan with a policy that was learned in a world model."""

    folder: Path
    """Folder of the run."""
    eval_episodes: Count = 10
    """Episodes."""
    horizon: Count = 4
    """Steps of a plan."""
    n_samples: Count = 64
    """Candidate plans in the first iteration, besides the policy's."""
    device: str = "cpu"
    """Device of the networks."""
    threads: Count = 1
    """Threads that torch may use."""


def make_planner(config: Config, agent, gamma: float) -> ICEMPlanner:
    """Make a planner that tries the policy's actions, and ends plans in the critics' value."""
    actor, loss, known = agent.loss.actor_network, agent.loss, agent.predictor

    def value(state: Tensor, context: Tensor, action: Tensor) -> Tensor:
        """The lower of the critics' values `[*B]` of the policy's action in a state."""
        td = TensorDict({"state": state, "context": context}, state.shape[:-1])
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            actor(td)
        found = []
        for params in loss.qvalue_network_params.unbind(0):
            with params.to_module(loss.qvalue_network):
                found.append(loss.qvalue_network(td)["state_action_value"].squeeze(-1))
        return torch.minimum(*found)

    guided = StaticPredictor(
        model=known.model,
        val_func=value,
        rew_func=known.rew_func,
        encoder=known.encoder,
        latent_state_dim=known.latent_state_dim,
        context_dim=known.context_dim,
        term_func=known.term_func,
    )
    return ICEMPlanner(
        guided,
        horizon=config.horizon,
        n_samples=config.n_samples,
        n_iterations=3,
        discount=gamma,
        use_value_func=True,
        deterministic_mode="best",  # in evaluation as in training
        proposal=PolicyProposal(guided, actor),
    )


@torch.no_grad()
def main(config: Config) -> None:
    """Print both mean returns."""
    torch.set_num_threads(config.threads)
    found = example_of(config.folder)
    names = ("dyna_sac", "value_gradients")
    modelled = found is not None and getattr(found[1], "imagined_share", 1)
    if not modelled or found[0].__name__ not in names:
        raise SystemExit(f"{config.folder} holds no run of examples {names} with a model")
    example, options = found
    options.device = config.device
    task = find_task(options.task)
    env = make_batched(task, 1, seed=0)
    agent = example.Agent(options, task, env, options.total_env_steps or task.budget)
    restore(config.folder, loss=agent.loss, predictor=agent.predictor, counts=agent.counts)
    torch.manual_seed(options.seed)
    planner = make_planner(config, agent, discount_of(agent, options))
    for how, policy in (("the policy", agent.policy), ("planned", planner)):
        env = make_batched(task, config.eval_episodes, seed=options.seed + 10_000)
        env.append_transform(RewardSum())
        if policy is planner:
            env.append_transform(planner.make_tensordict_primer())
        returns = play_episodes(env, policy, config.device)["episode_reward"]
        print(
            f"{how}: mean return {returns.mean():.2f} over {len(returns)} episodes "
            f"(lowest {returns.min():.2f}, highest {returns.max():.2f})"
        )


if __name__ == "__main__":
    command(main, Config, __doc__)
