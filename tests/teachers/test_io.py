"""Saved teachers come back as they were, and damaged ones are refused."""

import json
from pathlib import Path

import pytest
import torch

from lvd_lightning.teachers import MAE, VQVAE, io, load_teacher, register_teacher, save_teacher


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
        load_teacher(tmp_path / "teacher")


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


def define(name: str, module: str) -> type[torch.nn.Module]:
    """A class of teachers as a file of a user's would define it."""

    def forward_init(self: torch.nn.Module, num_features: int) -> None:
        torch.nn.Module.__init__(self)
        self.init_args = {"num_features": num_features}
        self.scale = torch.nn.Parameter(torch.ones(num_features))

    return type(name, (torch.nn.Module,), {"__init__": forward_init, "__module__": module})


def test_a_class_of_ones_own_has_to_be_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "_TEACHERS", dict(io._TEACHERS))
    kind = define("Own", "somewhere")
    with pytest.raises(ValueError, match=r"call register_teacher\(Own\)"):
        save_teacher(kind(3), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert register_teacher(kind) is kind
    save_teacher(kind(3), tmp_path)
    assert type(load_teacher(tmp_path)) is kind
    again = register_teacher(define("Own", "somewhere"))  # as in a notebook whose cell is run again
    assert type(load_teacher(tmp_path)) is again


def test_names_of_teachers_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "_TEACHERS", dict(io._TEACHERS))
    register_teacher(define("Own", "somewhere"))
    for name, module in (("Own", "elsewhere"), ("MAE", "somewhere")):
        with pytest.raises(ValueError, match=f"there is a teacher {name} in .* already"):
            register_teacher(define(name, module))
    with pytest.raises(ValueError, match="expected a class derived from torch.nn.Module"):
        register_teacher(torch.nn.Linear(2, 2))
