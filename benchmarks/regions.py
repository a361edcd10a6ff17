"""One EM step on RAT-SPN and Poon-Domingos circuits over 28x28 images, against one training step of cirkit.

    python benchmarks/regions.py        # about five minutes on two cores

784 categorical(256) variables, crops of the photographs that come with scikit-learn, batch 64. cirkit (libcirkit 0.3.1)
has region graphs of the same kind and size (with its own random splits) and products followed by dense sums ("cp-t"),
folded and optimised, and trains with Adam. Steps are taken in turn in one process; figures are medians and their ratio.

Needs `pip install lvd-lightning[benchmarks]`.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from cirkit.pipeline import PipelineContext
from cirkit.templates.region_graph import PoonDomingos, RandomBinaryTree, RegionGraph
from cirkit.templates.utils import (
    Parameterization,
    name_to_input_layer_factory,
    parameterization_to_factory,
)
from em_step import our_contender
from measuring import Contender, adam_contender, measure_peak, take_step
from sklearn.datasets import load_sample_images
from torch import Tensor

import lvd_lightning.circuits as pc

SIDE, BATCH_SIZE, NUM_CATEGORIES = 28, 64, 256
DEPTH, REPETITIONS, DELTA = 4, 8, 7


def load_crops() -> Tensor:
    """All 28x28 crops of a grid over the green channels, int64 (N, 784)."""
    crops = []
    for image in load_sample_images().images:
        green = torch.from_numpy(image[..., 1].copy()).long()
        crops.append(green.unfold(0, SIDE, SIDE // 2).unfold(1, SIDE, SIDE // 2).reshape(-1, SIDE * SIDE))
    x = torch.cat(crops)
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


def cirkit_contender(regions: RegionGraph, num_units: int) -> Contender:
    """cirkit under Adam on a region graph of its own."""
    weights = parameterization_to_factory(Parameterization(activation="softmax", initialization="normal"))
    symbolic = regions.build_circuit(
        input_factory=name_to_input_layer_factory("categorical", num_categories=NUM_CATEGORIES),
        sum_product="cp-t",
        sum_weight_factory=weights,
        nary_sum_weight_factory=weights,
        num_input_units=num_units,
        num_sum_units=num_units,
        factorize_multivariate=True,
    )
    return adam_contender(
        PipelineContext(backend="torch", semiring="lse-sum", fold=True, optimize=True).compile(symbolic)
    )


def rat_spn(num_units: int) -> tuple[pc.CircuitGraph, RegionGraph]:
    sizes = {"num_sums": num_units, "num_leaves": num_units}
    ours = pc.rat_spn(
        SIDE * SIDE, depth=DEPTH, num_repetitions=REPETITIONS, leaf=pc.Categorical(NUM_CATEGORIES), **sizes
    )
    return ours, RandomBinaryTree(SIDE * SIDE, depth=DEPTH, num_repetitions=REPETITIONS)


def poon_domingos(num_units: int) -> tuple[pc.CircuitGraph, RegionGraph]:
    leaf = pc.Categorical(NUM_CATEGORIES)
    ours = pc.poon_domingos((SIDE, SIDE, 1), delta=DELTA, num_units=num_units, leaf=leaf)
    return ours, PoonDomingos((1, SIDE, SIDE), delta=DELTA)


STRUCTURES: dict[str, Callable[[int], tuple[pc.CircuitGraph, RegionGraph]]] = {
    f"RAT-SPN, depth {DEPTH}, {REPETITIONS} repetitions": rat_spn,
    f"Poon-Domingos, step {DELTA}": poon_domingos,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    x = load_crops()
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {settings.threads} threads",
        "",
        "| structure | K |  | stored parameters | ms per step | cirkit / this | peak memory of a step, MiB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines))
    for name, build in STRUCTURES.items():
        for num_units in settings.units:
            ours, regions = build(num_units)
            contenders = [cirkit_contender(regions, num_units), our_contender("EM", [ours])]
            for contender in contenders:
                measure_peak(contender, x[:BATCH_SIZE])
            for number in range(settings.steps):
                batch = x[(torch.arange(BATCH_SIZE) + number * BATCH_SIZE) % len(x)]
                for contender in contenders:
                    take_step(contender, batch)
            for this in contenders:
                ratio = contenders[0].median / this.median
                lines.append(
                    f"| {name} | {num_units} | {this.name} | {this.num_parameters:,} | {this.median:.1f} | "
                    f"{ratio:.1f} | {this.peak_memory:.0f} |"
                )
                print(lines[-1], flush=True)
    if settings.output is not None:
        settings.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
