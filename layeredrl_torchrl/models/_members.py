"""Modules that evaluate the member networks of an ensemble together."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call

from layeredrl_torchrl.nets import MemberOutput, stackable

__all__ = ["LoopMembers", "VmapMembers", "check_distinct", "check_net", "detached", "stack_members"]


class VmapMembers(nn.Module):
    """Equally built modules of any kind, evaluated by ``torch.vmap`` over stacked parameters.

    Args:
        nets: The ``M`` members, which must pass :func:`~layeredrl_torchrl.nets.stackable`; their
            parameters and buffers are copied.

    Shapes:
        state ``[M, N, D]``, context ``[M, N, C]``, action ``[M, N, ...]`` -> each output of a
        member with a leading ``M``.
    """

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        self.params = TensorDict.from_modules(*nets, as_module=True)
        # A module without values, filled with parameters at each call; in a list, so that it is not
        # registered.
        self._template = [copy.deepcopy(nets[0]).to("meta")]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights for each member, by ``reset_parameters`` of its parts."""
        template = self._template[0]
        for member in range(self.params.batch_size[0]):
            with self.params.data[member].to_module(template):
                for part in reversed(list(template.modules())):  # children before their parents
                    reset = getattr(part, "reset_parameters", None)
                    if callable(reset):
                        reset()

    def _call(
        self, params: TensorDict, state: Tensor, context: Tensor, action: Tensor
    ) -> MemberOutput:
        template = self._template[0]
        with params.to_module(template):
            return template(state, context, action)

    def forward(self, state: Tensor, context: Tensor, action: Tensor) -> MemberOutput:
        """Evaluate member ``m`` on row block ``m``; shapes in the class docstring."""
        return self._evaluate(self.params, state, context, action)

    def detached(self, state: Tensor, context: Tensor, action: Tensor) -> MemberOutput:
        """Evaluate like :meth:`forward`, without gradients for the parameters."""
        return self._evaluate(self.params.data, state, context, action)

    def _evaluate(self, params: TensorDict, *given: Tensor) -> MemberOutput:
        self._template[0].train(self.training)
        out: MemberOutput = torch.vmap(self._call, randomness="different")(params, *given)
        return out


class LoopMembers(nn.Module):
    """Differently built modules, evaluated one after the other; shapes as :class:`VmapMembers`."""

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, state: Tensor, context: Tensor, action: Tensor) -> MemberOutput:
        """Evaluate member ``m`` on row block ``m``."""
        outs = [net(state[m], context[m], action[m]) for m, net in enumerate(self.nets)]
        return (
            (
                torch.stack([mean for (mean, _), _, _ in outs]),
                torch.stack([std for (_, std), _, _ in outs]),
            ),
            torch.stack([weights for _, weights, _ in outs]),
            torch.stack([term_prob for _, _, term_prob in outs]),
        )


def detached(members: nn.Module, *given: Tensor) -> MemberOutput:
    """Evaluate members of any kind, without gradients for their parameters."""
    if isinstance(members, VmapMembers):  # its parameters are locked
        return members.detached(*given)
    frozen = {name: p.detach() for name, p in members.named_parameters()}
    out: MemberOutput = functional_call(members, frozen, given)
    return out


def check_net(
    member: int, net: nn.Module, probe: tuple[Tensor, Tensor, Tensor], n_modes: int
) -> None:
    """Run a new network once, so that a wrong network fails here.

    Args:
        member: Its index, for the message.
        net: The network.
        probe: State ``[2, D]``, context ``[2, C]`` and action.
        n_modes: ``K``.

    Raises:
        TypeError: ``net`` is not a module. ValueError: Outputs of another shape, or out of range.
    """
    state_dim = probe[0].shape[-1]
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"partial_net must return a torch.nn.Module, got {type(net).__name__}; pass a "
            "class or a functools.partial of one"
        )
    parameter = next(net.parameters(), None)
    if parameter is not None:
        state, context, action = (
            x.to(parameter.device, parameter.dtype if x.is_floating_point() else x.dtype)
            for x in probe
        )
        probe = (state, context, action)
    training = net.training
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        out = net.eval()(*probe)
    net.train(training)
    try:
        (mean, std), weights, term_prob = out
    except (TypeError, ValueError):
        raise ValueError(
            f"member {member} returned {type(out).__name__}, expected "
            "(mean, std), weights, term_prob"
        ) from None
    gaussian = (2, n_modes, state_dim)
    for name, value, shape in (
        ("mean", mean, gaussian),
        ("std", std, gaussian),
        ("weights", weights, (2, n_modes)),
        ("term_prob", term_prob, (2,)),
    ):
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"member {member} returned {name} of shape {what} for a batch "
                f"of 2, expected {shape} (batch, n_modes={n_modes}, "
                f"state={state_dim} as they apply)"
            )
    for name, value, fine, remedy in (
        ("mean", mean, torch.isfinite(mean), "it must be finite"),
        ("std", std, std > 0, "it must be positive (exp or softplus of the network's output)"),
        (
            "weights",
            weights,
            (weights >= 0) & ((weights.sum(-1, keepdim=True) - 1.0).abs() < 1e-3),
            "they must not be negative and sum to 1 (a softmax over modes)",
        ),
        (
            "term_prob",
            term_prob,
            (term_prob >= 0) & (term_prob <= 1),
            "it must lie in [0, 1] (a sigmoid)",
        ),
    ):
        if not bool(fine.all()):
            wrong = value[~fine][0].item()
            raise ValueError(f"member {member} returned {name} of {wrong:.3g}; {remedy}")


def check_distinct(nets: Sequence[nn.Module]) -> None:
    """Raise ``ValueError`` for members that share trainable parameters.

    Copies of them would be equal members, whose disagreement means nothing.
    """
    first: dict[nn.Parameter, int] = {}
    for member, net in enumerate(nets):
        for name, parameter in net.named_parameters():
            other = first.setdefault(parameter, member)
            if other != member and parameter.requires_grad:
                raise ValueError(
                    f"partial_net gave members {other} and {member} that share the parameter "
                    f"{name!r}, so they could not disagree; build a new network in each call "
                    "(pass the class, or a functools.partial of it, instead of a network)"
                )


def _shapes(net: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, value.shape) for name, value in net.state_dict().items()]


def stack_members(nets: Sequence[nn.Module], probe: tuple[Tensor, Tensor, Tensor]) -> nn.Module:
    """Combine members in the fastest way that they allow.

    A class may define a static method ``stack(nets)``, like the built-in network; it returns
    ``None`` for nets that it cannot stack. Other modules that differ only in their parameters go
    through :class:`VmapMembers`. :class:`LoopMembers` takes the rest, including networks that use a
    parameter twice, and members that freeze different parameters.

    Args:
        nets: The members.
        probe: A small input ``(state [N, D], context [N, C], action [N, ...])``, used to test
            whether the members run under ``vmap``.
    """
    first = nets[0]
    stack: Callable[..., nn.Module | None] | None = getattr(type(first), "stack", None)
    if stack is not None and (stacked := stack(nets)) is not None:
        return stacked
    same = all(type(n) is type(first) and _shapes(n) == _shapes(first) for n in nets)
    parameter = next(first.parameters(), None)
    if not same or parameter is None or not stackable(nets):
        return LoopMembers(nets)
    members = VmapMembers(nets).eval()
    given = [
        x.to(parameter.device, parameter.dtype if x.is_floating_point() else x.dtype).expand(
            len(nets), *x.shape
        )
        for x in probe
    ]
    training = [net.training for net in nets]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            # Some layers do more in training mode; tested on a copy, since they may change buffers.
            # A ValueError only says that they need more rows than these, nothing about vmap.
            with suppress(ValueError):
                copy.deepcopy(members).train()(*given)
            ours = members(*given)
            theirs = LoopMembers(nets).eval()(*given)
    except RuntimeError as error:
        warnings.warn(
            f"{type(first).__name__} cannot run under torch.vmap ({str(error).splitlines()[0]}); "
            "its members are evaluated one after the other",
            stacklevel=3,
        )
        return LoopMembers(nets)
    finally:
        for net, mode in zip(nets, training, strict=True):
            net.train(mode)
    # Members may also differ in an activation, a number or a function.
    pairs = zip(_flat(ours), _flat(theirs), strict=True)
    if all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs):
        return members.train()
    return LoopMembers(nets)


def _flat(out: MemberOutput) -> tuple[Tensor, ...]:
    return (*out[0], *out[1:])
