"""Steps of conditional circuits on several processes: circuits divided over them, or data; memory and time.

    OMP_NUM_THREADS=1 python benchmarks/sharding.py --ranks 2

Every process has circuits, flows and averages as the stage "conditional" has; patches are random. Both settings are
timed in turn, step by step, on all processes at once, which share the machine. Prints medians and their ratio.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

import lvd_lightning.circuits as pc
from lvd_lightning.models.members import Members, balanced_owners, circuit_cost
from lvd_lightning.models.shared_routing import route_batch
from lvd_lightning.ranks import highest, leave, rank_and_size
from lvd_lightning.shares import part_order
from lvd_lightning.traffic import TRAFFIC

DIMS, CATEGORIES = 48, 256


def circuits(numbers: list[int], num_units: int) -> pc.Circuit:
    """The circuits of these numbers, each a function of its own."""
    graphs = []
    for g in numbers:
        generator = torch.Generator().manual_seed(g)
        tree = torch.arange(-1, DIMS - 1)
        graphs.append(pc.hclt(tree, num_units, pc.Categorical(CATEGORIES), generator=generator))
    return pc.Circuit(graphs)


def bytes_of(circuit: pc.Circuit, optimizer: pc.Anemone) -> int:
    """Of parameters, flows and averages."""
    tables = sum(table.nbytes + (table.nbytes if table.grad is None else table.grad.nbytes) for table in circuit.tables)
    return tables + sum(state["flow"].nbytes for state in optimizer.state.values())


def step_of(members: Members, num_units: int, batch: int, sharded: bool) -> tuple[pc.Circuit, Callable[[], int]]:
    """Circuits of this process, and a function that takes a step and returns the bytes that they take after it."""
    rank, size = rank_and_size()
    everything = members.num_circuits
    own = members.own.tolist() if sharded else list(range(everything))
    circuit = circuits(own, num_units)
    optimizer = pc.Anemone(circuit, shared=not sharded)
    drawn = torch.Generator().manual_seed(0)
    x_ND = torch.randint(CATEGORIES, (batch, DIMS), generator=drawn)
    circuit_N = torch.randint(everything, (batch,), generator=drawn)
    if not sharded:
        x_ND, circuit_N = x_ND[rank::size], circuit_N[rank::size]

    def step() -> int:
        routed = route_batch(
            circuit_N, everything, slots=1.5, order=part_order(len(x_ND), 1), generator=drawn, whole=sharded
        )
        routed = routed.of(members.own) if sharded else routed
        log_GS = circuit.log_prob(x_ND[routed.index], head=0, wanted=routed.weight > 0)
        (-(routed.weight * log_GS).sum()).backward()
        optimizer.step()
        taken = bytes_of(circuit, optimizer)
        optimizer.zero_grad()
        return taken

    return circuit, step


def measure(rank: int, size: int, chosen: argparse.Namespace, port: int) -> None:
    """On one process."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    cost = circuit_cost(circuits([0], chosen.units).structures[0])
    members = Members(balanced_owners([cost] * chosen.circuits, size), (1,) * chosen.circuits)
    ways = {name: step_of(members, chosen.units, chosen.batch, name == "circuits")[1] for name in ("data", "circuits")}
    times: dict[str, list[float]] = {name: [] for name in ways}
    held, sent = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    for turn in range(chosen.steps + 2):
        for name, step in ways.items():
            if size > 1:
                dist.barrier()
            start, before = time.perf_counter(), TRAFFIC.num_bytes
            held[name] = step()
            sent[name] = TRAFFIC.num_bytes - before
            if turn >= 2:  # the first ones make buffers
                # A step is over when the slowest process is.
                times[name].append(highest([int(1e9 * (time.perf_counter() - start))])[0] / 1e9)
    most = {name: highest([held[name]])[0] for name in ways}
    if rank == 0:
        print(f"{size} processes, {chosen.circuits} circuits of {chosen.units} units, {chosen.batch} patches a step")
        for name in ways:
            middle = 1e3 * statistics.median(times[name])
            print(f"{name:>9}: {most[name] / 1e6:8.1f} MB a process, {middle:7.1f} ms, {sent[name] / 1e6:6.1f} MB sent")
        ratio = statistics.median(a / b for a, b in zip(times["circuits"], times["data"], strict=True))
        print(f"circuits over data, step by step: {ratio:.2f} of the time")
    if size > 1:
        leave()


def main() -> int:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("circuits", 64), ("units", 16), ("batch", 4096), ("steps", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    port = 20000 + os.getpid() % 20000
    children = []
    for rank in range(chosen.ranks):
        child = os.fork()
        if child == 0:
            measure(rank, chosen.ranks, chosen, port)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main())
