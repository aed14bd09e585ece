"""Distances between places along known paths."""

from __future__ import annotations

from functools import partial
from math import inf, prod

import torch
from torch import Tensor

from layeredrl_torchrl._checks import (
    check_callable,
    check_finite,
    check_number,
    check_positive_int,
    check_width,
)
from layeredrl_torchrl._precision import KeepsFloats
from layeredrl_torchrl._state import WholeLoading
from layeredrl_torchrl.nets.functions import (
    StepFunction,
    check_step_function,
    on_step,
    reads_next_state,
)

__all__ = ["Landmarks"]

_ROWS = 20_000  # evaluated at once, so that a table [rows, landmarks] stays small


class Landmarks(KeepsFloats, WholeLoading):
    """A far-sighted value of states and goals: by the shortest way over places seen before.

    Some of the places seen become landmarks, more than ``radius`` apart, so that each place is near
    a landmark. Landmarks at most two radii apart are joined. The path from place to place is the
    shortest over these edges: along corridors, and not through walls. (Search on a replay buffer,
    arXiv 1906.05253, with known distances between neighbours.) Nothing is trained. Give a predictor
    :meth:`value`, and :meth:`is_strange` for plans that stay in known places; or :meth:`novelty`,
    to explore before there is a task:

    >>> landmarks = Landmarks(2, radius=0.5)
    >>> landmarks.extend(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [0.0, 2.0]]))
    >>> landmarks.distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    tensor([4.])
    >>> factory = PredictorFactory(val_func=landmarks.value, term_func=landmarks.is_strange)

    Args:
        dim: Number of dimensions of a place, ``P``: the first of the state, and all of the context.
        radius: Largest distance of a landmark to the places it represents, in the units of places;
            must be less than half the thickness of walls, or paths lead through them.
        scale: Distance over which the value falls to ``1 / e``.
        top: Value at the goal.
        capacity: Maximum number of landmarks; after that, no new ones are made.

    Raises:
        TypeError, ValueError: Numbers of another kind, or outside their range.
    """

    places: Tensor  # [capacity, P]
    ways: Tensor  # [capacity, capacity], lengths of the shortest paths
    visits: Tensor  # [capacity], places seen within two radii since the landmark was made
    count: Tensor  # [] int64

    def __init__(
        self,
        dim: int,
        *,
        radius: float,
        scale: float = 1.0,
        top: float = 1.0,
        capacity: int = 1000,
    ) -> None:
        super().__init__()
        check_positive_int("dim", dim)
        check_positive_int("capacity", capacity)
        self.radius = check_number("radius", radius, 0.0, open_low=True)
        self.scale = check_number("scale", scale, 0.0, open_low=True)
        self.top = check_number("top", top)
        self.register_buffer("places", torch.full((capacity, dim), inf))
        self.register_buffer("ways", torch.full((capacity, capacity), inf))
        self.register_buffer("visits", torch.zeros(capacity))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def extend(self, places: Tensor) -> None:
        """Learn from places ``[*B, P]`` that were seen.

        Raises:
            TypeError, ValueError: Places that are not floats, of another width, or not finite.
        """
        check_width("places", places, self.places.shape[-1], hint="give what was seen of places")
        check_finite("places", places, hint="leave such rows out")
        before, all_seen = int(self.count), places.reshape(-1, places.shape[-1]).to(self.places)
        seen = all_seen
        while len(seen) and self.count < len(self.places):
            seen = seen[self._distance_to_nearest(seen) > self.radius]
            if len(seen):
                self.places[self.count] = seen[0]
                self.count += 1
        if self.count > before:
            known = self.places[: self.count]
            ways = _distances(known, known)
            ways = ways.where(ways <= self._neighbour_distance, inf).fill_diagonal_(0.0)
            for middle in range(len(known)):  # Floyd and Warshall
                torch.minimum(ways, ways[:, middle : middle + 1] + ways[middle], out=ways)
            self.ways[: self.count, : self.count] = ways
        for some in all_seen.split(_ROWS):
            near = _distances(some, self.places[: self.count]) <= self._neighbour_distance
            self.visits[: self.count] += near.sum(0)

    @property
    def _neighbour_distance(self) -> float:
        """The largest distance of neighbours: two radii, apart from rounding.

        It also holds from a place to its landmarks. With the nearest landmark alone, paths would at
        first get longer on the way to the next landmark, and short plans would not move.
        """
        return 2.001 * self.radius

    def _distance_to_nearest(self, places: Tensor) -> Tensor:
        """Return the distances ``[N]`` of places ``[N, P]`` from the nearest landmark."""
        if not self.count:
            return torch.full_like(places[:, 0], inf)
        known = self.places[: self.count]
        return torch.cat([_distances(some, known).amin(-1) for some in places.split(_ROWS)])

    def distance(self, place: Tensor, goal: Tensor) -> Tensor:
        """Return the lengths ``[*B]`` of the shortest paths from places to goals, both ``[*B, P]``.

        Infinite where no path is known, or no landmark is within two radii. The goal counts as its
        nearest landmark.
        """
        if not self.count:
            return torch.full_like(place[..., 0], inf)
        rows = zip(
            place.reshape(-1, place.shape[-1]).split(_ROWS),
            goal.reshape(-1, goal.shape[-1]).split(_ROWS),
            strict=True,
        )
        known, ways = self.places[: self.count], self.ways[: self.count, : self.count].mT
        found = []
        for some, aims in rows:
            first = _distances(some, known)
            last = _distances(aims, known).argmin(-1)
            found.append(
                (first.where(first <= self._neighbour_distance, inf) + ways[last]).amin(-1)
            )
        return torch.cat(found).reshape(place.shape[:-1]).to(place.dtype)

    def value(self, state: Tensor, context: Tensor, action: Tensor | None = None) -> Tensor:
        """Return ``top * exp(-distance / scale)``, ``[*B]``; the context is the goal ``[*B, P]``.

        0 where no path is known.

        Raises:
            ValueError: A context that is not a goal, because its width differs.
        """
        width = self.places.shape[-1]
        check_width("the context", context, width, hint="Landmarks.value reads the goal from it")
        if not self.count:
            return torch.zeros_like(state[..., 0])
        place = state[..., :width]
        return self.top * torch.exp(-self.distance(place, context) / self.scale)

    def novelty(self, state: Tensor, context: Tensor, action: Tensor | None = None) -> Tensor:
        """Return the value ``[*B]`` of states ``[*B, D]`` at, or on the way to, rarely seen places.

        The maximum over landmarks of ``top * exp(-distance / scale) / sqrt(visits)``. Visits are
        the places seen within two radii since the landmark was made. A planner with this value goes
        to the edge of the known region, and random phases continue from there (first return, then
        explore: Go-Explore, arXiv 2004.12919; counts as in arXiv 1606.01868). 0 far from all
        landmarks.
        """
        if not self.count:
            return torch.zeros_like(state[..., 0])
        known, ways = self.places[: self.count], self.ways[: self.count, : self.count]
        new = self.visits[: self.count].rsqrt()
        worth = (new * torch.exp(-ways / self.scale)).amax(-1)
        place = state[..., : known.shape[-1]].reshape(-1, known.shape[-1])
        found = []
        for some in place.split(_ROWS):
            first = _distances(some, known)
            near = torch.exp(-first.where(first <= self._neighbour_distance, inf) / self.scale)
            found.append((near * worth).amax(-1))
        return self.top * torch.cat(found).reshape(state.shape[:-1]).to(state.dtype)

    def value_of(self, reward: StepFunction, *, speed: float, discount: float) -> StepFunction:
        """Return the value function of a reward for an agent that moves from landmark to landmark.

        Value iteration computes it for each context. On the way to a landmark, each action gets the
        reward of the landmark. Strange places have the lowest value of all landmarks.

        Args:
            reward: ``(state, context, action) -> [*B]``, or with the next state; it may depend only
                on the place in a state. The action is empty, ``[*B, 0]``.
            speed: Distance covered by one action.
            discount: Over one action, below 1.
        """
        check_callable("reward", reward)
        check_step_function("reward", reward)
        check_number("speed", speed, 0.0, open_low=True)
        check_number("discount", discount, 0.0, 1.0, open_low=True, open_high=True)
        return partial(self._value_of, reward, speed, discount)

    def _value_of(
        self,
        reward: StepFunction,
        speed: float,
        discount: float,
        state: Tensor,
        context: Tensor,
        action: Tensor | None = None,
    ) -> Tensor:
        if not self.count:
            return torch.zeros_like(state[..., 0])
        known = self.places[: self.count]
        n, width = prod(state.shape[:-1]), context.shape[-1]
        contexts, which = context.new_zeros(1, 0), state.new_zeros(n, dtype=torch.long)
        if width:
            contexts, which = context.reshape(n, width).unique(dim=0, return_inverse=True)
        rows = (len(contexts), len(known))
        at = state.new_zeros(*rows, state.shape[-1])
        at[..., : known.shape[-1]] = known
        paid = on_step(reward, at, contexts.unsqueeze(1).expand(*rows, -1), at[..., :0], at)
        forever = 1.0 / (1.0 - discount)  # the value of a reward of 1 at every step

        def going(distance: Tensor, paid: Tensor, value: Tensor) -> Tensor:
            """Return the value of going to the best landmark, ``distance`` in the last axis."""
            left = discount ** (distance / speed)
            worth = (1.0 - left) * forever * paid + left * value
            return worth.where(distance <= self._neighbour_distance, -inf).amax(-1)

        value, gaps = paid * forever, _distances(known, known)
        for _ in range(len(known)):
            before = value
            value = going(gaps, paid.unsqueeze(1), value.unsqueeze(1))
            value = value.maximum(paid * forever)
            if torch.allclose(value, before):
                break
        found = []
        place = state[..., : known.shape[-1]].reshape(-1, known.shape[-1])
        for some, of in zip(place.split(_ROWS), which.split(_ROWS), strict=True):
            worth = going(_distances(some, known), paid[of], value[of])
            found.append(worth.maximum(value.amin(-1)[of]))
        return torch.cat(found).reshape(state.shape[:-1])

    @reads_next_state
    def is_strange(
        self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
    ) -> Tensor:
        """Return whether a step leads far from all landmarks, into a wall for example, ``[*B]``."""
        place = next_state[..., : self.places.shape[-1]]
        off = self._distance_to_nearest(place.reshape(-1, place.shape[-1])).reshape(
            place.shape[:-1]
        )
        return (off > self.radius) & (self.count > 0)


def _distances(places: Tensor, known: Tensor) -> Tensor:
    """Return distances ``[N, L]`` of places ``[N, P]`` from landmarks ``[L, P]``, in their dtype.

    Computed from differences: the default, products of large matrices, loses small distances far
    from 0, such as in map coordinates.
    """
    places = places.to(known.dtype)
    return torch.cdist(places, known, compute_mode="donot_use_mm_for_euclid_dist")
