"""Ways to move the particles of an ensemble from step to step of a rollout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import TypeAlias

import torch
from torch import Tensor

from layeredrl_torchrl._checks import check_positive_int

__all__ = ["TS1", "Expectation", "Move", "Propagation", "TSInfinity", "propagation_key"]

# Maps particles [M, D, N, P'] to their next states [M, D, N, P'] and term_prob [M, N, P']; member m
# moves block m. All particles of a start share action and context, so they may swap places.
Move: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


class Propagation(ABC):
    """Which member moves which particle (arXiv 1805.12114, section 5.1).

    Particles have shape ``[M', D, N, P']`` for ``N`` starts; usually ``M' = M`` and ``P' = P``.

    >>> spaces = Unbounded((3,)), None, Bounded(-1.0, 1.0, (1,))
    >>> model = ProbabilisticEnsemble(*spaces, n_models=2, n_particles_per_model=4)
    >>> state, actions = torch.zeros(3), torch.zeros(6, 1)
    >>> model.rollout(state, None, actions, propagation=Expectation()).batch_size
    torch.Size([1, 1, 6])
    """

    # Whether members step to their mean instead of sampling.
    deterministic = False
    # Whether advance() only calls move(particles); then several steps can run in one call.
    stays = False

    def particles(self, n_models: int, n_particles_per_model: int) -> tuple[int, int]:
        """Return ``M'`` and ``P'`` for an ensemble with ``M`` and ``P``."""
        return n_models, n_particles_per_model

    @abstractmethod
    def advance(self, move: Move, n_models: int, particles: Tensor) -> tuple[Tensor, Tensor]:
        """Move particles by one step.

        Args:
            move: Moves block ``m`` of ``[M, D, N, P']`` by member ``m``.
            n_models: ``M``.
            particles: States ``[M', D, N, P']``.

        Returns:
            Next states ``[M', D, N, P']`` and term_prob ``[M', N, P']``.
        """


class _Sampled(Propagation):
    """A propagation with any number of particles in each member.

    Args:
        n_particles: ``P``, particles in each member; the model's by default.
    """

    def __init__(self, n_particles: int | None = None) -> None:
        if n_particles is not None:
            check_positive_int("n_particles", n_particles)
        self.n_particles = n_particles

    def particles(self, n_models: int, n_particles_per_model: int) -> tuple[int, int]:
        """Return ``M`` and ``P``."""
        return n_models, self.n_particles or n_particles_per_model


class TSInfinity(_Sampled):
    """Keep each particle in its member, so that disagreement adds up over a rollout.

    >>> TSInfinity().particles(n_models=5, n_particles_per_model=4)
    (5, 4)
    >>> TSInfinity(n_particles=50).particles(n_models=5, n_particles_per_model=4)
    (5, 50)

    Args:
        n_particles: ``P``, particles in each member; the model's by default.
    """

    stays = True

    def advance(self, move: Move, n_models: int, particles: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        return move(particles)


class TS1(_Sampled):
    """Move each particle by a newly drawn member at every step.

    Each step assigns the ``M * P`` particles of a start to members at random, ``P`` to each, so
    that every particle gets every member with probability ``1 / M``. The axes ``[M, P]`` of a
    rollout then only count particles; different members move each of them.

    >>> spaces = Unbounded((3,)), None, Bounded(-1.0, 1.0, (1,))
    >>> model = ProbabilisticEnsemble(*spaces, n_models=2, n_particles_per_model=4)
    >>> model.rollout(torch.zeros(3), None, torch.zeros(6, 1), propagation=TS1()).batch_size
    torch.Size([2, 4, 6])

    Args:
        n_particles: ``P``, so that there are ``M * P`` particles; the model's by default.
    """

    def advance(self, move: Move, n_models: int, particles: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        _, _, n, n_part = particles.shape
        chance = torch.rand(n_models * n_part, n, device=particles.device)
        order = chance.argsort(0)  # the particle in each place
        following, term_prob = move(_deal(particles, order))
        back = order.argsort(0)  # the place of each particle
        return _deal(following, back), _deal(term_prob.unsqueeze(1), back).squeeze(1)


class Expectation(Propagation):
    """Follow the mean over members and modes with one particle; ``M' = P' = 1``.

    >>> Expectation().particles(n_models=5, n_particles_per_model=4)
    (1, 1)
    """

    deterministic = True

    def particles(self, n_models: int, n_particles_per_model: int) -> tuple[int, int]:
        """Return 1 and 1."""
        return 1, 1

    def advance(self, move: Move, n_models: int, particles: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        following, term_prob = move(particles.expand(n_models, -1, -1, -1))
        return following.mean(0, keepdim=True), term_prob.mean(0, keepdim=True)


def propagation_key(propagation: Propagation) -> Hashable:
    """Return a key that is equal for propagations of one class with the same attributes."""
    own = tuple(sorted(vars(propagation).items()))
    try:
        hash(own)
    except TypeError:
        return propagation
    return (type(propagation), own)


def _deal(x: Tensor, order: Tensor) -> Tensor:
    """Move particle ``order[i, n]`` of ``x [M, F, N, P]`` to place ``i`` of start ``n``."""
    n_models, width, n, n_part = x.shape
    flat = x.permute(1, 0, 3, 2).reshape(width, n_models * n_part, n)
    flat = flat.take_along_dim(order.unsqueeze(0), 1)
    return flat.view(width, n_models, n_part, n).permute(1, 0, 3, 2)
