"""What each GPU kernel of an EM step must move and multiply, and how long that takes at least; needs no GPU.

    python benchmarks/roofline.py                          # the circuits of gpu.py, float32, on an H100 and an H200
    python benchmarks/roofline.py --precision tf32 --latents 256
    python benchmarks/roofline.py --side 8                 # smaller pictures

The circuit is that of `gpu.py`: an HCLT over 32x32x3 categorical(256) variables, of which only the plan is made, with
two units a node: those of wider ones are counted from it. For every kernel of `engine/kernels/triton` the bytes of its
buffers, each read or written once, the multiplications and additions of its products, and its launches are added up
over the layers. A launch takes at least

    max(bytes / bandwidth, FLOP / rate, LAUNCH seconds),

and a step the sum of them: kernels follow each other. `re-read` is what the tiles of `passes.TILES` ask the caches for,
over what is in memory: a kernel that takes that many times as long has had no help from them. `gpu.py` prints what the
profiler measures for the same kernels beside these times.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine.kernels.triton.passes import MOVED, TILES
from lvd_lightning.circuits.engine.plan import Gather, Plan, compile_plan

#: Seconds that a launch takes in a CUDA graph, whatever it does.
LAUNCH = 2e-6
FLOAT, INT = 4, 8
#: Units of the nodes of the plan that is counted.
PLANNED = 2


@dataclass
class Device:
    """Peak rates by the maker's data sheet: bytes/s, and FLOP/s of dense products by precision."""

    name: str
    bandwidth: float
    rates: dict[str, float]


HOPPER = {"ieee": 67e12, "tf32x3": 494e12 / 3, "tf32": 494e12, "bf16": 989e12}
DEVICES = [Device("H100 SXM", 3.35e12, HOPPER), Device("H200", 4.8e12, HOPPER)]


@dataclass
class Launch:
    """One launch of a kernel."""

    kernel: str
    num_bytes: float
    flops: float = 0.0
    asked: float = 0.0  # bytes that the tiles ask for; 0: as many

    def seconds(self, device: Device, precision: str) -> float:
        """At least."""
        return max(self.num_bytes / device.bandwidth, self.flops / device.rates[precision], LAUNCH)


def launches_of(plan: Plan, num_latents: int, batch: int) -> Iterator[Launch]:
    """All launches of a step of `CircuitEM`, as `triton/passes.py` and `triton/updates.py` make them.

    `plan` has PLANNED units wherever there are to be `num_latents`.
    """

    def widened(units: int) -> int:
        return num_latents if units == PLANNED else units

    def rows(gather: Gather | None, folds: int, units: int) -> int:
        found = folds * units if gather is None else len(gather.first) + sum(len(slot.src) for slot in gather.more)
        return found * widened(units) // units

    for leaf in plan.inputs:
        folds, units = len(leaf.nodes), widened(leaf.num_units)
        values, table = FLOAT * folds * units * batch, FLOAT * folds * units * leaf.distribution.size
        x, pulled = INT * folds * batch, FLOAT * batch * rows(leaf.gradient, folds, leaf.num_units)
        yield Launch("look_up", x + min(table, 8 * values) + values)
        yield Launch("zero", table)
        yield Launch("backward_table", x + pulled + min(3 * table, 24 * values))
    for layer in plan.layers:
        folds, outer, inner = len(layer.nodes), widened(layer.outer_units), widened(layer.inner_units)
        above, below = FLOAT * folds * outer * batch, FLOAT * folds * inner * batch
        weights, peak = FLOAT * folds * outer * inner, FLOAT * folds * batch
        flops = 2.0 * folds * outer * inner * batch
        read = FLOAT * batch * rows(layer.inputs, folds, layer.inner_units)
        pulled = FLOAT * batch * rows(layer.gradient, folds, layer.outer_units)
        by_outer, by_inner, by_batch = (math.ceil(n / size) for n, size in _tiles(outer, inner, batch))
        yield Launch("multiply", read + below + peak, asked=(1 + (inner > MOVED)) * read + below + peak)
        results = 2 * above
        yield Launch("mix", below + peak + weights + results, flops, by_outer * below + by_batch * weights + results)
        yield Launch("mend_sums", 0)
        yield Launch("pull", pulled + 2 * above)
        asked = by_inner * above + by_batch * weights + 2 * below
        yield Launch("backward_inner", above + weights + 2 * below, flops, asked)
        yield Launch("mend_inner", 0)
        yield Launch("backward_weight", above + below + weights, flops, by_inner * above + by_outer * below + weights)
        yield Launch("mend_weight", 0)
    for group in plan.groups:
        units, alternatives = (widened(size) for size in group.shape)
        table = FLOAT * len(group.owners) * units * alternatives
        yield Launch("step_of_parameters", 3 * table)


def _tiles(outer: int, inner: int, batch: int) -> list[tuple[int, int]]:
    return [(outer, TILES.units), (inner, TILES.units), (batch, TILES.columns)]


def table(launches: list[Launch], precision: str) -> list[str]:
    """A Markdown table, a line per kernel and one for the step."""
    names = list(dict.fromkeys(launch.kernel for launch in launches))
    devices = " | ".join(f"{device.name}, ms" for device in DEVICES)
    lines = [f"| kernel | launches | GB | re-read | GFLOP | {devices} |", "| --- |" + " ---: |" * (4 + len(DEVICES))]
    for name in [*names, "the step"]:
        own = [launch for launch in launches if name in (launch.kernel, "the step")]
        num_bytes, flops = sum(launch.num_bytes for launch in own), sum(launch.flops for launch in own)
        asked = sum(launch.asked or launch.num_bytes for launch in own)
        times = " | ".join(f"{1e3 * sum(one.seconds(device, precision) for one in own):.2f}" for device in DEVICES)
        ratio = f"{asked / num_bytes:.1f}" if asked > num_bytes else ""
        lines.append(f"| {name} | {len(own)} | {num_bytes / 1e9:.2f} | {ratio} | {flops / 1e9:.1f} | {times} |")
    return lines


def compared(measured: dict[str, float], launches: list[Launch], precision: str, name: str) -> list[str]:
    """A Markdown table of what a profiler measured, kernel by kernel (seconds), against the least possible.

    The device is the one whose model is in `name`; for others the first one stands in.
    """
    device = next((known for known in DEVICES if known.name.split()[0] in name), DEVICES[0])
    lines = [f"| kernel | measured, ms | at least on {device.name}, ms | ratio |", "| --- | ---: | ---: | ---: |"]
    for kernel in dict.fromkeys(launch.kernel for launch in launches):
        least = sum(launch.seconds(device, precision) for launch in launches if launch.kernel == kernel)
        if kernel in measured:
            ratio = measured[kernel] / least
            lines.append(f"| {kernel} | {1e3 * measured[kernel]:.3f} | {1e3 * least:.3f} | {ratio:.1f} |")
    rest = sum(seconds for kernel, seconds in measured.items() if kernel not in {one.kernel for one in launches})
    return [*lines, f"| everything else | {1e3 * rest:.3f} | | |"]


def plan_of(side: int) -> Plan:
    """The plan of `gpu.py`'s circuit, with PLANNED units a node."""
    import gpu

    tree = gpu.grid_tree(gpu.load_crops(side, 2048), side)
    return compile_plan([pc.hclt(tree, PLANNED, pc.Categorical(gpu.NUM_CATEGORIES))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--precision", choices=list(HOPPER), default="ieee")
    settings = parser.parse_args()
    torch.manual_seed(0)
    plan = plan_of(settings.side)
    for num_latents in settings.latents:
        launches = list(launches_of(plan, num_latents, settings.batch_size))
        levels = f"{plan.num_levels} levels, {len(plan.layers)} layers"
        what = f"batch {settings.batch_size}, {settings.precision}: {levels}"
        print(
            "\n".join([f"## {num_latents} latents, {what}", "", *table(launches, settings.precision), ""]), flush=True
        )


if __name__ == "__main__":
    main()
