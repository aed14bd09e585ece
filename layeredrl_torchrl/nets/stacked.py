"""All members of an ensemble of :class:`ProbFCDynamics` as one chain of batched products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

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


class StackedSampler:
    """Draws next states from stacked members, again and again with the same weights.

    The distribution is that of sampling from :meth:`StackedProbFCDynamics.forward`, but all that
    does not depend on the inputs is worked out once, when a rollout begins: the scale of the
    target and the calibration of the std go into the last layer, and the weights are cast to the
    precision of the products. With several modes the mode is drawn first, so that nothing is
    computed for the others. No gradients.

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
        sizes = [size, size, self.n_modes, 1]
        mean, raw, logits, term = last.split(sizes, -1)
        mean_bias, raw_bias, logits_bias, term_bias = last_bias.split(sizes, -1)
        scale, loc = target_scale.repeat(self.n_modes), target_loc.repeat(self.n_modes)
        bounds = members.log_std_bounds
        self.std_slope = log_std_slope * bounds.half  # [D]
        self.std_shift = log_std_shift + log_std_slope * bounds.center  # [M, 1, D]
        self.weights = [w.to(dtype) for w in weights]
        self.biases = [b.to(dtype) for b in biases]
        mean, mean_bias = mean * scale, mean_bias * scale + loc
        raw, raw_bias = raw / bounds.half, (raw_bias - bounds.center) / bounds.half
        if self.n_modes == 1:
            self.last = _layer((mean, raw, term), (mean_bias, raw_bias, term_bias), dtype)
        else:
            # A mode's mean and raw log std side by side, so that one selection finds both.
            pairs = [(x.unflatten(-1, (self.n_modes, self.dim))) for x in (mean, raw)]
            pairs_bias = [x.unflatten(-1, (self.n_modes, self.dim)) for x in (mean_bias, raw_bias)]
            self.last = _layer(
                (torch.cat(pairs, -1).flatten(-2),), (torch.cat(pairs_bias, -1).flatten(-2),), dtype
            )
            self.choice = _layer((logits, term), (logits_bias, term_bias), dtype)
            self.first_rows = torch.empty(0, dtype=torch.long, device=last.device)

    def __call__(
        self, features: Tensor, base: Tensor | None, extra_std: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw a target for each row and add it to ``base``.

        Args:
            features: Normalised inputs ``[M, R, in]``.
            base: ``[M, R, D]`` (the state, where its change is predicted), or ``None`` for 0.
            extra_std: ``[M, R, D]``, added to the std.

        Returns:
            Next state ``[M, R, D]`` and term_prob ``[M, R]``.
        """
        n_models, rows, _ = features.shape
        widest = max(bias.shape[-1] for bias in self.biases)
        following = features.new_empty(n_models, rows, self.dim)
        term_prob = features.new_empty(n_models, rows)
        if not self.deterministic:
            following.normal_()  # the noise is replaced by what it leads to
        n_blocks = -(-rows * widest // _BLOCK)
        if n_blocks == 1 or features.is_cuda:
            self._draw(slice(None), features, base, extra_std, following, term_prob)
            return following, term_prob
        step = -(-rows // n_blocks)
        for m in range(n_models):
            for start in range(0, rows, step):
                at = (slice(m, m + 1), slice(start, start + step))
                self._draw(
                    at[0],
                    features[at],
                    None if base is None else base[at],
                    None if extra_std is None else extra_std[at],
                    following[at],
                    term_prob[at],
                )
        return following, term_prob

    def _draw(
        self,
        member: slice,
        features: Tensor,
        base: Tensor | None,
        extra_std: Tensor | None,
        out: Tensor,
        term_prob: Tensor,
    ) -> None:
        """Turn the noise in ``out`` into a draw, and write the termination probability."""
        weights = [w[member] for w in self.weights]
        biases = [b[member] for b in self.biases]
        x = hidden_layers(features.to(self.dtype), weights, biases, self.activation)
        last = self._product(x, self.last, member)
        choice = last if self.n_modes == 1 else self._product(x, self.choice, member)
        torch.sigmoid(choice[..., -1], out=term_prob)
        if self.n_modes > 1:
            if self.deterministic:
                share = choice[..., :-1].softmax(-1).unsqueeze(-1)
                last = (last.unflatten(-1, (self.n_modes, 2 * self.dim)) * share).sum(-2)
            else:
                index = self._draw_modes(choice[..., :-1])
                last = last.view(-1, 2 * self.dim).index_select(0, index)
                last = last.view(*out.shape[:-1], 2 * self.dim)
        mean = last[..., : self.dim]
        if base is not None:
            mean = mean + base
        if self.deterministic:
            out.copy_(mean)
            return
        raw = last[..., self.dim : 2 * self.dim].tanh()
        std = torch.addcmul(self.std_shift[member], self.std_slope, raw).exp_()
        if extra_std is not None:
            std += extra_std
        torch.addcmul(mean, std, out, out=out)

    def _product(self, x: Tensor, layer: tuple[Tensor, Tensor], member: slice) -> Tensor:
        """``[M, R, out]`` in float32 or wider, whatever the precision of the product."""
        weight, bias = layer[0][member], layer[1][member]
        if self.dtype == bias.dtype:
            return torch.baddbmm(bias, x, weight)
        return torch.bmm(x, weight).to(bias.dtype).add_(bias)

    def _draw_modes(self, logits: Tensor) -> Tensor:
        """Rows of ``[M * R * K, ...]`` that belong to modes drawn with ``logits [M, R, K]``."""
        # Inversion of the cumulative sum; softmax over so few numbers would cost ten times more.
        edges = (logits - logits.amax(-1, keepdim=True)).exp_().cumsum(-1)
        height = torch.rand_like(edges[..., :1]).mul_(edges[..., -1:])
        # The last edge is not compared: rounding may put the height upon it.
        mode = (height >= edges[..., :-1]).sum(-1).flatten()
        if len(self.first_rows) != len(mode):
            self.first_rows = torch.arange(len(mode), device=mode.device) * self.n_modes
        return mode.add_(self.first_rows)


def _layer(
    weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Layers ``[M, in, out]`` side by side: the weight for the product, the bias as it is."""
    return torch.cat(list(weights), -1).to(dtype), torch.cat(list(biases), -1)
