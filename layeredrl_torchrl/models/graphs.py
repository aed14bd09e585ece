"""Functions of tensors as CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor

from layeredrl_torchrl._watch import Error, gather, refuse

__all__ = ["Graphs"]

Function: TypeAlias = Callable[..., tuple[Tensor, ...]]


class Graphs:
    """Captures functions as CUDA graphs, one for each shape of their inputs, and replays them.

    Where there is nothing to capture (on a CPU, where gradients are kept, while something around is
    captured or traced) functions run as they are. Tensors that a function reads beside its inputs
    may be changed in place.

    Args:
        max_graphs: How many are kept; the one that was not used for longest goes first.
    """

    def __init__(self, max_graphs: int = 32) -> None:
        self.max_graphs = max_graphs
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._pool: Any = None

    def __reduce__(self) -> tuple[type[Graphs], tuple[int]]:
        return Graphs, (self.max_graphs,)  # copies capture for themselves

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def captures(self) -> bool:
        """Whether this process has a GPU to capture graphs on."""
        return torch.cuda.is_available()

    def run(
        self,
        name: Hashable,
        function: Function,
        inputs: tuple[Tensor, ...],
        reads: Iterable[Tensor],
    ) -> tuple[Tensor, ...]:
        """Return ``function(*inputs)``.

        Args:
            name: Tells functions apart, with all that they depend on beside tensors.
            function: Of the inputs only, without waits; its results are copied.
            inputs: Tensors of one device.
            reads: What it reads beside them: graphs are captured anew if these lie elsewhere.
        """
        if not self._can_capture(inputs):
            return function(*inputs)
        key = (
            name,
            tuple((x.shape, x.dtype, x.device) for x in inputs),
            tuple(x.data_ptr() for x in reads),
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
            torch.get_float32_matmul_precision(),
        )
        graph = self._graphs.get(key)
        if graph is None:
            while len(self._graphs) >= self.max_graphs:
                self._graphs.popitem(last=False)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = self._graphs[key] = _Graph(function, inputs, self._pool)
        self._graphs.move_to_end(key)
        return graph(inputs)

    def _can_capture(self, inputs: tuple[Tensor, ...]) -> bool:
        return (
            all(x.is_cuda for x in inputs)
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and torch._C._len_torch_dispatch_stack() == 0
            and not any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in inputs)
            and not torch.cuda.is_current_stream_capturing()
        )


class _Graph:
    """A function captured for one shape of its inputs."""

    def __init__(self, function: Function, inputs: tuple[Tensor, ...], pool: Any) -> None:
        self.inputs = [x.clone() for x in inputs]
        # First runs compile, choose algorithms and ask for memory, which captured ones must not.
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside), _uncached_autocast():
            for _ in range(2):
                gather(lambda: function(*self.inputs))
        here.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        self.checks: list[tuple[Tensor, Error]]
        try:
            with torch.cuda.graph(self.graph, pool=pool), _uncached_autocast():
                self.outputs, self.checks = gather(lambda: function(*self.inputs))
        except RuntimeError as error:
            raise RuntimeError(
                "this could not be captured as a CUDA graph; a reward, value or bonus function "
                "that is captured along must not wait for the GPU (item(), tests of tensors, "
                "copies from the host): change it, or compile without cudagraphs=True"
            ) from error

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        for bad, error in self.checks:
            refuse(bad, error)
        return tuple(x.clone() for x in self.outputs)


def _uncached_autocast() -> AbstractContextManager[Any]:
    """Autocast as it is, but without the cache of cast weights, which learning changes."""
    if not torch.is_autocast_enabled("cuda"):
        return nullcontext()
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)
