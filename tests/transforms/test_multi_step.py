"""Sums of rewards, against a loop over the steps that follow each step."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors.utils import split_trajectories

from layeredrl_torchrl import sum_rewards


@pytest.mark.parametrize("shape", [(1, 1), (6, 5)])
def test_rewards_are_summed_up_to_the_end_of_the_episode_or_of_the_data(shape):
    ended = torch.rand(*shape, 1) < 0.3
    following = {"reward": torch.randn(*shape, 1), "state": torch.randn(*shape, 2)}
    following |= {"done": ended, "terminated": ended & (torch.rand(*shape, 1) < 0.5)}
    following["truncated"] = ended & ~following["terminated"]
    data = TensorDict({"state": torch.randn(*shape, 2), "next": following}, shape)
    found = sum_rewards(data.clone(), gamma=0.9)
    for i in range(shape[0]):
        for t in range(shape[1]):
            total, last = 0.0, t
            for last in range(t, shape[1]):
                total += 0.9 ** (last - t) * data["next", "reward"][i, last].item()
                if ended[i, last]:
                    break
            assert found["next", "reward"][i, t].item() == pytest.approx(total, abs=1e-5)
            assert int(found["steps_to_next_obs"][i, t]) == last - t + 1
            for key in ("state", "done", "terminated", "truncated"):
                assert torch.equal(found["next", key][i, t], data["next", key][i, last])
    assert torch.equal(found["state"], data["state"])


def test_trajectories_end_before_their_padding():
    """TorchRL's split_trajectories pads with zeros, also where an episode goes on."""
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    no = torch.zeros(9, 1, dtype=torch.bool)
    following = {"reward": torch.randn(9, 1), "state": torch.randn(9, 2), "done": no.clone()}
    following["done"][8] = True
    following |= {"terminated": following["done"].clone(), "truncated": no}
    data = TensorDict({"collector": {"traj_ids": ids}, "next": following}, [9])
    padded = split_trajectories(data)
    before = padded.clone()
    found = sum_rewards(padded, gamma=0.9)
    assert (padded == before).all()
    found = found[found["collector", "mask"]]  # the rows in their order
    ends = {0: 3, 1: 5, 2: 8}
    for t in range(9):
        last = ends[int(ids[t])]
        total = sum(0.9 ** (k - t) * following["reward"][k].item() for k in range(t, last + 1))
        assert found["next", "reward"][t].item() == pytest.approx(total, abs=1e-5)
        assert int(found["steps_to_next_obs"][t]) == last - t + 1
        for key in ("state", "done", "terminated"):
            assert torch.equal(found["next", key][t], following[key][last])


def test_steps_without_trajectories_are_refused():
    no = torch.zeros(3, 1, dtype=torch.bool)
    data = TensorDict({"next": {"reward": torch.ones(3, 1), "done": no, "terminated": no}}, [3])
    with pytest.raises(ValueError, match=r"\(3,\), expected \[N, T\]"):
        sum_rewards(data, gamma=0.9)
