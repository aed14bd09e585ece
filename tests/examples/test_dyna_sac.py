"""The example as a user runs it (real MuJoCo, small numbers), and its agent alone.

One run is a subprocess; the others call what it calls, since importing takes longer than they do.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
import tyro
from tensordict import TensorDict
from torch._dynamo.utils import counters
from torchrl.envs import ExplorationType, set_exploration_type

from layeredrl_torchrl import get_task, make_batched
from layeredrl_torchrl.nets import StackedProbFCDynamics

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = (
    "--task=InvertedPendulum-v5",
    "--total-env-steps=160",
    "--random-steps=60",
    "--n-envs=2",
    "--steps-per-batch=20",
    "--steps-per-checkpoint=80",
    "--eval-episodes=2",
    "--imagined-per-step=5",
    "--horizon=3",
    "--imagined-size=400",
    "--model-updates-per-step=0.2",
    "--updates-per-step=0.2",
    "--updates-per-actor-update=2",
    "--batch-size=16",
    "--n-models=2",
    "--model-hidden-size=8",
    "--hidden-size=8",
)


@pytest.fixture(scope="module")
def examples():
    """The modules of the example, which lie beside each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import dyna_agent
        import dyna_sac

        yield dyna_agent, dyna_sac


@pytest.fixture
def run(examples):
    """``run(*options)``: the example in this process."""
    _, dyna_sac = examples

    def call(*options: str) -> None:
        dyna_sac.main(tyro.cli(dyna_sac.Config, args=options))

    return call


@pytest.fixture(scope="module")
def trained(run_script, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a short run."""
    folder = tmp_path_factory.mktemp("dyna")
    options = (*SMALL, "--plan", "--plan-horizon=2", "--plan-samples=20", f"--output={folder}")
    done = run_script("dyna_sac.py", *options)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_leaves_curve_picture_and_checkpoints(trained, curve):
    folder, out = trained
    rows = curve(folder)
    assert [float(row["env_steps"]) for row in rows] == list(range(20, 161, 20))
    for term in ("nll", "loss_qvalue"):  # learning starts when the random phase ends
        assert [row[term] == "nan" for row in rows] == [True] * 2 + [False] * 6
    assert [float(row["horizon"]) for row in rows[2:]] == [3.0] * 6
    assert (folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((folder / "checkpoints").iterdir())) == 2
    first, second, last = out.splitlines()[-3:]
    assert "160 steps, mean return" in first
    assert "160 steps, planned, mean return" in second
    assert "solved from 1000" in first
    assert str(folder) in last


@pytest.mark.slow
def test_goes_on_from_the_last_checkpoint(trained, run, curve, tmp_path):
    """More steps on top of a finished run; without --resume its folder is left alone."""
    folder = tmp_path / "copy"
    shutil.copytree(trained[0], folder)
    before = curve(folder)
    with pytest.raises(SystemExit, match="add --resume"):
        run(*SMALL, f"--output={folder}")
    assert curve(folder) == before
    run(*SMALL, f"--output={folder}", "--resume", "--total-env-steps=200", "--random-steps=190")
    rows = curve(folder)
    assert rows[:8] == before
    assert [float(row["env_steps"]) for row in rows[8:]] == [180, 200]
    assert all(row["nll"] != "nan" for row in rows[8:])  # no second random phase
    assert float(rows[8]["seconds"]) > float(before[-1]["seconds"])
    with pytest.raises(SystemExit, match=r"was made with \{'task': 'InvertedPendulum-v5'\}"):
        run(*SMALL, f"--output={folder}", "--resume", "--task=Reacher-v5")
    with pytest.raises(SystemExit, match=r"was made with \{'entropy_per_action': -0.5\}"):
        run(*SMALL, f"--output={folder}", "--resume", "--entropy-per-action=0")


def test_sac_alone_has_no_model(run, curve, tmp_path):
    folder = tmp_path / "sac"
    run(*SMALL, "--imagined-share=0", f"--output={folder}")
    assert all(row["nll"] == row["horizon"] == "nan" for row in curve(folder))
    assert curve(folder)[-1]["loss_qvalue"] != "nan"
    assert not any("predictor" in path.name for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task=Pendulum"], "no task is called 'Pendulum'"),
        (["--random-steps=500"], "random_steps is 500 of 160"),
        (["--imagined-share=1.5"], "imagined_share is 1.5"),
        (["--imagined-share=0", "--plan"], "plan needs a world model"),
        (["--resume"], "has no checkpoint"),
    ],
)
def test_bad_options_say_what_to_do(options, message, run, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(*SMALL, *options, f"--output={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


# -- the agent alone ----------------------------------------------------------------------------


@pytest.fixture
def make_agent(examples):
    """``make_agent(task, **options)``: a small agent, its environment and 60 real steps."""

    dyna, _ = examples

    def build(name="Hopper-v5", **options):
        torch.manual_seed(0)
        task = get_task(name)
        env = make_batched(task, 2, seed=0)
        sizes = {"hidden_size": 8, "model_hidden_size": 8, "n_models": 2, "batch_size": 20}
        rates = {"random_steps": 0, "updates_per_step": 0.1, "model_updates_per_step": 0.1}
        config = dyna.AgentConfig(**sizes | rates | {"imagined_per_step": 4} | options)
        data = env.rollout(30, break_when_any_done=False)
        return dyna.Agent(config, task, env, 200), data

    return build


def test_imagined_episodes_start_where_real_steps_did(make_agent):
    agent, data = make_agent("Reacher-v5")  # a task with a context
    agent.learn(data)
    episodes = agent.imagine(30, 3)
    assert episodes.shape == (10, 3)
    begun = torch.cat([episodes["state"], episodes["context"]], -1)[:, 0]
    stored = torch.cat(agent.encoder(data["observation"].reshape(60, -1)), -1)
    assert (begun.unsqueeze(1) == stored).all(-1).any(-1).all()
    # What is not ended by the model goes on from where it was led, not from a real state.
    ended, later = episodes["next", "done"][:, :-1, 0], episodes["state"][:, 1:]
    assert torch.equal(later[~ended], episodes["next", "state"][:, :-1][~ended])
    assert not (later[~ended].unsqueeze(1) == stored[:, :8]).all(-1).any()
    assert (later[ended].unsqueeze(1) == stored[:, :8]).all(-1).any(-1).all()
    assert torch.equal(episodes["context"], episodes["next", "context"])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_batches_mix_real_and_imagined_steps(make_agent, share):
    agent, data = make_agent(imagined_share=share)
    agent.learn(data)
    batches = list(agent.batches(7, at_once=3))
    assert [batch.shape for batch in batches] == [(20,)] * 7
    real = agent.real[:]["state"].reshape(-1, 11)
    # Imagined episodes start at real states, but lead elsewhere.
    real_next = agent.real[:]["next", "state"].reshape(-1, 11)
    for batch in batches:
        is_real = (batch["next", "state"].unsqueeze(1) == real_next).all(-1).any(-1)
        assert int((~is_real).sum()) == round(20 * share)
        if not share:
            assert (batch["state"].unsqueeze(1) == real).all(-1).any(-1).all()
        assert batch["next", "reward"].shape == (20, 1)


def test_targets_sum_the_rewards_up_to_the_end_of_an_imagined_episode(make_agent, examples):
    """Against a loop over the steps that follow each step."""
    agent, data = make_agent(imagined_per_step=4, horizon=3)
    agent.learn(data)
    torch.manual_seed(1)
    episodes = agent.imagine(40, 4)
    ended = torch.rand(10, 4, 1) < 0.3
    episodes["next"].update({"done": ended, "terminated": ended.clone()})
    found = examples[0].sum_rewards(episodes.clone(), gamma=0.9)
    for i in range(10):
        for t in range(4):
            total, last = 0.0, t
            for k in range(t, 4):
                total += 0.9 ** (k - t) * episodes["next", "reward"][i, k].item()
                last = k
                if ended[i, k]:
                    break
            assert found["next", "reward"][i, t].item() == pytest.approx(total, abs=1e-5)
            assert int(found["steps_to_next_obs"][i, t]) == last - t + 1
            assert torch.equal(found["next", "state"][i, t], episodes["next", "state"][i, last])
            assert bool(found["next", "terminated"][i, t]) == bool(ended[i, last])
            assert torch.equal(found["state"][i, t], episodes["state"][i, t])
    assert set(agent.imagined[:]["steps_to_next_obs"].tolist()) == {1, 2, 3}
    assert set(agent.real[:]["steps_to_next_obs"].flatten().tolist()) == {1}


def test_the_predicted_end_of_an_episode_ends_an_imagined_one(make_agent):
    """With an end at every step foretold, no episode reaches its second step."""
    agent, data = make_agent()
    agent.learn(data)
    assert not agent.imagine(40, 4)["next", "terminated"].all()
    with torch.no_grad():
        for members in agent.predictor.model.modules():
            if isinstance(members, StackedProbFCDynamics):
                members.biases[-1][..., -1] = 50.0
    ended = agent.imagine(40, 4)
    assert ended["next", "terminated"].all()
    stored = agent.real[:]["state"].reshape(-1, 11)
    assert (ended["state"].unsqueeze(2) == stored).all(-1).any(-1).all()


def test_the_actor_learns_when_it_is_its_turn(make_agent):
    agent, data = make_agent(imagined_share=0.5)
    agent.learn(data)
    (batch,) = agent.batches(1)

    def snapshot():
        groups = {"actor": agent.actor, "critics": agent.loss.qvalue_network_params}
        found = {name: [p.clone() for p in part.parameters()] for name, part in groups.items()}
        return found | {"alpha": [agent.loss.log_alpha.clone()]}

    for with_actor in (False, True):
        before = snapshot()
        terms = agent.update(batch, with_actor)
        after = snapshot()
        moved = {
            name: any(not torch.equal(x, y) for x, y in zip(before[name], after[name], strict=True))
            for name in before
        }
        assert moved == {"actor": with_actor, "critics": True, "alpha": with_actor}
        assert all(torch.isfinite(value) for value in terms.values())


@pytest.mark.slow
def test_compiled_losses_are_the_losses(make_agent):
    def after_update(**options):
        counters.clear()
        agent, data = make_agent(imagined_share=0.0, **options)
        agent.learn(data)
        (batch,) = agent.batches(1)
        torch.manual_seed(0)
        terms = agent.update(batch, with_actor=True)
        compiled = counters["stats"]["unique_graphs"] > 0
        return compiled, terms, [p.detach().clone() for p in agent.loss.parameters()]

    found = {option: after_update(compile=option) for option in (False, True)}
    assert [compiled for compiled, _, _ in found.values()] == [False, True]
    for name, value in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], value, rtol=1e-4, atol=1e-4)
    for one, other in zip(found[False][2], found[True][2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-3)


def test_the_value_is_the_lower_critics_of_the_policys_middle(make_agent):
    """Against the two critics' weights multiplied by hand."""
    agent, _ = make_agent()
    state = torch.randn(5, 3, 11)
    context = state[..., :0]
    found = agent.value(state, context, None)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        td = agent.policy(TensorDict({"observation": state}, [5, 3]))
    x = torch.cat([state, td["action"]], -1)
    params = agent.loss.qvalue_network_params["module"]
    values = []
    for i in range(2):
        h = x
        for layer, norm in (("0", "1"), ("3", "4")):
            h = h @ params[layer, "weight"][i].T + params[layer, "bias"][i]
            h = h - h.mean(-1, keepdim=True)
            h = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            h = h * params[norm, "weight"][i] + params[norm, "bias"][i]
            h = h * h.sigmoid()
        values.append((h @ params["6", "weight"][i].T + params["6", "bias"][i]).squeeze(-1))
    torch.testing.assert_close(found, torch.minimum(*values).detach())
    assert not torch.equal(*values)


def test_actions_fill_their_range_and_entropy_follows_it(make_agent):
    """InvertedPendulum takes actions in [-3, 3]."""
    agent, data = make_agent("InvertedPendulum-v5", imagined_share=0.0, entropy_per_action=-1.0)
    with torch.no_grad():
        for p in agent.actor.parameters():
            p.mul_(30)
        action = agent.policy(data.clone())["action"]
    assert action.abs().max() > 2.5
    assert action.abs().max() <= 3.0
    assert float(agent.loss.target_entropy) == pytest.approx(-1.0 + math.log(3.0))


@pytest.mark.parametrize(("given", "steps"), [(None, 50), (0, 0), (70, 70)])
def test_learning_begins_after_the_random_steps(make_agent, given, steps):
    """A quarter of the 200 by default; until then experience is only stored."""
    agent, data = make_agent(random_steps=given, imagined_share=0.0)
    assert agent.random_steps == steps
    for n, part in zip((20, 40, 60), data.split(10, 1), strict=True):
        info = agent.learn(part.copy())
        assert ("loss_qvalue" in info) == (n >= steps)
        assert agent.counters["env_steps"] == n
    assert agent.counters["updates"] == (6 if steps < 70 else 0)
    agent.random_steps = 1000  # as of a run that is resumed with more steps
    assert (agent.random_steps_left == 0) == (steps < 70)
    assert ("loss_qvalue" in agent.learn(part.copy())) == (steps < 70)


def test_data_of_another_task_is_refused(make_agent):
    """Before anything is stored: the agent was built for Hopper's observations."""
    agent, _ = make_agent()
    _, other = make_agent("Reacher-v5")
    with pytest.raises(ValueError, match="built for observations of 11 values"):
        agent.learn(other)
    assert not len(agent.real)


def test_a_predictor_of_another_task_is_refused(make_agent):
    agent, data = make_agent()
    agent.learn(data)
    other, _ = make_agent("Reacher-v5")
    agent.predictor = other.predictor
    with pytest.raises(ValueError, match="built for observations of 10 values"):
        agent.imagine(20, 2)


def test_nothing_imagined_yet_is_said_so(make_agent):
    agent, data = make_agent()
    with pytest.raises(ValueError, match="empty"):
        agent.imagine(20, 2)
    agent.encoder(data)
    agent.encoder(data["next"])
    agent.real.extend(data)
    with pytest.raises(RuntimeError, match="nothing was imagined"):
        next(agent.batches(1))
