"""Whole episodes, to evaluate a policy."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type
from tqdm import tqdm

__all__ = ["play_episodes"]


@torch.no_grad()
def play_episodes(
    env: EnvBase, policy: TensorDictModuleBase, device: str | torch.device = "cpu"
) -> TensorDict:
    """Play one episode in each of ``n`` environments; return their last steps ``[n]``.

    Actions are deterministic. A policy with memory needs its primer in the environment. Unlike
    ``env.rollout``, environments go on when others are done, and playing ends with the longest
    episode. A bar shows how far they are.

    >>> from tensordict.nn import TensorDictModule
    >>> from torchrl.envs import RewardSum
    >>> env = make_batched("InvertedPendulum-v5", 3, seed=0).append_transform(RewardSum())
    >>> policy = TensorDictModule(lambda obs: obs[:, :1], ["observation"], ["action"])
    >>> play_episodes(env, policy)["episode_reward"].shape
    torch.Size([3, 1])

    Args:
        env: Environments ``[n]``; closed at the end.
        policy: The policy.
        device: Device of the policy.

    Returns:
        The content of ``"next"`` after the last step of each episode.
    """
    moves = torch.device(device).type != "cpu"
    data, ends = env.reset(), None
    over = torch.zeros(data.batch_size, dtype=torch.bool)
    bar = tqdm(total=_most_steps(env), desc="evaluation", unit="step", leave=False)
    with bar, set_exploration_type(ExplorationType.DETERMINISTIC):
        while not over.all():
            acted: TensorDictBase = policy(data.to(device)).to("cpu") if moves else policy(data)
            data, following = env.step_and_maybe_reset(acted)
            step = data["next"].clone()
            ends = step if ends is None else ends.where(over, step)
            over = over | step["done"].squeeze(-1)
            data = following
            bar.set_postfix_str(f"{int(over.sum())} of {over.numel()} episodes ended", False)
            bar.update()
    env.close()
    return ends


def _most_steps(env: EnvBase) -> int | None:
    """Return the time limit of gymnasium's environments, if there is one."""
    inner = getattr(getattr(env, "base_env", env), "_env", None)
    inner = next(iter(getattr(inner, "envs", ())), inner)
    return getattr(getattr(inner, "spec", None), "max_episode_steps", None)
