"""What limits a policy that was learned in a world model: the model, the critics, or its noise?

    python benchmarks/policy_limits.py output/value_gradients --eval-episodes 5

Plays episodes with the policy of a run of `examples/value_gradients.py` and prints: the model's
error along the real actions, the critics' values compared with the discounted returns that
followed, whether the model predicts the falls, and the entropy of the policy with its noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import torch
from pictures import discount_of, example_of, restore
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.objectives.value.functional import reward2go

import layeredrl_torchrl as lt
from layeredrl_torchrl.runs import Count, command, find_task

AHEAD = (1, 5, 10, 20)
BEFORE = (5, 10, 20, 40)


@dataclass
class Config:
    """Measure model, critics and entropy along a policy's own episodes."""

    folder: Path
    """Folder of the run."""
    eval_episodes: Count = 5
    """Episodes."""
    threads: Count = 1
    """Threads that torch may use."""


def model_errors(predictor: lt.Predictor, episode: TensorDictBase) -> dict[int, list[float]]:
    """Return errors of the state and of the summed rewards after some steps of the real actions.

    For the state, the root mean square error of the members' mean, in units of each dimension's std
    in the episode; for the rewards, the mean error, whose sign shows its direction.
    """
    found = {}
    state, _ = predictor.state_of(episode["observation"])
    unit = state.std(0).clamp_min(1e-6)
    for ahead in AHEAD:
        starts = torch.arange(0, len(episode) - ahead, 5)
        if not len(starts):
            continue
        steps = starts[:, None] + torch.arange(ahead)
        traj = predictor.rollout(
            episode["observation"][starts], episode["action"][steps], propagation=lt.TS1(20)
        )
        real, _ = predictor.state_of(episode["next", "observation"][steps[:, -1]])
        off = traj["next", "state"][..., -1, :].mean((-3, -2)) - real
        reward = traj["next", "reward"].sum((-2, -1)).mean((-2, -1))
        surplus = reward - episode["next", "reward"][steps].sum((-2, -1))
        found[ahead] = [(off / unit).square().mean().sqrt().item(), surplus.mean().item()]
    return found


def values(agent, episode: TensorDictBase, gamma: float) -> tuple[Tensor, Tensor]:
    """Return each step's value `[T]` (the critics' mean), and the discounted rewards that followed.

    Includes only steps whose return is known: all of an episode that terminates, else those for
    which the missing rest has a weight below 5 %.
    """
    td = agent.predictor.encoder(episode.clone())
    td["action"] = episode["action"]
    came = reward2go(episode["next", "reward"], episode["next", "done"], gamma).squeeze(-1)
    known = len(episode)
    if not episode["next", "terminated"][-1]:
        counts = math.log(0.05) / (gamma - 1) if gamma < 1 else known
        known = max(known - round(counts), 0)
    return agent.loss.qvalues(td).mean(0)[:known], came[:known]


def foreseen(agent, episode: TensorDictBase, n: int = 64) -> dict[int, float]:
    """Return the share of imagined episodes, from some steps before a real fall, that fall, too.

    The policy acts without noise, as in the real episode; falls up to ten steps late count.
    """
    found = {}
    for before in BEFORE:
        if len(episode) <= before:
            continue
        td = agent.predictor.encoder(episode[-before].select("observation"))
        env = lt.PredictorEnv(agent.predictor, batch_size=[n], propagation=lt.TS1())
        start = env.reset(td.select("state", "context").expand(n).contiguous())
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            imagined = env.rollout(
                before + 10,
                agent.actor,
                tensordict=start,
                auto_reset=False,
                break_when_any_done=False,
            )
        found[before] = imagined["next", "terminated"].any(1).float().mean().item()
    return found


@torch.no_grad()
def main(config: Config) -> None:
    """Print all measurements."""
    torch.set_num_threads(config.threads)
    found = example_of(config.folder)
    if found is None or found[0].__name__ != "value_gradients":
        raise SystemExit(f"{config.folder} holds no run of examples/value_gradients.py")
    example, options = found
    task = find_task(options.task)
    env = lt.make_batched(task, 1, seed=options.seed + 10_000)
    agent = example.Agent(options, task, env, options.total_env_steps or task.budget)
    restore(config.folder, loss=agent.loss, predictor=agent.predictor, counts=agent.counts)
    torch.manual_seed(options.seed)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        episodes = [
            env.rollout(1000, agent.policy, break_when_any_done=True)[0]
            for _ in range(config.eval_episodes)
        ]
    falls = [bool(ep["next", "terminated"][-1]) for ep in episodes]
    fallen = list(compress(episodes, falls))
    returns = torch.stack([ep["next", "reward"].sum() for ep in episodes])
    print(
        f"{task.name}: return {returns.mean():.0f} ({returns.min():.0f} to {returns.max():.0f}), "
        f"{len(fallen)} of {len(episodes)} episodes fall, after "
        f"{sorted(len(ep) for ep in fallen)} steps"
    )
    print("\n| steps ahead | error of the state, in its std | surplus of imagined rewards |")
    print("|---|---|---|")
    errors = [model_errors(agent.predictor, ep) for ep in episodes]
    for ahead in AHEAD:
        rows = torch.tensor([e[ahead] for e in errors if ahead in e])
        if len(rows):
            print(f"| {ahead} | {rows[:, 0].mean():.3f} | {rows[:, 1].mean():+.2f} |")
    gamma = discount_of(agent, options)
    pairs = [values(agent, ep, gamma) for ep in episodes]
    said, came = (torch.cat(part) for part in zip(*pairs, strict=True))
    if len(said):
        print(f"\nThe critics say {said.mean():.1f} where {came.mean():.1f} came.")
    seen = [foreseen(agent, ep) for ep in fallen]
    for before in BEFORE:
        rows = [
            (said[-before], came[-before], shares[before])
            for (said, came), shares in zip(compress(pairs, falls), seen, strict=True)
            if before in shares
        ]
        if rows:
            said, came, share = torch.tensor(rows).mean(0)
            print(
                f"{before} steps before a fall they say {said:.1f} where {came:.1f} came; "
                f"{100 * share:.0f} % of imagined episodes fall there."
            )
    states = torch.cat([agent.predictor.encoder(ep.clone()) for ep in episodes])
    dist = agent.loss.actor_network.get_dist(states)
    entropy = -dist.log_prob(dist.rsample())
    print(
        f"\nEntropy {entropy.mean():.2f} nats of {env.action_spec.shape[-1]} dimensions, "
        f"its weight {agent.loss.alpha:.4f}."
    )


if __name__ == "__main__":
    command(main, Config, __doc__)
