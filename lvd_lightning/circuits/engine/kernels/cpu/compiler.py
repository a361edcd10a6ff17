"""Compile `kernels.c` on this machine, once: the result is kept in the user's cache directory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from lvd_lightning.files import put_in_place

__all__ = ["NoCompilerError", "build"]

SOURCE = Path(__file__).with_name("kernels.c")
# No option that lets the compiler assume that NaN and infinity do not occur. `simd` pragmas need no OpenMP runtime.
OPTIONS = ("-std=gnu99", "-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
BITS = {"float": "uint32_t", "double": "uint64_t"}
SECONDS = 60.0
DIGEST_SIZE = hashlib.sha256().digest_size


class NoCompilerError(OSError):
    """No compiler is installed, and none was asked for."""


def build(real: str) -> ctypes.CDLL:
    """The library for numbers of C type `real`, "float" or "double", from the cache or compiled now.

    The file's name is a hash of all that it depends on, and it ends in a hash of its own content: one that was cut off
    is made again. Processes that start at once may compile the same file, each under a name of its own; the last one
    to finish replaces it by an equal one.

    Raises:
        NoCompilerError: there is no compiler.
        OSError: the one that $CC names is not there, a compiler fails, or nothing can be written to the cache.
    """
    compiler = _compiler()
    options = [*OPTIONS, f"-DREAL={real}", f"-DBITS={BITS[real]}"]
    path = _cache_directory() / f"kernels-{real}-{_key(compiler, options)}.so"
    if not _is_whole(path):
        _compile(compiler, options, path)
    return ctypes.CDLL(str(path))


def _compiler() -> list[str]:
    """The command that $CC names, or the first compiler that is installed."""
    wanted = shlex.split(os.environ.get("CC", ""))
    for command in [wanted] if wanted else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]) is not None:
            return command
    if wanted:
        raise OSError(f"CC names {wanted[0]}, which is not there")
    raise NoCompilerError("found no C compiler")


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lvd_lightning"


def _key(compiler: list[str], options: list[str]) -> str:
    """Hash of what the result depends on; the CPU is part of it, as a home directory may be shared by machines."""
    parts = [SOURCE.read_text(), *compiler, _run([*compiler, "--version"]), *options, platform.machine(), *_cpu()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _cpu() -> list[str]:
    """Model and features of the first processor."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return [line for line in lines if line.lower().startswith(("model", "cpu family", "flags", "features", "cpu part"))]


def _is_whole(path: Path) -> bool:
    """Whether the file ends in the hash of what stands before."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-DIGEST_SIZE]).digest() == content[-DIGEST_SIZE:]


def _compile(compiler: list[str], options: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        _run([*compiler, *options, "-fPIC", "-shared", str(SOURCE), "-o", str(made)])
        with made.open("ab") as file:
            file.write(hashlib.sha256(made.read_bytes()).digest())
        put_in_place(made, path)


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=True, timeout=SECONDS
        ).stdout
    except subprocess.CalledProcessError as error:
        raise OSError(f"{shlex.join(command)} failed: {error.stderr.strip()[-500:]}") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{shlex.join(command)} took longer than {SECONDS:g} s") from error
