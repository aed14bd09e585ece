"""The starts of imagined episodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from layeredrl_torchrl._checks import (
    check_finite,
    check_instance,
    check_resolution,
    check_width,
)
from layeredrl_torchrl.objectives import TransitionSlices
from layeredrl_torchrl.predictors import Predictor

__all__ = ["FromBuffer", "check_start", "draw_starts"]


class FromBuffer:
    """Draws starts of imagined episodes from stored observations (arXiv 1906.08253, algorithm 2).

    Called with ``n``, it draws ``n`` transitions, uniformly and with replacement, and encodes the
    observations at their start. It also draws transitions that are written to the buffer later, and
    leaves the buffer's sampler and priorities unchanged.

    >>> factory = PredictorFactory(hidden_sizes=(8,), n_models=2)
    >>> predictor = factory(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))
    >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100))
    >>> no = torch.zeros(9, 1, dtype=torch.bool)
    >>> after = {"observation": torch.ones(9, 3), "done": no, "terminated": no}
    >>> _ = buffer.extend(TensorDict({"observation": torch.zeros(9, 3), "next": after}, [9]))
    >>> FromBuffer(buffer, predictor)(4)["state"].shape
    torch.Size([4, 3])

    Args:
        buffer: Real transitions, as :class:`~layeredrl_torchrl.TransitionSlices` reads them.
        predictor: Its encoder turns observations into state and context.
        observation_key: Key of the observation in the buffer; by default the entries that the
            encoder reads.
        **keys: Further keys of :class:`~layeredrl_torchrl.TransitionSlices`.

    Raises:
        TypeError, ValueError: As :class:`~layeredrl_torchrl.TransitionSlices`, and as the encoder.
        KeyError: When called: a buffer without the observation.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        predictor: Predictor,
        *,
        observation_key: NestedKey | None = None,
        **keys: NestedKey | None,
    ) -> None:
        check_instance("predictor", predictor, Predictor, hint="FromBuffer(buffer, predictor)")
        self.predictor = predictor
        self.observation_key = observation_key
        key = predictor.encoder.in_keys[0] if observation_key is None else observation_key
        self._slices = TransitionSlices(buffer, observation_key=key, **keys)

    @torch.no_grad()
    def __call__(self, n: int) -> TensorDict:
        """Draw ``n`` starts: a TensorDict ``[n]`` with state ``[n, D]`` and context ``[n, C]``."""
        rows, key = self._slices.sample(n, 1)[:, 0], self.observation_key
        obs = self.predictor.encoder.join(rows) if key is None else rows.get(key)
        parameter = next(self.predictor.parameters(), None)
        if parameter is not None:
            obs = obs.to(parameter.device)
        values = self.predictor.encode(obs)
        return TensorDict(
            dict(zip(self.predictor.encoder.out_keys, values, strict=True)), batch_size=[n]
        )


def draw_starts(
    initial_states: Callable[[int], TensorDictBase],
    n: int,
    widths: dict[Any, int],
    dtype: torch.dtype,
) -> dict[Any, Tensor]:
    """Draw ``n`` starts and check them.

    Args:
        initial_states: As in ``PredictorEnv``.
        n: How many; nothing is drawn for 0.
        widths: Expected number of dimensions of each key; a key of 0 dimensions may be missing.
        dtype: Dtype of the result.

    Returns:
        ``[n, width]`` for each key that was given.

    Raises:
        ValueError: Another batch size, a missing key, another width, values that are not finite.
    """
    if n == 0:
        return {}
    starts = initial_states(n)
    if not isinstance(starts, TensorDictBase) or starts.batch_size != (n,):
        what = (
            f"a TensorDict of batch size {list(starts.batch_size)}"
            if isinstance(starts, TensorDictBase)
            else type(starts).__name__
        )
        raise ValueError(
            f"initial_states({n}) returned {what}, expected a TensorDict of batch size [{n}]"
        )
    found: dict[Any, Tensor] = {}
    for key, width in widths.items():
        value = starts.get(key, None)
        if value is None and width:
            raise ValueError(
                f"initial_states({n}) returned no {key!r}, only "
                f"{sorted(map(str, starts.keys(True, True)))}; give state and context"
            )
        if value is None:
            continue
        found[key] = check_start(key, value, width, dtype)
    return found


def check_start(key: NestedKey, value: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Check the initial ``value [*B, width]`` of ``key``, and return it as ``dtype``."""
    name = f"initial {key!r}"
    check_width(name, value, width, hint="give what the predictor's encoder returns")
    check_finite(name, value, hint="repair it first")
    check_resolution(name, value, dtype)
    return value.to(dtype)
