"""The loop that all sampling optimizers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.data import Binary, Composite, Unbounded

from layeredrl_torchrl._checks import check_instance, check_number, check_positive_int
from layeredrl_torchrl._watch import refuse, watched
from layeredrl_torchrl.optimizers.search import Parameters, Search

__all__ = ["Cost", "Optimizer", "Solution"]

Cost: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """The result of an optimizer for problems ``[*B]``; a step of a sequence has shape ``*E``.

    >>> icem = ICEM(make_search(Bounded(-1.0, 1.0, (2,))), horizon=4)
    >>> solution = icem.optimize(lambda x: x.square().sum((-2, -1)), icem.forget([3]))
    >>> solution.mean.shape, solution.best_cost.shape
    (torch.Size([3, 4, 2]), torch.Size([3]))

    Attributes:
        mean: The middle of the final distribution, ``[*B, H, *E]``.
        best: The candidate with the lowest cost, ``[*B, H, *E]``.
        best_cost: Its cost, ``[*B]``.
        random: A sample of the final distribution, ``[*B, H, *E]``.
        memory: Where the next call can start, ``[*B]``; see :attr:`Optimizer.memory_spec`.
    """

    mean: Tensor
    best: Tensor
    best_cost: Tensor
    random: Tensor
    memory: TensorDictBase


class Optimizer(nn.Module):
    """Minimises costs of sequences by sampling; batched over independent problems ``[*B]``.

    Each iteration draws candidates, evaluates them, and fits a distribution to the best of them;
    the next candidates are drawn from it. By default this is the cross-entropy method. A subclass
    overrides the noise (:meth:`colour`), the candidates (:meth:`propose`), or the weights of the
    best (:meth:`weigh`).

    An optimizer has no state. To start the next call from a solution, pass ``Solution.memory`` as
    its ``memory``. A memory is used only where its entry ``"warm"`` is true, so zeros are an empty
    memory.

    The loop neither waits for the device nor takes a shape from data, so that it can be captured
    as a CUDA graph; noise, memory and constants are on the device of the search's bounds.

    >>> optimizer = ICEM(make_search(Bounded(-1.0, 1.0, (2,))), horizon=4)
    >>> cost = lambda x: x.square().sum((-2, -1))  # [*B, N, H, A] -> [*B, N]
    >>> first = optimizer.optimize(cost, optimizer.forget([3]))  # three problems
    >>> second = optimizer.optimize(cost, first.memory)
    >>> bool((second.best_cost <= first.best_cost).all())
    True

    Args:
        search: The family of distributions, with its bounds.
        horizon: ``H``.
        n_samples: Candidates drawn in the first iteration, at least 2.
        n_iterations: Number of iterations.
        elite_ratio: Share of ``n_samples`` to which the distribution is fitted, in ``(0, 1]``.
        momentum: Share of the old parameters in the new ones, in ``[0, 1)``.
        decay: Factor, at least 1, by which the number of candidates shrinks from iteration to
            iteration, though never below twice the elites.
        keep_ratio: Share of the elites passed to :meth:`propose` in the next iteration and, with
            the memory, in the next call; in ``[0, 1]``.

    Raises:
        TypeError: ``search`` that is not a :class:`Search`; numbers of another kind. ValueError:
            Numbers outside their range; an ``elite_ratio`` that makes fewer than two elites.
    """

    def __init__(
        self,
        search: Search,
        horizon: int = 15,
        *,
        n_samples: int = 256,
        n_iterations: int = 6,
        elite_ratio: float = 0.1,
        momentum: float = 0.1,
        decay: float = 1.0,
        keep_ratio: float = 0.0,
    ) -> None:
        super().__init__()
        check_instance("search", search, Search, hint="build it with make_search(action_spec)")
        self.search = search
        self.horizon = check_positive_int("horizon", horizon)
        check_positive_int("n_samples", n_samples, minimum=2)
        check_positive_int("n_iterations", n_iterations)
        check_number("elite_ratio", elite_ratio, 0.0, 1.0, open_low=True)
        self.momentum = check_number("momentum", momentum, 0.0, 1.0, open_high=True)
        check_number("decay", decay, 1.0)
        check_number("keep_ratio", keep_ratio, 0.0, 1.0)
        self.n_elites = round(elite_ratio * n_samples)
        if self.n_elites < 2:
            raise ValueError(
                f"elite_ratio={elite_ratio} of n_samples={n_samples} makes {self.n_elites} "
                "elites, expected at least 2 (one has no spread); change elite_ratio or "
                "n_samples"
            )
        self.n_kept = round(keep_ratio * self.n_elites)
        least = min(2 * self.n_elites, n_samples)
        self.populations = tuple(
            max(round(n_samples * decay**-i), least) for i in range(n_iterations)
        )
        self._shapes = {key: tuple(spec.shape) for key, spec in self.memory_spec.items()}

    def colour(self, white: Tensor) -> Tensor:
        """Correlate independent standard normal noise ``[b, N, H, *E]`` over time.

        A hook; by default noise stays white. Single samples must stay standard normal.
        """
        return white

    def propose(self, step: int, parameters: Parameters, noise: Tensor, kept: Tensor) -> Tensor:
        """Return the candidates ``[b, any, H, *E]`` of an iteration.

        A hook; by default they are samples of the distribution.

        Args:
            step: The iteration, from 0.
            parameters: Parameters of the distribution.
            noise: ``[b, populations[step], H, *E]``.
            kept: The best candidates of the previous iteration, ``[b, n_kept, H, *E]``; at first
                those of the previous call, or samples.
        """
        return self.search.sample(parameters, noise)

    def weigh(self, cost: Tensor) -> Tensor:
        """Return weights of the elites, with sum 1, from their costs ``[b, n_elites]``.

        The costs are sorted, lowest first. A hook; by default the weights are equal.
        """
        return torch.full_like(cost, 1.0 / cost.shape[1])

    # -- memory -----------------------------------------------------------------------------

    @property
    def memory_spec(self) -> Composite:
        """Spec of the memory of one problem; zeros of it are an empty memory."""
        spec = self.search.memory_spec(self.horizon)
        if self.n_kept:
            shape = (self.n_kept, self.horizon, *self.search.event_shape)
            spec["elites"] = Unbounded(shape, dtype=self.search.candidate_dtype)
        spec["warm"] = Binary(1, (1,), dtype=torch.bool)
        return spec

    def forget(
        self, batch: Sequence[int] = (), device: torch.device | str | None = None
    ) -> TensorDict:
        """Return an empty memory for problems ``[*B]``, by default on the search's device."""
        device = self.search.device if device is None else torch.device(device)
        empty = {
            key: torch.zeros((*batch, *spec.shape), dtype=spec.dtype, device=device)
            for key, spec in self.memory_spec.items()
        }
        return TensorDict(empty, batch, device=device)

    def shift(self, memory: TensorDictBase, steps: int = 1) -> TensorDictBase:
        """Shift a memory by ``steps``: drop its first steps and repeat its last one.

        Args:
            memory: ``[*B]``; it is not changed.
            steps: At least 0.
        """
        steps = min(check_positive_int("steps", steps, minimum=0), self.horizon - 1)
        moved = {}
        for key, value in memory.items():
            if key == "warm":
                moved[key] = value
                continue
            # After the batch axes come [H, ...], or [n_kept, H, ...] for elites.
            axis = memory.ndim + (key == "elites")
            last = value.narrow(axis, self.horizon - 1, 1)
            rest = value.narrow(axis, steps, self.horizon - steps)
            moved[key] = torch.cat([rest, *[last] * steps], axis)
        return TensorDict(moved, memory.batch_size, device=memory.device)

    # -- the loop ---------------------------------------------------------------------------

    def draw_noise(
        self, batch: Sequence[int] = (), device: torch.device | str | None = None
    ) -> Tensor:
        """Draw all noise of one call, ``[*B, N_all, H, *E]``: standard normal and coloured.

        Args:
            batch: ``*B``.
            device: The device of the search by default.
        """
        n = sum(self.populations) + self.n_kept + 1
        shape = (torch.Size(batch).numel(), n, self.horizon, *self.search.event_shape)
        white = torch.randn(shape, dtype=self.search.dtype, device=device or self.search.device)
        return self.colour(white).view(*batch, *shape[1:])

    @watched
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
            memory: ``[*B]``, with the batch shape of the problems; ``None`` for an empty memory of
                a single problem.
            noise: From :meth:`draw_noise`; drawn by default.
            proposals: Further candidates of the first iteration, ``[*B, any, H, *E]``; they are
                clipped to the bounds.

        Raises:
            ValueError: Costs that are not finite (the message names the problems), or of
                another shape; noise, a memory or proposals that do not fit this optimizer.
        """
        memory = self.forget() if memory is None else memory
        batch = memory.batch_size
        entries = self._read(memory)
        warm = entries.pop("warm").squeeze(-1)
        noise = self.draw_noise(batch, warm.device) if noise is None else noise
        sizes = [*self.populations, self.n_kept, 1]
        needed = (sum(sizes), self.horizon, *self.search.event_shape)
        if noise.shape != (*batch, *needed):
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}, expected {(*batch, *needed)}; use "
                f"draw_noise({list(batch)})"
            )
        noise = noise.reshape(len(warm), *needed).to(self.search.dtype)
        *parts, of_kept, of_random = noise.split(sizes, dim=1)

        parameters = self.search.start(entries, warm)
        kept = self.search.sample(parameters, of_kept)
        if self.n_kept:
            cold = ~_with_axes_of(warm, kept)
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
            elites = candidates.take_along_dim(_with_axes_of(index, candidates), 1)
            fitted = self.search.fit(elites, self.weigh(elite_cost))
            pairs = zip(fitted, parameters, strict=True)
            parameters = tuple(new.lerp(old, self.momentum) for new, old in pairs)
            kept = elites[:, : self.n_kept]
            least = elite_cost[:, 0]
            best = torch.where(_with_axes_of(least < best_cost, best), elites[:, 0], best)
            best_cost = torch.minimum(least, best_cost)
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
        left = TensorDict(found, batch, device=warm.device)
        return Solution(mean, best, best_cost.view(batch), random, left)

    def _read(self, memory: TensorDictBase) -> dict[str, Tensor]:
        """Check a memory and return its entries, flat ``[b, ...]``."""
        batch, entries = memory.batch_size, {}
        if batch.numel() == 0:
            raise ValueError(f"the memory has batch shape {tuple(batch)}: nothing to optimize")
        for key, shape in self._shapes.items():
            value = memory.get(key, None)
            if value is None or value.shape != (*batch, *shape):
                found = "is missing" if value is None else f"has shape {tuple(value.shape)}"
                raise ValueError(
                    f"the memory's entry {key!r} {found}, expected {(*batch, *shape)}; start "
                    "from forget(), or from the memory of an optimizer built like this one"
                )
            entries[key] = value.reshape(-1, *shape)
            if value.is_floating_point():
                entries[key] = entries[key].to(self.search.dtype)
        return entries

    def _read_proposals(self, proposals: Tensor, batch: torch.Size) -> Tensor:
        """Check proposals and return them flat ``[b, any, H, *E]``, within the bounds."""
        step, n = (self.horizon, *self.search.event_shape), len(batch)
        shape = tuple(proposals.shape)
        if shape[:n] != batch or shape[n + 1 :] != step:
            raise ValueError(
                f"proposals have shape {shape}, expected {(*batch, 'any', *step)}: sequences as "
                "long as the horizon for every problem"
            )
        flat = proposals.reshape(batch.numel(), *shape[n:]).to(self.search.candidate_dtype)
        return self.search.project(flat)

    def _evaluate(self, cost: Cost, candidates: Tensor, batch: torch.Size) -> Tensor:
        """Return the costs ``[b, N]`` of candidates ``[b, N, H, *E]``."""
        given = cost(candidates.view(*batch, *candidates.shape[1:]))
        shape = (*batch, candidates.shape[1])
        if not isinstance(given, Tensor) or given.shape != shape:
            what = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"the cost returned {what}, expected one number a candidate, {shape}")
        dtype = torch.promote_types(given.dtype, torch.float32)
        return given.reshape(candidates.shape[:2]).to(dtype)

    def _check_costs(self, costs: Tensor, batch: torch.Size) -> None:
        """Refuse costs ``[b, N]`` that are not finite; NaN could be ranked as best or worst."""

        def error(bad: Tensor) -> Exception:
            problems = bad.view(batch).nonzero().tolist()
            return ValueError(
                f"the cost is not finite for some candidates of problem(s) {problems[:5]} in the "
                f"batch {tuple(batch)}; repair the cost, or what it is computed from"
            )

        refuse((~costs.isfinite()).any(1), error)


def _with_axes_of(x: Tensor, other: Tensor) -> Tensor:
    """Append axes of size 1 until ``x`` has as many axes as ``other``."""
    return x.view(x.shape + (1,) * (other.ndim - x.ndim))
