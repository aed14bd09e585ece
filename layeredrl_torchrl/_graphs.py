"""Functions of tensors that are replayed as CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from layeredrl_torchrl._watch import gather, refuse

__all__ = ["GraphCache"]

Tensors: TypeAlias = dict[Any, Tensor]
Call: TypeAlias = Callable[[Tensors], Tensors]

# Graphs that are kept for one function; each holds the memory that its call needs.
_KEPT = 16
# Calls before a capture: they compile what is compiled, and allocate what stays allocated.
_WARM_UP = 2


class _Graph:
    """One captured call."""

    def __init__(self, call: Call, inputs: Mapping[Any, Tensor]) -> None:
        self.inputs = {key: value.clone() for key, value in inputs.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                call(self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        # Weights that autocast has cast before would be replayed as they were then.
        torch.clear_autocast_cache()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            # Its flags are outputs of the graph, to be looked at after each replay.
            self.outputs, self.checks = gather(lambda: call(self.inputs))
        torch.clear_autocast_cache()

    def replay(self, inputs: Mapping[Any, Tensor]) -> Tensors:
        keys = list(self.inputs)
        torch._foreach_copy_([self.inputs[key] for key in keys], [inputs[key] for key in keys])
        self.graph.replay()
        for bad, error in self.checks:
            refuse(bad.clone(), error)
        return {key: value.clone() for key, value in self.outputs.items()}


class GraphCache:
    """Replays calls on CUDA tensors as graphs, one for each layout of the inputs.

    The call must be a function of its inputs, of tensors that change in place only (parameters,
    buffers, random number generators), and of ``key``. Its graphs are neither copied nor pickled.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()

    def run(self, call: Call, inputs: Tensors, key: Hashable = None) -> Tensors:
        """Call ``call(inputs)``, as a graph where the inputs are on a CUDA device.

        Args:
            call: Maps tensors to tensors without waiting for the device.
            inputs: Its tensors; no gradients go back to them.
            key: What else decides which operations ``call`` runs.
        """
        device = next(iter(inputs.values())).device
        if (
            device.type != "cuda"
            or torch.compiler.is_compiling()
            or torch.cuda.is_current_stream_capturing()
        ):
            return call(inputs)
        layout = tuple((name, x.shape, x.dtype, x.device) for name, x in inputs.items())
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (key, layout, autocast)
        if key in self._graphs:
            self._graphs.move_to_end(key)
        else:
            with torch.cuda.device(device):
                self._graphs[key] = _Graph(call, inputs)
            if len(self._graphs) > _KEPT:
                self._graphs.popitem(last=False)
        return self._graphs[key].replay(inputs)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
