"""The planner: a predictor and an optimizer as a TorchRL policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor, nn
from torchrl.data import Composite, OneHot, TensorSpec
from torchrl.envs import TensorDictPrimer
from torchrl.modules.planners.common import MPCPlannerBase

from layeredrl_torchrl.imagination import PredictorEnv
from layeredrl_torchrl.models import Propagation
from layeredrl_torchrl.optimizers import Optimizer, Solution
from layeredrl_torchrl.planners.proposals import Proposal
from layeredrl_torchrl.planners.return_modes import ReturnMode, best_plan, find_return_mode
from layeredrl_torchrl.planners.risk import Mean, RiskMeasure
from layeredrl_torchrl.predictors import Predictor
from layeredrl_torchrl.specs import Space, is_discrete, width

__all__ = ["PredictorPlanner"]


class PredictorPlanner(MPCPlannerBase):
    """Plans in what a predictor imagines and acts as the plan begins.

    Reads the observation ``[*B, obs]``, encodes it once, searches for the action sequence of the
    highest imagined return, and writes its first action. Where the next search starts from is
    handed on in the TensorDict, as the state of an RNN is in TorchRL: the optimizer's memory is
    read below ``plan_key`` and written below ``("next", plan_key)``, one step on. The environment
    needs the transform :meth:`make_tensordict_primer`, which also clears the memory of instances
    that are reset; collectors append it by themselves (``auto_register_policy_transforms=True``).
    The memory is in the collected data, too: leave it out of the replay buffer with
    ``data.exclude(plan_key, ("next", plan_key))``.

    The parameters stay where and as they are: no gradients are kept, training mode and device are
    left alone, randomness follows ``torch.manual_seed``, precision ``torch.autocast``.

    >>> factory = PredictorFactory(hidden_sizes=(8,), n_models=2)
    >>> predictor = factory(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))
    >>> optimizer = CEM(make_search(Bounded(-1.0, 1.0, (1,))), horizon=5)
    >>> planner = PredictorPlanner(predictor, optimizer, return_mode=best_plan)
    >>> td = TensorDict({"observation": torch.zeros(7, 3), "planner": optimizer.forget([7])}, [7])
    >>> planner(td)["action"].shape
    torch.Size([7, 1])

    Args:
        predictor: What is imagined; needs a reward function.
        optimizer: What searches; its search has to fit the action spec.
        action_spec: Spec (or gymnasium space) of one environment's action; the predictor's by
            default.
        return_mode: Which sequence is the plan: :func:`~layeredrl_torchrl.best_plan`,
            :func:`~layeredrl_torchrl.mean_plan`, :func:`~layeredrl_torchrl.random_plan`, another
            function of the optimizer's solution, or LayeredRL's names ``"best"``, ``"mean"``,
            ``"random"``.
        discount: Discount of a step, in ``(0, 1]``.
        use_value_func: Whether the value of the last state counts.
        use_term_prob: Whether rewards count only as far as an episode has probably not ended.
        exploration_bonus: ``(state, context, action) -> [*B]``, added to the rewards.
        risk: How the returns of members and particles become one score.
        propagation: How uncertainty spreads over steps: :class:`~layeredrl_torchrl.TSInfinity`
            (the default), :class:`~layeredrl_torchrl.TS1` or
            :class:`~layeredrl_torchrl.Expectation`.
        deterministic: Whether members are followed in their mean instead of sampled.
        callback: Called with the imagined trajectories of every plan, as ``predictor.rollout``
            gives them; they are computed only for it, and the actions are the same with it.
        proposal: ``(state [*B, D], context [*B, C], horizon) -> [*B, any, H, A]``: action sequences
            that every search also tries, for example
            :class:`~layeredrl_torchrl.PolicyProposal`; for continuous actions.
        action_key: Key of the action; the predictor's by default.
        plan_key: Key of the optimizer's memory.

    Raises:
        TypeError: Parts of another kind. ValueError: A predictor without reward function, or
            without value function where one is used; an optimizer for other actions; a discount
            outside ``(0, 1]``; an unknown return mode. When called: KeyError without the
            observation or the memory; ValueError for an imagined return that is not finite.
    """

    def __init__(
        self,
        predictor: Predictor,
        optimizer: Optimizer,
        *,
        action_spec: TensorSpec | Space | None = None,
        return_mode: ReturnMode | str = best_plan,
        discount: float = 1.0,
        use_value_func: bool = False,
        use_term_prob: bool = True,
        exploration_bonus: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        risk: RiskMeasure | None = None,
        propagation: Propagation | None = None,
        deterministic: bool = False,
        callback: Callable[[TensorDictBase], object] | None = None,
        proposal: Proposal | None = None,
        action_key: NestedKey | None = None,
        plan_key: NestedKey = "planner",
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be an Optimizer, got {type(optimizer).__name__}")
        if use_value_func and predictor.terminal_value is None:
            raise ValueError("use_value_func=True needs a predictor with a val_func, got None")
        if not 0.0 < discount <= 1.0:
            raise ValueError(f"discount must lie in (0, 1], got {discount}")
        if risk is not None and not callable(risk):
            raise TypeError(f"risk must be a RiskMeasure like Mean() or CVaR(0.2), got {risk!r}")
        if proposal is not None and not callable(proposal):
            raise TypeError(f"proposal must be callable, got {type(proposal).__name__}")
        if proposal is not None and is_discrete(predictor.model.action_spec):
            raise ValueError(
                f"proposal is for continuous actions, not for {predictor.model.action_spec}; leave "
                "it out"
            )
        env = PredictorEnv(predictor, action_spec)
        action_key = predictor.model.in_keys[2] if action_key is None else action_key
        super().__init__(env, action_key)
        # The base registers the environment twice, and a state dict would hold it twice.
        del self._modules["env"]
        event = () if is_discrete(self.action_spec) else tuple(self.action_spec.shape)
        if optimizer.search.event_shape != event:
            raise ValueError(
                f"the optimizer searches steps of shape {optimizer.search.event_shape}, but the "
                f"actions are {self.action_spec}; build it with make_search(action_spec)"
            )
        self.optimizer = optimizer
        self.return_mode = find_return_mode(return_mode)
        self.discount = discount
        self.use_value_func = use_value_func
        self.use_term_prob = use_term_prob
        self.exploration_bonus = exploration_bonus
        self.risk = Mean() if risk is None else risk
        self.propagation = propagation
        self.deterministic = deterministic
        self.callback = callback
        self.proposal = proposal
        self.action_key = unravel_key(action_key)
        self.plan_key = unravel_key(plan_key)
        below = plan_key if isinstance(plan_key, tuple) else (plan_key,)
        entries = [(*below, entry) for entry in optimizer.memory_spec.keys()]
        self.in_keys = [*predictor.encoder.in_keys, *entries]
        self.out_keys = [self.action_key, *(("next", *entry) for entry in entries)]

    @property
    def env(self) -> PredictorEnv:
        """The predictor as an environment."""
        return self.module

    @property
    def predictor(self) -> Predictor:
        """The predictor that is planned in."""
        return self.env.predictor

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform that carries the memory from step to step and clears it at resets."""
        return TensorDictPrimer(
            Composite({self.plan_key: self.optimizer.memory_spec}), expand_specs=True
        )

    def forward(
        self,
        tensordict: TensorDictBase,
        tensordict_out: TensorDictBase | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Write the first action of a plan, and the memory for the next one, for ``[*B]``."""
        if kwargs:
            raise TypeError(f"a planner takes no further arguments, got {sorted(kwargs)}")
        actions, solution = self.plan(tensordict)
        out = tensordict if tensordict_out is None else tensordict_out
        out.set(self.action_key, self._first(actions, solution))
        out.set(unravel_key(("next", self.plan_key)), self.optimizer.shift(solution.memory))
        return out

    def planning(self, td: TensorDictBase) -> Tensor:
        """The first actions ``[*B, A]`` of plans; nothing is written."""
        actions, solution = self.plan(td)
        return self._first(actions, solution)

    @torch.no_grad()
    def plan(
        self, tensordict: TensorDictBase, noise: Tensor | None = None
    ) -> tuple[Tensor, Solution]:
        """Plan for a TensorDict ``[*B]``; nothing is written.

        Args:
            tensordict: Holds the observation and the memory.
            noise: As ``optimizer.draw_noise`` gives it; drawn by default.

        Returns:
            Actions ``[*B, H, A]``, or discrete as the action spec says, and what the optimizer
            found.
        """
        obs, memory = self._read(tensordict)
        state, context = self.predictor.encode(obs)
        batch = state.shape[:-1]
        memory = TensorDict({key: memory.get(key) for key in memory.keys()}, batch)

        def cost(candidates: Tensor) -> Tensor:
            shape = (*batch, candidates.shape[len(batch)], -1)
            starts = state.unsqueeze(-2).expand(shape), context.unsqueeze(-2).expand(shape)
            return -self._score(*starts, self._form(candidates))

        proposals = None
        if self.proposal is not None:
            proposals = self.proposal(state, context, self.optimizer.horizon)
        solution = self.optimizer.optimize(cost, memory, noise, proposals)
        actions = self._form(self.return_mode(solution))
        if self.callback is not None:
            # What is drawn for the callback must not change what is drawn afterwards.
            devices = [state.device] if state.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                self.callback(
                    self.predictor.rollout(
                        obs, actions, self.deterministic, propagation=self.propagation
                    )
                )
        return actions, solution

    def _score(self, state: Tensor, context: Tensor, actions: Tensor) -> Tensor:
        """Scores ``[*B]`` of action sequences ``[*B, H, A]``."""
        returns = self.predictor.returns(
            state,
            context,
            actions,
            discount=self.discount,
            use_value_func=self.use_value_func,
            use_term_prob=self.use_term_prob,
            exploration_bonus=self.exploration_bonus,
            propagation=self.propagation,
            deterministic=self.deterministic,
        )
        return self.risk(returns)

    def _first(self, actions: Tensor, solution: Solution) -> Tensor:
        return self.action_spec.project(actions.select(solution.memory.ndim, 0))

    def _form(self, candidates: Tensor) -> Tensor:
        """Candidates of the optimizer in the form of the action spec."""
        if isinstance(self.action_spec, OneHot):
            one_hot = nn.functional.one_hot(candidates, width(self.action_spec))
            return one_hot.to(self.action_spec.dtype)
        return candidates.to(self.action_spec.dtype)

    def _read(self, tensordict: TensorDictBase) -> tuple[Tensor, TensorDictBase]:
        obs_key = self.in_keys[0]
        obs, memory = tensordict.get(obs_key, None), tensordict.get(self.plan_key, None)
        if obs is None:
            raise KeyError(
                f"the planner reads the observation {obs_key!r}, which is missing; the TensorDict "
                f"has {sorted(map(str, tensordict.keys(True, True)))}"
            )
        if not isinstance(memory, TensorDictBase):
            raise KeyError(
                f"the planner's memory {self.plan_key!r} is missing; append its "
                "make_tensordict_primer() to the environment (collectors do so with "
                "auto_register_policy_transforms=True), or set it to optimizer.forget(batch_size) "
                "where there is no environment"
            )
        return obs, memory
