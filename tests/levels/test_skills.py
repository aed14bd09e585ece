"""A level that discovers skills, in a real hierarchy in a small world."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import collected, model_free_level, moved, parameters, planner_level
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from layeredrl_torchrl import (
    DADSReward,
    Hierarchy,
    ICEMPlanner,
    PredictorFactory,
    RandomLevel,
    SACLearner,
    SkillLevel,
    SPlaTESReward,
)

DURATION, LENGTH = 4, 12


class Plane(EnvBase):
    """A point in a plane moves by its action; episodes of twelve steps end by truncation."""

    def __init__(self, n, pay=1.0):
        super().__init__(batch_size=[n])
        self.pay = pay
        self.observation_spec = Composite(observation=Unbounded((n, 3)), shape=(n,))
        self.action_spec = Bounded(-1.0, 1.0, (n, 2))
        self.reward_spec = Unbounded((n, 1))
        ends = ("done", "terminated", "truncated")
        flags = {key: Binary(1, (n, 1), dtype=torch.bool) for key in ends}
        self.full_done_spec = Composite(flags, shape=(n,))
        self.state = torch.zeros(n, 3)

    def _reset(self, tensordict=None, **_):
        self.state = torch.zeros(*self.batch_size, 3)
        return TensorDict({"observation": self.state.clone()}, self.batch_size)

    def _step(self, tensordict):
        moved = self.state[:, :2] + tensordict["action"]
        self.state = torch.cat([moved, self.state[:, 2:] + 1], -1)
        ends = self.state[:, 2:] >= LENGTH
        following = {
            "observation": self.state.clone(),
            "reward": self.pay * moved[:, :1],
            "terminated": torch.zeros_like(ends),
            "truncated": ends,
            "done": ends.clone(),
        }
        return TensorDict(following, self.batch_size)

    def _set_seed(self, seed):
        return seed


def make_skills(**options):
    reward = options.pop("reward", None)
    given = {
        "input_spec": Bounded(-1.0, 1.0, (2,)),
        "duration": DURATION,
        "learner_factory": partial(SACLearner, hidden_sizes=(32, 32), lr=3e-3, tau=0.02),
        "batch_size": 64,
        "n_initial_random_steps": 100,
    }
    reward = reward or SPlaTESReward(n_symmetry_breaking_steps=1500, n_skill_samples=16)
    return SkillLevel(skill_reward=reward, **given | options)


def make_agent(env, each_step=False, **options):
    factory = PredictorFactory(hidden_sizes=(16,), n_models=2, predictor_options={"model_lr": 1e-2})
    planner = planner_level(
        predictor_factory=factory,
        planner_factory=partial(ICEMPlanner, horizon=2, n_samples=16, n_iterations=1),
        n_initial_random_steps=100,
        updates_per_step=1.0,
        random_prob=1.0,
        random_duration=1,
        batch_size=64,
        model_batch_size=64,
        each_step=each_step,
    )
    # A skill sees the place and not the time, the planner both.
    return Hierarchy([planner, make_skills(**options)], env, observation_maps=[None, [0, 1]])


def train(agent, env, n_steps, per_batch=120):
    return [agent.learn(data) for data in collected(env, agent, n_steps // per_batch, per_batch)]


def ends(skills, skill):
    """Where ``skill [n, 2]`` leads from the origin."""
    place = torch.zeros(len(skill), 2)
    for step in range(DURATION):
        n_actions = torch.full((len(skill), 1), step)
        td = {"observation": place, "input": skill, "n_actions": n_actions}
        place = place + skills(TensorDict(td, [len(skill)]))["action"]
    return place


def test_skills_fan_out():
    """From nothing but the reward of skills; the environment's is of no use to it."""
    env = Plane(10)
    agent = make_agent(env, updates_per_step=0.25)
    skills = agent.levels[1].eval()
    skill = torch.rand(200, 2).mul(2).sub(1)
    before = ends(skills, skill).std(0)
    train(agent.train(), env, 2400)
    after = ends(skills.eval(), skill)
    assert bool((after.std(0) > 0.8).all()), (before, after.std(0))
    # Which skill it was can be read off where it led, by a linear map.
    design = torch.cat([after, torch.ones(200, 1)], 1)
    residual = skill - design @ torch.linalg.lstsq(design, skill).solution
    assert residual.var(0).sum() < 0.25 * skill.var(0).sum()


def test_dads_pays_for_each_step_by_a_model_of_single_steps():
    env = Plane(3)
    agent = make_agent(env, each_step=True, reward=DADSReward(n_skill_samples=8))
    (data,) = collected(env, agent, 1, 60)
    above, below = agent.transitions(data)
    place = data["observation"].flatten(0, 1)
    assert len(above) == len(below) == 60
    assert torch.equal(above["observation"], place)
    assert torch.equal(below["parent_observation"], place)
    step = below["next", "parent_observation"] - below["parent_observation"]
    assert torch.equal(step[:, 2], torch.ones(60))
    torch.testing.assert_close(step[:, :2], below["action"], atol=1e-5, rtol=0.0)
    agent.learn(data)
    below = agent.levels[1]
    assert bool((below._sampled(below.buffer.sample(32))["next", "reward"] != 0).all())


def test_a_skill_may_end_at_random():
    """After each action with a probability of 0.3, in evaluation too, and it is paid for then."""
    env = Plane(40)
    agent = make_agent(env, end_prob=0.3, updates_per_step=0.005)
    planner, skills = agent.levels
    planner.updates_per_step = 0.01
    data = torch.cat(list(collected(env, agent, 5, 480)), -1)
    above, below = agent.transitions(data)
    # Those of whole skills; the horizon of an episode is no multiple of their length.
    lengths = above["next", "elapsed_steps"][~above["next", "interrupted"]]
    share = [0.3 * 0.7**k for k in range(DURATION - 1)] + [0.7 ** (DURATION - 1)]
    ended = below["ended"][below["n_actions"] < DURATION - 1].float()
    assert abs(ended.mean() - 0.3) < 4 * (0.21 / len(ended)) ** 0.5
    counts = torch.bincount(lengths, minlength=DURATION + 1)[1:] / len(lengths)
    assert (counts - torch.tensor(share)).abs().max() < 0.05
    done, last = below["next", "done"], below["n_actions"] == DURATION - 1
    assert torch.equal(below["next", "input_done"], below["ended"] | last | done)
    agent.learn(data)
    rows = skills._sampled(skills.buffer[:])
    paid = rows["next", "reward"] != 0
    assert torch.equal(paid, rows["ended"] | (rows["n_actions"] == DURATION - 1))
    seen = skills._prepare(skills.buffer[:])["next", "terminated"]
    assert torch.equal(seen, paid)
    assert make_skills(end_prob=0.0).ends_by_duration
    assert not skills.ends_by_duration


class Pays(SPlaTESReward):
    """Pays the same for all."""

    pay = 100.0

    def forward(self, predictor, spec, observation, skill, *_):
        return torch.full((len(skill),), self.pay)


RULES = {
    "after fewer actions": lambda skills, td: td["n_actions"] >= 2,
    "after more actions": lambda skills, td: td["n_actions"] >= DURATION + 1,
    "at a place": lambda skills, td: td["observation"][..., :1] > 0.5,
    "at a place, or": lambda skills, td: (
        SkillLevel.hands_back(skills, td) | (td["observation"][..., :1] > 0.5)
    ),
}


@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("end_prob", [0.0, 0.1])
@pytest.mark.parametrize("rule", RULES)
def test_a_skill_is_paid_for_where_it_ends_by_any_rule(rule, end_prob, middle):
    class Own(SkillLevel):
        def hands_back(self, tensordict):
            done = RULES[rule](self, tensordict)
            return done | tensordict["ended"] if end_prob else done

    env, reward = Plane(10), Pays()
    planner, model = make_agent(env).levels
    planner = planner_level(
        predictor_factory=planner.predictor_factory,
        planner_factory=planner.planner_factory,
        n_initial_random_steps=10_000,
    )
    skills = Own(
        input_spec=model.input_spec,
        duration=DURATION,
        skill_reward=reward,
        learner_factory=model.learner_factory,
        end_prob=end_prob,
        each_step=middle,
        n_initial_random_steps=10_000,
    )
    below = [RandomLevel(input_spec=Bounded(-1.0, 1.0, (2,)), duration=2)] if middle else []
    agent = Hierarchy([planner, skills, *below], env)
    (data,) = collected(env, agent, 1, 480)
    rows = agent.transitions(data)[1]
    ended = rows["next", "input_done"] & ~rows["next", "done"]
    assert ended.any()
    paid = skills._sampled(rows.clone())["next", "reward"]
    inside = ~rows["next", "done"]
    assert torch.equal(paid[inside], reward.pay * ended[inside].float())


def test_in_the_middle_of_three_levels_skills_learn_by_the_predictor_above():
    """Skills of two places to go to, each of which the lowest level goes to in two steps."""
    env = Plane(10)
    planner = make_agent(env).levels[0]
    planner = planner_level(
        predictor_factory=planner.predictor_factory,
        planner_factory=planner.planner_factory,
        n_initial_random_steps=100,
        random_prob=1.0,
        random_duration=1,
    )
    skills = make_skills(duration=2, updates_per_step=0.1)
    mover = model_free_level(
        input_spec=Bounded(-1.0, 1.0, (2,)),
        duration=2,
        n_initial_random_steps=100,
        updates_per_step=0.05,
        reward_func=lambda td: -(td["next", "observation"] - td["input"]).norm(dim=-1),
    )
    agent = Hierarchy([planner, skills, mover], env, observation_maps=[None, [0, 1], [0, 1]])
    assert skills.parent_predictor is planner.predictor
    assert mover.parent_predictor is None
    before = [parameters(level) for level in agent.levels]
    (data,) = collected(env, agent, 1, 480)
    above, middle, below = agent.transitions(data)
    assert (above["next", "elapsed_steps"] == 4).all()
    assert (middle["next", "elapsed_steps"] == 2).all()
    assert len(below) == 2 * len(middle) == 4 * len(above) == 480
    assert torch.equal(middle["input"][1::2], above["action"])
    assert torch.equal(below["input"][1::2], middle["action"])
    assert torch.equal(middle["parent_observation"][1::2], above["observation"])
    infos = [agent.learn(data), *train(agent, env, 480, 480)]
    assert all(infos[1][f"{level.name}/n_updates"] > 0 for level in agent.levels)
    assert all(moved(level, old) for level, old in zip(agent.levels, before, strict=True))
    # What the middle level is paid comes of the planner's predictor as it is now.
    rows = skills.buffer[:]
    torch.manual_seed(4)
    paid = skills._sampled(rows.clone())["next", "reward"]
    last = rows["n_actions"].squeeze(-1) == 1
    assert not paid[~last].any()
    torch.manual_seed(4)
    read = ("parent_observation", "input", ("next", "parent_observation"))
    reward = skills.skill_reward(
        planner.predictor, skills.input_spec, *(rows[key][last] for key in read), 960
    )
    assert torch.equal(paid[last].squeeze(-1), reward)


@pytest.mark.parametrize(("reward", "each_step"), [(DADSReward(), False), (SPlaTESReward(), True)])
def test_the_planner_has_to_learn_from_what_is_paid(reward, each_step):
    message = rf"below level 0 .* needs .* each_step={reward.each_step}, got {each_step}"
    with pytest.raises(ValueError, match=message):
        make_agent(Plane(3), each_step=each_step, reward=reward)


def test_the_environments_reward_plays_no_part():
    learned = []
    for pay in (1.0, -100.0):
        torch.manual_seed(0)
        env = Plane(10, pay)
        agent = make_agent(env, updates_per_step=0.1)
        skills = agent.levels[1]
        train(agent, env, 360)
        learned.append((skills.learner.state_dict(), skills))
    (first, skills), (second, _) = learned
    # The predictor's model, which tells skills apart, draws and learns alike with both.
    assert skills.skill_reward.symmetry_breaking(int(skills.n_env_steps)) < 1.0
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[key], second[key], atol=1e-5) for key in first)


def test_a_resumed_run_of_skills_goes_on_bit_for_bit(tmp_path):
    first, second = (make_agent(Plane(5), updates_per_step=0.2) for _ in range(2))
    train(first, Plane(5), 240)
    drawn = second.levels[1].skill_reward.linear_model.clone()
    first.checkpoint().save(tmp_path / "run")
    end = train(first, Plane(5), 240)
    second.checkpoint().load(tmp_path / "run")
    assert not torch.equal(second.levels[1].skill_reward.linear_model, drawn)
    assert train(second, Plane(5), 240) == end
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: make_skills(reward=object()), TypeError, "SPlaTESReward"),
        (lambda: make_skills(duration=None), ValueError, "duration is None"),
        (lambda: make_skills(end_prob=1.5), ValueError, "end_prob"),
        (lambda: make_skills(reward_func=None), TypeError, "takes no reward_func"),
        (lambda: make_skills().attach(object()), TypeError, "put a PlannerLevel above"),
        (lambda: make_skills().attach(None), ValueError, "put a PlannerLevel above it"),
        (lambda: Hierarchy([RandomLevel(), make_skills()], Plane(2)), ValueError, "SkillLevel"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Told(SPlaTESReward):
    """Pays 2.5 nats where the first coordinate ends above 0, else half a nat."""

    def forward(self, predictor, spec, observation, skill, following, n_env_steps, since=None):
        return 0.5 + 2.0 * (following[:, 0] > 0)


def test_the_mean_reward_of_skills_is_reported():
    torch.manual_seed(0)
    env = Plane(2)
    reward = Told(normalize=True, offset=7.0)
    hierarchy = make_agent(env, reward=reward, n_initial_random_steps=100)
    infos = [hierarchy.learn(data) for data in collected(env, hierarchy, 6, n_steps=40)]
    assert "SkillLevel/reward" not in infos[1]  # no update yet
    info = infos[-1]
    stored = hierarchy.levels[1].buffer[:]
    last = stored[(stored["n_actions"] == DURATION - 1).squeeze(-1)]
    up = (last["next", "parent_observation"][:, 0] > 0).float().mean()
    assert abs(info["SkillLevel/reward"] - (0.5 + 2.0 * up)) < 0.1


def test_what_was_paid_before_an_error_is_not_reported(monkeypatch):
    env, reward = Plane(2), Pays()
    hierarchy = make_agent(env, reward=reward, n_initial_random_steps=0, updates_per_step=0.2)

    def fail(batch):
        raise OSError("disk full")

    monkeypatch.setattr(hierarchy.levels[1].learner, "update", fail)
    (data,) = collected(env, hierarchy, 1, n_steps=40)
    with pytest.raises(OSError, match="disk full"):
        hierarchy.learn(data)
    monkeypatch.undo()
    reward.pay = 1.0
    assert hierarchy.learn(data)["SkillLevel/reward"] == 1.0
