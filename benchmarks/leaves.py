"""What families of leaves cost: a training step of folded circuits with tables and with discretised logistics.

    python benchmarks/leaves.py                 # 64 folded HCLT-16 over 48 variables: a minute
    python benchmarks/leaves.py --latents 32

A step is forward, backward and update (Anemone) on 64 examples of 256 values per circuit. "logistic, general pass" is
what leaves took that no compiled kernel knew: logarithms, by PyTorch. The contenders take turns in one process; figures
are medians and their ratios to the tables.
"""

import argparse

import torch
from measuring import Contender, take_step
from torch import Tensor

import lvd_lightning.circuits as pc

CIRCUITS, EXAMPLES, VARIABLES, VALUES = 64, 64, 48, 256


def contender(name: str, leaf: pc.Distribution, num_latents: int, is_linear: bool = True) -> Contender:
    """Folded circuits in training."""
    parents = [-1, *((v - 1) // 2 for v in range(1, VARIABLES))]
    graphs = [pc.hclt(parents, num_latents, leaf, generator=torch.Generator().manual_seed(g)) for g in range(CIRCUITS)]
    circuit = pc.Circuit(graphs)
    circuit.engine.is_linear = is_linear
    optimizer = pc.Anemone(circuit)

    def step(x: Tensor) -> float:
        optimizer.zero_grad()
        loss = -circuit.log_prob(x, head=0).sum()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Contender(name, 1, step, circuit.num_parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=16, help="states of every hidden variable")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    contenders = [
        contender("tables", pc.Categorical(VALUES), arguments.latents),
        contender("logistic", pc.DiscretizedLogistic(VALUES), arguments.latents),
        contender("logistic, general pass", pc.DiscretizedLogistic(VALUES), arguments.latents, is_linear=False),
    ]
    generator = torch.Generator().manual_seed(0)
    for number in range(arguments.steps + 2):
        level = torch.randint(VALUES, (CIRCUITS, EXAMPLES, 1), generator=generator)
        noise = torch.randint(-20, 21, (CIRCUITS, EXAMPLES, VARIABLES), generator=generator)
        x = (level + noise).clamp(0, VALUES - 1)
        for one in contenders:
            take_step(one, x)
            if number < 2:
                one.times.clear()  # buffers are made
    print(f"{'':24} {'parameters':>12} {'ms a step':>10} {'ratio':>6}")
    for one in contenders:
        ratio = one.median / contenders[0].median
        print(f"{one.name:24} {one.num_parameters:12,} {one.median:10.1f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
