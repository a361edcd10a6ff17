"""What pruned edges save: an EM step of an HCLT with 256 latents that lost edges, against the dense circuit.

    python benchmarks/edges.py            # about five minutes on two cores
    python benchmarks/edges.py --quick

48 categorical(256) variables, the 4x4x3 patches of the photographs that come with scikit-learn, 256 of them per step of
Anemone. First half of the edges go, at random or those of least flow in a circuit after some training; the pruned
circuit is run with either layout of its edges (`pc.Circuit(layout=...)`) beside the dense one it came from. Then the
share of edges that stay is varied, at random, which shows from where on the sparse layout wins. Steps are taken in turn
in one process; figures are medians and ratios of them, memory is the peak of the first two steps beyond what was there.
"""

from __future__ import annotations

import argparse
import os
import platform

import torch
from measuring import Contender, measure_peak, take_step
from sklearn.datasets import load_sample_images
from sparsity import BATCH_SIZE, NUM_CATEGORIES, Trained
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine.sparse import Layout

SHARES = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)


def contender(name: str, graph: pc.CircuitGraph, layout: Layout) -> Contender:
    """A circuit with a layout in training; also its number of stored edges, as the last part of the name."""
    trained = Trained(name, [graph], layout)
    tables = zip(trained.circuit.tables, trained.circuit.plan.groups, strict=True)
    stored = sum(table.numel() for table, group in tables if group.kind == "sum")
    trained.figures.name += f" | {trained.circuit.num_parameters:,} | {stored:,}"
    return trained.figures


def load_patches() -> Tensor:
    """All 4x4 patches of the photographs side by side, int64 (N, 48), shuffled."""
    patches = []
    for image in load_sample_images().images:
        pixels = torch.from_numpy(image.copy()).long()
        patches.append(pixels.unfold(0, 4, 4).unfold(1, 4, 4).permute(0, 1, 3, 4, 2).reshape(-1, 48))
    x = torch.cat(patches)
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


def train(graph: pc.CircuitGraph, x: Tensor, steps: int) -> pc.Circuit:
    """A circuit after some steps of EM."""
    circuit = pc.Circuit(graph)
    optimizer = pc.Anemone(circuit)
    for number in range(steps):
        batch = x[(torch.arange(BATCH_SIZE) + number * BATCH_SIZE) % len(x)]
        (-circuit.log_prob(batch, head=0)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return circuit


def prune_at_random(graph: pc.CircuitGraph, share: float, generator: torch.Generator) -> pc.CircuitGraph:
    """Leave this share of the edges of every sum but the heads."""
    out = pc.Circuit(graph).to_graph()
    assert isinstance(out, pc.CircuitGraph)
    for index, node in enumerate(out.nodes):
        if node.weight is not None and index != out.root:
            live = torch.rand(node.weight.shape, generator=generator) < share
            live.scatter_(1, node.weight.argmax(1, keepdim=True), True)
            node.mask = live
            node.weight = node.weight * live / (node.weight * live).sum(1, keepdim=True)
    return out


def prune_by_flow(circuit: pc.Circuit, x: Tensor, share: float) -> pc.CircuitGraph:
    """Leave this share of all edges, those of the largest flow."""
    flows = pc.Flows(circuit)
    flows.add(x)
    edges = torch.cat([table.flatten() for table in flows.tables if table is not None])
    threshold = float(edges.kthvalue(int((1 - share) * len(edges))).values) / len(x)
    pruned = pc.prune(circuit, flows, threshold=threshold)
    assert isinstance(pruned, pc.CircuitGraph)
    return pruned


def compare(contenders: list[Contender], x: Tensor, num_steps: int) -> None:
    """Memory, then times in turn."""
    batch = x[None, :BATCH_SIZE]
    for found in contenders:
        measure_peak(found, batch)
    for _ in range(num_steps):
        for found in contenders:
            take_step(found, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer latents, steps and shares")
    parser.add_argument("--latents", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    num_latents, num_steps, training = (64, 5, 10) if settings.quick else (settings.latents, 25, 100)
    generator = torch.Generator().manual_seed(0)
    x = load_patches()
    parents = pc.chow_liu_tree(x, num_categories=NUM_CATEGORIES, max_examples=5000)
    circuit = train(pc.hclt(parents, num_latents, pc.Categorical(NUM_CATEGORIES), generator=generator), x, training)
    graph = circuit.to_graph()
    assert isinstance(graph, pc.CircuitGraph)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {settings.threads} threads")
    print(f"HCLT with {num_latents} latents, {circuit.num_parameters:,} parameters, after {training} steps\n")
    print("| half of the edges | layout | parameters | edges stored | ms per step | ratio | MiB of a step | ratio |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    halves = {
        "at random": prune_at_random(graph, 0.5, generator),
        "by flow": prune_by_flow(circuit, x[:20000], 0.5),
    }
    for name, pruned in halves.items():
        contenders = [
            contender("dense, all edges", graph, "dense"),
            contender("dense, masked", pruned, "dense"),
            contender("sparse", pruned, "sparse"),
            contender("as chosen sum by sum", pruned, "auto"),
        ]
        compare(contenders, x, num_steps)
        first = contenders[0]
        for this in contenders:
            print(
                f"| {name} | {this.name} | {this.median:.1f} | {this.median / first.median:.2f} | "
                f"{this.peak_memory:.0f} | {this.peak_memory / first.peak_memory:.2f} |",
                flush=True,
            )
    print("\n| share of edges | dense, masked: ms | sparse: ms | sparse / dense | memory, sparse / dense |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for share in SHARES[::3] if settings.quick else SHARES:
        pruned = prune_at_random(graph, share, generator)
        dense, sparse = contender("dense", pruned, "dense"), contender("sparse", pruned, "sparse")
        compare([dense, sparse], x, num_steps)
        print(
            f"| {share} | {dense.median:.1f} | {sparse.median:.1f} | {sparse.median / dense.median:.2f} | "
            f"{sparse.peak_memory / dense.peak_memory:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
