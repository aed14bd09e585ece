"""The base of levels."""

from __future__ import annotations

from abc import abstractmethod

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import TensorSpec
from torchrl.envs import TensorDictPrimer

from layeredrl_torchrl.predictors import Predictor
from layeredrl_torchrl.specs import Space, to_spec

__all__ = ["Level"]


class Level(TensorDictModuleBase):
    """A policy that learns, of one time scale.

    Called with a TensorDict ``[*B]`` it writes its action; the call changes nothing in the level,
    so copies of it in worker processes agree. What lasts over steps travels in the TensorDict, and
    the environment needs the transform :meth:`make_tensordict_primer` (collectors append it by
    themselves with ``auto_register_policy_transforms=True``). Everything else that lasts is changed
    by :meth:`learn` alone and is in the ``state_dict``.

    An action is whatever the action spec says: a torque for the environment, or a skill for
    another level to carry out over many environment steps.

    ``name`` is what it is called in messages: its class's name, until you set another.

    Args:
        action_spec: Spec (or gymnasium space) of one action, what the level emits.
        input_spec: Spec (or space) of what it takes from above (a skill, a subgoal); ``None`` for
            nothing.

    Raises:
        TypeError, ValueError: As :func:`~layeredrl_torchrl.to_spec`.
    """

    def __init__(
        self, action_spec: TensorSpec | Space, *, input_spec: TensorSpec | Space | None = None
    ) -> None:
        super().__init__()
        self.action_spec = to_spec(action_spec, name="action_spec")
        self.input_spec = None if input_spec is None else to_spec(input_spec, name="input_spec")
        self.name = type(self).__name__
        self._parent_predictor: Predictor | None = None

    @property
    def predictor(self) -> Predictor | None:
        """What the level knows about the world on its own time scale; ``None`` for nothing."""
        return None

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """What :meth:`learn` takes its steps with, to be saved beside the level."""
        return None

    @property
    def parent_predictor(self) -> Predictor | None:
        """The predictor of the level above; ``None`` until :meth:`attach` is called."""
        return self._parent_predictor

    def attach(self, parent_predictor: Predictor | None) -> None:
        """Show the level the predictor of the level above, which owns, saves and trains it."""
        if parent_predictor is not None and not isinstance(parent_predictor, Predictor):
            raise TypeError(
                f"parent_predictor must be a Predictor or None, got "
                f"{type(parent_predictor).__name__}; pass the upper level's .predictor"
            )
        # Around torch's registration: its weights are not this level's.
        self.__dict__["_parent_predictor"] = parent_predictor

    @abstractmethod
    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform that carries the level's memory over steps and clears it at resets."""

    @abstractmethod
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action for ``[*B]``, and the memory for the next step."""

    @abstractmethod
    def learn(self, data: TensorDictBase) -> dict[str, float]:
        """Learn from transitions that this level made, ``[*B, T]`` as a collector lays them out.

        Returns:
            Terms of the loss and counts, by name.
        """
