"""One EM step of this library against one training step of cirkit (libcirkit 0.3.1) on the same Chow-Liu circuit.

    python benchmarks/em_step.py            # about five minutes on two cores
    python benchmarks/em_step.py --quick    # one minute, fewer repetitions, K = 16 only

A step is forward, backward and update, on 256 patches (4x4x3) of the photographs that come with scikit-learn: 48
variables with 256 categories. cirkit trains with Adam, on `tabular_data("chow-liu-tree", sum_product_layer="cp")`,
folded and optimised by its pipeline. The steps of all contenders are interleaved in one process on two threads, so that
what else the machine does hits all alike (keep it idle all the same: with fewer free cores than threads, each operation
waits for the thread that is not running); figures are medians and ratios of medians. "64 folded" trains 64 circuits,
each with its own tree and its own 256 patches, as one; its figures are per circuit. cirkit's circuit has one K x K sum
more for each inner variable of the tree, between its leaf and its product, as the parameters show.

Needs `pip install lvd-lightning[benchmarks]`.
"""

import argparse
import os
import platform
from pathlib import Path

import numpy as np
import torch
from cirkit.pipeline import PipelineContext
from cirkit.symbolic.circuit import Circuit
from cirkit.templates.data_modalities import tabular_data
from measuring import Contender, adam_contender, measure_peak, take_step
from sklearn.datasets import load_sample_images
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.structures.chow_liu import chow_liu_trees

NUM_CATEGORIES, NUM_BINS = 256, 16
BATCH_SIZE = 256
NUM_FOLDED = 64
NUM_TREE_EXAMPLES = 5000


def load_patches() -> Tensor:
    """All 4x4 patches of the two photographs, shuffled, with shape (33920, 48)."""
    patches = []
    for image in load_sample_images().images:
        height, width, _ = image.shape
        grid = image[: height // 4 * 4, : width // 4 * 4].reshape(height // 4, 4, width // 4, 4, 3)
        patches.append(grid.transpose(0, 2, 4, 1, 3).reshape(-1, 48))
    x = torch.from_numpy(np.concatenate(patches)).long()
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


def symbolic_cirkit(x: Tensor, num_units: int) -> Circuit:
    """cirkit's template; its tree is learnt from the same 16 bins as ours."""
    return tabular_data(
        "chow-liu-tree",
        data=x[:NUM_TREE_EXAMPLES] * NUM_BINS // NUM_CATEGORIES,
        input_layers={"name": "categorical", "args": {"num_categories": NUM_CATEGORIES}},
        num_input_units=num_units,
        sum_product_layer="cp",
        num_sum_units=num_units,
    )


def cirkit_contender(x: Tensor, num_units: int) -> Contender:
    """cirkit under Adam."""
    context = PipelineContext(backend="torch", semiring="lse-sum", fold=True, optimize=True)
    return adam_contender(context.compile(symbolic_cirkit(x, num_units)))


def our_contender(rule: str, graphs: list[pc.CircuitGraph]) -> Contender:
    """One circuit, or many folded ones, under an EM rule."""
    circuit = pc.Circuit(graphs if len(graphs) > 1 else graphs[0])
    optimizer = {"EM": pc.CircuitEM, "Anemone": pc.Anemone}[rule](circuit)

    def step(batch: Tensor) -> float:
        optimizer.zero_grad()
        loss = -circuit.log_prob(batch, head=0).sum()
        loss.backward()
        optimizer.step()
        return loss.item() / batch[..., 0].numel()

    name = f"ours, {rule}" + (f", {len(graphs)} folded" if len(graphs) > 1 else "")
    return Contender(name, len(graphs), step, sum(parameter.numel() for parameter in circuit.parameters()))


def our_graphs(x: Tensor, num_units: int, num_circuits: int) -> list[pc.CircuitGraph]:
    """HCLTs; several circuits have the trees of different patches."""
    parts = [x[:NUM_TREE_EXAMPLES]] if num_circuits == 1 else x.view(num_circuits, -1, x.shape[1])
    trees = chow_liu_trees(parts, NUM_CATEGORIES, NUM_BINS)
    return [pc.hclt(parents, num_units, pc.Categorical(NUM_CATEGORIES)) for parents in trees]


def draw_batch(x: Tensor, number: int, num_circuits: int) -> Tensor:
    """The patches of a step: the next ones of the shuffled set, in a circle."""
    rows = (torch.arange(num_circuits * BATCH_SIZE) + number * BATCH_SIZE) % len(x)
    return x[rows] if num_circuits == 1 else x[rows].view(num_circuits, BATCH_SIZE, -1)


def measure_memory(contender: Contender, x: Tensor) -> None:
    """Measure the memory of a step; see `measure_peak`."""
    measure_peak(contender, draw_batch(x, 0, contender.num_circuits))


def run(x: Tensor, num_units: int, num_steps: int) -> list[Contender]:
    """Measure all contenders at one width, step by step in turn."""
    contenders = [cirkit_contender(x, num_units)]
    measure_memory(contenders[0], x)
    for num_circuits in (1, NUM_FOLDED):
        graphs = our_graphs(x, num_units, num_circuits)
        for rule in ("EM", "Anemone"):
            contenders.append(our_contender(rule, graphs))
            measure_memory(contenders[-1], x)
    for number in range(num_steps):  # the first steps have already been taken by the memory measurement
        for contender in contenders:
            take_step(contender, draw_batch(x, number, contender.num_circuits))
    print(f"K = {num_units}: {', '.join(f'{this.name} {this.median:.2f} ms' for this in contenders)}", flush=True)
    return contenders


def table(results: dict[int, list[Contender]]) -> list[str]:
    """Rows of a Markdown table."""
    columns = (
        "K",
        "",
        "stored parameters",
        "ms per step and circuit",
        "fastest",
        "cirkit / this",
        "peak memory of a step, all circuits, MiB",
        "nats per patch at the end",
    )
    lines = [f"| {' | '.join(columns)} |", "| ---: | --- |" + " ---: |" * (len(columns) - 2)]
    for num_units, contenders in results.items():
        for this in contenders:
            ratio = contenders[0].median / this.median
            lines.append(
                f"| {num_units} | {this.name} | {this.num_parameters:,} | {this.median:.2f} | {this.fastest:.2f} | "
                f"{ratio:.1f} | {this.peak_memory:.0f} | {this.last_loss:.1f} |"
            )
    return lines


def common_edges(x: Tensor) -> str:
    """How far the two trees agree. An edge is the split of the variables that cutting it makes, whatever the root."""
    num_vars = x.shape[1]
    parents = pc.chow_liu_tree(x[:NUM_TREE_EXAMPLES], NUM_CATEGORIES, NUM_BINS).tolist()
    below: list[set[int]] = [{v} for v in range(num_vars)]
    for v in range(num_vars):
        above = parents[v]
        while above >= 0:
            below[above].add(v)
            above = parents[above]
    symbolic = symbolic_cirkit(x, 2)
    theirs = [set(symbolic.layer_scope(layer)) for layer in symbolic.sum_layers]
    ours_splits, their_splits = (
        {frozenset((frozenset(s), frozenset(range(num_vars)) - s)) for s in scopes if 1 < len(s) < num_vars - 1}
        for scopes in (below, theirs)
    )
    return (
        f"{len(ours_splits & their_splits)} of {len(ours_splits)} inner edges of the two Chow-Liu trees are the same."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="K = 16 only, few repetitions")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"), help="Markdown file to write")
    parser.add_argument("--threads", type=int, default=2)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    x = load_patches()
    widths, num_steps = ((16,), 10) if settings.quick else ((16, 32, 64), 40)
    results = {num_units: run(x, num_units, num_steps) for num_units in widths}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {settings.threads} threads"
    lines = ["# One training step, this library against cirkit", "", machine, "", *table(results), "", common_edges(x)]
    print("\n".join(lines))
    settings.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
