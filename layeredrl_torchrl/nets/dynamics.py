"""The built-in member network of an ensemble, and its stacked form for all members at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layeredrl_torchrl.specs import Space, action_features, to_spec, width

__all__ = ["MemberOutput", "ProbFCDynamics", "StackedProbFCDynamics"]

_IN_PLACE: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.SiLU: partial(F.silu, inplace=True),
    nn.ReLU: partial(F.relu, inplace=True),
    nn.Hardswish: partial(F.hardswish, inplace=True),
}

# (mean, std), weights, term_prob: what a member network returns.
MemberOutput: TypeAlias = tuple[tuple[Tensor, Tensor], Tensor, Tensor]


def mixture_parameters(
    out: Tensor, n_modes: int, dim: int, log_std_bounds: tuple[float, float]
) -> MemberOutput:
    """Read a network's last layer as a mixture of Gaussians and a termination probability.

    The log standard deviation is kept within bounds by the softplus pair of PETS
    (arXiv 1805.12114, appendix A.1), here with fixed bounds.

    Args:
        out: ``[..., 2 * K * D + K + 1]``.
        n_modes: ``K``.
        dim: ``D``.
        log_std_bounds: Lower and upper soft bound.

    Returns:
        ``(mean [..., K, D], std [..., K, D]), weights [..., K], term_prob [...]`` in float32 or
        wider, also under ``torch.autocast``.
    """
    mean, raw, logits, term_logit = _split(out, n_modes, dim)
    weights = logits.softmax(-1) if n_modes > 1 else torch.ones_like(logits)
    return (mean, _bounded_std(raw, log_std_bounds)), weights, term_logit.sigmoid()


def _split(out: Tensor, n_modes: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means and raw log std ``[..., K, D]``, weight logits ``[..., K]``, termination logit."""
    if out.dtype in (torch.bfloat16, torch.float16):
        out = out.float()
    size = n_modes * dim
    mean, raw, logits, term_logit = out.split([size, size, n_modes, 1], dim=-1)
    shape = (n_modes, dim)
    return mean.unflatten(-1, shape), raw.unflatten(-1, shape), logits, term_logit.squeeze(-1)


def _bounded_std(raw: Tensor, log_std_bounds: tuple[float, float]) -> Tensor:
    low, high = log_std_bounds
    log_std = high - F.softplus(high - raw)
    return (low + F.softplus(log_std - low)).exp()


class ProbFCDynamics(nn.Module):
    """A fully connected network that predicts a mixture of Gaussians and a termination.

    It is a ``partial_net`` of :class:`~layeredrl_torchrl.ProbabilisticEnsemble`: called with the
    three spaces and ``n_modes``. What its mean and std refer to (state or delta, normalised or
    not) is the ensemble's business.

    Args:
        state_space: Box of the ``D`` state dimensions.
        context_space: Box of the ``C`` context dimensions, or ``None``.
        action_space: Box or Discrete.
        n_modes: ``K``, the number of Gaussians.
        hidden_sizes: Width of each hidden layer; a layer as wide as the one before adds to it
            (an identity skip).
        nonlinearity: Class of the activation.
        ignore_context: Whether the context is left out of the input (LayeredRL's default: a goal
            does not move the world). Set to ``False`` where the context changes the dynamics.
        log_std_bounds: Soft bounds of the log standard deviation, in units of the target.

    Shapes:
        state ``[*B, D]``, context ``[*B, C]``, action as the spec says ->
        ``(mean [*B, K, D], std [*B, K, D]), weights [*B, K], term_prob [*B]``.
    """

    def __init__(
        self,
        state_space: Space,
        context_space: Space | None,
        action_space: Space,
        n_modes: int = 1,
        *,
        hidden_sizes: Sequence[int] = (128, 128),
        nonlinearity: type[nn.Module] = nn.SiLU,
        ignore_context: bool = True,
        log_std_bounds: tuple[float, float] = (-6.0, 1.0),
    ) -> None:
        super().__init__()
        if not hidden_sizes:
            raise ValueError("hidden_sizes is empty; give at least one hidden layer, e.g. (128,)")
        self.action_spec = to_spec(action_space, name="action_space")
        self.state_dim = width(to_spec(state_space, name="state_space"))
        context_dim = width(to_spec(context_space, name="context_space"))
        self.n_modes = n_modes
        self.ignore_context = ignore_context
        self.log_std_bounds = log_std_bounds
        n_in = self.state_dim + (0 if ignore_context else context_dim) + width(self.action_spec)
        n_out = n_modes * (2 * self.state_dim + 1) + 1
        sizes = [n_in, *hidden_sizes, n_out]
        layers = [nn.Linear(i, o) for i, o in pairwise(sizes)]
        for layer in layers:
            # LeCun's normal initialisation: with the skips, the variance of an untrained network's
            # layers stays near that of its normalised input.
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)
        self.activation = nonlinearity()

    def features(self, state: Tensor, context: Tensor, action: Tensor) -> Tensor:
        """Concatenate the inputs to ``[*B, in]``."""
        act = action_features(self.action_spec, action, state.dtype)
        parts = (state, act) if self.ignore_context else (state, context, act)
        return torch.cat(parts, dim=-1)

    def forward(self, state: Tensor, context: Tensor, action: Tensor) -> MemberOutput:
        """Predict; shapes in the class docstring."""
        x = self.features(state, context, action)
        *hidden, last = self.layers
        for layer in hidden:
            y = self.activation(layer(x))
            x = x + y if x.shape[-1] == y.shape[-1] and layer is not hidden[0] else y
        return mixture_parameters(last(x), self.n_modes, self.state_dim, self.log_std_bounds)

    @staticmethod
    def stack(nets: Sequence[nn.Module]) -> StackedProbFCDynamics | None:
        """Combine equally built networks into one module that evaluates them together.

        ``None`` for networks that differ in more than their weights, or whose activation learns.
        """
        # A subclass may compute something else, so it has to say itself how it is stacked.
        same = [net for net in nets if type(net) is ProbFCDynamics]
        if len(same) != len(nets) or len({net._build() for net in same}) != 1:
            return None
        if any(True for _ in same[0].activation.parameters()):
            return None
        return StackedProbFCDynamics(same)

    def _build(self) -> tuple[Any, ...]:
        """All that has to agree for networks to be stacked."""
        shapes = tuple(tuple(p.shape) for p in self.parameters())
        how = (repr(self.activation), self.log_std_bounds, self.ignore_context, self.n_modes)
        return (*how, repr(self.action_spec), shapes)


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
        self._features = first.features
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

    def forward(self, state: Tensor, context: Tensor, action: Tensor) -> MemberOutput:
        """Predict with member ``m`` on row block ``m``; shapes in the class docstring."""
        out = self._last_layer(state, context, action)
        return mixture_parameters(out, self.n_modes, self.state_dim, self.log_std_bounds)

    def sample(
        self,
        state: Tensor,
        context: Tensor,
        action: Tensor,
        calibration: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Draw from the predicted mixture: ``[M, N, D]``, and the term_prob ``[M, N]``.

        The same distribution as sampling from :meth:`forward`'s output, but the mode is drawn
        first, so that the std ``[M, N, D]`` is worked out, and corrected by ``calibration``, for
        that mode only.
        """
        out = self._last_layer(state, context, action)
        mean, raw, logits, term_logit = _split(out, self.n_modes, self.state_dim)
        if self.n_modes == 1:
            mean, raw = mean.squeeze(-2), raw.squeeze(-2)
        else:
            # Inversion of the weights' cumulative sum; clamped because it may end below 1.
            edges = logits.softmax(-1).cumsum(-1)
            mode = (torch.rand_like(edges[..., :1]) >= edges).sum(-1, keepdim=True)
            mode = mode.clamp_max(self.n_modes - 1).unsqueeze(-1)
            mean = mean.take_along_dim(mode, -2).squeeze(-2)
            raw = raw.take_along_dim(mode, -2).squeeze(-2)
        std = calibration(_bounded_std(raw, self.log_std_bounds))
        return torch.addcmul(mean, std, torch.randn_like(mean)), term_logit.sigmoid()

    def _last_layer(self, state: Tensor, context: Tensor, action: Tensor) -> Tensor:
        x = self._features(state, context, action)
        *hidden, last = zip(self.weights, self.biases, strict=True)
        for i, (weight, bias) in enumerate(hidden):
            y = torch.baddbmm(bias, x, weight)
            # In place where nothing has to be kept for a backward pass: half the memory traffic.
            in_place = None if y.requires_grad else _IN_PLACE.get(type(self.activation))
            y = self.activation(y) if in_place is None else in_place(y)
            if i > 0 and x.shape[-1] == y.shape[-1]:
                y = y + x if y.requires_grad else y.add_(x)
            x = y
        return torch.baddbmm(last[1], x, last[0])
