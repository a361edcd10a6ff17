"""Saving and loading circuits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.io import pack_structure, unpack_structure


def test_loaded_is_what_was_saved(case: Any, tmp_path: Path) -> None:
    pc.save(case.circuit, tmp_path / "circuit")
    loaded = pc.load(tmp_path / "circuit")
    assert torch.equal(loaded.log_prob(case.x), case.circuit.log_prob(case.x))
    saved = case.circuit.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in loaded.state_dict().items())
    assert loaded.num_parameters == case.circuit.num_parameters
    assert loaded.to_graph().latents == case.graph.latents


def test_batch_of_circuits(build_case: Callable[..., Any], tmp_path: Path) -> None:
    names = (("chain", 2), ("ragged", 1), ("tied", 3))
    cases = [build_case(name, "categorical", heads, seed) for seed, (name, heads) in enumerate(names)]
    circuit = pc.Circuit([case.graph for case in cases])
    pc.save(circuit, tmp_path / "many")
    assert torch.equal(pc.load(tmp_path / "many").log_prob(cases[0].x), circuit.log_prob(cases[0].x))


def test_soft_evidence(tmp_path: Path) -> None:
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 4, pc.SoftEvidence(3), 2))
    pc.save(circuit, tmp_path / "prior")
    evidence = torch.randn(5, 2, 3)
    assert torch.equal(pc.load(tmp_path / "prior").log_prob(evidence), circuit.log_prob(evidence))


def test_precision_is_kept(build_case: Callable[..., Any], tmp_path: Path) -> None:
    case = build_case("chain", "categorical", 1)
    pc.save(case.circuit.float(), tmp_path / "single")
    assert next(pc.load(tmp_path / "single").parameters()).dtype == torch.float32


def test_trained_parameters_are_saved(build_case: Callable[..., Any], tmp_path: Path) -> None:
    case = build_case("shared", "categorical", 2)
    (-case.circuit.log_prob(case.x).sum()).backward()
    pc.CircuitEM(case.circuit, lr=0.5).step()
    pc.save(case.circuit, tmp_path / "circuit")
    assert torch.equal(pc.load(tmp_path / "circuit").log_prob(case.x), case.circuit.log_prob(case.x))


def test_saving_again_replaces(build_case: Callable[..., Any], tmp_path: Path) -> None:
    first, second = build_case("chain", "categorical", 1), build_case("bush", "categorical", 2)
    pc.save(first.circuit, tmp_path / "circuit")
    pc.save(second.circuit, tmp_path / "circuit")
    assert torch.equal(pc.load(tmp_path / "circuit").log_prob(second.x), second.circuit.log_prob(second.x))


def test_what_is_on_disk_is_data(build_case: Callable[..., Any], tmp_path: Path) -> None:
    """One file of tensors whose header holds the structure as JSON: nothing is pickled."""
    pc.save(build_case("chain", "categorical", 1).circuit, tmp_path / "circuit")
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".safetensors"
    with safe_open(str(path), framework="pt") as file:
        assert all(json.loads(text) for text in file.metadata().values())


@pytest.mark.parametrize("damage", ["truncated", "empty", "other"])
def test_damaged_files_are_named(damage: str, build_case: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "circuit.safetensors"
    pc.save(build_case("chain", "categorical", 1).circuit, path)
    if damage == "other":
        save_file({"a": torch.zeros(2)}, path)
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -40])
    with pytest.raises(ValueError, match=r"circuit\.safetensors"):
        pc.load(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        pc.load(tmp_path / "nowhere")


def test_structure_takes_the_parameters_of_the_original(build_case: Callable[..., Any]) -> None:
    """Structure and state_dict together are the circuit, whatever its nodes share, mask or index."""
    names = (("chain", 2), ("ragged", 1), ("tied", 3), ("shared", 2))
    cases = [build_case(name, "categorical", heads, seed) for seed, (name, heads) in enumerate(names)]
    circuit = pc.Circuit([case.graph for case in cases])
    text, tensors = pack_structure(circuit.structures)
    assert all(not tensor.is_floating_point() for tensor in tensors.values())
    again = pc.Circuit(unpack_structure(text, tensors))
    assert not torch.equal(again.log_prob(cases[0].x), circuit.log_prob(cases[0].x))
    again.load_state_dict(circuit.state_dict())
    assert torch.equal(again.log_prob(cases[0].x), circuit.log_prob(cases[0].x))
    assert again.num_parameters == circuit.num_parameters
    assert pack_structure(again.structures)[0] == text


@pytest.mark.parametrize("text", ["no json", "[]", '{"format_version": 99, "graphs": []}', '{"format_version": 1}'])
def test_what_is_no_structure_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="structure: cannot be read as that of circuits"):
        unpack_structure(text, {})
