"""What pruned units save: a training step of a circuit of which half the units are gone against the dense one.

    python benchmarks/sparsity.py            # HCLT-256, and 64 folded HCLT-16: a few minutes on two cores
    python benchmarks/sparsity.py --quick    # fewer repetitions and variables

Every unit of a latent is given up with probability one half: nothing leads to it any more, the flows of a batch show
it, and `pc.prune` with threshold 0 removes it. So every node has a width of its own. A step is forward, backward and
update (Anemone) on 256 examples of 256 categories, per circuit, drawn from the circuit itself. The steps of both are
interleaved in one process; figures are medians and the ratio of medians. "padded / live" is what is stored and computed
over what is live, in rows of values (per example) and in edges of sums. Memory is the peak beyond what was there before
the first two steps: gradients, the optimizer's state, and buffers, on Linux.
"""

import argparse
import os
import platform

import torch
from measuring import Contender, measure_peak, take_step
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine.sparse import Layout

NUM_CATEGORIES, BATCH_SIZE = 256, 256


class Trained:
    """A circuit, or several folded ones, in training by Anemone, and what it takes."""

    def __init__(self, name: str, graphs: list[pc.CircuitGraph], layout: Layout = "auto") -> None:
        self.graphs = graphs
        self.circuit = pc.Circuit(graphs, layout=layout)
        self.optimizer = pc.Anemone(self.circuit)
        # Not per circuit: what all of them together take.
        self.figures = Contender(name, 1, self.step, self.circuit.num_parameters)

    def step(self, x: Tensor) -> float:
        """Forward, backward, update."""
        self.optimizer.zero_grad()
        loss = -self.circuit.log_prob(x, head=0).sum()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def padding(self) -> tuple[float, float]:
        """Rows of inner units and edges of sums that are computed, over those that are live."""
        nodes = [node for graph in self.graphs for node in graph.nodes]
        live_rows = sum(node.num_units for node in nodes if node.kind == "product")
        live_edges = sum(node.weight.numel() for node in nodes if node.weight is not None)
        layers = self.circuit.plan.layers
        rows = sum(len(layer.nodes) * layer.inner_units for layer in layers)
        edges = sum(len(layer.nodes) * layer.inner_units * layer.outer_units for layer in layers)
        return rows / live_rows, edges / live_edges


def random_tree(num_variables: int, generator: torch.Generator) -> Tensor:
    """Every variable hangs on one of the ten before it."""
    parents = [int(torch.randint(max(0, v - 10), v, (1,), generator=generator)) for v in range(1, num_variables)]
    return torch.tensor([-1, *parents])


def give_up_half(graph: pc.CircuitGraph, generator: torch.Generator) -> None:
    """Take all weight from a random half of the units of every latent."""
    for node in graph.nodes:
        if node.weight is not None:
            keep = torch.rand(node.weight.shape[1], generator=generator) < 0.5
            keep[0] = True
            node.weight = node.weight * keep / (node.weight * keep).sum(1, keepdim=True)


def make_pair(num_circuits: int, num_latents: int, num_variables: int) -> tuple[Trained, Trained, Tensor]:
    """A dense batch of HCLTs, the same with half of the units pruned, and examples (circuits, batch, variables)."""
    generator = torch.Generator().manual_seed(0)
    leaf = pc.Categorical(NUM_CATEGORIES)
    graphs = [
        pc.hclt(random_tree(num_variables, generator), num_latents, leaf, generator=generator)
        for _ in range(num_circuits)
    ]
    dense = Trained("dense", graphs)
    x = dense.circuit.sample(BATCH_SIZE, generator=generator)
    emptied = dense.circuit.to_graph()
    assert isinstance(emptied, list)
    for graph in emptied:
        give_up_half(graph, generator)
    circuit = pc.Circuit(emptied)
    flows = pc.Flows(circuit)
    flows.add(x)
    pruned = pc.prune(circuit, flows, threshold=0.0)
    assert isinstance(pruned, list)
    return dense, Trained("half pruned", pruned), x


def compare(title: str, num_circuits: int, num_latents: int, num_variables: int, num_steps: int) -> list[str]:
    """Rows of a Markdown table."""
    dense, pruned, x = make_pair(num_circuits, num_latents, num_variables)
    contenders = (dense.figures, pruned.figures)
    for contender in contenders:
        measure_peak(contender, x)
    for _ in range(num_steps):
        for contender in contenders:
            take_step(contender, x)
    rows = []
    for this in (dense, pruned):
        padded_rows, padded_edges = this.padding()
        figures, first = this.figures, dense.figures
        rows.append(
            f"| {title} | {figures.name} | {figures.num_parameters:,} | {len(this.circuit.plan.layers)} | "
            f"{padded_rows:.2f} | {padded_edges:.2f} | {figures.median:.1f} | {figures.median / first.median:.2f} | "
            f"{figures.peak_memory:.0f} | {figures.peak_memory / first.peak_memory:.2f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and variables")
    parser.add_argument("--threads", type=int, default=2)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    num_variables, num_steps = (12, 7) if settings.quick else (48, 25)
    columns = ("", "", "parameters", "layers", "rows padded / live", "edges padded / live", "ms per step", "ratio")
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {settings.threads} threads\n")
    print(f"| {' | '.join((*columns, 'MiB of a step', 'ratio'))} |\n| --- | --- |" + " ---: |" * len(columns))
    for title, num_circuits, num_latents in (("HCLT-256", 1, 256), ("64 folded HCLT-16", 64, 16)):
        print("\n".join(compare(title, num_circuits, num_latents, num_variables, num_steps)), flush=True)


if __name__ == "__main__":
    main()
