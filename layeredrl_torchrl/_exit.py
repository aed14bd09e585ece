"""Let processes with collectors' workers end.

TorchRL 0.14 ends the workers of a collector that was not shut down in the collector's ``__del__``.
Another ``__del__``, which starts a thread, stops sharing a policy's weights. If a collector is
still referenced when the interpreter ends, for example after an error in the loop over it, Python
3.11 waits for workers and thread forever. So this module ends both before.
"""

from __future__ import annotations

import atexit
import gc
import sys

from torchrl.envs.libs import utils

__all__: list[str] = []


def _forget_callers() -> None:
    """Drop the frames that TorchRL keeps with an import error.

    They are the frames that made the first gymnasium environment. Everything in their variables, a
    collector for example, would live until the end.
    """
    error = getattr(utils, "IMPORT_ERROR", None)
    if isinstance(error, BaseException):
        error.__traceback__ = None


def _stop_workers() -> None:
    """End all remaining workers and all sharing of weights."""
    for name, kind, options in (
        ("torchrl.collectors._multi_base", "MultiCollector", {"raise_on_error": False}),
        ("torchrl.weight_update.weight_sync_schemes", "WeightSyncScheme", {}),
    ):
        module = sys.modules.get(name)
        if module is None:
            continue
        for thing in gc.get_objects():
            # Use type(): reading __class__ of arbitrary objects may run code.
            if issubclass(type(thing), getattr(module, kind)):
                thing.shutdown(**options)


_forget_callers()
atexit.register(_stop_workers)
