"""One step of an ensemble as a pure function of tensors.

Everything is laid out in columns, ``[M, *, R]`` for ``R`` rows: a state has few dimensions and rows
are many, so operations along the rows fill vector registers and the warps of a GPU, and what the
networks' last layer says for each dimension is one block of memory. The function is the same
whether it runs eagerly, compiled or in a CUDA graph; its random numbers are drawn outside.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from layeredrl_torchrl.models._scaling import InputUnits
from layeredrl_torchrl.nets import hidden_layers, product

__all__ = [
    "MixtureColumns",
    "Networks",
    "Noise",
    "StackedLayers",
    "StepParts",
    "draw_noise",
    "ensemble_mixture",
    "ensemble_step",
    "sample_mixture",
]


class Noise(NamedTuple):
    """The random numbers of a step."""

    normal: Tensor  # [M, D, R]
    height: Tensor | None  # [M, 1, R], uniform, where there are modes to choose from


def draw_noise(shape: torch.Size, n_modes: int, like: Tensor) -> Noise:
    """Draw the noise of a step of ``[M, D, R]`` particles, on the device of ``like``."""
    normal = torch.randn(shape, dtype=like.dtype, device=like.device)
    if n_modes == 1:
        return Noise(normal, None)
    n_models, _, rows = shape
    return Noise(normal, torch.rand(n_models, 1, rows, dtype=like.dtype, device=like.device))


class MixtureColumns(NamedTuple):
    """Predictions of members, in any units: mixtures and terminations of ``R`` rows."""

    pairs: Tensor  # [M, 2, K, D, R]: mean, and what becomes the std
    weights: Tensor  # [M, K, R]
    term_prob: Tensor  # [M, R]
    are_logits: bool  # whether the weights are the logarithms of shares


class StackedLayers(NamedTuple):
    """The layers of stacked members, in columns."""

    weights: list[Tensor]  # [M, out, in] each, in the precision of the products
    biases: list[Tensor]  # [M, out, 1] each
    activation: nn.Module
    n_modes: int
    dim: int  # D
    ignore_context: bool
    bounds: tuple[float, float]  # center and half width of the log std


class Networks(NamedTuple):
    """Member networks of any kind, which are fed and answer in rows."""

    members: nn.Module
    widths: tuple[int, int, int]  # of state, continuous action and context


class StepParts(NamedTuple):
    """All of an ensemble that a step depends on."""

    layers: StackedLayers | Networks
    inputs: InputUnits | None
    n_measured: int  # the first inputs, whose distance from the data adds to the std
    log_std: tuple[Tensor, Tensor]  # shift [M, D, 1] and slope [D, 1], for the std of the state
    target: tuple[Tensor, Tensor]  # loc and scale [D, 1]
    predict_delta: bool


def ensemble_step(
    parts: StepParts,
    state: Tensor,
    context: Tensor,
    action: Tensor,
    noise: Noise | None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Step row block ``m`` with member ``m``.

    Args:
        parts: The ensemble.
        state: ``[M, D, R]``.
        context: ``[1, C, R]`` or ``[M, C, R]``.
        action: As the networks read it, ``[1, A, R]`` or ``[M, A, R]``; choices ``[1, R]`` or
            ``[M, R]`` for networks that are not stacked.
        noise: ``None`` steps to the mean of the mixture.
        out: Where to write next state and term_prob; only without gradients.

    Returns:
        Next state ``[M, D, R]`` and term_prob ``[M, R]``.
    """
    said, extra = _say(parts, state, context, action)
    loc, scale = parts.target
    base = state + loc if parts.predict_delta else loc
    following, term = (None, None) if out is None else out
    if noise is None:
        mean = _expected(said)
        next_state = torch.add(base, mean * scale, out=following)
    else:
        pairs, total = _pick(said, noise.height)
        mean, raw = pairs.unbind(1)
        if total is not None:
            # Weights of NaN choose a mode like any others, but shall be seen.
            extra = total - total if extra is None else extra + (total - total)
        std = _std(parts, raw, extra)
        mean = torch.addcmul(base, mean, scale)
        next_state = torch.addcmul(mean, std, noise.normal, out=following)
    if term is None:
        return next_state, said.term_prob
    return next_state, term.copy_(said.term_prob)


def ensemble_mixture(
    parts: StepParts, state: Tensor, context: Tensor, action: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """The mixtures that :func:`ensemble_step` samples from.

    Returns:
        ``(mean [M, K, D, R], std [M, K, D, R]), weights [M, K, R], term_prob [M, R]``.
    """
    said, extra = _say(parts, state, context, action)
    loc, scale = parts.target
    base = state + loc if parts.predict_delta else loc.expand_as(state)
    mean, raw = said.pairs.unbind(1)
    # With the modes among the dimensions, which the calibration takes alike.
    std = _std(parts, raw.transpose(0, 1), extra).transpose(0, 1)
    mean = torch.addcmul(base.unsqueeze(1), mean, scale)
    return (mean, std), _shares(said), said.term_prob


def sample_mixture(mean: Tensor, std: Tensor, weights: Tensor, noise: Noise | None) -> Tensor:
    """Sample (or average, without noise) mixtures of any model, ``[M, D, R]``.

    Args:
        mean: ``[M, K, D, R]``.
        std: ``[M, K, D, R]``.
        weights: ``[M, K, R]``.
        noise: ``None`` gives the mean.
    """
    said = MixtureColumns(torch.stack((mean, std), 1), weights, weights[:, 0], False)
    if noise is None:
        return _expected(said)
    pairs, total = _pick(said, noise.height)
    mean, std = pairs.unbind(1)
    following = torch.addcmul(mean, std, noise.normal)
    return following if total is None else following + (total - total)


def _say(
    parts: StepParts, state: Tensor, context: Tensor, action: Tensor
) -> tuple[MixtureColumns, Tensor | None]:
    """Evaluate the networks, and what the distance from the data adds to the std, ``[M, 1, R]``."""
    layers = parts.layers
    n_models = len(state)
    if isinstance(layers, StackedLayers):
        blocks = [action] if layers.ignore_context else [context, action]
    else:
        blocks = [action, context] if layers.widths[1] else [context]
    blocks = [block.expand(n_models, -1, -1) for block in blocks if block.shape[-2]]
    x = torch.cat([state, *blocks], 1)
    excess = None
    if parts.inputs is not None:
        x, excess = parts.inputs(x)
    if isinstance(layers, StackedLayers):
        said = _say_stacked(layers, x)
    else:
        said = _say_members(layers, x, action)
    if excess is None:
        return said, None
    # The distance in standard deviations of the inputs, and at most 1: far from the data the
    # prediction is no sharper than the spread of all that was seen.
    square = excess[:, : parts.n_measured].square().sum(1, keepdim=True)
    return said, _distance(square)


def _distance(square: Tensor) -> Tensor:
    """The root, at most 1; its gradient at 0 is 0."""
    if square.requires_grad:
        # The root of 0 has no gradient.
        outside = square > 0
        root = torch.where(outside, square, 1.0).sqrt()
        return torch.where(outside, root, 0.0).clamp(max=1.0)
    return square.sqrt().clamp(max=1.0)


def _say_stacked(layers: StackedLayers, x: Tensor) -> MixtureColumns:
    *hidden, last = layers.weights
    *biases, last_bias = layers.biases
    n_modes = layers.n_modes
    x = hidden_layers(x.to(last.dtype), hidden, biases, layers.activation, columns=True)
    out = product(last, x, last_bias)
    size = 2 * n_modes * layers.dim
    pairs, logits, term, _ = out.split([size, n_modes, 1, out.shape[1] - size - n_modes - 1], 1)
    pairs = pairs.unflatten(1, (2, n_modes, layers.dim))
    return MixtureColumns(pairs, logits, term.squeeze(1).sigmoid(), True)


def _say_members(layers: Networks, x: Tensor, action: Tensor) -> MixtureColumns:
    state, act, context = x.split(list(layers.widths), 1)
    if not layers.widths[1]:
        act = action.expand(len(x), *action.shape[1:])
    rows = act.mT if act.ndim == x.ndim else act
    (mean, std), weights, term_prob = layers.members(state.mT, context.mT, rows)
    pairs = torch.stack((mean, std.log()), 1).permute(0, 1, 3, 4, 2)
    return MixtureColumns(pairs, weights.mT, term_prob, False)


def _std(parts: StepParts, raw: Tensor, extra: Tensor | None) -> Tensor:
    """The std of the next state, from what the networks say ``[..., M, D, R]``."""
    shift, slope = parts.log_std
    if isinstance(parts.layers, StackedLayers):
        center, half = parts.layers.bounds
        raw = (raw - center).div_(half).tanh_()
    std = torch.addcmul(shift, slope, raw).exp_()
    return std if extra is None else torch.addcmul(std, extra, parts.target[1])


def _expected(said: MixtureColumns) -> Tensor:
    """The mean of the mixture, ``[M, D, R]``."""
    mean = said.pairs[:, 0]
    if mean.shape[1] == 1:
        return mean.squeeze(1)
    return (mean * _shares(said).unsqueeze(2)).sum(1)


def _shares(said: MixtureColumns) -> Tensor:
    """The weights of the modes, ``[M, K, R]``."""
    return said.weights.softmax(1) if said.are_logits else said.weights


def _pick(said: MixtureColumns, height: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The pairs ``[M, 2, D, R]`` of the modes that ``height`` falls upon.

    With several modes, also the sum of their weights ``[M, 1, R]``.
    """
    pairs = said.pairs
    if height is None:
        return pairs.squeeze(2), None
    # Inversion of the cumulative sum, which takes half the time of a softmax over so few. The last
    # edge is not compared: rounding may put the height upon it.
    shares = said.weights
    if said.are_logits:
        shares = (shares - shares.amax(1, keepdim=True)).exp_()
    edges = shares.cumsum(1)
    total = edges[:, -1:]
    mode = (edges[:, :-1] <= height * total).sum(1)
    index = mode[:, None, None, None].expand(-1, 2, 1, pairs.shape[3], -1)
    return pairs.gather(2, index).squeeze(2), total
