"""A pretended accelerator: what would wait for a GPU, or be copied to it, is found without one.

Shapes and devices are propagated by torch's fake tensors on a backend that only has a name, so
that nothing is computed and a whole plan takes a second. What a CPU forgives and a GPU does not is
noted with the line that did it: a value that the host asks for (``item``, ``bool``, an ``if`` on
a tensor), and a tensor that is made on the host and moved (``torch.tensor(..., device=)``, a
constant's ``.to()``). An operation over two devices, or whose shape is taken from data, raises by
itself.
"""

from __future__ import annotations

import copy
import traceback
from contextlib import contextmanager
from functools import cache

import torch
from tensordict import TensorDictParams
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"

_MADE_UP = {torch.bool: True, torch.int64: 1}


class _Observer(TorchDispatchMode):
    """Notes what the host and the device ask of each other, and makes up the answers."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(operation)
        if "local_scalar_dense" in name and isinstance(args[0], FakeTensor):
            if args[0].device.type == NAME:
                self.note("waits for")
            return _MADE_UP.get(args[0].dtype, 1.0)
        if "_to_copy" in name or "copy_" in name:
            source, target = args[0], kwargs.get("device")
            if name.startswith("aten.copy_"):
                source, target = args[1], args[0].device
            if target is not None and torch.device(target).type == NAME != source.device.type:
                self.note("copies to")
        try:
            return operation(*args, **kwargs)
        except NotImplementedError as error:  # a tensor that is not pretended, on its way there
            raise AssertionError(self.note("copies to")) from error

    def note(self, what):
        frame = next(
            (f for f in reversed(traceback.extract_stack()) if "layeredrl_torchrl" in f.filename),
            None,
        )
        place = "from outside the package" if frame is None else f"{frame.filename}:{frame.lineno}"
        self.notes.append(f"{what} the device: {place} {frame.line if frame else ''}")
        return self.notes[-1]


@cache
def register():
    """Give torch the pretended device, for the rest of the process.

    Before the first gradient, which counts devices. From then on torch asks it, not CUDA, for
    streams and pinned memory.
    """
    _setup_privateuseone_for_python_backend(NAME)
    backend = getattr(torch, NAME)
    backend.synchronize = lambda *_: None  # as TorchRL's collectors ask for
    backend.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]


def is_registered():
    """Whether this process can no longer test a real GPU."""
    return register.cache_info().currsize > 0


class Accelerator:
    """The pretended device.

    A module is built on the host, moved by :meth:`move`, and run within :meth:`watched`.
    """

    def __init__(self):
        register()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.device = torch.device(NAME)

    def move(self, module):
        """A copy of a module whose parameters and buffers are there."""
        module = copy.deepcopy(module)
        for part in list(module.modules()):
            for name, child in part._modules.items():
                if isinstance(child, TensorDictParams):
                    values = child.data.apply(lambda x: nn.Parameter(self._there(x)))
                    part._modules[name] = TensorDictParams(values, no_convert=True)
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    there = nn.Parameter(self._there(value), requires_grad=value.requires_grad)
                    part._parameters[name] = there
            for name, value in part._buffers.items():
                if value is not None:
                    part._buffers[name] = self._there(value)
            if isinstance(part, TensorDictParams):  # which keeps them in a TensorDict as well
                with self.mode:
                    part._param_td = part._param_td.apply(self._parameter, device=self.device)
                part._reset_params()
        return module

    def _parameter(self, value):
        there = self._there(value)
        if not isinstance(value, nn.Parameter):
            return there
        return nn.Parameter(there, requires_grad=value.requires_grad)

    def _there(self, value):
        with self.mode:
            return self.mode.from_tensor(value.detach()).to(self.device)

    @contextmanager
    def watched(self):
        """Fails if what runs inside waits for the device or copies to it."""
        with self.noted() as notes:
            yield self
        assert not notes, "\n".join(notes)

    @contextmanager
    def noted(self):
        """Gives a list of what waits for the device or copies to it."""
        observer = _Observer()
        with self.mode, observer:
            yield observer.notes
