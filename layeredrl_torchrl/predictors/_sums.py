"""Sums of the terms of a call's updates, without waiting for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from layeredrl_torchrl._watch import is_at_once

__all__ = ["Sums"]


class Sums:
    """Adds up the terms of updates, and remembers the first non-finite update.

    On a CPU such an update raises an error before it changes anything. An accelerator is checked
    only at the end, by :meth:`check`. The tensors keep their memory from call to call, so that
    updates can be captured as a CUDA graph.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()
        self._names: dict[Hashable, tuple[str, ...]] = {}
        self._watched: dict[Hashable, tuple[tuple[str, ...], Tensor]] = {}
        self._failed: Tensor | None = None

    def start(self) -> None:
        """Reset all sums and counts."""
        self.counts.clear()
        for tensor in self.tensors():
            tensor.zero_()

    def tensors(self) -> list[Tensor]:
        """The tensors that :meth:`add` changes."""
        failed = [] if self._failed is None else [self._failed]
        return [*self.totals.values(), *(seen for _, seen in self._watched.values()), *failed]

    def add(self, kind: Hashable, terms: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        """Add the terms of an update; updates of one kind always have the same terms.

        Args:
            kind: Which kind of update it is.
            terms: Scalars.
            norms: Norms of gradients; they must be finite too, but are not added up.

        Raises:
            ValueError: Values on a CPU that are not finite.
        """
        named = {**terms, **{f"gradient norm of {name}": norm for name, norm in norms.items()}}
        values = torch.stack([value.detach() for value in named.values()])
        if is_at_once(values):
            if not bool(values.isfinite().all()):
                raise _error(tuple(named), values)
        else:
            self._look(kind, tuple(named), values)
        for name, value in zip(terms, values.unbind(), strict=False):
            total = self.totals.get(name)
            if total is None or total.device != value.device or total.dtype != value.dtype:
                self.totals[name] = torch.zeros_like(value)
        torch._foreach_add_([self.totals[name] for name in terms], list(values[: len(terms)]))
        self._names[kind] = tuple(terms)

    def count(self, kind: Hashable) -> None:
        """Count an update of this kind, whether it called :meth:`add` or was replayed."""
        self.counts.update(self._names[kind])

    def check(self) -> None:
        """Wait for the accelerator; raise ``ValueError`` if an update on it was not finite."""
        if self._failed is None or not bool(self._failed):
            return
        for names, seen in self._watched.values():
            if not bool(seen.isfinite().all()):
                raise _error(names, seen)

    def _look(self, kind: Hashable, names: tuple[str, ...], values: Tensor) -> None:
        """Keep the values, unless earlier ones, of any kind, were not finite."""
        if self._failed is None or self._failed.device != values.device:
            self._failed = torch.zeros((), dtype=torch.bool, device=values.device)
            self._watched.clear()
        if kind not in self._watched or self._watched[kind][1].dtype != values.dtype:
            self._watched[kind] = names, torch.zeros_like(values)
        seen = self._watched[kind][1]
        seen.copy_(torch.where(self._failed, seen, values))
        self._failed.logical_or_(~seen.isfinite().all())


def _error(names: tuple[str, ...], values: Tensor) -> ValueError:
    found = dict(zip(names, values.tolist(), strict=True))
    bad = [name for name, fine in zip(names, values.isfinite().tolist(), strict=True) if not fine]
    return ValueError(
        f"the {', '.join(bad)} is not finite, of {found}; no parameter was changed. "
        "Lower the learning rate, or check the data's scale"
    )
