"""Options hold when a state is loaded that was saved with others, by an earlier version, too."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import OBS, make_transitions, model_free_level
from loss_parts import LOSSES, learner_of, soft
from torchrl.data import Bounded, OneHot
from torchrl.objectives import REDQLoss

from layeredrl_torchrl import DQNLearner, SACLearner

# Where TorchRL's losses keep their options.
BEFORE = {
    "loss._value_estimator.gamma": 0.99,
    "loss._target_entropy": -2.0,
    "loss.target_entropy_buffer": -2.0,
    "loss.alpha_init": 1.0,
    "loss.min_log_alpha": -1.0,
    "loss.max_log_alpha": 1.0,
    "loss.min_action": -5.0,
    "loss.max_action": 5.0,
    "low": -5.0,
    "high": 5.0,
}


def sac(gamma, entropy):
    return partial(SACLearner, hidden_sizes=(8,), gamma=gamma, target_entropy=entropy)


def dqn(gamma, entropy):
    return partial(DQNLearner, hidden_sizes=(8,), gamma=gamma)


def own(name):
    return lambda gamma, entropy: learner_of(LOSSES[name][0], gamma=gamma)


def redq(gamma, entropy, **options):
    make = soft(REDQLoss, n=4, sub_sample_len=2, target_entropy=entropy, **options)
    return learner_of(make, gamma=gamma)


KINDS = {"SAC": sac, "DQN": dqn, "REDQ": redq, "TD3": own("TD3"), "CrossQ": own("CrossQ")}


def level_of(name, high, gamma, entropy, **options):
    spec = OneHot(3) if name == "DQN" else Bounded(-high, high, (1,))
    return model_free_level(OBS, spec, learner_factory=KINDS[name](gamma, entropy), **options)


def options_of(level):
    """All buffers that no update changes, by name."""
    before = {name: value.clone() for name, value in level.learner.named_buffers()}
    names = [name for name in before if "_params." not in name and not name.endswith("n_updates")]
    return {name: before[name] for name in names}


def as_before(level):
    """The state as earlier versions saved it, with all options that the learner has."""
    state = dict(level.state_dict())
    for name, value in level.learner.named_buffers():
        if name in BEFORE:
            state["learner." + name] = torch.full_like(value, BEFORE[name])
    return state


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_options_of_the_new_object_hold_and_what_was_learned_is_loaded(name, earlier):
    saved, level = level_of(name, 5.0, 0.99, -2.0), level_of(name, 1.0, 0.5, -1.0)
    data = make_transitions()
    if name == "DQN":
        data["action"] = OneHot(3).rand((60,))
    saved.learn(data)
    options = options_of(level)
    assert float(options["loss._value_estimator.gamma"]) == 0.5
    state = as_before(saved) if earlier else saved.state_dict()
    assert earlier == (len(state) > len(level.state_dict()))
    level.load_state_dict(state)
    torch.testing.assert_close(options_of(level), options, rtol=0, atol=0)
    torch.testing.assert_close(dict(level.state_dict()), dict(saved.state_dict()), rtol=0, atol=0)
    action = level.learner.act(torch.randn(500, 2), explore=True)
    assert bool(level.action_spec.is_in(action))


@pytest.mark.parametrize("name", KINDS)
def test_a_learner_alone_loads_earlier_states_too(name):
    saved, level = level_of(name, 5.0, 0.99, -2.0), level_of(name, 1.0, 0.5, -1.0)
    options, prefix = options_of(level), "learner."
    state = {
        key.removeprefix(prefix): value
        for key, value in as_before(saved).items()
        if key.startswith(prefix)
    }
    level.learner.load_state_dict(state)
    torch.testing.assert_close(options_of(level), options, rtol=0, atol=0)
    torch.testing.assert_close(
        dict(level.learner.state_dict()), dict(saved.learner.state_dict()), rtol=0, atol=0
    )
    with pytest.raises(RuntimeError, match="Unexpected key"):
        level.learner.load_state_dict({**state, "loss.other": torch.zeros(())})
    with pytest.raises(ValueError, match=r"learner\.loss\.other: not in"):
        level.load_state_dict({**as_before(saved), "learner.loss.other": torch.zeros(())})


def test_a_temperature_is_an_option_where_it_is_fixed_and_learned_where_it_is_not():
    def fixed(alpha):
        factory = redq(0.9, -1.0, fixed_alpha=True, alpha_init=alpha)
        return model_free_level(OBS, Bounded(-1.0, 1.0, (1,)), learner_factory=factory)

    saved, level = fixed(0.5), fixed(0.125)
    level.load_state_dict(saved.state_dict())
    assert float(level.learner.loss.log_alpha.exp()) == pytest.approx(0.125)
    saved, level = level_of("REDQ", 1.0, 0.9, -1.0), level_of("REDQ", 1.0, 0.9, -1.0)
    saved.learn(make_transitions())
    assert float(saved.learner.loss.log_alpha) != float(level.learner.loss.log_alpha)
    level.load_state_dict(saved.state_dict())
    assert float(saved.learner.loss.log_alpha) == float(level.learner.loss.log_alpha)
