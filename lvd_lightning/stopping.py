"""A process that is asked to end does so at the next boundary, with its work saved; and all ranks of a job with it.

SIGTERM and SIGUSR1 set a flag, between stages and in all of them. Whoever works in steps or chunks asks
`stop_if_requested` at every boundary; what is on the disk then is what the next start goes on from. The exit code is
`EXIT_CODE`.

On several ranks a thread of each watches for signals and for the other ranks' word, also while the program waits in a
message for another rank. One rank that gets a signal stops all; so does one that fails, whose message is the last.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = [
    "EXIT_CODE",
    "Stopped",
    "failed_elsewhere",
    "handled_signals",
    "ignore_signals",
    "requested",
    "stop_if_requested",
    "stop_watching",
    "tell_failure",
    "watch_ranks",
]

#: Of a process that was stopped by a signal, with all that it had done saved: the same command goes on (EX_TEMPFAIL).
EXIT_CODE = 75
_SECONDS_BETWEEN_LOOKS = 0.25
# How long a rank that stops by itself waits, so that the others hear of it before they miss it.
_SECONDS_TO_TELL = 1.0
_STOP, _FAILED, _FAILURES = "lvd_lightning/stop", "lvd_lightning/failed", "lvd_lightning/failures"

_state: dict[str, Any] = {}


class Stopped(SystemExit):
    """A signal has stopped the process at a boundary; a SystemExit, so that nothing takes it for an error.

    signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(EXIT_CODE)
        self.signal = number


def _signals() -> list[signal.Signals]:
    return [found for name in ("SIGTERM", "SIGUSR1") if (found := getattr(signal, name, None)) is not None]


@contextmanager
def handled_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 ask the process to stop. In the main thread alone; elsewhere nothing changes."""
    _state.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: Any) -> None:
        _state.setdefault("signal", number)

    before = {found: signal.signal(found, note) for found in _signals()}
    # The number of a signal is written here at once, also while the main thread waits in a message.
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    earlier = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    _state["reading"] = reading
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        for found, handler in before.items():
            signal.signal(found, handler)
        _state.pop("reading", None)
        stop_watching()
        reading.close()
        writing.close()


def ignore_signals() -> None:
    """Let SIGTERM and SIGUSR1 change nothing any more: of a process that is about to end."""
    for found in _signals():
        signal.signal(found, signal.SIG_IGN)


def requested() -> int | None:
    """The signal that asked this process, or another rank, to stop; None if none has."""
    found: int | None = _state.get("signal")
    return found


def stop_if_requested() -> None:
    """Raise `Stopped` if a signal has come. Ranks need not call together: each stops where it is."""
    number = requested()
    if number is None:
        return
    if "store" in _state:
        time.sleep(_SECONDS_TO_TELL)
    raise Stopped(number)


def failed_elsewhere() -> str | None:
    """What another rank has said before it failed; None if none has."""
    found: str | None = _state.get("failed")
    return found


def tell_failure(message: str) -> bool:
    """Have the other ranks end, without a word; returns when they have had time to.

    Of several that fail, as many do because one has, the first tells the others. Whether it is this one; False too
    where there are no others.
    """
    store = _state.get("store")
    if store is None or failed_elsewhere() is not None:
        return False
    _state["failed_here"] = True
    time.sleep(_SECONDS_BETWEEN_LOOKS)  # a rank that only misses another one leaves it the first word
    try:
        is_first = store.add(_FAILURES, 1) == 1
        if is_first:
            store.set(_FAILED, message)
    except Exception:  # the rank that keeps the store is gone, and has said why
        return False
    if not is_first:
        _state["failed"] = message
        return False
    _state["ended"].set()  # the others end, and with the first of them what keeps their word
    time.sleep(2 * _SECONDS_TO_TELL)
    return True


def watch_ranks(store: Any, timeout: float) -> None:
    """Begin to watch for the word of other ranks.

    store: what all ranks of the process group read and write.
    timeout: seconds after which a process that was told to end, and does not come to a boundary, is ended.
    """
    ended = threading.Event()
    _state.update(store=store, ended=ended)
    threading.Thread(target=_watch, args=(store, timeout, ended), daemon=True).start()


def stop_watching() -> None:
    """The process group is about to end, and with it what ranks tell each other by."""
    _state.pop("store", None)
    ended = _state.pop("ended", None)
    if ended is not None:
        ended.set()


def _watch(store: Any, timeout: float, ended: threading.Event) -> None:
    told, since = False, 0.0
    while not ended.wait(_SECONDS_BETWEEN_LOOKS):
        _read_signal()
        try:
            if requested() is not None and not told:
                store.set(_STOP, str(requested()))
                told = True
            elif requested() is None and store.check([_STOP]):
                _state.setdefault("signal", int(store.get(_STOP)))
                told = True
            if not _state.get("failed_here") and failed_elsewhere() is None and store.check([_FAILED]):
                _state["failed"] = store.get(_FAILED).decode(errors="replace")
        except Exception:  # the rank that keeps the store has ended: messages will say so
            return
        if failed_elsewhere() is not None:
            time.sleep(_SECONDS_TO_TELL)
            if not ended.is_set():
                os._exit(2)  # the main thread may wait for the rank that failed, and never hear of it
        if requested() is not None:
            since = since or time.monotonic()
            if time.monotonic() - since > timeout:
                os._exit(EXIT_CODE)


def _read_signal() -> None:
    reading = _state.get("reading")
    if reading is None:
        return
    with suppress(OSError, ValueError):
        for number in reading.recv(64):
            if number in _signals():
                _state.setdefault("signal", number)


def _forget_in_child() -> None:
    """Workers of a data loader end when they are told to, and say nothing of it to anybody."""
    if _state.pop("reading", None) is not None:
        signal.set_wakeup_fd(-1)
        for found in _signals():
            signal.signal(found, signal.SIG_DFL)
    _state.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
