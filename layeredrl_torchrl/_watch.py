"""Checks of values that do not wait for a device.

On a CPU a check raises at once. Reading a value from an accelerator would block the host until all
launched work has ended. So there the flags of a call are gathered, copied to the host at its end,
and checked when the next call begins; :func:`flush` waits for them. Captured CUDA graphs leave
their flags on the device, and later calls read them. While a function is traced (``torch.compile``,
``torch.export``, ``torch.vmap``) there are no values to check: non-finite values then stay in the
results.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["Watch", "flush", "is_at_once", "is_traced", "refuse", "watched"]

P = ParamSpec("P")
R = TypeVar("R")

# Makes the error for flags, or returns None if a closer check finds nothing wrong.
Error: TypeAlias = Callable[[Tensor], Exception | None]

# Number of flags that captured graphs of one device can report; later captures report nothing.
_CAPTURED = 2**16


class _Sent(NamedTuple):
    """Flags on their way to the host, with their errors."""

    flags: Tensor  # on the host
    event: torch.Event | None  # recorded after the copy; None if there was nothing to wait for
    checks: list[tuple[torch.Size, Error]]

    def raise_first(self, late: str = "; it was found after the call") -> None:
        start = 0
        for shape, error in self.checks:
            flags = self.flags[start : start + shape.numel()].view(shape)
            start += shape.numel()
            if bool(flags.any()) and (found := error(flags)) is not None:
                raise type(found)(f"{found.args[0]}{late}")


class _Captured:
    """The flags of the captured graphs of a device."""

    def __init__(self, device: torch.device) -> None:
        self.flags = torch.zeros(_CAPTURED, dtype=torch.bool, device=device)
        self.used = 0
        self.checks: list[tuple[torch.Size, Error]] = []
        self.sent: _Sent | None = None

    def add(self, flags: Tensor, checks: list[tuple[torch.Size, Error]]) -> None:
        """Add flags during a capture: each replay sets them, and none clears them."""
        if self.used + len(flags) > _CAPTURED:
            return
        self.flags[self.used : self.used + len(flags)].logical_or_(flags)
        self.used += len(flags)
        self.checks += checks

    def look(self, *, wait: bool = False) -> None:
        """Request the current flags, and check those that have arrived."""
        if not self.used:
            return
        if self.sent is None:
            on_host = self.flags[: self.used].to("cpu", non_blocking=True)  # into pinned memory
            event = torch.Event(self.flags.device)
            event.record()
            self.sent = _Sent(on_host, event, list(self.checks))
        assert self.sent.event is not None
        if wait:
            self.sent.event.synchronize()
        if not self.sent.event.query():
            return
        sent, self.sent = self.sent, None
        if bool(sent.flags.any()):
            self.flags.zero_()
            sent.raise_first("; it was found after a CUDA graph ran")


class Watch:
    """Gathers the flags of a call and checks them later.

    Args:
        at_once: Types of devices whose values can be read without waiting.
    """

    def __init__(self, at_once: tuple[str, ...] = ("cpu",)) -> None:
        self.at_once = at_once
        self._depth = 0
        self._gathered: list[tuple[Tensor, Error]] = []
        self._sent: deque[_Sent] = deque()
        self._captured: dict[torch.device, _Captured] = {}

    def refuse(self, bad: Tensor, error: Error) -> None:
        """Raise ``error(bad)`` if any of ``bad`` is true, now or when the next call begins.

        Args:
            bad: Flags (bool) of any shape; only few, since all are copied.
            error: Called with the flags on the host; returns the error to raise, or ``None``.
        """
        if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(bad):
            return
        if bad.device.type in self.at_once:
            if isinstance(bad, FakeTensor) or not bool(bad.any() if bad.ndim else bad):
                return
            if (found := error(bad)) is not None:
                raise found
            return
        self._gathered.append((bad.detach(), error))
        if self._depth == 0:
            self._send()

    def watched(self, call: Callable[P, R]) -> Callable[P, R]:
        """Copy all flags of ``call`` together at its end; calls may be nested."""

        @functools.wraps(call)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return call(*args, **kwargs)
            if self._depth == 0 and (self._sent or self._captured):
                self.look()
            self._depth += 1
            try:
                result = call(*args, **kwargs)
            except BaseException:
                if self._depth == 1:
                    self._gathered.clear()
                raise
            finally:
                self._depth -= 1
            if self._depth == 0 and self._gathered:
                self._send()
            return result

        return run

    def gather(self, call: Callable[[], R]) -> tuple[R, list[tuple[Tensor, Error]]]:
        """Run ``call`` and return its result and its flags, for the caller to check."""
        before, self._gathered = self._gathered, []
        self._depth += 1
        try:
            return call(), self._gathered
        finally:
            self._depth -= 1
            self._gathered = before

    def look(self) -> None:
        """Raise the error of an earlier call whose flags have arrived."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return  # querying an event would break the capture
        while self._sent and ((event := self._sent[0].event) is None or event.query()):
            self._sent.popleft().raise_first()
        for captured in self._captured.values():
            captured.look()

    def flush(self) -> None:
        """Wait for all pending flags, and raise the first error."""
        if self._gathered and self._depth == 0:
            self._send()
        for sent in self._sent:
            if sent.event is not None:
                sent.event.synchronize()
        self.look()
        for captured in self._captured.values():
            captured.sent = None  # may be older than the last replay
            captured.look(wait=True)

    def _send(self) -> None:
        gathered, self._gathered = self._gathered, []
        for device in {bad.device for bad, _ in gathered}:
            here = [(bad, error) for bad, error in gathered if bad.device == device]
            checks = [(bad.shape, error) for bad, error in here]
            flags = torch.cat([bad.flatten() for bad, _ in here])
            if device.type == "cuda" and not isinstance(flags, FakeTensor):
                if torch.cuda.is_current_stream_capturing():
                    if device in self._captured:
                        self._captured[device].add(flags, checks)
                    continue
                if device not in self._captured:
                    self._captured[device] = _Captured(device)
            on_host = flags.to("cpu", non_blocking=True)  # into pinned memory
            if isinstance(flags, FakeTensor):
                continue
            event = None
            if device.type not in ("cpu", "meta"):
                event = torch.Event(device)
                event.record()
            self._sent.append(_Sent(on_host, event, checks))


_WATCH = Watch()


def is_traced(tensor: Tensor) -> bool:
    """Whether ``tensor`` has no values, as while a function is traced."""
    return (
        torch.compiler.is_compiling()
        or isinstance(tensor, FakeTensor)
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def is_at_once(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` can be read without waiting for a device."""
    return tensor.device.type in _WATCH.at_once


refuse = _WATCH.refuse
watched = _WATCH.watched
gather = _WATCH.gather
flush = _WATCH.flush
