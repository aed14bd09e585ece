"""Encoders, heads, models, predictors and losses keep the promises of ``conformance.py``.

The other public classes are in ``test_conformance_of_policies.py``.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conformance import Conformance, LossConformance, stir
from tensordict import TensorDict
from torchrl.data import Bounded, Unbounded

import layeredrl_torchrl as lrl

D, C, A = 3, 2, 2
ACTIONS = Bounded(-1.0, 1.0, (A,))
NET = partial(lrl.ProbFCDynamics, hidden_sizes=(6,), ignore_context=False)


def normal(batch, **widths):
    return TensorDict({key: torch.randn(*batch, n) for key, n in widths.items()}, batch)


def latent(batch):
    td = normal(batch, state=D, context=C)
    return td.set("action", ACTIONS.rand(batch))


# -- encoders, heads, models ----------------------------------------------------------------------


class EncoderConformance(Conformance):
    renamed = {"observation": ("agents", "seen"), "state": ("latent", "z"), "context": "goal"}
    keys = {"in_keys": [("agents", "seen")], "out_keys": [("latent", "z"), "goal"]}
    checked = ["observation"]
    stateful = False

    def inputs(self, part, batch):
        return normal(batch, observation=4)

    def make_renamed(self, part):
        return self.make(**self.keys)


class TestIdentityEncoder(EncoderConformance):
    kind = lrl.IdentityEncoder

    def make(self, **keys):
        return self.kind((4,), **keys)


class TestFixedEncoderNet(EncoderConformance):
    kind = lrl.FixedEncoderNet

    def make(self, **keys):
        return self.kind((4,), [2, 0], [3], **keys)


class TestEncoderNet(EncoderConformance):
    kind = lrl.EncoderNet
    stateful = True

    def make(self, width=4, **keys):
        encoder = self.kind((width,), latent_state_dim=D, context_dim=C, **keys)
        encoder.mask[:2] = True
        return stir(encoder)

    def make_others(self):
        return [self.make(width=5)]


class TestRewardNet(Conformance):
    kind = lrl.RewardNet
    converts = False

    def build(self, hidden):
        return self.kind(D, C, A, hidden)

    def make(self, hidden=(6,)):
        head = stir(self.build(hidden))
        head.fit_inputs(*(3 * torch.randn(20, n) + 1 for n in (D, C, A)))
        head.rescale(torch.randn(()), 2.5)
        return head

    def make_others(self):
        return [self.make((7,)), self.make((6, 6))]

    def inputs(self, part, batch):
        return latent(batch)

    def run(self, part, td):
        out = part(td["state"], td["context"], td["action"])
        return TensorDict({"out": out}, td.batch_size)


class TestValueNet(TestRewardNet):
    kind = lrl.ValueNet

    def build(self, hidden):
        return self.kind(D, C, hidden)


class TestProbFCDynamics(TestRewardNet):
    kind = lrl.ProbFCDynamics

    def make(self, hidden=(6,)):
        return stir(NET(Unbounded((D,)), Unbounded((C,)), ACTIONS, 2, hidden_sizes=hidden))

    def run(self, part, td):
        (mean, std), weights, term_prob = part(td["state"], td["context"], td["action"])
        out = {"mean": mean, "std": std, "weights": weights, "term_prob": term_prob}
        return TensorDict(out, td.batch_size)


class TestProbabilisticEnsemble(Conformance):
    kind = lrl.ProbabilisticEnsemble
    checked = ["state", "context", "action"]
    renamed = {
        "state": ("latent", "z"),
        "context": "goal",
        "action": ("agents", "act"),
        ("next", "loc"): "loc",
        ("next", "weights"): ("mixture", "weights"),
        ("next", "scale"): ("mixture", "scale"),
        ("next", "term_prob"): "ends",
        ("next", "state"): ("next", "latent", "z"),
    }

    def make(self, d=D, c=C, n_models=3, n_modes=2, **keys):
        spaces = Unbounded((d,)), Unbounded((c,)), ACTIONS
        options = {"n_models": n_models, "n_modes": n_modes, "n_particles_per_model": 2}
        model = self.kind(*spaces, NET, **options, **keys)
        units = [5 * torch.randn(30, n) + 2 for n in (d, c)]
        model.fit_statistics(*units, ACTIONS.rand((30,)), units[0] + torch.randn(30, d))
        return stir(model)

    def make_renamed(self, part):
        names = list(TestProbabilisticEnsemble.renamed.values())
        return self.make(in_keys=names[:3], out_keys=names[3:])

    def make_others(self):
        return [self.make(d=2), self.make(c=1), self.make(n_models=2), self.make(n_modes=1)]

    def inputs(self, part, batch):
        return latent(batch)


class TestRollout(TestProbabilisticEnsemble):
    """Its other call, of actions ``[*B, H, A]``."""

    renamed = {
        "state": ("latent", "z"),
        "context": "goal",
        "action": ("agents", "act"),
        ("next", "term_prob"): "ends",
        ("next", "state"): ("next", "latent", "z"),
    }

    def inputs(self, part, batch):
        td = latent(batch)
        return td.set("action", ACTIONS.rand((*batch, 4)))

    def run(self, part, td):
        given = [td[key] for key in part.in_keys]
        traj = part.rollout(*given, deterministic=True)
        return traj.auto_batch_size_(len(td.batch_size))


class TestEnsembleDisagreement(Conformance):
    kind = lrl.EnsembleDisagreement
    checked = ["state", "context", "action"]
    renamed = {"exploration_bonus": ("intrinsic", "reward")}
    stateful = doubles = False  # the model's owner saves and casts it

    def make(self):
        return self.kind(TestProbabilisticEnsemble().make(), 2.0)

    def make_renamed(self, part):
        return self.kind(part.model, 2.0, out_keys=[("intrinsic", "reward")])

    def inputs(self, part, batch):
        return latent(batch)


# -- predictors and losses ------------------------------------------------------------------------


class TestRewardPredictor(Conformance):
    kind = lrl.RewardPredictor
    checked = ["observation", "action"]
    renamed = TestProbabilisticEnsemble.renamed | {
        "observation": ("agents", "seen"),
        ("next", "context"): ("next", "goal"),
    }

    def make(self, encoder_keys=None, **options):
        model = TestProbabilisticEnsemble().make(**options)
        d, c = model.state_dim, model.context_dim
        encoder = stir(lrl.EncoderNet((D + C,), d, c, **encoder_keys or {}))
        encoder.mask[:D] = True
        return self.build(model, encoder, d, c)

    def build(self, model, encoder, d, c):
        heads = [stir(lrl.ValueNet(d, c, (6,))), stir(lrl.RewardNet(d, c, A, (6,)))]
        return self.kind(model, *heads, encoder, d, c)

    def make_renamed(self, part):
        names = list(TestProbabilisticEnsemble.renamed.values())
        return self.make(EncoderConformance.keys, in_keys=names[:3], out_keys=names[3:])

    def make_others(self):
        return TestProbabilisticEnsemble.make_others(self)

    def inputs(self, part, batch):
        return normal(batch, observation=D + C).set("action", ACTIONS.rand(batch))


class TestStaticPredictor(TestRewardPredictor):
    kind = lrl.StaticPredictor

    def build(self, model, encoder, d, c):
        return self.kind(model, None, first_dimension, encoder, d, c)


def first_dimension(state, context, action):
    return state[..., 0]


class TestModelLoss(LossConformance):
    kind = lrl.ModelLoss

    def make(self, **options):
        return self.kind(TestProbabilisticEnsemble().make(**options))

    def make_others(self):
        return [self.make(n_models=2), self.make(d=2)]

    def batch(self, n):
        after = {"state": torch.randn(n, D), "terminated": torch.rand(n, 1) < 0.4}
        td = latent((n,)).set("next", after)
        return td.set("valid", torch.ones(n, dtype=torch.bool)).set("weight", torch.full((n,), 2.0))


@pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
class TestPredictorLoss(LossConformance):
    kind = lrl.PredictorLoss

    def make(self, hidden=(6,), **options):
        heads = [stir(lrl.RewardNet(D, C, A, hidden)), stir(lrl.ValueNet(D, C, hidden))]
        return self.kind(TestEncoderNet().make(), *heads, k_steps=2, n_steps=2, **options)

    def make_others(self):
        return [self.make((7,))]

    def batch(self, n, length=4):
        shape = (n, length)
        td = normal(shape, observation=4).set("action", ACTIONS.rand(shape))
        no = torch.zeros(*shape, 1, dtype=torch.bool)
        td["next"] = normal(shape, observation=4, reward=1).update(
            {"terminated": no, "elapsed_steps": no.long() + 2}
        )
        return td.update({"valid": ~no.squeeze(-1), "random_action": no.clone()})
