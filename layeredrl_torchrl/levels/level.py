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

# What a reward_func gave, beside the reward that it replaced.
OWN_REWARD = ("next", "own_reward")


class Level(OnePrimer, WholeState):
    """A policy of one time scale that learns, alone or in a hierarchy.

    Called with a TensorDict ``[*B]``, it reads the observation and, if it has an ``input_spec``,
    the input from above, and writes its action. The call does not change the level, so its copies
    in worker processes agree. State that lasts over steps travels in the TensorDict, for which the
    environment needs the transform :meth:`make_tensordict_primer` (collectors append it by
    themselves with ``auto_register_policy_transforms=True``). All other state is changed by
    :meth:`learn` only and belongs to the ``state_dict``.

    The action can be a torque for the environment, or a skill that another level carries out over
    many environment steps. The spaces are known from :meth:`setup` on, which a hierarchy calls: the
    action space of a level is the ``input_spec`` of the level below it, and that of the lowest is
    the environment's.

    ``name`` is used in messages and logs. It is the name of the class unless you set another. In a
    hierarchy, levels that share a name log under theirs and their position.

    A subclass implements ``forward`` and ``learn``, and ``_build``, which :meth:`setup` calls once.
    It may use other keys, carry memory, and hand back control by another rule.

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
        input_spec: Spec (or gymnasium space) of its input from above, a skill or a subgoal;
            ``None`` for the highest level, which has none.
        duration: Own actions after which it hands control back to the level above; only with an
            ``input_spec``.
        reward_func: Computes a reward of its own, ``[N]`` or ``[N, 1]``, from the transitions
            ``[N]`` that :meth:`learn` is given; flags and integers count as floats. By default the
            environment's reward, summed over the action, is used.
        each_step: Whether it learns from every environment step under its action instead of from
            the action as a whole. Not for the lowest level, where both are the same.

    Attributes:
        observation_key, input_key, action_key, reward_key, done_key, terminated_key: Keys that it
            reads and writes, the last three below ``"next"``. Set others before the level is used;
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
    #: The ``each_step`` that the level above must have; ``None`` for either. With ``True`` it is
    #: rated by single environment steps, and so is the lowest or has ``each_step`` itself.
    parent_each_step: bool | None = None
    #: What :meth:`learn` logs under in a hierarchy, which sets it; ``None`` for a level alone.
    logs_as: str | None = None
    #: The buffer that transitions are stored in; ``None`` if they are not stored.
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
                f"duration={duration} is about an input from above, and without an input_spec "
                "there is none; pass input_spec=, or leave duration out"
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

        A second call with the same spaces does nothing, so a level that learned alone can be put
        into a hierarchy.

        Args:
            observation_space: Spec of one observation, ``[obs]``.
            action_space: Spec (or gymnasium space) of one action.

        Raises:
            ValueError: It is set up for other spaces already: observations of another shape or
                kind, or any other action space. And as the level's parts raise.
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
        # Bounds of observations may be known in one place and not in the other.
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
        """Return the shape of the observation that the level reads, and whether it is a choice."""
        if isinstance(space, Composite) and self.observation_key in space.keys(True, True):
            space = space[self.observation_key]
        choice = isinstance(space, TensorSpec) and is_discrete(space)
        return getattr(space, "shape", None), choice

    @property
    def action_spec(self) -> TensorSpec:
        """Spec of one action; ``RuntimeError`` before :meth:`setup`."""
        if self._action_spec is None:
            raise RuntimeError(
                f"{self.name} knows no spaces yet; put it into a Hierarchy, or call "
                "setup(observation_space, action_space)"
            )
        return self._action_spec

    def _build(self, observation_space: TensorSpec, action_spec: TensorSpec) -> None:
        """Build the parts; a hook for levels that have some."""

    # -- for hierarchies --------------------------------------------------------------------

    @property
    def predictor(self) -> Predictor | None:
        """The level's model of the world on its own time scale; ``None`` if it has none."""
        return None

    @property
    def optim(self) -> torch.optim.Optimizer | None:
        """The torch optimizer of :meth:`learn`, to be saved beside the level; may be ``None``."""
        return None

    @property
    def record(self) -> Composite:
        """Specs of further entries that a call writes and that belong to the transition."""
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
        # Not registered, since its weights belong to the level above.
        self.__dict__["_parent_predictor"] = parent_predictor

    @property
    def interrupt_after(self) -> int | None:
        """Own actions after which it hands control back in evaluation, before ``duration``.

        The level above then chooses anew, with all of ``duration`` ahead, instead of following
        what it chose to the end: interrupting options (Sutton, Precup and Singh, Artificial
        Intelligence 112, 1999, section 4). That pays as far as its values are right, and costs a
        choice each time. ``None``, the default, for never; in training it has no effect.

        Raises:
            TypeError, ValueError: When set: not an int, below 1 or above ``duration``; a level
                that goes by another rule.
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
        """``interrupt_after`` in evaluation where it is set, else ``duration``."""
        after = self._interrupt_after
        return self.duration if after is None or self.training else after

    @property
    def ends_by_duration(self) -> bool:
        """Whether :meth:`hands_back` goes by :attr:`limit` alone, and need not be called."""
        return getattr(self.hands_back, "__func__", None) is Level.hands_back

    def hands_back(self, tensordict: TensorDictBase) -> Tensor:
        """Return whether the level hands control back to the level above, bool ``[*B, 1]``.

        A hierarchy calls it before each of the level's actions but the first on an input.

        Args:
            tensordict: ``[*B]`` with the observation, the input, ``"n_actions" [*B, 1]``, its own
                actions on this input so far, and its :attr:`record` of the last one.
        """
        n_actions: Tensor = tensordict.get("n_actions")
        if self.limit is None:
            return torch.zeros_like(n_actions, dtype=torch.bool)
        return n_actions >= self.limit

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Return the transform that carries the memory over steps and clears it at resets."""
        return TensorDictPrimer(Composite(), expand_specs=True)

    def own_reward(self, data: TensorDictBase) -> Tensor:
        """Compute the reward by ``reward_func``, ``[*B, 1]``; flags and integers become floats.

        It is also noted in ``data``, so that :meth:`learn` sees in transitions of a hierarchy that
        their reward is this one already.

        Args:
            data: Transitions ``[*B]``. Gets ``("next", "own_reward")``, unless it is locked.

        Raises:
            ValueError: Another shape than ``[N]`` or ``[N, 1]``.
        """
        n = data.numel()
        reward = self.reward_func(data.reshape(-1)) if self.reward_func else None
        if not isinstance(reward, Tensor) or reward.shape not in ((n,), (n, 1)):
            got = tuple(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
            raise ValueError(f"{self.name}.reward_func gave {got}, expected ({n},) or ({n}, 1)")
        if not (reward.is_floating_point() or reward.is_complex()):
            reward = reward.float()  # such as whether a goal is reached
        reward = reward.reshape((*data.shape, 1))
        if not data.is_locked:
            data.set(OWN_REWARD, reward)
        return reward

    # -- acting and learning ----------------------------------------------------------------

    @abstractmethod
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action for ``[*B]``, and below ``"next"`` the memory for the next step."""

    @abstractmethod
    def learn(self, data: TensorDictBase) -> dict[str, float]:
        """Learn from the transitions of this level.

        Args:
            data: Alone, the batch of a collector, ``[T]`` or ``[env, T]``; in a hierarchy, ``[N]``
                transitions as :class:`~layeredrl_torchrl.Hierarchy` lays them out.

        Returns:
            Terms of the loss and counts, by name.
        """
