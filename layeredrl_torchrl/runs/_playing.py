"""Whole episodes, to say how good a policy is."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type

__all__ = ["play_episodes"]


@torch.no_grad()
def play_episodes(
    env: EnvBase, policy: TensorDictModuleBase, device: str | torch.device = "cpu"
) -> TensorDict:
    """The last step of one episode in each of ``n`` environments, as ``step`` writes it, ``[n]``.

    Actions are a stochastic policy's middle. What the policy carries from step to step needs its
    primer in the environment. Unlike ``env.rollout`` this ends with the longest episode, and
    environments go on where others are done.

    >>> from tensordict.nn import TensorDictModule
    >>> from torchrl.envs import RewardSum
    >>> env = make_batched("InvertedPendulum-v5", 3, seed=0).append_transform(RewardSum())
    >>> policy = TensorDictModule(lambda obs: obs[:, :1], ["observation"], ["action"])
    >>> play_episodes(env, policy)["episode_reward"].shape
    torch.Size([3, 1])

    Args:
        env: Environments ``[n]``; closed in the end.
        policy: What acts.
        device: Where the policy is.
    """
    moves = torch.device(device).type != "cpu"
    data, ends = env.reset(), None
    over = torch.zeros(data.batch_size, dtype=torch.bool)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        while not over.all():
            acted: TensorDictBase = policy(data.to(device)).to("cpu") if moves else policy(data)
            data, following = env.step_and_maybe_reset(acted)
            step = data["next"].clone()
            ends = step if ends is None else ends.where(over, step)
            over = over | step["done"].squeeze(-1)
            data = following
    env.close()
    return ends
