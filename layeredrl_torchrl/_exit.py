"""Processes that shared weights with collectors' workers end by themselves.

TorchRL 0.14 stops sharing a policy's weights in a ``__del__`` that starts a thread. If that runs
only when the interpreter is torn down, as it does for a collector that is still referred to then,
Python 3.11 waits for the thread for ever. So sharing is stopped before.
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


def _stop_sharing() -> None:
    """Stop all sharing of weights that is still going on."""
    module = sys.modules.get("torchrl.weight_update.weight_sync_schemes")
    if module is None:
        return
    for thing in gc.get_objects():
        # By the exact kind: asking whatever else there is for its class may run code.
        if issubclass(type(thing), module.WeightSyncScheme):
            thing.shutdown()


_forget_callers()
atexit.register(_stop_sharing)
