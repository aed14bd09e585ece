"""The base of levels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Composite, ReplayBuffer, TensorSpec
from torchrl.envs import TensorDictPrimer

from layeredrl_torchrl._checks import check_callable, check_flag, check_positive_int
from layeredrl_torchrl._primers import OnePrimer
from layeredrl_torchrl._state import WholeState
from layeredrl_torchrl.predictors import Predictor
from layeredrl_torchrl.specs import Space, to_spec

__all__ = ["Level"]


class Level(OnePrimer, WholeState):
    """A policy that learns, of one time scale; alone, or in a hierarchy.

    Called with a TensorDict ``[*B]`` it reads the observation, where it has an ``input_spec`` also
    the input from above, and writes its action; the call changes nothing in the level, so copies
    of it in worker processes agree. What lasts over steps travels in the TensorDict, and the
    environment needs the transform :meth:`make_tensordict_primer` (collectors append it by
    themselves with ``auto_register_policy_transforms=True``). Everything else that lasts is changed
    by :meth:`learn` alone and is in the ``state_dict``.

    An action is whatever the action spec says: a torque for the environment, or a skill for
    another level to carry out over many environment steps. The spaces are known from
    :meth:`setup` on, which a hierarchy calls: the action space of a level is the ``input_spec``
    of the level below it, that of the lowest is the environment's.

    ``name`` stands for it in messages and logs: the name of its class, until you set another.

    A subclass implements ``_build``, called once by :meth:`setup`, ``forward`` and ``learn``; it
    may name other keys, carry memory, and hand back control by another rule.

    >>> class Clamped(Level):
    ...     def forward(self, tensordict):
    ...         return tensordict.set("action", tensordict["observation"].clamp(-1.0, 1.0))
    ...
    ...     def learn(self, data):
    ...         return {}
    >>> level = Clamped()
    >>> level.setup(Unbounded((2,)), Bounded(-1.0, 1.0, (2,)))
    >>> level(TensorDict({"observation": torch.tensor([0.5, 9.0])}))["action"]
    tensor([0.5000, 1.0000])

    Args:
        input_spec: Spec (or gymnasium space) of what it takes from above (a skill, a subgoal);
            ``None`` for nothing, as the highest level.
        duration: Own actions after which it hands control back to the level above.
        reward_func: Reward of its own: the transitions that :meth:`learn` is given, ``[N]``, to
            ``[N]`` or ``[N, 1]``. By default the environment's, summed over the action.
        each_step: Whether it learns from every environment step under its action instead of from
            the action as a whole. Not for the lowest level, where both are the same.

    Attributes:
        observation_key, input_key, action_key, reward_key: Keys that it reads and writes, the
            reward below ``"next"``. Set others before the level is used.

    Raises:
        TypeError, ValueError: As :func:`~layeredrl_torchrl.to_spec`; a duration below 1.
    """

    observation_key: NestedKey = "observation"
    input_key: NestedKey = "input"
    action_key: NestedKey = "action"
    reward_key: NestedKey = "reward"
    #: What ``each_step`` of the level above has to be; ``None`` for either.
    parent_each_step: bool | None = None
    #: Where transitions are stored, if they are.
    buffer: ReplayBuffer | None = None

    def __init__(
        self,
        *,
        input_spec: TensorSpec | Space | None = None,
        duration: int | None = None,
        reward_func: Callable[[TensorDictBase], Tensor] | None = None,
        each_step: bool = False,
    ) -> None:
        super().__init__()
        self.input_spec = None if input_spec is None else to_spec(input_spec, name="input_spec")
        self.duration = None if duration is None else check_positive_int("duration", duration)
        check_callable("reward_func", reward_func, optional=True)
        self.reward_func = reward_func
        self.each_step = check_flag("each_step", each_step)
        self.name = type(self).__name__
        self.observation_space: TensorSpec | None = None
        self._action_spec: TensorSpec | None = None
        self._parent_predictor: Predictor | None = None

    # -- spaces -----------------------------------------------------------------------------

    def setup(self, observation_space: TensorSpec, action_space: TensorSpec | Space) -> None:
        """Make everything whose size depends on the spaces.

        A second call with the same spaces does nothing, so a level that learned alone can be put
        into a hierarchy.

        Args:
            observation_space: Spec of one observation, ``[obs]``.
            action_space: Spec (or gymnasium space) of one action.

        Raises:
            ValueError: It is set up for other spaces already. And as the level's parts.
        """
        action_spec = to_spec(action_space, name="action_spec")
        if self._action_spec is None:
            self.observation_space, self._action_spec = observation_space, action_spec
            try:
                self._build(observation_space, action_spec)
            except BaseException:
                self.observation_space = self._action_spec = None
                raise
            return
        for what, has, got in (
            ("observation", self.observation_space, observation_space),
            ("action", self._action_spec, action_spec),
        ):
            if has is not None and _shape(has) != _shape(got):
                raise ValueError(
                    f"{self.name} was set up for the {what} space {has}, got {got}; build a new "
                    "level for other spaces"
                )

    @property
    def action_spec(self) -> TensorSpec:
        """Spec of one action, what the level emits; ``RuntimeError`` before :meth:`setup`."""
        if self._action_spec is None:
            raise RuntimeError(
                f"{self.name} knows no spaces yet; put it into a Hierarchy, or call "
                "setup(observation_space, action_space)"
            )
        return self._action_spec

    def _build(self, observation_space: TensorSpec, action_spec: TensorSpec) -> None:
        """Make the parts. Overridden by levels that have any."""

    # -- what a hierarchy asks --------------------------------------------------------------

    @property
    def predictor(self) -> Predictor | None:
        """The level's model of the world on its own time scale; ``None`` without one."""
        return None

    @property
    def optim(self) -> torch.optim.Optimizer | None:
        """The torch optimizer of :meth:`learn`, to be saved beside the level; ``None`` for none."""
        return None

    @property
    def record(self) -> Composite:
        """Specs of what a call writes beside the action and belongs to the transition."""
        return Composite()

    @property
    def parent_predictor(self) -> Predictor | None:
        """The predictor of the level above; ``None`` until :meth:`attach` is called."""
        return self._parent_predictor

    def attach(self, parent_predictor: Predictor | None) -> None:
        """Show the level the predictor of the level above, which owns, saves and trains it.

        Raises:
            TypeError: Not a predictor. ValueError: ``None`` for a level that needs one.
        """
        if parent_predictor is not None and not isinstance(parent_predictor, Predictor):
            raise TypeError(
                f"parent_predictor must be a Predictor or None, got "
                f"{type(parent_predictor).__name__}; pass the upper level's .predictor"
            )
        # Around torch's registration: its weights are not this level's.
        self.__dict__["_parent_predictor"] = parent_predictor

    def hands_back(self, tensordict: TensorDictBase) -> Tensor:
        """Whether the level is done with its input and control goes back up, bool ``[*B, 1]``.

        Asked before each of its actions but the first on an input.

        Args:
            tensordict: ``[*B]`` with the observation, the input and ``"n_actions" [*B, 1]``, its
                own actions on this input so far.
        """
        n_actions: Tensor = tensordict.get("n_actions")
        if self.duration is None:
            return torch.zeros_like(n_actions, dtype=torch.bool)
        return n_actions >= self.duration

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform that carries the level's memory over steps and clears it at resets."""
        return TensorDictPrimer(Composite(), expand_specs=True)

    # -- acting and learning ----------------------------------------------------------------

    @abstractmethod
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action for ``[*B]``, and below ``"next"`` the memory for the next step."""

    @abstractmethod
    def learn(self, data: TensorDictBase) -> dict[str, float]:
        """Learn from transitions that this level made.

        Alone it is given what a collector yields, ``[T]`` or ``[env, T]``. In a hierarchy, ``[N]``
        transitions as :class:`~layeredrl_torchrl.Hierarchy` lays them out.

        Returns:
            Terms of the loss and counts, by name.
        """


def _shape(space: TensorSpec | Space) -> object:
    """The shape of one observation or action; of what a TorchRL environment observes, too."""
    if isinstance(space, Composite) and "observation" in space.keys():
        space = space["observation"]
    return getattr(space, "shape", None)
