"""Load saved states of modules and optimizers completely or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import TensorStorage

__all__ = [
    "Snapshot",
    "WholeLoading",
    "WholeState",
    "empty_storage",
    "follow_parameters",
    "load_whole",
    "not_saved",
    "refuse_other_shapes",
    "undone_on_error",
]


class WholeLoading(nn.Module):
    """A module whose state is loaded completely or not at all."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state like torch, but only if everything fits.

        Raises:
            ValueError: Entries that are missing, unknown or of another shape, weights that are not
                finite, other numbers that are NaN. The message lists them, and nothing is changed.
        """
        load = partial(super().load_state_dict, strict=True, assign=assign)
        return load_whole(self, load, state_dict, strict=strict)


class WholeState(TensorDictModuleBase):
    """The same for a module of tensordict."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state like :class:`WholeLoading`."""
        load = partial(super().load_state_dict, strict=True, assign=assign)
        return load_whole(self, load, state_dict, strict=strict)

    def reset_parameters_recursive(
        self, parameters: TensorDictBase | None = None
    ) -> TensorDictBase | None:
        """Call tensordict's method, or without ``parameters`` the own ``reset_parameters``."""
        own = getattr(type(self), "reset_parameters", None)
        if parameters is not None or own is None:
            return super().reset_parameters_recursive(parameters)
        own(self)
        return None


def draw_anew(module: nn.Module) -> None:
    """Draw new weights in all parts of ``module``, with their ``reset_parameters``.

    Frozen parameters, and parts with only such, keep their values: new ones would not be trained.
    """
    for child in module.children():
        parameters = list(child.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            continue
        draw_anew(child)
        reset = getattr(child, "reset_parameters", None)
        if callable(reset):
            # It may reach frozen parameters further down, unless it handles them itself.
            own = getattr(child, "keeps_frozen", False)
            frozen = [] if own else [p for p in parameters if not p.requires_grad]
            before = [p.detach().clone() for p in frozen]
            reset()
            with torch.no_grad():
                for p, old in zip(frozen, before, strict=True):
                    p.copy_(old)


def load_whole(
    module: nn.Module, load: Callable[..., Any], state_dict: Mapping[str, Any], *, strict: bool
) -> Any:
    """Load a state with ``load``, if everything in it fits ``module``.

    Old states contain options, buffers that are no longer part of the state; they are ignored.
    """
    own = module.state_dict()
    options = not_saved(module)
    state_dict = {name: value for name, value in state_dict.items() if name not in options}
    label = getattr(module, "name", type(module).__name__)
    _check_parameters(label, {name for name, _ in module.named_parameters()}, state_dict)
    _check_state(label, own, state_dict, strict=strict)
    # TorchRL's losses load a network completely or raise halfway through. So missing entries keep
    # their values by being loaded as well.
    fitting = {name: state_dict.get(name, value) for name, value in own.items()}
    result = load(fitting)
    result.missing_keys.extend(name for name in own if name not in state_dict)
    result.unexpected_keys.extend(name for name in state_dict if name not in own)
    return result


def not_saved(module: nn.Module) -> set[str]:
    """Return the names of buffers outside the state, such as options."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules(remove_duplicate=False)
        for name in part._non_persistent_buffers_set
    }


def _check_parameters(name: str, parameters: set[str], saved: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if saved weights are not finite, or anything else is NaN."""
    bad = [
        key
        for key, value in saved.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and bool((~value.isfinite() if key in parameters else value.isnan()).any())
    ]
    if bad:
        raise ValueError(
            f"the saved state of {name} has numbers that are not finite ({len(bad)} entries: "
            f"{'; '.join(bad[:5])}), and nothing was loaded; load an earlier checkpoint"
        )


def _check_state(
    name: str, own: Mapping[str, Any], saved: Mapping[str, Any], *, strict: bool
) -> None:
    """Raise ``ValueError`` unless ``saved`` fits.

    Args:
        name: Name of the owner.
        own: Its current state.
        saved: The state to load.
        strict: Whether both must have the same entries.
    """
    problems = []
    for key, value in own.items():
        if not isinstance(value, Tensor) or key not in saved:
            continue
        other = saved[key]
        if not isinstance(other, Tensor):
            problems.append(f"{key}: saved is a {type(other).__name__}, {name} has a Tensor")
        elif other.shape != value.shape:
            problems.append(
                f"{key}: saved is {tuple(other.shape)}, {name} has {tuple(value.shape)}"
            )
    if strict:
        problems += [f"{key}: not saved" for key in own.keys() - saved.keys()]
        problems += [f"{key}: not in {name}" for key in saved.keys() - own.keys()]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise ValueError(
            f"the saved state does not fit this {name} ({len(problems)} differences: {shown}), and "
            "nothing was loaded; build it with the sizes it was saved with (and a level has to be "
            "set up before loading, which a Hierarchy does)"
        )


def refuse_other_shapes(optim: torch.optim.Optimizer) -> None:
    """Let ``optim.load_state_dict`` raise ``ValueError`` for a state that does not fit.

    It does not fit if its parameters have other shapes, or its numbers are not finite.

    Torch itself compares only the number of parameters. A checkpoint of another architecture would
    leave moments that fail in the next gradient step. TorchRL's ``Checkpoint`` restores components
    in the order of their names: ``"optim"`` comes before ``"predictor"``, whose check would be too
    late. Copies of an optimizer lose this check, like all hooks.
    """
    optim.register_load_state_dict_pre_hook(_check_shapes)


def _check_shapes(optim: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    missing = {"state", "param_groups"} - set(state_dict)
    if missing:
        raise ValueError(
            f"{sorted(state_dict)[:5]} is not the state of an optimizer, which has 'state' and "
            "'param_groups'; pass the result of optim.state_dict()"
        )
    problems = []
    theirs = state_dict["param_groups"]
    if len(theirs) != len(optim.param_groups):
        problems.append(
            f"the checkpoint has {len(theirs)} groups, this one {len(optim.param_groups)}"
        )
    for ours, other in zip(optim.param_groups, theirs, strict=False):
        name, indices = ours.get("name", "group"), other["params"]
        if len(indices) != len(ours["params"]):
            problems.append(
                f"{name}: the checkpoint has {len(indices)} parameters, this one "
                f"{len(ours['params'])}"
            )
        for i, (parameter, index) in enumerate(zip(ours["params"], indices, strict=False)):
            shapes = {
                tuple(value.shape)
                for value in state_dict["state"].get(index, {}).values()
                if isinstance(value, Tensor) and value.ndim  # the step count has no shape
            }
            problems += [
                f"parameter {i} of {name}: the checkpoint has {shape}, this one "
                f"{tuple(parameter.shape)}"
                for shape in shapes - {tuple(parameter.shape)}
            ]
    problems += [
        f"parameter {index}: {name} is not finite"
        for index, moments in state_dict["state"].items()
        for name, value in moments.items()
        if isinstance(value, Tensor) and not bool(value.isfinite().all())
    ]
    if problems:
        raise ValueError(
            f"the checkpoint's optimizer does not fit ({len(problems)} differences: "
            f"{'; '.join(problems[:5])}); build the networks with the sizes they were saved with, "
            "or load an earlier checkpoint"
        )


def follow_parameters(optim: torch.optim.Optimizer) -> None:
    """Bring moments to the current dtype and device of their parameters."""
    moved = any(
        isinstance(value, Tensor) and value.ndim and (value.dtype, value.device) != kind
        for p, moments in optim.state.items()
        for value in moments.values()
        for kind in [(p.dtype, p.device)]
    )
    if moved:
        optim.load_state_dict(optim.state_dict())  # loading casts and moves


def empty_storage(storage: TensorStorage) -> None:
    """Reset a storage to its state before its first data, whatever their entries and axes."""
    storage._storage, storage.initialized = None, False
    vars(storage).pop("_total_shape_value", None)


@contextmanager
def undone_on_error(*stateful: nn.Module | torch.optim.Optimizer) -> Iterator[None]:
    """Restore modules and optimizers if the block raises anything.

    Tensors are restored in place, so that all references to them see it.
    """
    before = [Snapshot(one) for one in stateful]
    try:
        yield
    except BaseException:
        for snapshot in before:
            snapshot.restore()
        raise


class Snapshot:
    """A copy of the state of a module, or of an optimizer's moments.

    Args:
        stateful: The module or optimizer.
        parameters: Parameters whose moments to copy; all if ``None``.
    """

    def __init__(
        self,
        stateful: nn.Module | torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter] | None = None,
    ) -> None:
        self._of: Any = stateful
        self._parameters = None if parameters is None else set(parameters)
        self._state: dict[Any, Any]
        if isinstance(stateful, nn.Module):
            self._state = _copies(stateful.state_dict())
        else:
            self._state = {p: _copies(moments) for p, moments in self._moments()}

    def restore(self) -> None:
        """Restore the copy in place."""
        if isinstance(self._of, nn.Module):
            # Without the checks of foreign states: the weights may have been broken before.
            nn.Module.load_state_dict(self._of, self._state)
            return
        for p, moments in self._moments():
            if p not in self._state:
                del self._of.state[p]
                continue
            for name, value in self._state[p].items():
                moments[name].copy_(value)

    def _moments(self) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        return [
            (p, moments)
            for p, moments in self._of.state.items()
            if self._parameters is None or p in self._parameters
        ]


def _copies(values: Mapping[str, Any]) -> dict[str, Any]:
    # This takes a third of deepcopy's time; a level copies at each call of learn.
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in values.items()
    }
