"""How much of a rollout to compute at once, so that it fits in a CPU's caches."""

from __future__ import annotations

import torch

__all__ = ["fits_caches", "starts_at_once"]

# Floats of one layer's output that fit, with weights and inputs, in the second-level caches.
_CACHED = 2**18


def fits_caches(n_floats: int, device: torch.device) -> bool:
    """Return whether ``n_floats`` of a layer's output are best computed at once.

    This is always so on other devices, when compiled, and with gradients, which keep everything
    anyway.
    """
    return (
        device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()  # before the size, which it would compile for
        or n_floats <= _CACHED
    )


def starts_at_once(n: int, n_particles: int, floats_per_row: int, device: torch.device) -> int:
    """Return how many of ``n`` starts with ``n_particles`` in each member to roll out together.

    Args:
        n: Starts.
        n_particles: ``P``.
        floats_per_row: In the widest layer, 0 if unknown.
        device: Only a CPU gets fewer than all.
    """
    if fits_caches(n * n_particles * floats_per_row, device):
        return n
    rows = max(_CACHED // floats_per_row, 1)
    if rows > 64:  # matrix products of whole tiles are faster
        rows -= rows % 64
    return max(rows // n_particles, 1)
