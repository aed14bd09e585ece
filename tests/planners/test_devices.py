"""Plans on a GPU: a pretended one that notes waits and copies, and a real one if there is one."""

from __future__ import annotations

import pytest
import torch
from helpers import make_point, make_predictor
from pretended import Accelerator
from tensordict import TensorDict
from tensordict.nn import CudaGraphModule, TensorDictModule
from torchrl.data import Bounded, Categorical, OneHot, Unbounded

from layeredrl_torchrl import (
    TS1,
    CEMPlanner,
    CVaR,
    EnsembleDisagreement,
    Expectation,
    ICEMPlanner,
    MPPIPlanner,
    PolicyProposal,
    PredictorFactory,
    RewardNet,
    WorstCase,
)

SMALL = {"horizon": 3, "n_samples": 16, "n_iterations": 2}
BOX = Bounded(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0]), (2,))


def predictor(actions=BOX):
    """An untrained one, whose inputs have been seen."""
    made = PredictorFactory(hidden_sizes=(8, 8), n_models=3)(Unbounded((5,)), actions)
    state, action = torch.randn(50, 5), actions.rand((50,))
    made.model.fit_statistics(state, state[:, :0], action, state + 0.1)
    torch.nn.init.normal_(made.rew_func.net[-1].weight)  # untrained, it says 0 to every plan
    return made


def policy(made):
    return PolicyProposal(
        made, TensorDictModule(lambda state: state[..., :2].tanh().abs(), ["state"], ["action"]), 2
    )


def given(planner, n=2, device=None):
    obs = torch.linspace(-1.0, 1.0, 5 * n, device=device).view(n, 5)
    return TensorDict({"observation": obs}, [n]).update(planner.forget([n]))


OPTIONS = pytest.mark.parametrize(
    "options",
    [
        lambda made: {"risk": CVaR(0.3), "propagation": TS1(n_particles=2), "discount": 0.9},
        lambda made: {"risk": WorstCase(), "propagation": Expectation(), "use_value_func": True},
        lambda made: {"exploration_bonus": EnsembleDisagreement(made.model)},
        lambda made: {"proposal": policy(made), "return_mode": "random"},
    ],
    ids=["TS1", "Expectation", "bonus", "proposal"],
)


@OPTIONS
def test_a_plan_neither_waits_for_a_device_nor_copies_to_it(options):
    made = predictor()
    accelerator = Accelerator()
    planner = accelerator.move(ICEMPlanner(made, **SMALL, **options(made)))
    with accelerator.watched():
        td = given(planner, device=accelerator.device)
        for _ in range(2):
            td = planner(td)
            assert td["action"].device == td["observation"].device
            td["planner"] = td["next", "planner"]


@pytest.mark.parametrize("actions", [BOX, OneHot(3), Categorical(3, (1,))])
def test_no_planner_waits_or_copies(kind, actions):
    accelerator = Accelerator()
    planner = accelerator.move(kind(predictor(actions), **SMALL))
    with accelerator.watched():
        action = planner(given(planner, device=accelerator.device))["action"]
    assert action.shape == (2, *actions.shape)


def test_a_planner_is_where_its_predictor_is(kind):
    """Built from it, or moved with it: constants, the memory that it makes, and its specs."""
    planner = kind(predictor().to("meta"), **SMALL)
    assert {tensor.device.type for tensor in (*planner.parameters(), *planner.buffers())} == {
        "meta"
    }
    assert {value.device.type for value in planner.forget([2]).values(True, True)} == {"meta"}
    assert planner.action_spec.device.type == "meta"
    later = kind(predictor(), **SMALL).to("meta")
    assert later.forget()["planner", "mean"].device.type == "meta"
    assert later.optimizer.draw_noise((2,)).device.type == "meta"
    assert planner.forget([2], "cpu")["planner", "mean"].device.type == "cpu"


def plans(planner, plan, noise, td):
    actions, solution = plan(td, noise)
    return TensorDict(
        {"plan": actions, "cost": solution.best_cost, "memory": solution.memory}, td.batch_size
    )


@pytest.mark.slow
def test_equal_plans_come_out_compiled():
    """Traced as a whole, without a break, and by :meth:`compile`; from the same noise."""
    planner = ICEMPlanner(predictor(), **SMALL | {"horizon": 2}, deterministic=True)
    td, noise = given(planner), planner.optimizer.draw_noise((2,))
    plain = plans(planner, planner.plan, noise, td)
    traced = torch.compile(planner.plan, backend="eager", fullgraph=True)
    assert (plans(planner, traced, noise, td) == plain).all()
    planner.compile(cudagraphs=True, backend="eager")
    again = plans(planner, planner.plan, noise, td)
    for key in plain.keys(True, True):
        torch.testing.assert_close(again[key], plain[key])
    many = ICEMPlanner(predictor(), **SMALL | {"horizon": 1, "n_iterations": 5}, decay=1.5)
    many.compile(backend="eager", dynamic=False)
    for n in (1, 2):  # more shapes than torch compiles before it gives up
        many(given(many, n))
    with pytest.raises(TypeError, match="cudagraphs must be True or False"):
        planner.compile(cudagraphs="yes")


@pytest.mark.parametrize("proposes", [False, True])
def test_without_a_gpu_nothing_is_captured_and_all_of_a_plan_arrives(proposes):
    """Known physics, which is not compiled either."""
    options, made = dict(SMALL), make_point()
    if proposes:
        actor = TensorDictModule(lambda state: 0.1 * state.tanh(), ["state"], ["action"])
        options["proposal"] = PolicyProposal(made, actor, 2)
    planner = CEMPlanner(made, **options, deterministic=True)
    td = TensorDict({"observation": torch.tensor([[0.5, 0.0], [0.2, 0.9]])}, [2])
    td.update(planner.forget([2]))
    noise = planner.optimizer.draw_noise((2,))
    plain = plans(planner, planner.plan, noise, td)
    planner.compile(cudagraphs=True)
    assert (plans(planner, planner.plan, noise, td) == plain).all()


# -- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def cuda():
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [CEMPlanner, ICEMPlanner, MPPIPlanner])
def test_a_graph_gives_what_a_plan_gives(cuda, kind):
    planner = kind(predictor().to(cuda), **SMALL, deterministic=True)
    noise = {n: planner.optimizer.draw_noise((n,)) for n in (1, 4)}
    td = {n: given(planner, n, cuda) for n in noise}
    plain = {n: plans(planner, planner.plan, noise[n], td[n]) for n in noise}
    planner.compile(cudagraphs=True)
    for _ in range(3):
        for n, expected in plain.items():
            found = plans(planner, planner.plan, noise[n], td[n])
            for key in expected.keys(True, True):
                torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-3)
    moved = given(planner, 1, cuda)
    moved["observation"] += 1.0
    assert not torch.equal(planner.plan(moved, noise[1])[1].best_cost, plain[1]["cost"])


@pytest.mark.gpu
def test_tensordicts_graphs_capture_a_planner(cuda):
    planner = ICEMPlanner(predictor().to(cuda), **SMALL)
    graph = CudaGraphModule(planner)
    td, actions = given(planner, 2, cuda), []
    for _ in range(6):
        actions.append(graph(td)["action"].clone())
    assert all(BOX.to(cuda).is_in(action) for action in actions)
    assert not torch.equal(actions[-1], actions[-2])  # each replay draws anew


@pytest.mark.gpu
def test_what_a_graph_finds_is_reported_one_plan_later(cuda):
    made = predictor().to(cuda)
    planner = ICEMPlanner(made, **SMALL)
    planner.compile(cudagraphs=True, backend="eager")
    td = given(planner, 2, cuda)
    planner(td)
    with torch.no_grad():
        for weights in made.model.predicting_members.weights:
            weights[1] = torch.nan
    planner(td)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="member"):
        planner(td)


@pytest.mark.parametrize("compiled", ["dynamics", "reward"])
def test_compiling_reaches_the_dynamics_and_the_reward(compiled):
    torch._dynamo.reset()
    seen = []

    def noting(graph, inputs):
        seen.append(graph)
        return graph

    known = make_predictor(rew_func=lambda state, context, action: state.sum(-1))
    learned = make_point(rew_func=RewardNet(1, 1, 1, (4,)))
    planner = ICEMPlanner(known if compiled == "dynamics" else learned, horizon=2, n_samples=24)
    planner.compile(backend=noting)
    td = TensorDict({"observation": torch.randn(3, 2)}, [3]).update(planner.forget([3]))
    planner(td)
    assert seen
