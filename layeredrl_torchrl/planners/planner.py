"""Planners: a predictor and an optimizer as a TorchRL policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor, nn
from torchrl.data import Categorical, Composite, OneHot, TensorSpec
from torchrl.envs import TensorDictPrimer
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules.planners.common import MPCPlannerBase

from layeredrl_torchrl._checks import (
    check_callable,
    check_flag,
    check_instance,
    refuse_mask,
    require,
)
from layeredrl_torchrl._dispatch import dispatched
from layeredrl_torchrl._graphs import Graphs, Same
from layeredrl_torchrl._signatures import passes_on
from layeredrl_torchrl._state import WholeLoading
from layeredrl_torchrl._watch import watched
from layeredrl_torchrl.imagination import PredictorEnv
from layeredrl_torchrl.models import TSInfinity
from layeredrl_torchrl.nets import StackedProbFCDynamics
from layeredrl_torchrl.optimizers import Optimizer, Solution
from layeredrl_torchrl.planners.proposals import Proposal
from layeredrl_torchrl.planners.return_modes import (
    ReturnMode,
    best_plan,
    find_return_mode,
    mean_plan,
)
from layeredrl_torchrl.planners.risk import Mean, score
from layeredrl_torchrl.predictors import Predictor, ReturnOptions
from layeredrl_torchrl.specs import ActionForm, Space, is_discrete, width

__all__ = ["PredictorPlanner"]


class PredictorPlanner(WholeLoading, MPCPlannerBase):
    """Searches for the actions with the highest imagined return, and takes the first one.

    Reads the observation ``[*B, obs]``, encodes it once, searches for an action sequence, and
    writes its first action. The start of the next search is passed on in the TensorDict, like the
    state of an RNN in TorchRL: the planner reads the optimizer's memory from ``plan_key`` and
    writes it, shifted by one step, to ``("next", plan_key)``. The environment needs the transform
    :meth:`make_tensordict_primer`, which also clears the memory of instances that are reset;
    collectors append it automatically (``auto_register_policy_transforms=True``). The memory is
    part of the collected data; leave it out of the replay buffer with
    ``data.exclude(plan_key, ("next", plan_key))``.

    Planning does not change the predictor and computes no gradients. Randomness follows
    ``torch.manual_seed``, precision ``torch.autocast``.

    >>> factory = PredictorFactory(hidden_sizes=(8,), n_models=2)
    >>> predictor = factory(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))
    >>> optimizer = CEM(make_search(Bounded(-1.0, 1.0, (1,))), horizon=5)
    >>> planner = PredictorPlanner(predictor, optimizer, return_mode=best_plan)
    >>> td = TensorDict({"observation": torch.zeros(7, 3)}, [7]).update(planner.forget([7]))
    >>> planner(td)["action"].shape
    torch.Size([7, 1])

    Args:
        predictor: Imagines the outcome of actions; needs a reward function.
        optimizer: Searches for sequences; its search must fit the action spec. It is moved to the
            predictor's device.
        action_spec: Spec (or gymnasium space) of one environment's action; the predictor's by
            default.
        return_mode: Which sequence becomes the plan: :func:`~layeredrl_torchrl.best_plan`,
            :func:`~layeredrl_torchrl.mean_plan`, another function of the optimizer's solution, or
            LayeredRL's names ``"best"``, ``"mean"``, ``"random"``.
        deterministic_mode: Likewise for all exploration types of TorchRL (``set_exploration_type``)
            other than ``RANDOM``, as its ``Evaluator`` uses: :func:`~layeredrl_torchrl.mean_plan`
            by default. The search itself still draws its candidates at random.
        risk: Turns the returns ``[*B, M, P]`` of members and particles into scores ``[*B]``; the
            mean by default.
        proposal: ``(state [*B, D], context [*B, C], horizon) -> [*B, any, H, A]``: action sequences
            that every search also tries, such as :class:`~layeredrl_torchrl.PolicyProposal`; for
            continuous actions only.
        callback: Called with the imagined trajectories of every plan, from ``predictor.rollout``.
            They are computed only for it, and it does not change the actions.
        action_key: Key of the action; the predictor's by default.
        plan_key: Key of the optimizer's memory.
        **scoring: How imagined trajectories are scored: ``discount``, ``use_value_func``,
            ``use_term_prob``, ``exploration_bonus``, ``propagation``, ``deterministic``, all as in
            :class:`~layeredrl_torchrl.predictors.ReturnOptions`.

    Raises:
        TypeError: Parts of another kind, including a class in place of an object. ValueError: A
            predictor without reward function, or without a value function that is used; an
            optimizer for other actions; a risk that does not return one number for each plan;
            numbers outside their range; an unknown return mode. When called: KeyError without the
            observation or the memory; ValueError if their batch sizes differ, for masked actions,
            for a return mode that does not return a sequence, and for an imagined return that is
            not finite.
    """

    module: PredictorEnv

    @passes_on(ReturnOptions)
    def __init__(
        self,
        predictor: Predictor,
        optimizer: Optimizer,
        *,
        action_spec: TensorSpec | Space | None = None,
        return_mode: ReturnMode | str = best_plan,
        deterministic_mode: ReturnMode | str = mean_plan,
        risk: Callable[[Tensor], Tensor] | None = None,
        proposal: Proposal | None = None,
        callback: Callable[[TensorDictBase], object] | None = None,
        action_key: NestedKey | None = None,
        plan_key: NestedKey = "planner",
        **scoring: Any,
    ) -> None:
        check_instance("predictor", predictor, Predictor, hint="of an environment: env.predictor")
        check_instance("optimizer", optimizer, Optimizer, hint="such as ICEM(make_search(spec))")
        check_callable("risk", risk, optional=True)
        check_callable("proposal", proposal, optional=True)
        check_callable("callback", callback, optional=True)
        options = ReturnOptions(**scoring)
        if options.use_value_func and predictor.terminal_value is None:
            raise ValueError("use_value_func=True needs a predictor with a val_func, got None")
        if proposal is not None and is_discrete(predictor.model.action_spec):
            raise ValueError(
                f"proposal is for continuous actions, not for {predictor.model.action_spec}; leave "
                "it out"
            )
        env = PredictorEnv(predictor, action_spec)
        own_key = predictor.model.in_keys[2]
        action_key = own_key if action_key is None else action_key
        super().__init__(env, action_key)
        # The base class registers the environment twice; so would the state dict.
        del self._modules["env"]
        self.action_spec = env.full_action_spec[own_key]
        self._action_form = ActionForm(self.action_spec)
        event = () if is_discrete(self.action_spec) else tuple(self.action_spec.shape)
        if optimizer.search.event_shape != event:
            raise ValueError(
                f"the optimizer searches steps of shape {optimizer.search.event_shape}, but the "
                f"actions are {self.action_spec}; build it with make_search(action_spec)"
            )
        self.optimizer = optimizer.to(env.device)
        self.return_mode = find_return_mode(return_mode)
        self.deterministic_mode = find_return_mode(deterministic_mode, "deterministic_mode")
        self.options = options
        self.risk = Mean() if risk is None else risk
        self._try_risk()
        self.proposal = proposal
        self.callback = callback
        self._graphs: Graphs | None = None
        self.action_key = unravel_key(action_key)
        self.plan_key = unravel_key(plan_key)
        below = plan_key if isinstance(plan_key, tuple) else (plan_key,)
        entries = [(*below, entry) for entry in optimizer.memory_spec.keys()]
        self.in_keys = [*predictor.encoder.in_keys, *entries]
        self.out_keys = [self.action_key, *(("next", *entry) for entry in entries)]

    @torch.no_grad()
    def _try_risk(self) -> None:
        """Refuse a risk measure of another shape now, not after random steps at the first plan."""
        model, propagation = self.predictor.model, self.options.propagation or TSInfinity()
        spread = propagation.particles(model.n_models, model.n_particles_per_model)
        score(self.risk, torch.zeros(1, 2, *spread, device=self.env.device))

    @property
    def env(self) -> PredictorEnv:
        """The predictor as an environment."""
        return self.module

    @property
    def predictor(self) -> Predictor:
        """The predictor that imagines the plans."""
        return self.env.predictor

    def compile(self, *, cudagraphs: bool = False, **options: Any) -> None:
        """Compile dynamics and reward; with ``cudagraphs`` replay whole searches as CUDA graphs.

        The first plan of each batch shape then takes some seconds to compile and capture, in each
        process. Plans are as good as before, but the same seed gives other random numbers. On a
        GPU, non-finite values are reported one plan later.

        Args:
            cudagraphs: On a GPU, capture each search as a CUDA graph, once for each batch shape,
                and replay it. Your own reward, bonus, risk measure or return mode is captured too:
                it must not wait for the GPU (``item()``, an ``if`` on a tensor), and runs in Python
                only during the capture. The callback and the proposal stay outside. On a CPU this
                changes nothing.
            **options: Of ``torch.compile``, for example ``dynamic=False``, for the built-in members
                of an ensemble and for a reward that is a module; other networks are captured as
                they are.

        Raises:
            TypeError: ``cudagraphs`` that is not a bool.
        """
        self._graphs = Graphs() if check_flag("cudagraphs", cudagraphs) else None
        model, reward = self.predictor.model, self.predictor.rew_func
        if isinstance(getattr(model, "members", None), StackedProbFCDynamics):
            model.compile(**options)
        if isinstance(reward, nn.Module):
            reward.compile(**options)

    @property
    def _mode(self) -> ReturnMode:
        """The return mode for TorchRL's current exploration type."""
        random = exploration_type() in (ExplorationType.RANDOM, None)
        return self.return_mode if random else self.deterministic_mode

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Return the transform that passes the memory between steps and clears it at resets."""
        return TensorDictPrimer(
            Composite({self.plan_key: self.optimizer.memory_spec}), expand_specs=True
        )

    def forget(
        self, batch: Sequence[int] = (), device: torch.device | str | None = None
    ) -> TensorDict:
        """Return an empty memory for ``[*B]`` environments, under ``plan_key``.

        Without an environment, ``td.update(planner.forget(td.batch_size))`` makes the next plan
        start without a memory.

        Args:
            batch: ``*B``.
            device: The planner's by default.
        """
        batch = torch.Size(batch)
        memory = self.optimizer.forget(batch, device)
        return TensorDict({self.plan_key: memory}, batch, device=memory.device)

    @dispatched
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
        out.set(self.action_key, self._first_actions(actions, solution))
        out.set(unravel_key(("next", self.plan_key)), self.optimizer.shift(solution.memory))
        return out

    def planning(self, td: TensorDictBase) -> Tensor:
        """Return the first actions ``[*B, A]`` of plans; write nothing."""
        actions, solution = self.plan(td)
        return self._first_actions(actions, solution)

    @watched
    @torch.no_grad()
    def plan(
        self, tensordict: TensorDictBase, noise: Tensor | None = None
    ) -> tuple[Tensor, Solution]:
        """Plan for a TensorDict ``[*B]``; write nothing.

        Args:
            tensordict: Holds the observation and the memory.
            noise: From ``optimizer.draw_noise``; drawn by default.

        Returns:
            Actions ``[*B, H, A]``, or discrete in the form of the action spec, and the optimizer's
            solution.
        """
        obs, memory = self._read(tensordict)
        state, context = self.predictor.encode(obs)
        if state.shape[:-1] != memory.batch_size:
            raise ValueError(
                f"there are {list(state.shape[:-1])} observations, but memories of "
                f"{list(memory.batch_size)} plans; give the TensorDict the batch size of its "
                "observations"
            )
        proposals = None
        if self.proposal is not None:
            proposals = self.proposal(state, context, self.optimizer.horizon)
        if self._graphs is None:
            actions, solution = self._search(state, context, memory, noise, proposals)
        else:
            actions, solution = self._replay(self._graphs, state, context, memory, noise, proposals)
        if self.callback is not None:
            # The callback must not change the random numbers drawn after it.
            devices = [state.device] if state.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                self.callback(
                    self.predictor.rollout(
                        obs,
                        actions,
                        self.options.deterministic,
                        propagation=self.options.propagation,
                    )
                )
        return actions, solution

    def _search(
        self,
        state: Tensor,
        context: Tensor,
        memory: TensorDictBase,
        noise: Tensor | None,
        proposals: Tensor | None,
    ) -> tuple[Tensor, Solution]:
        """Search for a plan, and return it with the solution; a function of tensors."""
        batch = state.shape[:-1]

        def cost(candidates: Tensor) -> Tensor:
            shape = (*batch, candidates.shape[len(batch)], -1)
            starts = state.unsqueeze(-2).expand(shape), context.unsqueeze(-2).expand(shape)
            returns = self.predictor.returns(*starts, self._to_spec_form(candidates), self.options)
            return -score(self.risk, returns)

        entries = {key: memory.get(key) for key in memory.keys()}
        solution = self.optimizer.optimize(cost, TensorDict(entries, batch), noise, proposals)
        plan, expected = self._mode(solution), solution.mean
        if not isinstance(plan, Tensor) or plan.shape != expected.shape:
            what = tuple(plan.shape) if isinstance(plan, Tensor) else type(plan).__name__
            raise ValueError(
                f"the return mode gave {what}, expected a whole sequence, {tuple(expected.shape)}, "
                "such as solution.mean"
            )
        return self._to_spec_form(plan), solution

    def _replay(
        self,
        graphs: Graphs,
        state: Tensor,
        context: Tensor,
        memory: TensorDictBase,
        noise: Tensor | None,
        proposals: Tensor | None,
    ) -> tuple[Tensor, Solution]:
        """Run :meth:`_search` as a CUDA graph if there is a GPU."""
        batch, kept = state.shape[:-1], list(memory.keys())
        optional = [x for x in (noise, proposals) if x is not None]

        def search(*inputs: Tensor) -> tuple[Tensor, ...]:
            state, context, *rest = inputs
            own = {key: rest.pop(0) for key in kept}
            actions, found = self._search(
                state,
                context,
                TensorDict(own, batch),
                None if noise is None else rest.pop(0),
                None if proposals is None else rest.pop(0),
            )
            left = (found.memory.get(key) for key in kept)
            return (actions, found.mean, found.best, found.best_cost, found.random, *left)

        predictor = self.predictor
        functions = (predictor.rew_func, predictor.terminal_value, predictor.term_func)
        name = (
            "plan",
            predictor.training,
            *map(Same, (self.options, *functions, self.risk, self._mode)),
            noise is None,
            proposals is None,
        )
        modules = (predictor, self.optimizer, self.options.exploration_bonus)
        reads = [x for m in modules if isinstance(m, nn.Module) for x in _tensors(m)]
        inputs = (state, context, *(memory.get(key) for key in kept), *optional)
        actions, mean, best, best_cost, random, *left = graphs.run(name, search, inputs, reads)
        entries = dict(zip(kept, left, strict=True))
        after = TensorDict(entries, batch, device=state.device)
        return actions, Solution(mean, best, best_cost, random, after)

    def _first_actions(self, actions: Tensor, solution: Solution) -> Tensor:
        return self._action_form.project(actions.select(solution.memory.ndim, 0))

    def _to_spec_form(self, candidates: Tensor) -> Tensor:
        """Convert candidates of the optimizer to the form of the action spec."""
        if isinstance(self.action_spec, Categorical):
            candidates = candidates.reshape((*candidates.shape, *self.action_spec.shape))
        if isinstance(self.action_spec, OneHot):
            choices = torch.arange(width(self.action_spec), device=candidates.device)
            return (candidates.unsqueeze(-1) == choices).to(self.action_spec.dtype)
        return candidates.to(self.action_spec.dtype)

    def _read(self, tensordict: TensorDictBase) -> tuple[Tensor, TensorDictBase]:
        refuse_mask(tensordict, self.action_key)
        encoder = self.predictor.encoder
        for key in encoder.in_keys:
            require(
                tensordict,
                key,
                reader="the planner",
                hint="give what its predictor's encoder reads, or rename that key there",
            )
        obs = encoder.join(tensordict)
        memory = require(
            tensordict,
            self.plan_key,
            reader="the planner",
            hint=(
                "env = env.append_transform(planner.make_tensordict_primer()) adds it (collectors "
                "do so with auto_register_policy_transforms=True); where there is no environment, "
                "td.update(planner.forget(td.batch_size))"
            ),
        )
        check_instance(
            f"the planner's memory {self.plan_key!r}",
            memory,
            TensorDictBase,
            hint="give what planner.forget() gives",
        )
        return obs, memory


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers."""
    yield from module.parameters()
    yield from module.buffers()
