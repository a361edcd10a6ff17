"""Tests of several processes: a test file run as a script, runs that are killed, two ranks."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from lvd_lightning.ranks import leave

__all__ = ["as_script", "exit_codes", "fork_ranks", "free_port", "one_of_two", "script_server"]

TESTS = Path(__file__).parents[1]


def as_script(file: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a test file as a script, with one thread, and wait for it.

    It is forked from a process that all of them share: to import the library takes longer than what most of them do.
    """
    server = script_server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("out", "errors")]
        server.stdin.write(json.dumps([file, arguments, *map(str, printed)]) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], 300)[0]:
            script_server.cache_clear()
            os.killpg(server.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired([file, *arguments], 300)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess([file, *arguments], code, *(path.read_text() for path in printed))


@cache
def script_server() -> subprocess.Popen[str]:
    """See `helpers.scripts`; it ends with this process, which closes its input."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-m", "helpers.scripts"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )


def exit_codes(work: Callable[[], int], most: int) -> list[int]:
    """Exit codes of forked processes that do the work, one after another until one ends well, or `most` of them.

    The process that calls has to have imported everything and computed nothing, so that the forked ones can.
    """
    codes: list[int] = []
    while not codes or (codes[-1] and len(codes) < most):
        codes.append(_waited(_forked(work)))
    return codes


def fork_ranks(work: Callable[[int], None], size: int = 2, ended: list[int] | None = None) -> int:
    """Do `work(rank)` in forked processes that see each other as torchrun's do; the worst exit code.

    ended: takes the exit codes of all; those that still run a minute after the first has ended are killed, and have
        none.
    """
    port = free_port()

    def as_rank(rank: int) -> int:
        os.environ.update(
            TORCHELASTIC_RUN_ID="test",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(size)),
            **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
            GROUP_RANK="0",
        )
        work(rank)
        return 0

    children = [_forked(lambda rank=rank: as_rank(rank)) for rank in range(size)]
    if ended is not None:
        ended.extend(_codes_within(children, 60.0))
        return max(map(abs, ended))
    return max(abs(_waited(child)) for child in children)


@contextmanager
def one_of_two(rank: int, port: int, size: int = 2) -> Iterator[None]:
    """In a fresh process: one of a group of two (or `size`) ranks that compute in float64 on one thread each."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    yield
    leave()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _forked(work: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def _codes_within(children: list[int], seconds: float) -> list[int]:
    """Exit codes of children that end within so many seconds of the first of them; the others are killed."""
    codes: list[int] = []
    left, limit = list(children), float("inf")
    while left and time.monotonic() < limit:
        for child in list(left):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                left.remove(child)
                codes.append(os.waitstatus_to_exitcode(status))
                limit = min(limit, time.monotonic() + seconds)
        time.sleep(0.05)
    for child in left:
        os.kill(child, signal.SIGKILL)
        _waited(child)
    return codes


def _waited(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
