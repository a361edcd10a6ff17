"""What is told of a circuit, against enumeration of its latent values."""

import csv
import itertools
from pathlib import Path

import pytest
import torch
from helpers.assemblies import STATES, assembly
from helpers.trained_runs import HEADS, trained_run
from matplotlib.image import imread

import lvd_lightning.circuits as pc
from lvd_lightning.files import write_tensors
from lvd_lightning.growing import Ancestry
from lvd_lightning.latents.kept_patches import PATCHES_FILE
from lvd_lightning.use.explained_leaves import leaf_lines, leaf_units
from lvd_lightning.use.explained_patches import drawn_patches, mean_patches
from lvd_lightning.use.explaining import explain, latent_shares, mutual_information
from lvd_lightning.use.exporting import export
from lvd_lightning.use.trained import Trained, open_trained

Z = torch.tensor(list(itertools.product(range(STATES), repeat=4)))


@pytest.mark.parametrize("num_latents", [None, 2])
def test_shares_and_mutual_information(num_latents: int | None) -> None:
    circuit = assembly("tied", num_latents).circuit
    p = circuit.prior_log_prob(Z).detach().double().exp()
    shares = latent_shares(circuit)
    for position, value in itertools.product(range(4), range(STATES)):
        assert float(shares[position, value]) == pytest.approx(float(p[Z[:, position] == value].sum()), abs=1e-6)
    for one, other in ((1, 0), (3, 1)):
        joint = torch.zeros(STATES, STATES, dtype=torch.float64)
        joint.index_put_((Z[:, one], Z[:, other]), p, accumulate=True)
        expected = (joint * (joint / (joint.sum(1, keepdim=True) * joint.sum(0))).log2()).sum()
        assert mutual_information(circuit, one, other) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("color", ["ycocg_r", "grey"])
def test_files_say_what_was_found(tmp_path: Path, color: str) -> None:
    trained = trained_run(tmp_path / "run", color, side=8, patch=4)
    found = explain(trained, tmp_path / "out", num_samples=3)
    assert sorted((i, j) for i, j, _ in found.edges) == [(1, 0), (2, 0), (3, 1)]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{name}.{kind}" for name in ("clusters", "tree", "leaves") for kind in ("png", "csv")} | {
        "summary.md"
    }
    rows = list(csv.DictReader((tmp_path / "out" / "clusters.csv").open()))
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-4)
    assert sorted(int(row["circuit"]) for row in rows) == [0, 0, 1]
    assert len(rows) == sum(HEADS)
    leaves = list(csv.DictReader((tmp_path / "out" / "leaves.csv").open()))
    assert len(leaves) == (16 if color == "grey" else 48)
    assert all(row["family"] == "DiscretizedLogistic" and 0 < float(row["bits"]) < float(row["of"]) for row in leaves)
    for name in ("clusters", "tree", "leaves"):
        assert imread(tmp_path / "out" / f"{name}.png").std() > 0
    said = (tmp_path / "out" / "summary.md").read_text()
    assert "No training patches: the run kept none" in said
    assert "Which head grew from which was not recorded" in said


def grown_run(folder: Path) -> Trained:
    """A run whose stage of conditionals left the tree of its heads, and training patches: flat ones, light or dark."""
    trained = trained_run(folder, "grey", side=8, patch=4)
    config = folder / "config.yaml"
    stage = "stages: {conditional: {model: {class_path: lvd_lightning.stages.ConditionalStudent}}, "
    config.write_text(config.read_text().replace("stages: {", stage))
    (folder / "conditional").mkdir()
    (folder / "conditional" / "done.json").write_text("{}")
    (folder / "conditional" / "latents.json").write_text("{}")
    Ancestry.first([1, 1]).grown([[0], []], epoch=3).write(folder / "conditional", [[30, 10], [5]])
    patches = torch.full((3, 16), 16, dtype=torch.uint8)
    tensors = {"patch": patches, "value": torch.tensor([0, 0, 2]), "position": torch.zeros(3)}
    write_tensors(folder / "conditional" / PATCHES_FILE, tensors)
    return open_trained(trained.folder)


def test_growth_and_training_patches(tmp_path: Path) -> None:
    """Both are told of a run that recorded them; what is exported has the tree of heads and no data."""
    trained = grown_run(tmp_path / "run")
    explain(trained, tmp_path / "out", num_samples=3)
    said = (tmp_path / "out" / "summary.md").read_text()
    assert "2 heads became 3: 1 of 2 circuits grew, the longest line is one copy deep" in said
    assert "No training patches" not in said
    assert Ancestry.read(tmp_path / "out") == Ancestry.read(tmp_path / "run" / "conditional")
    assert imread(tmp_path / "out" / "heads.png").std() > 0
    export(trained, tmp_path / "exported")
    assert not (tmp_path / "exported" / PATCHES_FILE).exists()
    explain(open_trained(tmp_path / "exported"), tmp_path / "again", num_samples=3)
    said = (tmp_path / "again" / "summary.md").read_text()
    assert "2 heads became 3" in said
    assert "No training patches: an exported folder has none" in said


def test_mean_and_drawn_patches_are_those_of_their_heads(tmp_path: Path) -> None:
    """Heads in any order, several of one circuit."""
    trained = trained_run(tmp_path / "run", "grey", side=8, patch=4)
    circuit_V, head_V = torch.tensor([1, 0, 0]), torch.tensor([0, 1, 0])
    mean_V = mean_patches(trained, circuit_V, head_V)
    drawn = drawn_patches(trained, circuit_V, head_V, 4000, 0).double().mean(1).unflatten(0, (3, 4000)).mean(1)
    torch.testing.assert_close(drawn, mean_V.double().mean(1), atol=6, rtol=0)
    assert (mean_V[0].double() - mean_V[1].double()).abs().mean() > 12


def test_leaves_are_told_by_family(tmp_path: Path) -> None:
    """Moments of the units against sums over the values; every unit is counted."""
    trained = trained_run(tmp_path / "run", "ycocg_r", side=8, patch=4)
    found = leaf_units(trained)
    assert [(leaf.channel, leaf.row, leaf.column) for leaf in found[15:18]] == [(0, 3, 3), (1, 0, 0), (1, 0, 1)]
    graphs = trained.circuit.conditional.to_graph()
    nodes = [node for graph in graphs for node in graph.nodes if node.kind == "input" and node.variable == 17]
    params = torch.cat([node.params for node in nodes])
    value = torch.arange(511).double()
    p = pc.DiscretizedLogistic(511).probabilities(params[None].double())[0]
    mean = (p * value).sum(1)
    torch.testing.assert_close(found[17].mean_U.double(), mean, atol=1e-2, rtol=1e-4)
    deviation = (p * (value - mean[:, None]).square()).sum(1).sqrt()
    torch.testing.assert_close(found[17].deviation_U.double(), deviation, atol=1e-2, rtol=1e-3)
    lines = leaf_lines(found)
    assert len(lines) == 2 + 3
    assert f"| 1 | DiscretizedLogistic | {16 * len(params)} |" in lines[3]
