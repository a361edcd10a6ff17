"""What the gradients of `Circuit.rsample` are worth: bias and variance against the exact gradient, time and memory.

    python benchmarks/estimators.py            # a few minutes on one core
    python benchmarks/estimators.py --quick

Two circuits of four variables with three values each: a hidden Chow-Liu chain and a RAT-SPN of Kronecker products. The
loss is E[f(x)] for a linear and for a nonlinear f of one-hot samples, without evidence and given two of the variables.
The exact gradient for all logits is that of `pc.expected(..., estimator="exact")`. Bias is the distance of the mean
gradient from it, deviation the root of the summed variances of the gradient of one sample, both over the norm of the
exact gradient; what sampling noise adds to the bias is taken off, and told as "noise". With --plot FILE they become a
picture.

Then a forward and a backward pass of a binary tree over 784 variables of 16 values, 64 samples, estimators in turn; and
of an assembled circuit, whose latent values are choices among heads.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measuring import Contender, measure_peak, take_step
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.models.assembled_rsample import rsample
from lvd_lightning.models.reparameterized import reparameterized
from lvd_lightning.parts import ImagePatches

VALUES, VARIABLES = 3, 4
TEMPERATURES = (2.0, 1.0, 0.5, 0.2, 0.1)
#: Samples that every gradient is the mean of; the variance of one sample is that of a gradient times this.
PER_GRADIENT = 500
WEIGHT_DC = torch.linspace(-2, 3, VARIABLES * VALUES, dtype=torch.float64).view(VARIABLES, VALUES).roll(1, 1)


@dataclass
class Figures:
    """Of one estimator at one temperature, relative to the norm of the exact gradient."""

    bias: float
    noise: float
    deviation: float


def linear(onehot: Tensor) -> Tensor:
    """A sum over variables."""
    return (onehot * WEIGHT_DC).sum((-1, -2))


def nonlinear(onehot: Tensor) -> Tensor:
    """Variables together, a smooth function of soft samples as well."""
    return (onehot * WEIGHT_DC).sum((-1, -2)).square() + (onehot[..., 0, :] * onehot[..., -1, :]).sum(-1)


def build_circuits() -> dict[str, pc.Circuit]:
    """The two circuits, in float64."""
    torch.manual_seed(0)
    leaf = pc.Categorical(VALUES)
    rat = pc.rat_spn(VARIABLES, depth=2, num_repetitions=2, num_sums=2, num_leaves=2, leaf=leaf, product="kronecker")
    graphs = {"chain": pc.hclt([-1, 0, 1, 2], 3, leaf), "RAT-SPN, Kronecker": rat}
    return {name: pc.Circuit(graph, parameterization="logits").double() for name, graph in graphs.items()}


def gradient(circuit: pc.Circuit, loss: Tensor) -> Tensor:
    """For all logits, as one row."""
    return torch.cat([found.flatten() for found in torch.autograd.grad(loss, list(circuit.tables))])


def measure(circuit: pc.Circuit, loss: Callable[[torch.Generator], Tensor], exact: Tensor, repeats: int) -> Figures:
    """Mean and variance of `repeats` independent gradients."""
    found = torch.stack([gradient(circuit, loss(torch.Generator().manual_seed(seed))) for seed in range(repeats)])
    noise = float((found.var(0) / repeats).sum())
    distance = float((found.mean(0) - exact).square().sum())
    scale = float(exact.norm())
    deviation = math.sqrt(noise * repeats * PER_GRADIENT)
    return Figures(math.sqrt(max(distance - noise, 0)) / scale, math.sqrt(noise) / scale, deviation / scale)


def estimators(circuit: pc.Circuit, f: Callable[[Tensor], Tensor], given: bool) -> dict[tuple[str, float | None], Any]:
    """Losses that draw `PER_GRADIENT` samples; names and temperatures."""
    x = torch.tensor([[0.0, 2.0, 0.0, 0.0]], dtype=torch.float64).expand(PER_GRADIENT, -1)
    observed = torch.tensor([[True, True, False, False]]).expand(PER_GRADIENT, -1)
    known: dict[str, Any] = {"x": x, "observed": observed} if given else {"n": PER_GRADIENT}
    row: dict[str, Any] = {"x": x[:1], "observed": observed[:1]} if given else {}
    eye = torch.eye(VALUES, dtype=torch.float64)

    def of_values(values: Tensor) -> Tensor:
        return f(eye[values.long()])

    def drawn(**settings: Any) -> Callable[[torch.Generator], Tensor]:
        return lambda generator: f(circuit.rsample(**known, **settings, onehot=True, generator=generator)).mean()

    def score(baseline: bool) -> Callable[[torch.Generator], Tensor]:
        return lambda generator: pc.expected(
            circuit, of_values, num_samples=PER_GRADIENT, baseline=baseline, generator=generator, **row
        ).sum()

    out: dict[tuple[str, float | None], Any] = {
        ("score, no baseline", None): score(baseline=False),
        ("score", None): score(baseline=True),
        ("simple", None): drawn(estimator="simple"),
    }
    for temperature in TEMPERATURES:
        out["straight_through", temperature] = drawn(estimator="straight_through", temperature=temperature)
        out["gumbel, hard", temperature] = drawn(estimator="gumbel", hard=True, temperature=temperature)
        out["gumbel", temperature] = drawn(estimator="gumbel", temperature=temperature)
    out["exact", None] = lambda _: pc.expected(circuit, of_values, estimator="exact", **row).sum()
    return out


def bias_and_variance(repeats: int) -> dict[str, dict[tuple[str, float | None], Figures]]:
    """Prints a table for every circuit, function and evidence, and returns the figures."""
    out = {}
    for name, circuit in build_circuits().items():
        for f in (linear, nonlinear):
            for given in (False, True):
                losses = estimators(circuit, f, given)
                exact = gradient(circuit, losses.pop(("exact", None))(None))
                title = f"{name}, {f.__name__} f, {'two variables given' if given else 'nothing given'}"
                print(f"\n{title}\n\n| estimator | temperature | bias | noise | deviation of a sample |")
                print("|---|---:|---:|---:|---:|")
                out[title] = {}
                for (estimator, temperature), loss in losses.items():
                    found = out[title][estimator, temperature] = measure(circuit, loss, exact, repeats)
                    shown = "" if temperature is None else f"{temperature:g}"
                    print(f"| {estimator} | {shown} | {found.bias:.3f} | {found.noise:.3f} | {found.deviation:.2f} |")
    return out


def plot(figures: dict[str, dict[tuple[str, float | None], Figures]], path: str) -> None:
    """Bias above, deviation below, over temperature; a column for every table of the first circuit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = dict(list(figures.items())[:4])
    figure, axes = pyplot.subplots(2, len(figures), figsize=(3.2 * len(figures), 5.5), sharex=True, sharey="row")
    for column, (title, found) in enumerate(figures.items()):
        for row, quantity in enumerate(("bias", "deviation")):
            axis = axes[row, column]
            for color, estimator in enumerate(dict.fromkeys(name for name, _ in found)):
                points = [(t, getattr(v, quantity)) for (name, t), v in found.items() if name == estimator]
                if points[0][0] is None:
                    axis.axhline(max(points[0][1], 1e-3), color=f"C{color}", linestyle="--", label=estimator)
                else:
                    axis.plot(*zip(*points, strict=True), marker="o", color=f"C{color}", label=estimator)
            axis.set(xscale="log", yscale="log", xlabel="temperature" if row else "")
            if row == 0:
                axis.set_title(title.replace(", ", "\n"), fontsize=8)
                axis.set_ylim(bottom=1e-3)
        axes[0, 0].set_ylabel("bias / exact gradient", fontsize=8)
        axes[1, 0].set_ylabel("deviation of a sample / exact", fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=6, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)


def _contender(name: str, loss: Callable[[Tensor], Tensor], circuit: pc.Circuit) -> Contender:
    """A loss and its gradients."""

    def step(x: Tensor) -> float:
        circuit.zero_grad()
        found = loss(x)
        found.backward()
        return found.item()

    return Contender(name, 1, step, circuit.num_parameters)


def cost(repeats: int) -> None:
    """Time and memory of a forward and a backward pass, estimators in turn."""
    print("\n| 784 variables of 16 values, 64 samples | latents | milliseconds | MiB |\n|---|---:|---:|---:|")
    for num_latents in (8, 16):
        torch.manual_seed(0)
        graph = pc.hclt([-1, *((v - 1) // 2 for v in range(1, 784))], num_latents, pc.Categorical(16))
        circuit = pc.Circuit(graph, parameterization="logits")
        x = torch.randint(0, 16, (64, 784))

        def likelihood(x: Tensor, circuit: pc.Circuit = circuit) -> Tensor:
            with circuit.reference():
                return circuit.log_prob(x).mean()

        losses: dict[str, Callable[[Tensor], Tensor]] = {"log_prob, reference pass": likelihood}
        for estimator in ("simple", "straight_through", "gumbel"):
            losses[estimator] = lambda x, c=circuit, e=estimator: c.rsample(len(x), estimator=e).square().mean()

        losses["score"] = lambda x, c=circuit: pc.expected(c, lambda z: z.square().mean(1), num_samples=len(x))

        contenders = [_contender(name, loss, circuit) for name, loss in losses.items()]
        for found in contenders:
            measure_peak(found, x)
        for _ in range(repeats):
            for found in contenders:
                take_step(found, x)
        for found in contenders:
            median = 1000 * statistics.median(found.times)
            print(f"| {found.name} | {num_latents} | {median:.0f} | {found.peak_memory:.0f} |")


def cost_of_assembled(repeats: int) -> None:
    """The same of samples of an assembled circuit: 64 images of 16 patches of 12 variables, trees with 8 latents."""
    print("\n| 16 patches of 12 variables, 64 samples | heads | milliseconds | MiB |\n|---|---:|---:|---:|")
    for num_states in (64, 256):
        torch.manual_seed(0)
        prior = pc.hclt([-1, *((p - 1) // 2 for p in range(1, 16))], 16, pc.SoftEvidence(num_states))
        graphs = [pc.hclt([-1, *range(11)], 8, pc.DiscretizedLogistic(256)) for _ in range(num_states)]
        plain = AssembledCircuit(pc.Circuit(prior), pc.Circuit(graphs), ImagePatches((3, 8, 8), 2))
        circuit = reparameterized(plain, "logits")
        contenders = []
        for estimator in ("simple", "straight_through", "gumbel"):

            def step(x: Tensor, circuit: AssembledCircuit = circuit, estimator: str = estimator) -> float:
                circuit.zero_grad()
                found = rsample(circuit, 64, estimator=estimator).square().mean()
                found.backward()
                return found.item()

            contenders.append(Contender(estimator, 1, step, circuit.num_parameters))
        nothing = torch.empty(0)
        for found in contenders:
            measure_peak(found, nothing)
        for _ in range(repeats):
            for found in contenders:
                take_step(found, nothing)
        for found in contenders:
            median = 1000 * statistics.median(found.times)
            print(f"| {found.name} | {num_states} | {median:.0f} | {found.peak_memory:.0f} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats: does it run")
    parser.add_argument("--plot", metavar="FILE", help="where to put the picture")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    figures = bias_and_variance(10 if options.quick else 100)
    if options.plot:
        plot(figures, options.plot)
    cost(1 if options.quick else 5)
    cost_of_assembled(1 if options.quick else 5)


if __name__ == "__main__":
    main()
