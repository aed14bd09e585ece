"""Builders shared by the tests: small networks, and data in the layout of TorchRL's collectors."""

from __future__ import annotations

import copy
import os
import re
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from pretended import is_registered, register
from tensordict import TensorDict
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer, Unbounded

from layeredrl_torchrl import (
    FixedEncoderNet,
    IdentityEncoder,
    Model,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    RewardNet,
    RewardPredictor,
    StaticPredictor,
    ValueNet,
)

torch.set_num_threads(1)
# Processes that tests start inherit it: several threads in each would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_make_parametrize_id(val):
    """No addresses in the names of tests: each of several processes has to find the same ones."""
    return None if hasattr(val, "__name__") or " at 0x" not in repr(val) else type(val).__name__


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


@pytest.fixture
def make_point():
    """Build a StaticPredictor of the point: observation ``[x, goal]``, cost squared distance."""

    def cost(state, context, action):
        return -(state - context).square().sum(-1)

    def build(term_prob=None, val_func=None, rew_func=cost, **kwargs):
        encoder = FixedEncoderNet((2,), latent_state_dims=[0], context_dims=[1])
        model = PointModel(term_prob, **kwargs)
        return StaticPredictor(model, val_func, rew_func, encoder, 1, 1)

    return build


def pytest_configure(config):
    """Pretend a device, except for a run of the tests of a real one."""
    if config.option.markexpr.strip() != "gpu":
        register()


def pytest_runtest_setup(item):
    """Skip tests of a GPU where there is none, or where torch was given a pretended one."""
    if item.get_closest_marker("gpu") is None:
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if is_registered():
        pytest.skip("this process has a pretended device: run with -m gpu")


@pytest.fixture(autouse=True)
def seed():
    """Seed torch before every test; a test may seed again with another number."""
    torch.manual_seed(0)
    return 0


@pytest.fixture
def make_ensemble():
    """Build a small ensemble; actions are a box of [-1, 1] unless a space is given."""

    def build(state_dim=2, context_dim=0, action_space=1, hidden=(8,), **kwargs):
        if isinstance(action_space, int):
            action_space = Bounded(-1.0, 1.0, (action_space,))
        return ProbabilisticEnsemble(
            **{
                "state_space": Unbounded((state_dim,)),
                "context_space": Unbounded((context_dim,)) if context_dim else None,
                "action_space": action_space,
                "partial_net": partial(ProbFCDynamics, hidden_sizes=hidden),
                "n_models": 2,
            }
            | kwargs
        )

    return build


@pytest.fixture
def make_predictor(make_ensemble):
    """Build a small RewardPredictor; ``model=`` is passed on to ``make_ensemble``."""

    def build(encoder=None, state_dim=2, context_dim=0, hidden=(8,), model=None, **kwargs):
        model = make_ensemble(
            **{"state_dim": state_dim, "context_dim": context_dim, "hidden": hidden} | (model or {})
        )
        parts = {
            "model": model,
            "val_func": ValueNet(state_dim, context_dim, hidden),
            "rew_func": RewardNet(state_dim, context_dim, model.action_spec, hidden),
            "encoder": encoder or IdentityEncoder((state_dim,)),
            "latent_state_dim": state_dim,
            "context_dim": context_dim,
        }
        return RewardPredictor(**parts | kwargs)

    return build


@pytest.fixture
def make_transitions():
    """Build ``[T]`` random one-step transitions of episodes that end by truncation."""

    def build(n_steps=60, obs_dim=2, action_dim=1, episode_length=20):
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

    return build


@pytest.fixture
def make_buffer(make_transitions):
    """Put transitions (random ones unless given) into a replay buffer."""

    def build(data=None, capacity=1000, **kwargs):
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(capacity))
        buffer.extend(make_transitions(**kwargs) if data is None else data)
        return buffer

    return build


@pytest.fixture
def run_examples():
    """``run_examples(page)``: run a Markdown file's Python blocks in order, in one namespace."""

    def run(page):
        names, text = {}, page.read_text()
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            # Empty lines before it, so that a traceback names the line of the page.
            code = "\n" * text.count("\n", 0, block.start(1)) + block[1]
            exec(compile(code, str(page), "exec"), names)
        return names

    return run


@pytest.fixture
def peak_bytes():
    """``peak_bytes(run)``: the highest sum of live allocations, from torch's own profiler."""

    def measure(run):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with (
            torch.no_grad(),
            torch.profiler.profile(activities=activities, profile_memory=True) as seen,
        ):
            kept = run()
        live = highest = 0
        for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                live += event.nbytes()
                highest = max(highest, live)
        del kept  # alive until here, so that what it returns counts
        return highest

    return measure


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


@pytest.fixture
def unchanged():
    """Context manager: the state of the modules and optimizers passed is bitwise the same after."""

    @contextmanager
    def check(*stateful):
        before = [copy.deepcopy(_state(x)) for x in stateful]
        yield
        for x, old in zip(stateful, before, strict=True):
            new = _state(x)
            moved = [key for key in old if not _same(old[key], new[key])]
            assert not moved, f"{type(x).__name__} changed: {moved}"
            assert old.keys() == new.keys()

    return check
