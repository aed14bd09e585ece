"""Rewards for skills whose outcomes can be told apart."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrl.data import Bounded, TensorSpec

from layeredrl_torchrl._checks import check_number, check_positive_int
from layeredrl_torchrl.predictors import Predictor, RewardPredictor
from layeredrl_torchrl.specs import action_features, is_discrete, width

__all__ = ["DADSReward", "SPlaTESReward", "SkillReward", "identifiability"]


def identifiability(log_prob: Tensor) -> Tensor:
    r"""Compare how well an outcome is explained by its own skill and by skills of the prior.

    .. math:: \log p(s' | s, z_0) - \log \frac{1}{n} \sum_{i=0}^{n-1} p(s' | s, z_i)

    With the other skills drawn from the prior, its mean is a lower bound of the mutual information
    between skill and outcome (arXiv 1807.03748). No value exceeds ``log n``, since the skill itself
    is among the ``n``.

    Args:
        log_prob: ``[*B, n]`` in nats, the skill that was carried out first.

    Returns:
        ``[*B]`` in nats.
    """
    # Differences first: far from all predictions, log-densities are too large to be summed.
    relative = log_prob - log_prob[..., :1]
    return math.log(log_prob.shape[-1]) - relative.logsumexp(-1)


class SkillReward(nn.Module, ABC):
    r"""Rewards skills by the predictor of the level above.

    The reward is :func:`identifiability` under the predictor's model. Outcomes are compared as
    whitened changes of the state (see :class:`~layeredrl_torchrl.predictors.DeltaStandardizer`),
    which all members predict with one fixed ``std``. So every dimension counts equally, and
    outcomes that the model is unsure of are not favoured. A subclass selects the actions of a skill
    that are rewarded.

    At first skills have no effect, so their model cannot tell them apart. For
    ``n_symmetry_breaking_steps`` it is replaced by a fixed random model that is linear in the
    skill,

    .. math:: W (s' - s) = L z,

    whose reward is blended into the learned model's: its weight falls linearly from 1 to 0. ``L``
    has orthogonal columns (or rows, if it is wide) and spreads skills of the prior as widely as
    the whitened changes are spread; :meth:`prepare` draws it, and it is saved.

    >>> SPlaTESReward(state_dims=[0, 1], n_symmetry_breaking_steps=20_000).state_dims
    [0, 1]

    Args:
        n_skill_samples: Skills of the prior that a skill is compared with.
        std: Standard deviation in units of whitened changes: a number, or one for each dimension.
            Outcomes that are closer count as alike; take about the error of mean predictions.
        state_dims: Dimensions of the predictor's state in which skills are told apart, such as the
            position; all by default. They are whitened among themselves.
        n_symmetry_breaking_steps: See above; 0 to use the learned model from the start.

    Raises:
        TypeError, ValueError: Numbers of other kinds, or outside their range.
    """

    std: Tensor  # [] or [D']
    linear_model: Tensor  # [D', Z], 0 x 0 until it is drawn
    #: Whether every step of a skill is rewarded, by a level above that learns from every step.
    each_step: bool = False

    def __init__(
        self,
        *,
        n_skill_samples: int = 32,
        std: float | Sequence[float] = 0.5,
        state_dims: Sequence[int] | None = None,
        n_symmetry_breaking_steps: int = 0,
    ) -> None:
        super().__init__()
        self.n_skill_samples = check_positive_int("n_skill_samples", n_skill_samples)
        self.n_symmetry_breaking_steps = check_positive_int(
            "n_symmetry_breaking_steps", n_symmetry_breaking_steps, minimum=0
        )
        for one in std if isinstance(std, Sequence) and not isinstance(std, str) else [std]:
            check_number("std", one, 0.0, open_low=True)
        stds = torch.as_tensor(std, dtype=torch.get_default_dtype())
        if stds.ndim > 1 or not bool(((stds > 0) & stds.isfinite()).all()):
            raise ValueError(f"std must be a positive number, or one for each dimension, got {std}")
        self.state_dims = None if state_dims is None else [operator.index(d) for d in state_dims]
        if self.state_dims is not None and (
            not self.state_dims or len(set(self.state_dims)) < len(self.state_dims)
        ):
            raise ValueError(
                f"state_dims must be different dimensions, at least one, got {state_dims}; leave "
                "it out for all"
            )
        self.register_buffer("std", stds, persistent=False)
        self.register_buffer("linear_model", torch.zeros(0, 0))

    @abstractmethod
    def pays(self, n_actions: Tensor, duration: int) -> Tensor:
        """Return whether an action of a skill has a reward, bool ``[N, 1]``.

        Args:
            n_actions: Actions of the skill before this one, ``[N, 1]``.
            duration: Actions in a skill.
        """

    def prepare(self, predictor: Predictor, skill_spec: TensorSpec) -> None:
        """Check that ``predictor`` can tell skills apart; draw the linear model if there is none.

        Raises:
            TypeError: A predictor that is not learned. ValueError: One that does not standardise
                changes, or lacks the ``state_dims``; a ``std`` for another number of dimensions.
        """
        name = type(self).__name__
        if not isinstance(predictor, RewardPredictor):
            raise TypeError(
                f"{name} compares skills by a learned RewardPredictor of the level above, got a "
                f"{type(predictor).__name__}"
            )
        if predictor.delta_standardizer is None:
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

    @torch.no_grad()
    def forward(
        self,
        predictor: Any,
        skill_spec: TensorSpec,
        observation: Tensor,
        skill: Tensor,
        next_observation: Tensor,
        n_env_steps: int,
    ) -> Tensor:
        """Compute the reward ``[N]`` of skills, in nats.

        Args:
            predictor: The ``RewardPredictor`` of the level above that :meth:`prepare` was given.
            skill_spec: Spec of a skill; the prior is uniform over it.
            observation: ``[N, obs]`` of the level above, where the predictor's step begins.
            skill: ``[N, Z]``, or discrete ``[N]``.
            next_observation: ``[N, obs]``, where it ends.
            n_env_steps: Environment steps so far, which set the weight of the linear model.
        """
        weight, n = self.symmetry_breaking(n_env_steps), len(skill)
        others = skill_spec.rand((n, self.n_skill_samples)).to(skill)
        skills = torch.cat([skill.unsqueeze(1), others], 1)
        state, context = predictor.encode(observation)
        next_state, _ = predictor.encode(next_observation)
        whitening = self._whitening(predictor)
        reward = torch.zeros(n, dtype=state.dtype, device=state.device)
        if weight < 1.0:
            beside = (n, skills.shape[1], -1)
            log_prob, _, _ = predictor.model.get_log_prob(
                *(x.unsqueeze(1).expand(beside) for x in (state, context)),
                skills,
                next_state.unsqueeze(1).expand(beside),
                std=self.std,
                transform=whitening,
            )
            reward = reward + (1.0 - weight) * identifiability(log_prob)
        if weight > 0.0:
            loc = predictor.delta_standardizer.loc
            change = (next_state - state - loc) @ whitening.mT
            expected = self._features(skill_spec, skills) @ self.linear_model.mT
            error = (change.unsqueeze(1) - expected) / self.std
            reward = reward + weight * identifiability(-0.5 * error.square().sum(-1))
        return reward

    def _features(self, spec: TensorSpec, skills: Tensor) -> Tensor:
        """Turn skills ``[*B, ...]`` into features ``[*B, Z]`` with second moments of 1."""
        features = action_features(spec, skills, self.linear_model.dtype)
        if is_discrete(spec):
            return features * math.sqrt(width(spec))
        if not isinstance(spec, Bounded):
            return features
        low, high = spec.space.low.to(features), spec.space.high.to(features)
        return (features - (low + high) / 2) / (high - low) * math.sqrt(12.0)

    def _whitening(self, predictor: Any) -> Tensor:
        """Return the matrix ``[D', D]`` that whitens changes of the state in ``state_dims``."""
        whitening: Tensor = predictor.delta_standardizer.whitening
        if self.state_dims is None:
            return whitening
        # The inverse of the whitening's square is the covariance; that of some dimensions is a
        # block of it. In double precision, since eigenvalues may differ by orders of magnitude.
        wide = whitening.double()
        covariance = torch.linalg.inv(wide.mT @ wide)[self.state_dims][:, self.state_dims]
        std = covariance.diagonal().sqrt()
        eigenvalues, axes = torch.linalg.eigh(covariance / std / std.unsqueeze(1))
        root = eigenvalues.clamp_min(predictor.delta_standardizer.min_eigenvalue).rsqrt()
        out = torch.zeros(len(std), whitening.shape[1], dtype=wide.dtype, device=wide.device)
        out[:, self.state_dims] = (axes * root) @ axes.mT / std
        return out.to(whitening)


class SPlaTESReward(SkillReward):
    """Rewards a skill at its last step for its outcome as a whole.

    As in SPlaTES ("Long-Horizon Planning with Predictable Skills", RLC 2025): the level above
    predicts where a skill leads from start to end. A skill that is cut short by the end of an
    episode has no reward.

    >>> SPlaTESReward(n_skill_samples=64, std=0.2).n_skill_samples
    64
    """

    def pays(self, n_actions: Tensor, duration: int) -> Tensor:
        """Mark the last action of each skill, bool ``[N, 1]``."""
        return n_actions + 1 >= duration


class DADSReward(SkillReward):
    """Rewards every step of a skill, as in DADS (arXiv 1907.01657).

    The level above has to predict single steps under a skill: build it with ``each_step=True``.

    >>> DADSReward(n_skill_samples=64, std=0.2).n_skill_samples
    64
    """

    each_step = True

    def pays(self, n_actions: Tensor, duration: int) -> Tensor:
        """Mark every action, bool ``[N, 1]``."""
        return torch.ones_like(n_actions, dtype=torch.bool)
