"""The members of an ensemble of :class:`ProbFCDynamics` as one chain of batched products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrl.data import TensorSpec

from layeredrl_torchrl._precision import worthwhile_autocast
from layeredrl_torchrl._state import WholeLoading
from layeredrl_torchrl.nets._gaussians import MemberOutput, mixture_parameters
from layeredrl_torchrl.specs import action_features

__all__ = [
    "ConcatenatedInputs",
    "StackedProbFCDynamics",
    "hidden_layers",
    "init_layers",
    "product",
    "stackable",
]

_IN_PLACE: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.SiLU: partial(F.silu, inplace=True),
    nn.ReLU: partial(F.relu, inplace=True),
    nn.Hardswish: partial(F.hardswish, inplace=True),
}


class ConcatenatedInputs(WholeLoading):
    """A network whose input is the state, the context unless ignored, and the action's features."""

    action_spec: TensorSpec
    ignore_context: bool

    def features(self, state: Tensor, context: Tensor, action: Tensor) -> Tensor:
        """Concatenate state ``[*B, D]``, context ``[*B, C]`` and action to ``[*B, in]``."""
        act = action_features(self.action_spec, action, state.dtype)
        parts = (state, act) if self.ignore_context else (state, context, act)
        return torch.cat(parts, dim=-1)


class StackedProbFCDynamics(ConcatenatedInputs):
    """``M`` equally built :class:`~layeredrl_torchrl.ProbFCDynamics` as one chain of products.

    ``baddbmm`` over stacked weights is 1.2 to 2 times faster than ``vmap`` over modules at the
    batch sizes of learning and planning on a CPU. Learning evaluates rows, which is the layout of
    the losses; rollouts (``models/_step.py``) evaluate columns with the same weights.

    Args:
        nets: The members; their parameters are copied. All freeze the same parameters.

    Shapes:
        Every input and output of a member with a leading ``M``: state ``[M, N, D]`` ->
        ``(mean [M, N, K, D], ...)``.
    """

    def __init__(self, nets: Sequence[Any]) -> None:
        super().__init__()
        first = nets[0]
        self.action_spec = first.action_spec
        self.ignore_context = first.ignore_context
        self.n_modes = first.n_modes
        self.state_dim = first.state_dim
        self.log_std_bounds = first.log_std_bounds
        self.activation = first.activation
        linears = [net.layers for net in nets]
        self.weights = nn.ParameterList(
            [
                nn.Parameter(
                    torch.stack([layer.weight.detach().T for layer in layers]).clone(),
                    requires_grad=layers[0].weight.requires_grad,
                )
                for layers in zip(*linears, strict=True)
            ]
        )  # [M, in, out] each
        self.biases = nn.ParameterList(
            [
                nn.Parameter(
                    torch.stack([layer.bias.detach() for layer in layers])[:, None],
                    requires_grad=layers[0].bias.requires_grad,
                )
                for layers in zip(*linears, strict=True)
            ]
        )  # [M, 1, out] each

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights, distributed as those of new networks."""
        init_layers(list(self.weights), list(self.biases))

    def forward(self, state: Tensor, context: Tensor, action: Tensor) -> MemberOutput:
        """Predict with member ``m`` on row block ``m``; shapes in the class docstring."""
        *weights, last = self.weights
        *biases, last_bias = self.biases
        x = self.features(state, context, action)
        with worthwhile_autocast(x.device, x.shape[1], last.shape[1]):
            x = hidden_layers(x, weights, biases, self.activation)
            out = torch.baddbmm(last_bias, x, last)
        return mixture_parameters(out, self.n_modes, self.state_dim, self.log_std_bounds)


def stackable(nets: Sequence[nn.Module]) -> bool:
    """Whether stacking keeps the meaning of the parameters of equally built networks.

    A stacked parameter is trained in all members or in none. A parameter that a network has under
    several names, or in a layer that it uses twice, would become several parameters.
    """
    tensors = [
        [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
        for net in nets
    ]
    trained = {tuple((name, x.requires_grad) for name, x in own) for own in tensors}
    return len(trained) == 1 and all(len({id(x) for _, x in own}) == len(own) for own in tensors)


@torch.no_grad()
def init_layers(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """Draw ``weights [..., in, out]`` of a network's layers, and set ``biases`` to 0.

    LeCun's normal initialisation: with the skip connections, the variance of an untrained network's
    layers stays near that of its normalised input. The last layer is scaled by a tenth, so that an
    untrained network predicts almost no change and its rollouts stay near their start.
    """
    for weight, bias in zip(weights, biases, strict=True):
        weight.normal_(std=weight.shape[-2] ** -0.5)
        bias.zero_()
    weights[-1].mul_(0.1)


def hidden_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: nn.Module,
    *,
    columns: bool = False,
) -> Tensor:
    """Evaluate stacked layers, with a skip connection around each but the first.

    Args:
        x: Rows ``[M, N, in]``, or columns ``[M, in, N]``.
        weights: ``[M, in, out]`` each; for columns ``[M, out, in]``.
        biases: ``[M, 1, out]`` each; for columns ``[M, out, 1]``.
        activation: Applied after each layer.
        columns: Whether ``x`` is in columns.
    """
    in_place = _IN_PLACE.get(type(activation))
    axis = 1 if columns else -1
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = product(weight, x, bias) if columns else torch.baddbmm(bias, x, weight)
        skip = i > 0 and x.shape[axis] == y.shape[axis]
        # In-place operations halve the memory traffic; a backward pass may need the values.
        if y.requires_grad or torch.compiler.is_compiling():
            y = activation(y)
            x = y + x if skip else y
        else:
            y = activation(y) if in_place is None else in_place(y)
            x = y.add_(x) if skip else y
    return x


def product(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """Compute ``weight [M, out, in] @ x [M, in, N] + bias [M, out, 1]`` in the bias's precision."""
    if weight.dtype != bias.dtype or torch.compiler.is_compiling():
        # The compiler fuses the sum with the next operations.
        return torch.bmm(weight, x).to(bias.dtype) + bias
    if bias.dtype.itemsize < 4:  # in half precision on a CPU, baddbmm is slower than these two
        return torch.bmm(weight, x).add_(bias)
    return torch.baddbmm(bias, weight, x)
