"""One process at a time works on a run directory."""

import contextlib
import importlib
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

__all__ = ["LOCK", "locked"]

LOCK = "lock"
fcntl: ModuleType | None = None
with contextlib.suppress(ImportError):  # Windows has none
    fcntl = importlib.import_module("fcntl")
_held: set[int] = set()


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory (made if need be) for as long as the block lasts; of a job, its first rank does.

    The operating system lets go of the lock when the process ends, however it ends, so what was killed can be continued
    at once. The file stays and says who was last. Whoever only reads the directory needs no lock.

    A file system or operating system that has no such locks is worth a warning and no more.

    Raises:
        ValueError: another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(descriptor, run_dir)
        _held.add(descriptor)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _take(descriptor: int, run_dir: Path) -> None:
    try:
        if fcntl is None:
            raise OSError(0, "this operating system has no such locks")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
        raise ValueError(
            f"another process is working on {run_dir} ({holder}): wait for it or stop it, or give this run another "
            "--name"
        ) from None
    except OSError as error:
        warnings.warn(
            f"{run_dir} cannot be locked ({error.strerror}): see to it that no other process works on it", stacklevel=4
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _forget_in_child() -> None:
    """Workers of a data loader must not keep the lock of a parent that was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
