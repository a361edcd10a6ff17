"""Processor time of EM steps of two checkouts of this library, a few steps of one and then of the other.

    git worktree add ../old 731a764
    python benchmarks/in_turn.py ../old .                               # CircuitEM on one circuit
    python benchmarks/in_turn.py ../old . --rule Anemone
    python benchmarks/in_turn.py ../old . --circuits 40 --batch 64      # folded

Each checkout has a process of its own with one thread, and the same HCLT of 48 variables on a random tree. Printed are
medians in microseconds of forward pass, backward pass, update, zero_grad and the whole step, and their ratios, the
second checkout over the first. On a busy machine one checkout against itself is up to 1.02 or so: repeat it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

STEPS_IN_A_ROW, ROUNDS_TO_WARM_UP = 4, 3

WORKER = """
import json, sys, time
import torch
import lvd_lightning.circuits as pc
torch.set_num_threads(1)
rule, (units, batch, circuits) = sys.argv[1], map(int, sys.argv[2:])
generator = torch.Generator().manual_seed(0)
graphs = []
for _ in range(circuits):
    tree = torch.tensor([-1] + [int(torch.randint(v, (1,), generator=generator)) for v in range(1, 48)])
    graphs.append(pc.hclt(tree, units, pc.Categorical(256), generator=generator))
circuit = pc.Circuit(graphs if circuits > 1 else graphs[0])
x = torch.randint(256, (batch, 48) if circuits == 1 else (circuits, batch, 48), generator=generator)
optimizer, now = getattr(pc, rule)(circuit), time.thread_time
for line in sys.stdin:
    found = []
    for _ in range(int(line)):
        times = [now()]
        loss = -circuit.log_prob(x, head=0).sum()
        for part in (lambda: None, loss.backward, optimizer.step, optimizer.zero_grad):
            part()
            times.append(now())
        found.append([b - a for a, b in zip([times[0], *times[1:-1]], times[1:])] + [times[-1] - times[0]])
    print(json.dumps(found), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs=2)
    parser.add_argument("--rule", choices=("CircuitEM", "Anemone"), default="CircuitEM")
    parser.add_argument("--units", type=int, default=16)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--circuits", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=250)
    settings = parser.parse_args()
    sizes = [str(size) for size in (settings.units, settings.batch, settings.circuits)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, settings.rule, *sizes],
            cwd=folder,  # where Python looks first
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for folder in settings.checkouts
    ]
    times: list[list[list[float]]] = [[], []]
    for number in range(settings.rounds + ROUNDS_TO_WARM_UP):
        for which in (0, 1) if number % 2 else (1, 0):
            given, told = processes[which].stdin, processes[which].stdout
            assert given is not None
            assert told is not None
            print(STEPS_IN_A_ROW, file=given, flush=True)
            found = json.loads(told.readline())
            if number >= ROUNDS_TO_WARM_UP:
                times[which] += found
    for process in processes:
        process.communicate()
    medians = [[1e6 * statistics.median(column) for column in zip(*rows, strict=True)] for rows in times]
    for folder, row in zip(settings.checkouts, medians, strict=True):
        print(f"{folder}: " + ", ".join(f"{value:.0f}" for value in row))
    print("ratios: " + ", ".join(f"{new / old:.3f}" for old, new in zip(*medians, strict=True)))


if __name__ == "__main__":
    main()
