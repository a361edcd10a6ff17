"""What folding is worth, and how the time of an EM step grows: with units, batch, number of circuits and depth.

    python benchmarks/folding.py                  # a few minutes on two cores; on a GPU if there is one
    python benchmarks/folding.py --circuits 40    # in small

First 400 circuits over 4x4x3 patches (48 categorical(256) variables, 16 latents, each with a tree of its own) as one
folded circuit, against a loop over 400 single ones of the same library, the steps of both in turn; figures are medians
and their ratio. Then where the time of a step goes, and plots of it over one size at a time, with the rate of the
matrix products that a step needs (three per edge and example) beside that of one large product on the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter
from torch import Tensor

import lvd_lightning.circuits as pc

NUM_VARIABLES, NUM_CATEGORIES = 48, 256


def random_tree(num_variables: int, generator: torch.Generator) -> Tensor:
    """Every variable hangs on an earlier one: ragged depths, as real trees have."""
    return torch.tensor([-1] + [int(torch.randint(v, (1,), generator=generator)) for v in range(1, num_variables)])


def chains(num_variables: int, depth: int) -> Tensor:
    """As many chains below one root as this depth needs; one at most for depth = num_variables."""
    v = torch.arange(num_variables)
    return torch.where((v - 1) % (depth - 1) == 0, 0, v - 1).index_fill_(0, torch.tensor(0), -1)


def make_step(circuit: pc.Circuit, x: Tensor) -> Callable[[], None]:
    """Forward, backward and update by mini-batch EM."""
    optimizer = pc.CircuitEM(circuit)

    def step() -> None:
        (-circuit.log_prob(x, head=0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def median_seconds(steps: list[Callable[[], None]], repetitions: int, device: torch.device) -> list[float]:
    """Medians over steps taken in turn, after two that do not count."""
    times: list[list[float]] = [[] for _ in steps]
    for number in range(repetitions + 2):
        for step, found in zip(steps, times, strict=True):
            spent = seconds(step, device)
            if number >= 2:
                found.append(spent)
    return [statistics.median(found) for found in times]


def phases(num_units: int, batch: int, device: torch.device) -> list[float]:
    """Median seconds of the forward pass, the backward pass and the update of one circuit."""
    generator = torch.Generator().manual_seed(0)
    leaf = pc.Categorical(NUM_CATEGORIES)
    tree = random_tree(NUM_VARIABLES, generator)
    circuit = pc.Circuit(pc.hclt(tree, num_units, leaf, generator=generator)).to(device)
    x = torch.randint(NUM_CATEGORIES, (batch, NUM_VARIABLES), generator=generator).to(device)
    optimizer, loss = pc.CircuitEM(circuit), torch.zeros(())

    def forward() -> None:
        nonlocal loss
        optimizer.zero_grad()
        loss = -circuit.log_prob(x, head=0).sum()

    return median_seconds([forward, lambda: loss.backward(), optimizer.step], 25, device)


def folded_against_loop(num_circuits: int, num_units: int, batch: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a step of all circuits: folded, and one after the other."""
    generator = torch.Generator().manual_seed(0)
    graphs = [
        pc.hclt(random_tree(NUM_VARIABLES, generator), num_units, pc.Categorical(NUM_CATEGORIES), generator=generator)
        for _ in range(num_circuits)
    ]
    x = torch.randint(NUM_CATEGORIES, (num_circuits, batch, NUM_VARIABLES), generator=generator).to(device)
    whole = make_step(pc.Circuit(graphs).to(device), x)
    single = [make_step(pc.Circuit(graph).to(device), x[g]) for g, graph in enumerate(graphs)]

    def loop() -> None:
        for step in single:
            step()

    one, many = median_seconds([whole, loop], 7, device)
    return one, many


def scaling(device: torch.device, threads: int, path: Path) -> list[str]:
    """Plot step times over four sizes; returns rows of a table."""
    generator = torch.Generator().manual_seed(0)
    ragged, base = random_tree(NUM_VARIABLES, generator), {"units": 32, "batch": 256, "circuits": 1}
    sweeps = {
        "units": (8, 16, 32, 64, 128, 256),
        "batch": (32, 64, 128, 256, 512, 1024),
        "circuits": (1, 4, 16, 64),
        "depth": (6, 12, 24, 48),
    }
    figure, axes = pyplot.subplots(1, len(sweeps), figsize=(14, 3.2), constrained_layout=True)
    rows = []
    peak = matmul_rate(device)
    for axis, (name, values) in zip(axes, sweeps.items(), strict=True):
        found = []
        for value in values:
            size = {**base, name: value}
            tree = ragged if name != "depth" else chains(NUM_VARIABLES, value)
            graphs = [
                pc.hclt(tree, size["units"], pc.Categorical(NUM_CATEGORIES), generator=generator)
                for _ in range(size["circuits"])
            ]
            shape = (size["circuits"], size["batch"], NUM_VARIABLES)
            x = torch.randint(NUM_CATEGORIES, shape, generator=generator).to(device)
            (spent,) = median_seconds([make_step(pc.Circuit(graphs).to(device), x)], 9, device)
            products = 6 * (NUM_VARIABLES - 1) * size["units"] ** 2 * size["batch"] * size["circuits"]
            found.append(1000 * spent)
            rows.append(f"| {name} | {value} | {1000 * spent:.2f} | {products / spent / 1e9:.1f} | {peak / 1e9:.0f} |")
        axis.loglog(values, found, marker="o")
        axis.set_xlabel({"circuits": "folded circuits"}.get(name, name))
        axis.set_xticks(values, [str(value) for value in values])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(0.7 * min(found), 1.5 * max(found))
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel(f"ms per EM step, {device.type}, {threads} thread(s)")
    figure.savefig(path, dpi=110)
    return rows


def matmul_rate(device: torch.device) -> float:
    """Operations per second of one large matrix product in single precision."""
    a, b = (torch.rand(2048, 2048, device=device) for _ in range(2))
    out = torch.empty_like(a)

    def step() -> None:
        torch.mm(a, b, out=out)

    (spent,) = median_seconds([step], 5, device)
    return 2 * 2048**3 / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--circuits", type=int, default=400)
    parser.add_argument("--units", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("scaling.png"))
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    one, many = folded_against_loop(settings.circuits, settings.units, settings.batch, device)
    print(
        f"{settings.circuits} circuits, {settings.units} latents, {settings.batch} examples each: folded "
        f"{1000 * one:.0f} ms a step, one after the other {1000 * many:.0f} ms, ratio {many / one:.1f}"
    )
    print("\n| units | forward | backward | update |\n| ---: | ---: | ---: | ---: |")
    for num_units in (16, 64, 256):
        found = phases(num_units, 256, device)
        print(f"| {num_units} | " + " | ".join(f"{100 * part / sum(found):.0f} %" for part in found) + " |")
    print("\n| over | value | ms per step | GFLOP/s of the step's products | of one large product |")
    print("| --- | ---: | ---: | ---: | ---: |")
    print("\n".join(scaling(device, settings.threads, settings.plot)))


if __name__ == "__main__":
    main()
