"""One EM step on a GPU: plain operations, fused kernels in every precision, CUDA graphs, PyJuice 2.6.3.

    python benchmarks/gpu.py                         # a GPU with 80 GB: about a quarter of an hour, mostly set-up
    python benchmarks/gpu.py --latents 64            # one width
    python benchmarks/gpu.py --tune                  # other tile sizes first; the best goes on
    python benchmarks/gpu.py --device cpu --small    # no GPU: a minute; says what it cannot measure

A step is forward, backward and update (mini-batch EM) of an HCLT over 32x32x3 categorical(256) variables, crops of the
photographs that come with scikit-learn. All contenders have the same parameters when errors are measured (PyJuice gets
the graph by `pc.to_pyjuice`) and train side by side in one process, their steps in turn, timed by CUDA events; figures
are medians. PyJuice multiplies in bfloat16 unless told `force_use_fp32`; both are measured, with its own CUDA graphs.

Errors are those of log-likelihoods against float64 on the same parameters and examples. Floors are what a step must
move, at the rate at which this device copies, and what it must multiply, at the rate of its `torch.bmm`.

Without a GPU the effect of TF32 and bfloat16 is measured all the same: operands of matrix products are rounded to them.

Needs `pip install lvd-lightning[pyjuice]`; without PyJuice its rows are left out.
"""

import argparse
import contextlib
import copy
import itertools
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from floors import Step, Work, copy_rate, matmul_rate, timed, two_digits
from roofline import PLANNED, compared, launches_of
from rounding import Error, emulated_errors, error_of, error_table
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from sklearn.datasets import load_sample_images
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine.kernels import triton as triton_kernels

NUM_CATEGORIES, CHANNELS = 256, 3
STEP_SIZE, PSEUDOCOUNT = 0.1, 0.01
#: EM steps before errors are measured: random parameters would be too easy.
NUM_FIRST_STEPS = 5
NUM_ERROR_EXAMPLES = 64


@dataclass
class Contender:
    """Something that trains, and its figures; `step` None: it could not be set up, and `note` says why."""

    name: str
    step: Step | None = None
    log_prob: Callable[[Tensor], Tensor] | None = None
    note: str = ""
    times: list[float] = field(default_factory=list)  # seconds
    launches: int | None = None
    error: Error | None = None

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.times) if self.times else math.nan


# Data and circuits.


def load_crops(side: int, num_crops: int) -> Tensor:
    """Random crops, shape (num_crops, side * side * 3)."""
    rng = np.random.default_rng(0)
    images = load_sample_images().images
    out = np.empty((num_crops, side, side, CHANNELS), dtype=np.int64)
    for row in out:
        image = images[rng.integers(len(images))]
        y, x = (rng.integers(0, size - side) for size in image.shape[:2])
        row[:] = image[y : y + side, x : x + side]
    return torch.from_numpy(out.reshape(num_crops, -1))


def grid_tree(x: Tensor, side: int) -> Tensor:
    """Parents of the variables in the tree of most correlated neighbours (in space or colour), rooted in the middle."""
    number = np.arange(side * side * CHANNELS, dtype=np.int32).reshape(side, side, CHANNELS)
    pairs = [(number[1:], number[:-1]), (number[:, 1:], number[:, :-1]), (number[..., 1:], number[..., :-1])]
    a, b = (np.concatenate([pair[end].ravel() for pair in pairs]) for end in (0, 1))
    values = x.double().numpy()
    values = (values - values.mean(0)) / values.std(0).clip(1e-6)
    correlation = np.abs((values[:, a] * values[:, b]).mean(0))
    graph = coo_array((2.0 - correlation, (a, b)), shape=(number.size, number.size))
    tree = minimum_spanning_tree(graph.tocsr())
    _, parents = breadth_first_order(tree, number[side // 2, side // 2, 0], directed=False)
    return torch.from_numpy(np.where(parents < 0, -1, parents).astype(np.int64))


def first_circuit(x: Tensor, tree: Tensor, num_latents: int, batch_size: int, device: torch.device) -> pc.Circuit:
    """An HCLT in single precision after some EM steps."""
    generator = torch.Generator().manual_seed(0)
    circuit = pc.Circuit(pc.hclt(tree, num_latents, pc.Categorical(NUM_CATEGORIES), generator=generator))
    circuit = circuit.float().to(device)
    step = em_step(circuit, 0.5)
    for number in range(NUM_FIRST_STEPS):
        step(draw(x, number, batch_size))
    return circuit


def em_step(circuit: pc.Circuit, lr: float = STEP_SIZE) -> Step:
    optimizer = pc.CircuitEM(circuit, lr=lr, pseudocount=PSEUDOCOUNT)

    def step(batch: Tensor) -> None:
        optimizer.zero_grad()
        (-circuit.log_prob(batch, head=0).sum()).backward()
        optimizer.step()

    return step


def draw(x: Tensor, number: int, size: int) -> Tensor:
    """The examples of a step: the next ones, in a circle."""
    return x[(torch.arange(size, device=x.device) + number * size) % len(x)]


# Contenders.


@contextlib.contextmanager
def setting(circuit: pc.Circuit, precision: str | None) -> Iterator[None]:
    """The fused kernels in a precision; None: PyTorch operations."""
    before = circuit.matmul_precision
    circuit.matmul_precision = precision or before
    try:
        with triton_kernels.switched(precision is not None):
            yield
    finally:
        circuit.matmul_precision = before


def ours(circuit: pc.Circuit, precision: str | None) -> Contender:
    """This library; all rows share one circuit, so that memory does not limit them."""
    step = em_step(circuit)

    def run(batch: Tensor) -> None:
        with setting(circuit, precision):
            step(batch)

    def log_prob(batch: Tensor) -> Tensor:
        with setting(circuit, precision), torch.no_grad():
            return circuit.log_prob(batch, head=0)

    name = "ours, PyTorch operations" if precision is None else f"ours, fused, {precision}"
    return Contender(name, run, log_prob)


def ours_graphed(circuit: pc.Circuit, precision: str, batch: Tensor) -> Contender:
    """The same as one CUDA graph: captured once, replayed on a batch that is copied to where it was."""
    step, place = em_step(circuit), batch.clone()
    graph = torch.cuda.CUDAGraph()
    with setting(circuit, precision):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(place)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            step(place)
    # The graph has their addresses: they must not be freed, whatever the circuit does with them.
    kept = (list(circuit.engine.pool.free), [table.grad for table in circuit.tables])

    def run(batch: Tensor, kept: object = kept) -> None:
        place.copy_(batch)
        graph.replay()

    return Contender(f"ours, fused, {precision}, CUDA graph", run)


def juice(circuit: pc.Circuit, exact: bool, device: torch.device) -> Contender:
    """PyJuice with the parameters that our circuit has now."""
    import pyjuice

    root = pc.to_pyjuice(circuit)
    model = pyjuice.compile(root, verbose=False)
    model.to(device)

    def run(batch: Tensor) -> None:
        with torch.no_grad():
            model(batch, force_use_fp32=exact, record_cudagraph=True)
            model.backward(batch, flows_memory=0.0, force_use_fp32=exact, record_cudagraph=True)
            model.mini_batch_em(step_size=STEP_SIZE, pseudocount=PSEUDOCOUNT)

    def log_prob(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return model(batch, force_use_fp32=exact, apply_cudagraph=False)[:, 0]

    return Contender(f"PyJuice {'float32' if exact else 'as it comes (bf16)'}", run, log_prob)


def attempt(name: str, make: Callable[[], Contender]) -> Contender:
    """A contender, or why there is none."""
    try:
        return make()
    except Exception as error:  # no memory, no compiler, a version that does not fit: the others go on
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        first = str(error).splitlines()[0][:100] if str(error) else ""
        return Contender(name, note=f"{type(error).__name__}: {first}")


# Figures.


def measure(contenders: list[Contender], x: Tensor, batch_size: int, num_steps: int) -> None:
    """Time the steps of all contenders in turn, after three that do not count."""
    for number in range(num_steps + 3):
        for this in contenders:
            if this.step is None:
                continue
            try:
                seconds = timed(this.step, draw(x, number, batch_size))
            except Exception as error:
                this.step, this.note = None, f"{type(error).__name__}: {str(error)[:100]}"
                continue
            if number >= 3:
                this.times.append(seconds)


def count_launches(step: Step, batch: Tensor) -> int:
    """Kernels that a step starts, copies and fills included."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step(batch)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def kernel_times(step: Step, batch: Tensor) -> dict[str, float]:
    """Seconds on the device that a step spends in each kernel."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step(batch)
        torch.cuda.synchronize()
    on_device = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {event.key: event.self_device_time_total / 1e6 for event in on_device}


def exact_log_prob(circuit: pc.Circuit, x: Tensor) -> Tensor:
    """In double precision, a few examples at a time."""
    double = copy.deepcopy(circuit).double()
    with torch.no_grad():
        return torch.cat([double.log_prob(part, head=0) for part in x.split(16)])


# Reports.


def floor_table(circuit: pc.Circuit, contenders: list[Contender], num_latents: int, batch_size: int) -> list[str]:
    device, work = circuit.device, Work.of(circuit, batch_size)
    bandwidth = copy_rate(device)
    precisions = ("ieee", "tf32", "bf16") if device.type == "cuda" else ("ieee",)
    lines = [
        f"A step moves {work.num_bytes / 1e9:.2f} GB, {1000 * work.num_bytes / bandwidth:.2f} ms at the "
        f"{bandwidth / 1e9:.0f} GB/s of a copy, and multiplies {work.flops / 1e9:.1f} GFLOP:",
        "",
        "| | TFLOP/s of torch.bmm | ms for the products | larger floor, ms | fastest step / floor |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for precision in precisions:
        rate = matmul_rate(device, num_latents, batch_size, precision)
        floor = max(work.num_bytes / bandwidth, work.flops / rate)
        same = [this.median for this in contenders if this.times and (f", {precision}" in this.name)]
        ratio = min(same) / floor if same else math.nan
        products = f"{1000 * work.flops / rate:.2f}"
        lines.append(f"| {precision} | {rate / 1e12:.3g} | {products} | {1000 * floor:.2f} | {two_digits(ratio)} |")
    return lines


def time_table(contenders: list[Contender], batch_size: int, num_vars: int) -> list[str]:
    reference = next((this for this in contenders if this.name.startswith("PyJuice as") and this.times), None)
    figures = ("ms per step", "samples per second", "PyJuice / this", "launches")
    errors = ("error: largest, nats", "mean, nats", "mean, bpd", "flows")
    lines = [f"| | {' | '.join((*figures, *errors))} |", "| --- |" + " ---: |" * 8]
    for this in contenders:
        if this.step is None:
            lines.append(f"| {this.name} | not measured: {this.note} |" + " |" * 7)
            continue
        ratio = reference.median / this.median if reference else math.nan
        error = this.error.cells(num_vars) if this.error else "as above | | | "
        lines.append(
            f"| {this.name} | {1000 * this.median:.2f} | {batch_size / this.median:,.0f} | {two_digits(ratio)} | "
            f"{'' if this.launches is None else this.launches} | {error} |"
        )
    return lines


def on_gpu(x: Tensor, tree: Tensor, num_latents: int, settings: argparse.Namespace) -> list[str]:
    """All contenders at one width."""
    device, size = x.device, settings.batch_size
    circuit = first_circuit(x, tree, num_latents, size, device)
    contenders = [ours(circuit, None)]
    if triton_kernels.applies(circuit.device, circuit.dtype):
        if settings.tune:
            tune(circuit, x, size)
        contenders += [ours(circuit, precision) for precision in triton_kernels.PRECISIONS]
    else:
        contenders.append(Contender("ours, fused", note="the kernels do not work here, see the warning"))
    contenders += [
        attempt(f"PyJuice, {'float32' if exact else 'bf16'}", lambda exact=exact: juice(circuit, exact, device))
        for exact in (False, True)
    ]
    examples = x[:NUM_ERROR_EXAMPLES]
    exact = exact_log_prob(circuit, examples)
    for this in contenders:
        if this.log_prob is not None:
            try:
                this.error = error_of(this.log_prob(examples), exact)
            except Exception as error:
                this.step, this.note = None, f"{type(error).__name__}: {str(error)[:100]}"
    if triton_kernels.applies(circuit.device, circuit.dtype):
        batch = draw(x, 0, size)
        contenders += [
            attempt(
                f"ours, fused, {precision}, CUDA graph",
                lambda precision=precision: ours_graphed(circuit, precision, batch),
            )
            for precision in triton_kernels.PRECISIONS
        ]
    measure(contenders, x, size, settings.steps)
    for this in contenders:
        if this.step is not None and "graph" not in this.name:
            this.launches = count_launches(this.step, draw(x, 0, size))
    circuit.check_inputs()
    levels = f"{circuit.plan.num_levels} levels, {len(circuit.plan.layers)} sum layers"
    title = f"## {num_latents} latents, batch {size}: {circuit.num_parameters:,} parameters, {levels}"
    floors = floor_table(circuit, contenders, num_latents, size)
    return [title, "", *time_table(contenders, size, x.shape[1]), "", *floors, "", *kernel_tables(circuit, x, size)]


def kernel_tables(circuit: pc.Circuit, x: Tensor, size: int) -> list[str]:
    """What the profiler measures for every kernel beside what `roofline.py` expects, for two precisions."""
    if not triton_kernels.applies(circuit.device, circuit.dtype):
        return []
    launches, name = list(launches_of(circuit.plan, PLANNED, size)), torch.cuda.get_device_name(x.device)
    lines = []
    for precision in ("ieee", "tf32"):
        step = ours(circuit, precision).step
        assert step is not None
        measured = kernel_times(step, draw(x, 0, size))
        lines += [f"Kernels, {precision}:", "", *compared(measured, launches, precision, name), ""]
    return lines


def tune(circuit: pc.Circuit, x: Tensor, size: int) -> None:
    """Try tile sizes with TF32 and keep the fastest."""
    from lvd_lightning.circuits.engine.kernels.triton import passes

    found: list[tuple[float, passes.Tiles]] = []
    for units, columns, depth, warps, stages in itertools.product((64, 128), (64, 128), (32, 64), (4, 8), (2, 3)):
        passes.TILES = passes.Tiles(units, columns, depth, warps, stages)
        this = attempt(str(passes.TILES), lambda: ours(circuit, "tf32"))
        measure([this], x, size, 5)
        print(f"{passes.TILES}: {1000 * this.median:.2f} ms {this.note}", flush=True)
        if this.times:
            found.append((this.median, passes.TILES))
    passes.TILES = min(found, key=lambda pair: pair[0])[1] if found else passes.Tiles()


def on_cpu(x: Tensor, tree: Tensor, num_latents: int, settings: argparse.Namespace) -> list[str]:
    """What can be said without a GPU: that the benchmark runs, and what fewer bits do."""
    circuit = first_circuit(x, tree, num_latents, settings.batch_size, x.device)
    size = settings.batch_size
    contenders = [ours(circuit, None)]
    contenders[0].name = "ours, CPU"
    exact = exact_log_prob(circuit, x[:NUM_ERROR_EXAMPLES])
    contenders[0].error = error_of(contenders[0].log_prob(x[:NUM_ERROR_EXAMPLES]), exact)
    errors = emulated_errors(circuit, x[:NUM_ERROR_EXAMPLES])
    why = "needs a GPU"
    contenders += [Contender(f"ours, fused, {precision}", note=why) for precision in triton_kernels.PRECISIONS]
    contenders += [Contender("ours, fused, CUDA graph", note=why), Contender("PyJuice", note=f"{why} to compile")]
    measure(contenders, x, size, settings.steps)
    title = f"## {num_latents} latents, {x.shape[1]} variables, batch {size}"
    return [
        *(title, "", *time_table(contenders, size, x.shape[1]), ""),
        *(*floor_table(circuit, contenders, num_latents, size), ""),
        *("Operands of matrix products rounded on the CPU, products and sums in float32:", ""),
        *(*error_table(errors, x.shape[1]), ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="few variables, latents, examples and steps")
    parser.add_argument("--latents", type=int, nargs="+", help="widths; 64 256 512 unless small")
    parser.add_argument("--side", type=int, help="of the crops; 32 unless small: 3,072 variables")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int, help="that are timed")
    parser.add_argument("--tune", action="store_true", help="try tile sizes before measuring")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    settings = parser.parse_args()
    small, device = settings.small, torch.device(settings.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    latents = settings.latents or ([8, 16] if small else [64, 256, 512])
    side = settings.side or (8 if small else 32)
    settings.batch_size = settings.batch_size or (64 if small else 256)
    settings.steps = settings.steps or (10 if small else 30)
    torch.manual_seed(0)
    x = load_crops(side, 8 * settings.batch_size)
    tree = grid_tree(x, side)
    x = x.to(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, no GPU"
    machine = f"{name}, torch {torch.__version__}"
    lines = ["# One EM step on a GPU", "", machine, ""]
    run = on_gpu if device.type == "cuda" else on_cpu
    for num_latents in latents:
        part = run(x, tree, num_latents, settings)
        print("\n".join(part), flush=True)
        lines += part
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if settings.output is not None:
        settings.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
