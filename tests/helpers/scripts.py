"""A process that runs files as scripts in forked copies of itself, which find the library imported already.

It imports everything and computes nothing, so that the copies can. Each line of its input asks for one script, as JSON:
a file, its arguments, and the files for what it prints and for its errors. Each answer is an exit code.
"""

import json
import os
import runpy
import sys
from importlib import import_module

__all__ = ["serve"]

LIBRARY = ("lvd_lightning.cli", "lvd_lightning.runs.pipeline", "lvd_lightning.stages", "callbacks", "datamodules")


def serve() -> None:
    """Answer until there is no more input; returns in the forked copies too, whose script is done then."""
    for name in LIBRARY:
        import_module(name)
    for line in sys.stdin:
        file, arguments, *printed = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, path in enumerate((os.devnull, *printed)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
            sys.argv = [file, *arguments]
            runpy.run_path(file, run_name="__main__")
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
