"""The optimizers against a slow twin, known optima, and what they promise about memory."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from layeredrl_torchrl.optimizers import CEM, ICEM, MPPI, CategoricalSearch

# -- a slow twin: one problem, Python lists and numpy in double precision --------------------------


def slow_optimize(optimizer, cost, noise, *, mean, elites=None):
    """One Gaussian problem ``[N_all, H, A]`` of noise, by the definitions of the papers."""
    search = optimizer.search
    low, high, sigma = (x.double().numpy() for x in (search.low, search.high, search.sigma))
    mean, std = mean.double().numpy(), np.broadcast_to(sigma, mean.shape)
    rows = iter(noise.double().numpy())

    def draw(n):
        return [np.clip(mean + std * next(rows), low, high) for _ in range(n)]

    drawn = [[next(rows) for _ in range(n)] for n in optimizer.populations]
    kept = [np.clip(mean + std * next(rows), low, high) for _ in range(optimizer.n_kept)]
    if elites is not None:
        kept = list(elites.double().numpy())
    best, best_cost = None, math.inf
    for step, part in enumerate(drawn):
        candidates = [np.clip(mean + std * z, low, high) for z in part]
        if isinstance(optimizer, ICEM):
            candidates += kept
            if step == len(drawn) - 1:
                candidates.append(np.clip(mean, low, high))
        scored = sorted(((cost(x), i) for i, x in enumerate(candidates)))[: optimizer.n_elites]
        costs = np.array([c for c, _ in scored])
        chosen = [candidates[i] for _, i in scored]
        if isinstance(optimizer, MPPI):
            weights = np.exp(-(costs - costs.min()) / (optimizer.temperature * costs.std()))
            weights /= weights.sum()
        else:
            weights = np.full(len(costs), 1 / len(costs))
        fitted = sum(w * x for w, x in zip(weights, chosen, strict=True))
        var = sum(w * (x - fitted) ** 2 for w, x in zip(weights, chosen, strict=True))
        m = optimizer.momentum
        mean = m * mean + (1 - m) * fitted
        std = m * std + (1 - m) * np.sqrt(var)
        kept = chosen[: optimizer.n_kept]
        if costs[0] < best_cost:
            best, best_cost = chosen[0], costs[0]
    (random,) = draw(1)
    return {"mean": mean, "best": best, "best_cost": best_cost, "random": random, "elites": kept}


def wavy(target):
    """A cost with a single problem's own optimum; numpy in, float out."""
    return lambda x: float(((x - target) ** 2).sum() + 0.3 * np.sin(7 * x).sum())


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.3])
@pytest.mark.parametrize("elite_ratio", [0.1, 0.5])
def test_equals_a_slow_twin(make, make_gaussian, warm, momentum, elite_ratio):
    search = make_gaussian(2, -1.0, 1.5, sigma=[0.4, 0.8], dtype=torch.float64)
    optimizer = make(search, 3, n_samples=20, momentum=momentum, elite_ratio=elite_ratio)
    targets = 2 * torch.rand(4, 1, 3, 2, dtype=torch.float64) - 1

    def cost(x):
        return ((x - targets) ** 2 + 0.3 * (7 * x).sin()).sum((-2, -1))

    memory = optimizer.forget((4,))
    memory["mean"] = torch.rand(4, 3, 2, dtype=torch.float64)
    if optimizer.n_kept:
        memory["elites"] = torch.rand(4, optimizer.n_kept, 3, 2, dtype=torch.float64)
    memory["warm"] = torch.full((4, 1), warm)
    noise = optimizer.draw_noise((4,))

    solution = optimizer.optimize(cost, memory, noise)

    for i in range(4):
        twin = slow_optimize(
            optimizer,
            wavy(targets[i, 0].numpy()),
            noise[i],
            mean=memory["mean"][i] if warm else torch.full((3, 2), 0.25),
            elites=memory["elites"][i] if warm and optimizer.n_kept else None,
        )
        np.testing.assert_allclose(solution.mean[i], twin["mean"], atol=1e-10)
        np.testing.assert_allclose(solution.best[i], twin["best"], atol=1e-12)
        np.testing.assert_allclose(solution.best_cost[i], twin["best_cost"], atol=1e-10)
        np.testing.assert_allclose(solution.random[i], twin["random"], atol=1e-10)
        np.testing.assert_allclose(solution.memory["mean"][i], twin["mean"], atol=1e-10)
        if optimizer.n_kept:
            np.testing.assert_allclose(solution.memory["elites"][i], twin["elites"], atol=1e-12)
        assert solution.memory["warm"][i]


# -- optima ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_finds_the_optimum_inside_and_on_the_bounds(make, make_gaussian, batch):
    optimizer = make(make_gaussian(2), 3, n_samples=300, n_iterations=12)
    target = 3 * torch.rand(*batch, 1, 3, 2) - 1.5  # some of it beyond the bounds
    memory = optimizer.forget(batch)
    solution = optimizer.optimize(lambda x: (x - target).square().sum((-2, -1)), memory)
    expected = target.squeeze(-3).clamp(-1, 1)
    assert solution.mean.shape == (*batch, 3, 2)
    assert solution.best_cost.shape == batch
    assert solution.memory.batch_size == batch
    torch.testing.assert_close(solution.mean, expected, atol=0.06, rtol=0)
    torch.testing.assert_close(solution.best, expected, atol=0.1, rtol=0)


def test_finds_the_best_choices(make):
    optimizer = make(CategoricalSearch(3), 6, n_samples=200, n_iterations=8)
    wanted = torch.randint(3, (4, 1, 6))
    solution = optimizer.optimize(
        lambda x: (x != wanted).float().sum(-1) + 0.0, optimizer.forget((4,))
    )
    assert torch.equal(solution.best, wanted.squeeze(1))
    assert torch.equal(solution.mean, wanted.squeeze(1))
    assert torch.equal(solution.best_cost, torch.zeros(4))
    torch.testing.assert_close(solution.memory["probs"].sum(-1), torch.ones(4, 6))


def test_the_best_is_the_best_of_all_that_were_evaluated(make):
    seen = []

    def cost(x):
        seen.append((x, (9 * x).sin().sum((-2, -1)) + x.square().sum((-2, -1))))
        return seen[-1][1]

    optimizer = make()
    solution = optimizer.optimize(cost, optimizer.forget((2,)))
    candidates, costs = (torch.cat(x, 1) for x in zip(*seen, strict=True))
    for b in range(2):
        index = int(costs[b].argmin())
        assert solution.best_cost[b] == costs[b, index]
        assert torch.equal(solution.best[b], candidates[b, index])


def test_a_warm_start_goes_on_where_the_last_call_ended(make, make_gaussian):
    target = 1.6 * torch.rand(8, 1, 10, 3) - 0.8

    def cost(x):
        return (x - target).square().sum((-2, -1))

    optimizer = make(make_gaussian(3), 10)
    first = optimizer.optimize(cost, optimizer.forget((8,)))
    second = optimizer.optimize(cost, first.memory)
    cold = optimizer.optimize(cost, optimizer.forget((8,)))
    assert cost(second.mean.unsqueeze(1)).mean() < 0.6 * cost(cold.mean.unsqueeze(1)).mean()


# -- batches, memory, randomness ------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [False, True])
def test_a_batch_gives_what_its_problems_give(make, make_gaussian, discrete):
    optimizer = make(CategoricalSearch(4) if discrete else make_gaussian(2), 3, n_samples=30)
    target = torch.randint(4, (2, 3, 1, 3)) if discrete else torch.rand(2, 3, 1, 3, 2)

    memory = optimizer.optimize(
        lambda x: x.float().flatten(3).sum(-1), optimizer.forget((2, 3))
    ).memory
    memory["warm"][0, 1] = False
    noise = optimizer.draw_noise((2, 3))

    def cost(target):
        dims = (-1,) if discrete else (-2, -1)
        return lambda x: (x - target).float().square().sum(dims)

    batched = optimizer.optimize(cost(target), memory, noise)
    for i in range(2):
        for j in range(3):
            one = optimizer.optimize(cost(target[i, j]), memory[i, j], noise[i, j])
            for name in ("mean", "best", "best_cost", "random"):
                torch.testing.assert_close(getattr(batched, name)[i, j], getattr(one, name))
            for key, value in one.memory.items():
                torch.testing.assert_close(batched.memory[i, j][key], value)


def test_forgetting_one_problem_leaves_the_others_bit_equal(make):
    optimizer = make()
    target = torch.rand(3, 1, 4, 2)

    def cost(x):
        return (x - target).square().sum((-2, -1))

    memory = optimizer.optimize(cost, optimizer.forget((3,))).memory
    reset = memory.clone()
    reset[1] = optimizer.forget()
    noise = optimizer.draw_noise((3,))
    kept, changed = (optimizer.optimize(cost, m, noise) for m in (memory, reset))
    fresh = optimizer.optimize(cost, optimizer.forget((3,)), noise)
    for i in (0, 2):
        assert torch.equal(kept.mean[i], changed.mean[i])
        assert (kept.memory[i] == changed.memory[i]).all()
    assert torch.equal(changed.mean[1], fresh.mean[1])
    assert not torch.equal(changed.mean[1], kept.mean[1])


def test_what_is_cold_does_not_count(make):
    """A memory that is not warm may hold anything."""
    optimizer = make()
    noise = optimizer.draw_noise()
    garbage = optimizer.forget()
    garbage["mean"].fill_(torch.nan)
    if optimizer.n_kept:
        garbage["elites"].fill_(torch.nan)
    results = [
        optimizer.optimize(lambda x: x.square().sum((-2, -1)), memory, noise).mean
        for memory in (optimizer.forget(), garbage, None)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_gradient_is_kept(make):
    optimizer, weight = make(), torch.ones((), requires_grad=True)

    def cost(x):
        assert not torch.is_grad_enabled()
        return weight * x.sum((-2, -1))

    solution = optimizer.optimize(cost)
    assert not solution.mean.requires_grad
    assert not solution.best_cost.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("steps", [0, 1, 2, 9])
def test_shifting_lets_time_pass(make, steps):
    optimizer = make(horizon=4)
    memory = optimizer.optimize(lambda x: x.sum((-2, -1)), optimizer.forget((2, 3))).memory
    shifted = optimizer.shift(memory, steps)
    assert torch.equal(shifted["warm"], memory["warm"])
    for h in range(4):
        source = min(h + steps, 3)
        assert torch.equal(shifted["mean"][..., h, :], memory["mean"][..., source, :])
        if optimizer.n_kept:
            assert torch.equal(shifted["elites"][..., h, :], memory["elites"][..., source, :])


def test_shifting_choices(make):
    optimizer = make(CategoricalSearch(3), 5, n_samples=30)
    memory = optimizer.optimize(lambda x: x.sum(-1).float(), optimizer.forget((2,))).memory
    shifted = optimizer.shift(memory)
    assert torch.equal(shifted["probs"], memory["probs"][:, [1, 2, 3, 4, 4]])
    if optimizer.n_kept:
        assert torch.equal(shifted["elites"], memory["elites"][..., [1, 2, 3, 4, 4]])


def test_the_seed_decides(make):
    optimizer = make()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(optimizer.optimize(lambda x: x.square().sum((-2, -1))).random)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_bounds_are_never_left_even_by_a_strange_memory(make, make_gaussian):
    optimizer = make(make_gaussian(2, 0.3, 0.9, sigma=5.0), 4)
    memory = optimizer.forget((3,))
    memory["warm"].fill_(True)  # of zeros, which lie outside
    seen = []

    def cost(x):
        seen.append(x)
        return x.sum((-2, -1))

    solution = optimizer.optimize(cost, memory)
    for x in (*seen, solution.mean, solution.best, solution.random, solution.memory["mean"]):
        assert x.min() >= 0.3
        assert x.max() <= torch.tensor(0.9)


def test_a_constant_cost_moves_nothing_but_noise(make):
    optimizer = make(n_iterations=1, n_samples=400, elite_ratio=1.0, momentum=0.0)
    solution = optimizer.optimize(lambda x: torch.zeros(x.shape[:-2]))
    assert solution.mean.abs().max() < 0.15


# -- what one of them does ------------------------------------------------------------------------


def recorded(optimizer, memory, batch=()):
    seen = []

    def cost(x):
        seen.append(x)
        return (x - 0.3).square().sum((-2, -1))

    return optimizer.optimize(cost, memory), seen


def rows(x):
    return {tuple(r) for r in x.flatten(1).tolist()}


def test_icem_keeps_elites_and_tries_the_mean(make_gaussian):
    optimizer = ICEM(make_gaussian(2), 4, n_samples=40, n_iterations=4, elite_ratio=0.25)
    assert optimizer.populations == (40, 32, 26, 20)  # 40 / 1.25^i, not below twice the elites
    assert optimizer.n_kept == 3
    solution, seen = recorded(optimizer, optimizer.forget())
    assert [len(x) for x in seen] == [40 + 3, 32 + 3, 26 + 3, 20 + 3 + 1]
    for before, after in pairwise(seen):
        order = (before - 0.3).square().sum((-2, -1)).argsort()
        assert rows(before[order[:3]]) <= rows(after)
    last = (seen[-1] - 0.3).square().sum((-2, -1)).argsort()
    assert rows(solution.memory["elites"]) == rows(seen[-1][last[:3]])

    shifted = optimizer.shift(solution.memory)
    _, seen = recorded(optimizer, shifted)
    assert rows(shifted["elites"]) <= rows(seen[0])
    assert not rows(shifted["elites"]) & rows(recorded(optimizer, optimizer.forget())[1][0])


def test_icem_tries_the_mean_in_the_last_iteration(make_gaussian):
    optimizer = ICEM(make_gaussian(1), 3, n_samples=10, n_iterations=1, elite_ratio=0.3)
    _, seen = recorded(optimizer, optimizer.forget())
    assert torch.equal(seen[0][-1], torch.zeros(3, 1))


@pytest.mark.parametrize(("beta", "smooth"), [(0.0, False), (3.0, True)])
def test_icem_draws_correlated_noise(make_gaussian, beta, smooth):
    optimizer = ICEM(make_gaussian(2), 12, n_samples=500, beta=beta)
    noise = optimizer.draw_noise()
    steps = noise.diff(dim=1).square().mean().item()
    assert (steps < 0.4) if smooth else (steps == pytest.approx(2.0, rel=0.05))


@pytest.mark.parametrize(
    ("options", "populations", "n_kept"),
    [
        ({"decay": 1.0}, (40, 40, 40), 1),
        ({"decay": 2.0}, (40, 20, 10), 1),
        ({"decay": 2.0, "elite_ratio": 0.3, "keep_ratio": 0.0}, (40, 24, 24), 0),
        ({"elite_ratio": 0.8, "keep_ratio": 1.0}, (40, 40, 40), 32),
    ],
)
def test_icem_options(make_gaussian, options, populations, n_kept):
    options = {"n_samples": 40, "n_iterations": 3, "elite_ratio": 0.1} | options
    optimizer = ICEM(make_gaussian(), 3, **options)
    assert optimizer.populations == populations
    assert optimizer.n_kept == n_kept
    assert ("elites" in optimizer.memory_spec.keys()) == (n_kept > 0)


@pytest.mark.parametrize("change", [lambda c: c + 1e4, lambda c: 1e-6 * c, lambda c: 1e6 * c - 3])
def test_mppi_does_not_mind_the_scale_of_the_cost(make_gaussian, change):
    optimizer = MPPI(make_gaussian(dtype=torch.float64), 3, n_samples=64)
    noise = optimizer.draw_noise()

    def cost(x):
        return (x - 0.3).square().sum((-2, -1))

    first = optimizer.optimize(cost, noise=noise).mean
    second = optimizer.optimize(lambda x: change(cost(x)), noise=noise).mean
    torch.testing.assert_close(first, second, atol=2e-2, rtol=0)


def test_mppi_between_the_best_and_all_alike(make_gaussian):
    """Cold it takes the best of all; hot it is CEM."""
    options = {"n_samples": 64, "n_iterations": 1, "momentum": 0.0, "elite_ratio": 0.5}
    cold, hot = (MPPI(make_gaussian(), 3, temperature=t, **options) for t in (1e-4, 1e6))
    cem = CEM(make_gaussian(), 3, **options)
    noise = cem.draw_noise()

    def cost(x):
        return (x - 0.3).square().sum((-2, -1))

    best = cold.optimize(cost, noise=noise)
    torch.testing.assert_close(best.mean, best.best)
    equal = cem.optimize(cost, noise=noise)
    torch.testing.assert_close(hot.optimize(cost, noise=noise).mean, equal.mean)
    assert not torch.allclose(best.mean, equal.mean, atol=0.1)


def test_mppi_with_equal_costs_counts_all_alike(make_gaussian):
    weights = MPPI(make_gaussian()).weigh(torch.full((2, 5), 7.0))
    assert torch.equal(weights, torch.full((2, 5), 0.2))


# -- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [False, True])
def test_it_neither_waits_for_a_device_nor_copies_to_it(make, make_gaussian, accelerator, discrete):
    """Bounds, memory and noise are where the module is, and no shape is taken from data."""
    search = CategoricalSearch(3) if discrete else make_gaussian(2)
    optimizer = accelerator.move(make(search, n_iterations=3))
    with accelerator.watched():
        memory = optimizer.forget((5,))
        step = () if discrete else (2,)
        proposals = torch.zeros(5, 1, 4, *step, device=accelerator.device)
        for _ in range(2):
            found = optimizer.optimize(
                lambda x: x.float().flatten(2).sum(-1), memory, None, proposals
            )
            memory = optimizer.shift(found.memory)
        for value in (found.mean, found.best, found.best_cost, found.random, *memory.values()):
            assert value.device == torch.empty((), device=accelerator.device).device
    for cost, what in (
        (lambda x: x.flatten(2).sum(-1) * x.sum().item(), "waits for"),
        (lambda x: x.flatten(2).sum(-1) + torch.ones(()).to(x.device), "copies to"),
    ):
        with pytest.raises(AssertionError, match=what), accelerator.watched():
            optimizer.optimize(cost, optimizer.forget((5,)))


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_cost_that_is_not_finite_names_its_problem(make, value):
    optimizer = make()

    def cost(x):
        costs = x.square().sum((-2, -1))
        costs[1, 2, 5] = value
        return costs

    with pytest.raises(ValueError, match=r"not finite .*problem\(s\) \[\[1, 2\]\]"):
        optimizer.optimize(cost, optimizer.forget((2, 3)))


def test_a_cost_of_another_shape_is_refused(make):
    for wrong in (lambda x: x.sum(), lambda x: x.sum(-1), lambda x: 1.0):
        with pytest.raises(ValueError, match="one number a candidate"):
            make().optimize(wrong)


def test_a_memory_that_does_not_fit_is_refused(make, make_gaussian):
    optimizer = make(horizon=4)
    other = make(make_gaussian(3), horizon=4).forget()
    with pytest.raises(ValueError, match="'mean' has shape"):
        optimizer.optimize(lambda x: x.sum((-2, -1)), other)
    with pytest.raises(ValueError, match="'warm' is missing"):
        optimizer.optimize(lambda x: x.sum((-2, -1)), optimizer.forget().exclude("warm"))
    with pytest.raises(ValueError, match="no problem"):
        optimizer.optimize(lambda x: x.sum((-2, -1)), optimizer.forget((0,)))
    with pytest.raises(ValueError, match="noise"):
        optimizer.optimize(lambda x: x.sum((-2, -1)), None, optimizer.draw_noise()[1:])
    with pytest.raises(ValueError, match="steps"):
        optimizer.shift(optimizer.forget(), -1)


def test_a_search_is_needed(kind):
    for none in (None, CategoricalSearch):
        with pytest.raises(TypeError, match=r"search must be an object of Search.*make_search"):
            kind(none)
