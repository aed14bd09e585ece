"""The optimizers against a slow twin, known optima, and what they promise about memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conformance import assert_same

from layeredrl_torchrl.optimizers import ICEM, MPPI, CategoricalSearch

# -- a slow twin: one problem, Python lists and numpy in double precision --------------------------


def slow_optimize(optimizer, cost, noise, *, mean, elites=None, proposals=()):
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
        if step == 0:
            candidates += [np.clip(x, low, high) for x in proposals]
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
@pytest.mark.parametrize("n_proposals", [None, 0, 5])
def test_an_optimizer_equals_a_slow_twin(
    make, make_gaussian, warm, momentum, elite_ratio, n_proposals
):
    search = make_gaussian(2, -1.0, 1.5, sigma=[0.4, 0.8], dtype=torch.float64)
    optimizer = make(search, 3, n_samples=20, momentum=momentum, elite_ratio=elite_ratio)
    targets = 2 * torch.rand(4, 1, 3, 2, dtype=torch.float64) - 1

    def cost(x):
        return ((x - targets) ** 2 + 0.3 * (7 * x).sin()).sum((-2, -1))

    held = 1.0 if warm else torch.nan  # what is not warm may hold anything
    memory = optimizer.forget((4,)).apply(lambda x: held * torch.rand_like(x.double()))
    memory["warm"] = torch.full((4, 1), warm)
    noise = optimizer.draw_noise((4,))

    proposals = None  # some of which lie beyond the bounds, and some are the best there are
    if n_proposals is not None:
        proposals = targets + torch.randn(4, n_proposals, 3, 2, dtype=torch.float64)

    solution = optimizer.optimize(cost, memory, noise, proposals)

    for i in range(4):
        twin = slow_optimize(
            optimizer,
            wavy(targets[i, 0].numpy()),
            noise[i],
            mean=memory["mean"][i] if warm else torch.full((3, 2), 0.25),
            elites=memory["elites"][i] if warm and optimizer.n_kept else None,
            proposals=proposals[i].numpy() if n_proposals else (),
        )
        np.testing.assert_allclose(solution.mean[i], twin["mean"], atol=1e-10)
        np.testing.assert_allclose(solution.best[i], twin["best"], atol=1e-12)
        np.testing.assert_allclose(solution.best_cost[i], twin["best_cost"], atol=1e-10)
        np.testing.assert_allclose(solution.random[i], twin["random"], atol=1e-10)
        np.testing.assert_allclose(solution.memory["mean"][i], twin["mean"], atol=1e-10)
        if optimizer.n_kept:
            np.testing.assert_allclose(solution.memory["elites"][i], twin["elites"], atol=1e-12)
        assert solution.memory["warm"][i]


# -- choices, memory, gradients -------------------------------------------------------------------


def test_the_best_choices_of_every_problem_are_found_as_if_it_were_alone(make):
    optimizer = make(CategoricalSearch(3), 6, n_samples=200, n_iterations=8)
    wanted = torch.randint(3, (2, 2, 1, 6))

    def cost(wanted):
        return lambda x: (x != wanted).float().sum(-1)

    noise = optimizer.draw_noise((2, 2))
    solution = optimizer.optimize(cost(wanted), optimizer.forget((2, 2)), noise)
    assert torch.equal(solution.best, wanted.squeeze(2))
    assert torch.equal(solution.mean, wanted.squeeze(2))
    assert torch.equal(solution.best_cost, torch.zeros(2, 2))
    memory = solution.memory
    torch.testing.assert_close(memory["probs"].sum(-1), torch.ones(2, 2, 6))
    memory["warm"][0, 1] = False
    solution = optimizer.optimize(cost(wanted), memory, noise)
    for i, j in np.ndindex(2, 2):
        one = optimizer.optimize(cost(wanted[i, j]), memory[i, j], noise[i, j])
        for name in ("mean", "best", "best_cost", "random"):
            torch.testing.assert_close(getattr(solution, name)[i, j], getattr(one, name))
        assert_same(solution.memory[i, j], one.memory)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 9])
def test_shifting_lets_time_pass(make, make_gaussian, steps, discrete):
    optimizer = make(CategoricalSearch(3) if discrete else make_gaussian(2), 4)
    memory = optimizer.forget((2, 3)).apply(lambda x: 10 * torch.rand(x.shape), inplace=False)
    shifted = optimizer.shift(memory, steps) if steps != 1 else optimizer.shift(memory)
    assert torch.equal(shifted["warm"], memory["warm"])
    axes = {"probs" if discrete else "mean": 2} | ({"elites": 3} if optimizer.n_kept else {})
    assert shifted.keys() == {"warm", *axes}
    source = [min(h + steps, 3) for h in range(4)]
    for key, axis in axes.items():
        expected = memory[key].index_select(axis, torch.tensor(source))
        assert torch.equal(shifted[key], expected)


@pytest.mark.parametrize("discrete", [False, True])
def test_nothing_is_saved_of_what_follows_from_the_arguments(make, make_gaussian, discrete):
    assert not make(CategoricalSearch(3) if discrete else make_gaussian(2)).state_dict()


def test_no_gradient_is_kept(make):
    optimizer, weight = make(), torch.ones((), requires_grad=True)

    def cost(x):
        assert not torch.is_grad_enabled()
        return weight * x.sum((-2, -1))

    solution = optimizer.optimize(cost)
    assert not solution.mean.requires_grad
    assert not solution.best_cost.requires_grad
    assert torch.is_grad_enabled()


# -- what one of them does ------------------------------------------------------------------------


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
def test_options_of_icem_set_its_populations_and_what_is_kept(
    make_gaussian, options, populations, n_kept
):
    options = {"n_samples": 40, "n_iterations": 3, "elite_ratio": 0.1} | options
    optimizer = ICEM(make_gaussian(), 3, **options)
    assert optimizer.populations == populations
    assert optimizer.n_kept == n_kept
    assert ("elites" in optimizer.memory_spec.keys()) == (n_kept > 0)


@pytest.mark.parametrize("temperature", [1.0, 1e-20])
def test_mppi_with_equal_costs_counts_all_alike(make_gaussian, temperature):
    weights = MPPI(make_gaussian(), temperature=temperature).weigh(torch.full((2, 5), 7.0))
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


def test_a_search_is_needed(kind):
    for none in (None, CategoricalSearch):
        with pytest.raises(TypeError, match=r"search must be an object of Search.*make_search"):
            kind(none)


def add(x):
    return x.sum((-2, -1))


MISFITS = [
    (lambda o: o.optimize(lambda x: x.sum()), "one number a candidate"),
    (lambda o: o.optimize(lambda x: x.sum(-1)), "one number a candidate"),
    (lambda o: o.optimize(lambda x: 1.0), "one number a candidate"),
    (
        lambda o: o.optimize(add, o.shift(o.forget()).set("mean", torch.zeros(4, 3))),
        "'mean' has sh",
    ),
    (lambda o: o.optimize(add, o.forget().exclude("warm")), "'warm' is missing"),
    (lambda o: o.optimize(add, o.forget((0,))), "nothing to optimize"),
    (lambda o: o.optimize(add, None, o.draw_noise()[1:]), "noise"),
    (lambda o: o.optimize(add, o.forget([4]), o.draw_noise([2])), "noise has shape"),
    (lambda o: o.shift(o.forget(), -1), "steps"),
    *[
        (
            lambda o, shape=shape: o.optimize(add, o.forget((2,)), None, torch.zeros(shape)),
            r"proposals have shape .*\(2, 'any', 4, 2\)",
        )
        for shape in [(2,), (2, 4, 2), (3, 5, 4, 2), (2, 5, 3, 2), (2, 5, 4, 1), (2, 5, 4, 2, 1)]
    ],
]


@pytest.mark.parametrize(("call", "message"), MISFITS)
def test_what_does_not_fit_is_refused(make, call, message):
    with pytest.raises(ValueError, match=message):
        call(make())
