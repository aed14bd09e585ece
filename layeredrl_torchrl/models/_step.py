"""One step of an ensemble as a pure function of tensors.

Everything is laid out in columns, ``[M, *, R]`` for ``R`` rows: there are few dimensions and many
rows, so operations along the rows fill vector registers and the warps of a GPU, and the outputs of
the networks' last layer are one block of memory for each dimension. The same function runs eagerly,
compiled or in a CUDA graph; its random numbers are drawn outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from layeredrl_torchrl.models._blocks import fits_caches
from layeredrl_torchrl.models._scaling import InputUnits
from layeredrl_torchrl.nets import hidden_layers, product

__all__ = [
    "MixtureColumns",
    "Networks",
    "Noise",
    "StackedLayers",
    "StepInputs",
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


class StepInputs(NamedTuple):
    """Inputs of a step: ``R`` rows for each of ``M`` members."""

    state: Tensor  # [M, D, R]
    context: Tensor  # [1, C, R] or [M, C, R]
    action: Tensor  # as the networks read it: [1, A, R] or [M, A, R], or choices without A
    noise: Noise | None  # None steps to the mean of the mixture


class MixtureColumns(NamedTuple):
    """Predictions of members, in any units: mixtures and terminations of ``R`` rows."""

    pairs: Tensor  # [M, 2, K, D, R]: mean, and the raw number behind the std
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
    """Member networks of any kind; their inputs and outputs are rows."""

    members: nn.Module
    widths: tuple[int, int, int]  # of state, continuous action and context


class StepParts(NamedTuple):
    """Everything in an ensemble that a step depends on."""

    layers: StackedLayers | Networks
    inputs: InputUnits | None
    n_measured: int  # the distance of this many first inputs from the data adds to the std
    log_std: tuple[Tensor, Tensor]  # shift [M, D, 1] and slope [D, 1], for the std of the state
    target: tuple[Tensor, Tensor]  # loc and scale [D, 1]
    predict_delta: bool


def ensemble_step(
    parts: StepParts, inputs: StepInputs, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Step row block ``m`` with member ``m``.

    Args:
        parts: The ensemble.
        inputs: State, context, action and noise.
        out: Where to write next state and term_prob; only without gradients.

    Returns:
        Next state ``[M, D, R]`` and term_prob ``[M, R]``.
    """
    predicted, extra = _evaluate(parts, inputs)
    loc, scale = parts.target
    base = inputs.state + loc if parts.predict_delta else loc
    following, term = (None, None) if out is None else out
    noise = inputs.noise
    if noise is None:
        mean = _expected(predicted)
        next_state = torch.add(base, mean * scale, out=following)
    else:
        pairs, total = _chosen_modes(predicted, noise.height)
        mean, raw = pairs.unbind(1)
        if total is not None:
            # NaN weights choose some mode, too; adding total - total makes the state NaN as well.
            extra = total - total if extra is None else extra + (total - total)
        std = _std(parts, raw, extra)
        mean = torch.addcmul(base, mean, scale)
        next_state = torch.addcmul(mean, std, noise.normal, out=following)
    if term is None:
        return next_state, predicted.term_prob
    return next_state, term.copy_(predicted.term_prob)


def ensemble_mixture(
    parts: StepParts, inputs: StepInputs
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Return the mixtures that :func:`ensemble_step` samples from; the noise is ignored.

    Returns:
        ``(mean [M, K, D, R], std [M, K, D, R]), weights [M, K, R], term_prob [M, R]``.
    """
    predicted, extra = _evaluate(parts, inputs)
    state, (loc, scale) = inputs.state, parts.target
    base = state + loc if parts.predict_delta else loc.expand_as(state)
    mean, raw = predicted.pairs.unbind(1)
    # Modes come first: the calibration is the same for all of them.
    std = _std(parts, raw.transpose(0, 1), extra).transpose(0, 1)
    mean = torch.addcmul(base.unsqueeze(1), mean, scale)
    return (mean, std), _mode_weights(predicted), predicted.term_prob


def sample_mixture(mean: Tensor, std: Tensor, weights: Tensor, noise: Noise | None) -> Tensor:
    """Sample (or average, without noise) mixtures of any model, ``[M, D, R]``.

    Args:
        mean: ``[M, K, D, R]``.
        std: ``[M, K, D, R]``.
        weights: ``[M, K, R]``.
        noise: ``None`` gives the mean.
    """
    mixture = MixtureColumns(torch.stack((mean, std), 1), weights, weights[:, 0], False)
    if noise is None:
        return _expected(mixture)
    pairs, total = _chosen_modes(mixture, noise.height)
    mean, std = pairs.unbind(1)
    following = torch.addcmul(mean, std, noise.normal)
    return following if total is None else following + (total - total)


def _evaluate(parts: StepParts, inputs: StepInputs) -> tuple[MixtureColumns, Tensor | None]:
    """Evaluate the networks.

    Returns:
        Their predictions, and how much the distance from the data adds to the std, ``[M, 1, R]``.
    """
    state, context, action, _ = inputs
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
        predicted = _evaluate_stacked(layers, x)
    else:
        predicted = _evaluate_members(layers, x, action)
    if excess is None:
        return predicted, None
    # The distance in standard deviations of the inputs, at most 1: far from the data, the std grows
    # by the spread of the whole data.
    square = excess[:, : parts.n_measured].square().sum(1, keepdim=True)
    return predicted, _distance(square)


def _distance(square: Tensor) -> Tensor:
    """Return the square root, at most 1, with gradient 0 at 0."""
    if square.requires_grad:
        # The root of 0 has no gradient.
        outside = square > 0
        root = torch.where(outside, square, 1.0).sqrt()
        return torch.where(outside, root, 0.0).clamp(max=1.0)
    return square.sqrt().clamp(max=1.0)


def _evaluate_stacked(layers: StackedLayers, x: Tensor) -> MixtureColumns:
    n_modes = layers.n_modes
    x = x.to(layers.weights[-1].dtype)
    widest = max(weight.shape[1] for weight in layers.weights)
    if fits_caches(len(x) * widest * x.shape[-1], x.device):
        out = _outputs(layers, layers.weights, layers.biases, x)
    else:
        of_members = zip(*(w.split(1) for w in (*layers.weights, *layers.biases, x)), strict=True)
        n = len(layers.weights)
        out = torch.cat([_outputs(layers, m[:n], m[n:-1], m[-1]) for m in of_members])
    size = 2 * n_modes * layers.dim
    pairs, logits, term, _ = out.split([size, n_modes, 1, out.shape[1] - size - n_modes - 1], 1)
    pairs = pairs.unflatten(1, (2, n_modes, layers.dim))
    return MixtureColumns(pairs, logits, term.squeeze(1).sigmoid(), True)


def _evaluate_members(layers: Networks, x: Tensor, action: Tensor) -> MixtureColumns:
    state, act, context = x.split(list(layers.widths), 1)
    if not layers.widths[1]:
        act = action.expand(len(x), *action.shape[1:])
    rows = act.mT if act.ndim == x.ndim else act
    (mean, std), weights, term_prob = layers.members(state.mT, context.mT, rows)
    pairs = torch.stack((mean, std.log()), 1).permute(0, 1, 3, 4, 2)
    return MixtureColumns(pairs, weights.mT, term_prob, False)


def _outputs(
    layers: StackedLayers, weights: Sequence[Tensor], biases: Sequence[Tensor], x: Tensor
) -> Tensor:
    x = hidden_layers(x, weights[:-1], biases[:-1], layers.activation, columns=True)
    return product(weights[-1], x, biases[-1])


def _std(parts: StepParts, raw: Tensor, extra: Tensor | None) -> Tensor:
    """Return the std of the next state from the networks' raw outputs ``[..., M, D, R]``."""
    shift, slope = parts.log_std
    if isinstance(parts.layers, StackedLayers):
        center, half = parts.layers.bounds
        raw = (raw - center).div_(half).tanh_()
    std = torch.addcmul(shift, slope, raw).exp_()
    return std if extra is None else torch.addcmul(std, extra, parts.target[1])


def _expected(mixture: MixtureColumns) -> Tensor:
    """Return the mean of a mixture, ``[M, D, R]``."""
    mean = mixture.pairs[:, 0]
    if mean.shape[1] == 1:
        return mean.squeeze(1)
    return (mean * _mode_weights(mixture).unsqueeze(2)).sum(1)


def _mode_weights(mixture: MixtureColumns) -> Tensor:
    """Return the weights of the modes, ``[M, K, R]``."""
    return mixture.weights.softmax(1) if mixture.are_logits else mixture.weights


def _chosen_modes(mixture: MixtureColumns, height: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the pairs ``[M, 2, D, R]`` of the modes chosen by ``height``.

    With several modes, also return the sum of their weights ``[M, 1, R]``.
    """
    pairs = mixture.pairs
    if height is None:
        return pairs.squeeze(2), None
    # Inverting the cumulative sum takes half the time of a softmax over so few modes. The last edge
    # is not compared, since rounding may put the height on it.
    shares = mixture.weights
    if mixture.are_logits:
        shares = (shares - shares.amax(1, keepdim=True)).exp_()
    edges = shares.cumsum(1)
    total = edges[:, -1:]
    mode = (edges[:, :-1] <= height * total).sum(1)
    index = mode[:, None, None, None].expand(-1, 2, 1, pairs.shape[3], -1)
    return pairs.gather(2, index).squeeze(2), total
