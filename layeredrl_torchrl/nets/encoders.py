"""Encoders: they split observations into a state and a context, constant in an episode."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from typing import TypeAlias

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor, nn

from layeredrl_torchrl._checks import (
    check_finite,
    check_indices,
    check_positive_int,
    check_resolution,
    check_width,
    require,
)
from layeredrl_torchrl._dispatch import dispatched
from layeredrl_torchrl._state import WholeState

__all__ = ["Encoder", "EncoderNet", "FixedEncoderNet", "IdentityEncoder", "ObservationShape"]

#: ``[obs]``, or the shape of each entry of an observation, by its key.
ObservationShape: TypeAlias = Sequence[int] | Mapping[NestedKey, Sequence[int]]


class Encoder(WholeState):
    """Base class of encoders; call it with a tensor or with a TensorDict.

    ``encoder(obs)`` and ``encoder(observation=obs)`` return ``(state, context)``; ``encoder(td)``
    reads ``in_keys`` and writes ``out_keys``.

    >>> class Halves(Encoder):
    ...     def split(self, observation):
    ...         return observation[..., :2], observation[..., 2:]
    >>> state, context = Halves((4,), latent_state_dim=2, context_dim=2)(torch.arange(4.0))
    >>> context
    tensor([2., 3.])

    An observation may also have several entries of any shapes: give a mapping from their keys to
    their shapes. :meth:`join` flattens and concatenates them in this order into one vector, which
    all calls with tensors take. The environment needs no transform.

    >>> encoder = IdentityEncoder({"position": (2,), "camera": (1, 2, 2)})
    >>> td = TensorDict({"position": torch.zeros(7, 2), "camera": torch.ones(7, 1, 2, 2)}, [7])
    >>> encoder(td)["state"].shape
    torch.Size([7, 6])

    Args:
        mapped_env_obs_shape: Shape of one observation, ``[obs]``; or of each entry, by its key.
        latent_state_dim: ``D``.
        context_dim: ``C``, may be 0.
        in_keys: Key of the observation; with a mapping, its keys are used instead.
        out_keys: Keys of state and context.

    Shapes:
        observation ``[*B, obs]`` -> state ``[*B, D]``, context ``[*B, C]``, in the encoder's dtype
        (set by ``encoder.to(dtype)``; observations are converted).

    Raises:
        ValueError: A shape of several axes without a mapping; observations of another width, or
            with NaN; a ``split`` that returns other shapes than declared. KeyError: An entry that
            is missing from a TensorDict.
    """

    def __init__(
        self,
        mapped_env_obs_shape: ObservationShape,
        latent_state_dim: int,
        context_dim: int,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] = ("state", "context"),
    ) -> None:
        super().__init__()
        named = isinstance(mapped_env_obs_shape, Mapping)
        if isinstance(mapped_env_obs_shape, Mapping):
            if in_keys is not None or not mapped_env_obs_shape:
                raise ValueError(
                    f"the shapes are those of the entries {list(mapped_env_obs_shape)}, with "
                    f"in_keys={in_keys}; name at least one entry, and leave in_keys out"
                )
            in_keys = [unravel_key(key) for key in mapped_env_obs_shape]
            shapes = [_shape(shape) for shape in mapped_env_obs_shape.values()]
        else:
            in_keys = ("observation",) if in_keys is None else in_keys
            shapes = [_shape(mapped_env_obs_shape)]
        shape = shapes[0]
        if not named and len(shape) != 1:
            raise ValueError(
                f"mapped_env_obs_shape is {shape}; only flat observations [obs] are supported, "
                "flatten them with TorchRL's FlattenObservation or CatTensors; of a batched "
                "environment, pass the shape in env.observation_spec_unbatched; or name the "
                "observation: {'pixels': (3, 64, 64)}"
            )
        if len(in_keys) != len(shapes) or len(out_keys) != 2:
            raise ValueError(
                f"an encoder has one in_key and two out_keys, got {list(in_keys)} and "
                f"{list(out_keys)}"
            )
        #: The shape of each entry of an observation, by its key.
        self.entries = dict(zip(in_keys, shapes, strict=True))
        self.obs_dim = sum(map(prod, shapes))
        # Moves with the module, and gives the dtype to which observations are converted.
        self.register_buffer("_floats", torch.empty(0), persistent=False)
        self.latent_state_dim = check_positive_int("latent_state_dim", latent_state_dim)
        self.context_dim = check_positive_int("context_dim", context_dim, minimum=0)
        self.in_keys = list(in_keys)
        self.out_keys = list(out_keys)

    @property
    def joins(self) -> bool:
        """Whether observations have to be joined, as several entries or one with several axes."""
        return [len(shape) for shape in self.entries.values()] != [1]

    @abstractmethod
    def split(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Map checked observations ``[*B, obs]`` to state and context."""

    def merge(self, state: Tensor, context: Tensor) -> Tensor:
        """Return the observations ``[*B, obs]`` of state and context, the inverse of :meth:`split`.

        A hook; by default there is no inverse.

        Raises:
            ValueError: An encoder without an inverse.
        """
        raise ValueError(
            f"a {type(self).__name__} has no inverse, so states cannot be decoded; use an "
            "IdentityEncoder or a FixedEncoderNet of all dimensions, implement "
            "merge(state, context), or train a decoder (add_loss)"
        )

    def join(self, tensordict: TensorDictBase) -> Tensor:
        """Join the entries of a TensorDict ``[*B]`` to observations ``[*B, obs]``.

        Integers, such as the bytes of an image, become floats of the same value.

        Raises:
            KeyError: A missing entry. ValueError: An entry with another shape, or with other batch
                axes than the rest.
        """
        hint = "rename it with in_keys=[...], or in the mapping of shapes"
        found = [
            require(tensordict, key, reader=type(self).__name__, hint=hint) for key in self.entries
        ]
        if not self.joins:
            return found[0]
        flat = []
        for (key, shape), value in zip(self.entries.items(), found, strict=True):
            n = value.ndim - len(shape)
            if tuple(value.shape[n:]) != shape:
                raise ValueError(
                    f"{key!r} has shape {tuple(value.shape)}, expected {('*B', *shape)}, as this "
                    f"{type(self).__name__} was built for"
                )
            value = value if value.is_floating_point() else value.to(self._floats.dtype)
            flat.append(value.reshape(*value.shape[:n], prod(shape)))
        if len({part.shape[:-1] for part in flat}) > 1:
            several = {
                key: tuple(part.shape[:-1]) for key, part in zip(self.entries, flat, strict=True)
            }
            raise ValueError(
                f"the entries of an observation differ in their batch axes *B: {several}; give all "
                "of them one for each row"
            )
        return torch.cat(flat, -1)

    def part(self, observation: Tensor) -> list[Tensor]:
        """Split joined observations ``[*B, obs]`` into their entries ``[*B, *shape]``."""
        sizes = [prod(shape) for shape in self.entries.values()]
        return [
            flat.reshape(*flat.shape[:-1], *shape)
            for flat, shape in zip(observation.split(sizes, -1), self.entries.values(), strict=True)
        ]

    def decode(self, state: Tensor, context: Tensor) -> TensorDict:
        """Return the entries of the observations ``[*B]``; see :meth:`merge`."""
        parts = self.part(self.merge(state, context))
        return TensorDict(dict(zip(self.in_keys, parts, strict=True)), state.shape[:-1])

    def encode(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Check ``observation [*B, obs]`` and map it to ``state [*B, D], context [*B, C]``."""
        self.check(observation)
        return self.encode_checked(observation)

    def check(self, observation: Tensor) -> None:
        """Raise an error unless ``observation`` is ``[*B, obs]`` and finite; see the class."""
        check_width(
            "observation",
            observation,
            self.obs_dim,
            hint=f"this {type(self).__name__} was built for observations of {self.obs_dim} values",
        )
        check_finite("observation", observation, hint="repair it before it is encoded")
        check_resolution("the observation", observation, self._floats.dtype)

    def encode_checked(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Map observations that passed :meth:`check`; ``torch.compile`` can trace this."""
        dtype = self._floats.dtype
        found = self.split(observation.to(dtype))
        batch = observation.shape[:-1]
        shapes = [(*batch, self.latent_state_dim), (*batch, self.context_dim)]
        # A single tensor would unpack into two of its rows.
        if not isinstance(found, tuple) or [tuple(x.shape) for x in found] != shapes:
            got = [tuple(x.shape) for x in (found if isinstance(found, tuple | list) else [found])]
            raise ValueError(
                f"split of {type(self).__name__} gave {type(found).__name__} {got}, expected a "
                f"tuple of state {shapes[0]} and context {shapes[1]}, as its latent_state_dim and "
                "context_dim say; without a context, return observation[..., :0] for it"
            )
        state, context = found
        return state.to(dtype), context.to(dtype)  # also under autocast

    @dispatched
    def forward(
        self, tensordict: TensorDictBase | Tensor
    ) -> TensorDictBase | tuple[Tensor, Tensor]:
        """Encode a tensor (returns two tensors) or a TensorDict (writes ``out_keys``)."""
        if isinstance(tensordict, Tensor):
            return self.encode(tensordict)
        state, context = self.encode(self.join(tensordict))
        tensordict.set(self.out_keys[0], state)
        tensordict.set(self.out_keys[1], context)
        return tensordict


class IdentityEncoder(Encoder):
    """Uses the observation as the state; the context is empty.

    >>> state, context = IdentityEncoder((4,))(torch.zeros(7, 4))
    >>> state.shape, context.shape
    (torch.Size([7, 4]), torch.Size([7, 0]))

    Args:
        mapped_env_obs_shape: As :class:`Encoder`; ``D = obs`` and ``C = 0``.
        **keys: ``in_keys`` and ``out_keys`` of :class:`Encoder`.
    """

    def __init__(self, mapped_env_obs_shape: ObservationShape, **keys: Sequence[NestedKey]) -> None:
        super().__init__(mapped_env_obs_shape, 1, 0, **keys)
        self.latent_state_dim = self.obs_dim  # not known before

    def split(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the observation and a context of width 0."""
        return observation, observation[..., :0]

    def merge(self, state: Tensor, context: Tensor) -> Tensor:
        """Return the state."""
        return state


class FixedEncoderNet(Encoder):
    """Selects dimensions of the observation as the state and as the context.

    >>> encoder = FixedEncoderNet((4,), latent_state_dims=[3, 0], context_dims=[1])
    >>> encoder(torch.arange(4.0))
    (tensor([3., 0.]), tensor([1.]))

    Args:
        mapped_env_obs_shape: As :class:`Encoder`; the indices are those of the joined entries.
        latent_state_dims: Indices of the state's dimensions, in this order.
        context_dims: Indices of the context's dimensions.
        **keys: ``in_keys`` and ``out_keys`` of :class:`Encoder`.

    Raises:
        ValueError: No state dimension, or an index outside the observation.
    """

    latent_state_dims: Tensor  # [D] long
    context_dims: Tensor  # [C] long

    def __init__(
        self,
        mapped_env_obs_shape: ObservationShape,
        latent_state_dims: Sequence[int],
        context_dims: Sequence[int] = (),
        **keys: Sequence[NestedKey],
    ) -> None:
        state_dims = check_indices("latent_state_dims", latent_state_dims)
        ctx_dims = check_indices("context_dims", context_dims)
        if not state_dims:
            raise ValueError("latent_state_dims is empty; name at least one dimension")
        super().__init__(mapped_env_obs_shape, len(state_dims), len(ctx_dims), **keys)
        check_indices("latent_state_dims", state_dims, self.obs_dim)
        check_indices("context_dims", ctx_dims, self.obs_dim)
        shared = sorted(set(state_dims) & set(ctx_dims))
        if shared:
            raise ValueError(
                f"dimension(s) {shared} are in latent_state_dims and in context_dims; the context "
                "is constant in an episode and the state is not: leave them in one of the two"
            )
        self.register_buffer("latent_state_dims", torch.tensor(state_dims, dtype=torch.long))
        self.register_buffer("context_dims", torch.tensor(ctx_dims, dtype=torch.long))

    def split(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the two sets of dimensions."""
        return observation[..., self.latent_state_dims], observation[..., self.context_dims]

    def merge(self, state: Tensor, context: Tensor) -> Tensor:
        """Put both sets of dimensions back in place; together they must be all dimensions."""
        places = torch.cat([self.latent_state_dims, self.context_dims])
        if len(places) != self.obs_dim:
            left_out = sorted(set(range(self.obs_dim)) - set(places.tolist()))
            raise ValueError(
                f"dimension(s) {left_out} of the observation are neither state nor context, so "
                "states cannot be decoded; add them to latent_state_dims or context_dims"
            )
        check_width("context", context, len(self.context_dims), hint="give it beside the state")
        return torch.cat([state, context], -1)[..., places.argsort()]


class EncoderNet(Encoder):
    """A learned linear encoder with a mask that separates state and context.

    The state is computed from the dimensions that have changed within an episode, the context from
    the others. The mask marks the former; a predictor's ``learn`` updates it (:meth:`update_mask`).
    At first it is empty, and the state is 0.

    >>> encoder = EncoderNet((3,), latent_state_dim=8, context_dim=2)
    >>> encoder.update_mask(torch.zeros(5, 3), torch.tensor([0.0, 1.0, 0.0]).expand(5, 3))
    >>> encoder.mask
    tensor([False,  True, False])

    Args:
        mapped_env_obs_shape: As :class:`Encoder`.
        latent_state_dim: ``D``.
        context_dim: ``C``, may be 0.
        **keys: ``in_keys`` and ``out_keys`` of :class:`Encoder`.
    """

    mask: Tensor  # [obs] bool, True: changes within an episode

    def __init__(
        self,
        mapped_env_obs_shape: ObservationShape,
        latent_state_dim: int,
        context_dim: int,
        **keys: Sequence[NestedKey],
    ) -> None:
        super().__init__(mapped_env_obs_shape, latent_state_dim, context_dim, **keys)
        self.state_net = nn.Linear(self.obs_dim, latent_state_dim, bias=False)
        # torch warns when it initialises an empty layer, so a context of width 0 has no layer.
        self.context_net = nn.Linear(self.obs_dim, context_dim, bias=False) if context_dim else None
        self.register_buffer("mask", torch.zeros(self.obs_dim, dtype=torch.bool))

    def split(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Apply a linear map to each part of the masked observation."""
        state = self.state_net(observation * self.mask)
        if self.context_net is None:
            return state, observation[..., :0]
        return state, self.context_net(observation * ~self.mask)

    @torch.no_grad()
    def update_mask(self, observation: Tensor, next_observation: Tensor) -> None:
        """Mark the dimensions that differ between steps of one episode, ``[N, obs]`` each."""
        changed = (observation != next_observation).reshape(-1, self.obs_dim).any(0)
        self.mask.logical_or_(changed.to(self.mask.device))


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of an entry; raise unless it is a sequence of positive integers."""
    try:
        found = tuple(operator.index(size) for size in shape)
    except TypeError:
        found = (0,)
    if any(size < 1 for size in found):
        raise ValueError(
            f"mapped_env_obs_shape has {shape!r}, expected the shape of an observation, like (3,)"
        )
    return found
