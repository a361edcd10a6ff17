"""Saved teachers come back as they were, and damaged ones are refused."""

import json
from pathlib import Path

import pytest
import torch

from lvd_lightning.teachers import MAE, VQVAE, load_teacher, save_teacher


@pytest.fixture
def mae() -> MAE:
    torch.manual_seed(0)
    return MAE(image_size=8, hidden_size=8, num_layers=1, num_heads=1, decoder_hidden_size=8, decoder_num_heads=1)


def test_a_round_trip_keeps_the_features(mae: MAE, tmp_path: Path) -> None:
    save_teacher(mae, tmp_path)
    loaded = load_teacher(tmp_path)
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    assert isinstance(loaded, MAE)
    assert not loaded.training
    assert torch.equal(loaded.features(images), mae.eval().features(images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher.json", "teacher.safetensors"]


def test_a_vqvae_comes_back_with_its_codebook(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"channels": 8, "num_features": 6, "codebook_size": 5, "num_components": 2, "prior_hidden_size": 8}
    vqvae = VQVAE(8, 2, decoder="convolutional", **sizes, prior_num_layers=1)
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    vqvae.codebook.update(vqvae.features(images), vqvae.codes(images), torch.Generator().manual_seed(0))
    save_teacher(vqvae, tmp_path)
    loaded = load_teacher(tmp_path)
    assert isinstance(loaded, VQVAE)
    assert torch.equal(loaded.features(images), vqvae.eval().features(images))
    assert torch.equal(loaded.codes(images), vqvae.codes(images))
    assert torch.equal(loaded.elbo(images), vqvae.elbo(images))


def test_a_missing_teacher_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run stage teacher first"):
        load_teacher(tmp_path)


def test_damaged_files_are_refused(mae: MAE, tmp_path: Path) -> None:
    save_teacher(mae, tmp_path)
    arguments = json.loads((tmp_path / "teacher.json").read_text())
    for name in ("os.system", "Linear"):
        (tmp_path / "teacher.json").write_text(json.dumps(arguments | {"class": name}))
        with pytest.raises(ValueError, match="is unknown"):
            load_teacher(tmp_path)
    arguments["init_args"]["hidden_size"] = 12
    (tmp_path / "teacher.json").write_text(json.dumps(arguments))
    with pytest.raises(ValueError, match="cannot be read"):
        load_teacher(tmp_path)
    save_teacher(mae, tmp_path)
    weights = (tmp_path / "teacher.safetensors").read_bytes()
    (tmp_path / "teacher.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load_teacher(tmp_path)
