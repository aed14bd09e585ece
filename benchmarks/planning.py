"""Time of whole plans, compared with their networks alone, and of a control loop.

    python benchmarks/planning.py --threads 2
    python benchmarks/planning.py --quality          # also the quality of plans in fp32 and bf16

One model of 2x128 for dynamics and reward, state 17, action 6, horizon 15, 6 iterations of 256
candidates, for 1 and for 8 environments. Compared are our planners in fp32 and under bf16 autocast,
TorchRL's `CEMPlanner` on the same networks, and these networks alone (the dynamics' mean and spread
and the reward, step by step). iCEM's populations shrink: it evaluates a third fewer candidates than
the others, so its ratio is not comparable with theirs. Bars: 1.25 times the networks alone; 50
plans per second with 5 members, iCEM with 64 samples, 3 iterations, horizon 30. Times are medians
of runs that take turns in one process; the ratio is what matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import gymnasium as gym
import torch
from rollout import medians
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Bounded, Unbounded
from torchrl.modules import CEMPlanner as TorchRLCEMPlanner

from layeredrl_torchrl import (
    CEMPlanner,
    ICEMPlanner,
    IdentityEncoder,
    MPPIPlanner,
    PlannerLevel,
    PredictorEnv,
    PredictorFactory,
    PredictorPlanner,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    RewardNet,
    StaticPredictor,
    get_task,
    make_batched,
)
from layeredrl_torchrl.runs import Count, command

STATE, ACTION, HORIZON, SAMPLES, ITERATIONS, HIDDEN = 17, 6, 15, 256, 6, (128, 128)
ACTIONS = Bounded(-1.0, 1.0, (ACTION,))


@dataclass
class Config:
    """Options of the benchmark."""

    repeats: Count = 15
    """Runs per median."""
    threads: Count = 1
    """Threads that torch may use."""
    device: str = "cpu"
    """Device to run on."""
    quality: bool = False
    """Whether to compare the quality of plans, too."""


def make_predictor(n_models: int, device: str, *, compiled: bool = False) -> StaticPredictor:
    """Make untrained networks with random weights: times do not depend on weights.

    The model has statistics, like a trained one: without them it would not normalise its inputs.
    """
    torch.manual_seed(0)
    model = ProbabilisticEnsemble(
        state_space=gym.spaces.Box(-float("inf"), float("inf"), (STATE,)),
        context_space=None,
        action_space=ACTIONS,
        partial_net=partial(ProbFCDynamics, hidden_sizes=HIDDEN),
        n_models=n_models,
    )
    state, action = torch.randn(1000, STATE), 2 * torch.rand(1000, ACTION) - 1
    model.fit_statistics(state, state[:, :0], action, state + 0.1 * torch.randn(1000, STATE))
    if compiled:
        model.compile(dynamic=False)
    reward = RewardNet(STATE, 0, ACTIONS, HIDDEN)
    torch.nn.init.normal_(reward.net[-1].weight)  # its last layer starts at 0
    if compiled:
        reward.compile()
    encoder = IdentityEncoder((STATE,))
    return StaticPredictor(model, None, reward, encoder, STATE).to(device).eval()


def bare_networks(predictor: StaticPredictor, n: int, device: str) -> Callable[[], object]:
    """The work that every planner needs: both networks on every step of every candidate."""
    model, context = predictor.model, torch.empty(n * SAMPLES, 0, device=device)
    action = torch.rand(1, n * SAMPLES, ACTION, device=device)
    start = torch.randn(1, n * SAMPLES, STATE, device=device)

    @torch.no_grad()
    def run() -> None:
        for _ in range(ITERATIONS):
            state = start
            for _ in range(HORIZON):
                predictor.rew_func(state, context[None], action)
                (mean, _), *_ = model.predicting_members(state, context[None], action)
                state = mean.squeeze(-2)

    return run


def plan_runs(n: int, device: str) -> dict[str, Callable[[], object]]:
    """Return a function per compared planner that makes one plan for `n` environments."""
    predictor = make_predictor(1, device)
    obs = torch.randn(n, STATE, device=device)
    options = {"horizon": HORIZON, "n_samples": SAMPLES, "n_iterations": ITERATIONS}
    kind = torch.device(device).type

    def ours(planner: PredictorPlanner, dtype: torch.dtype | None = None) -> Callable[[], object]:
        memory = planner.optimizer.forget((n,), obs.device)
        td = TensorDict({"observation": obs, "planner": memory}, [n])

        def run() -> TensorDict:
            with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
                return planner(td)

        return run

    theirs = TorchRLCEMPlanner(
        PredictorEnv(predictor), HORIZON, ITERATIONS, SAMPLES, round(0.1 * SAMPLES)
    )
    start = TensorDict({"state": obs, "context": obs[:, :0]}, [n])

    @torch.no_grad()
    def torchrl() -> TensorDict:
        return theirs(start.clone())

    return {
        "networks": bare_networks(predictor, n, device),
        "CEM": ours(CEMPlanner(predictor, **options)),
        "iCEM": ours(ICEMPlanner(predictor, **options)),
        "MPPI": ours(MPPIPlanner(predictor, **options)),
        "CEM, compiled": ours(CEMPlanner(make_predictor(1, device, compiled=True), **options)),
        "CEM, bf16": ours(CEMPlanner(predictor, **options), torch.bfloat16),
        "TorchRL's CEM": torchrl,
    }


def control_run(n: int, device: str, *, compiled: bool) -> Callable[[], object]:
    """Return a step of the control loop: 5 members, iCEM, 64 samples, 3 iterations, horizon 30."""
    predictor = make_predictor(5, device, compiled=compiled)
    planner = ICEMPlanner(predictor, horizon=30, n_samples=64, n_iterations=3)
    obs = torch.randn(n, STATE, device=device)
    td = TensorDict({"observation": obs, "planner": planner.optimizer.forget((n,), obs.device)})
    td.batch_size = [n]

    def run() -> None:
        td["planner"] = planner(td)["next", "planner"]

    return run


def quality(device: str) -> None:
    """Print the cost of the plans in a known system, linear with quadratic costs."""
    predictor = linear_predictor().to(device)
    torch.manual_seed(0)
    obs = torch.randn(32, STATE, device=device)
    options = {"horizon": HORIZON, "n_samples": SAMPLES, "n_iterations": ITERATIONS}
    print(f"\n{'cost of a plan, linear system':36} {'cold':>9} {'after 5':>9}")
    for name, kind, dtype in (
        ("CEM", CEMPlanner, None),
        ("CEM, bf16", CEMPlanner, torch.bfloat16),
        ("iCEM", ICEMPlanner, None),
        ("iCEM, bf16", ICEMPlanner, torch.bfloat16),
        ("MPPI", MPPIPlanner, None),
        ("MPPI, bf16", MPPIPlanner, torch.bfloat16),
    ):
        planner = kind(predictor, **options)
        td = TensorDict(
            {"observation": obs, "planner": planner.optimizer.forget((32,), obs.device)}, [32]
        )
        costs = []
        for _ in range(5):
            with torch.autocast(obs.device.type, dtype=dtype, enabled=dtype is not None):
                actions, solution = planner.plan(td)
            td["planner"] = solution.memory
            traj = predictor.rollout(obs, actions)  # its cost, in full precision
            costs.append(-traj["next", "reward"].sum((-2, -1)).mean().item())
        print(f"{name:36} {costs[0]:9.3f} {costs[-1]:9.3f}")


def learned_quality() -> None:
    """Print returns of plans in a learned ensemble, with products in float32 and in bfloat16.

    Here bfloat16 is used even where it is slower; by itself the package does not do this.
    """
    torch.manual_seed(0)
    env = get_task("InvertedPendulum-v5").make(seed=0)
    level = PlannerLevel(
        env=env,
        predictor_factory=PredictorFactory(hidden_sizes=(64, 64)),
        planner_factory=partial(ICEMPlanner, horizon=8, n_samples=100, use_value_func=True),
        n_initial_random_steps=300,
        updates_per_step=2.0,
    )
    steps = {"frames_per_batch": 100, "total_frames": 2000}
    for data in Collector(env, level, **steps, auto_register_policy_transforms=True):
        level.learn(data)
    envs = make_batched("InvertedPendulum-v5", 5, seed=1)
    envs.append_transform(level.planner.make_tensordict_primer())
    print(f"\n{'InvertedPendulum-v5, 300 is most':36} {'return':>9} {'lowest':>9}")
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        enabled = dtype is not None
        with (
            patch("layeredrl_torchrl._precision._pays", lambda *_: True),
            torch.autocast("cpu", dtype=dtype, enabled=enabled),
            torch.no_grad(),
        ):
            envs.set_seed(1)
            traj = envs.rollout(300, level.planner, break_when_all_done=True)
        alive = traj["next", "done"].squeeze(-1).cumsum(-1) <= 1
        returns = (traj["next", "reward"].squeeze(-1) * alive).sum(-1)
        print(f"{name:36} {returns.mean():9.1f} {returns.min():9.1f}")


def linear_predictor() -> StaticPredictor:
    """A linear system with 17 states and 6 actions; the cost is quadratic in both."""
    from layeredrl_torchrl import Model

    generator = torch.Generator().manual_seed(0)
    push = 0.3 * torch.randn(STATE, ACTION, generator=generator)

    class Linear(Model):
        def __init__(self):
            super().__init__(Unbounded((STATE,)), None, ACTIONS)
            self.register_buffer("push", push)

        def predict_members(self, state, context, action):
            after = (0.95 * state + torch.nn.functional.linear(action, self.push)).unsqueeze(-2)
            weights = torch.ones_like(after[..., 0])
            return (after, torch.zeros_like(after)), weights, torch.zeros_like(weights[..., 0])

    def reward(state, context, action):
        return -state.square().sum(-1) - 0.1 * action.square().sum(-1)

    return StaticPredictor(Linear(), None, reward, IdentityEncoder((STATE,)), STATE)


def main(config: Config) -> None:
    """Print the tables."""
    torch.set_num_threads(config.threads)
    print(f"torch {torch.__version__}, {config.threads} threads, {config.device}")
    for n in (1, 8):
        ms = medians(config.repeats, config.device, **plan_runs(n, config.device))
        for name, value in ms.items():
            print(
                f"one plan for {n}: {name:20} {value:9.2f} ms {value / ms['networks']:6.2f} times "
                "the networks"
            )
    for n in (1, 8):
        runs = {
            name: control_run(n, config.device, compiled=compiled)
            for name, compiled in (("as it is", False), ("compiled", True))
        }
        for name, value in medians(2 * config.repeats, config.device, **runs).items():
            print(
                f"control step for {n}, 5 members, iCEM 64 x 3 x 30, {name}: {value:.2f} ms, "
                f"{1e3 / value:.0f} Hz"
            )
    if config.quality:
        quality(config.device)
        learned_quality()


if __name__ == "__main__":
    command(main, Config, __doc__)
