"""Probabilistic ensembles of dynamics networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layeredrl_torchrl._checks import check_finite, check_flag, check_number
from layeredrl_torchrl.models.calibration import Calibration
from layeredrl_torchrl.models.fused import FusedStep
from layeredrl_torchrl.models.inputs import check_parameters, excess_std
from layeredrl_torchrl.models.members import stack_members
from layeredrl_torchrl.models.model import Model
from layeredrl_torchrl.models.propagation import Step
from layeredrl_torchrl.models.stepping import EnsembleStep
from layeredrl_torchrl.nets import (
    MemberOutput,
    Normalizer,
    ProbFCDynamics,
    StackedProbFCDynamics,
    move_towards,
)
from layeredrl_torchrl.specs import Space, is_discrete, width

__all__ = ["ProbabilisticEnsemble"]


class ProbabilisticEnsemble(Model):
    """An ensemble of networks that each predict a mixture of Gaussians (arXiv 1805.12114).

    What the members disagree on is what the data has not told them: see :meth:`uncertainty`.

    >>> model = ProbabilisticEnsemble(Unbounded((3,)), None, Bounded(-1.0, 1.0, (1,)), n_models=5)
    >>> mean, weights, std, term_prob = model.predict(torch.zeros(7, 3), None, torch.zeros(7, 1))
    >>> mean.shape, term_prob.shape
    (torch.Size([7, 5, 1, 3]), torch.Size([7]))

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
        clip_inputs: Whether standardised inputs are also kept within the range of the data that
            the statistics are from (:class:`~layeredrl_torchrl.Normalizer`); by default where
            there are such inputs. What a prediction's inputs lie beyond that range adds to its
            std, up to the spread of all that was seen
            (:func:`~layeredrl_torchrl.models.inputs.excess_std`).
        ema_decay: Predictions come from an exponential moving average of the members' weights
            with this decay, ``None`` for the weights themselves. The average starts with the
            first :meth:`update_average`, which a predictor's ``learn`` calls after each gradient
            step (and your own training loop has to).
        **keys: ``in_keys`` and ``out_keys`` of :class:`~layeredrl_torchrl.Model`.

    Once there is an average, :meth:`predict` sends no gradient to the trained weights; the losses
    use :meth:`predict_normalized`, which does.

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
        clip_inputs: bool | None = None,
        ema_decay: float | None = 0.99,
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
        self.predict_delta = check_flag("predict_delta", predict_delta)
        self.normalize_targets = check_flag("normalize_targets", normalize_targets)
        self.normalize_inputs = check_flag("normalize_inputs", normalize_inputs)
        if clip_inputs is not None:
            check_flag("clip_inputs", clip_inputs)
        if clip_inputs and not normalize_inputs:
            raise ValueError("clip_inputs=True has no effect without normalize_inputs=True")
        clip_inputs = normalize_inputs if clip_inputs is None else clip_inputs
        if ema_decay is not None:
            hint = "pass None for no average"
            check_number("ema_decay", ema_decay, 0.0, 1.0, open_high=True, hint=hint)
        self.ema_decay = ema_decay
        spaces = (state_space, context_space, action_space)
        try:
            nets = [partial_net(*spaces, n_modes) for _ in range(n_models)]
        except TypeError as error:
            raise TypeError(
                "partial_net failed when called as partial_net(state_space, context_space, "
                f"action_space, n_modes): {error}; give its other arguments, under the names that "
                "it has, by functools.partial"
            ) from error
        probe = self._probe_inputs()
        for member, net in enumerate(nets):
            self._check_net(member, net, probe)
        self.members = stack_members(nets, probe)
        self._ignores_context = all(getattr(net, "ignore_context", False) for net in nets)
        if ema_decay is not None:
            self.averaged_members = copy.deepcopy(self.members).requires_grad_(False)
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.long))
        # Whether there is an average yet, kept beside the buffer so that predicting does not read
        # it (on a GPU that would wait for all that is under way).
        self._averaging = False
        self._compile_options: dict[str, Any] | None = None
        self.register_load_state_dict_post_hook(self._note_average)
        self.state_normalizer = Normalizer(self.state_dim, clip=clip_inputs)
        self.context_normalizer = Normalizer(self.context_dim, clip=clip_inputs)
        n_action = 0 if is_discrete(self.action_spec) else width(self.action_spec)
        self.action_normalizer = Normalizer(n_action, clip=clip_inputs)
        self.target_normalizer = Normalizer(self.state_dim)
        self.calibration = Calibration(n_models, self.state_dim)

    # -- prediction -----------------------------------------------------------------------

    def predict_normalized(self, state: Tensor, context: Tensor, action: Tensor) -> MemberOutput:
        """What the weights under training say, with mean and std in the units of :meth:`target`."""
        return self.members(*self._normalize(state, context, action))

    @property
    def predicting_members(self) -> nn.Module:
        """The networks that predict, those of averaged weights once there is an average."""
        if self.ema_decay is None or not self._averaging:
            return self.members
        return self.averaged_members

    def _normalize(
        self, state: Tensor, context: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.normalize_inputs:
            return state, context, action
        if not is_discrete(self.action_spec):
            action = self.action_normalizer(action)
        if self.context_dim:
            context = self.context_normalizer(context)
        return self.state_normalizer(state), context, action

    def predict_members(self, state: Tensor, context: Tensor, action: Tensor) -> MemberOutput:
        """Predict with member ``m`` on row block ``m``; shapes as the base class has them."""
        inputs = self._normalize(state, context, action)
        (mean, std), weights, term_prob = self.predicting_members(*inputs)
        loc, scale = self.target_normalizer.loc, self.target_normalizer.scale
        offset = loc + state if self.predict_delta else loc.expand_as(state)
        std = self.calibration(std)
        if self.state_normalizer.clip:
            std = std + excess_std(self._excess(state, context, action)).unsqueeze(-2)
        mean = torch.addcmul(offset.unsqueeze(-2), mean, scale)
        return (mean, std * scale), weights, term_prob

    def reconcile_members(self, mean: Tensor, weights: Tensor) -> Tensor:
        """As the base class has it: by :class:`Calibration`."""
        return self.calibration.reconcile(mean, weights)

    def _excess(self, state: Tensor, context: Tensor, action: Tensor) -> Tensor:
        """How far each input lies beyond the range of the data, ``[M, N, in]``."""
        parts = [self.state_normalizer.excess(state)]
        if self.context_dim and not self._ignores_context:
            parts.append(self.context_normalizer.excess(context))
        if not is_discrete(self.action_spec):
            parts.append(self.action_normalizer.excess(action))
        return torch.cat(parts, -1)

    def make_step(self, *, deterministic: bool = False) -> Step:
        """As the base class has it; the built-in members are stepped in a faster way.

        Raises:
            ValueError: Built-in members with parameters that are not finite; the message names
                them.
        """
        members = self.predicting_members
        if torch.is_grad_enabled() or not isinstance(members, StackedProbFCDynamics):
            return super().make_step(deterministic=deterministic)
        check_parameters(members)
        if self._compile_options is not None:
            options = tuple(sorted(self._compile_options.items()))
            return FusedStep(self, members, deterministic=deterministic, options=options)
        return EnsembleStep(self, members, deterministic=deterministic)

    def compile(self, **options: Any) -> None:
        """Compile the steps of rollouts and plans, instead of ``forward`` as other modules do.

        ``benchmarks/rollout.py`` and ``benchmarks/planning.py`` have both times. Compiling takes
        half a minute at the first rollout and again at the first of another size
        (``dynamic=False``: at each size), in each process, and needs a C++ compiler. Only the
        built-in members are compiled, and only where no gradient is kept. The same seed gives other
        random numbers.

        Args:
            **options: Of ``torch.compile``, for example ``dynamic=False``.

        Raises:
            TypeError: Members that are not the built-in ones.
        """
        if not isinstance(self.members, StackedProbFCDynamics):
            raise TypeError(
                f"compile() is for ensembles of ProbFCDynamics, but the members are "
                f"{type(self.members).__name__}; compile your own networks in partial_net"
            )
        self._compile_options = options

    # -- learning -------------------------------------------------------------------------

    def target(self, state: Tensor, next_state: Tensor) -> Tensor:
        """What the networks predict for a transition, ``[*B, D]``: normalised delta or state."""
        return self.target_normalizer(next_state - state if self.predict_delta else next_state)

    @torch.no_grad()
    def fit_statistics(
        self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
    ) -> None:
        """Set the statistics of inputs and targets from transitions ``[N, ...]``.

        Raises:
            ValueError: No transitions, or values that are not finite; nothing is changed.
        """
        self._check_transitions(state, context, action, next_state)
        if self.normalize_inputs:
            self.state_normalizer.fit(state)
            self.context_normalizer.fit(context)
            if not is_discrete(self.action_spec):
                self.action_normalizer.fit(action)
        if self.normalize_targets:
            self.target_normalizer.fit(next_state - state if self.predict_delta else next_state)

    @torch.no_grad()
    def calibrate(self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor) -> None:
        """Fit :class:`Calibration` to transitions ``[N, ...]`` that were not trained on.

        Raises:
            ValueError: As :meth:`fit_statistics`.
        """
        self._check_transitions(state, context, action, next_state)
        rows = (x.expand(self.n_models, *x.shape) for x in (state, context, action))
        (mean, std), weights, _ = self.predicting_members(*self._normalize(*rows))
        self.calibration.fit(mean, std, weights, self.target(state, next_state))

    def _check_transitions(
        self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
    ) -> None:
        named = {"state": state, "context": context, "next_state": next_state}
        if not is_discrete(self.action_spec):
            named["action"] = action
        for name, value in named.items():
            if not len(value):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}: give at least one transition"
                )
            check_finite(name, value, hint="repair the data first")

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the averaged weights towards the trained ones; call after a gradient step.

        The decay is ``min(ema_decay, (1 + t) / (10 + t))`` at update ``t``, so that a young
        average forgets its untrained start.
        """
        if self.ema_decay is None or next(self.members.parameters(), None) is None:
            return
        t = int(self.n_averaged)
        share = 1.0 - min(self.ema_decay, (1 + t) / (10 + t))
        move_towards(self.averaged_members, self.members, share)
        self.n_averaged += 1
        self._averaging = True

    def _note_average(self, *_: Any) -> None:
        self._averaging = bool(self.n_averaged > 0)

    # -- checks of partial_net ------------------------------------------------------------

    def _probe_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        action = self.action_spec.zero((2,))
        if not is_discrete(self.action_spec):
            action = action.to(torch.get_default_dtype())
        generator = torch.Generator().manual_seed(0)
        state = torch.randn(2, self.state_dim, generator=generator)
        return state, torch.randn(2, self.context_dim, generator=generator), action

    def _check_net(self, member: int, net: nn.Module, probe: tuple[Tensor, Tensor, Tensor]) -> None:
        """Run a new network once, so that a wrong one fails here and says why."""
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
        gaussian = (2, self.n_modes, self.state_dim)
        for name, value, shape in (
            ("mean", mean, gaussian),
            ("std", std, gaussian),
            ("weights", weights, (2, self.n_modes)),
            ("term_prob", term_prob, (2,)),
        ):
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"member {member} returned {name} of shape {what} for a batch "
                    f"of 2, expected {shape} (batch, n_modes={self.n_modes}, "
                    f"state={self.state_dim} as they apply)"
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
