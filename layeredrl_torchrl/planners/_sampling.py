"""Planners, one for each optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchrl.data import TensorSpec

from layeredrl_torchrl._checks import check_instance
from layeredrl_torchrl._signatures import passes_on
from layeredrl_torchrl.optimizers import CEM, ICEM, MPPI, Optimizer, make_search
from layeredrl_torchrl.planners.planner import PredictorPlanner
from layeredrl_torchrl.planners.return_modes import ReturnMode, best_plan, mean_plan
from layeredrl_torchrl.predictors import Predictor
from layeredrl_torchrl.specs import Space

__all__ = ["CEMPlanner", "ICEMPlanner", "MPPIPlanner"]


class _SamplingPlanner(PredictorPlanner):
    """Builds an optimizer of class ``kind`` for the actions, with its options ``own``."""

    @passes_on(PredictorPlanner.__init__)
    def __init__(
        self,
        predictor: Predictor,
        kind: type[Optimizer],
        own: Mapping[str, Any],
        *,
        action_spec: TensorSpec | Space | None = None,
        horizon: int = 15,
        n_samples: int = 256,
        n_iterations: int = 6,
        elite_ratio: float = 0.1,
        momentum: float = 0.1,
        initial_sigma: Tensor | float | None = None,
        return_mode: ReturnMode | str = mean_plan,
        **options: Any,
    ) -> None:
        check_instance("predictor", predictor, Predictor, hint="of an environment: env.predictor")
        space = predictor.model.action_spec if action_spec is None else action_spec
        optimizer = kind(
            make_search(space, initial_sigma),
            horizon,
            n_samples=n_samples,
            n_iterations=n_iterations,
            elite_ratio=elite_ratio,
            momentum=momentum,
            **own,
        )
        super().__init__(
            predictor, optimizer, action_spec=action_spec, return_mode=return_mode, **options
        )


class CEMPlanner(_SamplingPlanner):
    """Plans with :class:`~layeredrl_torchrl.CEM`.

    >>> factory = PredictorFactory(hidden_sizes=(8,), n_models=2)
    >>> predictor = factory(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))
    >>> planner = CEMPlanner(predictor, horizon=5, n_samples=64, elite_ratio=0.05)
    >>> planner.optimizer.n_elites
    3

    Args:
        predictor: Imagines the outcome of actions.
        action_spec: Actions of one environment; the predictor's by default. Continuous actions need
            finite bounds.
        horizon, n_samples, n_iterations, elite_ratio, momentum: As
            :class:`~layeredrl_torchrl.Optimizer`, with the same defaults.
        initial_sigma: Standard deviation of the first samples, as ``sigma`` of
            :class:`~layeredrl_torchrl.optimizers.GaussianSearch`; not for discrete actions.
        return_mode: Which sequence is the plan; :func:`~layeredrl_torchrl.mean_plan` by default.
        **options: Further options of :class:`~layeredrl_torchrl.PredictorPlanner`.

    Raises:
        TypeError, ValueError: As the optimizer, its search and the base class raise.
    """

    @passes_on(_SamplingPlanner.__init__)
    def __init__(self, predictor: Predictor, **options: Any) -> None:
        super().__init__(predictor, CEM, {}, **options)


class ICEMPlanner(_SamplingPlanner):
    """Plans with :class:`~layeredrl_torchrl.ICEM`.

    >>> factory = PredictorFactory(hidden_sizes=(8,), n_models=2)
    >>> predictor = factory(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))
    >>> planner = ICEMPlanner(predictor, horizon=5, n_samples=64, use_value_func=True)
    >>> planner.in_keys[0], planner.out_keys[0]
    ('observation', 'action')

    Args:
        predictor: Imagines the outcome of actions.
        beta, decay, keep_ratio: Arguments of the optimizer.
        return_mode: Which sequence is the plan; :func:`~layeredrl_torchrl.best_plan` by default.
        **options: Those of :class:`CEMPlanner`.
    """

    @passes_on(_SamplingPlanner.__init__)
    def __init__(
        self,
        predictor: Predictor,
        *,
        beta: float = 1.0,
        decay: float = 1.25,
        keep_ratio: float = 0.3,
        return_mode: ReturnMode | str = best_plan,
        **options: Any,
    ) -> None:
        own = {"beta": beta, "decay": decay, "keep_ratio": keep_ratio}
        super().__init__(predictor, ICEM, own, return_mode=return_mode, **options)


class MPPIPlanner(_SamplingPlanner):
    """Plans with :class:`~layeredrl_torchrl.MPPI`.

    >>> factory = PredictorFactory(hidden_sizes=(8,), n_models=2)
    >>> predictor = factory(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))
    >>> planner = MPPIPlanner(predictor, horizon=5, temperature=0.5, risk=CVaR(0.2))
    >>> planner.optimizer.temperature
    0.5

    Args:
        predictor: Imagines the outcome of actions.
        temperature: Argument of the optimizer.
        **options: Those of :class:`CEMPlanner`.
    """

    @passes_on(_SamplingPlanner.__init__)
    def __init__(self, predictor: Predictor, *, temperature: float = 1.0, **options: Any) -> None:
        super().__init__(predictor, MPPI, {"temperature": temperature}, **options)
