"""What a hierarchy hands to its levels, carries, and passes on."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from helpers import collected, known_level
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import RenameTransform, SerialEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType, check_env_specs, set_exploration_type
from torchrl.modules.utils import get_primers_from_module

from layeredrl_torchrl import Hierarchy, RandomLevel, _watch

ONE = Unbounded((1,))


@pytest.fixture
def three(toy):
    """Three levels with memory; the middle one sees half of the observation."""

    def build(n=None, **options):
        env = toy.Env(n)
        levels = [
            toy.Level(1),
            toy.Level(2, input_spec=ONE, duration=2, **options),
            toy.Level(3, input_spec=ONE, duration=3),
        ]
        return env, Hierarchy(levels, env, observation_maps=[None, [2, 3], None])

    return build


def set_up(env, hierarchy):
    return TransformedEnv(env, hierarchy.make_tensordict_primer())


@pytest.mark.parametrize("n", [None, 3])
def test_levels_are_handed_what_they_need_and_specs_are_what_is_carried(three, n):
    """Levels are handed just what they need; what is read and written is what is declared."""
    env, hierarchy = three(n)
    env = set_up(env, hierarchy)
    check_env_specs(env)
    data = env.rollout(9, hierarchy, break_when_any_done=False)
    assert set(hierarchy.in_keys) <= set(env.reset().keys(True, True))
    assert set(hierarchy.out_keys) <= set(data.keys(True, True))
    common = [str(("own", "sum")), "n_actions", "observation"]
    for i, level in enumerate(hierarchy.levels):
        assert level.calls
        for keys in level.calls:
            assert keys == sorted(common + ["input"] * (i > 0))


class Elsewhere(Hierarchy):
    """Returns another TensorDict than it is given, as a policy on another device does."""

    def forward(self, tensordict):
        return super().forward(tensordict.clone())


def test_a_collector_gets_back_all_that_is_carried(three):
    batches = []
    for kind in (Hierarchy, Elsewhere):
        env, hierarchy = three(2)
        hierarchy.__class__ = kind
        batches += collected(env, hierarchy, 1, 12)
    here, there = (data.exclude("collector") for data in batches)
    assert (here == there).all()


def test_what_is_below_next_stays(three):
    env, hierarchy = three(2)
    td = set_up(env, hierarchy).reset()
    alone = hierarchy(td.clone())["next"]
    found = hierarchy(td.set(("next", "kept"), torch.ones(2, 1)))["next"]
    assert (found.pop("kept") == 1).all()
    assert (found == alone).all()


def test_levels_act_only_where_they_are_due(three):
    env, hierarchy = three(4)
    env = set_up(env, hierarchy)
    data = env.rollout(40, hierarchy, break_when_any_done=False)
    assert data["next", "done"].any()
    for level, own in zip(hierarchy.levels, hierarchy.transitions(data), strict=True):
        going_on = 4 if level is not hierarchy.levels[-1] else 0
        assert len(own) <= level.n_rows <= len(own) + going_on
    assert hierarchy.levels[0].n_rows < hierarchy.levels[1].n_rows < 120
    assert hierarchy.levels[2].n_rows == 160


@pytest.mark.parametrize("options", [{}, {"until": 3}])
def test_on_an_accelerator_all_are_called_and_those_that_are_due_count(three, monkeypatch, options):
    """Where counting who is due would wait for the device, a CPU's way is the twin."""
    env, hierarchy = three(4, **options)
    runs = []
    for at_once in (("cpu",), ()):
        monkeypatch.setattr(_watch._WATCH, "at_once", at_once)
        env, _ = three(4)
        env = set_up(env, hierarchy)
        runs.append(env.rollout(30, hierarchy, break_when_any_done=False))
    assert runs[0]["next", "done"].any()
    assert (runs[0] == runs[1]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_level_acts_on_what_is_not_finite(three, bad):
    env, hierarchy = three(2)
    td = set_up(env, hierarchy).reset()
    td["observation"][1, 3] = bad
    with pytest.raises(ValueError, match=r"observation holds 1 non-finite values.*\[1, 3\]"):
        hierarchy(td)
    assert not any(level.calls for level in hierarchy.levels)


def test_torchrl_finds_one_primer(three):
    env, hierarchy = three()
    primer = get_primers_from_module(hierarchy)
    assert set(primer.primers.keys()) == {"hierarchy", "hierarchy_memory"}
    # Other functions reach all modules.
    names = []
    hierarchy.apply(lambda module: names.append(type(module).__name__))
    assert names.count("Formula") == 3
    # A collector adds it once, and to an environment that has it, not at all.
    env = set_up(env, hierarchy)
    options = {"frames_per_batch": 4, "total_frames": 4, "auto_register_policy_transforms": True}
    collector = Collector(env, hierarchy, **options)
    names = [type(t).__name__ for t in collector.env.transform]
    assert names.count("HierarchyPrimer") == 1
    assert set(next(iter(collector)).keys()) & {"own", "memory"} == set()


def test_in_torchrls_serial_environments_it_acts_as_in_a_batched_one(toy, three):
    """In a SerialEnv it does what it does in a batched environment."""
    _, hierarchy = three(2)
    runs = []
    for env in (
        toy.Env(2),
        SerialEnv(2, [lambda: toy.Env(None, first=0), lambda: toy.Env(None, first=1)]),
    ):
        data = torch.cat(list(collected(env, hierarchy, 3, 14)), 1)
        runs.append(hierarchy.transitions(data))
    for one, other in zip(*runs, strict=True):
        one, other = one.exclude("collector"), other.exclude("collector")
        assert len(one)
        assert (one == other).all()


@pytest.mark.parametrize("n", [None, 3])
def test_in_keys_are_all_that_it_reads(three, n):
    env, hierarchy = three(n)
    td = set_up(env, hierarchy).reset()
    assert {str(key) for key in hierarchy.in_keys} == {
        "observation",
        *(str(key) for key in hierarchy.make_tensordict_primer().primers.keys(True, True)),
    }
    expected = hierarchy(td.clone())["action"]
    assert torch.equal(hierarchy(td.select(*hierarchy.in_keys))["action"], expected)
    for key in hierarchy.in_keys:
        # What a level remembers it reads by itself.
        lacks = f"reads '{key}', which is missing" if isinstance(key, str) else '"own" not found'
        with pytest.raises(KeyError, match=lacks):
            hierarchy(td.select(*(other for other in hierarchy.in_keys if other != key)))


def test_one_hierarchy_acts_in_environments_of_several_sizes(three):
    """A primer that is fitted to an environment leaves those of others alone."""
    _, hierarchy = three()
    for n in (3, None, 2):
        env, _ = three(n)
        env = set_up(env, hierarchy)
        assert env.rollout(3, hierarchy)["action"].shape == ((3, 1) if n is None else (n, 3, 1))


def test_keys_of_the_environment_can_be_renamed(toy, three):
    """Nested ones, too; the transitions are the same."""
    names = ["observation", "reward"], [("agents", "observation"), ("agents", "pay")]
    plain, hierarchy = three(2)
    renamed = toy.Env(2).append_transform(
        RenameTransform(*names, ["action"], [("agents", "action")])
    )
    maps = [None, [2, 3], None]
    with pytest.raises(ValueError, match="pass observation_key="):
        Hierarchy(list(hierarchy.levels), renamed, observation_maps=maps)
    other = Hierarchy(
        list(hierarchy.levels), renamed, observation_maps=maps, observation_key=names[1][0]
    )
    (data,), (moved,) = collected(plain, hierarchy, 1, 18), collected(renamed, other, 1, 18)
    assert torch.equal(moved["agents", "action"], data["action"])
    for one, two in zip(hierarchy.transitions(data), other.transitions(moved), strict=True):
        assert (one == two).all()


@pytest.mark.parametrize("n", [None, 3])
def test_choices_are_handed_down_in_the_dtype_of_their_spec(toy, n):
    """Choices as input: integers between levels, also of a single environment."""
    for spec in (OneHot(3), Categorical(3)):

        class Chooses(toy.Level):
            def forward(self, tensordict, spec=spec):
                return tensordict.set("action", spec.rand(tensordict.batch_size))

        class Follows(toy.Level):
            def forward(self, tensordict, spec=spec):
                assert spec.is_in(tensordict["input"])
                action = tensordict["input"].reshape(*tensordict.batch_size, -1)[..., :1].float()
                return tensordict.set("action", action)

        for level in (Chooses, Follows):
            level.record = toy.Base.record
            level.make_tensordict_primer = toy.Base.make_tensordict_primer
            level.hands_back = toy.Base.hands_back
        env = toy.Env(n)
        hierarchy = Hierarchy([Chooses(1), Follows(1, input_spec=spec, duration=2)], env)
        (data,) = collected(env, hierarchy, 1, 9 * (n or 1))
        upper, lower = hierarchy.transitions(data)
        assert upper["action"].dtype == lower["input"].dtype == spec.dtype
        assert spec.is_in(upper["action"])


@pytest.mark.parametrize("n", [None, 3])
def test_what_a_level_records_may_have_any_shape(toy, n):
    class Notes(toy.Level):
        record = Composite(
            {
                "table": Unbounded((2, 3)),
                "count": Unbounded((), dtype=torch.int64),
                ("notes", "double"): Unbounded((1,)),
            }
        )

        def forward(self, tensordict):
            action = super().forward(tensordict)["action"]
            tensordict["table"] = action.unsqueeze(-1) * torch.arange(6.0).reshape(2, 3)
            tensordict["count"] = action.squeeze(-1).long()
            return tensordict

    env = toy.Env(n)
    hierarchy = Hierarchy([Notes(1), toy.Level(2, input_spec=ONE, duration=3)], env)
    (data,) = collected(env, hierarchy, 1, 12 * (n or 1))
    upper, _ = hierarchy.transitions(data)
    assert len(upper["action"].unique()) > 1
    expected = upper["action"].unsqueeze(-1) * torch.arange(6.0).reshape(2, 3)
    assert torch.equal(upper["table"], expected)
    assert torch.equal(upper["count"], upper["action"].squeeze(-1).long())


def test_a_missing_observation_or_memory_is_named(three):
    env, hierarchy = three()
    with pytest.raises(KeyError, match=r"append_transform\(hierarchy\.make_tensordict_primer"):
        hierarchy(env.reset())
    held = set_up(env, hierarchy).reset()
    with pytest.raises(KeyError, match=r"reads 'observation', which is missing"):
        hierarchy(held.exclude("observation"))


def test_answers_of_levels_are_checked(toy):
    class Silent(toy.Level):
        def forward(self, tensordict):
            return tensordict

    class Forgets(toy.Level):
        def forward(self, tensordict):
            return super().forward(tensordict).exclude("next", inplace=True)

    class Mumbles(toy.Level):
        def hands_back(self, tensordict):
            return super().hands_back(tensordict).squeeze(-1)

    def run(*levels):
        env = toy.Env(3)
        next(collected(env, Hierarchy(levels, env), 1, 12))

    with pytest.raises(KeyError, match="Silent did not write it"):
        run(Silent(1, remembers=False))
    with pytest.raises(KeyError, match=r"reads \('next', 'own', 'sum'\).*Forgets did not write it"):
        run(Forgets(1))
    with pytest.raises(ValueError, match=r"Mumbles.hands_back gave torch.bool \(3,\), expected"):
        run(toy.Level(1), Mumbles(2, input_spec=ONE, duration=2))


@pytest.mark.parametrize("n", [None, 1, 3])
@pytest.mark.parametrize("place", ["upper", "lower"])
@pytest.mark.parametrize("key", ["action", ("notes", "double"), ("own", "sum")])
@pytest.mark.parametrize("change", ["wide", "flat", "complex"])
def test_what_a_level_writes_has_to_fit_its_specs(toy, n, place, key, change):
    class Wrong(toy.Level):
        def forward(self, tensordict):
            super().forward(tensordict)
            at = key if key[0] != "own" else ("next", *key)
            value = tensordict[at]
            other = {"wide": value.expand(*value.shape[:-1], 2), "flat": value.squeeze(-1)}
            return tensordict.set(at, other.get(change, value.to(torch.complex64)))

    kinds = {place: Wrong}
    upper = kinds.get("upper", toy.Level)(1)
    lower = kinds.get("lower", toy.Level)(2, input_spec=ONE, duration=2)
    env = toy.Env(n)
    hierarchy = Hierarchy([upper, lower], env)
    env = set_up(env, hierarchy)
    error = TypeError if change == "complex" else ValueError
    batch = [] if n is None else [n]
    fits = {"wide": [*batch, 2], "flat": batch}
    match = "complex64" if change == "complex" else re.escape(f"of shape {tuple(fits[change])}, ")
    last = key[-1] if isinstance(key, tuple) else key
    with pytest.raises(error, match=f"Wrong wrote .*{last}'.*{match}"):
        env.rollout(1, hierarchy)


@pytest.mark.parametrize("place", ["upper", "lower"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_action_that_is_not_finite_goes_no_further(toy, place, value):
    """A level of one's own below, or the environment, would act on it in silence."""

    class Fails(toy.Level):
        def forward(self, tensordict):
            super().forward(tensordict)["action"][-1] = value
            return tensordict

    kinds = {place: Fails}
    levels = [
        kinds.get("upper", toy.Level)(1),
        kinds.get("lower", toy.Level)(2, input_spec=ONE, duration=2),
    ]
    env = toy.Env(2)
    hierarchy = Hierarchy(levels, env)
    with pytest.raises(ValueError, match=rf"'action', which Fails wrote, holds 1 .*{value}.*\[1, "):
        set_up(env, hierarchy).rollout(1, hierarchy)


def test_choices_have_to_be_whole_numbers(toy):
    class Halves(toy.Base):
        def forward(self, tensordict):
            return tensordict.set("action", torch.full(tensordict.batch_size, 1.5))

        def learn(self, data):
            return {}

    lower = RandomLevel(input_spec=Categorical(3), duration=1)
    env = toy.Env(2)
    hierarchy = Hierarchy([Halves(), lower], env)
    with pytest.raises(TypeError, match=r"'action' in torch.float32, expected torch.int64"):
        set_up(env, hierarchy).rollout(1, hierarchy)


def test_the_environment_is_given_the_dtype_of_its_spec(toy):
    class Double(toy.Level):
        def forward(self, tensordict):
            super().forward(tensordict)
            return tensordict.set("action", tensordict["action"].double())

    env = toy.Env(2)
    hierarchy = Hierarchy([toy.Level(1), Double(2, input_spec=ONE, duration=2)], env)
    assert set_up(env, hierarchy).rollout(2, hierarchy)["action"].dtype == torch.float32


def test_evaluation_reaches_the_levels_of_a_copy(toy):
    """An upper level that is in its random steps plans in evaluation; in a copy, too."""
    env = toy.Env()
    box = Bounded(-1.0, 1.0, (1,))
    levels = [known_level(n_initial_random_steps=9), toy.Level(2, input_spec=box, duration=2)]
    hierarchy = copy.deepcopy(Hierarchy(levels, env, observation_maps=[[2, 3], None]))
    upper, lower = hierarchy.levels
    assert lower.parent_predictor is upper.predictor is not levels[0].predictor
    (data,) = collected(env, hierarchy, 1, 4)
    assert hierarchy.transitions(data)[0]["random_action"].all()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        data = set_up(env, hierarchy).rollout(4, hierarchy)
    assert not hierarchy.transitions(data)[0]["random_action"].any()
