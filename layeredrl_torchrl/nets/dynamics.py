"""The built-in member network of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from layeredrl_torchrl._checks import (
    check_callable,
    check_flag,
    check_instance,
    check_positive_int,
    check_sizes,
)
from layeredrl_torchrl.nets._gaussians import LogStdBounds, MemberOutput, mixture_parameters
from layeredrl_torchrl.nets._stacked import (
    ConcatenatedInputs,
    StackedProbFCDynamics,
    init_layers,
    stackable,
)
from layeredrl_torchrl.specs import Space, to_spec, width

__all__ = ["ProbFCDynamics"]


class ProbFCDynamics(ConcatenatedInputs):
    """A fully connected network that predicts a mixture of Gaussians and a termination.

    It is the default ``partial_net`` of :class:`~layeredrl_torchrl.ProbabilisticEnsemble`, called
    with the three spaces and ``n_modes``. The ensemble decides what mean and std refer to: the
    state or its change, normalised or not.

    >>> net = ProbFCDynamics(Unbounded((3,)), None, Bounded(-1.0, 1.0, (1,)), n_modes=2)
    >>> (mean, std), weights, term_prob = net(
    ...     torch.zeros(7, 3), torch.zeros(7, 0), torch.zeros(7, 1)
    ... )
    >>> mean.shape, weights.shape, term_prob.shape
    (torch.Size([7, 2, 3]), torch.Size([7, 2]), torch.Size([7]))

    Args:
        state_space: Box of the ``D`` state dimensions.
        context_space: Box of the ``C`` context dimensions, or ``None``.
        action_space: Box or Discrete.
        n_modes: ``K``, the number of Gaussians.
        hidden_sizes: Width of each hidden layer; a layer as wide as the previous one has a skip
            connection.
        nonlinearity: Class of the activation. ``nn.SiLU``, which the default approximates,
            predicts slightly better on some tasks and takes three times as long on a CPU.
        ignore_context: Whether to leave the context out of the input (LayeredRL's default: a goal
            does not change the dynamics). Set ``False`` where the context changes the dynamics.
        log_std_bounds: Soft bounds of the log standard deviation, in units of the target.

    Shapes:
        state ``[*B, D]``, context ``[*B, C]``, action in the form of its spec ->
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
        nonlinearity: type[nn.Module] = nn.Hardswish,
        ignore_context: bool = True,
        log_std_bounds: tuple[float, float] = (-6.0, 1.0),
    ) -> None:
        super().__init__()
        hidden_sizes = check_sizes("hidden_sizes", hidden_sizes)
        check_callable("nonlinearity", nonlinearity, factory=True)
        self.action_spec = to_spec(action_space, name="action_space")
        self.state_dim = width(to_spec(state_space, name="state_space"))
        context_dim = width(to_spec(context_space, name="context_space"))
        self.n_modes = check_positive_int("n_modes", n_modes)
        self.ignore_context = check_flag("ignore_context", ignore_context)
        check_instance("log_std_bounds", log_std_bounds, tuple, hint="pass (low, high)")
        self.log_std_bounds = LogStdBounds(*log_std_bounds)
        n_in = self.state_dim + (0 if ignore_context else context_dim) + width(self.action_spec)
        n_out = n_modes * (2 * self.state_dim + 1) + 1
        sizes = [n_in, *hidden_sizes, n_out]
        layers = [nn.Linear(i, o) for i, o in pairwise(sizes)]
        self.layers = nn.ModuleList(layers)
        self.activation = nonlinearity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        layers = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        init_layers([x.weight.mT for x in layers], [x.bias for x in layers])

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
        """Combine networks of equal structure into one module that evaluates them together.

        Return ``None`` for networks that differ in more than their weights, also in which of them
        are frozen, that share a weight between layers, whose activation has parameters, or with
        layers that have hooks or a parametrization (such as normalised weights).
        """
        # A subclass may compute something else, so it must define its own stack().
        same = [net for net in nets if type(net) is ProbFCDynamics]
        if len(same) != len(nets) or len({net._build() for net in same}) != 1:
            return None
        if any(True for _ in same[0].activation.parameters()) or not stackable(same):
            return None
        if not all(_is_plain(layer) for net in same for layer in net.layers):
            return None
        return StackedProbFCDynamics(same)

    def _build(self) -> tuple[Any, ...]:
        """Return everything that must agree before networks can be stacked."""
        shapes = tuple(tuple(p.shape) for p in self.parameters())
        bounds = (self.log_std_bounds.center, self.log_std_bounds.half)
        how = (repr(self.activation), bounds, self.ignore_context, self.n_modes)
        return (*how, repr(self.action_spec), shapes)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is linear without parametrizations and hooks."""
    return type(layer) is nn.Linear and not (layer._forward_pre_hooks or layer._forward_hooks)
