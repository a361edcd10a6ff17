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
from lvd_lightning.circuits.io import STRUCTURE, pack_structure, signed, stored_leaves, unpack_structure


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


def test_equal_circuits_make_equal_files(build_case: Callable[..., Any], tmp_path: Path) -> None:
    circuit = build_case("chain", "categorical", 1).circuit
    found = {pc.save(circuit, tmp_path / f"circuit{number}").read_bytes() for number in range(12)}
    assert len(found) == 1


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


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Change structure and numbers of a file, with the checksum that belongs to the result."""
    with safe_open(str(path), framework="pt") as file:
        structure = json.loads(file.metadata()[STRUCTURE])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    change(structure, tensors)
    del structure["checksum"]
    save_file(tensors, str(path), metadata={STRUCTURE: signed(structure, tensors)})


def _set(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda structure, tensors: structure["graphs"][0].update({name: value})


def _node(name: str, value: Any, kind: str = "input") -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def change(structure: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        node = next(node for node in structure["graphs"][0]["nodes"] if node["kind"] == kind)
        node[name] = value
        if value is None:
            del node[name]

    return change


CHANGES = {
    "weights that sum to five": (lambda _, tensors: tensors["weight.float64"].mul_(5), "sum to one"),
    "negative weights": (lambda _, tensors: tensors["weight.float64"].neg_(), "non-negative"),
    "too many numbers": (
        lambda _, tensors: tensors.update({"weight.float64": tensors["weight.float64"].repeat(2)}),
        "no node has a place",
    ),
    "two types": (
        lambda _, tensors: tensors.update({"weight.float32": tensors["weight.float64"].float()}),
        "several types",
    ),
    "half precision": (
        lambda _, tensors: tensors.update({"params.float64": tensors["params.float64"].half()}),
        "float32 or float64",
    ),
    "an input without parameters": (_node("params", None), "no parameters|no place|a place"),
    "a variable far out": (_node("variable", 10**11), "variable"),
    "an infinite root": (_set("root", float("inf")), "root"),
    "a broken root": (_set("root", 8.5), "root"),
    "latents of nowhere": (_set("latents", [[0, 999]]), "latent"),
    "infinite latents": (_set("latents", [[0, float("inf")]]), "latent"),
    "a batch or not": (lambda structure, _: structure.update(batched="no"), "batched"),
    "a version that is none": (lambda structure, _: structure.update(format_version=True), "version"),
    "a newer version": (lambda structure, _: structure.update(format_version=2), "version"),
    "an unknown family": (_node("distribution", ["os.system", {}]), "distribution .os.system. is unknown"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_no_file_is_trusted(name: str, build_case: Callable[..., Any], tmp_path: Path) -> None:
    """Contents that make sense as a file but not as a circuit."""
    path = pc.save(build_case("chain", "categorical", 1).circuit, tmp_path / "circuit")
    change, message = CHANGES[name]
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        pc.load(path)


def test_a_single_changed_byte_is_noticed(build_case: Callable[..., Any], tmp_path: Path) -> None:
    path = pc.save(build_case("chain", "categorical", 1).circuit, tmp_path / "circuit")
    data = path.read_bytes()
    for place in range(0, len(data), 37):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(changed))
        with pytest.raises(ValueError, match=r"circuit\.safetensors"):
            pc.load(path)
    path.write_bytes(data)
    pc.load(path)


def test_the_leaves_of_a_file_are_read_without_its_parameters(tmp_path: Path) -> None:
    leaves = [pc.Categorical(5), pc.Gaussian(), pc.Categorical(5)]
    path = pc.save(pc.Circuit(pc.hclt([-1, 0, 1], 2, leaves)), tmp_path / "mixed")
    found = stored_leaves(path)
    assert [type(leaf) for leaf in found] == [pc.Categorical, pc.Gaussian]
    assert found[0].num_outcomes == 5
    (tmp_path / "other").write_bytes(b"no circuit")
    with pytest.raises(ValueError, match="cannot be read as a circuit"):
        stored_leaves(tmp_path / "other")
