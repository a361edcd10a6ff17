"""Feeds spoiled files to every reader of files that may come from somebody else, for as long as one likes.

    python benchmarks/fuzz.py --minutes 20
    python benchmarks/fuzz.py --minutes 20 --only pickle circuit --seed 3
    python benchmarks/fuzz.py --minutes 20 --atheris    # guided by coverage, where `pip install atheris` works

The readers are those of tests/helpers/readers.py, in turn. A spoiled file may be read, or be refused by a ValueError or
an OSError. Anything else is a fault, and is kept with its input in the folder `--faults`, named by reader and seed.
Memory is limited to `--gigabytes`, so that a file that would take more is a fault too. So is one that takes more than
ten seconds of processor time. A table of inputs and faults is printed at the end.
"""

import argparse
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.readers import READERS, spoiled  # noqa: E402 (found by the line above)

CLEAR = (ValueError, OSError)
SECONDS = 10


class TooLong(BaseException):
    """A reader took more than ten seconds of processor time."""


def read(name: str, folder: Path, content: bytes) -> str:
    """How reading a file of this content ends: "read", "refused", or the traceback of a fault."""
    path = folder / READERS[name].name
    path.write_bytes(content)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        READERS[name].read(path)
    except CLEAR:
        return "refused"
    except (Exception, TooLong):
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "read"


def fuzz(names: Sequence[str], minutes: float, seed: int, faults: Path) -> dict[str, Counter[str]]:
    """Mutate the whole file of each reader at random; how the readings ended."""
    ends: dict[str, Counter[str]] = {name: Counter() for name in names}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        whole = {}
        for number, name in enumerate(names):
            folder = Path(place, str(number))
            folder.mkdir()
            READERS[name].write(folder)
            whole[name] = folder, {path.name: path.read_bytes() for path in folder.iterdir()}
        while time.monotonic() - begun < 60 * minutes:
            for name, (folder, files) in whole.items():
                for file, content in files.items():
                    (folder / file).write_bytes(content)
                content = spoiled(files[READERS[name].name], random.Random(f"{name} {seed}"))
                end = read(name, folder, content)
                ends[name]["fault" if "\n" in end else end] += 1
                if "\n" in end:
                    faults.mkdir(parents=True, exist_ok=True)
                    (faults / f"{name.replace(' ', '_')}_{seed}").write_bytes(content)
                    (faults / f"{name.replace(' ', '_')}_{seed}.txt").write_text(end)
                    print(f"{name}, seed {seed}: {end.splitlines()[-1]}", flush=True)
            seed += 1
    return ends


def guided(name: str, minutes: float) -> None:
    """The same by atheris, which ends at the first fault; one reader a process."""
    import atheris

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        READERS[name].write(folder)
        corpus = Path(place, "corpus")
        corpus.mkdir()
        (corpus / "whole").write_bytes((folder / READERS[name].name).read_bytes())

        def one(content: bytes) -> None:
            end = read(name, folder, content)
            if "\n" in end:
                raise RuntimeError(end)

        atheris.instrument_all()
        atheris.Setup([sys.argv[0], str(corpus), f"-max_total_time={round(60 * minutes)}"], one)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--only", nargs="+", default=list(READERS), choices=list(READERS), metavar="READER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=Path, default=Path("fuzz_faults"))
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of address space, the libraries' included")
    parser.add_argument("--atheris", action="store_true", help="one reader, guided by coverage")
    chosen = parser.parse_args()

    def too_long(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGPROF, too_long)
    warnings.simplefilter("ignore")
    limit = int(chosen.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if chosen.atheris:
        if len(chosen.only) != 1:
            parser.error("--atheris takes one reader, by --only")
        guided(chosen.only[0], chosen.minutes)
        return
    ends = fuzz(chosen.only, chosen.minutes, chosen.seed, chosen.faults)
    print("| reader | inputs | read | refused | faults |\n|---|---:|---:|---:|---:|")
    for name, found in ends.items():
        print(f"| {name} | {found.total():,} | {found['read']:,} | {found['refused']:,} | {found['fault']:,} |")
    total, faults = (sum(counted) for counted in zip(*((found.total(), found["fault"]) for found in ends.values())))
    used = time.process_time()
    print(f"{total:,} inputs in {chosen.minutes:g} minutes ({used:,.0f} seconds of processor time), {faults} faults")


if __name__ == "__main__":
    main()
