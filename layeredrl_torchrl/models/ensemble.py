"""Probabilistic ensembles of dynamics networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layeredrl_torchrl.models.members import stack_members
from layeredrl_torchrl.models.model import Model
from layeredrl_torchrl.nets import MemberOutput, Normalizer, ProbFCDynamics
from layeredrl_torchrl.specs import Space, is_discrete, width

__all__ = ["ProbabilisticEnsemble"]


class ProbabilisticEnsemble(Model):
    """An ensemble of networks that each predict a mixture of Gaussians (arXiv 1805.12114).

    What the members disagree on is what the data has not told them: see :meth:`uncertainty`.

    Args:
        state_space: Box of the ``D`` state dimensions.
        context_space: Box of the ``C`` context dimensions, or ``None``.
        action_space: Box or Discrete.
        partial_net: Called as ``partial_net(state_space, context_space, action_space, n_modes)``
            once for each member; returns a module with ``forward(state, context, action) ->
            (mean [*B, K, D], std [*B, K, D]), weights [*B, K], term_prob [*B]``. It is fed
            normalised inputs and predicts the normalised target, as the options below say.
        n_models: ``M``.
        n_modes: ``K``.
        n_particles_per_model: ``P``.
        predict_delta: Whether the networks predict the change of the state.
        normalize_targets: Whether the networks' targets are standardised.
        normalize_inputs: Whether state, context and continuous actions are standardised before
            they reach the networks.
        **keys: ``in_keys`` and ``out_keys`` of :class:`~layeredrl_torchrl.Model`.

    The statistics are buffers that only :meth:`fit_statistics` changes, which a predictor's
    ``learn`` calls.

    Raises:
        TypeError, ValueError: As :class:`~layeredrl_torchrl.Model`; a ``partial_net`` whose
            output has another shape, or a std that is not positive.
    """

    def __init__(
        self,
        state_space: Space,
        context_space: Space | None,
        action_space: Space,
        partial_net: Callable[..., nn.Module] = ProbFCDynamics,
        n_models: int = 5,
        n_modes: int = 1,
        n_particles_per_model: int = 1,
        *,
        predict_delta: bool = True,
        normalize_targets: bool = True,
        normalize_inputs: bool = True,
        **keys: Sequence[Any],
    ) -> None:
        super().__init__(
            state_space,
            context_space,
            action_space,
            n_models=n_models,
            n_modes=n_modes,
            n_particles_per_model=n_particles_per_model,
            **keys,
        )
        self.predict_delta = predict_delta
        self.normalize_targets = normalize_targets
        self.normalize_inputs = normalize_inputs
        nets = [
            partial_net(state_space, context_space, action_space, n_modes) for _ in range(n_models)
        ]
        probe = self._probe_inputs()
        for member, net in enumerate(nets):
            self._check_net(member, net, probe)
        self.members = stack_members(nets, probe)
        self.state_normalizer = Normalizer(self.state_dim)
        self.context_normalizer = Normalizer(self.context_dim)
        n_action = 0 if is_discrete(self.action_spec) else width(self.action_spec)
        self.action_normalizer = Normalizer(n_action)
        self.target_normalizer = Normalizer(self.state_dim)

    # -- prediction -----------------------------------------------------------------------

    def predict_normalized(self, state: Tensor, context: Tensor, action: Tensor) -> MemberOutput:
        """As :meth:`predict_members`, with mean and std in the units of :meth:`target`."""
        state = self.state_normalizer(state)
        context = self.context_normalizer(context)
        if not is_discrete(self.action_spec):
            action = self.action_normalizer(action)
        return self.members(state, context, action)

    def predict_members(self, state: Tensor, context: Tensor, action: Tensor) -> MemberOutput:
        """Predict with member ``m`` on row block ``m``; shapes as the base class has them."""
        (mean, std), weights, term_prob = self.predict_normalized(state, context, action)
        loc, scale = self.target_normalizer.loc, self.target_normalizer.scale
        offset = loc + state if self.predict_delta else loc.expand_as(state)
        return (
            (torch.addcmul(offset.unsqueeze(-2), mean, scale), std * scale),
            weights,
            term_prob,
        )

    # -- learning -------------------------------------------------------------------------

    def target(self, state: Tensor, next_state: Tensor) -> Tensor:
        """What the networks predict for a transition, ``[*B, D]``: normalised delta or state."""
        return self.target_normalizer(next_state - state if self.predict_delta else next_state)

    @torch.no_grad()
    def fit_statistics(
        self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
    ) -> None:
        """Set the statistics of inputs and targets from transitions ``[N, ...]``."""
        if self.normalize_inputs:
            self.state_normalizer.fit(state)
            self.context_normalizer.fit(context)
            if not is_discrete(self.action_spec):
                self.action_normalizer.fit(action)
        if self.normalize_targets:
            self.target_normalizer.fit(next_state - state if self.predict_delta else next_state)

    # -- checks of partial_net ------------------------------------------------------------

    def _probe_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        action = self.action_spec.zero((2,))
        if not is_discrete(self.action_spec):
            action = action.to(torch.get_default_dtype())
        return torch.zeros(2, self.state_dim), torch.zeros(2, self.context_dim), action

    def _check_net(
        self, member: int, net: nn.Module, probe: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Run a new network once, so that a wrong one fails here and says why."""
        if not isinstance(net, nn.Module):
            raise TypeError(
                f"partial_net must return a torch.nn.Module, got {type(net).__name__}; pass a "
                "class or a functools.partial of one"
            )
        parameter = next(net.parameters(), None)
        if parameter is not None:
            probe = tuple(
                x.to(parameter.device, parameter.dtype) if x.is_floating_point()
                else x.to(parameter.device)
                for x in probe
            )
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
        gaussian = (2, self.n_modes, self.state_dim)
        for name, value, shape in (
            ("mean", mean, gaussian),
            ("std", std, gaussian),
            ("weights", weights, (2, self.n_modes)),
            ("term_prob", term_prob, (2,)),
        ):
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"member {member} returned {name} of shape {tuple(value.shape)} for a batch "
                    f"of 2, expected {shape} (batch, n_modes={self.n_modes}, "
                    f"state={self.state_dim} as they apply)"
                )
        if not bool((std > 0).all()):
            raise ValueError(
                f"member {member} returned a std of {std.min().item():.3g}; it must be positive "
                "(exp or softplus of the network's output)"
            )
