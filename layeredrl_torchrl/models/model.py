"""The base class of dynamics models: it builds on the predictions of each member."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn

from layeredrl_torchrl._checks import check_finite, check_positive_int, check_width
from layeredrl_torchrl._dispatch import dispatched
from layeredrl_torchrl._graphs import Graphs
from layeredrl_torchrl._state import WholeState
from layeredrl_torchrl._watch import refuse, watched
from layeredrl_torchrl.models._inputs import InputRows, Rows
from layeredrl_torchrl.models._log_prob import NO_DENSITY, mixture_log_prob
from layeredrl_torchrl.models._output_checks import check_output
from layeredrl_torchrl.models._rollouts import lay_out, trajectory, uncertainty
from layeredrl_torchrl.models._stepping import MixtureStepper, Stepper
from layeredrl_torchrl.models.mixture import GaussianMixture
from layeredrl_torchrl.models.propagation import Propagation, TSInfinity, propagation_key
from layeredrl_torchrl.nets import MemberOutput
from layeredrl_torchrl.specs import ActionForm, Space, is_discrete, to_spec, width

__all__ = ["Model"]

_IN_KEYS: tuple[NestedKey, ...] = ("state", "context", "action")
_OUT_KEYS: tuple[NestedKey, ...] = (
    ("next", "loc"),
    ("next", "weights"),
    ("next", "scale"),
    ("next", "term_prob"),
    ("next", "state"),
)


class Model(WholeState):
    """A dynamics model: ``M`` members, each a mixture of ``K`` Gaussians over the next state.

    A subclass implements :meth:`predict_members`. The std it returns may be 0.

    Called with a TensorDict, it reads ``in_keys`` (state, context, action; a missing context
    counts as empty) and writes ``out_keys``: loc, weights, scale, term_prob and the expected
    next state.

    >>> class Still(Model):
    ...     def predict_members(self, state, context, action):
    ...         mean = state.unsqueeze(-2)
    ...         return (mean, 0 * mean), 0 * mean[..., 0] + 1, 0 * state[..., 0]
    >>> Still(*[Unbounded((1,))] * 3).rollout(*torch.zeros(2, 7, 1), torch.zeros(7, 5, 1)).shape
    torch.Size([7, 1, 1, 5])

    Args:
        state_space: Box of the ``D`` state dimensions.
        context_space: Box of the ``C`` context dimensions, or ``None`` for none.
        action_space: Box or Discrete.
        n_models: ``M``.
        n_modes: ``K``.
        n_particles_per_model: ``P``, the particles each member propagates in a rollout.
        in_keys: Keys of state, context and action.
        out_keys: Keys written when called with a TensorDict, in the order above.

    Raises:
        TypeError, ValueError: As :func:`~layeredrl_torchrl.specs.to_spec`; counts below 1.
    """

    def __init__(
        self,
        state_space: Space,
        context_space: Space | None,
        action_space: Space,
        *,
        n_models: int = 1,
        n_modes: int = 1,
        n_particles_per_model: int = 1,
        in_keys: Sequence[NestedKey] = _IN_KEYS,
        out_keys: Sequence[NestedKey] = _OUT_KEYS,
    ) -> None:
        super().__init__()
        self.n_models = check_positive_int("n_models", n_models)
        self.n_modes = check_positive_int("n_modes", n_modes)
        self.n_particles_per_model = check_positive_int(
            "n_particles_per_model", n_particles_per_model
        )
        self.state_spec = to_spec(state_space, name="state_space")
        self.context_spec = to_spec(context_space, name="context_space")
        self.action_spec = to_spec(action_space, name="action_space")
        for name, spec in (("state_space", self.state_spec), ("context_space", self.context_spec)):
            if is_discrete(spec):
                raise TypeError(f"{name} is discrete ({spec}); expected a Box or a continuous spec")
        self.action_form = ActionForm(self.action_spec)
        self.state_dim = width(self.state_spec)
        self.context_dim = width(self.context_spec)
        if self.state_dim == 0:
            raise ValueError("state_space has no dimension; give at least one")
        self._input_rows = InputRows(self.state_dim, self.context_dim, self.action_form)
        if len(in_keys) != len(_IN_KEYS) or len(out_keys) != len(_OUT_KEYS):
            raise ValueError(
                f"expected {len(_IN_KEYS)} in_keys like {list(_IN_KEYS)} and {len(_OUT_KEYS)} "
                f"out_keys like {list(_OUT_KEYS)}, got {list(in_keys)} and {list(out_keys)}"
            )
        self.in_keys = list(in_keys)
        self.out_keys = list(out_keys)
        self._graphs: Graphs | None = None
        # Keeps the dtype and device of a model that has no parameters.
        self.register_buffer("_floats", torch.empty(0), persistent=False)

    # -- for subclasses -------------------------------------------------------------------

    @abstractmethod
    def predict_members(self, state: Tensor, context: Tensor, action: Tensor) -> MemberOutput:
        """Predict with member ``m`` on row block ``m``.

        Args:
            state: ``[M, N, D]``.
            context: ``[M, N, C]``.
            action: ``[M, N, A]``, or discrete in the form of the action spec.

        Returns:
            ``(mean [M, N, K, D], std [M, N, K, D]), weights [M, N, K], term_prob [M, N]``: mean
            and std of the next state itself.
        """

    def reconcile_members(self, mean: Tensor, weights: Tensor) -> Tensor:
        """Correct the members' means where all members predict the same rows.

        A hook that :meth:`predict` calls; by default the means stay as they are. Rollouts do not
        call it: there each member predicts the rows of its own particles.

        Args:
            mean: ``[M, N, K, D]``.
            weights: ``[M, N, K]``.
        """
        return mean

    # -- predictions ----------------------------------------------------------------------

    @watched
    def predict(
        self, state: Tensor, context: Tensor | None, action: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predict the mixture over the next state.

        Args:
            state: ``[*B, D]``.
            context: ``[*B, C]``; ``None`` where ``C`` is 0.
            action: ``[*B, A]``, or discrete as :func:`~layeredrl_torchrl.specs.canonical_action`.

        Returns:
            ``s_next_mean [*B, M, K, D], weights [*B, M, K], s_next_std [*B, M, K, D],
            term_prob [*B]`` (averaged over members).

        Raises:
            TypeError, ValueError: Inputs of another shape or kind, NaN, actions outside their
                space; a member that predicts NaN or a negative std (named in the message).
        """
        batch, flat = self.prepare(state, context, action)
        (mean, std), weights, term_prob = self._predict_flat(*flat)
        mean = self.reconcile_members(mean, weights)
        return (
            mean.movedim(0, 1).reshape(*batch, *mean.shape[:1], *mean.shape[2:]),
            weights.movedim(0, 1).reshape(*batch, self.n_models, self.n_modes),
            std.movedim(0, 1).reshape(*batch, *std.shape[:1], *std.shape[2:]),
            term_prob.mean(0).reshape(batch),
        )

    @dispatched
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the prediction for a TensorDict ``[*B]``; keys in the class docstring."""
        loc, weights, scale, term_prob = self.predict(*self.read(tensordict))
        mean = (weights.unsqueeze(-1) * loc).sum(-2).mean(-2)
        values = (loc, weights, scale, term_prob.unsqueeze(-1), mean)
        for key, value in zip(self.out_keys, values, strict=True):
            tensordict.set(key, value)
        return tensordict

    @watched
    def dist(self, tensordict: TensorDictBase) -> GaussianMixture:
        """Return the mixture of all members, in equal shares, over the next state.

        Args:
            tensordict: ``[*B]`` with the model's ``in_keys``.

        Returns:
            A mixture of ``M * K`` Gaussians, batch shape ``*B``, event shape ``[D]``.

        Raises:
            ValueError: A predicted std of 0, which has no density; and as :meth:`predict`.
        """
        loc, weights, scale, _ = self.predict(*self.read(tensordict))
        refuse(~(scale > 0).all(), lambda _: ValueError(NO_DENSITY))
        return GaussianMixture(
            loc.flatten(-3, -2), scale.flatten(-3, -2), weights.flatten(-2) / self.n_models
        )

    @watched
    def get_log_prob(
        self,
        state: Tensor,
        context: Tensor | None,
        action: Tensor,
        next_state: Tensor,
        std: Tensor | float | None = None,
        transform: Tensor | Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Evaluate the log-density of ``next_state`` under the whole ensemble.

        Args:
            state: ``[*B, D]``.
            context: ``[*B, C]`` or ``None``.
            action: ``[*B, A]`` or discrete.
            next_state: ``[*B, D]``.
            std: Replaces the predicted std: a number or a tensor that broadcasts to ``[D]``.
            transform: A linear map of the state, ``[D', D]`` or a callable on ``[..., D]``,
                applied to the difference of ``next_state`` and mean. Needs ``std``, which then
                refers to the transformed space: after a linear map, the predicted covariance is no
                longer diagonal.

        Returns:
            ``log_prob [*B]`` in nats, ``term_prob [*B]``, and ``{"means": [*B, M, D]}``, each
            member's mean next state.

        Raises:
            ValueError: ``transform`` without ``std``; ``std`` not positive; as :meth:`predict`.
        """
        loc, weights, scale, term_prob = self.predict(state, context, action)
        check_width("next_state", next_state, self.state_dim, hint="give the state after the step")
        if next_state.shape != state.shape:
            raise ValueError(
                f"next_state has shape {tuple(next_state.shape)}, expected that of state, "
                f"{tuple(state.shape)}"
            )
        check_finite("next_state", next_state, hint="repair it first")
        difference = next_state.to(loc.dtype)[..., None, None, :] - loc
        log_prob = mixture_log_prob(difference, weights, scale, std, transform)
        return log_prob, term_prob, {"means": (weights.unsqueeze(-1) * loc).sum(-2)}

    # -- rollouts -------------------------------------------------------------------------

    @watched
    def rollout(
        self,
        initial_state: Tensor,
        context: Tensor | None,
        actions: Tensor,
        deterministic: bool = False,
        *,
        propagation: Propagation | None = None,
    ) -> TensorDict:
        """Roll out action sequences open loop, ``P`` particles in each of ``M`` members.

        Args:
            initial_state: ``[*B, D]``.
            context: ``[*B, C]`` or ``None``; constant over the rollout.
            actions: ``[*B, H, A]``, or discrete ``[*B, H]``, ``[*B, H, 1]``, ``[*B, H, n]``.
            deterministic: Follow each member's mean instead of sampling.
            propagation: Which member moves which particle; :class:`TSInfinity` by default.

        Returns:
            A TensorDict ``[*B, M, P, H]`` (``[*B, 1, 1, H]`` with :class:`Expectation`) laid out
            as a TorchRL rollout: state, context, action, ``("next", state)``,
            ``("next", "term_prob") [..., 1]``. State and next state are views of one tensor;
            context and actions are expanded, not copied.

        Raises:
            ValueError: ``H`` of 0; a state that is not finite (the message names member and step);
                and as :meth:`predict`.
        """
        propagation = TSInfinity() if propagation is None else propagation

        def run(state: Tensor, actions: Tensor, *context: Tensor) -> tuple[Tensor, ...]:
            _, flat = self.prepare_rollout(state, context[0] if context else None, actions)
            states, term = trajectory(
                self.make_step(
                    rows=self._rows(len(flat[0]), propagation),
                    deterministic=deterministic or propagation.deterministic,
                ),
                flat,
                propagation,
                (self.n_models, self.n_particles_per_model),
                self.floats_per_row(),
            )
            return (*flat[1:], states, term)

        name = ("rollout", deterministic, propagation_key(propagation))
        inputs = (initial_state, actions) if context is None else (initial_state, actions, context)
        ctx, acts, states, term = self.run(name, run, inputs)
        batch, term_key = initial_state.shape[:-1], self.out_keys[3]
        return lay_out(batch, self.in_keys, term_key, states, term, ctx, acts)

    def uncertainty(self, traj: TensorDictBase) -> TensorDict:
        """Split the spread of a rollout's particles by the law of total variance.

        Args:
            traj: ``[*B, M, P, H]`` from :meth:`rollout`.

        Returns:
            TensorDict ``[*B, H]`` with ``"mean"``, ``"epistemic_var"`` (variance over members of
            their means) and ``"aleatoric_var"`` (mean over members of the variance of their
            particles), each ``[*B, H, D]``; the two sum to the variance over all particles. With
            one particle per member the aleatoric part is 0; with :class:`TS1` the split is
            meaningless.

        Raises:
            KeyError: ``traj`` has no next states with these axes.
        """
        state = traj.get(("next", self.in_keys[0]), None)
        if state is None or state.ndim < 4:
            raise KeyError(
                f"traj has no {('next', self.in_keys[0])!r} of shape [*B, M, P, H, D]; pass the "
                "result of rollout()"
            )
        return uncertainty(state)

    # -- shared steps ---------------------------------------------------------------------

    def make_step(self, *, rows: int, deterministic: bool = False) -> Stepper:
        """Make the object that steps the members in a rollout.

        A hook for models that can sample faster than through :meth:`predict_members`.

        Args:
            rows: About how many rows each member steps.
            deterministic: Step to the members' means instead of samples of their mixtures.
        """
        return MixtureStepper(self.predict_members, self.n_modes, deterministic=deterministic)

    def floats_per_row(self) -> int:
        """Return how many floats are at most computed at once for a row of each; 0 if unknown.

        On a CPU, rollouts take as many rows at a time as stay in its caches.
        """
        return 0

    def run(
        self,
        name: Hashable,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Tensor, ...],
        modules: Sequence[Any] = (),
    ) -> tuple[Tensor, ...]:
        """Run a function that reads this model, as a CUDA graph after ``compile(cudagraphs=True)``.

        Args:
            name: Identifies the function and everything it depends on, except tensors.
            function: Called with the inputs.
            inputs: Tensors.
            modules: Other modules that the function reads.
        """
        if self._graphs is None or not all(isinstance(x, Tensor) for x in inputs):
            return function(*inputs)
        parts: list[nn.Module] = [self, *(m for m in modules if isinstance(m, nn.Module))]
        reads = [x for part in parts for x in (*part.parameters(), *part.buffers())]
        modes = (self.training, self.predicting_averages)
        return self._graphs.run((name, modes), function, inputs, reads)

    @property
    def predicting_averages(self) -> bool:
        """Whether predictions come from averaged weights; a hook for models that keep averages."""
        return False

    def _rows(self, n: int, propagation: Propagation) -> int:
        """Return how many rows each member steps at once, for ``n`` starts."""
        n_part = propagation.particles(self.n_models, self.n_particles_per_model)[1]
        return n * n_part

    def read(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return state, context and action of a TensorDict.

        Raises:
            KeyError: Entries are missing; the message names them.
        """
        state_key, context_key, action_key = self.in_keys
        found = {key: tensordict.get(key, None) for key in self.in_keys}
        missing = [k for k in (state_key, action_key) if found[k] is None]
        if found[context_key] is None and self.context_dim:
            missing.append(context_key)
        if missing:
            raise KeyError(
                f"{type(self).__name__} reads {self.in_keys}, but {missing} is missing; the "
                f"TensorDict has {sorted(map(str, tensordict.keys(True, True)))}"
            )
        return found[state_key], found[context_key], found[action_key]

    def prepare(self, state: Tensor, context: Tensor | None, action: Tensor) -> Rows:
        """Check inputs ``[*B, ...]`` and flatten them to ``[N, ...]``; returns ``*B`` first."""
        return self._input_rows.of_step(state, context, action, self.floats.dtype)

    def prepare_rollout(self, state: Tensor, context: Tensor | None, actions: Tensor) -> Rows:
        """Check the inputs of :meth:`rollout` and flatten them to ``[N, ...]``.

        Returns:
            ``*B``, and state ``[N, D]``, context ``[N, C]``, actions ``[N, H, *]``.
        """
        return self._input_rows.of_rollout(state, context, actions, self.floats.dtype)

    @property
    def floats(self) -> Tensor:
        """A tensor with the dtype and on the device that the model computes in."""
        return next(self.parameters(), self._floats)

    def _predict_flat(self, state: Tensor, context: Tensor, action: Tensor) -> MemberOutput:
        """Evaluate every member on the same rows ``[N, ...]`` and check its output."""
        out = self.predict_members(
            *(x.expand(self.n_models, *x.shape) for x in (state, context, action))
        )
        check_output(out, (self.n_models, len(state), self.n_modes, self.state_dim))
        return out
