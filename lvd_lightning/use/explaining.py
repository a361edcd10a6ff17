"""What a trained circuit has learnt, in pictures and tables: clusters, the prior's tree, leaves, growth.

Shapes: P parts (positions), K latent values, B rows.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvd_lightning.checks import check_counts
from lvd_lightning.files import write_atomically
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.runs.pictures import growth_picture
from lvd_lightning.use.explained_heads import HeadTree, draw_heads, heads_of
from lvd_lightning.use.explained_leaves import LEAF_COLUMNS, LeafUnits, draw_leaves, leaf_lines, leaf_rows, leaf_units
from lvd_lightning.use.explained_patches import draw_clusters
from lvd_lightning.use.folders import check_place
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

    `clusters.png`: a row for each of the most frequent latent values, its mean patch, training patches of it that the
    run kept, patches drawn from it. `clusters.csv`: every latent value with its circuit and its share of all patches,
    exact. `tree.png` and `tree.csv`: the prior's tree over the grid of patches, lines as thick as the mutual
    information of their ends, exact. `leaves.csv`: of every variable of a patch the family, how many units there are,
    and how many bits a unit leaves open on average, beside those that its values could take; `leaves.png`: where the
    units of each channel sit, how wide they are, and what they leave open. `heads.png` and `heads.csv`: which head grew
    from which, and when, of circuits that grew; `growth.png`: heads, parameters and likelihood by epoch. `summary.md`
    shows all of it, and says what was not recorded.

    Args:
        trained: see `open_trained`.
        out: the folder.
        num_clusters: rows of the picture; num_samples: patches of each kind in a row.
        seed: of the patches that are drawn.

    Raises:
        ValueError: a number is out of range, or a file of the run is damaged.
    """
    check_counts(num_clusters=num_clusters, num_samples=num_samples)
    check_place(out)
    out.mkdir(parents=True, exist_ok=True)
    circuit = trained.circuit
    shares_PK = latent_shares(circuit).cpu()
    edges = [
        (position, parent, mutual_information(circuit, position, parent))
        for position, parent in tracked(_edges(circuit), "edges", circuit.num_positions - 1)
    ]
    position = 0 if circuit.head_index.tied else circuit.num_positions // 2
    share_K = shares_PK.mean(0) if circuit.head_index.tied else shares_PK[position]
    values = share_K.argsort(descending=True)[:num_clusters].tolist()
    shares = share_K[values].tolist()
    kept = draw_clusters(trained, values, shares, position, out / "clusters.png", num_samples, seed)
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
    leaves = leaf_units(trained)
    write_atomically(out / "leaves.csv", _table(LEAF_COLUMNS, leaf_rows(leaves)))
    leaves_drawn = draw_leaves(leaves, out / "leaves.png")
    lines = [
        *_cluster_lines(trained, shares_PK, None if circuit.head_index.tied else position, kept),
        *_tree_lines(edges),
        *_leaf_section(leaves, leaves_drawn),
        *_growth_lines(trained, out),
    ]
    write_atomically(out / "summary.md", "\n".join(lines) + "\n")
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


def _cluster_lines(trained: Trained, shares_PK: Tensor, position: int | None, kept: bool) -> list[str]:
    share_K = shares_PK.mean(0).double()
    share_K = share_K / share_K.sum()
    used = float((-(share_K * share_K.clamp_min(1e-300).log())).sum().exp())
    heads = [structure.num_heads for structure in trained.circuit.conditional.structures]
    where = "" if position is None else f" of patch {position}"
    lines = [
        f"# {trained.name}: what it has learnt",
        "",
        f"{trained.circuit.num_states} latent values of a patch in {len(heads)} circuits of {min(heads)} to "
        f"{max(heads)} heads; as evenly used as {used:.1f} values would be. {trained.circuit.num_parameters:,} "
        "parameters.",
        "",
        f"## Latent values{where}, the most frequent first",
        "",
        "![Patches](clusters.png)",
        "",
    ]
    if kept:
        return [
            *lines,
            "The share of all patches, the mean patch, training patches of the value, patches drawn from it.",
        ]
    why = "an exported folder has none" if trained.run is None else "the run kept none: it is older than such files"
    return [*lines, f"The share of all patches, the mean patch, patches drawn from it. No training patches: {why}."]


def _tree_lines(edges: Sequence[tuple[int, int, float]]) -> list[str]:
    return [
        "",
        "## The prior's tree over the grid of patches, as thick as the mutual information",
        "",
        f"![Tree](tree.png) {sum(bits for _, _, bits in edges):.1f} bits over all edges.",
    ]


def _leaf_section(leaves: Sequence[LeafUnits], drawn: bool) -> list[str]:
    lines = ["", "## What the leaves of each family have learnt, over all units of a channel", "", *leaf_lines(leaves)]
    return [*lines, "", "![Leaves](leaves.png)"] if drawn else lines


def _growth_lines(trained: Trained, out: Path) -> list[str]:
    """What is told of growth, after its pictures were drawn."""
    lines = ["", "## How the circuits grew", ""]
    tree = heads_of(trained)
    if tree is not None and any(head.parent is not None for heads in tree[0].heads for head in heads):
        tree[0].write(out, tree[1])
        lines += _head_lines(tree, draw_heads(trained, tree, out / "heads.png"))
    elif tree is not None or trained.circuit.conditional.num_heads == 1:
        lines.append("They did not: every head is one that its circuit began with.")
    else:
        lines.append(
            "Which head grew from which was not recorded: the run is older than that record, or its circuits were "
            "edited by other means."
        )
    if _draw_growth(trained, out / "growth.png"):
        lines += ["", "![Heads, parameters and likelihood by epoch](growth.png)"]
    return lines


def _head_lines(tree: HeadTree, drawn: Sequence[int]) -> list[str]:
    ancestry = tree[0]
    first = sum(head.parent is None for heads in ancestry.heads for head in heads)
    grown = sum(any(head.parent is not None for head in heads) for heads in ancestry.heads)
    deepest = max(max(ancestry.depths(g)) for g in range(len(ancestry.heads)))
    depth = "one copy" if deepest == 1 else f"{deepest} copies"
    return [
        f"{first} heads became {sum(ancestry.num_heads)}: {grown} of {len(ancestry.heads)} circuits grew, the longest "
        f"line is {depth} deep. Shown are {len(drawn)} circuits, those with the most training patches; a line "
        "is as thick as its head's share of them. [heads.csv](heads.csv) has all.",
        "",
        "![Which head grew from which](heads.png)",
    ]
