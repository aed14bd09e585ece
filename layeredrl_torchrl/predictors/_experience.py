"""The transitions of a buffer in the form in which a predictor learns from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from layeredrl_torchrl._checks import check_finite, require
from layeredrl_torchrl.nets import Encoder
from layeredrl_torchrl.objectives import MemberBatches, ModelLoss, PredictorLoss, TransitionSlices
from layeredrl_torchrl.objectives.batches import fingerprint, hashed_uniform
from layeredrl_torchrl.objectives.model_loss import ModelInputs
from layeredrl_torchrl.objectives.terms import TermsLoss
from layeredrl_torchrl.specs import ActionForm

__all__ = ["JOINED", "Experience"]

#: Key of observations that were joined from several entries.
JOINED = "joined_observation"
# Limit of the numbers in the observations drawn at once; so fewer images are drawn.
_MOST_NUMBERS = 20_000_000

# Key of how much a transition counts for the model.
_WEIGHT = "weight"
_HINT = "name the entry to read with predictor_loss.set_keys()"


class Experience:
    """The transitions of a buffer: encoded, partly held out, and in batches.

    Args:
        buffer: The buffer; it is not changed.
        encoder: Turns observations into states and contexts.
        action_form: Checks actions and brings them into the form of their spec.
        keys: Names of the entries to read, those of :class:`~layeredrl_torchrl.PredictorLoss`.
        holdout_share: Share of the storage's places whose transitions are held out. A place stays
            held out when it is overwritten, so the same transitions are held out after a resume. A
            copy of a held-out transition in another place may be trained on.
        device: Device of the batches.

    Raises:
        TypeError, ValueError: As :class:`~layeredrl_torchrl.TransitionSlices`.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        encoder: Encoder,
        action_form: ActionForm,
        keys: PredictorLoss._AcceptedKeys,
        *,
        holdout_share: float,
        device: torch.device | None = None,
    ) -> None:
        self.holdout_share = holdout_share
        self._encoder, self._action_form = encoder, action_form
        self._keys, self._device = keys, device
        # Joined entries are added to each draw; slices compare only the first entry.
        self._joins = keys.observation == JOINED
        first = encoder.in_keys[0] if self._joins else keys.observation
        self._slices = TransitionSlices(
            buffer,
            observation_key=first,
            done_key=keys.done,
            terminated_key=keys.terminated,
            valid_key=keys.valid,
            index_key="storage_index",
        )

    def __len__(self) -> int:
        """Number of stored transitions."""
        return len(self._slices)

    @property
    def n_written(self) -> int:
        """Number of transitions ever written."""
        return self._slices.n_written

    def at_most(self, n: int) -> int:
        """Return ``n``, or less where observations are so large that they would fill memory."""
        return min(n, max(_MOST_NUMBERS // self._encoder.obs_dim, 100))

    def sample(self, n: int) -> TensorDictBase:
        """Draw stored transitions ``[N]`` with replacement."""
        return self._draw(n, 1)[:, 0]

    def overview(self, n: int) -> TensorDictBase:
        """Return stored transitions ``[N]``: each once if at most ``n`` are stored, else draws.

        Draws with replacement would miss a third of them, and so rare events.
        """
        n = self.at_most(n)
        return self._on_device(self._slices.every()) if 0 < len(self) <= n else self.sample(n)

    @torch.no_grad()
    def encode(self, rows: TensorDictBase) -> TensorDict:
        """Return the model's inputs, targets and weights ``[N]`` of stored transitions ``[N]``.

        Raises:
            KeyError: An entry that the buffer does not have.
            TypeError, ValueError: Observations or actions that the encoder or the action spec
                rejects.
        """
        keys = self._keys
        state, context = self._encoder(self._get(rows, keys.observation))
        next_state, _ = self._encoder(self._get(rows, keys.next_observation))
        action = self._get(rows, keys.action)
        weight = rows.get(_WEIGHT, None)
        weights = {} if weight is None else {_WEIGHT: weight.reshape(rows.batch_size)}
        return TensorDict(
            {
                **weights,
                "state": state,
                "context": context,
                "action": self._action_form(action, rows.batch_size),
                "storage_index": rows.get("storage_index"),
                "next": {"state": next_state, "terminated": self._get(rows, keys.terminated)},
            },
            batch_size=rows.batch_size,
        )

    def observations(self, rows: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Return observations and next observations ``[N, obs]`` of stored transitions."""
        return self._get(rows, self._keys.observation), self._get(rows, self._keys.next_observation)

    def goes_on(self, rows: TensorDictBase) -> Tensor:
        """Return which stored transitions do not end their episode, bool ``[N, 1]``."""
        keys = (self._keys.done, self._keys.terminated)
        ends = [self._get(rows, key).reshape(len(rows), -1) > 0 for key in keys]
        return ~torch.cat(ends, 1).any(1, keepdim=True)

    def rewards(self, rows: TensorDictBase) -> Tensor:
        """Return the rewards ``[N, 1]`` of stored transitions.

        Raises:
            KeyError: No rewards are stored. ValueError: Another shape, or values that are not
                finite.
        """
        key = self._keys.reward
        reward = self._get(rows, key)
        if reward.shape != (len(rows), 1):
            raise ValueError(
                f"{key!r} has shape {tuple(reward.shape[1:])} in the buffer, expected (1,) for "
                "each transition (TorchRL's layout); unsqueeze or select it"
            )
        # The heads compute in float32.
        hint = "repair the environment's rewards, or their unit"
        check_finite(str(key), reward.to(torch.float32), hint=hint)
        return reward

    def elapsed_steps(self, rows: TensorDictBase) -> Tensor:
        """Return how many environment steps ``[N]`` stored transitions took, 1 by default."""
        elapsed = rows.get(self._keys.elapsed_steps, None)
        return torch.ones(len(rows)) if elapsed is None else elapsed.reshape(len(rows))

    def fingerprints(self, n_first: int, n_probes: int) -> Tensor:
        """Return hashes ``[n_probes]`` of the contents of places in the storage, int64.

        The places are spread evenly over the first ``n_first``. Two calls with the same arguments
        show whether these were overwritten in between.
        """
        places = torch.arange(n_probes).mul(n_first).floor_divide(n_probes)
        rows = self._with_joined(self._slices.at(places))
        keys = self._keys
        read = (keys.observation, keys.action, keys.next_observation, keys.reward, keys.terminated)
        return fingerprint(*(self._get(rows, key) for key in read)).cpu()

    def held_out(self, n_sampled: int) -> TensorDict:
        """Return the held-out transitions among ``n_sampled``, encoded, each once; may be none."""
        rows = self.overview(n_sampled)
        rows = rows[self._is_held_out(rows.get("storage_index"))]
        # Drawn with replacement: each place of the storage counts once.
        order = rows.get("storage_index").argsort(stable=True)
        rows = rows[order]
        places = rows.get("storage_index")
        rows = rows[places.diff(prepend=places.new_full((1,), -1)) > 0]
        return self.encode(self.counted(rows))

    def counted(self, rows: TensorDictBase) -> TensorDictBase:
        """Return the stored transitions that count for the model: those with a weight above 0."""
        weight = rows.get(_WEIGHT, None)
        return rows if weight is None else rows[weight.reshape(len(rows)) > 0]

    def model_batches(
        self,
        loss: ModelLoss,
        member_batches: MemberBatches,
        n_rows: int,
        n_ahead: int,
        *,
        states_move: bool = False,
    ) -> Iterator[ModelInputs]:
        """Yield batches for the model without end, each with something that counts for a member.

        Args:
            loss: Prepares the batches.
            member_batches: How the members share them.
            n_rows: Transitions of a batch, for all members together.
            n_ahead: Batches that are drawn, encoded and checked at once.
            states_move: Whether to encode each batch separately, when it is needed.

        Raises:
            ValueError: A hundred draws in a row in which nothing counts.
        """
        n_missed = 0
        while n_missed < 100:
            drawn = self.sample(n_rows * n_ahead)
            for rows in drawn.split(n_rows) if states_move else (drawn,):
                data = self.encode(rows)
                if self.holdout_share:
                    data.set("valid", ~self._is_held_out(data.get("storage_index")))
                n = len(rows) // n_rows
                batch = _assigned(member_batches, data, loss.model.n_models, n)
                useful = self._useful(batch, n)
                if not any(useful):
                    n_missed += 1
                    continue
                n_missed = 0
                inputs = loss.prepare(batch).split(batch.shape[1] // n)
                yield from (one for one, use in zip(inputs, useful, strict=True) if use)
        raise ValueError(
            f"none of the transitions sampled count for the model: all are held out with "
            f"holdout_share={self.holdout_share}, or left out by member_batches; lower the share, "
            "or collect more data"
        )

    @staticmethod
    def _useful(batch: TensorDictBase, n: int) -> list[bool]:
        """Return whether anything counts in each of ``n`` batches, joined in ``[M, N]``."""
        valid, weight = batch.get("valid", None), batch.get("weight", None)
        if valid is None and weight is None:
            return [True] * n
        counts = valid if valid is not None else weight > 0
        if valid is not None and weight is not None:
            counts = valid & (weight > 0)
        useful: list[bool] = counts.unflatten(1, (n, -1)).any(-1).any(0).tolist()
        return useful

    def slice_batches(self, loss: TermsLoss, batch_size: int, n_ahead: int) -> Iterator[Any]:
        """Yield batches of slices, prepared by ``loss``, without end; arguments as above."""
        while True:
            yield from loss.prepare(self._draw(batch_size * n_ahead, loss.length)).split(batch_size)

    def _draw(self, n: int, length: int) -> TensorDictBase:
        return self._on_device(self._slices.sample(n, length))

    def _on_device(self, rows: TensorDictBase) -> TensorDictBase:
        """Move rows to the device, and add joined observations."""
        return self._with_joined(rows if self._device is None else rows.to(self._device))

    def _with_joined(self, rows: TensorDictBase) -> TensorDictBase:
        """Add the joined observations, where the encoder reads several entries, or images."""
        if self._joins:
            following = self._get(rows, "next")
            rows.set(JOINED, self._encoder.join(rows))
            rows.set(("next", JOINED), self._encoder.join(following))
        return rows

    def _is_held_out(self, places: Tensor) -> Tensor:
        return hashed_uniform(places, salt=-2) < self.holdout_share

    def _get(self, rows: TensorDictBase, key: Any) -> Tensor:
        return require(rows, key, reader="RewardPredictor.learn", hint=_HINT)


def _assigned(
    member_batches: MemberBatches, data: TensorDictBase, n_models: int, n: int
) -> TensorDictBase:
    """Assign the transitions of ``n`` batches to the members, ``[M, N]``; check the result."""
    batch = member_batches.assign(data, n_models)
    found = tuple(batch.batch_size) if isinstance(batch, TensorDictBase) else type(batch).__name__
    if len(found) != 2 or found[0] != n_models or found[1] % n:
        raise ValueError(
            f"assign of {type(member_batches).__name__} gave {found} for transitions "
            f"{tuple(data.batch_size)} of {n} batch(es) and {n_models} members, expected a "
            f"TensorDict [{n_models}, N], where N is a multiple of {n}"
        )
    return batch
