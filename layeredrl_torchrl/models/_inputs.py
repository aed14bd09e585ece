"""Check the inputs of a model and flatten them to rows."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from layeredrl_torchrl._checks import check_finite, check_resolution, check_width
from layeredrl_torchrl.specs import ActionForm

__all__ = ["InputRows", "Rows"]

# *B, and state [N, D], context [N, C], action [N, *].
Rows: TypeAlias = tuple[torch.Size, tuple[Tensor, Tensor, Tensor]]


class InputRows:
    """Checks states, contexts and actions ``[*B, ...]`` and flattens them to rows ``[N, ...]``.

    Args:
        state_dim: ``D``.
        context_dim: ``C``.
        action_form: Checks actions and brings them into the form of their spec.
    """

    def __init__(self, state_dim: int, context_dim: int, action_form: ActionForm) -> None:
        self.state_dim, self.context_dim, self.action_form = state_dim, context_dim, action_form

    def of_step(
        self, state: Tensor, context: Tensor | None, action: Tensor, dtype: torch.dtype
    ) -> Rows:
        """Return the inputs of one step.

        Args:
            state: ``[*B, D]``.
            context: ``[*B, C]``; ``None`` where ``C`` is 0.
            action: ``[*B, *]``.
            dtype: Of the states, contexts and continuous actions that are returned.

        Raises:
            TypeError, ValueError: Other shapes or dtypes, an empty batch, values that are not
                finite, actions outside their space.
        """
        batch, state, context = self._start(state, context, dtype)
        return batch, (state, context, _flatten(self.action_form(action, batch), batch, dtype))

    def of_rollout(
        self, state: Tensor, context: Tensor | None, actions: Tensor, dtype: torch.dtype
    ) -> Rows:
        """Return the inputs of a rollout, with action sequences ``[*B, H, *]`` as ``[N, H, *]``.

        Arguments and errors are otherwise those of :meth:`of_step`.
        """
        batch, state, context = self._start(state, context, dtype)
        if not isinstance(actions, Tensor) or actions.ndim <= len(batch):
            raise ValueError(
                f"actions must be a tensor [*B, H, A] with *B = {tuple(batch)}, got "
                f"{tuple(actions.shape) if isinstance(actions, Tensor) else type(actions)}"
            )
        horizon = actions.shape[len(batch)]
        if horizon == 0:
            raise ValueError("actions have horizon 0; give at least one step")
        steps = torch.Size((*batch, horizon))
        actions = _flatten(self.action_form(actions, steps), steps, dtype)
        return batch, (state, context, actions.unflatten(0, (-1, horizon)))

    def _start(
        self, state: Tensor, context: Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Size, Tensor, Tensor]:
        hint = f"the state space has {self.state_dim} dimensions"
        check_width("state", state, self.state_dim, hint=hint)
        check_finite("state", state, hint="repair the observation or the model it came from")
        batch = state.shape[:-1]
        if batch.numel() == 0:
            raise ValueError(f"state has shape {tuple(state.shape)}: the batch is empty")
        if context is None:
            context = state.new_empty((*batch, 0))
        hint = f"the context space has {self.context_dim} dimensions"
        check_width("context", context, self.context_dim, hint=hint)
        if context.shape[:-1] != batch:
            raise ValueError(
                f"context has batch shape {tuple(context.shape[:-1])}, the state "
                f"{tuple(batch)}; they must be equal"
            )
        check_finite("context", context, hint="repair it first")
        for name, value in (("state", state), ("context", context)):
            check_resolution(name, value, dtype)
        n = batch.numel()
        return (
            batch,
            state.to(dtype).reshape(n, self.state_dim),
            context.to(dtype).reshape(n, self.context_dim),
        )


def _flatten(action: Tensor, batch: torch.Size, dtype: torch.dtype) -> Tensor:
    action = action.reshape(batch.numel(), *action.shape[len(batch) :])
    return action.to(dtype) if action.is_floating_point() else action
