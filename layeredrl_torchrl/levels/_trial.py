"""Try a learner when its level is built, so that misfits are found then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import OneHot, TensorSpec

from layeredrl_torchrl.levels.learners import Learner
from layeredrl_torchrl.levels.loss_learner import LossLearner
from layeredrl_torchrl.specs import is_discrete

__all__ = ["try_out"]

_N = 4  # rows; batch normalisation needs two
# Other updates may give the loss other inputs.
_UPDATES = (Learner.update, LossLearner.update)


def try_out(learner: Learner, n_features: int, action_spec: TensorSpec) -> None:
    """Raise ``ValueError`` unless policy and loss accept a level's data.

    Otherwise they would fail at the first update, after all random steps. Nothing changes, not even
    the random numbers. A learner with parts on several devices is not tried, since it is moved
    before use.
    """
    parts = [*learner.parameters(), *learner.buffers()]
    devices = {part.device for part in parts}
    if len(devices) > 1 or "meta" in {device.type for device in devices}:
        return
    device = next(iter(devices), torch.device("cpu"))
    floats = [part.dtype for part in learner.parameters() if part.is_floating_point()]
    dtype = floats[0] if floats else torch.get_default_dtype()
    row = torch.linspace(-1.0, 1.0, _N, dtype=dtype, device=device)
    features = row.unsqueeze(-1).expand(_N, n_features).clone()
    with _unchanged(learner, device):
        with torch.no_grad(), _explained(learner, n_features, action_spec, "policy"):
            action = learner.act(features, explore=False)
            if action.shape != (_N, *action_spec.shape):
                raise ValueError(
                    f"it gives actions {tuple(action.shape)} for {_N} rows, expected "
                    f"{(_N, *action_spec.shape)}"
                )
            if is_discrete(action_spec) and not action_spec.to(device).is_in(action):
                raise ValueError(f"it gives {action[0].tolist()}, which is none of the choices")
        if type(learner).update not in _UPDATES:
            return
        with torch.enable_grad(), _explained(learner, n_features, action_spec, "loss"):
            given = learner.prepare(action)
            flags = torch.zeros(_N, 1, dtype=torch.bool, device=device)
            after = {
                "features": features.clone(),
                "reward": row.unsqueeze(-1),
                "terminated": flags,
                "done": flags.clone(),
            }
            now = {
                "features": features,
                "action": given.to(dtype) if given.is_floating_point() else given,
            }
            terms = learner.loss(TensorDict({**now, "next": TensorDict(after, [_N])}, [_N]))
            named = [key if isinstance(key, str) else ".".join(key) for key in terms.keys(True)]
            if not any(name.startswith("loss") for name in named):
                raise ValueError(f"it gives {sorted(named)}, none of which begins with 'loss'")


@contextmanager
def _explained(
    learner: Learner, n_features: int, action_spec: TensorSpec, part: str
) -> Iterator[None]:
    """Add to an error what was tried, and the remedy."""
    try:
        yield
    except Exception as error:
        kind = type(action_spec).__name__
        action = f"'action' [N, {', '.join(map(str, action_spec.shape))}]"
        if isinstance(action_spec, OneHot):
            action += " (one-hot)"
        elif not is_discrete(action_spec):
            action += " in [-1, 1]"
        reads = "" if part == "policy" else f" and {action}"
        said = f"{type(error).__name__}: {error}".strip()
        raise ValueError(
            f"the {part} of {type(learner.loss).__name__} in {type(learner).__name__} does not fit "
            f"the level, which gives it 'features' [N, {n_features}]{reads}, and whose actions "
            f"are {kind} {tuple(action_spec.shape)} ({said}); build the networks from the "
            "arguments of learner_factory, n_features and action_spec, and take a loss for such "
            "actions"
        ) from error


@contextmanager
def _unchanged(learner: Learner, device: torch.device) -> Iterator[None]:
    """Restore buffers, modes, caches and random generators."""
    loss = learner.loss
    hidden = (part for part in vars(loss).values() if isinstance(part, nn.Module))
    modes = {part: part.training for part in chain(*(m.modules() for m in (learner, *hidden)))}
    buffers = {name: value.clone() for name, value in learner.named_buffers()}
    attributes = set(vars(loss))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in learner.named_buffers():
                    if name in buffers:
                        value.copy_(buffers[name])
            for part, mode in modes.items():
                part.training = mode
            for name in vars(loss).keys() - attributes:
                delattr(loss, name)
