"""All members of an ensemble of :class:`ProbFCDynamics` as one chain of batched products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layeredrl_torchrl._precision import worthwhile_autocast
from layeredrl_torchrl.nets.gaussians import MemberOutput, mixture_parameters
from layeredrl_torchrl.specs import action_features

if TYPE_CHECKING:
    from layeredrl_torchrl.nets.dynamics import ProbFCDynamics

__all__ = ["StackedProbFCDynamics", "StackedSampler"]

_IN_PLACE: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.SiLU: partial(F.silu, inplace=True),
    nn.ReLU: partial(F.relu, inplace=True),
    nn.Hardswish: partial(F.hardswish, inplace=True),
}
# Floats in the widest layer of one member's block of rows: what two cores' second-level caches
# hold, so that what lies between two products does not go through memory.
_BLOCK = 2**18


class StackedProbFCDynamics(nn.Module):
    """``M`` equally built :class:`ProbFCDynamics` as one chain of batched matrix products.

    ``baddbmm`` over stacked weights is 1.2 to 2 times faster than ``vmap`` over modules at the
    batch sizes of learning and planning on a CPU.

    Args:
        nets: The members; their parameters are copied.

    Shapes:
        Every input and output of a member with a leading ``M``: state ``[M, N, D]`` ->
        ``(mean [M, N, K, D], ...)``.
    """

    def __init__(self, nets: Sequence[ProbFCDynamics]) -> None:
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
                nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]).clone())
                for layers in zip(*linears, strict=True)
            ]
        )  # [M, in, out] each
        self.biases = nn.ParameterList(
            [
                nn.Parameter(torch.stack([layer.bias.detach() for layer in layers])[:, None])
                for layers in zip(*linears, strict=True)
            ]
        )  # [M, 1, out] each

    def features(self, state: Tensor, context: Tensor, action: Tensor) -> Tensor:
        """Concatenate the inputs to ``[M, N, in]``."""
        act = action_features(self.action_spec, action, state.dtype)
        parts = (state, act) if self.ignore_context else (state, context, act)
        return torch.cat(parts, dim=-1)

    def forward(self, state: Tensor, context: Tensor, action: Tensor) -> MemberOutput:
        """Predict with member ``m`` on row block ``m``; shapes in the class docstring."""
        *weights, last = self.weights
        *biases, last_bias = self.biases
        with worthwhile_autocast(state.device):
            x = hidden_layers(
                self.features(state, context, action), weights, biases, self.activation
            )
            out = torch.baddbmm(last_bias, x, last)
        return mixture_parameters(out, self.n_modes, self.state_dim, self.log_std_bounds)


def hidden_layers(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: nn.Module
) -> Tensor:
    """Layers ``[M, in, out]`` on ``x [M, N, in]``, with a skip around each but the first."""
    in_place = _IN_PLACE.get(type(activation))
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = torch.baddbmm(bias, x, weight)
        skip = i > 0 and x.shape[-1] == y.shape[-1]
        # In place where nothing has to be kept for a backward pass: half the memory traffic.
        if y.requires_grad:
            y = activation(y)
            x = y + x if skip else y
        else:
            y = activation(y) if in_place is None else in_place(y)
            x = y.add_(x) if skip else y
    return x


class _Block(NamedTuple):
    """Rows that go through all layers at once, and where each layer writes what it makes of them.

    Attributes:
        at: Members and rows, an index into ``[M, R]``.
        layers: Weight, bias, output and whether there is a skip, of each hidden layer.
    """

    at: tuple[slice, slice]
    layers: list[tuple[Tensor, Tensor | None, Tensor, bool]]


class StackedSampler:
    """Draws next states from stacked members, again and again with the same weights.

    The distribution is that of sampling from :meth:`StackedProbFCDynamics.forward`, but all that
    does not depend on the inputs is worked out once, when a rollout begins: the scale of the
    target and the calibration of the std go into the last layer, and the weights are cast to the
    precision of the products. With several modes the mode is drawn first, so that nothing is
    computed for the others. No gradients.

    What is computed for each dimension of the state lies in tensors ``[..., D]`` of their own:
    on slices of a wider tensor the same operations take up to ten times as long.

    Args:
        members: The networks.
        log_std_shift: ``[M, 1, D]``; the log std of the drawn target is
            ``log_std_shift + log_std_slope * bounded``.
        log_std_slope: ``[D]``.
        target_loc: ``[D]``; the mean of the drawn target is ``target_loc + target_scale * mean``.
        target_scale: ``[D]``.
        dtype: Precision of the products.
        deterministic: Go to the mean of the mixture instead.
    """

    @torch.no_grad()
    def __init__(
        self,
        members: StackedProbFCDynamics,
        *,
        log_std_shift: Tensor,
        log_std_slope: Tensor,
        target_loc: Tensor,
        target_scale: Tensor,
        dtype: torch.dtype,
        deterministic: bool = False,
    ) -> None:
        self.deterministic = deterministic
        self.activation = members.activation
        self.n_modes, self.dim = members.n_modes, members.state_dim
        self.dtype = dtype
        *weights, last = members.weights
        *biases, last_bias = members.biases
        size = self.n_modes * self.dim
        of_states, logits, term = last.split([2 * size, self.n_modes, 1], -1)
        states_bias, logits_bias, term_bias = last_bias.split([2 * size, self.n_modes, 1], -1)
        bounds = members.log_std_bounds
        self.std_slope = log_std_slope * bounds.half  # [D]
        self.std_shift = log_std_shift + log_std_slope * bounds.center  # [M, 1, D]
        self.target_scale = target_scale
        # The inputs end with a 1, so that the first layer's bias is a row of its weights.
        first = torch.cat((weights[0], biases[0]), 1)
        self.weights = [w.to(dtype) for w in (first, *weights[1:])]
        self.biases: list[Tensor | None] = [None, *(b.to(dtype) for b in biases[1:])]
        # The tanh that bounds the log std is of what comes out; means alone need no std.
        half = torch.full_like(target_scale, bounds.half)
        n_kinds = 1 if deterministic else 2
        factor = torch.stack((target_scale, 1 / half))[:n_kinds]
        offset = torch.stack((target_loc, -bounds.center / half))[:n_kinds]

        def rows_of_states(x: Tensor) -> Tensor:
            """A mode's mean and raw log std side by side, scaled: rows of [D]."""
            kinds = x.unflatten(-1, (2, self.n_modes, self.dim)).transpose(-3, -2)
            return kinds[..., :n_kinds, :] * factor

        self.last = (
            rows_of_states(of_states).flatten(-3).to(dtype),
            (rows_of_states(states_bias) + offset).flatten(-3),
        )
        # Transposed: what is done for each mode then runs along the rows.
        self.choice = (
            torch.cat((logits, term), -1).mT.contiguous().to(dtype),
            torch.cat((logits_bias, term_bias), -1).mT.contiguous(),
        )
        self.last_out = last_bias.new_empty(0, 0, 0)

    def __call__(
        self, features: Tensor, base: Tensor | None, extra_std: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw a target for each row and add it to ``base``.

        Args:
            features: Normalised inputs and a 1 behind them, ``[M, R, in + 1]``.
            base: ``[M, R, D]`` (the state, where its change is predicted), or ``None`` for 0.
            extra_std: ``[M, R, 1]``, added to the std in units of the target's scale.

        Returns:
            Next state ``[M, R, D]`` and term_prob ``[M, R]``.
        """
        if self.last_out.shape[:2] != features.shape[:2]:
            self._make_room(*features.shape[:2])
        features = features.to(self.dtype)
        for block in self.blocks:
            self._evaluate(block, features[block.at])
        last, choice = self.last_out, self.choice_out
        term_prob = choice[:, -1].sigmoid()
        if self.deterministic:
            share = choice[:, :-1].softmax(1).mT.unsqueeze(-1)
            mean = (last.unflatten(-1, (self.n_modes, self.dim)) * share).sum(-2)
            return (mean if base is None else mean.add_(base)), term_prob
        pairs = last.view(-1, self.dim).index_select(0, self._draw_modes(choice[:, :-1]))
        mean, raw = pairs.view(2, *last.shape[:-1], self.dim)
        std = torch.addcmul(self.std_shift, self.std_slope, raw.tanh_()).exp_()
        if extra_std is not None:
            std.addcmul_(extra_std, self.target_scale)
        if base is not None:
            mean.add_(base)
        return mean.addcmul_(std, torch.randn_like(mean)), term_prob

    def _make_room(self, n_models: int, rows: int) -> None:
        """Cut the rows into blocks, and allot the memory that every call works in.

        On a CPU memory that is used again stays in the caches, and is not asked of the system anew.
        """
        bias = self.last[1]
        self.choice_out = bias.new_empty(n_models, self.n_modes + 1, rows)
        first = torch.arange(n_models * rows, device=bias.device) * 2 * self.n_modes
        self.first_rows = torch.stack((first, first + 1))
        widest = max(weight.shape[-1] for weight in self.weights)
        n_blocks = 1 if bias.is_cuda else -(-rows * widest // _BLOCK)
        members = [slice(None)] if n_blocks == 1 else [slice(m, m + 1) for m in range(n_models)]
        step = -(-rows // n_blocks)
        # Two suffice: each layer reads the one and writes the other; the last one, too, where a
        # block is all there is.
        of_last = (n_models, rows, bias.shape[-1])
        shares = n_blocks == 1 and self.dtype == bias.dtype
        widest = max(widest, of_last[-1]) if shares else widest
        rooms = bias.new_empty(2, n_models // len(members) * step * widest, dtype=self.dtype)
        if shares:
            self.last_out = rooms[len(self.weights) % 2, : math.prod(of_last)].view(of_last)
        else:
            self.last_out = bias.new_empty(of_last)
        self.blocks: list[_Block] = []
        for member in members:
            for start in range(0, rows, step):
                n_rows = min(step, rows - start)
                layers, before = [], 0
                for i, (weight, b) in enumerate(zip(self.weights, self.biases, strict=True)):
                    weight = weight[member]
                    out = rooms[i % 2, : len(weight) * n_rows * weight.shape[-1]]
                    out = out.view(len(weight), n_rows, -1)
                    skips = before == weight.shape[-1]
                    layers.append((weight, None if b is None else b[member], out, skips))
                    before = weight.shape[-1]
                self.blocks.append(_Block((member, slice(start, start + step)), layers))

    def _evaluate(self, block: _Block, x: Tensor) -> None:
        """Run a block's features through all layers, into ``last_out`` and ``choice_out``."""
        in_place = _IN_PLACE.get(type(self.activation), self.activation)
        for weight, bias, out, skips in block.layers:
            if bias is None:
                y = torch.bmm(x, weight, out=out)
            else:
                y = torch.baddbmm(bias, x, weight, out=out)
            y = in_place(y)
            x = y.add_(x) if skips else y
        member, rows = block.at
        (weight, bias), out = self.last, self.last_out[block.at]
        _product(x, weight[member], bias[member], out)
        weight, bias = self.choice
        _product(weight[member], x.mT, bias[member], self.choice_out[member, :, rows])

    def _draw_modes(self, logits: Tensor) -> Tensor:
        """Rows of means, then of raw log std, of modes drawn with ``logits [M, K, R]``."""
        if self.n_modes == 1:
            return self.first_rows.flatten()
        # Inversion of the cumulative sum, which takes half the time of a softmax over so few.
        edges = (logits - logits.amax(1, keepdim=True)).exp_().cumsum(1)
        height = torch.rand_like(edges[:, :1]).mul_(edges[:, -1:])
        # The last edge is not compared: rounding may put the height upon it.
        mode = (height >= edges[:, :-1]).sum(1)
        return torch.add(self.first_rows, mode.flatten(), alpha=2).flatten()


def _product(left: Tensor, right: Tensor, bias: Tensor, out: Tensor) -> None:
    """Write the batched product plus ``bias``, added in the precision of ``out``."""
    if left.dtype == out.dtype:
        torch.baddbmm(bias, left, right, out=out)
    else:
        out.copy_(torch.bmm(left, right)).add_(bias)
