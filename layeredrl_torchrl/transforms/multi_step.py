"""Multi-step transitions with the ends of episodes."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torchrl.data import MultiStep

from layeredrl_torchrl._padding import until_padding

__all__ = ["sum_rewards"]


def sum_rewards(data: TensorDictBase, gamma: float) -> TensorDictBase:
    """Turn each step into a transition to the end of its episode, or of the data.

    It applies TorchRL's ``MultiStep``, which sums the discounted rewards and moves the next states,
    but takes ``"done"``, ``"terminated"`` and ``"truncated"`` from the first step, so that value
    targets would continue beyond the end of an episode. Here they come from the last step.

    >>> step = {"reward": torch.ones(1, 3, 1), "observation": torch.arange(3.0).reshape(1, 3, 1)}
    >>> ends = torch.tensor([[[False], [True], [False]]])
    >>> data = TensorDict({"next": step | {"done": ends, "terminated": ends}}, [1, 3])
    >>> found = sum_rewards(data, gamma=0.5)
    >>> found["next", "reward"].flatten(), found["next", "terminated"].flatten()
    (tensor([1.5000, 1.0000, 1.0000]), tensor([ True,  True, False]))

    Args:
        data: ``[N, T]``: ``N`` trajectories, each a row in the order of time. They end before
            TorchRL's padding (``split_trajectories``).
        gamma: Discount of one step.

    Returns:
        ``[N, T]``, with ``"steps_to_next_obs"``, by which TorchRL's value estimators discount.

    Raises:
        ValueError: Data of another batch shape.
    """
    if data.ndim != 2:
        raise ValueError(f"data have the shape {tuple(data.shape)}, expected [N, T]")
    flags = ["done", "terminated"]
    if "truncated" in data["next"].keys():
        flags.append("truncated")
    ends = data["next"].select(*flags)
    # MultiStep stops only at ends, so mark the last step before the padding as one.
    done = until_padding(data, data["next", "done"].reshape(*data.shape, -1))
    data = data.clone(recurse=False).set(("next", "done"), done)
    data = MultiStep(gamma=gamma, n_steps=data.shape[1])(data)
    steps = data["steps_to_next_obs"]
    last = torch.arange(data.shape[1], device=steps.device) + steps - 1
    data["next"].update(ends.gather(1, last))
    return data
