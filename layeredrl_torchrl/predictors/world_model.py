"""TorchRL's world models as predictors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import TensorSpec, Unbounded
from torchrl.modules import WorldModel, WorldModelWrapper

from layeredrl_torchrl._checks import check_instance, check_positive_int, require
from layeredrl_torchrl.models import Model
from layeredrl_torchrl.nets import Encoder, IdentityEncoder, ModuleEncoder, ObservationShape
from layeredrl_torchrl.predictors.static import StaticPredictor
from layeredrl_torchrl.specs import Space

__all__ = ["from_world_model"]

_HINT = "the world model writes other keys; name the latent by latent_key="


def from_world_model(
    world_model: WorldModel | WorldModelWrapper,
    observation_shape: ObservationShape,
    action_space: Space | TensorSpec,
    *,
    latent_dim: int,
    latent_key: NestedKey = "latent",
) -> StaticPredictor:
    """Return a predictor that uses TorchRL's world model, for planners, levels and imagination.

    Its dynamics have one member and no noise. You train the world model; the predictor shares its
    weights. With a ``WorldModelWrapper``, which has no encoder, the latent state is the
    observation.

    >>> from torchrl.modules import MLP, WorldModel
    >>> from tensordict.nn import TensorDictModule as Mod
    >>> from layeredrl_torchrl.predictors import from_world_model
    >>> world_model = WorldModel(
    ...     Mod(MLP(3, 4), ["observation"], ["latent"]),
    ...     Mod(MLP(5, 4), ["latent", "action"], [("next", "latent")]),
    ...     Mod(MLP(4, 1), [("next", "latent")], [("next", "reward")]),
    ... )
    >>> space = Bounded(-1.0, 1.0, (1,))
    >>> predictor = from_world_model(world_model, (3,), space, latent_dim=4)
    >>> predictor.rollout(torch.zeros(7, 3), torch.zeros(7, 5, 1))["next", "reward"].shape
    torch.Size([7, 1, 1, 5, 1])

    Args:
        world_model: Has a latent state of one entry, a vector. A reward head gives
            ``("next", "reward")`` or ``"reward"``, a done head ``("next", "done")``, as a bool or
            as a probability.
        observation_shape: As :class:`~layeredrl_torchrl.nets.Encoder`.
        action_space: Space of one action.
        latent_dim: Width of the latent state.
        latent_key: Key of the latent state.

    Raises:
        TypeError: Not such a world model. ValueError: An encoder that reads several entries whose
            shapes were not given. When called, KeyError for a latent with another key.
    """
    check_positive_int("latent_dim", latent_dim)
    if isinstance(world_model, WorldModelWrapper):
        dynamics = world_model.get_transition_model_operator()
        reward_head, done_head = world_model.get_reward_operator(), None
        encoder: Encoder = IdentityEncoder(observation_shape)
    else:
        hint = "recurrent ones (Dreamer's) stay in TorchRL's own environments and losses"
        check_instance("world_model", world_model, WorldModel, hint=hint)
        dynamics, reward_head = world_model.dynamics, world_model.reward_head
        done_head = world_model.done_head
        encoder = _encoder(world_model.encoder, observation_shape, latent_dim, latent_key)
    model = _Dynamics(dynamics, latent_dim, latent_key, action_space)
    reward = _Head(reward_head, latent_key, "reward")
    term = None if done_head is None else _Head(done_head, latent_key, "done")
    return StaticPredictor(model, None, reward, encoder, latent_dim, term_func=term)


def _encoder(
    encoder: TensorDictModuleBase, shape: ObservationShape, width: int, latent_key: NestedKey
) -> Encoder:
    keys = list(encoder.in_keys)
    if isinstance(shape, Sequence):
        if len(keys) != 1:
            raise ValueError(
                f"the world model encodes {keys}; give observation_shape as a mapping from these "
                "keys to their shapes"
            )
        shape = {keys[0]: tuple(shape)}
    return ModuleEncoder(_Encode(encoder, list(shape), latent_key), shape, width)


class _Encode(nn.Module):
    """The encoder of a world model as a function of tensors ``[N, *shape]``."""

    def __init__(
        self, encoder: TensorDictModuleBase, keys: list[NestedKey], latent_key: NestedKey
    ) -> None:
        super().__init__()
        self.encoder, self.keys, self.latent_key = encoder, keys, latent_key

    def forward(self, *entries: Tensor) -> Tensor:
        td = TensorDict({}, [len(entries[0])])
        for key, value in zip(self.keys, entries, strict=True):
            td.set(key, value)
        return require(self.encoder(td), self.latent_key, reader="the encoder", hint=_HINT)


class _Dynamics(Model):
    """The dynamics of a world model: one member, one mode, no noise and no termination."""

    def __init__(
        self,
        dynamics: TensorDictModuleBase,
        latent_dim: int,
        latent_key: NestedKey,
        action_space: Space | TensorSpec,
    ) -> None:
        super().__init__(Unbounded((latent_dim,)), None, action_space)
        self.dynamics, self.latent_key = dynamics, latent_key

    def predict_members(
        self, state: Tensor, context: Tensor, action: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        td = TensorDict({"action": action}, state.shape[:-1]).set(self.latent_key, state)
        out = self.dynamics(td)
        after = out.get(("next", self.latent_key), None)
        if after is None:  # as the transition model of a WorldModelWrapper writes it
            after = require(out, self.latent_key, reader="the dynamics", hint=_HINT)
        mean = after.unsqueeze(-2)
        weights = torch.ones_like(mean[..., 0])
        return (mean, torch.zeros_like(mean)), weights, torch.zeros_like(weights[..., 0])


class _Head(nn.Module):
    """A head of a world model as a function of a step ``[*B]``; it reads the next state."""

    reads_next_state = True

    def __init__(self, head: TensorDictModuleBase, latent_key: NestedKey, name: str) -> None:
        super().__init__()
        self.head, self.latent_key, self.name = head, latent_key, name
        # A head that reads the latent at the root is a WorldModelWrapper's; it expects the new
        # state.
        self.after = latent_key in head.in_keys and name in head.out_keys

    def forward(self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        td = TensorDict({"action": action}, state.shape[:-1])
        td.set(self.latent_key, next_state if self.after else state)
        out: Any = self.head(td.set(("next", self.latent_key), next_state))
        found = out.get(("next", self.name), out.get(self.name, None))
        if found is None:
            raise KeyError(f"the head writes {self.head.out_keys}, expected {self.name!r}")
        return found.reshape(state.shape[:-1])
