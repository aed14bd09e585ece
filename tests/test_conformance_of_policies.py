"""Optimizers, planners, levels and hierarchies keep the promises of ``conformance.py``.

And every public class that is called is here, or in ``test_conformance.py``.
"""

from __future__ import annotations

import inspect
from functools import partial

import test_conformance
import torch
from conformance import Conformance, stir
from tensordict import TensorDict
from test_conformance import ACTIONS, A, C, D, normal
from test_conformance import TestRewardPredictor as PredictorSuite
from torchrl.data import Bounded, Unbounded

import layeredrl_torchrl as lrl
from layeredrl_torchrl.planners import Mean, RiskMeasure


def also(suite, *kinds):
    """Make suites for classes that are built and called as that of another suite."""
    for kind in kinds:
        globals()[f"Test{kind.__name__}"] = type(f"Test{kind.__name__}", (suite,), {"kind": kind})


def lukewarm(optimizer, batch):
    """A memory of earlier plans, for some of the problems."""
    memory = optimizer.forget(batch)
    memory["mean"] = torch.rand(*batch, 3, A)
    memory["warm"] = torch.rand(*batch, 1) < 0.5
    return memory


# -- optimizers, risk, planners -------------------------------------------------------------------


class TestCEM(Conformance):
    kind = lrl.CEM
    stateful = converts = False

    def make(self):
        search = lrl.make_search(Bounded(-1.0, 1.5, (A,)))
        return self.kind(search, 3, n_samples=30, n_iterations=3)

    def inputs(self, part, batch):
        """A memory, noise, and each problem's optimum."""
        noise = part.draw_noise(batch)  # of candidates [*B, N, H, A]
        td = {
            "memory": lukewarm(part, batch),
            "noise": noise,
            "target": noise[..., :1, :, :].tanh(),
        }
        return TensorDict(td, batch)

    def run(self, part, td):
        def cost(x):
            return (x - td["target"]).square().sum((-2, -1))

        found = part.optimize(cost, td["memory"], td["noise"])
        names = ("mean", "best", "best_cost", "random", "memory")
        return TensorDict({name: getattr(found, name) for name in names}, td.batch_size)


also(TestCEM, lrl.ICEM, lrl.MPPI)


class TestCVaR(Conformance):
    kind = lrl.CVaR
    stateful = converts = False

    def make(self):
        return self.kind(0.3)

    def inputs(self, part, batch):
        return TensorDict({"returns": torch.randn(*batch, 3, 4)}, batch)

    def run(self, part, td):
        return TensorDict({"worth": part(td["returns"])}, td.batch_size)


class TestWorstCase(TestCVaR):
    kind = lrl.WorstCase

    def make(self):
        return self.kind()


also(TestWorstCase, Mean)


class TestCEMPlanner(Conformance):
    kind = lrl.CEMPlanner
    checked = ["observation"]
    doubles = False
    renamed = {
        "observation": ("agents", "seen"),
        "action": ("agents", "act"),
        "planner": ("agents", "plan"),
        ("next", "planner"): ("next", "agents", "plan"),
    }

    def make(self, predictor=None, **keys):
        predictor = predictor or PredictorSuite().make()
        small = {"horizon": 3, "n_samples": 30, "n_iterations": 2, "deterministic": True}
        return self.kind(predictor, **small, **keys)

    def make_renamed(self, part):
        predictor = PredictorSuite().make_renamed(None)
        return self.make(predictor, plan_key=("agents", "plan"))

    def inputs(self, part, batch):
        noise = part.optimizer.draw_noise(batch)
        planner = {"planner": lukewarm(part.optimizer, batch), "noise": noise}
        return normal(batch, observation=D + C).update(planner)

    def compare(self, part, td):
        actions, found = part.plan(td, td["noise"])
        out = {"plan": actions, "best_cost": found.best_cost, "memory": found.memory}
        return TensorDict(out, td.batch_size)


also(TestCEMPlanner, lrl.ICEMPlanner, lrl.MPPIPlanner)


# -- levels ---------------------------------------------------------------------------------------


class TestConstantLevel(Conformance):
    kind = lrl.ConstantLevel
    doubles = False

    def make(self):
        return self.set_up(self.kind(ACTIONS.rand()))

    def set_up(self, level):
        level.setup(Unbounded((4,)), ACTIONS)
        return level

    def inputs(self, part, batch):
        carried = part.make_tensordict_primer().primers.zero(batch)
        return normal(batch, observation=4).update(carried)


class TestActionSequenceLevel(TestConstantLevel):
    kind = lrl.ActionSequenceLevel

    def make(self):
        return self.set_up(self.kind(ACTIONS.rand((4,))))


class TestRandomLevel(TestConstantLevel):
    kind = lrl.RandomLevel
    batches = ()
    stateful = False

    def make(self):
        return self.set_up(self.kind())


class TestModelFreeLevel(TestConstantLevel):
    kind = lrl.ModelFreeLevel
    checked = ["observation", "input"]

    def options(self):
        learner = partial(lrl.SACLearner, hidden_sizes=(6,))
        return {"learner_factory": learner, "input_spec": Bounded(-1.0, 1.0, (2,)), "duration": 4}

    def make(self):
        return stir(self.set_up(self.kind(**self.options()))).eval()

    def inputs(self, part, batch):
        td = normal(batch, observation=4, input=2)
        return td.set("n_actions", torch.randint(4, (*batch, 1)))


class TestSkillLevel(TestModelFreeLevel):
    kind = lrl.SkillLevel

    def options(self):
        return super().options() | {"skill_reward": lrl.SPlaTESReward()}


class TestPlannerLevel(TestConstantLevel):
    kind = lrl.PlannerLevel
    checked = ["observation"]
    batches = ()  # it draws its candidates

    def make(self):
        level = self.kind(
            predictor_factory=lrl.PredictorFactory(hidden_sizes=(6,), n_models=2),
            planner_factory=partial(lrl.ICEMPlanner, horizon=2, n_samples=24, n_iterations=2),
            n_initial_random_steps=0,
        )
        return stir(self.set_up(level))


class TestHierarchy(Conformance):
    kind = lrl.Hierarchy
    checked = ["observation"]
    converts = doubles = False  # its state is float64, whatever comes in
    batches = TestConstantLevel.batches

    def make(self):
        lower = lrl.ModelFreeLevel(**TestModelFreeLevel().options())
        upper = lrl.ConstantLevel(2 * torch.rand(2) - 1)
        env = lrl.get_task("InvertedPendulum-v5").make()
        return stir(self.kind([upper, lower], env)).eval()

    def inputs(self, part, batch):
        carried = part.make_tensordict_primer().primers.zero(batch)
        return normal(batch, observation=4).update(carried)


# -- all of them ----------------------------------------------------------------------------------

BASES = (
    lrl.Encoder,
    lrl.ScalarHead,
    lrl.Model,
    lrl.Predictor,
    lrl.Optimizer,
    RiskMeasure,
    lrl.PredictorPlanner,
    lrl.Level,
    lrl.Hierarchy,
    lrl.ModelLoss,
    lrl.PredictorLoss,
)


def test_every_public_class_of_these_kinds_is_here():
    public = [getattr(lrl, name) for name in lrl.__all__]
    asked = {
        kind
        for kind in public
        if inspect.isclass(kind) and issubclass(kind, BASES) and not inspect.isabstract(kind)
    }
    here = [*globals().values(), *vars(test_conformance).values()]
    suites = [s for s in here if inspect.isclass(s) and hasattr(s, "kind")]
    kinds = {getattr(suite.kind, "func", suite.kind) for suite in suites}
    of_others = {lrl.Encoder, lrl.Model, lrl.Predictor, lrl.Optimizer, lrl.PredictorPlanner}
    assert asked - kinds <= of_others | {lrl.Level}
