"""Spaces and specs; all other modules read spaces through this module.

A *space* is a gymnasium ``Box`` or ``Discrete``, or a TorchRL ``Bounded``, ``Unbounded``,
``OneHot`` or ``Categorical`` spec. Internally only TorchRL specs are used.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorSpec,
    Unbounded,
)

from layeredrl_torchrl._watch import refuse

__all__ = [
    "ObservationSpace",
    "Space",
    "action_features",
    "canonical_action",
    "is_discrete",
    "to_spec",
    "width",
]

Space: TypeAlias = gym.spaces.Box | gym.spaces.Discrete | TensorSpec
ObservationSpace: TypeAlias = gym.Space[Any] | TensorSpec

# Actions may exceed their bounds by this share of the bound: float32 planners and environments that
# rescale actions end up slightly outside.
_BOUND_TOLERANCE = 1e-4


def to_spec(space: Space | None, *, name: str = "space") -> TensorSpec:
    """Turn a gymnasium space or a TorchRL spec into a TorchRL spec of one item.

    >>> import gymnasium as gym
    >>> to_spec(gym.spaces.Box(-1.0, 1.0, (2,))) == Bounded(-1.0, 1.0, (2,))
    True

    Args:
        space: ``Box`` of floats with one axis, ``Discrete`` that starts at 0, or a TorchRL
            ``Bounded``, ``Unbounded``, ``OneHot`` or ``Categorical``, alone or as the only leaf of
            a ``Composite`` (like ``env.action_spec`` if the key is not ``"action"``). A
            ``MultiCategorical`` or ``MultiOneHot`` with a single choice, as from
            ``ActionDiscretizer`` in one dimension, counts as that choice. ``None`` is the empty
            space ``[0]``.
        name: Name of the argument, for error messages.

    Returns:
        ``Bounded``/``Unbounded`` of shape ``[n]`` and a float dtype, ``OneHot`` of shape ``[n]``
        or ``Categorical`` of shape ``[]`` or ``[1]``. A gymnasium ``Discrete`` becomes
        ``Categorical`` (integers, as in gymnasium). TorchRL's ``GymEnv`` uses ``OneHot`` by
        default, and its spec is not changed.

    Raises:
        TypeError: Any other kind of space, including a ``Box`` of integers.
        ValueError: A space with several axes, a ``Discrete`` with another start, or a discrete spec
            with a mask.
    """
    if space is None:
        return Unbounded(shape=(0,))
    if isinstance(space, Composite):
        leaves = list(space.keys(True, True))
        if len(leaves) != 1:
            raise TypeError(
                f"{name} is a Composite of {leaves}, expected one leaf; pass the spec of one key"
            )
        return to_spec(space[leaves[0]], name=name)
    if isinstance(space, gym.spaces.Box):
        _check_one_axis(name, tuple(space.shape))
        if not np.issubdtype(space.dtype, np.floating):
            raise TypeError(
                f"{name} is a Box of {space.dtype}; expected a Box of floats, or Discrete for "
                "choices: integers would be treated as continuous values"
            )
        if not (np.isfinite(space.low).any() or np.isfinite(space.high).any()):
            return Unbounded(shape=space.shape, dtype=torch.float32)
        low = torch.as_tensor(space.low, dtype=torch.float32)
        high = torch.as_tensor(space.high, dtype=torch.float32)
        return Bounded(low=low, high=high, shape=space.shape, dtype=torch.float32)
    if isinstance(space, gym.spaces.Discrete):
        if int(space.start) != 0:
            raise ValueError(
                f"{name} is {space}, but only Discrete spaces that start at 0 are supported; "
                "shift the actions in an environment wrapper"
            )
        return Categorical(int(space.n))
    if isinstance(space, Bounded | Unbounded):
        _check_one_axis(name, tuple(space.shape))
        if not space.dtype.is_floating_point:
            raise TypeError(
                f"{name} is a spec of dtype {space.dtype}; expected a float dtype, or "
                "Categorical/OneHot for discrete values"
            )
        return space
    if getattr(space, "mask", None) is not None:
        raise ValueError(
            f"{name} has a mask, but masks are ignored, so illegal choices would be taken. Let "
            "the environment carry out a legal choice instead"
        )
    if isinstance(space, MultiCategorical | MultiOneHot):
        return _only_choice(space, name)
    if isinstance(space, OneHot):
        _check_one_axis(name, tuple(space.shape))
        return space
    if isinstance(space, Categorical):
        if tuple(space.shape) not in ((), (1,)):
            raise ValueError(
                f"{name} is a Categorical of shape {tuple(space.shape)}; expected one choice, "
                "shape () or (1,)"
            )
        return Categorical(
            int(space.space.n), tuple(space.shape), dtype=space.dtype, device=space.device
        )
    raise TypeError(
        f"{name} is {space!r} ({type(space).__name__}); expected a gymnasium Box or Discrete, or "
        "a TorchRL Bounded, Unbounded, OneHot or Categorical spec"
    )


def _only_choice(spec: MultiCategorical | MultiOneHot, name: str) -> TensorSpec:
    """Return the only choice of a spec that could have several."""
    sizes = [int(box.n) for box in spec.space]
    wide = len(sizes) if isinstance(spec, MultiCategorical) else sum(sizes)
    if len(sizes) != 1 or tuple(spec.shape) != (wide,):
        raise TypeError(
            f"{name} is a {type(spec).__name__} of shape {tuple(spec.shape)}, several choices at "
            "once; expected one choice: leave the actions continuous, or make them one Categorical "
            "of all combinations"
        )
    if isinstance(spec, MultiCategorical):
        return Categorical(sizes[0], (1,), dtype=spec.dtype, device=spec.device)
    return OneHot(sizes[0], dtype=spec.dtype, device=spec.device)


def _check_one_axis(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 1:
        raise ValueError(
            f"{name} has shape {shape}, expected one axis [n]; flatten it in the environment, "
            "and pass the spec of a single environment, without batch axis (TorchRL's "
            "env.observation_spec_unbatched, env.action_spec_unbatched)"
        )


def is_discrete(spec: TensorSpec) -> bool:
    """Return whether ``spec`` is discrete (``OneHot`` or ``Categorical``)."""
    return isinstance(spec, OneHot | Categorical)


def width(spec: TensorSpec) -> int:
    """Return the number of float features of one item: its dimensions, or its choices."""
    return int(spec.space.n) if is_discrete(spec) else int(spec.shape[-1])


def canonical_action(
    spec: TensorSpec,
    action: Tensor,
    batch_shape: torch.Size,
    *,
    bounds: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Convert actions of ``[*B]`` items to the form of ``spec``, and check shape and range.

    Args:
        spec: As returned by :func:`to_spec`.
        action: Continuous: ``[*B, A]``. Discrete: integers ``[*B]`` or ``[*B, 1]``, or one-hot
            ``[*B, n]``, for both kinds of spec.
        batch_shape: ``*B``.
        bounds: The spec's bounds on the device of the action; by default copied there
            (:class:`ActionForm` keeps them).

    Returns:
        ``[*B, A]``; ``[*B, n]`` (``OneHot``); or ``[*B]`` or ``[*B, 1]`` (``Categorical``).

    Raises:
        TypeError: Choices that are not integers; continuous actions that are bools or complex.
        ValueError: A shape that does not fit, NaN, or values outside the bounds (on an accelerator,
            values are checked one call later).
    """
    if not isinstance(action, Tensor):
        raise TypeError(f"action must be a torch.Tensor, got {type(action).__name__}")
    if is_discrete(spec):
        return _canonical_choice(spec, action, batch_shape)
    expected = (*batch_shape, width(spec))
    if tuple(action.shape) != expected:
        raise ValueError(
            f"action has shape {tuple(action.shape)}, expected {expected} "
            "(the batch shape of the state, then the action space)"
        )
    if action.dtype == torch.bool or action.is_complex():
        raise TypeError(f"action has dtype {action.dtype}, expected floats; convert it (.float())")
    if isinstance(spec, Bounded):
        low, high = (spec.space.low, spec.space.high) if bounds is None else bounds
        _check_bounds(action, low.to(action), high.to(action))
    else:
        finite = action.isfinite().all()
        refuse(
            ~finite,
            lambda _: ValueError("action holds NaN or infinite values; clamp or repair it first"),
        )
    return action


class ActionForm(nn.Module):
    """:func:`canonical_action` with the bounds of ``spec`` in buffers.

    >>> ActionForm(Categorical(3))(torch.tensor([[2], [0]]), torch.Size([2]))
    tensor([2, 0])

    Args:
        spec: As returned by :func:`to_spec`.
    """

    low: Tensor
    high: Tensor

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        self.spec = spec
        self._bounded = isinstance(spec, Bounded)
        if self._bounded:
            # Stored as bits, so that a module in half precision keeps exact bounds; a copy, since
            # torch.save refuses memory with views of two dtypes.
            for name, bound in (("low", spec.space.low), ("high", spec.space.high)):
                bits = bound.to(torch.float32, copy=True).contiguous().view(torch.int32)
                self.register_buffer(name, bits, persistent=False)

    def forward(self, action: Tensor, batch_shape: torch.Size) -> Tensor:
        """Check actions of ``[*B]`` items, and return them in the form of the spec."""
        bounds = None
        if self._bounded:
            bounds = (self.low.view(torch.float32), self.high.view(torch.float32))
        return canonical_action(self.spec, action, batch_shape, bounds=bounds)

    def project(self, action: Tensor) -> Tensor:
        """Clip actions in the form of the spec to its bounds."""
        if not self._bounded:
            return action
        return action.clamp(self.low.view(torch.float32), self.high.view(torch.float32))


def _check_bounds(action: Tensor, low: Tensor, high: Tensor) -> None:
    # In this form NaN counts as outside.
    inside = action.isfinite()
    inside &= action >= low - _BOUND_TOLERANCE * low.abs().clamp_min(1.0)
    inside &= action <= high + _BOUND_TOLERANCE * high.abs().clamp_min(1.0)
    on_host = action.device.type == "cpu"

    def error(_: Tensor) -> ValueError:
        if not on_host:
            return ValueError(
                "an action is outside its action space or not finite; project it first "
                "(action_spec.project)"
            )
        where = (~inside).nonzero()[0].tolist()
        return ValueError(
            f"action {action[tuple(where)].item():.6g} at index {where} is outside the action "
            f"space [{low.tolist()}, {high.tolist()}]; project it first (action_spec.project)"
        )

    refuse(~inside.all(), error)


def _canonical_choice(spec: TensorSpec, action: Tensor, batch_shape: torch.Size) -> Tensor:
    n = width(spec)
    shape = tuple(action.shape)
    batch = tuple(batch_shape)
    float_row = isinstance(spec, OneHot) and action.is_floating_point()
    if n == 1 and shape == (*batch, 1) and not float_row:
        # The index of the only choice, 0, or its one-hot row, 1.
        refuse(
            ~((action == 0) | (action == 1)).all(),
            lambda _: ValueError("action values are not 0 or 1, expected those of one choice"),
        )
        index = torch.zeros(batch, dtype=torch.long, device=action.device)
    elif shape == (*batch, n) and (n > 1 or isinstance(spec, OneHot)):
        ones = action.to(torch.float32)
        one_hot = ((ones == 0) | (ones == 1)).all(-1) & (ones.sum(-1) == 1)
        refuse(
            ~one_hot.all(),
            lambda _: ValueError(
                f"action of shape {shape} is not one-hot: each row needs one 1 among {n}"
            ),
        )
        index = ones.argmax(-1)
    elif shape in (batch, (*batch, 1)):
        if action.is_floating_point() or action.is_complex():
            raise TypeError(
                f"action has dtype {action.dtype}, expected integers from 0 to {n - 1} "
                f"of shape {batch} or one-hot rows of shape {(*batch, n)}"
            )
        index = action.reshape(batch).long()
        on_host = index.device.type == "cpu"

        def error(_: Tensor) -> ValueError:
            span = f"span [{int(index.min())}, {int(index.max())}]" if on_host else "are others"
            return ValueError(f"action values {span}, expected integers from 0 to {n - 1}")

        refuse(((index < 0) | (index >= n)).any(), error)
    else:
        raise ValueError(
            f"action has shape {shape}, expected {batch} or {(*batch, 1)} (integers) or "
            f"{(*batch, n)} (one-hot)"
        )
    if isinstance(spec, OneHot):
        choices = torch.arange(n, device=index.device)
        return (index.unsqueeze(-1) == choices).to(spec.dtype)
    return index.to(spec.dtype).reshape((*batch, *spec.shape))


def action_features(spec: TensorSpec, action: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the float features ``[*B, width(spec)]`` of actions in the form of ``spec``.

    Integers become one-hot rows. Only the last axis matters, so this also runs under ``vmap`` and
    with any batch shape; use :func:`canonical_action` for checks.
    """
    if isinstance(spec, Categorical):
        choices = torch.arange(width(spec), device=action.device)
        action = action if spec.shape else action.unsqueeze(-1)
        return (action == choices).to(dtype)
    return action.to(dtype)
