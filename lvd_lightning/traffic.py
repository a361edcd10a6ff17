"""What ranks send to each other: how many bytes, and how long each process is held up by it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["TRAFFIC", "Traffic", "sending"]


@dataclass
class Traffic:
    """Sums over the messages of this process.

    num_bytes: of the tensors that were sent, once each, whatever a message makes of them on its way.
    seconds: until they were there, waiting for other ranks included. On a GPU, whose messages go on behind the program,
        until they were given to the device.
    num_messages: how many there were.
    """

    num_bytes: int = 0
    seconds: float = 0.0
    num_messages: int = 0


TRAFFIC = Traffic()


@contextmanager
def sending(num_bytes: int, num_messages: int = 1) -> Iterator[None]:
    """Count what is sent inside."""
    start = time.perf_counter()
    try:
        yield
    finally:
        TRAFFIC.seconds += time.perf_counter() - start
        TRAFFIC.num_bytes += num_bytes
        TRAFFIC.num_messages += num_messages
