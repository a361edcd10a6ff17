"""Save and load circuits: tensors and structure in one safetensors file, so that loading runs no code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lvd_lightning.circuits.checks import check_type
from lvd_lightning.circuits.circuit import Circuit
from lvd_lightning.circuits.distributions import Distribution, check_registered, find_distribution
from lvd_lightning.circuits.graph import CircuitGraph, Node
from lvd_lightning.files import write_tensors

__all__ = ["FORMAT_VERSION", "load", "pack_structure", "save", "stored_leaves", "unpack_structure"]

FORMAT_VERSION = 1
#: The one entry of a file's metadata: the order of several is not the same in every file.
STRUCTURE = "lvd_lightning.circuit"
#: What a file may ask for: indices of variables beyond this are no circuit's.
MOST_VARIABLES = 1 << 24
#: What reading something else than a circuit may raise.
UNREADABLE = (
    *(SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError),
    *(OverflowError, MemoryError, RecursionError),
)


def save(circuit: Circuit, path: str | Path) -> Path:
    """Write a circuit to `path` (".safetensors" is added if there is no suffix); returns the path written.

    The file appears under its name only when it is complete.

    Raises:
        ValueError: `path` is a directory, or a family of inputs is not registered (see `register_distribution`).

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import lvd_lightning.circuits as pc
        >>> circuit = pc.Circuit(pc.hclt([-1, 0], num_latents=4, leaf=pc.Bernoulli()))
        >>> with TemporaryDirectory() as folder:
        ...     path = pc.save(circuit, f"{folder}/tree")
        >>> path.name
        'tree.safetensors'
    """
    check_type("save: circuit", circuit, Circuit)
    path = _with_suffix(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give the name of a file to write")
    graphs = circuit.to_graph()
    found = graphs if isinstance(graphs, list) else [graphs]
    packer = _Packer()
    structure = {
        "format_version": FORMAT_VERSION,
        "batched": circuit.batched,
        "parameterization": circuit.parameterization,
        "graphs": [_describe_graph(graph, packer) for graph in found],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = packer.tensors()
    write_tensors(path, tensors, metadata={STRUCTURE: signed(structure, tensors)})
    return path


def load(path: str | Path, device: str | torch.device = "cpu") -> Circuit:
    """Read a circuit that `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged (by its checksum or contents), incomplete, of a newer format, no circuit, or a
            directory.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> circuit = pc.Circuit(pc.hclt([-1, 0], num_latents=4, leaf=pc.Bernoulli()))
        >>> with TemporaryDirectory() as folder:
        ...     again = pc.load(pc.save(circuit, f"{folder}/tree"))
        >>> x = torch.tensor([[0, 1], [1, 1]])
        >>> torch.equal(again.log_prob(x), circuit.log_prob(x))
        True
    """
    given, path = Path(path).expanduser(), _with_suffix(path)
    if not path.is_file() and given.is_dir():
        files = sorted(found.name for found in given.glob("*.safetensors"))
        raise ValueError(f"{given} is a directory, expected a circuit's file; in it: {', '.join(files[:8]) or 'none'}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such circuit file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if STRUCTURE not in metadata:
            raise ValueError("it is a safetensors file without a circuit's structure")
        structure = json.loads(metadata[STRUCTURE])
        _check_version(structure)
        if structure.pop("checksum") != _checksum(structure, tensors):
            raise ValueError("its checksum is that of other contents: it was damaged or changed")
        batched = structure["batched"]
        if not isinstance(batched, bool):
            raise ValueError(f"'batched' is {batched!r}")
        unpacker = _Unpacker(tensors)
        graphs = [_build_graph(entry, unpacker) for entry in structure["graphs"]]
        unpacker.check_all_taken()
        circuit = Circuit(graphs if batched else graphs[0], parameterization=structure["parameterization"])
    except UNREADABLE as error:
        raise ValueError(f"{path}: cannot be read as a circuit: {error}") from error
    return circuit.to(device)


def stored_leaves(path: str | Path) -> list[Distribution]:
    """The distributions that variables of a saved circuit have, each kind once, without reading its parameters.

    Raises:
        ValueError: the file holds no circuit.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            structure = json.loads((file.metadata() or {})[STRUCTURE])
        nodes = [node for graph in structure["graphs"] for node in graph["nodes"]]
        entries = [node["distribution"] for node in nodes if node["kind"] == "input"]
        distinct = {json.dumps(entry, sort_keys=True): entry for entry in entries}
        return [find_distribution(name)(**arguments) for name, arguments in distinct.values()]
    except UNREADABLE as error:
        raise ValueError(f"{path}: cannot be read as a circuit: {error}") from error


def pack_structure(graphs: Sequence[CircuitGraph]) -> tuple[str, dict[str, Tensor]]:
    """What graphs are without their parameters, as JSON and a few tensors: plain types, for checkpoints."""
    packer = _Packer()
    described = [_describe_graph(graph.structure(), packer) for graph in graphs]
    return json.dumps({"format_version": FORMAT_VERSION, "graphs": described}), packer.tensors()


def unpack_structure(text: str, tensors: dict[str, Tensor]) -> list[CircuitGraph]:
    """The graphs that `pack_structure` described, with some parameters (of the default type) in all their nodes.

    A Circuit made of them takes the state_dict of one made of the original graphs.

    Raises:
        ValueError: these are no structures, or of a newer format.
    """
    try:
        structure = json.loads(text)
        _check_version(structure)
        unpacker = _Unpacker(tensors)
        return [_build_graph(entry, unpacker, blank=True) for entry in structure["graphs"]]
    except UNREADABLE as error:
        raise ValueError(f"structure: cannot be read as that of circuits: {error}") from error


def signed(structure: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """A structure as JSON, with the checksum of it and all its numbers."""
    return json.dumps(structure | {"checksum": _checksum(structure, tensors)})


def _checksum(structure: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256."""
    found = hashlib.sha256(json.dumps(structure).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.numpy().data)  # no copy of what may be most of the memory
    return found.hexdigest()


def _check_version(structure: dict[str, Any]) -> None:
    version = structure["format_version"]
    if version is True or version != FORMAT_VERSION:
        raise ValueError(f"its format version is {version}, this program reads {FORMAT_VERSION}")


def _whole(name: str, value: Any, stop: int) -> int:
    """A whole number of 0..stop - 1 from a file."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < stop:
        raise ValueError(f"{name!r} is {str(value)[:40]}, expected a whole number of 0..{stop - 1}")
    return value


class _Packer:
    """Joins the tensors of all nodes to one flat tensor per purpose and type."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, purpose: str, tensor: Tensor | None) -> list[int] | None:
        """Append a tensor; its shape goes into the structure (order tells the rest)."""
        if tensor is None:
            return None
        name = f"{purpose}.{str(tensor.dtype).removeprefix('torch.')}"
        self.parts.setdefault(name, []).append(tensor.detach().cpu().reshape(-1))
        return [*tensor.shape]

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.parts.items()}


class _Unpacker:
    """Hands the parts out in the order in which they were packed."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.flat = {name.split(".")[0]: tensor for name, tensor in tensors.items()}
        if len(self.flat) < len(tensors):
            raise ValueError(f"it has numbers of several types for one purpose: {', '.join(sorted(tensors))}")
        self.position = dict.fromkeys(self.flat, 0)

    def take(self, purpose: str, shape: list[int] | None) -> Tensor | None:
        if shape is None:
            return None
        size = 1
        for length in shape:
            if not isinstance(length, int) or length < 0:
                raise ValueError(f"a tensor has the shape {shape}")
            size *= length
        start = self.position.get(purpose, 0)
        found = self.flat.get(purpose, torch.empty(0))[start : start + size]
        if len(found) != size:
            raise ValueError(f"it has too few numbers for '{purpose}'")
        self.position[purpose] = start + size
        return found.view(shape)

    def check_all_taken(self) -> None:
        """Raise a ValueError if numbers are left."""
        left = {name: len(tensor) - self.position[name] for name, tensor in self.flat.items()}
        if any(left.values()):
            raise ValueError(f"it has numbers that no node has a place for: {left}")


def _describe_graph(graph: CircuitGraph, packer: _Packer) -> dict[str, Any]:
    return {
        "root": graph.root,
        "latents": [[name, node] for name, node in graph.latents.items()],
        "nodes": [_describe_node(node, packer) for node in graph.nodes],
    }


def _describe_node(node: Node, packer: _Packer) -> dict[str, Any]:
    out: dict[str, Any] = {"kind": node.kind, "units": node.num_units}
    if node.kind == "input":
        assert node.distribution is not None
        check_registered(node.distribution)
        out["variable"] = node.variable
        out["distribution"] = [type(node.distribution).__name__, dict(vars(node.distribution))]
    else:
        out["children"] = list(node.children)
    if node.kronecker:
        out["kronecker"] = True
    if node.tied_to is not None:
        out["tied_to"] = node.tied_to
        return out
    for name, tensor in (
        ("params", node.params),
        ("weight", node.weight),
        ("mask", node.mask),
        ("index", node.units),
    ):
        if tensor is not None:
            out[name] = packer.add(name, tensor)
    return out


def _build_graph(entry: dict[str, Any], unpacker: _Unpacker, blank: bool = False) -> CircuitGraph:
    graph = CircuitGraph()
    for found in entry["nodes"]:
        _add_node(graph, found, unpacker, blank)
    graph.root = _whole("root", entry["root"], len(graph.nodes))
    graph.latents = {
        _whole("latent", name, MOST_VARIABLES): _whole("latent's node", node, len(graph.nodes))
        for name, node in entry["latents"]
    }
    return graph


def _add_node(graph: CircuitGraph, entry: dict[str, Any], unpacker: _Unpacker, blank: bool) -> None:
    """Through the checking methods of the graph: a file is not trusted. `blank`: parameters are not in it."""
    kind, tied = entry["kind"], entry.get("tied_to")
    if kind == "input":
        name, arguments = entry["distribution"]
        distribution = find_distribution(name)(**arguments)
        params = unpacker.take("params", entry.get("params"))
        if blank and tied is None and distribution.size:
            params = distribution.initial(entry["units"], generator=torch.Generator().manual_seed(0))
        elif params is None and tied is None and distribution.size:
            raise ValueError("an input node has no parameters")
        variable = _whole("variable", entry["variable"], MOST_VARIABLES)
        graph.add_input(variable, distribution, entry["units"], params=params, tied_to=tied)
    elif kind == "product":
        index = graph.add_product(entry["children"], unpacker.take("index", entry.get("index")))
        graph.nodes[index].kronecker = bool(entry.get("kronecker", False))
    elif kind == "sum":
        weight, mask = unpacker.take("weight", entry.get("weight")), unpacker.take("mask", entry.get("mask"))
        if blank and tied is None:
            inner = sum(graph.nodes[child].num_units for child in entry["children"])
            weight = torch.ones(entry["units"], inner) if mask is None else mask.to(torch.get_default_dtype())
            weight = weight / weight.sum(1, keepdim=True)
        elif weight is None and tied is None:
            raise ValueError("a sum node has no weights")
        index = graph.add_sum(entry["children"], entry["units"], weight=weight, mask=mask, tied_to=tied)
        if weight is not None:
            graph.nodes[index].weight = weight  # bit for bit, now that it has been checked
    else:
        raise ValueError(f"it has a node of the unknown kind {str(kind)[:40]!r}")


def _with_suffix(path: str | Path) -> Path:
    path = Path(path).expanduser()
    return path if path.suffix else path.with_name(f"{path.name}.safetensors")
