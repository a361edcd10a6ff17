"""What it saves not to store the units of Kronecker products: an EM step with stored products and without.

    python benchmarks/kronecker.py --threads 1     # about two minutes

RAT-SPNs down to single variables and Poon-Domingos structures (every line of pixels) over 48 categorical(256)
variables, as patches of 4x4x3 pixels are, four circuits folded, 256 examples each, Anemone. Steps are taken in turn in
one process; figures are medians, memory is the peak of the first two steps beyond what was there. Trees, RAT-SPNs with
one repetition, have linear values and compiled kernels as long as their products are stored.
"""

from __future__ import annotations

import argparse
import os
import platform
from unittest import mock

import torch
from measuring import Contender, measure_peak, take_step
from sparsity import Trained

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine import grids

NUM_CIRCUITS, BATCH_SIZE, NUM_CATEGORIES = 4, 256, 256


def contender(name: str, graphs: list[pc.CircuitGraph], least: int) -> Contender:
    """Circuits in training whose products are stored if they have fewer units than `least`."""
    with mock.patch.multiple(grids, LEAST_UNITS=least, LEAST_LINEAR=least):
        return Trained(name, graphs).figures


def make_graph(repetitions: int | None, units: int, seed: int) -> pc.CircuitGraph:
    """A RAT-SPN or, without repetitions, a Poon-Domingos structure."""
    leaf, generator = pc.Categorical(NUM_CATEGORIES), torch.Generator().manual_seed(seed)
    if repetitions is None:
        return pc.poon_domingos(
            (4, 4, 3), delta=1, num_units=units, leaf=leaf, product="kronecker", generator=generator
        )
    return pc.rat_spn(
        48,
        depth=6,
        num_repetitions=repetitions,
        num_sums=units,
        num_leaves=units,
        leaf=leaf,
        product="kronecker",
        generator=generator,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    x = torch.randint(NUM_CATEGORIES, (NUM_CIRCUITS, BATCH_SIZE, 48), generator=torch.Generator().manual_seed(0))
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {settings.threads} threads\n")
    print("| structure | units | parameters | stored: ms | without: ms | stored: MiB | without: MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for title, repetitions in (("RAT-SPN, 1 repetition", 1), ("RAT-SPN, 2", 2), ("Poon-Domingos", None)):
        for units in (4, 8, 16) if repetitions is None else (4, 8, 16, 32):
            graphs = [make_graph(repetitions, units, seed) for seed in range(NUM_CIRCUITS)]
            both = [contender("stored", graphs, 1 << 30), contender("without", graphs, 1)]
            for found in both:
                measure_peak(found, x)
            for _ in range(settings.steps):
                for found in both:
                    take_step(found, x)
            times = " | ".join(f"{found.median:.0f}" for found in both)
            memory = " | ".join(f"{found.peak_memory:.0f}" for found in both)
            size = both[0].num_parameters
            print(f"| {title} | {units} | {size:,} | {times} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
