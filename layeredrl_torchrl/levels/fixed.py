"""Levels that do not learn, for tests, baselines and as placeholders."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Composite, TensorSpec, Unbounded
from torchrl.envs import TensorDictPrimer

from layeredrl_torchrl._checks import refuse_mask, require
from layeredrl_torchrl.levels._keys import KeysOf
from layeredrl_torchrl.levels._random_actions import RandomActions
from layeredrl_torchrl.levels.level import Level
from layeredrl_torchrl.specs import Space, canonical_action

__all__ = ["ActionSequenceLevel", "ConstantLevel", "RandomLevel"]


class _FixedLevel(Level):
    """A level that has nothing to learn."""

    _in_keys = KeysOf(lambda self: [self.observation_key])
    _out_keys = _out_keys_apparent = KeysOf(lambda self: [self.action_key])

    def learn(self, data: TensorDictBase) -> dict[str, float]:
        """Do nothing; return no terms."""
        return {}

    def _batch(self, tensordict: TensorDictBase) -> tuple[torch.Size, torch.device]:
        """Return batch shape and device of the observation; refuse action masks."""
        refuse_mask(tensordict, self.action_key)
        hint = "it acts once for each observation"
        observation = require(tensordict, self.observation_key, reader=self.name, hint=hint)
        return observation.shape[:-1], observation.device


class RandomLevel(_FixedLevel):
    """Draws its actions from the action spec, also in evaluation.

    >>> level = RandomLevel()
    >>> level.setup(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))
    >>> level(TensorDict({"observation": torch.zeros(7, 3)}, [7]))["action"].shape
    torch.Size([7, 1])

    Args:
        input_spec: See :class:`Level`; the input is ignored.
        duration: See :class:`Level`.
    """

    def __init__(
        self, *, input_spec: TensorSpec | Space | None = None, duration: int | None = None
    ) -> None:
        super().__init__(input_spec=input_spec, duration=duration)

    def _build(self, observation_space: TensorSpec, action_spec: TensorSpec) -> None:
        self.random_actions = RandomActions(action_spec)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write independent draws for ``[*B]``."""
        batch, device = self._batch(tensordict)
        self.action_spec  # noqa: B018 - raises before setup
        return tensordict.set(self.action_key, self.random_actions(batch).to(device))


class ConstantLevel(_FixedLevel):
    """Always takes the same action.

    >>> level = ConstantLevel(torch.tensor([0.5]))
    >>> level.setup(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))
    >>> level(TensorDict({"observation": torch.zeros(2, 3)}, [2]))["action"]
    tensor([[0.5000],
            [0.5000]])

    Args:
        action: In the form of the action spec: ``[A]``, or a choice ``[]`` or one-hot.
        input_spec: See :class:`Level`; the input is ignored.
        duration: See :class:`Level`.

    Raises:
        TypeError, ValueError: In :meth:`setup`: an action outside the action spec.
    """

    action: Tensor

    def __init__(
        self,
        action: Tensor,
        *,
        input_spec: TensorSpec | Space | None = None,
        duration: int | None = None,
    ) -> None:
        super().__init__(input_spec=input_spec, duration=duration)
        self.register_buffer("action", torch.as_tensor(action))

    def _build(self, observation_space: TensorSpec, action_spec: TensorSpec) -> None:
        self.action = canonical_action(action_spec, self.action, torch.Size(()))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action for ``[*B]``."""
        batch, device = self._batch(tensordict)
        action = self.action.to(device, self.action_spec.dtype)
        return tensordict.set(self.action_key, action.expand((*batch, *action.shape)).clone())


class ActionSequenceLevel(_FixedLevel):
    """Plays a sequence of actions, from the start at each new input or reset.

    Below another level it hands control back at the end of the sequence, or after ``duration``.
    After the end of the sequence it repeats the last action. Without an input from above, the
    number of actions played is passed on in the TensorDict as ``"n_played" [*B, 1]``.

    >>> env = get_task("InvertedPendulum-v5").make(seed=0)
    >>> level = ActionSequenceLevel(torch.tensor([[1.0], [-1.0]]))
    >>> level.setup(env.observation_spec["observation"], env.action_spec)
    >>> data = env.append_transform(level.make_tensordict_primer()).rollout(2, level)
    >>> data["action"].flatten()
    tensor([ 1., -1.])

    Args:
        actions: ``[n, A]``, or ``n`` choices in the form of the action spec.
        input_spec: See :class:`Level`; the input is ignored.
        duration: Number of actions after which it hands control back; by default the length of the
            sequence.

    Raises:
        ValueError: No actions; ``duration`` without an ``input_spec``. TypeError, ValueError: In
            :meth:`setup`: an action outside the action spec.
    """

    _in_keys = KeysOf(lambda self: [self.observation_key, self.position_key])
    _out_keys = _out_keys_apparent = KeysOf(
        lambda self: [
            self.action_key,
            *([("next", self.position_key)] if self.input_spec is None else []),
        ]
    )

    actions: Tensor

    def __init__(
        self,
        actions: Tensor,
        *,
        input_spec: TensorSpec | Space | None = None,
        duration: int | None = None,
    ) -> None:
        actions = torch.as_tensor(actions)
        if not actions.ndim or not len(actions):
            raise ValueError(
                f"actions has shape {tuple(actions.shape)}, expected [n, A] with at least one row"
            )
        if input_spec is not None and duration is None:
            duration = len(actions)
        super().__init__(input_spec=input_spec, duration=duration)
        self.register_buffer("actions", actions)
        self.position_key = "n_played" if self.input_spec is None else "n_actions"

    def _build(self, observation_space: TensorSpec, action_spec: TensorSpec) -> None:
        batch = torch.Size((len(self.actions),))
        self.actions = canonical_action(action_spec, self.actions, batch)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Return the transform for the number of actions played; empty with an input."""
        carried = Composite()
        if self.input_spec is None:
            carried[self.position_key] = Unbounded((1,), dtype=torch.int64)
        return TensorDictPrimer(carried, expand_specs=True)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action for ``[*B]``.

        Raises:
            KeyError: The observation or the position in the sequence is missing.
        """
        self._batch(tensordict)
        hint = (
            "env = env.append_transform(level.make_tensordict_primer()) adds it; or put the level "
            "into a Hierarchy"
        )
        position = require(tensordict, self.position_key, reader=self.name, hint=hint)
        at = position.squeeze(-1).clamp_max(len(self.actions) - 1)
        tensordict.set(self.action_key, self.actions[at].to(self.action_spec.dtype))
        if self.input_spec is None:
            tensordict.set(("next", self.position_key), position + 1)
        return tensordict
