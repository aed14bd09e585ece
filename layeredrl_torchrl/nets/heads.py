"""Reward and value networks: scalar functions of state, context and action."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layeredrl_torchrl._checks import check_callable, check_flag, check_positive_int, check_sizes
from layeredrl_torchrl._compiling import compile_apart
from layeredrl_torchrl._precision import worthwhile_autocast
from layeredrl_torchrl._state import WholeLoading
from layeredrl_torchrl.nets._fully_connected import fully_connected
from layeredrl_torchrl.nets.normalizer import Normalizer
from layeredrl_torchrl.specs import Space, action_features, to_spec, width

__all__ = ["RewardNet", "ScalarHead", "ValueNet"]


class ScalarHead(WholeLoading, ABC):
    """A fully connected network with the scalar output ``loc + scale * net(normalised inputs)``.

    The statistics of its inputs and the scale of its output are buffers. A predictor's ``learn``
    sets them (:meth:`fit_inputs`, :meth:`rescale`), so that the same learning rates suit tasks of
    any units. Without those calls it is a plain network.

    >>> head = ValueNet(3, 0)
    >>> head.rescale(loc=0.0, scale=100.0)  # the function does not change
    >>> head(torch.zeros(7, 3), torch.zeros(7, 0), None).shape
    torch.Size([7])

    Args:
        in_features: Number of input features.
        hidden_sizes: Width of each hidden layer.
        nonlinearity: Class of the activation.
        layer_norm: Whether each hidden layer is normalised (before its activation).
    """

    out_loc: Tensor  # []
    out_scale: Tensor  # []

    def __init__(
        self,
        in_features: int,
        hidden_sizes: Sequence[int],
        nonlinearity: type[nn.Module],
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        hidden_sizes = check_sizes("hidden_sizes", hidden_sizes)
        check_callable("nonlinearity", nonlinearity, factory=True)
        check_flag("layer_norm", layer_norm)
        self.inputs = Normalizer(in_features)
        self.net = fully_connected(in_features, 1, hidden_sizes, nonlinearity, layer_norm)
        self.register_buffer("out_loc", torch.zeros(()))
        self.register_buffer("out_scale", torch.ones(()))
        self._zero_output()

    def _zero_output(self) -> None:
        """Make the network return ``loc`` everywhere, like LayeredRL's untrained value net."""
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def reset_parameters(self) -> None:
        """Draw new weights and keep the statistics."""
        for layer in self.net:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        self._zero_output()

    @abstractmethod
    def features(self, state: Tensor, context: Tensor, action: Tensor) -> Tensor:
        """Return the network's input ``[*B, in_features]``.

        A head with ``reads_next_state = True`` takes the next state ``[*B, D]`` as a fourth
        argument, here and when it is called.
        """

    def forward(
        self, state: Tensor, context: Tensor, action: Tensor, *next_state: Tensor
    ) -> Tensor:
        """Return the values ``[*B]`` at state ``[*B, D]``, context ``[*B, C]`` and action."""
        x = self.inputs(self.features(state, context, action, *next_state))
        with worthwhile_autocast(x.device, x.shape[:-1].numel(), self.net[0].out_features):
            out = self.net(x)
        if out.dtype in (torch.bfloat16, torch.float16):
            out = out.float()
        return out.squeeze(-1) * self.out_scale + self.out_loc

    def compile(self, **options: Any) -> None:
        """Compile calls of this head, but not of its copies and pickles.

        Args:
            **options: Of ``torch.compile``. With ``dynamic=False`` every shape is compiled
                separately, without a limit.
        """
        self._compiled_call_impl = _Compiled(self, options)

    @torch.no_grad()
    def fit_inputs(
        self, state: Tensor, context: Tensor, action: Tensor, *next_state: Tensor
    ) -> None:
        """Set the input statistics from a sample ``[N, ...]``."""
        self.inputs.fit(self.features(state, context, action, *next_state))

    @torch.no_grad()
    def rescale(self, loc: Tensor | float, scale: Tensor | float) -> None:
        """Set ``loc`` and ``scale`` of the output without changing the function.

        The last layer compensates the change, as in PopArt (arXiv 1602.07714, equation 9). An
        untrained head has no function to keep; afterwards it returns ``loc`` everywhere.

        Raises:
            ValueError: A scale that is not positive and finite.
        """
        loc, scale = (
            x.to(self.out_loc) if isinstance(x, Tensor) else self.out_loc.new_full((), x)
            for x in (loc, scale)
        )
        if not (bool(torch.isfinite(scale)) and bool(scale > 0) and bool(torch.isfinite(loc))):
            raise ValueError(f"loc and scale must be finite and scale > 0, got {loc}, {scale}")
        last = self.net[-1]
        if bool(last.weight.any()) or bool(last.bias.any()):
            ratio = self.out_scale / scale
            last.weight.mul_(ratio)
            last.bias.mul_(ratio).add_((self.out_loc - loc) / scale)
        self.out_loc.copy_(loc)
        self.out_scale.copy_(scale)


class _Compiled:
    """Calls a head compiled: separately for each head, and with ``dynamic=False`` each shape."""

    def __init__(self, head: ScalarHead, options: dict[str, Any]) -> None:
        self.head, self.options = head, options
        self.by_shape: dict[Hashable, Callable[..., Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = None
        if self.options.get("dynamic") is False:
            shapes = tuple(getattr(x, "shape", None) for x in inputs)
        if shapes not in self.by_shape:
            self.by_shape[shapes] = compile_apart(_forward, self.options)
        return self.by_shape[shapes](self.head, *inputs)


def _forward(head: ScalarHead, *inputs: Tensor) -> Tensor:
    return head.forward(*inputs)


class RewardNet(ScalarHead):
    """Predicts the reward of taking ``action`` in ``state`` under ``context``.

    >>> reward = RewardNet(state_dim=3, context_dim=0, action_dim=1)
    >>> reward(torch.zeros(7, 3), torch.zeros(7, 0), torch.zeros(7, 1)).shape
    torch.Size([7])

    Args:
        state_dim: ``D``.
        context_dim: ``C``, may be 0.
        action_dim: ``A``, or the action space itself (needed for discrete actions, to turn integers
            into one-hot features).
        hidden_sizes: Width of each hidden layer.
        nonlinearity: Class of the activation.
        layer_norm: Whether each hidden layer is normalised, which speeds up learning.

    Shapes:
        state ``[*B, D]``, context ``[*B, C]``, action ``[*B, A]`` -> ``[*B]``, in reward units.
    """

    def __init__(
        self,
        state_dim: int,
        context_dim: int,
        action_dim: int | Space,
        hidden_sizes: Sequence[int] = (128, 128),
        nonlinearity: type[nn.Module] = nn.SiLU,
        layer_norm: bool = True,
    ) -> None:
        spec = None if isinstance(action_dim, int) else to_spec(action_dim, name="action_dim")
        n_action = action_dim if isinstance(action_dim, int) else width(spec)
        check_positive_int("state_dim", state_dim)
        check_positive_int("context_dim", context_dim, minimum=0)
        super().__init__(state_dim + context_dim + n_action, hidden_sizes, nonlinearity, layer_norm)
        self.action_spec = spec

    def features(self, state: Tensor, context: Tensor, action: Tensor) -> Tensor:
        """Concatenate state, context and action."""
        if self.action_spec is not None:
            action = action_features(self.action_spec, action, state.dtype)
        return torch.cat((state, context, action.to(state.dtype)), dim=-1)


class ValueNet(ScalarHead):
    """Predicts the value of ``state`` under ``context``; the action is ignored.

    >>> value = ValueNet(state_dim=3, context_dim=2)
    >>> value(torch.zeros(7, 3), torch.zeros(7, 2), None).shape
    torch.Size([7])

    Args:
        state_dim: ``D``.
        context_dim: ``C``, may be 0.
        hidden_sizes: Width of each hidden layer.
        nonlinearity: Class of the activation.
        layer_norm: Whether each hidden layer is normalised, which bounds the network's output far
            from its data (arXiv 2302.02948, section 4.2).

    Shapes:
        state ``[*B, D]``, context ``[*B, C]``, action (any) -> ``[*B]``, in reward units.
    """

    def __init__(
        self,
        state_dim: int,
        context_dim: int,
        hidden_sizes: Sequence[int] = (128, 128),
        nonlinearity: type[nn.Module] = nn.SiLU,
        layer_norm: bool = True,
    ) -> None:
        check_positive_int("state_dim", state_dim)
        check_positive_int("context_dim", context_dim, minimum=0)
        super().__init__(state_dim + context_dim, hidden_sizes, nonlinearity, layer_norm)

    def features(self, state: Tensor, context: Tensor, action: Tensor | None = None) -> Tensor:
        """Concatenate state and context."""
        return torch.cat((state, context), dim=-1)
