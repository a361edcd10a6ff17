"""Mean test log-likelihood on four binary data sets: an HCLT, a mixture of HCLTs and a RAT-SPN, trained by Anemone.

    python benchmarks/debd.py --data PATH      # PATH/nltcs/nltcs.train.data, .valid.data, .test.data and so on

The data are the "DEBD" sets (Lowd and Davis 2010; Haaren and Davis 2012): rows of 0 and 1, comma-separated. Step sizes
fall linearly; the epoch that is best on validation counts, and the test set is looked at for that one alone. Published
figures stand beside ours: HCLT with 12 latents and 4 trees (mean of five seeds), RAT-SPN, and the two learners of
structure LearnSPN and ID-SPN.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lvd_lightning.circuits as pc

#: Nats; HCLT, RAT-SPN, LearnSPN, ID-SPN.
PUBLISHED = {
    "nltcs": (-6.00, -6.01, -6.11, -6.02),
    "plants": (-14.26, -13.44, -12.99, -12.54),
    "accidents": (-26.74, -35.49, -30.04, -26.98),
    "dna": (-79.06, -97.23, -82.52, -81.21),
}
SPLITS = ("train", "valid", "test")
NUM_LATENTS, NUM_TREES = 12, 4
#: Learning by Anemone: step size of the first and of the last step, images per step, pseudocount in samples.
FIRST_LR, LAST_LR, BATCH_SIZE, PSEUDOCOUNT = 0.4, 0.1, 200, 0.003


def load(folder: Path, name: str) -> dict[str, Tensor]:
    """The three splits of a set, int64 (N, D)."""
    found = {}
    for split in SPLITS:
        path = folder / name / f"{name}.{split}.data"
        if not path.is_file():
            raise ValueError(
                f"--data: there is no {path}; expected a folder with {name}/{name}.{{train,valid,test}}.data"
            )
        found[split] = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.int64))
    return found


def hclt(x: Tensor, generator: torch.Generator) -> pc.CircuitGraph:
    """One tree."""
    return pc.hclt(pc.chow_liu_tree(x, max_examples=None), NUM_LATENTS, pc.Bernoulli(), generator=generator)


def hclt_mixture(x: Tensor, generator: torch.Generator) -> pc.CircuitGraph:
    """The tree of all examples, and trees of as many drawn with replacement."""
    samples = [x] + [x[torch.randint(len(x), (len(x),), generator=generator)] for _ in range(NUM_TREES - 1)]
    return pc.mixture([hclt(sample, generator) for sample in samples], generator=generator)


def rat_spn(x: Tensor, generator: torch.Generator) -> pc.CircuitGraph:
    """Random region splits: ten repetitions, three levels."""
    return pc.rat_spn(
        x.shape[1], depth=3, num_repetitions=10, num_sums=16, num_leaves=16, leaf=pc.Bernoulli(), generator=generator
    )


MODELS: dict[str, Callable[[Tensor, torch.Generator], pc.CircuitGraph]] = {
    "HCLT": hclt,
    f"{NUM_TREES} HCLTs": hclt_mixture,
    "RAT-SPN": rat_spn,
}


def train(circuit: pc.Circuit, data: dict[str, Tensor], epochs: int, generator: torch.Generator) -> float:
    """Train; returns the mean test log-likelihood of the epoch that was best on validation, in nats."""
    optimizer = pc.Anemone(circuit, lr=FIRST_LR, pseudocount=PSEUDOCOUNT)
    x, best, kept = data["train"], -float("inf"), copy.deepcopy(circuit.state_dict())
    steps, done = epochs * -(-len(x) // BATCH_SIZE), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH_SIZE):
            optimizer.param_groups[0]["lr"] = FIRST_LR + (LAST_LR - FIRST_LR) * done / steps
            (-circuit.log_prob(x[rows], head=0).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
        found = mean_log_prob(circuit, data["valid"])
        if found > best:
            best, kept = found, copy.deepcopy(circuit.state_dict())
    circuit.load_state_dict(kept)
    return mean_log_prob(circuit, data["test"])


@torch.no_grad()
def mean_log_prob(circuit: pc.Circuit, x: Tensor) -> float:
    return float(torch.cat([circuit.log_prob(part, head=0) for part in x.split(1000)]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    lines = [
        f"# Binary density estimation: mean test log-likelihood in nats, {arguments.epochs} epochs, "
        f"{arguments.seeds} seed(s)",
        "",
        "| set | model | parameters | ours | published HCLT | RAT-SPN | LearnSPN | ID-SPN | seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines))
    for name in arguments.sets:
        data = load(arguments.data, name)
        for model in arguments.models:
            start, found, size = time.monotonic(), [], 0
            for seed in range(arguments.seeds):
                generator = torch.Generator().manual_seed(seed)
                circuit = pc.Circuit(MODELS[model](data["train"], generator))
                found.append(train(circuit, data, arguments.epochs, generator))
                size = circuit.num_parameters
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            published = " | ".join(f"{figure:.2f}" for figure in PUBLISHED[name])
            seconds = (time.monotonic() - start) / arguments.seeds
            lines.append(
                f"| {name} | {model} | {size:,} | {statistics.mean(found):.2f}{spread} | {published} | {seconds:.0f} |"
            )
            print(lines[-1], flush=True)
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
