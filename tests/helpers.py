"""What tests share: one call of ``learn`` and what it moved, known worlds, small levels."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer, Unbounded

from layeredrl_torchrl import (
    FixedEncoderNet,
    ICEMPlanner,
    IdentityEncoder,
    Model,
    ModelFreeLevel,
    PlannerLevel,
    PredictorFactory,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    RewardNet,
    RewardPredictor,
    SACLearner,
    StaticPredictor,
    ValueNet,
)

# -- parts ----------------------------------------------------------------------------------


def make_ensemble(state_dim=2, context_dim=0, action_space=1, hidden=(8,), **kwargs):
    """A small ensemble; actions are a box of [-1, 1] unless a space is given."""
    if isinstance(action_space, int):
        action_space = Bounded(-1.0, 1.0, (action_space,))
    given = {
        "state_space": Unbounded((state_dim,)),
        "context_space": Unbounded((context_dim,)) if context_dim else None,
        "action_space": action_space,
        "partial_net": partial(ProbFCDynamics, hidden_sizes=hidden),
        "n_models": 2,
    }
    return ProbabilisticEnsemble(**given | kwargs)


def make_predictor(encoder=None, state_dim=2, context_dim=0, hidden=(8,), model=None, **kwargs):
    """A small RewardPredictor; ``model=`` is passed on to ``make_ensemble``."""
    sizes = {"state_dim": state_dim, "context_dim": context_dim, "hidden": hidden}
    model = make_ensemble(**sizes | (model or {}))
    parts = {
        "model": model,
        "val_func": ValueNet(state_dim, context_dim, hidden),
        "rew_func": RewardNet(state_dim, context_dim, model.action_spec, hidden),
        "encoder": encoder or IdentityEncoder((state_dim,)),
        "latent_state_dim": state_dim,
        "context_dim": context_dim,
    }
    return RewardPredictor(**parts | kwargs)


def make_transitions(n_steps=60, obs_dim=2, action_dim=1, episode_length=20):
    """``[T]`` random one-step transitions of episodes that end by truncation."""
    index = torch.arange(n_steps)
    obs = torch.randn(n_steps, obs_dim)
    next_obs = obs.roll(-1, 0)
    end = (index + 1) % episode_length == 0
    next_obs[end | (index == n_steps - 1)] = torch.randn(obs_dim)
    end = end.unsqueeze(-1)
    following = {
        "observation": next_obs,
        "reward": torch.randn(n_steps, 1),
        "done": end,
        "truncated": end.clone(),
        "terminated": torch.zeros_like(end),
    }
    action = 2 * torch.rand(n_steps, action_dim) - 1
    return TensorDict({"observation": obs, "action": action, "next": following}, [n_steps])


def make_buffer(data=None, capacity=1000, **kwargs):
    """A replay buffer with transitions (random ones unless given)."""
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(capacity))
    buffer.extend(make_transitions(**kwargs) if data is None else data)
    return buffer


# -- learning -------------------------------------------------------------------------------

LEARN = {"n_updates": 3, "batch_size": 8, "model_batch_size": 8, "n_total_env_steps": 60}


def learn(predictor, buffer, **changes):
    """The terms of a short call of ``learn``."""
    return predictor.learn(buffer, **LEARN | changes)[1]


def parameters(module):
    """Copies of the parameters (not of the statistics, which are buffers)."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(module, before):
    """The names of the parameters that are no longer as in ``before``."""
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def parts_moved(predictor, before):
    """The parts that have such parameters."""
    return {name.split(".")[0] for name in moved(predictor, before)}


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def _state(x):
    """All of a module's state; of an optimizer its moments, not the last learning rate."""
    state = x.state_dict()
    return {"moments": state["state"]} if isinstance(x, torch.optim.Optimizer) else state


@contextmanager
def unchanged(*stateful):
    """The state of the modules and optimizers passed is bitwise the same after."""
    before = [copy.deepcopy(_state(x)) for x in stateful]
    yield
    for x, old in zip(stateful, before, strict=True):
        new = _state(x)
        moved = [key for key in old if not _same(old[key], new[key])]
        assert not moved, f"{type(x).__name__} changed: {moved}"
        assert old.keys() == new.keys()


# -- known worlds ----------------------------------------------------------------------------


class Known(Model):
    """A world that moves by a function ``after(state, action)``, exactly, and never ends."""

    def __init__(self, after, width, action_spec, **options):
        super().__init__(Unbounded((width,)), None, action_spec, **options)
        self.after = after

    def predict_members(self, state, context, action):
        mean = self.after(state, action).unsqueeze(-2)
        weights = torch.ones_like(mean[..., 0])
        return (mean, torch.zeros_like(mean)), weights, torch.zeros_like(weights[..., 0])


def known(after, reward, action_spec, width=1, value=None, **options):
    """A predictor of such a world, in which ``reward(state, context, action)`` is paid."""
    model = Known(after, width, action_spec, **options)
    return StaticPredictor(model, value, reward, IdentityEncoder((width,)), width)


class PointModel(Model):
    """A hand-written model: a point on a line moves by half the action, exactly.

    ``term_prob`` is a function of the state after the move; without it nothing ever ends.
    """

    def __init__(self, term_prob=None, n_models=1, **kwargs):
        spaces = Unbounded((1,)), Unbounded((1,)), Bounded(-1.0, 1.0, (1,))
        super().__init__(*spaces, n_models=n_models, **kwargs)
        self.term_prob = term_prob or torch.zeros_like

    def predict_members(self, state, context, action):
        after = state + 0.5 * action
        mean, weights = after.unsqueeze(-2), torch.ones_like(after)
        return (mean, torch.zeros_like(mean)), weights, self.term_prob(after.squeeze(-1))


def distance(state, context, action):
    """The reward of the point: how far it is from its goal, squared and negative."""
    return -(state - context).square().sum(-1)


def make_point(term_prob=None, val_func=None, rew_func=distance, **kwargs):
    """A StaticPredictor of the point: observation ``[x, goal]``."""
    encoder = FixedEncoderNet((2,), latent_state_dims=[0], context_dims=[1])
    return StaticPredictor(PointModel(term_prob, **kwargs), val_func, rew_func, encoder, 1, 1)


# -- levels ---------------------------------------------------------------------------------

OBS, ACTIONS = Unbounded((2,)), Bounded(-1.0, 1.0, (1,))
SPACES = OBS, ACTIONS
SMALL_FACTORY = PredictorFactory(hidden_sizes=(8,), n_models=2)
SMALL_PLANNER = partial(ICEMPlanner, horizon=2, n_samples=24, n_iterations=2)
SMALL_SAC = partial(SACLearner, hidden_sizes=(8,))


def planner_level(*spaces, **options):
    """A small level that plans, without random steps and with few updates unless asked."""
    small = {"n_initial_random_steps": 0, "batch_size": 8, "updates_per_step": 0.1}
    small |= {"predictor_factory": SMALL_FACTORY, "planner_factory": SMALL_PLANNER}
    return PlannerLevel(*spaces, **small | {"model_batch_size": 8} | options)


def model_free_level(*spaces, **options):
    """A small level that does not, likewise."""
    small = {"n_initial_random_steps": 0, "batch_size": 8, "updates_per_step": 0.1}
    return ModelFreeLevel(*spaces, **small | {"learner_factory": SMALL_SAC} | options)


def learned_from_inputs(factory, spec, reward, observe, *, n, reach, **options):
    """Inputs ``[40, 1]`` up to ``reach``, and what a level does on them after ``n`` skills.

    Each skill is one random action, paid ``reward(action, input)``; ``observe(n)`` makes the
    observations, which say nothing.
    """
    z, action = 2 * torch.rand(n, 1) - 1, spec.rand((n,))
    no = torch.zeros(n, 1, dtype=torch.bool)
    after = {"observation": observe(n), "reward": reward(action, z)}
    after |= {"terminated": no, "done": no, "input_done": ~no}
    now = {"observation": observe(n), "input": z, "n_actions": no.long()}
    level = model_free_level(
        Unbounded(after["observation"].shape[1:]),
        spec,
        learner_factory=factory,
        input_spec=Bounded(-1.0, 1.0, (1,)),
        duration=1,
        **options,
    )
    level.learn(TensorDict({**now, "action": action, "next": after}, [n]))
    given = torch.linspace(-reach, reach, 40).unsqueeze(-1)
    td = TensorDict({"observation": observe(40), "input": given}, [40])
    td["n_actions"] = torch.zeros(40, 1, dtype=torch.int64)
    return given, level.eval()(td)["action"]


# Of a level that plans in the point's known world, and that is set up for it.
known_level = partial(planner_level, predictor_factory=lambda *_: make_point())
point_level = partial(known_level, *SPACES)


def observed(policy, obs):
    """What an environment hands to a policy that begins at ``obs [*b, n]``."""
    batch = obs.shape[:-1]
    carried = policy.make_tensordict_primer().primers.zero(batch)
    return TensorDict({"observation": obs, **carried.to_dict()}, batch)


both = pytest.mark.parametrize("make", [planner_level, model_free_level])


class Kept:
    """A logger that keeps what it is given."""

    def __init__(self):
        self.logged = []

    def log_metrics(self, metrics, step):
        self.logged.append((metrics, step))


def collected(env, policy, n_batches, n_steps=20, **options):
    """Batches from TorchRL's collector, one after the other, while the policy may learn."""
    collector = Collector(
        env,
        policy,
        frames_per_batch=n_steps,
        total_frames=n_batches * n_steps,
        auto_register_policy_transforms=True,
        **options,
    )
    for data in collector:
        yield data.clone()
    collector.shutdown(close_env=False)
