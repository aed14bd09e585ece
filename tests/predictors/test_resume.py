"""A run that is killed and resumed ends bit for bit where one that was left alone does.

The killed runs are processes of their own (this file run as a script), which end by SIGKILL: in the
middle of a learning call, and in the middle of saving.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation, GlobalRNGState
from torchrl.data import (
    Bounded,
    LazyMemmapStorage,
    LazyTensorStorage,
    TensorDictReplayBuffer,
    Unbounded,
)

from layeredrl_torchrl import (
    BootstrappedBatches,
    EncoderNet,
    ModelTraining,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    RewardNet,
    RewardPredictor,
    ValueNet,
)

N_ROUNDS = 4
N_UPDATES = 70  # the model is calibrated after the third round
STORAGES = {"tensor": LazyTensorStorage, "memmap": LazyMemmapStorage}


class SuddenDeath:
    """Ends the process without warning: in update ``update`` of a round, or while it is saved."""

    def __init__(self, update: int | None, *, saving: bool, predictor: RewardPredictor) -> None:
        self.update, self.saving = update, saving
        self.left: int | None = None
        predictor.model.members.register_forward_pre_hook(self.count)

    def start(self) -> None:
        self.left = self.update

    def count(self, *_: object) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def state_dict(self) -> dict[str, int]:
        if self.saving:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"alive": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state == {"alive": 1}


def build(hidden: int = 8) -> RewardPredictor:
    """A predictor that uses all that has a state of its own."""
    action = Bounded(-1.0, 1.0, (1,))
    return RewardPredictor(
        model=ProbabilisticEnsemble(
            Unbounded((2,)),
            Unbounded((1,)),
            action,
            partial(ProbFCDynamics, hidden_sizes=(hidden,)),
            n_models=2,
            n_modes=2,
        ),
        val_func=ValueNet(2, 1, (hidden,)),
        rew_func=RewardNet(2, 1, action, (hidden,)),
        encoder=EncoderNet((3,), latent_state_dim=2, context_dim=1),
        latent_state_dim=2,
        context_dim=1,
        k_steps=2,
        model_training=ModelTraining(member_batches=BootstrappedBatches()),
        reward_lr=lambda n_steps: 3e-3 / (1.0 + n_steps / 100),
    )


def collect(n_steps: int = 40) -> TensorDict:
    """An episode of a damped oscillator with a goal, which a push of random size keeps going."""
    context = torch.rand(1).expand(n_steps + 1, 1)
    action = 2 * torch.rand(n_steps, 1) - 1
    states = [torch.randn(2)]
    for push in action:
        x, v = states[-1]
        states.append(torch.stack([x + 0.2 * v, 0.95 * v - 0.2 * x + 0.2 * push[0]]))
    obs = torch.cat([torch.stack(states), context], -1)
    ends = torch.arange(1, n_steps + 1).unsqueeze(-1) == n_steps
    following = {
        "observation": obs[1:],
        "reward": -(obs[1:, :1] - context[1:]).square(),
        "done": ends,
        "terminated": torch.zeros_like(ends),
    }
    return TensorDict({"observation": obs[:-1], "action": action, "next": following}, [n_steps])


def parts(storage: str, capacity: int = 100) -> dict[str, object]:
    """All that a run has to save; the buffer is a ring that the run's data overwrites."""
    predictor = build()
    return {
        "predictor": predictor,
        "optim": predictor.optim,
        "buffer": TensorDictReplayBuffer(storage=STORAGES[storage](capacity)),
        "counters": {"round": 0, "env_steps": 0},
        "rng": GlobalRNGState(),
    }


def train(
    folder: Path,
    storage: str = "tensor",
    *,
    dies_in_round: int | None = None,
    update: int | None = None,
) -> None:
    """Learn in rounds on a growing buffer; start from the last checkpoint if there is one.

    Leaves the terms of each round in ``rounds.jsonl``, and in the end all that was learned. In the
    round ``dies_in_round`` the process dies at update ``update``, or while saving if it is None.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = parts(storage)
    predictor, buffer, counters = run["predictor"], run["buffer"], run["counters"]
    last = SuddenDeath(update, saving=False, predictor=predictor)
    checkpoint = Checkpoint(**run, z_last=last)  # components are saved in alphabetical order
    rotation = CheckpointRotation(folder / "checkpoints", keep_last=2)
    if rotation.latest() is not None:
        rotation.load_latest(checkpoint)
    while counters["round"] < N_ROUNDS:
        dies = counters["round"] == dies_in_round
        buffer.extend(collect())
        counters["env_steps"] += 40
        if dies and update is not None:
            last.start()
        _, info = predictor.learn(buffer, N_UPDATES, 16, 16, counters["env_steps"])
        with (folder / "rounds.jsonl").open("a") as file:
            file.write(json.dumps({"round": counters["round"], **info}) + "\n")
        counters["round"] += 1
        last.saving = dies
        rotation.save(checkpoint, step=counters["round"], metadata={"round": counters["round"]})
    final = {"predictor": predictor.state_dict(), "optim": predictor.optim.state_dict()["state"]}
    torch.save(final | {"random": torch.rand(4)}, folder / "final.pt")


def in_a_process(folder: Path, storage: str, *options: int) -> int:
    """Run ``train`` in a new process; returns how it ended."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, __file__, str(folder), storage, *map(str, options)],
        env=environment,
        timeout=200,
        check=False,
    ).returncode


def rounds(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, str]:
    """What every file of a folder holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same(first: Path, second: Path) -> None:
    ours, theirs = (
        torch.load(folder / "final.pt", weights_only=False) for folder in (first, second)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.slow
def test_killed_while_learning_and_while_saving(tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir()
    killed.mkdir()
    train(alone)
    expected = rounds(alone)
    assert len({row["loss"] for row in expected}) == N_ROUNDS

    assert in_a_process(killed, "tensor", 1, 50) == -signal.SIGKILL
    assert rounds(killed) == expected[:1]  # nothing of the second round
    assert in_a_process(killed, "tensor", 2) == -signal.SIGKILL
    # The third round was learned, but not saved: what is resumed is its start.
    assert rounds(killed) == expected[:3]
    latest = CheckpointRotation(killed / "checkpoints", keep_last=2).latest()
    assert Checkpoint.manifest(latest)["metadata"] == {"round": 2}
    train(killed)
    assert rounds(killed) == [*expected[:3], *expected[2:]]
    assert_same(alone, killed)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_checkpoint_can_be_resumed_again_and_again(tmp_path, storage):
    """Going on from a checkpoint writes nothing into its files, memory-mapped ones included."""
    torch.set_num_threads(1)
    run = parts(storage)
    run["buffer"].extend(collect())
    run["predictor"].learn(run["buffer"], 5, 8, 8, 0)
    Checkpoint(**run).save(tmp_path / "checkpoint")
    before = files(tmp_path)
    assert len(before) > 50

    def resume():
        torch.manual_seed(1)
        run = parts(storage)
        Checkpoint(**run).load(tmp_path / "checkpoint")
        run["buffer"].extend(collect())
        return run["predictor"].learn(run["buffer"], 5, 8, 8, 0)[1]

    assert resume() == resume()
    assert files(tmp_path) == before


@pytest.mark.parametrize("part", ["buffer", "optim", "predictor", "rng"])
def test_every_part_is_needed(tmp_path, part):
    """The other tests would notice if a part were not restored."""
    run = parts("tensor")
    run["buffer"].extend(collect())
    run["predictor"].learn(run["buffer"], 5, 8, 8, 0)
    Checkpoint(**run).save(tmp_path / "checkpoint")
    expected = run["predictor"].learn(run["buffer"], 5, 8, 8, 0)[1]

    def resume(*without):
        torch.manual_seed(1)
        run = parts("tensor")
        run["buffer"].extend(collect())
        Checkpoint(**run).load(tmp_path / "checkpoint", components=run.keys() - without)
        return run["predictor"].learn(run["buffer"], 5, 8, 8, 0)[1]

    assert resume() == expected
    assert resume(part) != expected


def test_of_another_architecture_nothing_is_loaded(tmp_path, unchanged):
    """Components are loaded in alphabetical order, so the optimizer before the predictor."""
    run = parts("tensor")
    run["buffer"].extend(collect())
    run["predictor"].learn(run["buffer"], 5, 8, 8, 0)
    Checkpoint(predictor=run["predictor"], optim=run["optim"]).save(tmp_path / "checkpoint")
    other = build(hidden=9)
    checkpoint = Checkpoint(predictor=other, optim=other.optim)
    with (
        unchanged(other, other.optim),
        pytest.raises(CheckpointError, match=r"optim.*model.*\(8,.*\(9,.*sizes it was saved with"),
    ):
        checkpoint.load(tmp_path / "checkpoint")
    other.learn(run["buffer"], 5, 8, 8, 0)  # and it still learns


if __name__ == "__main__":
    where, kind, *numbers = sys.argv[1:]
    train(
        Path(where),
        kind,
        dies_in_round=int(numbers[0]),
        update=int(numbers[1]) if len(numbers) > 1 else None,
    )
