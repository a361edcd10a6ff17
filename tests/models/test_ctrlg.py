"""The form of Ctrl-G: what is in the file, there and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvd_lightning.files import read_json
from lvd_lightning.models.ctrlg import from_ctrlg, to_ctrlg
from lvd_lightning.models.hmm_graph import HMMTables, random_tables
from lvd_lightning.models.language import HiddenMarkovModel


def model() -> HiddenMarkovModel:
    found = random_tables(5, 3, 7, True, torch.Generator().manual_seed(0))
    emission = found.emission_SKV.clone()
    emission[0, :2, 6] = 0.0  # a word that one state alone has
    return HiddenMarkovModel.from_tables(
        HMMTables(found.initial_K, found.transition_SKK, emission / emission.sum(-1, keepdim=True)), 5
    )


def test_there_and_back(tmp_path: Path) -> None:
    one = model()
    again = from_ctrlg(to_ctrlg(one, tmp_path / "ctrlg", eos_token_id=6), length=5)
    for name in ("initial_K", "transition_SKK", "emission_SKV"):
        torch.testing.assert_close(getattr(again.tables(), name), getattr(one.tables(), name), rtol=1e-6, atol=1e-8)
    x = torch.randint(7, (20, 5), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again.log_prob(x), one.log_prob(x))


def test_what_is_in_the_folder(tmp_path: Path) -> None:
    one = model()
    tensors = load_file(to_ctrlg(one, tmp_path, eos_token_id=6) / "model.safetensors")
    tables = one.tables()
    assert {name: tuple(found.shape) for name, found in tensors.items()} == {
        **{"alpha_exp": (3, 3), "beta": (3, 7)},
        **{"gamma_exp": (1, 3), "gamma": (3,)},
    }
    assert torch.equal(tensors["alpha_exp"], tables.transition_SKK[0])
    torch.testing.assert_close(tensors["beta"].exp(), tables.emission_SKV[0])
    assert float(tensors["beta"][0, 6]) == -1e10
    torch.testing.assert_close(tensors["gamma"].exp(), tensors["gamma_exp"][0])
    sizes = {"hidden_states": 3, "hidden_size": 3, "vocab_size": 7, "eos_token_id": 6}
    assert read_json(tmp_path / "config.json") == sizes


def test_a_model_of_its_own_has_logarithms_alone(tmp_path: Path) -> None:
    tensors = load_file(to_ctrlg(model(), tmp_path, eos_token_id=6) / "model.safetensors")
    del tensors["gamma_exp"]
    save_file(tensors, tmp_path / "model.safetensors")
    torch.testing.assert_close(from_ctrlg(tmp_path, 5).tables().initial_K, model().tables().initial_K)
    del tensors["gamma"], tensors["beta"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks beta, gamma_exp or gamma; it has alpha_exp"):
        from_ctrlg(tmp_path, 5)


def test_what_cannot_be_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Ctrl-G reads homogeneous models"):
        to_ctrlg(HiddenMarkovModel.from_tables(random_tables(5, 3, 7, False), 5), tmp_path, 0)
    with pytest.raises(ValueError, match=r"eos_token_id: got 7, expected a token 0..6"):
        to_ctrlg(model(), tmp_path, 7)
    with pytest.raises(ValueError, match="holds no model in the form of Ctrl-G"):
        from_ctrlg(tmp_path / "none", 5)
