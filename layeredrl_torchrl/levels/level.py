"""The base class of levels."""

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
from layeredrl_torchrl.specs import Space, is_discrete, to_spec

__all__ = ["OWN_REWARD", "Level"]

# The result of a reward_func, noted in addition to the reward that it replaces.
OWN_REWARD = ("next", "own_reward")


class Level(OnePrimer, WholeState):
    """A policy of one time scale, alone or in a hierarchy, that learns.

    Called with a TensorDict ``[*B]``, it reads the observation and, if it has an ``input_spec``,
    the input from the level above, and writes its action. The call does not change the level, so
    its copies in worker processes agree. State that lasts over steps is passed on in the
    TensorDict; the environment needs the transform :meth:`make_tensordict_primer` for it
    (collectors append it automatically with ``auto_register_policy_transforms=True``). Only
    :meth:`learn` changes all other state, which is part of the ``state_dict``.

    The action can be a torque for the environment, or a skill that another level carries out over
    many environment steps. :meth:`setup`, which a hierarchy calls, sets the spaces: the action
    space of a level is the ``input_spec`` of the level below it; that of the lowest level is the
    environment's.

    ``name`` is used in messages and logs. It is the name of the class unless you set another. In a
    hierarchy, levels with equal names log under their name and position.

    A subclass implements ``forward``, ``learn`` and ``_build``, which :meth:`setup` calls once. It
    may use other keys, have memory, and hand back control by another rule.

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
        input_spec: Spec (or gymnasium space) of the input from the level above, a skill or a
            subgoal; ``None`` for the highest level.
        duration: Number of its actions after which it hands control back to the level above; only
            with an ``input_spec``.
        reward_func: Computes the level's own reward, ``[N]`` or ``[N, 1]``, from the transitions
            ``[N]`` passed to :meth:`learn`; flags and integers become floats. By default it learns
            from the environment's reward, summed over the action.
        each_step: Whether it learns from every environment step of its action instead of from the
            whole action. Not for the lowest level, where both are the same.

    Attributes:
        observation_key, input_key, action_key, reward_key, done_key, terminated_key: Keys that it
            reads and writes, the last three under ``"next"``. Change them before the level is used;
            those of a ``PlannerLevel`` are its predictor's.

    Raises:
        TypeError, ValueError: As :func:`~layeredrl_torchrl.to_spec`; a duration below 1, or without
            an ``input_spec``.
    """

    observation_key: NestedKey = "observation"
    input_key: NestedKey = "input"
    action_key: NestedKey = "action"
    reward_key: NestedKey = "reward"
    done_key: NestedKey = "done"
    terminated_key: NestedKey = "terminated"
    #: The ``each_step`` that the level above must have; ``None`` for either. With ``True`` this
    #: level is rated by single environment steps, so it must be the lowest or have ``each_step``.
    parent_each_step: bool | None = None
    #: The name under which :meth:`learn` logs in a hierarchy, which sets it; ``None`` otherwise.
    logs_as: str | None = None
    #: The buffer of transitions; ``None`` if they are not stored.
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
        if self.duration is not None and self.input_spec is None:
            raise ValueError(
                f"duration={duration} is for an input from above, which needs an input_spec; "
                "pass input_spec=, or leave duration out"
            )
        self._interrupt_after: int | None = None
        check_callable("reward_func", reward_func, optional=True)
        self.reward_func = reward_func
        self.each_step = check_flag("each_step", each_step)
        self.name = type(self).__name__
        self.observation_space: TensorSpec | None = None
        self._action_spec: TensorSpec | None = None
        self._parent_predictor: Predictor | None = None

    # -- spaces -----------------------------------------------------------------------------

    def setup(self, observation_space: TensorSpec, action_space: TensorSpec | Space) -> None:
        """Build the parts whose sizes depend on the spaces.

        A second call with the same spaces does nothing, so a level trained alone can be put into a
        hierarchy.

        Args:
            observation_space: Spec of one observation, ``[obs]``.
            action_space: Spec (or gymnasium space) of one action.

        Raises:
            ValueError: The level is already set up for other spaces: observations of another shape
                or kind, or any other action space. Also as the level's parts raise.
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
        # Two specs of one observation may differ in their bounds, so compare only shape and kind.
        for what, has, got, form in (
            ("observation", self.observation_space, observation_space, self._kind),
            ("action", self._action_spec, action_spec, lambda spec: spec.cpu()),
        ):
            if has is not None and form(has) != form(got):
                raise ValueError(
                    f"{self.name} was set up for the {what} space {has}, got {got}; build a new "
                    "level for other spaces"
                )

    def _kind(self, space: TensorSpec | Space) -> tuple[object, bool]:
        """Return the shape of the level's observation, and whether it is discrete."""
        if isinstance(space, Composite) and self.observation_key in space.keys(True, True):
            space = space[self.observation_key]
        choice = isinstance(space, TensorSpec) and is_discrete(space)
        return getattr(space, "shape", None), choice

    @property
    def action_spec(self) -> TensorSpec:
        """Spec of one action; ``RuntimeError`` before :meth:`setup`."""
        if self._action_spec is None:
            raise RuntimeError(
                f"{self.name} has no spaces yet; put it into a Hierarchy, or call "
                "setup(observation_space, action_space)"
            )
        return self._action_spec

    def _build(self, observation_space: TensorSpec, action_spec: TensorSpec) -> None:
        """Build the parts; a hook for levels with parts."""

    # -- for hierarchies --------------------------------------------------------------------

    @property
    def predictor(self) -> Predictor | None:
        """The level's model of the world on its own time scale; ``None`` if it has none."""
        return None

    @property
    def optim(self) -> torch.optim.Optimizer | None:
        """The torch optimizer of :meth:`learn`, or ``None``; save it together with the level."""
        return None

    @property
    def record(self) -> Composite:
        """Specs of further entries that a call writes as part of the transition."""
        return Composite()

    @property
    def parent_predictor(self) -> Predictor | None:
        """The predictor of the level above; ``None`` until :meth:`attach` is called."""
        return self._parent_predictor

    def attach(self, parent_predictor: Predictor | None) -> None:
        """Give the level access to the predictor of the level above.

        The level above owns, saves and trains it.

        Raises:
            TypeError: Not a predictor. ValueError: ``None`` for a level that needs one.
        """
        if parent_predictor is not None and not isinstance(parent_predictor, Predictor):
            raise TypeError(
                f"parent_predictor must be a Predictor or None, got "
                f"{type(parent_predictor).__name__}; pass the upper level's .predictor"
            )
        # Not registered: its weights belong to the level above.
        self.__dict__["_parent_predictor"] = parent_predictor

    @property
    def interrupt_after(self) -> int | None:
        """Number of its actions after which it hands control back in evaluation.

        The level above then chooses again, with a whole ``duration`` ahead, instead of following
        its choice to the end: interrupting options (Sutton, Precup and Singh, Artificial
        Intelligence 112, 1999, section 4). This helps if its values are accurate, and costs one
        choice each time. ``None``, the default, for no interruption; in training it has no effect.

        Raises:
            TypeError, ValueError: When set: not an int, below 1 or above ``duration``; a level
                without a ``duration``.
        """
        return self._interrupt_after

    @interrupt_after.setter
    def interrupt_after(self, value: int | None) -> None:
        if value is not None:
            check_positive_int("interrupt_after", value)
            if self.duration is None or value > self.duration:
                raise ValueError(
                    f"interrupt_after is {value}, but {self.name} has duration={self.duration}; "
                    "pass at most that many actions"
                )
        self._interrupt_after = value

    @property
    def limit(self) -> int | None:
        """``interrupt_after`` in evaluation if it is set, otherwise ``duration``."""
        after = self._interrupt_after
        return self.duration if after is None or self.training else after

    @property
    def ends_by_duration(self) -> bool:
        """Whether :meth:`hands_back` depends only on :attr:`limit`, and need not be called."""
        return getattr(self.hands_back, "__func__", None) is Level.hands_back

    def hands_back(self, tensordict: TensorDictBase) -> Tensor:
        """Return whether the level hands control back to the level above, bool ``[*B, 1]``.

        A hierarchy calls it before each of the level's actions except the first on an input.

        Args:
            tensordict: ``[*B]`` with the observation, the input, ``"n_actions" [*B, 1]`` (its
                actions on this input so far), and the :attr:`record` of its last action.
        """
        n_actions: Tensor = tensordict.get("n_actions")
        if self.limit is None:
            return torch.zeros_like(n_actions, dtype=torch.bool)
        return n_actions >= self.limit

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Return the transform that passes on the memory between steps and clears it at resets."""
        return TensorDictPrimer(Composite(), expand_specs=True)

    def own_reward(self, data: TensorDictBase) -> Tensor:
        """Compute the reward with ``reward_func``, ``[*B, 1]``; flags and integers become floats.

        It is also stored in ``data``, so that :meth:`learn` recognises transitions of a hierarchy
        whose reward was already replaced.

        Args:
            data: Transitions ``[*B]``. Unless locked, ``("next", "own_reward")`` is added to it.

        Raises:
            ValueError: Another shape than ``[N]`` or ``[N, 1]``.
        """
        n = data.numel()
        reward = self.reward_func(data.reshape(-1)) if self.reward_func else None
        if not isinstance(reward, Tensor) or reward.shape not in ((n,), (n, 1)):
            got = tuple(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
            raise ValueError(f"{self.name}.reward_func gave {got}, expected ({n},) or ({n}, 1)")
        if not (reward.is_floating_point() or reward.is_complex()):
            reward = reward.float()  # for example flags of reached goals
        reward = reward.reshape((*data.shape, 1))
        if not data.is_locked:
            data.set(OWN_REWARD, reward)
        return reward

    # -- acting and learning ----------------------------------------------------------------

    @abstractmethod
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action for ``[*B]``, and under ``"next"`` the memory for the next step."""

    @abstractmethod
    def learn(self, data: TensorDictBase) -> dict[str, float]:
        """Learn from the transitions of this level.

        Args:
            data: Without a hierarchy, the batch of a collector, ``[T]`` or ``[env, T]``; in a
                hierarchy, ``[N]`` transitions in the layout of
                :class:`~layeredrl_torchrl.Hierarchy`.

        Returns:
            Terms of the loss and counts, by name.
        """
