"""The loop that all sampling optimizers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.data import Binary, Composite, Unbounded

from layeredrl_torchrl._checks import check_positive_int
from layeredrl_torchrl.optimizers.search import Parameters, Search

__all__ = ["Cost", "Optimizer", "Solution"]

Cost: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """What an optimizer found for problems ``[*B]``; ``*E`` is the shape of a step of a sequence.

    >>> icem = ICEM(make_search(Bounded(-1.0, 1.0, (2,))), horizon=4)
    >>> solution = icem.optimize(lambda x: x.square().sum((-2, -1)), icem.forget([3]))
    >>> solution.mean.shape, solution.best_cost.shape
    (torch.Size([3, 4, 2]), torch.Size([3]))

    Attributes:
        mean: The middle of the final distribution, ``[*B, H, *E]``.
        best: The candidate of the lowest cost of all that were tried, ``[*B, H, *E]``.
        best_cost: Its cost, ``[*B]``.
        random: A sample of the final distribution, ``[*B, H, *E]``.
        memory: What the next call may start from, ``[*B]``; see :attr:`Optimizer.memory_spec`.
    """

    mean: Tensor
    best: Tensor
    best_cost: Tensor
    random: Tensor
    memory: TensorDictBase


class Optimizer(nn.Module, ABC):
    """Minimises costs of sequences by sampling; batched over independent problems ``[*B]``.

    Each iteration draws candidates, evaluates them, and fits the distribution that the next ones
    are drawn from to the best. A subclass says what is drawn (:meth:`colour`, :meth:`propose`)
    and how much each of the best counts (:meth:`weigh`).

    Nothing is kept from call to call but what the caller hands on: ``memory`` in,
    ``Solution.memory`` out. What comes from another call counts only where its entry ``"warm"``
    is true, so zeros are a memory of nothing.

    >>> optimizer = ICEM(make_search(Bounded(-1.0, 1.0, (2,))), horizon=4)
    >>> cost = lambda x: x.square().sum((-2, -1))  # [*B, N, H, A] -> [*B, N]
    >>> first = optimizer.optimize(cost, optimizer.forget([3]))  # three problems
    >>> second = optimizer.optimize(cost, first.memory)
    >>> bool((second.best_cost <= first.best_cost).all())
    True

    Args:
        search: The family of distributions, with its bounds.
        horizon: ``H``.
        populations: Candidates drawn in each iteration, one number an iteration.
        n_elites: The best candidates that the distribution is fitted to.
        momentum: Share of the old parameters in the new ones, in ``[0, 1)``.
        n_kept: Elites that are evaluated again in the next iteration, and handed on to the next
            call.

    Raises:
        ValueError: A horizon of 0, fewer than two elites, more elites than candidates, a
            momentum outside ``[0, 1)``.
    """

    def __init__(
        self,
        search: Search,
        horizon: int,
        *,
        populations: Sequence[int],
        n_elites: int,
        momentum: float,
        n_kept: int = 0,
    ) -> None:
        super().__init__()
        self.search = search
        self.horizon = check_positive_int("horizon", horizon)
        self.populations = tuple(populations)
        check_positive_int("n_iterations", len(self.populations))
        if not 2 <= n_elites <= min(self.populations):
            raise ValueError(
                f"n_elites is {n_elites}, expected at least 2 (one has no spread) and at most "
                f"{min(self.populations)}, the samples of the smallest iteration; change "
                "elite_ratio (n_elites as a share of n_samples) or n_samples"
            )
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        self.n_elites = n_elites
        self.momentum = momentum
        self.n_kept = n_kept

    @abstractmethod
    def colour(self, white: Tensor) -> Tensor:
        """Make the noise of candidates ``[b, N, H, *E]`` from independent standard normal one."""

    @abstractmethod
    def propose(self, step: int, parameters: Parameters, noise: Tensor, kept: Tensor) -> Tensor:
        """The candidates ``[b, N, H, *E]`` of iteration ``step``.

        Args:
            step: From 0.
            parameters: Of the distribution.
            noise: ``[b, populations[step], H, *E]``.
            kept: The best so far, ``[b, n_kept, H, *E]``.
        """

    @abstractmethod
    def weigh(self, cost: Tensor) -> Tensor:
        """Weights ``[b, n_elites]`` that sum to 1, from costs in rising order."""

    # -- memory -----------------------------------------------------------------------------

    @property
    def memory_spec(self) -> Composite:
        """Spec of the memory of one problem; zeros of it are a memory of nothing."""
        spec = self.search.memory_spec(self.horizon)
        if self.n_kept:
            shape = (self.n_kept, self.horizon, *self.search.event_shape)
            spec["elites"] = Unbounded(shape, dtype=self.search.candidate_dtype)
        spec["warm"] = Binary(1, (1,), dtype=torch.bool)
        return spec

    def forget(self, batch: Sequence[int] = (), device: torch.device | None = None) -> TensorDict:
        """A memory of nothing for problems ``[*B]``."""
        return self.memory_spec.to(device or "cpu").zero(torch.Size(batch))

    def shift(self, memory: TensorDictBase, steps: int = 1) -> TensorDictBase:
        """Let ``steps`` steps of time pass: sequences begin later, their last step is repeated.

        Args:
            memory: ``[*B]``; it is not changed.
            steps: At least 0.
        """
        check_positive_int("steps", steps, minimum=0)
        index = torch.arange(self.horizon, device=memory.get("warm").device) + steps
        index = index.clamp_max(self.horizon - 1)
        # After the batch axes come [H, ...], of elites [n_kept, H, ...].
        axes = {key: memory.ndim + (key == "elites") for key in memory.keys() if key != "warm"}
        moved = {key: memory.get(key).index_select(axis, index) for key, axis in axes.items()}
        return TensorDict({**moved, "warm": memory.get("warm")}, memory.batch_size)

    # -- the loop ---------------------------------------------------------------------------

    def draw_noise(self, batch: Sequence[int] = (), device: torch.device | None = None) -> Tensor:
        """All noise of one call, ``[*B, N_all, H, *E]``: standard normal, correlated in time."""
        n = sum(self.populations) + self.n_kept + 1
        shape = (torch.Size(batch).numel(), n, self.horizon, *self.search.event_shape)
        noise = self.colour(torch.randn(shape, dtype=self.search.dtype, device=device))
        return noise.view(*batch, *shape[1:])

    @torch.no_grad()
    def optimize(
        self,
        cost: Cost,
        memory: TensorDictBase | None = None,
        noise: Tensor | None = None,
        proposals: Tensor | None = None,
    ) -> Solution:
        """Find sequences of low cost.

        Args:
            cost: Candidates ``[*B, N, H, *E]`` -> costs ``[*B, N]``.
            memory: ``[*B]``: its batch shape is that of the problems; ``None`` for a single one
                of which nothing is known.
            noise: As :meth:`draw_noise` gives it; drawn by default.
            proposals: Sequences ``[*B, any, H, *E]`` that somebody else found: moved to the bounds,
                they are candidates of the first iteration beside its own.

        Raises:
            ValueError: Costs that are not finite (the message says of which problem), or of
                another shape; a memory or proposals that do not fit this optimizer.
        """
        memory = self.forget() if memory is None else memory
        batch = memory.batch_size
        entries = self._read(memory)
        warm = entries.pop("warm").squeeze(-1)
        noise = self.draw_noise(batch, warm.device) if noise is None else noise
        noise = noise.reshape(len(warm), *noise.shape[len(batch) :])
        sizes = [*self.populations, self.n_kept, 1]
        if noise.shape[1] != sum(sizes):
            raise ValueError(
                f"noise is for {noise.shape[1]} candidates, {sum(sizes)} are needed; use draw_noise"
            )
        *parts, of_kept, of_random = noise.split(sizes, dim=1)

        parameters = self.search.start(entries, warm)
        kept = self.search.sample(parameters, of_kept)
        if self.n_kept:
            cold = ~warm.view(-1, *[1] * (kept.ndim - 1))
            kept = torch.where(cold, kept, self.search.project(entries["elites"]))
        best = self.search.mode(parameters)
        best_cost, costs = torch.full(warm.shape, torch.inf, device=warm.device), []
        proposed = None if proposals is None else self._read_proposals(proposals, batch)
        for step, part in enumerate(parts):
            candidates = self.propose(step, parameters, part, kept)
            if step == 0 and proposed is not None:
                candidates = torch.cat([candidates, proposed], 1)
            costs.append(self._evaluate(cost, candidates, batch))
            elite_cost, index = costs[-1].topk(self.n_elites, largest=False)
            elites = _pick(candidates, index)
            fitted = self.search.fit(elites, self.weigh(elite_cost))
            pairs = zip(fitted, parameters, strict=True)
            parameters = tuple(new.lerp(old, self.momentum) for new, old in pairs)
            kept = elites[:, : self.n_kept]
            better = (elite_cost[:, 0] < best_cost).view(-1, *[1] * (best.ndim - 1))
            best = torch.where(better, elites[:, 0], best)
            best_cost = torch.minimum(elite_cost[:, 0], best_cost)
        self._check_costs(torch.cat(costs, 1), batch)

        found = self.search.remember(parameters)
        if self.n_kept:
            found["elites"] = kept
        found["warm"] = torch.ones_like(warm).unsqueeze(-1)
        random = self.search.sample(parameters, of_random).squeeze(1)
        mean, best, random = (
            x.view(*batch, *x.shape[1:]) for x in (self.search.mode(parameters), best, random)
        )
        found = {key: x.reshape(*batch, *x.shape[1:]) for key, x in found.items()}
        return Solution(mean, best, best_cost.view(batch), random, TensorDict(found, batch))

    def _read(self, memory: TensorDictBase) -> dict[str, Tensor]:
        """The entries of a memory, flat ``[b, ...]``, checked."""
        batch, entries = memory.batch_size, {}
        if batch.numel() == 0:
            raise ValueError(f"the memory has batch shape {tuple(batch)}: there is no problem")
        for key, spec in self.memory_spec.items():
            value = memory.get(key, None)
            if value is None or value.shape != (*batch, *spec.shape):
                found = "is missing" if value is None else f"has shape {tuple(value.shape)}"
                raise ValueError(
                    f"the memory's entry {key!r} {found}, expected {(*batch, *spec.shape)}; start "
                    "from forget(), or from the memory of an optimizer built like this one"
                )
            entries[key] = value.reshape(-1, *spec.shape)
        return entries

    def _read_proposals(self, proposals: Tensor, batch: torch.Size) -> Tensor:
        """Proposals, flat ``[b, any, H, *E]`` and within the bounds."""
        step, n = (self.horizon, *self.search.event_shape), len(batch)
        shape = tuple(proposals.shape)
        if shape[:n] != batch or shape[n + 1 :] != step or len(shape) != n + 1 + len(step):
            raise ValueError(
                f"proposals have shape {shape}, expected {(*batch, 'any', *step)}: sequences as "
                "long as the horizon for every problem"
            )
        flat = proposals.reshape(batch.numel(), *shape[n:]).to(self.search.candidate_dtype)
        return self.search.project(flat)

    def _evaluate(self, cost: Cost, candidates: Tensor, batch: torch.Size) -> Tensor:
        """Costs ``[b, N]`` of candidates ``[b, N, H, *E]``."""
        given = cost(candidates.view(*batch, *candidates.shape[1:]))
        shape = (*batch, candidates.shape[1])
        if not isinstance(given, Tensor) or given.shape != shape:
            what = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"the cost returned {what}, expected one number a candidate, {shape}")
        dtype = torch.promote_types(given.dtype, torch.float32)
        return given.reshape(candidates.shape[:2]).to(dtype)

    def _check_costs(self, costs: Tensor, batch: torch.Size) -> None:
        """Raise unless all costs ``[b, N]`` are finite: NaN would pass for best or worst."""
        if bool(costs.isfinite().all()):
            return
        bad = ~costs.isfinite()
        problems = bad.any(1).view(batch).nonzero().tolist()
        raise ValueError(
            f"the cost is not finite for {int(bad.sum())} candidates, of problem(s) "
            f"{problems[:5]} in the batch {tuple(batch)}; the first is "
            f"{costs[bad][0].item()}: repair the cost, or what it is computed from"
        )


def _pick(candidates: Tensor, index: Tensor) -> Tensor:
    """Candidates ``[b, E, ...]`` of ``[b, N, ...]`` at ``index [b, E]``."""
    start = torch.arange(len(index), device=index.device).unsqueeze(1) * candidates.shape[1]
    picked = candidates.flatten(0, 1).index_select(0, (index + start).flatten())
    return picked.view(*index.shape, *candidates.shape[2:])
