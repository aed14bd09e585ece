"""Rewards for skills with distinguishable outcomes."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrl.data import TensorSpec

from layeredrl_torchrl._checks import (
    check_flag,
    check_instance,
    check_number,
    check_positive_int,
)
from layeredrl_torchrl._signatures import SignatureOfInit, passes_on
from layeredrl_torchrl.levels._outcomes import (
    RunningMoments,
    identifiability,
    skill_features,
    whitening_among,
)
from layeredrl_torchrl.predictors import Predictor, RewardPredictor
from layeredrl_torchrl.specs import width

__all__ = ["DADSReward", "SPlaTESReward", "SkillReward", "identifiability"]


class SkillReward(nn.Module, ABC):
    r"""Rewards skills with the predictor of the level above.

    The reward is :func:`identifiability` under the predictor's model. Outcomes are compared as
    whitened changes of the state (see :class:`~layeredrl_torchrl.predictors.DeltaStandardizer`),
    with one fixed ``std`` for all members. So every dimension counts equally, and uncertain
    outcomes are not favoured. A ``StaticPredictor`` has no statistics of changes: with it, outcomes
    are compared in units of the state. A subclass selects which actions of a skill are rewarded.

    At first skills have no effect, so the model cannot distinguish them. During
    ``n_symmetry_breaking_steps`` a fixed random model helps, which is linear in the skill (``W``
    whitens changes),

    .. math:: W (s' - s) = L z,

    Its reward is blended with that of the learned model: its weight falls linearly from 1 to 0.
    ``L`` has orthogonal columns (or rows, if it is wide) and gives skills of the prior the spread
    of the whitened changes; :meth:`prepare` draws it, and it is saved.

    >>> SPlaTESReward(state_dims=[0, 1], n_symmetry_breaking_steps=20_000).state_dims
    [0, 1]

    Args:
        n_skill_samples: Number of skills from the prior with which a skill is compared.
        std: Standard deviation in units of whitened changes: a number, or one for each dimension,
            or a function of the environment steps that returns a number. Closer outcomes count as
            equal; choose about the error of mean predictions.
        state_dims: Dimensions of the predictor's state in which skills are distinguished, such as
            the position; all by default. They are whitened among themselves.
        n_symmetry_breaking_steps: See above; 0 to use the learned model from the start.
        clip: Lowest and highest identifiability, in nats; no limits by default (``-math.inf``,
            ``math.inf``). Outcomes far from all predictions have values of minus thousands, which
            hide all other differences.
        normalize: Whether to standardise rewards by their running mean and standard deviation. This
            shifts the total reward equally for all skills of equal length.
        offset: Added at the end to the reward of every action of a skill, rewarded or not. A
            positive offset keeps skills from ending the episode early to escape negative rewards.

    Raises:
        TypeError, ValueError: Numbers of another kind, or outside their range; when called, also
            for a ``std`` function that returns such numbers.
    """

    std: Tensor  # [] or [D'], NaN if it is a function
    linear_model: Tensor  # [D', Z], [0, 0] until it is drawn
    #: Whether every step of a skill is rewarded; the level above must learn from every step.
    each_step: bool = False
    #: Whether the reward is the change of the identifiability by an action.
    difference: bool = False

    def __init__(
        self,
        *,
        n_skill_samples: int = 32,
        std: float | Sequence[float] | Callable[[int], float] = 0.5,
        state_dims: Sequence[int] | None = None,
        n_symmetry_breaking_steps: int = 0,
        clip: tuple[float, float] = (-math.inf, math.inf),
        normalize: bool = False,
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_skill_samples = check_positive_int("n_skill_samples", n_skill_samples)
        self.n_symmetry_breaking_steps = check_positive_int(
            "n_symmetry_breaking_steps", n_symmetry_breaking_steps, minimum=0
        )
        self.std_schedule = std if callable(std) else None
        self.register_buffer("std", _checked_std(std), persistent=False)
        self.clip = _checked_range("clip", clip)
        self.moments = RunningMoments() if check_flag("normalize", normalize) else None
        self.offset = check_number("offset", offset)
        self.state_dims = None if state_dims is None else [operator.index(d) for d in state_dims]
        if self.state_dims is not None and (
            not self.state_dims or len(set(self.state_dims)) < len(self.state_dims)
        ):
            raise ValueError(
                f"state_dims must be different dimensions, at least one, got {state_dims}; leave "
                "it out for all"
            )
        self.register_buffer("linear_model", torch.zeros(0, 0))

    @abstractmethod
    def pays(self, n_actions: Tensor, duration: int) -> Tensor:
        """Return whether an action of a skill has a reward, bool ``[N, 1]``.

        Args:
            n_actions: Actions of the skill before this one, ``[N, 1]``; ``duration - 1`` where the
                skill ended with this action, by any rule, and less where it continued.
            duration: Actions in a skill.
        """

    def prepare(self, predictor: Predictor, skill_spec: TensorSpec) -> None:
        """Check that ``predictor`` can distinguish skills; draw the linear model if there is none.

        Raises:
            TypeError: Not a predictor. ValueError: A learned predictor that does not standardise
                changes, or one without the ``state_dims``; a ``std`` for another number of
                dimensions.
        """
        name = type(self).__name__
        hint = "put a PlannerLevel above the skills"
        check_instance("predictor", predictor, Predictor, hint=hint)
        if isinstance(predictor, RewardPredictor) and predictor.delta_standardizer is None:
            raise ValueError(
                f"{name} compares whitened changes, but the predictor above was built with "
                "delta_standardizer=False; build it with True"
            )
        dim = predictor.latent_state_dim
        dims = range(dim) if self.state_dims is None else self.state_dims
        if not all(0 <= d < dim for d in dims):
            raise ValueError(
                f"{name} looks at state_dims {self.state_dims}, but the state of the predictor "
                f"above has {dim} dimensions"
            )
        if self.std.numel() not in (1, len(dims)):
            raise ValueError(
                f"{name} has {self.std.numel()} stds for {len(dims)} dimensions of the state; "
                "give one number, or one for each"
            )
        shape = (len(dims), width(skill_spec))
        if tuple(self.linear_model.shape) != shape:
            # Both skills and changes have unit second moments.
            gain = math.sqrt(max(1.0, shape[0] / shape[1]))
            drawn = nn.init.orthogonal_(torch.empty(shape), gain)
            self.linear_model = drawn.to(self.linear_model)

    def symmetry_breaking(self, n_env_steps: int) -> float:
        """Return the weight of the linear model after ``n_env_steps`` environment steps."""
        if not self.n_symmetry_breaking_steps:
            return 0.0
        return max(0.0, 1.0 - n_env_steps / self.n_symmetry_breaking_steps)

    def std_after(self, n_env_steps: int) -> Tensor | float:
        """Return the ``std`` after ``n_env_steps`` environment steps."""
        if self.std_schedule is None:
            return self.std
        std = self.std_schedule(n_env_steps)
        return float(check_number("std(n_env_steps)", std, 0.0, open_low=True))

    @torch.no_grad()
    def forward(
        self,
        predictor: Any,
        skill_spec: TensorSpec,
        observation: Tensor,
        skill: Tensor,
        next_observation: Tensor,
        n_env_steps: int,
        since: Tensor | None = None,
    ) -> Tensor:
        """Compute the reward ``[N]`` of skills, in nats, clipped and not yet normalised.

        Args:
            predictor: The predictor of the level above, as passed to :meth:`prepare`.
            skill_spec: Spec of a skill; the prior is uniform over it.
            observation: ``[N, obs]`` of the level above, where the predictor's step begins.
            skill: ``[N, Z]``, or discrete ``[N]``.
            next_observation: ``[N, obs]``, where it ends.
            n_env_steps: Environment steps so far; they determine the weight of the linear model and
                the ``std``.
            since: ``[N, obs]``. If given, the reward is the identifiability at ``next_observation``
                minus that at ``since``, with the same skills of the prior.
        """
        others = skill_spec.rand((len(skill), self.n_skill_samples)).to(skill)
        skills = torch.cat([skill.unsqueeze(1), others], 1)
        state, context = predictor.encode(observation)

        def score(reached: Tensor) -> Tensor:
            after, _ = predictor.encode(reached)
            value = self._identifiability(
                predictor, skill_spec, state, context, skills, after, n_env_steps
            )
            return value.clamp(*self.clip)

        reward = score(next_observation)
        return reward if since is None else reward - score(since)

    def _identifiability(
        self,
        predictor: Any,
        skill_spec: TensorSpec,
        state: Tensor,
        context: Tensor,
        skills: Tensor,
        next_state: Tensor,
        n_env_steps: int,
    ) -> Tensor:
        """Return the identifiability ``[N]`` of the first of ``skills [N, n, ...]``, in nats."""
        weight, std = self.symmetry_breaking(n_env_steps), self.std_after(n_env_steps)
        standardizer = getattr(predictor, "delta_standardizer", None)
        whitening = whitening_among(standardizer, self.state_dims, state)
        reward = torch.zeros(len(skills), dtype=state.dtype, device=state.device)
        if weight < 1.0:
            beside = (*skills.shape[:2], -1)
            log_prob, _, _ = predictor.model.get_log_prob(
                *(x.unsqueeze(1).expand(beside) for x in (state, context)),
                skills,
                next_state.unsqueeze(1).expand(beside),
                std=std,
                transform=whitening,
            )
            reward = reward + (1.0 - weight) * identifiability(log_prob)
        if weight > 0.0:
            loc = 0.0 if standardizer is None else standardizer.loc
            change = (next_state - state - loc) @ whitening.mT
            features = skill_features(skill_spec, skills, self.linear_model.dtype)
            error = (change.unsqueeze(1) - features @ self.linear_model.mT) / std
            reward = reward + weight * identifiability(-0.5 * error.square().sum(-1))
        return reward


def _checked_range(name: str, ends: Any) -> tuple[float, float]:
    """Return two numbers in rising order; they may be infinite."""
    numbers = isinstance(ends, Sequence) and len(ends) == 2
    if not numbers or not all(isinstance(x, int | float) for x in ends) or not ends[0] < ends[1]:
        raise ValueError(f"{name} must be (low, high), two numbers in this order, got {ends!r}")
    return float(ends[0]), float(ends[1])


def _checked_std(std: Any) -> Tensor:
    """Return ``std`` as a tensor ``[]`` or ``[D']``, NaN for a function."""
    dtype = torch.get_default_dtype()
    if callable(std):
        return torch.full((), math.nan, dtype=dtype)
    for one in std if isinstance(std, Sequence) and not isinstance(std, str) else [std]:
        check_number("std", one, 0.0, open_low=True)
    stds = torch.as_tensor(std, dtype=dtype)
    if stds.ndim > 1 or not bool(((stds > 0) & stds.isfinite()).all()):
        raise ValueError(f"std must be a positive number, or one for each dimension, got {std}")
    return stds


class SPlaTESReward(SkillReward):
    """Rewards a skill at its last step for its whole outcome.

    As in SPlaTES ("Long-Horizon Planning with Predictable Skills", RLC 2025), the level above
    predicts where a whole skill leads. A skill cut short by the end of an episode gets no reward.

    With ``potential_difference`` the reward of every action is the change of the identifiability
    from the state before to the state after it, each taken as an outcome. Over a whole skill this
    adds up to the final reward minus that of staying at the start, but the policy gets feedback at
    every step.

    >>> SPlaTESReward(n_skill_samples=64, std=0.2).n_skill_samples
    64

    Args:
        potential_difference: See above.
        **options: Options of :class:`~layeredrl_torchrl.levels.SkillReward`.
    """

    __signature__ = SignatureOfInit()

    @passes_on(SkillReward.__init__)
    def __init__(self, *, potential_difference: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.difference = check_flag("potential_difference", potential_difference)

    def pays(self, n_actions: Tensor, duration: int) -> Tensor:
        """Mark the last action of each skill, or all of them, bool ``[N, 1]``."""
        if self.difference:
            return torch.ones_like(n_actions, dtype=torch.bool)
        return n_actions + 1 >= duration


class DADSReward(SkillReward):
    """Rewards every step of a skill, as in DADS (arXiv 1907.01657).

    The level above must predict single steps under a skill: build it with ``each_step=True``, and
    also the level of the skills, unless it is the lowest.

    >>> DADSReward(n_skill_samples=64, std=0.2).n_skill_samples
    64
    """

    each_step = True

    def pays(self, n_actions: Tensor, duration: int) -> Tensor:
        """Mark every action, bool ``[N, 1]``."""
        return torch.ones_like(n_actions, dtype=torch.bool)
