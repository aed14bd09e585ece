"""After an error in learning a level is as it was before."""

from __future__ import annotations

import pytest
import torch
from helpers import SPACES, both, collected, make_transitions, model_free_level, planner_level
from level_states import assert_same, everything
from torchrl.data import Bounded

from layeredrl_torchrl import Hierarchy, get_task


class Logger:
    """Raises what it is told to, when terms are logged."""

    error = None

    def log_metrics(self, metrics, step):
        if self.error is not None:
            raise self.error


@both
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), MemoryError()])
def test_after_an_error_in_an_update_it_is_as_if_nothing_had_been_learned(make, error):
    """In a ring that is full, where rows were overwritten; and the next call is as ever."""
    twins = [make(*SPACES, logger=Logger(), buffer_size=50) for _ in range(2)]
    twins[1].load_state_dict(twins[0].state_dict())
    batches = [make_transitions(n_steps=30, episode_length=10) for _ in range(4)]
    for level in twins:
        for i, data in enumerate(batches[:3]):
            torch.manual_seed(i)
            level.learn(data)
    tried, spared = twins
    before = everything(tried)
    tried.logger.error = error
    with pytest.raises(type(error)):
        tried.learn(batches[0])
    assert_same(everything(tried), before)
    tried.logger.error = None
    for level in twins:
        torch.manual_seed(9)
        level.learn(batches[3])
    assert_same(everything(tried), everything(spared))


@both
def test_after_a_first_batch_that_failed_the_next_may_be_of_another_kind(make):
    level = make(*SPACES, logger=Logger())
    level.logger.error = OSError("disk full")
    first = make_transitions().set("weight", torch.ones(60))
    with pytest.raises(OSError, match="disk full"):
        level.learn(first)
    level.logger.error = None
    level.learn(make_transitions().reshape(2, 30))
    assert len(level.buffer) == 60
    assert "weight" not in level.buffer[:].keys()


def test_an_error_of_the_lowest_level_undoes_what_the_highest_learned():
    env = get_task("InvertedPendulum-v5").make(seed=0)
    lower = model_free_level(input_spec=Bounded(-1.0, 1.0, (1,)), duration=2)
    agent = Hierarchy([planner_level(), lower], env)
    (data,) = collected(env, agent, 1, 30)
    agent.learn(data)
    before = [everything(level) for level in agent.levels]
    lower.logger = Logger()
    lower.logger.error = OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        agent.learn(data)
    for level, was in zip(agent.levels, before, strict=True):
        assert_same(everything(level), was)


def replace(key, value):
    return lambda data: data.set(key, value(data))


DONE, TERMINATED, REWARD = (("next", key) for key in ("done", "terminated", "reward"))
NEXT = ("next", "observation")
ELAPSED = ("next", "elapsed_steps")
NO_FLAG = r"terminated'\) is torch\.{}.*, expected torch\.bool .*for events and not their"
NO_COUNT = r"elapsed_steps'\) is torch\.{}, expected whole numbers of at least 1"
NO_BATCH = r"batch shape \({}\), expected transitions \[T\] or \[env, T\]"


def lacks(*names):
    return KeyError, f"learn reads .*{'.*'.join(names)}.*, which is missing among"


BROKEN = {
    "wide": (
        replace("observation", lambda d: torch.randn(len(d), 3)),
        (ValueError, r"^observation has shape \(20, 3\), expected \[\.\.\., 2\]"),
    ),
    "wide next": (
        replace(NEXT, lambda d: torch.randn(len(d), 3)),
        (ValueError, r"'next', 'observation'\) has shape \(20, 3\), expected \[\.\.\., 2\]"),
    ),
    "NaN": (
        replace("observation", lambda d: d["observation"] * torch.nan),
        (ValueError, r"^observation holds 40 non-finite values.*nan"),
    ),
    "NaN next": (
        replace(NEXT, lambda d: d[NEXT] * torch.nan),
        (ValueError, r"'next', 'observation'\) holds .* non-finite values.*nan"),
    ),
    "infinite": (
        replace(REWARD, lambda d: d[REWARD] / 0.0),
        (ValueError, r"'next', 'reward'\) holds 20 non-finite values.*inf"),
    ),
    "flat reward": (
        replace(REWARD, lambda d: d[REWARD].squeeze(-1)),
        (ValueError, r"'next', 'reward'\) has shape \(20,\), expected \[\.\.\., 1\]"),
    ),
    "integers": (
        replace("observation", lambda d: d["observation"].long()),
        (TypeError, r"observation must be a float tensor, got dtype torch\.int64"),
    ),
    "doubles": (
        replace("observation", lambda d: d["observation"].double()),
        (ValueError, r"'observation' of \(2,\) torch\.float64, but what is stored is .*float32"),
    ),
    "action outside": (
        replace("action", lambda d: d["action"] * 9.0),
        (ValueError, r"action .* is outside the action space"),
    ),
    "action wide": (
        replace("action", lambda d: d["action"].expand(-1, 2)),
        (ValueError, r"action has shape \(20, 2\), expected \(20, 1\)"),
    ),
    "no action": (lambda d: d.exclude("action"), lacks("'action'")),
    "no reward": (lambda d: d.exclude(REWARD), lacks("'next'", "'reward'")),
    "no termination": (lambda d: d.exclude(TERMINATED), lacks("'next'", "'terminated'")),
    "no done": (lambda d: d.exclude(DONE), lacks("'next'", "'done'")),
    "no next": (lambda d: d.exclude(NEXT), lacks("'next'", "'observation'")),
    "a probability": (
        replace(TERMINATED, lambda d: d[TERMINATED].float() * 0.3),
        (ValueError, NO_FLAG.format("float32")),
    ),
    "two": (
        replace(TERMINATED, lambda d: d[TERMINATED].long() + 1),
        (ValueError, NO_FLAG.format("int64")),
    ),
    "environments": (
        lambda d: d.reshape(5, -1),
        (ValueError, r"batch shape \(5, 4\), but the buffer stores 1 axes"),
    ),
    "no time": (
        replace(ELAPSED, lambda d: torch.zeros(len(d), 1)),
        (ValueError, NO_COUNT.format("float32 from 0.0")),
    ),
    "half a step": (
        replace(ELAPSED, lambda d: torch.full((len(d), 1), 1.5)),
        (ValueError, NO_COUNT.format("float32 from 1.5")),
    ),
    "no steps": (
        replace(ELAPSED, lambda d: torch.arange(len(d)).unsqueeze(-1)),
        (ValueError, NO_COUNT.format("int64 from 0")),
    ),
    "several steps": (
        replace("steps_to_next_obs", lambda d: torch.full((len(d), 1), 3)),
        (ValueError, r"transitions of up to 3 steps .*leave MultiStep out"),
    ),
    "one row": (lambda d: d[0], (ValueError, NO_BATCH.format(""))),
    "no rows": (lambda d: d[:0], (ValueError, NO_BATCH.format("0,"))),
    "nothing": (lambda d: None, (TypeError, r"data must be a TensorDict.*got NoneType")),
}
# A level without a model stores single transitions, of any number of environments.
MADE_AND_BROKEN = [
    pytest.param(make, name, id=f"{make.__name__}-{name}")
    for make in (planner_level, model_free_level)
    for name in BROKEN
    if (make, name) != (model_free_level, "environments")
]


@pytest.mark.parametrize(("make", "name"), MADE_AND_BROKEN)
def test_a_bad_batch_is_named_and_leaves_no_trace(make, name):
    breaks, (error, message) = BROKEN[name]
    level = make(*SPACES)
    for _ in range(2):
        before = everything(level)
        bad = breaks(make_transitions(n_steps=20))
        # At first those are as good as others.
        if name not in ("doubles", "environments") or len(level.buffer):
            with pytest.raises(error, match=message):
                level.learn(bad)
        assert_same(everything(level), before)
        level.learn(make_transitions())
    assert len(level.buffer) == 120


def test_an_entry_from_above_that_is_missing_is_named():
    data = make_transitions(n_steps=20)
    data["input"], data["n_actions"] = torch.rand(20, 1), torch.zeros(20, 1, dtype=torch.int64)
    data["next", "input_done"] = data["next", "done"].clone()
    options = {"input_spec": Bounded(-1.0, 1.0, (1,)), "duration": 4}
    level = model_free_level(*SPACES, **options)
    for key in ("input", "n_actions", ("next", "input_done")):
        last = key if isinstance(key, str) else key[-1]
        with pytest.raises(KeyError, match=f"learn reads .*{last}.*, which is missing"):
            level.learn(data.exclude(key))
    assert not len(level.buffer)
    # Without an end of the input, nobody has to say where it is.
    model_free_level(*SPACES, **options, input_ends=False).learn(data.exclude(key))


@both
def test_what_was_stored_before_has_to_be_there_again(make):
    """TorchRL would store zeros: here terminations that never were."""
    level = make(*SPACES, store_keys=["weight"])
    weighted = make_transitions().set("weight", torch.ones(60))
    level.learn(weighted)
    with pytest.raises(KeyError, match="lacks 'weight'"):
        level.learn(make_transitions())
    fresh = make(*SPACES, store_keys=["weight"])
    fresh.learn(make_transitions())
    with pytest.raises(KeyError, match="adds 'weight'"):
        fresh.learn(weighted)
    assert len(fresh.buffer) == len(level.buffer) == 60
