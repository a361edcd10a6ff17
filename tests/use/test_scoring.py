"""Scores against the circuit's own likelihoods; what is written can be opened."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.trained_runs import picture_folder, random_pictures, trained_run
from matplotlib.image import imread

from lvd_lightning.use.pictures import PictureSet, tiled
from lvd_lightning.use.roc import auroc, roc_curve
from lvd_lightning.use.scoring import score


def test_scores_are_likelihoods_in_order(tmp_path: Path) -> None:
    trained = trained_run(tmp_path / "run")
    pixels = random_pictures(6)
    with PictureSet([picture_folder(tmp_path / "in", pixels)]) as pictures:
        scores = score(trained, [pictures], tmp_path / "out", num_shown=2)
    log_p = trained.circuit.log_prob(trained.codes.encode(pixels)).detach().double()
    expected = {f"{n:02}.png": -float(found) / 192 / math.log(2) for n, found in enumerate(log_p)}
    assert {Path(one.name).name: one.bpd for one in scores.pictures} == pytest.approx(expected, rel=1e-5)
    assert scores.bpd() == sorted(scores.bpd(), reverse=True)
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
    assert [row["name"] for row in rows] == [one.name for one in scores.pictures]
    assert float(rows[0]["bpd"]) == pytest.approx(scores.pictures[0].bpd, abs=1e-6)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["sets"][0]["count"] == 6
    assert imread(tmp_path / "out" / "outliers.png").std() > 0
    assert len(list((tmp_path / "out" / "surprise").iterdir())) == 2


def test_a_picture_in_tiles_has_the_mean_of_its_tiles(tmp_path: Path) -> None:
    trained = trained_run(tmp_path / "run")
    large = random_pictures(1, side=16)[:, :, :12]
    with PictureSet([picture_folder(tmp_path / "in", large)]) as pictures:
        (found,) = score(trained, [pictures], tmp_path / "out", fit="tile").pictures
    log_n = trained.circuit.log_prob(trained.codes.encode(tiled(large[0], (8, 8)))).detach().double()
    assert found.log_prob == pytest.approx(float(log_n.sum()), rel=1e-6)
    assert found.bpd == pytest.approx(-float(log_n.mean()) / 192 / math.log(2), rel=1e-6)


def test_two_sets_are_told_apart(tmp_path: Path) -> None:
    trained = trained_run(tmp_path / "run", "grey")
    inside = trained.codes.to_rgb(trained.circuit.sample(20, generator=torch.Generator().manual_seed(0)))
    outside = random_pictures(20, levels=17)
    with (
        PictureSet([picture_folder(tmp_path / "in", inside)]) as first,
        PictureSet([picture_folder(tmp_path / "out", outside)]) as second,
    ):
        scores = score(trained, [first, second], tmp_path / "found", max_images=15, num_shown=1)
    assert [len(scores.bpd(source)) for source in (0, 1)] == [15, 15]
    assert scores.auroc == auroc(scores.bpd(0), scores.bpd(1))
    assert scores.auroc > 0.7
    assert json.loads((tmp_path / "found" / "summary.json").read_text())["auroc"] == scores.auroc
    assert imread(tmp_path / "found" / "roc.png").std() > 0


def test_area_under_the_curve_counts_pairs() -> None:
    draw = np.random.default_rng(0)
    inside, outside = draw.integers(0, 9, 30).tolist(), draw.integers(3, 12, 40).tolist()
    pairs = [(b > a) + 0.5 * (b == a) for a in inside for b in outside]
    assert auroc(inside, outside) == pytest.approx(np.mean(pairs))
    assert auroc(outside, inside) == pytest.approx(1 - np.mean(pairs))
    false, true = roc_curve(inside, outside)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    with pytest.raises(ValueError, match="got 0 and 1 scores"):
        auroc([], [1.0])
