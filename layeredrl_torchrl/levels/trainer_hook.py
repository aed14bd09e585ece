"""A level as a hook of TorchRL's Trainer."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import TrainerHookBase

from layeredrl_torchrl._checks import check_instance
from layeredrl_torchrl.levels.level import Level

__all__ = ["LevelHook"]


class LevelHook(TrainerHookBase):
    """Lets a level learn from each batch that a TorchRL ``Trainer`` collects.

    The level is the policy of the trainer's collector. It learns before the trainer's own updates,
    which are optional (``optim_steps_per_batch=0``). The trainer's logger gets each of its terms as
    ``"<level>/<term>"``.

    >>> from layeredrl_torchrl.levels import LevelHook
    >>> level = RandomLevel()
    >>> LevelHook(level).name
    'RandomLevel'

    Args:
        level: The level.

    Raises:
        TypeError: Not a level.
    """

    def __init__(self, level: Level) -> None:
        check_instance("level", level, Level, hint="pass the level that is the collector's policy")
        self.level, self.name = level, level.name

    def __call__(self, batch: TensorDictBase) -> dict[str, float]:
        """Learn from a batch, and return the terms to log."""
        return {f"{self.name}/{term}": value for term, value in self.level.learn(batch).items()}

    def register(self, trainer: Trainer, name: str = "level") -> None:
        """Register the hook, to be called with each batch before the trainer's updates."""
        trainer.register_op("pre_steps_log", self)
        trainer.register_module(name, self)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the level, its optimizer and its buffer."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        for name, part in self._parts().items():
            part.load_state_dict(state_dict[name])

    def _parts(self) -> dict[str, Any]:
        level = self.level
        parts = {"level": level, "optim": level.optim, "buffer": level.buffer}
        return {name: part for name, part in parts.items() if part is not None}
