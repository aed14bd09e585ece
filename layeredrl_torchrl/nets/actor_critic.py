"""A policy and action values in state space, in the form of TorchRL's losses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from tensordict import NestedKey
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import ProbabilisticActor, ValueOperator

from layeredrl_torchrl._checks import check_keys
from layeredrl_torchrl._state import WholeLoading
from layeredrl_torchrl.nets._fully_connected import fully_connected
from layeredrl_torchrl.nets.heads import RewardNet
from layeredrl_torchrl.nets.normalizer import Normalizer
from layeredrl_torchrl.nets.squashed_normal import Bounds, SquashedNormal
from layeredrl_torchrl.specs import Space, to_spec

__all__ = ["QValueNet", "QValueOperator", "TanhActor"]


class TanhActor(WholeLoading, ProbabilisticActor):
    """A squashed Gaussian policy of state and context, for actions within bounds.

    A loss's ``fit_inputs`` sets the statistics that standardise the inputs. Hidden layers are
    normalised.

    >>> actor = TanhActor(3, 0, Bounded(-2.0, 2.0, (1,)))
    >>> actor(TensorDict({"state": torch.zeros(7, 3)}, [7]))["action"].shape
    torch.Size([7, 1])

    Args:
        state_dim: ``D``.
        context_dim: ``C``, may be 0.
        action_space: Space of one action ``[A]``, with finite bounds.
        hidden_sizes: Width of each hidden layer.
        nonlinearity: Class of the activation.
        layer_norm: Whether each hidden layer is normalised.
        in_keys: Keys of state and context; an empty context is not read.
        action_key: Key of the action.

    Raises:
        TypeError: Another kind of action space. ValueError: Bounds that are not finite, not in
            order, or so far apart that their distance overflows; another number of keys.
    """

    def __init__(
        self,
        state_dim: int,
        context_dim: int,
        action_space: Space,
        hidden_sizes: Sequence[int] = (128, 128),
        nonlinearity: type[nn.Module] = nn.SiLU,
        layer_norm: bool = True,
        *,
        in_keys: Sequence[NestedKey] = ("state", "context"),
        action_key: NestedKey = "action",
    ) -> None:
        spec = to_spec(action_space, name="action_space")
        if not isinstance(spec, Bounded) or not spec.dtype.is_floating_point:
            raise TypeError(f"action_space must be a Box of floats with bounds, got {spec}")
        low, high = spec.space.low, spec.space.high
        distance = high - low
        if not bool((distance.isfinite() & (distance > 0)).all()):
            raise ValueError(
                "action_space must have finite bounds, with high above low and at a distance that "
                f"does not overflow, got low={low.tolist()}, high={high.tolist()}; bound the "
                "actions in the environment by the range that they are really taken from"
            )
        keys = check_keys("in_keys", in_keys)
        n_read = 2 if context_dim else 1
        if not n_read <= len(keys) <= 2:
            raise ValueError(f"in_keys must name state and context, got {keys}")
        keys = keys[:n_read]
        bounds = Bounds(low, high)
        net = _PolicyNet(state_dim + context_dim, bounds, hidden_sizes, nonlinearity, layer_norm)
        super().__init__(
            TensorDictModule(net, keys, ["loc", "scale"]),
            in_keys=["loc", "scale"],
            out_keys=[action_key],
            spec=spec,
            distribution_class=partial(SquashedNormal, bounds=bounds),
            return_log_prob=False,
        )


class _PolicyNet(nn.Module):
    """Computes mean and std of the actions before squashing."""

    def __init__(
        self,
        n_in: int,
        bounds: Bounds,
        hidden_sizes: Sequence[int],
        nonlinearity: type[nn.Module],
        layer_norm: bool,
    ) -> None:
        super().__init__()
        self.bounds = bounds
        self.inputs = Normalizer(n_in)
        n_out = 2 * bounds.low.numel()
        self.net = fully_connected(n_in, n_out, hidden_sizes, nonlinearity, layer_norm)
        self.split = NormalParamExtractor()

    def forward(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        out = self.net(self.inputs(torch.cat(parts, -1)))
        if out.dtype in (torch.bfloat16, torch.float16):
            out = out.float()  # densities are sums that low precision does not hold
        return self.split(out)

    def fit_inputs(self, state: Tensor, context: Tensor, action: Tensor) -> None:
        """Set the input statistics from a sample ``[N, ...]``; the action is ignored."""
        self.inputs.fit(torch.cat((state, context), -1))


class QValueNet(RewardNet):
    """Predicts the value of taking ``action`` in ``state``; arguments as :class:`RewardNet`.

    >>> net = QValueNet(state_dim=3, context_dim=0, action_dim=1)
    >>> net(torch.zeros(7, 3), torch.zeros(7, 0), torch.zeros(7, 1)).shape
    torch.Size([7])
    """


class QValueOperator(WholeLoading, ValueOperator):
    """A :class:`QValueNet` as a TensorDictModule: writes ``"state_action_value" [*B, 1]``.

    >>> td = TensorDict({"state": torch.zeros(7, 3), "action": torch.zeros(7, 1)}, [7])
    >>> QValueOperator(3, 0, 1)(td)["state_action_value"].shape
    torch.Size([7, 1])

    Args:
        state_dim, context_dim, action_dim, hidden_sizes, nonlinearity, layer_norm: See
            :class:`RewardNet`.
        in_keys: Keys of state, context and action; an empty context is not read.

    Raises:
        TypeError, ValueError: As :class:`RewardNet`; another number of keys.
    """

    def __init__(
        self,
        state_dim: int,
        context_dim: int,
        action_dim: int | Space,
        hidden_sizes: Sequence[int] = (128, 128),
        nonlinearity: type[nn.Module] = nn.SiLU,
        layer_norm: bool = True,
        *,
        in_keys: Sequence[NestedKey] = ("state", "context", "action"),
    ) -> None:
        net = QValueNet(state_dim, context_dim, action_dim, hidden_sizes, nonlinearity, layer_norm)
        keys = check_keys("in_keys", in_keys)
        if len(keys) != 3:
            raise ValueError(
                f"in_keys must name state, context (also where it is empty) and action, got {keys}"
            )
        keys = [key for key, dim in zip(keys, (1, context_dim, 1), strict=True) if dim]
        # TorchRL would name a value of the state where the action has another key.
        out_keys = ["state_action_value"]
        super().__init__(_Column(net, has_context=bool(context_dim)), keys, out_keys)


class _Column(nn.Module):
    """Adds an axis to the values of a head."""

    def __init__(self, head: QValueNet, *, has_context: bool) -> None:
        super().__init__()
        self.head, self.has_context = head, has_context

    def forward(self, state: Tensor, *others: Tensor) -> Tensor:
        context, action = others if self.has_context else (state[..., :0], *others)
        return self.head(state, context, action).unsqueeze(-1)
