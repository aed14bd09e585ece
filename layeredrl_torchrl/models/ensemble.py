"""Probabilistic ensembles of dynamics networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from layeredrl_torchrl._checks import check_flag, check_number
from layeredrl_torchrl._graphs import Graphs
from layeredrl_torchrl._precision import full_precision
from layeredrl_torchrl._state import draw_anew
from layeredrl_torchrl.models._members import check_distinct, check_net, stack_members
from layeredrl_torchrl.models._output_checks import check_parameters
from layeredrl_torchrl.models._parts import step_parts
from layeredrl_torchrl.models._scaling import Scaling
from layeredrl_torchrl.models._step import StepInputs, StepParts, ensemble_mixture
from layeredrl_torchrl.models._stepping import CompileOptions, EnsembleStepper, Stepper
from layeredrl_torchrl.models.calibration import Calibration
from layeredrl_torchrl.models.model import Model
from layeredrl_torchrl.nets import (
    MemberOutput,
    ProbFCDynamics,
    StackedProbFCDynamics,
    move_towards,
)
from layeredrl_torchrl.specs import Space, canonical_action, is_discrete, width

__all__ = ["ProbabilisticEnsemble"]


class ProbabilisticEnsemble(Model):
    """An ensemble of networks that each predict a mixture of Gaussians (arXiv 1805.12114).

    Members disagree where the data does not determine the dynamics: see :meth:`uncertainty`.

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
            (mean [*B, K, D], std [*B, K, D]), weights [*B, K], term_prob [*B]``. It gets normalised
            inputs and predicts the normalised target, as set by the options below. Frozen
            parameters stay frozen, and a parameter used twice stays one parameter.
        n_models: ``M``.
        n_modes: ``K``.
        n_particles_per_model: ``P``.
        predict_delta: Whether the networks predict the change of the state.
        normalize_targets: Whether the networks' targets are standardised.
        normalize_inputs: Whether state, context and continuous actions are standardised before
            they reach the networks.
        clip_inputs: Whether standardised inputs are also clipped to the range of the data behind
            the statistics (:class:`~layeredrl_torchrl.nets.Normalizer`); the default is
            ``normalize_inputs``. The distance of an input from that range adds to the predicted
            std, up to the spread of the whole data.
        ema_decay: Predictions come from an exponential moving average of the members' weights
            with this decay, ``None`` for the weights themselves. The average starts with the
            first :meth:`update_average`, which a predictor's ``learn`` calls after each gradient
            step (your own training loop must do so too).
        **keys: ``in_keys`` and ``out_keys`` of :class:`~layeredrl_torchrl.Model`.

    Once there is an average, :meth:`predict` sends no gradient to the trained weights; the losses
    use :meth:`predict_normalized`, which does.

    The statistics are buffers. Only :meth:`fit_statistics` changes them; a predictor's ``learn``
    calls it.

    Raises:
        TypeError, ValueError: As :class:`~layeredrl_torchrl.Model`; a ``partial_net`` whose
            output has another shape, a std that is not positive, or parameters shared with another
            member.
    """

    keeps_frozen = True  # in reset_parameters, which copies the averaged weights

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
        n_action = 0 if is_discrete(self.action_spec) else width(self.action_spec)
        self.scaling = Scaling(
            self.state_dim,
            self.context_dim,
            n_action,
            predict_delta=predict_delta,
            normalize_inputs=normalize_inputs,
            normalize_targets=normalize_targets,
            clip_inputs=clip_inputs,
        )
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
            check_net(member, net, probe, n_modes)
        check_distinct(nets)
        self.members = stack_members(nets, probe)
        self._ignores_context = all(getattr(net, "ignore_context", False) for net in nets)
        if ema_decay is not None:
            self.averaged_members = copy.deepcopy(self.members).requires_grad_(False)
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.long))
        # Whether there is an average yet. Kept outside the buffer, because reading a buffer on a
        # GPU waits for all queued work.
        self._averaging = False
        self._compile_options: CompileOptions | None = None
        self.register_load_state_dict_post_hook(self._note_average)
        self.calibration = Calibration(n_models, self.state_dim)

    # -- prediction -----------------------------------------------------------------------

    def predict_normalized(self, state: Tensor, context: Tensor, action: Tensor) -> MemberOutput:
        """Predict with the weights being trained; mean and std are in units of :meth:`target`."""
        return self.members(*self.scaling.inputs(state, context, action))

    @property
    def predicting_members(self) -> nn.Module:
        """The networks that predict, the averaged ones as soon as there is an average."""
        if self.ema_decay is None or not self._averaging:
            return self.members
        return self.averaged_members

    @property
    def predicting_averages(self) -> bool:
        """See the base class."""
        return self._averaging

    def predict_members(self, state: Tensor, context: Tensor, action: Tensor) -> MemberOutput:
        """Predict with member ``m`` on row block ``m``; for the shapes see the base class."""
        step = self._stepper(rows=state.shape[1], deterministic=False)
        action = step.actions(action)
        columns = action.mT if action.ndim == state.ndim else action
        with full_precision(state.device) if step.stacked else nullcontext():
            (mean, std), weights, term_prob = ensemble_mixture(
                step.parts, StepInputs(state.mT, context.mT, columns, None)
            )
        return (mean.permute(0, 3, 1, 2), std.permute(0, 3, 1, 2)), weights.mT, term_prob

    def reconcile_members(self, mean: Tensor, weights: Tensor) -> Tensor:
        """Correct the members' means by :class:`Calibration`."""
        return self.calibration.reconcile(mean, weights)

    def make_step(self, *, rows: int, deterministic: bool = False) -> Stepper:
        """See the base class.

        Raises:
            ValueError: Built-in members with parameters that are not finite; the message names
                them.
        """
        members = self.predicting_members
        if isinstance(members, StackedProbFCDynamics):
            check_parameters([*members.weights, *members.biases])
        return self._stepper(rows=rows, deterministic=deterministic)

    def _stepper(self, *, rows: int, deterministic: bool) -> EnsembleStepper:
        options = None if torch.is_grad_enabled() else self._compile_options
        parts = self._parts(rows)
        return EnsembleStepper(
            parts,
            self.action_spec,
            self.n_modes,
            deterministic=deterministic,
            options=options,
            # On a CPU, calling compiled code costs as much as a step; more than 5 compile too long.
            n_at_once=5 if parts.target[0].device.type == "cpu" else 1,
        )

    def _parts(self, rows: int) -> StepParts:
        return step_parts(
            self.predicting_members,
            self.scaling,
            self.calibration,
            self.action_spec,
            rows=rows,
            ignores_context=self._ignores_context,
        )

    def floats_per_row(self) -> int:
        """See the base class."""
        members = self.predicting_members
        if not isinstance(members, StackedProbFCDynamics):
            return 0
        widest = max(bias.shape[-1] for bias in members.biases)
        # Compiled members are evaluated together; others one by one if their outputs are large.
        return widest if self._compile_options is None else self.n_models * widest

    def compile(self, *, cudagraphs: bool = False, **options: Any) -> None:
        """Compile the steps of rollouts and plans, instead of ``forward`` as other modules do.

        ``benchmarks/rollout.py`` and ``benchmarks/planning.py`` time the gain. Compiling needs a
        C++ compiler. It takes half a minute in each process at the first rollout, and again at the
        first rollout of another size; that code then serves all sizes (with ``dynamic=False`` each
        size is compiled). Only the built-in members are compiled, and only without gradients. With
        the same seed, compiled code draws other random numbers than uncompiled code.

        Args:
            cudagraphs: On a GPU, capture each rollout (and each ``returns`` of a predictor) as a
                CUDA graph, once for each shape of its inputs, and replay it: the host then launches
                one graph instead of hundreds of kernels. Weights may be changed in place, as
                learning does. Your functions that are captured too (reward, value, bonus) run in
                Python only during the capture. On a CPU this changes nothing.
            **options: Of ``torch.compile``, for example ``dynamic=False``; ``backend="eager"``
                compiles nothing.

        Raises:
            TypeError: Members other than the built-in ones; ``cudagraphs`` that is not a bool.
        """
        if not isinstance(self.members, StackedProbFCDynamics):
            raise TypeError(
                f"compile() is for ensembles of ProbFCDynamics, but the members are "
                f"{type(self.members).__name__}; compile your own networks in partial_net"
            )
        self._graphs = Graphs() if check_flag("cudagraphs", cudagraphs) else None
        if self._graphs is not None and self._graphs.captures:
            # Each shape has its own graph, so it may as well have its own code.
            options = {"dynamic": False} | options
        self._compile_options = CompileOptions(options)

    # -- learning -------------------------------------------------------------------------

    def target(self, state: Tensor, next_state: Tensor) -> Tensor:
        """Return the networks' target for a transition, ``[*B, D]``; see ``predict_delta``."""
        return self.scaling.targets(state, next_state)

    def fit_statistics(
        self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
    ) -> None:
        """Set the statistics of inputs and targets from transitions ``[N, ...]``.

        Raises, Warns: As :meth:`~layeredrl_torchrl.models._scaling.Scaling.fit`; after an error
            nothing is changed.
        """
        self.scaling.fit(state, context, action, next_state)

    @torch.no_grad()
    def calibrate(self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor) -> None:
        """Fit :class:`Calibration` to transitions ``[N, ...]`` that were not trained on.

        Raises:
            ValueError: As :meth:`fit_statistics`.
        """
        if is_discrete(self.action_spec):
            action = canonical_action(self.action_spec, action, state.shape[:1])
        self.scaling.check(state, context, action, next_state)
        rows = (x.expand(self.n_models, *x.shape) for x in (state, context, action))
        (mean, std), weights, _ = self.predicting_members(*self.scaling.inputs(*rows))
        self.calibration.fit(mean, std, weights, self.target(state, next_state))

    def reset_parameters(self) -> None:
        """Draw new weights, drop average and calibration; keep statistics and frozen weights.

        Your own members are reset by the ``reset_parameters`` of their parts.
        """
        draw_anew(nn.ModuleList([self.members]))
        if self.ema_decay is not None:
            self.averaged_members.load_state_dict(self.members.state_dict())
        self.n_averaged.zero_()
        self._averaging = False
        self.calibration.reset_parameters()

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the averaged weights towards the trained ones; call after a gradient step.

        The decay is ``min(ema_decay, (1 + t) / (10 + t))`` at update ``t``, so that a young
        average forgets its untrained start.
        """
        if self.ema_decay is None or next(self.members.parameters(), None) is None:
            return
        t = self.n_averaged.double()
        share = 1.0 - torch.clamp((1 + t) / (10 + t), max=self.ema_decay)
        move_towards(self.averaged_members, self.members, share)
        self.n_averaged += 1
        self._averaging = True

    def _note_average(self, *_: Any) -> None:
        self._averaging = bool(self.n_averaged > 0)

    def _probe_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        action = self.action_spec.zero((2,))
        if not is_discrete(self.action_spec):
            action = action.to(torch.get_default_dtype())
        generator = torch.Generator().manual_seed(0)
        state = torch.randn(2, self.state_dim, generator=generator)
        return state, torch.randn(2, self.context_dim, generator=generator), action
