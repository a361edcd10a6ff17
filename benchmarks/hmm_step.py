"""One EM step of a hidden Markov model of words against a forward algorithm under autograd, plain and well written.

    python benchmarks/hmm_step.py                       # K = 64, 256, 1,024, homogeneous and not
    python benchmarks/hmm_step.py --vocabularies        # the same tokens among 5,000 and among 33,278 words
    python benchmarks/hmm_step.py --memory              # one model, K = 256 and 33,278 words: the most memory held

Contenders take the same windows in turn, a step each; medians in milliseconds of a whole step (flows and update).

- "plain": log-space, logsumexp over (B, K, K), dense gradients of log-probabilities, a dense M-step. At K = 1,024 it
  would keep 17 GB for the backward pass, and is left out.
- "written well": a normalised forward variable (B, K), matrix products, emissions looked up as rows of (V, K) with
  sparse gradients. Its M-step moves the rows of words that occurred and nothing else: less than EM asks for.
- "this": `SparseHMM`, by mini-batch EM and by Anemone, exactly.

Shapes: B windows, T positions, S tables (T, or 1), K states, V words.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from lvd_lightning.models.hmm_graph import HMMTables, random_tables
from lvd_lightning.models.hmm_memory import HMMMemory
from lvd_lightning.models.sparse_hmm import SparseHMM, sparse_optimizer

T = 32
STEP_SIZE, PSEUDOCOUNT = 0.1, 1e-3
Step = Callable[[Tensor], Tensor]  # windows (B, T) to log p (B,) before the step


def plain_step(tables: HMMTables) -> Step:
    """Log-space forward algorithm; flows are gradients of log-probabilities."""
    log_tables = [table.log().requires_grad_() for table in vars(tables).values()]
    initial_K, transition_SKK, emission_SKV = log_tables

    def step(x_BT: Tensor) -> Tensor:
        transitions, emissions = transition_SKK.unbind(), emission_SKV.unbind()
        log_BK = initial_K + emissions[0][:, x_BT[:, 0]].T
        for t in range(1, T):
            log_BK = torch.logsumexp(log_BK[:, :, None] + transitions[(t - 1) % len(transitions)], 1)
            log_BK = log_BK + emissions[t % len(emissions)][:, x_BT[:, t]].T
        log_B = log_BK.logsumexp(1)
        log_B.sum().backward()
        with torch.no_grad():
            for table in log_tables:
                flow = table.grad
                assert flow is not None
                found = (flow + PSEUDOCOUNT / flow.shape[-1]) / (flow.sum(-1, keepdim=True) + PSEUDOCOUNT)
                table.copy_(torch.lerp(table.exp(), found, STEP_SIZE).log())
                table.grad = None
        return log_B.detach()

    return step


def written_well_step(tables: HMMTables) -> Step:
    """Scaled forward algorithm with matrix products and sparse look-ups."""
    initial_K, transition_SKK = (table.clone().requires_grad_() for table in (tables.initial_K, tables.transition_SKK))
    emission_SVK = [table_KV.T.contiguous().requires_grad_() for table_KV in tables.emission_SKV]

    def step(x_BT: Tensor) -> Tensor:
        log_B = 0.0
        state_BK: Tensor = initial_K
        for t in range(T):
            rows_BK = functional.embedding(x_BT[:, t], emission_SVK[t % len(emission_SVK)], sparse=True)
            joint_BK = state_BK * rows_BK
            total_B1 = joint_BK.sum(1, keepdim=True)
            log_B = log_B + total_B1[:, 0].log()
            if t + 1 < T:
                state_BK = (joint_BK / total_B1) @ transition_SKK[t % len(transition_SKK)]
        assert isinstance(log_B, Tensor)
        log_B.sum().backward()
        with torch.no_grad():
            for table in (initial_K, transition_SKK):
                assert table.grad is not None
                flow = table * table.grad
                found = (flow + PSEUDOCOUNT / flow.shape[-1]) / (flow.sum(-1, keepdim=True) + PSEUDOCOUNT)
                table.lerp_(found, STEP_SIZE)
                table.grad = None
            for table in emission_SVK:
                assert table.grad is not None
                grad = table.grad.coalesce()
                words = grad.indices()[0]
                flow = table[words] * grad.values()
                table.index_add_(0, words, flow * (STEP_SIZE / (flow.sum(0) + PSEUDOCOUNT)))
                table.grad = None
        return log_B.detach()

    return step


def our_step(tables: HMMTables, rule: str, batch_size: int) -> Step:
    """This library's."""
    model = SparseHMM(tables, T, batch_size, rule)
    optimizer = sparse_optimizer(model, lr=STEP_SIZE, momentum=0.9, pseudocount=PSEUDOCOUNT)

    def step(x_BT: Tensor) -> Tensor:
        log_B = model.add_flows(x_BT)
        optimizer.step()
        optimizer.zero_grad()
        return log_B

    return step


def zipf_windows(count: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Windows whose words come as often as words of a language do, one in their rank; (count, T)."""
    weight_V = 1 / torch.arange(1.0, vocabulary + 1)
    return torch.multinomial(weight_V, count * T, replacement=True, generator=generator).view(count, T)


def in_turn(steps: dict[str, Step], rounds: int, batches: list[Tensor]) -> dict[str, float]:
    """Median milliseconds of a step of each, taken in turn; two rounds to warm up. First likelihoods have to agree."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        first: dict[str, float] = {}
        for name, step in steps.items():
            start = time.perf_counter()
            first[name] = float(step(batches[number % len(batches)]).mean())
            times[name].append(1000 * (time.perf_counter() - start))
        if number == 0 and max(first.values()) - min(first.values()) > 1e-2:
            raise ValueError(f"the contenders disagree on log p: {first}")
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def compare(states: list[int], vocabulary: int, batch_size: int, rounds: int) -> None:
    """The table of all contenders."""
    print("| | K | plain | written well | this, EM | this, Anemone | plain / EM | written well / EM |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    generator = torch.Generator().manual_seed(0)
    batches = list(zipf_windows(8 * batch_size, vocabulary, generator).split(batch_size))
    for homogeneous in (False, True):
        for K in states:
            tables = random_tables(T, K, vocabulary, homogeneous, generator)
            steps = {
                "plain": plain_step(tables) if K <= 256 else None,
                "written well": written_well_step(tables),
                "EM": our_step(tables, "em", batch_size),
                "Anemone": our_step(tables, "anemone", batch_size),
            }
            found = in_turn({name: step for name, step in steps.items() if step}, rounds, batches)
            cells = [f"{found[name]:.1f}" if name in found else "" for name in steps]
            ratios = [f"{found[name] / found['EM']:.1f}" if name in found else "" for name in ("plain", "written well")]
            kind = "homogeneous" if homogeneous else "a table per position"
            print(f"| {kind} | {K:,} | {' | '.join([*cells, *ratios])} |", flush=True)


def compare_vocabularies(K: int, batch_size: int, rounds: int) -> None:
    """Step times with the same tokens among few and many words."""
    generator = torch.Generator().manual_seed(0)
    batches = list(zipf_windows(8 * batch_size, 5000, generator).split(batch_size))
    for homogeneous in (False, True):
        steps = {}
        for vocabulary in (5000, 33_278):
            tables = random_tables(T, K, vocabulary, homogeneous, generator)
            for rule in ("em", "anemone"):
                steps[f"{rule} {vocabulary}"] = our_step(tables, rule, batch_size)
            del tables
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(rounds + 2):
            for name, step in steps.items():
                start = time.perf_counter()
                step(batches[number % len(batches)])
                times[name].append(1000 * (time.perf_counter() - start))
        for rule in ("em", "anemone"):
            few, many = ([*times[f"{rule} {size}"][2:]] for size in (5000, 33_278))
            print(
                f"{'homogeneous' if homogeneous else 'a table per position'}, K {K}, {rule}: median "
                f"{statistics.median(few):.1f} and {statistics.median(many):.1f} ms, ratio "
                f"{statistics.median(many) / statistics.median(few):.2f}; mean {statistics.mean(few):.1f} and "
                f"{statistics.mean(many):.1f} ms, ratio {statistics.mean(many) / statistics.mean(few):.2f}",
                flush=True,
            )


def measure_memory(K: int, batch_size: int, rounds: int) -> None:
    """The most memory that training held, beside the plan; in a fresh process."""
    generator = torch.Generator().manual_seed(0)
    batches = list(zipf_windows(8 * batch_size, 33_278, generator).split(batch_size))
    before = _held("VmRSS")
    step = our_step(random_tables(T, K, 33_278, False, generator), "anemone", batch_size)
    beginning = _held("VmHWM") - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    times = []
    for number in range(rounds + 2):
        start = time.perf_counter()
        step(batches[number % len(batches)])
        times.append(1000 * (time.perf_counter() - start))
    plan = HMMMemory(T, K, 33_278, False, batch_size, "anemone")
    print(
        f"K {K}, 33,278 words, batch {batch_size}, Anemone: {plan.num_parameters:,} parameters, "
        f"{plan.tables / 1e9:.2f} GB; most memory {beginning / 1e9:.2f} GB at the beginning (planned "
        f"{plan.beginning / 1e9:.2f}), {(_held('VmHWM') - before) / 1e9:.2f} GB in steps (planned "
        f"{plan.training / 1e9:.2f}); a step {statistics.median(times[2:]):.0f} ms, mean "
        f"{statistics.mean(times[2:]):.0f} ms"
    )


def _held(key: str) -> int:
    """A figure of this process in bytes, on Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status: has no {key}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--words", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--vocabularies", action="store_true")
    parser.add_argument("--memory", action="store_true")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    if settings.memory:
        measure_memory(256, settings.batch, settings.rounds)
    elif settings.vocabularies:
        compare_vocabularies(256, settings.batch, settings.rounds)
    else:
        compare(settings.states, settings.words, settings.batch, settings.rounds)


if __name__ == "__main__":
    main()
