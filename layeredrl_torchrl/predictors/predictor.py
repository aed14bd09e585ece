"""The base of predictors: encoder, dynamics, reward and value function in one module."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.record.loggers import Logger

from layeredrl_torchrl._dispatch import dispatched
from layeredrl_torchrl._state import WholeState, draw_anew
from layeredrl_torchrl._watch import watched
from layeredrl_torchrl.models import Model, Propagation
from layeredrl_torchrl.nets import (
    Encoder,
    ScalarHead,
    StepFunction,
    check_step_function,
    needs_next_state,
)
from layeredrl_torchrl.predictors._functions import StepFunctions, checked, value_of_state
from layeredrl_torchrl.predictors.returns import ReturnOptions, imagined_returns

__all__ = ["Predictor"]


class Predictor(WholeState):
    """Bundles what planning needs to know about a task.

    Called with a TensorDict that holds observation and action, it writes state and context and
    then everything :meth:`step` writes. It has the methods of TorchRL's ``WorldModel``
    (:meth:`encode`, :meth:`step`, :attr:`step_module`).

    ``name`` is its name in logs: the name of its class unless you set another.

    >>> factory = PredictorFactory(hidden_sizes=(8,), n_models=2)
    >>> predictor = factory(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))
    >>> td = TensorDict({"observation": torch.zeros(7, 3), "action": torch.zeros(7, 1)}, [7])
    >>> predictor(td)["next", "reward"].shape
    torch.Size([7, 1])

    Args:
        model: The dynamics and termination model.
        val_func: ``(state, context, action) -> [*B]``, a module or a plain callable, or ``None``. A
            value function ignores the action, an action-value function reads it. Where no action is
            chosen yet, as in the last state of a plan, the action is ``None``, and an action-value
            function raises an error.
        rew_func: ``(state, context, action) -> [*B]``, likewise; it may also read the next state
            (:func:`~layeredrl_torchrl.reads_next_state`).
        encoder: Maps the observation to state and context.
        latent_state_dim: ``D``; encoder and model must have the same.
        context_dim: ``C``, likewise.
        term_func: A known termination: whether a step ends the episode, ``[*B]``, bool or a
            probability, with arguments like those of ``rew_func``. It replaces the model's
            probability of termination in all results of the predictor. ``None`` to use the model's.

    A function that reads the next state gets that of each particle in :meth:`rollout`, in
    :meth:`returns` and in an imagined environment. In single steps (:meth:`predict`, :meth:`step`)
    it is evaluated at the mean of each member and mode, and averaged with their weights.

    Raises:
        TypeError: Parts of another kind. ValueError: Parts whose dimensions do not fit; a
            ``val_func`` that reads the next state. When called, TypeError for a ``val_func`` that
            reads the action where there is none; ValueError for a function whose
            values have another shape or are not finite, and for a probability outside [0, 1].
    """

    def __init__(
        self,
        model: Model,
        val_func: StepFunction | None,
        rew_func: StepFunction | None,
        encoder: Encoder,
        latent_state_dim: int,
        context_dim: int = 0,
        *,
        term_func: StepFunction | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, Model):
            raise TypeError(f"model must be a layeredrl_torchrl Model, got {type(model).__name__}")
        if not isinstance(encoder, Encoder):
            raise TypeError(
                f"encoder must be a layeredrl_torchrl Encoder, got {type(encoder).__name__}; "
                "subclass Encoder and implement split(observation)"
            )
        check_step_function("val_func", val_func, may_look_ahead=False)
        check_step_function("rew_func", rew_func)
        check_step_function("term_func", term_func)
        for name, given, of_encoder, of_model in (
            ("latent_state_dim", latent_state_dim, encoder.latent_state_dim, model.state_dim),
            ("context_dim", context_dim, encoder.context_dim, model.context_dim),
        ):
            if not given == of_encoder == of_model:
                raise ValueError(
                    f"{name} is {given}, but the encoder has {of_encoder} and the model "
                    f"{of_model}; the three must be equal"
                )
        self.model = model
        self.val_func = val_func
        self.rew_func = rew_func
        self.term_func = term_func
        self.encoder = encoder
        self.latent_state_dim = latent_state_dim
        self.context_dim = context_dim
        self.name = type(self).__name__
        state, context, action = model.in_keys
        if list(encoder.out_keys) != [state, context]:
            raise ValueError(
                f"the encoder writes {encoder.out_keys}, but the model reads {[state, context]}; "
                "rename with out_keys= or in_keys="
            )
        self.in_keys = [*encoder.in_keys, action]
        self.out_keys = [*encoder.out_keys, *self._step_keys()]

    @abstractmethod
    def learn(
        self,
        buffer: ReplayBuffer,
        n_updates: int,
        batch_size: int,
        model_batch_size: int,
        n_total_env_steps: int,
        *,
        logger: Logger | None = None,
        progress: bool = False,
    ) -> tuple[Tensor, dict[str, float]]:
        """Learn from a replay buffer of one-step transitions in the collectors' layout.

        Args:
            buffer: A TorchRL replay buffer on a storage of tensors, with uniform sampling; it is
                not changed.
            n_updates: Number of gradient steps.
            batch_size: Slices in a batch for reward, value and encoder.
            model_batch_size: Transitions in a batch for the dynamics model.
            n_total_env_steps: Environment steps taken so far, for learning-rate schedules and as
                the step in logs.
            logger: Gets every term as the scalar ``"<name>/<term>"``.
            progress: Whether a bar on stderr counts the updates and shows the terms.

        Returns:
            The total loss and its terms, averaged over the updates.
        """

    # -- with tensors, or with a TensorDict ------------------------------------------------

    def encode(self, obs: Tensor | TensorDictBase) -> Any:
        """Return state ``[*B, D]`` and context ``[*B, C]`` of observations ``[*B, obs]``.

        With a TensorDict: writes both to it and returns it.
        """
        return self.encoder(obs)

    def decode(self, state: Tensor | TensorDictBase, context: Tensor | None = None) -> Any:
        """Return the observations ``[*B, obs]`` of states ``[*B, D]`` and contexts ``[*B, C]``.

        With a TensorDict: writes the observation, each entry under its key, and returns it.

        Raises:
            ValueError: An encoder without an inverse (:meth:`Encoder.merge`).
        """
        if isinstance(state, TensorDictBase):
            found = state.get(self.encoder.out_keys[0])
            held = state.get(self.encoder.out_keys[1], found[..., :0])
            return state.update(self.encoder.decode(found, held))
        return self.encoder.merge(state, state[..., :0] if context is None else context)

    def state_of(self, obs: Tensor | TensorDictBase) -> tuple[Tensor, Tensor]:
        """Return state ``[*B, D]`` and context ``[*B, C]``; a TensorDict is only read."""
        joined = self.encoder.join(obs) if isinstance(obs, TensorDictBase) else obs
        state, context = self.encoder(joined)
        return state, context

    def predict(
        self, obs: Tensor | TensorDictBase, act: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Predict one step from observations ``[*B, obs]`` and actions ``[*B, A]``.

        Here and below, observations may be a TensorDict ``[*B]`` with the entries that the encoder
        reads.

        Returns:
            ``s_next_mean [*B, M, K, D], weights [*B, M, K], s_next_std [*B, M, K, D],
            reward [*B], term_prob [*B]``; for the last two see the class.
        """
        state, context = self.state_of(obs)
        mean, weights, std, term_prob = self.model.predict(state, context, act)
        taken = state, context, self.model.action_form(act, state.shape[:-1])
        self.need("rew_func")
        reward = self._functions.mean_reward(taken, mean, weights)
        term_prob = self._functions.mean_term_prob(taken, mean, weights, term_prob)
        return mean, weights, std, reward, term_prob

    def predict_reward(self, obs: Tensor | TensorDictBase, act: Tensor) -> Tensor:
        """Return the reward ``[*B]`` of taking ``act`` at ``obs [*B, obs]``."""
        state, context = self.state_of(obs)
        taken = state, context, self.model.action_form(act, state.shape[:-1])
        if not needs_next_state(self.need("rew_func")):
            return self._functions.reward_of(taken, state)
        mean, weights, _, _ = self.model.predict(state, context, act)
        return self._functions.mean_reward(taken, mean, weights)

    def value(self, obs: Tensor | TensorDictBase, act: Tensor | None = None) -> Tensor:
        """Return the value ``[*B]`` of ``obs [*B, obs]``; an action-value needs ``act``."""
        state, context = self.state_of(obs)
        func = self.need("val_func")
        if act is None:
            value = value_of_state(func, state, context)
        else:
            value = func(state, context, self.model.action_form(act, state.shape[:-1]))
        return checked("val_func", value, state.shape[:-1])

    @property
    def n_steps_needed(self) -> int:
        """Consecutive steps that one update of :meth:`learn` reads, and a buffer needs."""
        return 1

    @property
    def terminal_value(self) -> StepFunction | None:
        """The value function at the end of plans; a subclass may return a steadier one."""
        return self.val_func

    # -- of steps that have been made --------------------------------------------------------

    def reward_of(
        self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
    ) -> Tensor:
        """Return the reward ``[*B]`` of steps that led to ``next_state [*B, D]``, with gradients.

        Args:
            state: ``[*B, D]``.
            context: ``[*B, C]``.
            action: ``[*B, *]``, in the form of the action spec.
            next_state: ``[*B, D]``, imagined or real.
        """
        self.need("rew_func")
        return self._functions.reward_of((state, context, action), next_state)

    def term_prob_of(
        self,
        state: Tensor,
        context: Tensor,
        action: Tensor,
        next_state: Tensor,
        predicted: Tensor,
    ) -> Tensor:
        """Return the probability ``[*B]`` that steps end the episode, by ``term_func`` if given.

        Args:
            state: ``[*B, D]``.
            context: ``[*B, C]``.
            action: As :meth:`reward_of`.
            next_state: Likewise.
            predicted: ``[*B]``, the model's prediction.
        """
        taken = state, context, action
        return self._functions.term_prob_of(taken, next_state, predicted)

    @property
    def _functions(self) -> StepFunctions:
        return StepFunctions(self.rew_func, self.val_func, self.term_func)

    # -- rollouts ----------------------------------------------------------------------------

    def rollout(
        self,
        obs: Tensor | TensorDictBase,
        act: Tensor,
        deterministic: bool = False,
        *,
        propagation: Propagation | None = None,
    ) -> TensorDict:
        """Roll out ``act [*B, H, A]`` from ``obs [*B, obs]``.

        Returns:
            As ``Model.rollout``, with ``("next", "reward") [*B, M, P, H, 1]`` if there is a reward
            function.
        """
        state, context = self.state_of(obs)
        traj = self.model.rollout(state, context, act, deterministic, propagation=propagation)
        state, context, action = (traj.get(key) for key in self.model.in_keys)
        next_state = traj.get(unravel_key(("next", self.model.in_keys[0])))
        if self.rew_func is not None:
            reward = self.reward_of(state, context, action, next_state)
            traj.set(("next", "reward"), reward.unsqueeze(-1))
        if self.term_func is not None:
            key = self.model.out_keys[3]
            ends = self.term_prob_of(state, context, action, next_state, traj.get(key).squeeze(-1))
            traj.set(key, ends.unsqueeze(-1))
        return traj

    @watched
    def returns(
        self,
        state: Tensor,
        context: Tensor | None,
        actions: Tensor,
        options: ReturnOptions | None = None,
        **changes: Any,
    ) -> Tensor:
        """Compute the return of each imagined particle, in memory that does not grow with ``H``.

        ``sum_h c_h * r_h + c_H * V(s_H)`` with ``c_0 = 1`` and
        ``c_{h+1} = c_h * discount * (1 - p_h)``: rewards are weighted by the probability of
        survival.

        Args:
            state: ``[*B, D]``.
            context: ``[*B, C]`` or ``None``.
            actions: ``[*B, H, A]`` or discrete.
            options: What counts in a return; all defaults if ``None``.
            **changes: Options of :class:`~layeredrl_torchrl.predictors.ReturnOptions` that replace
                those of ``options``.

        Returns:
            ``[*B, M, P]`` (``[*B, 1, 1]`` with ``Expectation``), in reward units.

        Raises:
            ValueError: No reward or value function; returns that are not finite (the message
                names the members); and as ``Model.rollout``.
        """
        options = replace(ReturnOptions() if options is None else options, **changes)
        return imagined_returns(
            self.model,
            StepFunctions(
                self.need("rew_func"),
                self.need("terminal_value") if options.use_value_func else None,
                self.term_func,
            ),
            state,
            context,
            actions,
            options,
        )

    def compile(self, *, cudagraphs: bool = False, **options: Any) -> None:
        """Compile imagined steps and their reward and value, not ``forward`` as other modules do.

        Reward and value are compiled if they are heads of this package
        (:class:`~layeredrl_torchrl.ScalarHead`). Calls with gradients are not compiled.

        Args:
            cudagraphs: On a GPU, capture :meth:`returns`, and the model's rollouts, as CUDA graphs;
                see :meth:`ProbabilisticEnsemble.compile`.
            **options: Of ``torch.compile``.

        Raises:
            TypeError: A model that cannot be compiled.
        """
        self.model.compile(cudagraphs=cudagraphs, **options)
        # The value at the end of plans may be a different module than the one being trained.
        for head in (self.rew_func, self.val_func, self.terminal_value):
            if isinstance(head, ScalarHead):
                head.compile(**({"fullgraph": True} | options))

    # -- as TorchRL's WorldModel ------------------------------------------------------------

    def step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Take one imagined step from a TensorDict ``[*B]`` that holds state, context and action.

        Writes what the model writes (with the expected next state), and under ``"next"``: the
        context, ``reward [*B, 1]``, and ``terminated`` and ``done [*B, 1]``, true where the
        termination probability exceeds 1/2.
        """
        self.model(tensordict)
        state_key, context_key, action_key = self.model.in_keys
        state, action = tensordict.get(state_key), tensordict.get(action_key)
        context = tensordict.get(context_key, None)
        if context is None:
            context = state[..., :0]
        loc_key, weights_key, _, term_key, _ = self.model.out_keys
        mean, weights = tensordict.get(loc_key), tensordict.get(weights_key)
        taken = state, context, self.model.action_form(action, state.shape[:-1])
        if self.rew_func is not None:
            reward = self._functions.mean_reward(taken, mean, weights)
            tensordict.set(("next", "reward"), reward.unsqueeze(-1))
        if self.term_func is not None:
            predicted = tensordict.get(term_key).squeeze(-1)
            ends = self._functions.mean_term_prob(taken, mean, weights, predicted)
            tensordict.set(term_key, ends.unsqueeze(-1))
        terminated = tensordict.get(term_key) > 0.5
        tensordict.set(("next", context_key), context)
        tensordict.set(("next", "terminated"), terminated)
        tensordict.set(("next", "done"), terminated.clone())
        return tensordict

    @property
    def step_module(self) -> TensorDictModuleBase:
        """:meth:`step` as a module, for code that rolls out a world model in state space."""
        return _Step(self)

    @dispatched
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Encode the observation and take one imagined step."""
        return self.step(self.encode(tensordict))

    # -- state ------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Draw new weights for all parts but frozen ones."""
        draw_anew(self)

    def _step_keys(self) -> list[Any]:
        keys = [*self.model.out_keys, ("next", self.model.in_keys[1])]
        if self.rew_func is not None:
            keys.append(("next", "reward"))
        return [*keys, ("next", "terminated"), ("next", "done")]

    def need(self, name: str) -> StepFunction:
        """Return the part called ``name``; raise ``ValueError`` if the predictor has none."""
        func: StepFunction | None = getattr(self, name)
        if func is None:
            raise ValueError(f"this predictor was built with {name}=None; give it one")
        return func


class _Step(TensorDictModuleBase):
    """:meth:`Predictor.step` as a TensorDictModule that shares the predictor's parameters."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.predictor = predictor
        self.in_keys = list(predictor.model.in_keys)
        self.out_keys = predictor._step_keys()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self.predictor.step(tensordict)
