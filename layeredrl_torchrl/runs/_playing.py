"""Play whole episodes to evaluate a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.checkpoint import GlobalRNGState
from torchrl.collectors import Evaluator
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type
from tqdm import tqdm

from layeredrl_torchrl._checks import check_instance

__all__ = ["collector_options", "evaluate", "make_checked", "play_episodes"]


def make_checked(make_env: Callable[..., EnvBase], **kwargs: Any) -> EnvBase:
    """Return ``make_env(**kwargs)``; raise ``TypeError`` unless it is an environment."""
    names = ", ".join(f"{name}=" for name in kwargs)
    if isinstance(make_env, EnvBase):
        raise TypeError(f"make_env is an environment; pass a function, make_env({names}) -> env")
    env = make_env(**kwargs)
    hint = "wrap one of gymnasium by GymWrapper, or use make_batched"
    check_instance(f"what make_env({names}) returns", env, EnvBase, hint=hint)
    return env


def collector_options(device: str | torch.device) -> dict[str, Any]:
    """Return options of a collector for a policy on ``device`` and environments on the CPU."""
    options: dict[str, Any] = {"auto_register_policy_transforms": True}
    if torch.device(device).type != "cpu":
        options["policy_device"] = device
        options |= {"env_device": "cpu", "storing_device": "cpu"}
    return options


def evaluate(
    make_env: Callable[[], EnvBase],
    policy: TensorDictModuleBase,
    n: int,
    *,
    seed: int,
    device: str | torch.device,
) -> dict[str, float]:
    """Play ``n`` episodes with TorchRL's ``Evaluator``, one after the other.

    Random numbers and the policy's mode are restored afterwards.

    Args:
        make_env: Returns one environment, batch size ``[]`` or ``[1]`` (with several, short
            episodes would be overrepresented among the first ``n``); it is closed at the end.
            Making it may draw and seed random numbers.
        policy: The policy, whose primers are appended to the environment.
        n: Number of episodes.
        seed: Seed of the random numbers that the policy draws.
        device: Device of the policy.

    Returns:
        ``"reward"``, the mean return, ``"episode_length"`` and other results of the ``Evaluator``,
        and the share of ``"success"`` if the environment gives ``("next", "success")``.
    """
    modes = [(module, module.training) for module in policy.modules()]
    rng = GlobalRNGState()
    before = rng.state_dict()
    try:
        env = make_env()
        torch.manual_seed(seed)
        policy.eval()  # before the collector tries the policy
        evaluator = Evaluator(
            env,
            policy,
            num_trajectories=n,
            frames_per_batch=50,  # so many steps may be wasted at the end
            collector_kwargs={"traj_format": "cat", **collector_options(device)},
            metrics_fn=_success,
            log_prefix="",
        )
        try:
            found = evaluator.evaluate()
        finally:
            evaluator.shutdown()
    finally:
        rng.load_state_dict(before)
        for module, training in modes:
            module.training = training
    return {name.removeprefix("/"): value for name, value in found.items()}


def _success(data: TensorDictBase) -> dict[str, float]:
    """Return the share of episodes that reached the goal at some step."""
    success = data.get(("next", "success"), None)
    if success is None:
        return {}
    ids = data["collector", "traj_ids"]
    reached = [success[ids == episode].any() for episode in ids.unique()]
    return {"success": torch.stack(reached).float().mean().item()}


@torch.no_grad()
def play_episodes(
    env: EnvBase, policy: TensorDictModuleBase, device: str | torch.device = "cpu"
) -> TensorDict:
    """Play one episode in each of ``n`` environments; return their last steps ``[n]``.

    Actions are deterministic. A policy with memory needs its primer in the environment. Unlike in
    ``env.rollout``, environments continue when others are done; playing ends with the longest
    episode. A bar shows the progress.

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
    over = torch.zeros_like(data["done"].squeeze(-1))
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
