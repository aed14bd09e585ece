"""The rows of `gpu_table.py` and the ways to run each; that script times them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from planning import make_predictor as make_planning_predictor
from rollout import ACTION, STATE, Case
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer, Unbounded

from layeredrl_torchrl import (
    CEMPlanner,
    ICEMPlanner,
    IdentityEncoder,
    ModelLoss,
    PredictorPlanner,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    RewardNet,
    RewardPredictor,
    ValueNet,
)

Run = Callable[[], object]
Ways = dict[str, Callable[[], Run]]  # a function that makes each way; it may fail


# -- ways to run one function --------------------------------------------------------------------


def captured(run: Run) -> Run:
    """Capture an unchanged function as one CUDA graph; waiting for the device raises."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(
        _keeps: Run = run,
    ) -> None:  # the tensors that the graph reads, which it does not own
        graph.replay()

    return replay


def ways_on(device: str) -> tuple[str, ...]:
    if torch.device(device).type != "cuda":
        return ("eager", "compiled")
    return ("eager", "graph", "compiled graph", "compiled", "captured", "compiled captured")


def compile_as(way: str, part: nn.Module) -> None:
    """Compile `part` with its own `compile`."""
    compiled = {"dynamic": False} if way.startswith("compiled") else {"backend": "eager"}
    if "graph" in way:
        if "cudagraphs" not in inspect.signature(part.compile).parameters:
            raise NotImplementedError(f"{type(part).__name__}.compile takes no cudagraphs=")
        part.compile(cudagraphs=True, **compiled)
    elif way.startswith("compiled"):
        part.compile(**compiled)


def cast(run: Run, device: str, dtype: torch.dtype | None) -> Run:
    kind = torch.device(device).type

    def inner() -> object:
        with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            return run()

    return inner


def in_graph(device: str, run: Run) -> Run:
    return captured(run) if torch.device(device).type == "cuda" else run


def chains(device: str, *parts: tuple[int, int, int, tuple[int, ...]]) -> Ways:
    """Matrix products alone, of `members` networks on `rows` rows, `steps` times for each part."""

    def make(dtype: torch.dtype) -> Run:
        made = []
        for steps, members, rows, sizes in parts:
            new = partial(torch.randn, device=device, dtype=dtype)
            inputs = [new(members, rows, size) for size in sizes[:-1]]
            weights = [new(members, *shape) for shape in pairwise(sizes)]
            made.append((steps, list(zip(inputs, weights, strict=True))))

        @torch.no_grad()
        def run() -> None:
            for steps, pairs in made:
                for _ in range(steps):
                    for x, weight in pairs:
                        torch.bmm(x, weight)

        return in_graph(device, run)

    return {
        "products": lambda: make(torch.float32),
        "products bf16": lambda: make(torch.bfloat16),
    }


# -- rows ----------------------------------------------------------------------------------------


def rollout_row(case: Case, device: str) -> Ways:
    sizes = (STATE + ACTION, *case.hidden, case.n_modes * (2 * STATE + 1) + 1)
    state = torch.randn(case.batch, STATE, device=device)
    actions = torch.rand(case.batch, case.horizon, ACTION, device=device) * 2 - 1

    def make(way: str, dtype: torch.dtype | None) -> Run:
        torch.manual_seed(0)
        model = case.ensemble(device)
        compile_as(way, model)
        run = cast(torch.no_grad()(lambda: model.rollout(state, None, actions)), device, dtype)
        return captured(run) if "captured" in way else run

    part = (case.horizon, case.n_models, case.batch * case.n_particles, sizes)
    ways = chains(device, part)
    for way in ways_on(device):
        ways[way] = partial(make, way, None)
        ways[f"{way} bf16"] = partial(make, way, torch.bfloat16)
    return ways


def gradient_row(hidden: tuple[int, ...], batch: int, device: str) -> Ways:
    """A gradient step of five members on a shared batch: the loss, its gradients and Adam.

    Here `graph` is torch's capture of the whole step, as in a user's own training loop.
    """
    sizes = (STATE + ACTION, *hidden, 2 * STATE + 2)

    def make(way: str) -> Run:
        torch.manual_seed(0)
        model = Case(hidden=hidden).ensemble(device)
        losses = ModelLoss(model)
        if way.startswith("compiled"):
            losses.compile(dynamic=False)
        on_gpu = torch.device(device).type == "cuda"
        weights = [p for p in model.parameters() if p.requires_grad]
        optim = torch.optim.Adam(weights, lr=1e-3, fused=True, capturable=on_gpu)
        state = torch.randn(batch, STATE, device=device)
        following = {"state": state + 0.1 * torch.randn_like(state)}
        following["terminated"] = torch.zeros(batch, 1, dtype=torch.bool, device=device)
        data = {"state": state, "context": state[:, :0], "next": following}
        data["action"] = torch.rand(batch, ACTION, device=device)
        td = TensorDict(data, [batch])

        def step() -> None:
            optim.zero_grad()
            terms = losses(td)
            (terms["loss_dynamics"] + terms["loss_termination"]).backward()
            optim.step()

        return captured(step) if "graph" in way else step

    # Forward, and the gradients by weights and by inputs.
    ways = chains(device, (3, 5, batch, sizes))
    return ways | {way: partial(make, way) for way in ways_on(device) if "captured" not in way}


def learn_row(hidden: tuple[int, ...], batch: int, n_updates: int, device: str) -> Ways:
    """One update of `RewardPredictor.learn`: the time of a call divided by its updates."""
    action = Bounded(-1.0, 1.0, (ACTION,)).to(device)
    sizes = (STATE + ACTION, *hidden, 2 * STATE + 2)

    def make(way: str) -> Run:
        torch.manual_seed(0)
        model = ProbabilisticEnsemble(
            state_space=Unbounded((STATE,)),
            context_space=None,
            action_space=Bounded(-1.0, 1.0, (ACTION,)),
            partial_net=partial(ProbFCDynamics, hidden_sizes=hidden),
            n_models=5,
        )
        predictor = RewardPredictor(
            model=model,
            val_func=ValueNet(STATE, 0, hidden),
            rew_func=RewardNet(STATE, 0, Bounded(-1.0, 1.0, (ACTION,)), hidden),
            encoder=IdentityEncoder((STATE,)),
            latent_state_dim=STATE,
        ).to(device)
        if "graph" in way:
            compile_as(way, predictor)
        elif way == "compiled":
            predictor.model_loss.compile()
            predictor.predictor_loss.compile()
        n = 4000
        obs, no = torch.randn(n + 1, STATE), torch.zeros(n, 1, dtype=torch.bool)
        following = {"observation": obs[1:], "reward": torch.randn(n, 1), "terminated": no}
        following["done"] = (torch.arange(1, n + 1) % 200 == 0).unsqueeze(-1)
        data = {"observation": obs[:-1], "action": action.rand((n,)).cpu(), "next": following}
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(n, device=device))
        buffer.extend(TensorDict(data, [n]).to(device))
        return lambda: predictor.learn(buffer, n_updates, batch, batch, 0)

    # The ensemble, and one network each for reward, value and its target.
    value, reward = (STATE, *hidden, 1), (STATE + ACTION, *hidden, 1)
    steps = [3 * n_updates, 3 * n_updates, 4 * n_updates]
    parts = zip(steps, (5, 1, 1), (batch,) * 3, (sizes, reward, value), strict=True)
    ways = chains(device, *parts)
    return ways | {way: partial(make, way) for way in ways_on(device) if "captured" not in way}


def plan_row(
    kind: type[PredictorPlanner], n: int, members: int, options: dict, device: str
) -> Ways:
    """One plan for `n` environments, with the memory of the plan before."""
    hidden, reward = (128, 128), (STATE + ACTION, 128, 128, 1)
    sizes = (STATE + ACTION, *hidden, 2 * STATE + 2)

    def make(way: str) -> Run:
        predictor = make_planning_predictor(members, device)
        planner = kind(predictor, **options).to(device)
        compile_as(way, planner)
        td = planner.forget((n,), device=device)
        td["observation"] = torch.randn(n, STATE, device=device)
        key = planner.plan_key

        @torch.no_grad()
        def run() -> None:
            td[key] = planner(td.copy())["next", key]

        if "captured" in way:
            return captured(torch.no_grad()(lambda: planner(td.copy())))
        return run

    rows = n * options["n_samples"]
    steps = options["n_iterations"] * options["horizon"]
    ways = chains(device, (steps, members, rows, sizes), (steps, 1, members * rows, reward))
    return ways | {way: partial(make, way) for way in ways_on(device)}


def rows_of(
    device: str, only: tuple[str, ...] = (), *, quick: bool = False
) -> dict[str, tuple[Callable[[], Ways], int]]:
    """Return for each row a function that makes it, and the divisor of its times.

    `only` selects rows by parts of their names; `quick` makes all sizes tiny.
    """
    on_gpu = torch.device(device).type == "cuda"
    small = Case(n_modes=4)
    middle = Case(500, 5, 4, 30, (200,) * 4)
    large = Case(4096, 5, 20, 30, (512,) * 3)
    cem = {"horizon": 15, "n_samples": 256, "n_iterations": 6}
    icem = {"horizon": 30, "n_samples": 64, "n_iterations": 3}
    many, batch, n_updates, narrow, wide, three = 256, 256, 100, (128, 128), (200,) * 4, (200,) * 3
    if quick:
        shapes = {"n_particles": 2, "horizon": 3, "hidden": (8, 8)}
        small, middle, large = (replace(case, batch=4, **shapes) for case in (small, middle, large))
        cem = icem = {"horizon": 3, "n_samples": 24, "n_iterations": 2}
        many, batch, n_updates, narrow, wide, three = 3, 16, 2, (8, 8), (8,) * 4, (8,) * 3
    rows = {
        "rollout 256 x 5 x 1, H 15, 2x128, 4 modes": (partial(rollout_row, small, device), 1),
        "gradient step 2x128": (partial(gradient_row, narrow, batch, device), 1),
        "control step, 5 members, iCEM 64 x 3, H 30": (
            partial(plan_row, ICEMPlanner, 1, 5, icem, device),
            1,
        ),
        "CEM plan, 1 environment": (partial(plan_row, CEMPlanner, 1, 1, cem, device), 1),
        "gradient step 4x200": (partial(gradient_row, wide, batch, device), 1),
        "update of learn, 5 x 3x200": (
            partial(learn_row, three, batch, n_updates, device),
            n_updates,
        ),
        "rollout 500 x 5 x 4, H 30, 4x200": (partial(rollout_row, middle, device), 1),
        "CEM plan, 256 environments": (partial(plan_row, CEMPlanner, many, 1, cem, device), 1),
        "rollout 4096 x 5 x 20, H 30, 3x512": (partial(rollout_row, large, device), 1),
    }
    if not on_gpu and not quick:
        del rows["rollout 4096 x 5 x 20, H 30, 3x512"]  # takes minutes per rollout
    return {
        name: row for name, row in rows.items() if not only or any(part in name for part in only)
    }
