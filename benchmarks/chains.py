"""How long deep circuits take to build and to train: chains of latents, by length.

    python benchmarks/chains.py                         # 625 to 10,000 variables
    python benchmarks/chains.py --lengths 1000 2000

Every level of a chain has one node, so that nothing can be folded: it is the worst case for what is done per layer.
Figures are seconds of processor time in this process, which other jobs on the machine do not add to, the least of
`--repeats`, and milliseconds per variable, which stay the same where the time is linear in the length.
"""

import argparse
import itertools
import time

import torch

import lvd_lightning.circuits as pc


def measure(length: int, num_latents: int, batch_size: int) -> list[float]:
    """Seconds for the graph, the circuit, its first EM step and another one."""
    tree, x = torch.arange(-1, length - 1), torch.randint(0, 4, (batch_size, length))
    start = time.process_time()
    graph = pc.hclt(tree, num_latents, pc.Categorical(4))
    marks = [start, time.process_time()]
    circuit = pc.Circuit(graph).float()
    marks.append(time.process_time())
    optimizer = pc.CircuitEM(circuit, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (-circuit.log_prob(x, head=0).sum()).backward()
        optimizer.step()
        marks.append(time.process_time())
    return [after - before for before, after in itertools.pairwise(marks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[625, 1250, 2500, 5000, 10000])
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    measure(50, settings.latents, settings.batch_size)  # kernels are compiled or loaded
    print("| variables | graph, s | circuit, s | first step, s | next step, s | ms per variable to build |")
    print("| ---: |" + " ---: |" * 5)
    for length in settings.lengths:
        found = [measure(length, settings.latents, settings.batch_size) for _ in range(settings.repeats)]
        least = [min(part) for part in zip(*found)]
        cells = " | ".join(f"{seconds:.2f}" for seconds in least)
        print(f"| {length:,} | {cells} | {1e3 * sum(least[:2]) / length:.2f} |", flush=True)


if __name__ == "__main__":
    main()
