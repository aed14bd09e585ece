"""Functions of tensors as CUDA graphs: captured once, then replayed with a single launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from layeredrl_torchrl._precision import uncached_autocast
from layeredrl_torchrl._watch import Error, gather, refuse

__all__ = ["Graphs", "Same"]

R = TypeVar("R")

# Calls before a capture: they compile, choose algorithms and make lasting allocations, which a
# capture may not do.
_WARM_UP = 2


class Graphs:
    """Captures functions as CUDA graphs, one for each layout of their inputs, and replays them.

    If nothing can be captured (on a CPU, with gradients, inside another capture or trace) functions
    run normally. Other tensors that a function reads may be changed in place. Copies and other
    processes capture separately.

    Args:
        max_graphs: Number of graphs to keep; the least recently used is dropped first.
    """

    def __init__(self, max_graphs: int = 32) -> None:
        self.max_graphs = max_graphs
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._pool: Any = None

    def __reduce__(self) -> tuple[type[Graphs], tuple[int]]:
        return Graphs, (self.max_graphs,)

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def captures(self) -> bool:
        """Whether this process has a GPU for capturing graphs."""
        return torch.cuda.is_available()

    def run(
        self,
        name: Hashable,
        function: Callable[..., R],
        inputs: tuple[Any, ...],
        reads: Iterable[Tensor],
        *,
        changes: bool = False,
    ) -> R:
        """Return ``function(*inputs)``.

        Args:
            name: Identifies the function and everything it depends on, except tensors.
            function: Must not wait for the device; returns tensors (in tuples and dictionaries),
                which are copied.
            inputs: Tensors of one device, also in tuples, dictionaries and TensorDicts.
            reads: Other tensors that it reads; if their memory changes, a new graph is captured.
            changes: Whether it changes tensors that it reads. If so, its first calls run
                uncaptured; otherwise it is called a few extra times to warm up.
        """
        leaves = _leaves(inputs)
        if not _can_capture(leaves):
            return function(*inputs)
        key = (
            name,
            tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves),
            tuple(x.data_ptr() for x in reads),
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
            torch.get_float32_matmul_precision(),
            torch.is_inference_mode_enabled(),
        )
        graph = self._graphs.get(key)
        if graph is None:
            while len(self._graphs) >= self.max_graphs:
                self._graphs.popitem(last=False)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = self._graphs[key] = _Graph(function, self._pool, changes=changes)
        self._graphs.move_to_end(key)
        device = next(x.device for x in leaves if isinstance(x, Tensor))
        with torch.cuda.device(device):
            result: R = graph(inputs, leaves)
        return result


class Same:
    """Represents an object in the name of a function, and keeps it alive.

    An address alone is not enough: a later object may get the same one.
    """

    __slots__ = ("of",)

    def __init__(self, of: object) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.of is self.of

    def __hash__(self) -> int:
        return id(self.of)


class _Graph:
    """A function, captured for one layout of its inputs."""

    def __init__(self, function: Callable[..., Any], pool: Any, *, changes: bool) -> None:
        self.function, self.pool, self.changes = function, pool, changes
        self.n_calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.own: tuple[Any, ...] | None = None
        self.inputs: list[Tensor] = []
        self.outputs: Any = None
        self.checks: list[tuple[Tensor, Error]] = []

    def __call__(self, inputs: tuple[Any, ...], leaves: list[Any]) -> Any:
        if self.own is None:
            # The warm-up uses these copies too: functions are compiled for their strides.
            self.own = tree_map(_own, inputs, is_leaf=is_tensor_collection)
            self.inputs = [x for x in _leaves(self.own) if isinstance(x, Tensor)]
        torch._foreach_copy_(self.inputs, [x for x in leaves if isinstance(x, Tensor)])
        if self.graph is None:
            if self.changes and self.n_calls < _WARM_UP:
                self.n_calls += 1
                return _copied(_on_separate_stream(self._call))
            self._capture()
        assert self.graph is not None
        self.graph.replay()
        for bad, error in self.checks:
            refuse(bad.clone(), error)
        return _copied(self.outputs)

    def _call(self) -> Any:
        assert self.own is not None
        return self.function(*self.own)

    def _capture(self) -> None:
        if not self.changes:
            for _ in range(_WARM_UP):
                _on_separate_stream(lambda: gather(self._call))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool), uncached_autocast("cuda"):
                # Flags are outputs too, checked after each replay.
                self.outputs, self.checks = gather(self._call)
        except RuntimeError as error:
            _end_capture()
            raise RuntimeError(
                f"this could not be captured as a CUDA graph ({error}); functions of yours that "
                "are captured along (reward, value, bonus, loss, network) must not wait for the "
                "GPU (item(), tests of tensors, copies from the host): change them, or compile "
                "without cudagraphs=True"
            ) from error
        self.graph = graph


def _copied(outputs: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, outputs)


def _can_capture(leaves: list[Any]) -> bool:
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    return (
        bool(tensors)
        and all(x.is_cuda for x in tensors)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)
        and not torch.cuda.is_current_stream_capturing()
    )


def _end_capture() -> None:
    """Let the generator draw again after a failed capture."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


def _on_separate_stream(call: Callable[[], R]) -> R:
    """Run ``call`` on a separate stream, as a capture will."""
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside), uncached_autocast("cuda"):
        result = call()
    here.wait_stream(aside)
    return result


def _leaves(inputs: Any) -> list[Any]:
    """Return everything in ``inputs`` except containers; of TensorDicts the sorted tensors."""
    leaves: list[Any] = []
    for leaf in tree_leaves(inputs, is_leaf=is_tensor_collection):
        if is_tensor_collection(leaf):
            leaves += (x for _, x in _entries(leaf))
        else:
            leaves.append(leaf)
    return leaves


def _entries(td: TensorDictBase) -> list[tuple[Any, Tensor]]:
    named = ((key, value) for key, value in td.items(True, True) if isinstance(value, Tensor))
    return sorted(named, key=lambda pair: str(pair[0]))


def _own(leaf: Any) -> Any:
    """Copy an input for replays to read; without text, which cannot change in a graph."""
    if is_tensor_collection(leaf):
        td = TensorDict({}, leaf.batch_size, device=leaf.device)
        for key, value in _entries(leaf):
            td.set(key, value.clone())
        return td
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
