"""Processes with collectors' workers end by themselves.

TorchRL 0.14 ends the workers of a collector that was not shut down in its ``__del__``, and stops
sharing a policy's weights in another, which starts a thread. For a collector that is still referred
to when the interpreter ends, as after an error in the loop over it, Python 3.11 waits for workers
and thread for ever. So both are ended before.
"""

from __future__ import annotations

import atexit
import gc
import sys

from torchrl.envs.libs import utils

__all__: list[str] = []


def _forget_callers() -> None:
    """Drop the frames that TorchRL keeps with the error of an import.

    The frames are those of whoever made the first gymnasium environment, so that all that stands in
    the variables there, a collector for example, would live until the end.
    """
    error = getattr(utils, "IMPORT_ERROR", None)
    if isinstance(error, BaseException):
        error.__traceback__ = None


def _stop_workers() -> None:
    """End all workers, and all sharing of weights, that are still there."""
    for name, kind, options in (
        ("torchrl.collectors._multi_base", "MultiCollector", {"raise_on_error": False}),
        ("torchrl.weight_update.weight_sync_schemes", "WeightSyncScheme", {}),
    ):
        module = sys.modules.get(name)
        if module is None:
            continue
        for thing in gc.get_objects():
            # By the exact kind: asking whatever else there is for its class may run code.
            if issubclass(type(thing), getattr(module, kind)):
                thing.shutdown(**options)


_forget_callers()
atexit.register(_stop_workers)
