"""Families of distributions over sequences, and the ranges of their values.

Shapes here have one flat batch axis ``b``; ``*E`` is the shape of one step of a sequence. Every
family turns standard normal noise ``[b, N, H, *E]`` into candidates, so all of them can use noise
that is correlated in time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded

from layeredrl_torchrl._checks import check_number, check_positive_int
from layeredrl_torchrl._precision import KeepsFloats
from layeredrl_torchrl.specs import Space, is_discrete, to_spec, width

__all__ = ["CategoricalSearch", "GaussianSearch", "Search", "make_search"]

Parameters = tuple[Tensor, ...]


class Search(nn.Module, ABC):
    """A family of distributions over sequences ``[H, *E]``, independent over steps.

    >>> from layeredrl_torchrl.optimizers import GaussianSearch
    >>> search = GaussianSearch(torch.tensor([-1.0]), torch.tensor([3.0]))
    >>> parameters = search.start({"mean": torch.zeros(2, 5, 1)}, warm=torch.tensor([True, False]))
    >>> search.mode(parameters)[:, 0, 0]  # the remembered mean, and the middle
    tensor([0., 1.])

    Args:
        event_shape: ``*E``.
    """

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = event_shape

    @property
    def device(self) -> torch.device:
        """Device of the constants and of the candidates."""
        return next(self.buffers()).device

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of noise and parameters."""

    @property
    @abstractmethod
    def candidate_dtype(self) -> torch.dtype:
        """Dtype of candidates."""

    @abstractmethod
    def memory_spec(self, horizon: int) -> Composite:
        """Return the spec of the memory that one search passes to the next."""

    @abstractmethod
    def start(self, memory: dict[str, Tensor], warm: Tensor) -> Parameters:
        """Return the parameters to start from.

        Args:
            memory: Entries ``[b, ...]`` as in :meth:`memory_spec`.
            warm: ``[b]`` bool; where it is false the memory is ignored.
        """

    @abstractmethod
    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        """Turn standard normal noise ``[b, N, H, *E]`` into candidates."""

    @abstractmethod
    def fit(self, candidates: Tensor, weights: Tensor) -> Parameters:
        """Fit parameters to candidates with weights ``[b, N]`` that sum to 1."""

    @abstractmethod
    def mode(self, parameters: Parameters) -> Tensor:
        """Return the central sequence of the distribution, ``[b, H, *E]``."""

    @abstractmethod
    def remember(self, parameters: Parameters) -> dict[str, Tensor]:
        """Return a memory with the entries of :meth:`memory_spec`."""

    @abstractmethod
    def project(self, candidates: Tensor) -> Tensor:
        """Move candidates to the nearest allowed values."""


class GaussianSearch(KeepsFloats, Search):
    """Independent Gaussians, clipped to bounds; the mean is remembered.

    >>> from layeredrl_torchrl.optimizers import GaussianSearch
    >>> GaussianSearch(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0])).sigma
    tensor([0.5000, 1.0000])

    Args:
        low: Lower bounds ``[A]``, finite.
        high: Upper bounds ``[A]``, not below the lower ones, and near enough that the square of
            their distance does not overflow (1.8e19 in float32).
        sigma: Initial standard deviation of every search, a number or ``[A]``, in the units of the
            bounds; by default a quarter of their distance (0.5 for -1 to 1).

    Raises:
        ValueError: Bounds that are missing, infinite, crossed or too far apart; a sigma that is
            not positive and finite.
    """

    low: Tensor  # [A]
    high: Tensor  # [A]
    middle: Tensor  # [A]
    sigma: Tensor  # [A]

    def __init__(self, low: Tensor, high: Tensor, sigma: Tensor | float | None = None) -> None:
        low, high = torch.as_tensor(low), torch.as_tensor(high)
        if low.ndim != 1 or low.shape != high.shape or not low.is_floating_point():
            raise ValueError(
                f"low and high must be float tensors of one shape [A], got {tuple(low.shape)} "
                f"({low.dtype}) and {tuple(high.shape)}"
            )
        unbounded = (~(low.isfinite() & high.isfinite())).nonzero().flatten().tolist()
        if unbounded:
            raise ValueError(
                f"dimension(s) {unbounded} have no finite bounds (low {low.tolist()}, high "
                f"{high.tolist()}); samples need a range: give finite bounds for every dimension"
            )
        if bool((low > high).any()):
            raise ValueError(f"low {low.tolist()} exceeds high {high.tolist()}")
        far = (~(high - low).square().isfinite()).nonzero().flatten().tolist()
        if far:
            raise ValueError(
                f"the bounds of dimension(s) {far} are too far apart for {low.dtype} (low "
                f"{low.tolist()}, high {high.tolist()}); such bounds usually stand for none: give "
                "the range that actions are really taken from"
            )
        super().__init__(tuple(low.shape))
        if sigma is None:
            sigma = (high - low) / 4
        else:
            if not isinstance(sigma, Tensor | np.ndarray | list | tuple):
                check_number("sigma", sigma, 0.0, open_low=True, hint="pass a number, or one each")
            sigma = torch.as_tensor(sigma, dtype=low.dtype, device=low.device)
            if sigma.ndim > 1 or sigma.numel() not in (1, len(low)):
                raise ValueError(f"sigma has shape {tuple(sigma.shape)}, expected [{len(low)}]")
            if not bool((sigma.isfinite() & (sigma > 0)).all()):
                raise ValueError(f"sigma must be positive and finite, got {sigma.tolist()}")
        # Not in the state dict, since they follow from the arguments.
        self.register_buffer("low", low.clone(), persistent=False)
        self.register_buffer("high", high.clone(), persistent=False)
        self.register_buffer("middle", low + 0.5 * (high - low), persistent=False)
        self.register_buffer("sigma", sigma.expand_as(low).clone(), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the bounds."""
        return self.low.dtype

    @property
    def candidate_dtype(self) -> torch.dtype:
        """The dtype of the bounds."""
        return self.low.dtype

    def memory_spec(self, horizon: int) -> Composite:
        """Return the spec of ``"mean" [H, A]``."""
        # Unbounded: the zeros of an empty memory may be out of bounds.
        return Composite(mean=Unbounded((horizon, *self.event_shape), dtype=self.dtype))

    def start(self, memory: dict[str, Tensor], warm: Tensor) -> Parameters:
        """Start from the remembered mean or the middle of the bounds, always with ``sigma``."""
        mean = torch.where(warm[:, None, None], memory["mean"], self.middle)
        return self.project(mean), self.sigma.expand_as(mean)

    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        """Draw samples and clip them to the bounds."""
        mean, std = (x.unsqueeze(1) for x in parameters)
        return self.project(torch.addcmul(mean, std, noise))

    def fit(self, candidates: Tensor, weights: Tensor) -> Parameters:
        """Fit the weighted mean and (population) standard deviation, each ``[b, H, A]``."""
        # Sums instead of matrix products, which autocast would round.
        weights = weights.to(candidates.dtype)[..., None, None]
        mean = (weights * candidates).sum(1)
        var = (weights * (candidates - mean.unsqueeze(1)).square()).sum(1)
        return mean, var.sqrt()

    def mode(self, parameters: Parameters) -> Tensor:
        """Return the mean, within the bounds."""
        return self.project(parameters[0])

    def remember(self, parameters: Parameters) -> dict[str, Tensor]:
        """Return the mean."""
        return {"mean": self.mode(parameters)}

    def project(self, candidates: Tensor) -> Tensor:
        """Clamp to the bounds."""
        return candidates.clamp(self.low, self.high)


class CategoricalSearch(Search):
    """Independent choices among ``n``; their probabilities are remembered.

    The noise selects a choice by its quantile, so noise that is correlated in time gives choices
    that last for several steps.

    >>> from layeredrl_torchrl.optimizers import CategoricalSearch
    >>> search = CategoricalSearch(3)
    >>> probs = torch.tensor([[[0.5, 0.5, 0.0]]])  # [b, H, n]
    >>> search.sample((probs,), torch.tensor([[[-1.0], [1.0]]]))
    tensor([[[0],
             [1]]])

    Args:
        n: Number of choices; candidates are integers from 0 to ``n - 1``, with ``*E = ()``.
        uniform: Share of the uniform distribution mixed into remembered probabilities; without it,
            a probability of 0 would stay 0.

    Raises:
        TypeError, ValueError: ``n`` below 1, ``uniform`` outside (0, 1].
    """

    choices: Tensor  # [n]

    def __init__(self, n: int, uniform: float = 0.5) -> None:
        super().__init__(())
        self.n = check_positive_int("n", n)
        self.uniform = check_number("uniform", uniform, 0.0, 1.0, open_low=True)
        self.register_buffer("choices", torch.arange(n), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Always float32."""
        return torch.float32

    @property
    def candidate_dtype(self) -> torch.dtype:
        """Always int64."""
        return torch.long

    def memory_spec(self, horizon: int) -> Composite:
        """Return the spec of ``"probs" [H, n]``."""
        return Composite(probs=Unbounded((horizon, self.n), dtype=self.dtype))

    def start(self, memory: dict[str, Tensor], warm: Tensor) -> Parameters:
        """Mix remembered probabilities with uniform ones; use uniform ones without a memory."""
        mixed = (1.0 - self.uniform) * memory["probs"] + self.uniform / self.n
        return (torch.where(warm[:, None, None], mixed, 1.0 / self.n),)

    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        """Return the choices at the noise's quantiles, ``[b, N, H]`` integers."""
        (probs,) = parameters
        borders = probs.cumsum(-1)[..., :-1].unsqueeze(1)
        return (torch.special.ndtr(noise).unsqueeze(-1) > borders).sum(-1)

    def fit(self, candidates: Tensor, weights: Tensor) -> Parameters:
        """Count the weighted shares of the choices, ``[b, H, n]``."""
        chosen = candidates.unsqueeze(-1) == self.choices
        return ((weights.to(self.dtype)[..., None, None] * chosen).sum(1),)

    def mode(self, parameters: Parameters) -> Tensor:
        """Return the most probable choices ``[b, H]``."""
        return parameters[0].argmax(-1)

    def remember(self, parameters: Parameters) -> dict[str, Tensor]:
        """Return the probabilities."""
        return {"probs": parameters[0]}

    def project(self, candidates: Tensor) -> Tensor:
        """Clamp to the range of choices."""
        return candidates.clamp(0, self.n - 1)


def make_search(space: Space | TensorSpec, sigma: Tensor | float | None = None) -> Search:
    """Build the search that fits a space: Gaussian in a bounded box, categorical among choices.

    >>> type(make_search(Bounded(-1.0, 1.0, (2,)))).__name__
    'GaussianSearch'

    Args:
        space: A gymnasium ``Box`` or ``Discrete``, or a TorchRL spec of one item.
        sigma: As :class:`GaussianSearch`.

    Raises:
        TypeError: Other spaces. ValueError: A box without bounds, a sigma for choices, and as
            :class:`GaussianSearch`.
    """
    spec = to_spec(space)
    if is_discrete(spec):
        if sigma is not None:
            raise ValueError(f"sigma is {sigma}, but {spec} is discrete: it has none; leave it out")
        return CategoricalSearch(width(spec))
    if not isinstance(spec, Bounded):
        raise ValueError(
            f"{spec} has no bounds; samples need a range: give a Bounded spec, or a gymnasium Box "
            "with finite bounds"
        )
    return GaussianSearch(spec.space.low, spec.space.high, sigma)
