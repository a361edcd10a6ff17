"""What a trained circuit has learnt, in pictures and tables: clusters, the prior's tree, leaves, growth.

Shapes: P parts (positions), K latent values, D variables of a part, B rows.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvd_lightning import circuits as pc
from lvd_lightning.checks import check_counts
from lvd_lightning.coding.leaf_tables import leaf_table
from lvd_lightning.files import write_atomically
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.runs.pictures import grid, growth_picture, save_image
from lvd_lightning.seeds import generator_for
from lvd_lightning.use.progress import tracked
from lvd_lightning.use.trained import Trained

__all__ = ["Explained", "explain", "latent_shares", "mutual_information"]

#: Rows of evidence that go through the prior together.
_BATCH = 256


@dataclass(frozen=True)
class Explained:
    """shares: p(z_i = k), (P, K). edges: (position, parent, mutual information in bits) of the prior's tree."""

    shares: Tensor
    edges: list[tuple[int, int, float]]


def explain(trained: Trained, out: Path, *, num_clusters: int = 24, num_samples: int = 12, seed: int = 0) -> Explained:
    """Write what the circuit has learnt into a folder.

    `clusters.png`: a row for each of the most frequent latent values, its mean patch, then patches drawn from it.
    `clusters.csv`: every latent value with its circuit and its share of all patches, exact. `tree.png` and `tree.csv`:
    the prior's tree over the grid of patches, lines as thick as the mutual information of their ends, exact.
    `leaves.csv`: of every variable of a patch the family, how many units there are, and how many bits a unit leaves
    open on average, beside those that its values could take. `growth.png`: heads, parameters and likelihood by epoch,
    of a run whose circuits grew. `summary.md` shows all of it.

    Args:
        trained: see `open_trained`.
        out: the folder.
        num_clusters: rows of the picture; num_samples: patches in a row.
        seed: of the patches that are drawn.

    Raises:
        ValueError: a number is out of range.
    """
    check_counts(num_clusters=num_clusters, num_samples=num_samples)
    out.mkdir(parents=True, exist_ok=True)
    circuit = trained.circuit
    shares_PK = latent_shares(circuit).cpu()
    edges = [
        (position, parent, mutual_information(circuit, position, parent))
        for position, parent in tracked(_edges(circuit), "edges", circuit.num_positions - 1)
    ]
    _draw_clusters(trained, shares_PK, out / "clusters.png", num_clusters, num_samples, seed)
    circuit_PK = circuit.head_index.locate(*_every(circuit))[0].cpu()
    rows = [
        (k, int(circuit_PK[0, k]) if circuit.head_index.tied else "", f"{float(shares_PK[:, k].mean()):.6f}")
        for k in shares_PK.mean(0).argsort(descending=True).tolist()
    ]
    write_atomically(out / "clusters.csv", _table(["value", "circuit", "share"], rows))
    write_atomically(
        out / "tree.csv",
        _table(["position", "parent", "mutual_information_bits"], [(i, j, f"{bits:.6f}") for i, j, bits in edges]),
    )
    _draw_tree(trained, edges, out / "tree.png")
    leaves = _leaves(trained)
    write_atomically(out / "leaves.csv", _table(["channel", "row", "column", "family", "units", "bits", "of"], leaves))
    grown = _draw_growth(trained, out / "growth.png")
    write_atomically(out / "summary.md", _summary(trained, shares_PK, edges, leaves, grown))
    return Explained(shares_PK, edges)


def latent_shares(circuit: AssembledCircuit) -> Tensor:
    """p(z_i = k) of every position, (P, K); exact."""
    shape = (1, circuit.num_positions, circuit.num_states)
    return _posteriors(circuit, torch.zeros(shape, dtype=circuit.prior.dtype, device=circuit.prior.device))[0]


def mutual_information(circuit: AssembledCircuit, one: int, other: int) -> float:
    """That of the latent values of two positions under the prior, in bits; exact, one pass for every value of one."""
    shares_PK = latent_shares(circuit)
    size = circuit.num_states
    certain_KPK = torch.zeros(size, circuit.num_positions, size, dtype=circuit.prior.dtype, device=shares_PK.device)
    certain_KPK[:, one] = torch.where(torch.eye(size, dtype=torch.bool, device=shares_PK.device), 0.0, -torch.inf)
    possible_K = shares_PK[one] > 0
    given_KK = torch.zeros(size, size, dtype=torch.float64)
    given_KK[possible_K.cpu()] = _posteriors(circuit, certain_KPK[possible_K])[:, other].cpu().double()
    joint_KK = shares_PK[one].cpu().double()[:, None] * given_KK
    apart_KK = joint_KK.sum(1, keepdim=True) * joint_KK.sum(0)
    terms_KK = torch.where(joint_KK > 0, joint_KK * (joint_KK / apart_KK.clamp_min(1e-300)).log2(), 0.0)
    return max(0.0, float(terms_KK.sum()))


def _posteriors(circuit: AssembledCircuit, evidence_BPK: Tensor) -> Tensor:
    """p(z_i = k | evidence), (B, P, K)."""
    out = []
    for part in evidence_BPK.split(_BATCH):
        evidence = part.clone().requires_grad_()
        with torch.enable_grad():
            total = circuit.prior.log_prob(evidence).sum()
        out.append(torch.autograd.grad(total, evidence)[0])
    return torch.cat(out)


def _edges(circuit: AssembledCircuit) -> list[tuple[int, int]]:
    """(position, parent) of the prior's tree; of a prior without one, neighbours in the order of positions."""
    lookup = circuit.lookup()
    if lookup is not None:
        return [(edge.variable, edge.parent) for edge in lookup.edges if edge.parent >= 0]
    (graph,) = circuit.prior.structures
    above: dict[int, int] = {}
    for v, latent in graph.latents.items():
        for child in graph.nodes[latent].children:
            for below in graph.nodes[child].children:
                above |= {u: v for u, node in graph.latents.items() if node == below}
    return sorted(above.items()) if above else [(i, i - 1) for i in range(1, circuit.num_positions)]


def _every(circuit: AssembledCircuit) -> tuple[Tensor, Tensor]:
    """All latent values of all positions, (1, K) and (P, 1)."""
    device = circuit.prior.device
    return torch.arange(circuit.num_states, device=device)[None], torch.arange(circuit.num_positions, device=device)[
        :, None
    ]


def _draw_clusters(
    trained: Trained, shares_PK: Tensor, path: Path, num_clusters: int, num_samples: int, seed: int
) -> None:
    circuit, index = trained.circuit, trained.circuit.head_index
    position = 0 if index.tied else circuit.num_positions // 2
    share_K = shares_PK.mean(0) if index.tied else shares_PK[position]
    chosen = share_K.argsort(descending=True)[:num_clusters].to(trained.device)
    circuit_N, head_N = index.locate(chosen, torch.full_like(chosen, position))
    conditional, rows = circuit.conditional, []
    generator = generator_for(seed, "explain", device=trained.device)
    for g, head in zip(circuit_N.tolist(), head_N.tolist(), strict=True):
        heads_G = torch.zeros(conditional.num_circuits, dtype=torch.int64, device=trained.device)
        heads_G[g] = head
        nothing = torch.zeros(conditional.num_circuits, 1, conditional.num_variables, device=trained.device)
        mean_D = pc.expectation(
            conditional, lambda values, _: values, x=nothing, observed=nothing.bool(), head=heads_G[:, None]
        )[g]
        drawn_SD = conditional.sample(num_samples, head=heads_G[:, None].expand(-1, num_samples), generator=generator)[
            g
        ]
        shape = (-1, *trained.parts.shape)
        mean, drawn = mean_D.view(shape).cpu(), drawn_SD.view(shape).cpu()
        whole = drawn if drawn.is_floating_point() else drawn.to(torch.int16)
        rows += [trained.codes.to_rgb(mean), trained.codes.to_rgb(whole)]
    save_image(path, grid(torch.cat(rows), num_samples + 1), trained.parts.patch_size)


def _draw_tree(trained: Trained, edges: Sequence[tuple[int, int, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    rows, columns = trained.parts.grid
    figure = Figure(figsize=(1 + 0.6 * columns, 1 + 0.6 * rows), layout="constrained")
    axes = figure.add_subplot()
    most = max((bits for _, _, bits in edges), default=1.0)
    for i, j, bits in edges:
        (y, x), (above, left) = divmod(i, columns), divmod(j, columns)
        axes.plot(
            [x, left], [y, above], color="0.3", linewidth=0.3 + 7 * bits / max(most, 1e-9), solid_capstyle="round"
        )
    place = torch.arange(rows * columns)
    axes.plot(place % columns, place // columns, "o", color="tab:orange", markersize=4)
    axes.set(title=f"mutual information of latent values, at most {most:.2f} bits", aspect="equal")
    axes.invert_yaxis()
    axes.set_axis_off()
    write_atomically(path, figure.savefig)


def _leaves(trained: Trained) -> list[tuple[Any, ...]]:
    """Of every variable of a patch: channel, row, column, family, units, mean entropy of a unit in bits, and of all."""
    graphs = trained.circuit.conditional.to_graph()
    assert isinstance(graphs, list)
    side, found = trained.parts.patch_size, []
    for variable in range(trained.circuit.conditional.num_variables):
        nodes = [node for graph in graphs for node in graph.nodes if node.kind == "input" and node.variable == variable]
        bits: list[Tensor] = []
        for node in nodes:
            if node.distribution is not None and node.params is not None and node.distribution.num_outcomes:
                p = leaf_table(node.distribution, node.params)
                bits.append(-torch.where(p > 0, p * p.clamp_min(1e-300).log2(), 0.0).sum(1))
        families = ", ".join(sorted({type(node.distribution).__name__ for node in nodes}))
        units = sum(node.num_units for node in nodes)
        mean = f"{float(torch.cat(bits).mean()):.3f}" if bits else ""
        channel, place = divmod(variable, side**2)
        of = f"{math.log2(trained.parts.num_categories[channel]):.3f}"
        found.append((channel, place // side, place % side, families, units, mean, of))
    return found


def _draw_growth(trained: Trained, path: Path) -> bool:
    if trained.run is None:
        return False
    data = trained.run.experiment.data()
    tables = [stage.folder / "metrics.csv" for stage in trained.run.stages if stage.is_finished]
    return any(growth_picture(path, table, data) for table in tables if table.is_file())  # type: ignore[arg-type]


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def _summary(
    trained: Trained,
    shares_PK: Tensor,
    edges: Sequence[tuple[int, int, float]],
    leaves: Sequence[tuple[Any, ...]],
    grown: bool,
) -> str:
    share_K = shares_PK.mean(0).double()
    share_K = share_K / share_K.sum()
    used = float((-(share_K * share_K.clamp_min(1e-300).log())).sum().exp())
    heads = [structure.num_heads for structure in trained.circuit.conditional.structures]
    lines = [
        f"# {trained.name}: what it has learnt",
        "",
        f"{trained.circuit.num_states} latent values of a patch in {len(heads)} circuits of {min(heads)} to "
        f"{max(heads)} heads; as evenly used as {used:.1f} values would be. {trained.circuit.num_parameters:,} "
        "parameters.",
        "",
        "## Latent values, the most frequent first: the mean patch, then patches drawn",
        "",
        "![Patches](clusters.png)",
        "",
        "## The prior's tree over the grid of patches, as thick as the mutual information",
        "",
        f"![Tree](tree.png) {sum(bits for _, _, bits in edges):.1f} bits over all edges.",
        "",
        "## Leaves, mean over a channel",
        "",
        "| channel | families | units | bits that a unit leaves open | of |",
        "|---|---|---:|---:|---:|",
    ]
    for channel in sorted({row[0] for row in leaves}):
        rows = [row for row in leaves if row[0] == channel]
        bits = [float(row[5]) for row in rows if row[5]]
        mean = f"{sum(bits) / len(bits):.3f}" if bits else ""
        lines.append(f"| {channel} | {rows[0][3]} | {sum(row[4] for row in rows)} | {mean} | {rows[0][6]} |")
    if grown:
        lines += ["", "## How the circuits grew", "", "![Growth](growth.png)"]
    return "\n".join(lines) + "\n"
