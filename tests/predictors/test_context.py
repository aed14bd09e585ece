"""A warning of contexts that move within an episode, which plans cannot know."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from helpers import learn
from pretended import Accelerator
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, LazyTensorStorage, TensorDictReplayBuffer, Unbounded

from layeredrl_torchrl import EncoderNet, FixedEncoderNet, PredictorFactory
from layeredrl_torchrl._watch import Watch
from layeredrl_torchrl.predictors import _context

N, LENGTH = 200, 20  # transitions, in episodes of this length
ACTIONS = Bounded(-1.0, 1.0, (1,))
MOVING = r"context \(dimensions \[3\] of the observation\) changes within episodes"


def transitions(every=None):
    """Two dimensions of a state, and a goal of two that changes with the episode.

    The second of the goal also moves at each step that is a multiple of ``every``.
    """
    step = torch.arange(N + 1)
    state = torch.randn(N + 1, 2)
    goal = (step // LENGTH).unsqueeze(1) + torch.zeros(2)
    if every is not None:
        goal[:, 1] += 0.01 * (step // every)
    obs = torch.cat([state, goal], 1)
    end = ((step[:-1] + 1) % LENGTH == 0).unsqueeze(1)
    # At an end the next observation is that of the next episode, as where environments reset.
    after = {"observation": obs[1:], "reward": torch.randn(N, 1), "done": end}
    after["terminated"] = end & (torch.rand(N, 1) < 0.5)
    after["done"] = end & ~after["terminated"]  # either tells of an end
    action = 2.0 * torch.rand(N, 1) - 1.0
    return TensorDict({"observation": obs[:-1], "action": action, "next": after}, [N])


def buffer(data):
    stored = TensorDictReplayBuffer(storage=LazyTensorStorage(1000))
    stored.extend(data)
    return stored


def factory(**options):
    return PredictorFactory(**{"hidden_sizes": (8,), "n_models": 2} | options)


def warnings_of(predictor, data):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learn(predictor, buffer(data))
    return [str(w.message) for w in caught if "context" in str(w.message)]


def test_a_context_that_moves_is_named_once():
    predictor = factory(context_dims=[2, 3])(Unbounded((4,)), ACTIONS)
    assert not warnings_of(predictor, transitions())
    with pytest.warns(UserWarning, match=MOVING) as told:
        learn(predictor, buffer(transitions(every=1)))
    assert told[0].filename == learn.__code__.co_filename  # where learn was called
    assert not warnings_of(predictor, transitions(every=1))


@pytest.mark.parametrize(
    ("options", "every", "told"),
    [
        ({"context_dims": [2, 3]}, 2, True),
        ({"context_dims": [2, 3]}, 15, False),  # a goal that is drawn anew now and then
        ({"context_dims": [2]}, 1, False),  # what moves is part of the state
        ({}, 1, False),
        ({"partial_encoder": partial(EncoderNet, latent_state_dim=2, context_dim=1)}, 1, False),
    ],
)
def test_nothing_else_is_warned_of(options, every, told):
    found = warnings_of(factory(**options)(Unbounded((4,)), ACTIONS), transitions(every=every))
    assert len(found) == told


def test_rounding_is_no_change():
    data = transitions()
    data["next", "observation"] = data["next", "observation"] * (1.0 + 1e-6)
    assert not warnings_of(factory(context_dims=[2, 3])(Unbounded((4,)), ACTIONS), data)


def test_joined_entries_are_counted_in_their_order():
    """The goal comes first in the list, so that it has the first dimensions."""
    data = transitions(every=1)
    for part in (data, data["next"]):
        obs = part.pop("observation")
        part["place"], part["desired_goal"] = obs[:, :2], obs[:, 2:]
    spec = Composite(place=Unbounded((2,)), desired_goal=Unbounded((2,)))
    predictor = factory(observation_key=["desired_goal", "place"])(spec, ACTIONS)
    assert "dimensions [1] of" in warnings_of(predictor, data)[0]


def test_an_accelerator_is_not_waited_for():
    accelerator = Accelerator()
    watch = _context.ContextWatch(accelerator.move(FixedEncoderNet((4,), [0, 1], [2, 3])))
    data = transitions(every=1).apply(accelerator._there, device=accelerator.device)
    with accelerator.watched():
        watch.look(data["observation"], data["next", "observation"], ~data["next", "done"])


def test_what_an_accelerator_finds_is_told_by_a_later_call(monkeypatch):
    late = Watch(at_once=())
    monkeypatch.setattr(_context, "refuse", late.refuse)
    data = transitions(every=1)
    watch = _context.ContextWatch(FixedEncoderNet((4,), [0, 1], [2, 3]))
    looked_at = data["observation"], data["next", "observation"], ~data["next", "done"]
    watch.look(*looked_at)
    watch.look(*looked_at)
    with pytest.warns(UserWarning, match=MOVING) as told:
        late.flush()
    assert len(told) == 1
