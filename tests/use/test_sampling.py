"""Samples as files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.trained_runs import trained_run

from lvd_lightning.use import sampling
from lvd_lightning.use.pictures import PictureSet
from lvd_lightning.use.sampling import sample


@pytest.mark.parametrize("color", ["ycocg_r", "grey"])
def test_files_hold_what_was_drawn(tmp_path: Path, color: str) -> None:
    trained = trained_run(tmp_path / "run", color)
    rgb = sample(trained, 5, tmp_path / "out", seed=3)
    assert rgb.shape == (5, 3, 8, 8)
    with PictureSet([tmp_path / "out" / "samples"]) as pictures:
        assert torch.equal(torch.stack([picture.pixels for picture in pictures]), rgb)
    arrays = np.load(tmp_path / "out" / "samples.npz")
    assert np.array_equal(arrays["rgb"], rgb.numpy())
    assert arrays["codes"].dtype == np.int16
    assert torch.equal(trained.codes.to_rgb(torch.from_numpy(arrays["codes"])), rgb)
    assert (tmp_path / "out" / "grid.png").is_file()


def test_the_grid_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_IN_GRID", 4)
    trained = trained_run(tmp_path / "run")
    for count in (4, 9):
        sample(trained, count, tmp_path / str(count))
    assert (tmp_path / "9" / "grid.png").read_bytes() == (tmp_path / "4" / "grid.png").read_bytes()
    assert len(list((tmp_path / "9" / "samples").iterdir())) == 9


def test_seeds_decide_and_the_first_ones_stay(tmp_path: Path) -> None:
    trained = trained_run(tmp_path / "run")
    few, many, other = (sample(trained, n, tmp_path / "out", seed=s) for n, s in ((4, 0), (40, 0), (4, 1)))
    assert torch.equal(few, many[:4])
    assert not torch.equal(few, other)
    with pytest.raises(ValueError, match="num_samples: got 0"):
        sample(trained, 0, tmp_path / "out")
