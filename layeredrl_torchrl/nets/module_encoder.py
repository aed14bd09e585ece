"""An encoder from any torch module, and a normalisation that prevents collapsed states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import NestedKey
from torch import Tensor, nn

from layeredrl_torchrl._checks import check_instance, check_number, check_positive_int
from layeredrl_torchrl.nets.encoders import Encoder, ObservationShape

__all__ = ["ModuleEncoder", "SimNorm"]


class ModuleEncoder(Encoder):
    """Encodes observations with any torch module, such as a convolutional network for images.

    A predictor trains it by the reward loss, and by
    :class:`~layeredrl_torchrl.objectives.ConsistencyLoss` if that is added.

    >>> from torch import nn
    >>> from layeredrl_torchrl.nets import ModuleEncoder, SimNorm
    >>> net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 16), SimNorm())
    >>> state, context = ModuleEncoder(net, (3,), latent_state_dim=16)(torch.zeros(7, 3))
    >>> state.shape
    torch.Size([7, 16])

    Args:
        module: Called with one tensor ``[N, *shape]`` for each entry of the observation, with
            flattened batch axes. Returns the state ``[N, D]``, or with a ``context_dim`` state and
            context ``[N, C]``. Images of bytes arrive as floats from 0 to 255; divide them.
        mapped_env_obs_shape: Shape of an observation, with any number of axes, or a mapping from
            the keys of its entries to their shapes.
        latent_state_dim: ``D``.
        context_dim: ``C``, may be 0. The context should be constant in an episode.
        in_keys: Key of an observation without a mapping; ``["observation"]`` by default.
        out_keys: Keys of state and context.

    Raises:
        TypeError, ValueError: As :class:`Encoder`; not a module. When called, for outputs of
            another kind or shape.
    """

    def __init__(
        self,
        module: nn.Module,
        mapped_env_obs_shape: ObservationShape,
        latent_state_dim: int,
        context_dim: int = 0,
        *,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] = ("state", "context"),
    ) -> None:
        check_instance("module", module, nn.Module, hint="pass a network, not its class")
        shapes = mapped_env_obs_shape
        if not isinstance(shapes, Mapping):
            keys = ["observation"] if in_keys is None else list(in_keys)
            if len(keys) != 1:
                raise ValueError(
                    f"an encoder has one in_key and two out_keys, got {keys} and {list(out_keys)}; "
                    "of an observation of several entries, give their shapes by their keys"
                )
            shapes, in_keys = {keys[0]: tuple(shapes)}, None
        super().__init__(shapes, latent_state_dim, context_dim, in_keys, out_keys)
        self.module = module

    def split(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Call the module with the entries, flat ``[N, *shape]``."""
        batch = observation.shape[:-1]
        flat = observation.reshape(batch.numel(), self.obs_dim)
        out = self.module(*self.part(flat))
        if self.context_dim == 0 and isinstance(out, Tensor):
            out = (out, flat[:, :0])
        shapes = [(len(flat), self.latent_state_dim), (len(flat), self.context_dim)]
        if not isinstance(out, tuple) or [tuple(x.shape) for x in out] != shapes:
            found = out if isinstance(out, tuple | list) else [out]
            raise ValueError(
                f"the module of a ModuleEncoder gave {[tuple(x.shape) for x in found]}, expected "
                f"the state {shapes[0]}"
                + (f" and the context {shapes[1]}" if self.context_dim else "")
            )
        state, context = (x.reshape(*batch, x.shape[-1]) for x in out)
        return state, context


class SimNorm(nn.Module):
    """Softmax over groups of neighbouring dimensions (TD-MPC2, arXiv 2310.16828, equation 5).

    As the last layer of an encoder it bounds the state, and keeps all states from collapsing to one
    point, which would be easiest to predict.

    >>> from layeredrl_torchrl.nets import SimNorm
    >>> SimNorm(4)(torch.zeros(2, 8)).sum(-1)
    tensor([2., 2.])

    Args:
        size: Dimensions of a group; must divide the total number.
        temperature: Divides the inputs.

    Raises:
        ValueError: A width that is not a multiple of ``size``.
    """

    def __init__(self, size: int = 8, temperature: float = 1.0) -> None:
        super().__init__()
        self.size = check_positive_int("size", size)
        self.temperature = check_number("temperature", temperature, 0.0, open_low=True)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[*B, D]``."""
        if x.shape[-1] % self.size:
            raise ValueError(
                f"SimNorm has groups of {self.size}, but {x.shape[-1]} dimensions came in; choose "
                "a size that divides them"
            )
        groups = x.unflatten(-1, (-1, self.size)) / self.temperature
        return torch.softmax(groups, -1).flatten(-2)
