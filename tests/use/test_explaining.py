"""What is told of a circuit, against enumeration of its latent values."""

import csv
import itertools
from pathlib import Path

import pytest
import torch
from helpers.assemblies import STATES, assembly
from helpers.trained_runs import HEADS, trained_run
from matplotlib.image import imread

from lvd_lightning.use.explaining import explain, latent_shares, mutual_information

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
    assert names == {"clusters.png", "clusters.csv", "tree.png", "tree.csv", "leaves.csv", "summary.md"}
    rows = list(csv.DictReader((tmp_path / "out" / "clusters.csv").open()))
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-4)
    assert sorted(int(row["circuit"]) for row in rows) == [0, 0, 1]
    assert len(rows) == sum(HEADS)
    leaves = list(csv.DictReader((tmp_path / "out" / "leaves.csv").open()))
    assert len(leaves) == (16 if color == "grey" else 48)
    assert all(row["family"] == "DiscretizedLogistic" and 0 < float(row["bits"]) < float(row["of"]) for row in leaves)
    for name in ("clusters", "tree"):
        assert imread(tmp_path / "out" / f"{name}.png").std() > 0
