"""Transitions of environments, kept beside a buffer, and the slices that they give."""

from __future__ import annotations

import torch
from tensordict import TensorDict


class Lane:
    """One environment's transitions in the order in which they were collected.

    A transition is (number, episode, how the step ended), and is the same in the buffer as here if
    it has the same number. ``witness`` says what tells episodes apart in the buffer: observations
    that change with each step, or with each episode, trajectory ids, or only done.
    """

    def __init__(self, index, episodes, witness):
        self.transitions = []
        for episode, (steps, end) in enumerate(episodes):
            ends = ["goes on"] * (steps - 1) + [end]
            self.transitions += [
                (index * 10_000 + len(self.transitions) + i, episode, ending)
                for i, ending in enumerate(ends)
            ]
        self.index, self.witness = index, witness

    def __len__(self):
        return len(self.transitions)

    def tensordict(self, first, last):
        """Transitions first, ..., last - 1 as a collector gives them, [last - first]."""
        number, episode, ending = zip(*self.transitions[first:last], strict=True)
        number, episode = torch.tensor(number), torch.tensor(episode)
        moves = int(self.witness == "observation")
        state = number + 1000 * episode if moves else episode * (self.witness == "episode")
        ids = {"observation": 0 * episode, "trajectory": 100 * self.index + episode}
        flag = {
            name: torch.tensor([e == name for e in ending]).unsqueeze(1)
            for name in ("terminated", "truncated")
        }
        batch = TensorDict(
            {
                "observation": torch.stack([state, -state], -1).float(),
                "number": number,
                "next": {
                    "observation": torch.stack([state + moves, -state - moves], -1).float(),
                    "reward": number.unsqueeze(1) / 7,
                    "done": flag["terminated"] | flag["truncated"],
                    **flag,
                },
            },
            [last - first],
        )
        if self.witness in ids:
            batch["collector", "traj_ids"] = ids[self.witness]
        return batch

    def continued(self, position):
        """Whether the transition at this position is not the last of its episode (so far)."""
        if position + 1 == len(self):
            return False
        (_, episode, _), (_, following, _) = self.transitions[position : position + 2]
        return episode == following


def expected_slices(runs, length):
    """For the number of each stored transition: the numbers of its slice, and how many are valid.

    ``runs`` are pieces of lanes that lie next to each other in the buffer: (lane, first, last).
    """
    slices = {}
    for lane, first, last in runs:
        for position in range(first, last):
            numbers = [lane.transitions[position][0]]
            while len(numbers) < length and position + 1 < last and lane.continued(position):
                position += 1
                numbers.append(lane.transitions[position][0])
            slices[numbers[0]] = (numbers + numbers[-1:] * (length - len(numbers)), len(numbers))
    return slices


def assert_slices(rows, expected, written):
    """Every slice is as expected, and its rows are the ones that were written, with all keys."""
    batch_size, length = rows.batch_size
    for b in range(batch_size):
        numbers, n_valid = expected[int(rows["number"][b, 0])]
        assert rows["number"][b].tolist() == numbers
        assert rows["valid"][b].tolist() == [i < n_valid for i in range(length)]
    original = written[torch.searchsorted(written["number"].contiguous(), rows["number"])]
    assert (rows.select(*original.keys(True, True)) == original).all()


def snapshot(buffer):
    return (
        buffer.storage[:].clone(),
        buffer.writer.state_dict(),
        buffer.sampler.state_dict(),
        buffer.write_count,
    )


def assert_unchanged(buffer, before):
    contents, *rest = before
    assert set(buffer.storage[:].keys(True, True)) == set(contents.keys(True, True))
    assert (buffer.storage[:] == contents).all()
    assert snapshot(buffer)[1:] == tuple(rest)


def fill(buffer, lanes, n_rows, chunk, stacked):
    """Extend the buffer chunk by chunk; returns the pieces ``(lane, first, last)`` as written."""
    runs = []
    for first in range(0, n_rows, chunk):
        last = min(first + chunk, n_rows)
        parts = [lane.tensordict(first, last) for lane in lanes]
        buffer.extend(torch.stack(parts) if stacked else torch.cat(parts))
        runs += [(lane, first, last) for lane in lanes]
    return runs


def still_stored(runs, capacity):
    """What a ring of ``capacity`` rows holds of the pieces: those from the front are lost."""
    lost = sum(last - first for _, first, last in runs) - capacity
    kept = []
    for lane, first, last in runs:
        gone = min(max(lost, 0), last - first)
        lost -= gone
        kept += [(lane, first + gone, last)] if first + gone < last else []
    return kept
