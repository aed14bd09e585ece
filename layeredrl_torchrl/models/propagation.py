"""How a rollout carries the particles of an ensemble from step to step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from layeredrl_torchrl._checks import check_positive_int

__all__ = ["TS1", "Expectation", "Propagation", "TSInfinity"]

# (state [M, R, D], context [M, R, C], action [M, R, *]) -> next state [M, R, D], term_prob [M, R]
Step: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@runtime_checkable
class StepsAhead(Protocol):
    """A step that can also make several, each from where the one before led."""

    n_at_once: int

    def several(
        self, state: Tensor, context: Tensor, actions: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Next states and term_probs for one action after another."""


class Propagation(ABC):
    """Which member moves which particle (arXiv 1805.12114, section 5.1).

    Particles lie in ``[M', N, P', *]`` for ``N`` starts; most keep ``M' = M`` and ``P' = P``.

    >>> spaces = Unbounded((3,)), None, Bounded(-1.0, 1.0, (1,))
    >>> model = ProbabilisticEnsemble(*spaces, n_models=2, n_particles_per_model=4)
    >>> state, actions = torch.zeros(3), torch.zeros(6, 1)
    >>> model.rollout(state, None, actions, propagation=Expectation()).batch_size
    torch.Size([1, 1, 6])
    """

    # Whether members follow their mean rather than a sample of it.
    deterministic = False

    def particles(self, n_models: int, n_particles_per_model: int) -> tuple[int, int]:
        """``M'`` and ``P'`` of an ensemble with ``M`` and ``P``."""
        return n_models, n_particles_per_model

    @abstractmethod
    def advance(
        self, step: Step, n_models: int, state: Tensor, context: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Move particles by one step.

        Args:
            step: Steps row block ``m`` with member ``m``.
            n_models: ``M``.
            state: ``[M', N, P', D]``.
            context: ``[N, C]``, the same for all particles of a start.
            action: ``[N, *]``, likewise.

        Returns:
            Next state ``[M', N, P', D]`` and term_prob ``[M', N, P']``.
        """

    def advance_several(
        self, step: Step, n_models: int, state: Tensor, context: Tensor, actions: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """:meth:`advance` for each of ``actions [N, K, *]``, from where the one before led."""
        moved = []
        for action in actions.unbind(1):
            state, term_prob = self.advance(step, n_models, state, context, action)
            moved.append((state, term_prob))
        return moved


class _Sampled(Propagation):
    """Propagations whose number of particles is free.

    Args:
        n_particles: ``P``, particles in each member; the model's by default.
    """

    def __init__(self, n_particles: int | None = None) -> None:
        if n_particles is not None:
            check_positive_int("n_particles", n_particles)
        self.n_particles = n_particles

    def particles(self, n_models: int, n_particles_per_model: int) -> tuple[int, int]:
        """``M`` and ``P``."""
        return n_models, self.n_particles or n_particles_per_model


class TSInfinity(_Sampled):
    """Particles stay within their member: what the members disagree on adds up over a rollout.

    >>> TSInfinity().particles(n_models=5, n_particles_per_model=4)
    (5, 4)
    >>> TSInfinity(n_particles=50).particles(n_models=5, n_particles_per_model=4)
    (5, 50)

    Args:
        n_particles: ``P``, particles in each member; the model's by default.
    """

    def advance(
        self, step: Step, n_models: int, state: Tensor, context: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As the base class has it."""
        n_part = state.shape[2]
        following, term_prob = step(
            state.flatten(1, 2),
            _rows(context, n_models, n_part),
            _rows(action, n_models, n_part),
        )
        return following.view(state.shape), term_prob.view(state.shape[:-1])

    def advance_several(
        self, step: Step, n_models: int, state: Tensor, context: Tensor, actions: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """As the base class has it; at once, since nothing is dealt out between two steps."""
        if not isinstance(step, StepsAhead):
            return super().advance_several(step, n_models, state, context, actions)
        n_part = state.shape[2]
        states, terms = step.several(
            state.flatten(1, 2),
            _rows(context, n_models, n_part),
            [_rows(action, n_models, n_part) for action in actions.unbind(1)],
        )
        return [
            (following.view(state.shape), term_prob.view(state.shape[:-1]))
            for following, term_prob in zip(states, terms, strict=True)
        ]


class TS1(_Sampled):
    """Each particle is moved by a newly drawn member at every step.

    The ``M * P`` particles of a start are dealt out to the members anew, ``P`` to each, so that
    every particle has every member with probability ``1 / M``. The axes ``[M, P]`` of a rollout
    then only count particles: which member moved one is different at each step.

    >>> spaces = Unbounded((3,)), None, Bounded(-1.0, 1.0, (1,))
    >>> model = ProbabilisticEnsemble(*spaces, n_models=2, n_particles_per_model=4)
    >>> model.rollout(torch.zeros(3), None, torch.zeros(6, 1), propagation=TS1()).batch_size
    torch.Size([2, 4, 6])

    Args:
        n_particles: ``P``, so that there are ``M * P`` particles; the model's by default.
    """

    def advance(
        self, step: Step, n_models: int, state: Tensor, context: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As the base class has it."""
        _, n, n_part, dim = state.shape
        count = n_models * n_part
        order = torch.rand(n, count, device=state.device).argsort(-1)  # particle in each seat
        back = order.argsort(-1)  # seat of each particle
        seated = _deal(state, order).reshape(n_models, n * n_part, dim)
        following, term_prob = step(
            seated, _rows(context, n_models, n_part), _rows(action, n_models, n_part)
        )
        return (
            _deal(following.view(state.shape), back),
            _deal(term_prob.view(n_models, n, n_part, 1), back).squeeze(-1),
        )


class Expectation(Propagation):
    """One particle follows the mean over members and modes; ``M' = P' = 1``.

    >>> Expectation().particles(n_models=5, n_particles_per_model=4)
    (1, 1)
    """

    deterministic = True

    def particles(self, n_models: int, n_particles_per_model: int) -> tuple[int, int]:
        """One and one."""
        return 1, 1

    def advance(
        self, step: Step, n_models: int, state: Tensor, context: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As the base class has it."""
        flat = state[0, :, 0].expand(n_models, -1, -1)
        following, term_prob = step(flat, _rows(context, n_models, 1), _rows(action, n_models, 1))
        return following.mean(0)[None, :, None], term_prob.mean(0)[None, :, None]


def _rows(x: Tensor, n_models: int, n_particles: int) -> Tensor:
    """``[N, *]`` of the starts as ``[M, N * P, *]`` of their particles."""
    if n_particles > 1:
        x = x.repeat_interleave(n_particles, 0)
    return x.expand(n_models, *x.shape)


def _deal(x: Tensor, order: Tensor) -> Tensor:
    """Put particle ``order[n, i]`` of ``x [M, N, P, F]`` on place ``i`` of start ``n``."""
    n_models, n, n_part, width = x.shape
    flat = x.transpose(0, 1).reshape(n, n_models * n_part, width)
    flat = flat.take_along_dim(order.unsqueeze(-1), 1)
    return flat.view(n, n_models, n_part, width).transpose(0, 1)
