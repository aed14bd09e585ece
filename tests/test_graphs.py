"""What CUDA graphs do with their inputs, as far as a CPU can tell."""

from __future__ import annotations

import copy
import pickle

import torch
from helpers import make_point
from tensordict import TensorDict

from layeredrl_torchrl._graphs import Graphs, Same, _copied, _leaves, _own
from layeredrl_torchrl.planners import CEMPlanner, CVaR
from layeredrl_torchrl.predictors import ReturnOptions


def test_without_a_gpu_a_function_runs_as_it_is():
    graphs, x = Graphs(3), torch.ones(2)
    assert graphs.run("same", lambda x: x, (x,), []) is x
    assert len(graphs) == 0
    for twin in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert (twin.max_graphs, len(twin)) == (3, 0)


def data(*keys):
    values = {"a": torch.zeros(3), "b": torch.ones(3, 2), "text": "of no use"}
    inner = TensorDict({"c": torch.full((3,), 2.0)}, [3])
    return TensorDict({key: {**values, "inner": inner}[key] for key in keys}, [3])


def test_inputs_are_told_apart_by_their_tensors_and_not_by_their_order():
    x = torch.rand(4)
    one, two = data("b", "text", "inner", "a"), data("a", "b", "inner")
    found = [_leaves(({"x": x}, (td, 7, None))) for td in (one, two)]
    for leaves in found:
        assert leaves[0] is x
        assert leaves[-2:] == [7, None]
    first, second = ([leaf.mean().item() for leaf in leaves[1:-2]] for leaves in found)
    assert first == second
    assert sorted(first) == [0.0, 1.0, 2.0]


def test_a_name_is_never_given_again_to_another_object():
    """Another object may be given the address of one that nobody holds."""
    assert len({Same(object()) for _ in range(100)}) == 100
    one, equal = [1], [1]
    assert Same(one) == Same(one)
    assert Same(one) != Same(equal)


def test_a_planner_is_captured_anew_for_each_risk_and_option(monkeypatch):
    """What a GPU would find under the same name was captured with others."""
    captured = {}

    def run(self, name, function, inputs, reads, *, changes=False):
        if name[0] == "plan":
            used = f"{planner.risk} {planner.options}"  # without holding them
            assert captured.setdefault(name, used) == used
        return function(*inputs)

    monkeypatch.setattr(Graphs, "run", run)
    planner = CEMPlanner(make_point(), horizon=2, n_samples=20, n_iterations=1)
    planner._graphs = Graphs()
    td = TensorDict({"observation": torch.zeros(2, 2)}, [2]).update(planner.forget([2]))
    for share in torch.linspace(0.1, 1.0, 10).tolist():
        planner.risk = CVaR(share)
        planner(td.clone())
        planner.options = ReturnOptions(discount=share)
        planner(td.clone())
    assert len(captured) == 20


def test_copies_are_apart_from_what_they_copy():
    td, x = data("b", "text", "inner", "a"), torch.zeros(3)
    own = _own(td)
    assert set(own.keys(True, True)) == {"a", "b", ("inner", "c")}
    assert own.batch_size == td.batch_size
    twins = [own["a"], _own(x), _copied({"out": (x,)})["out"][0]]
    td["a"].fill_(5.0)
    x.fill_(5.0)
    assert all(torch.equal(twin, torch.zeros(3)) for twin in twins)
    assert _own(7) == _copied(7) == 7
