"""What stands for a full disk."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["full_disk"]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 4 KiB: writing more fails as it does on a full disk, without the name of the file.

    For the writing alone: what pytest prints may go to a file as well.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
