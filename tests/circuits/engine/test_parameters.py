"""Numbers that are no parameters of a circuit are refused when it is made."""

import pytest
import torch

import lvd_lightning.circuits as pc


@pytest.fixture
def graph(double_precision: None) -> pc.CircuitGraph:
    return pc.hclt(torch.tensor([-1, 0, 0]), 2, pc.Categorical(3))


def last_sum(graph: pc.CircuitGraph) -> pc.Node:
    return graph.nodes[graph.root]


@pytest.mark.parametrize(
    ("row", "message"),
    [([2.0, 2.0], "sums from 4 to 4"), ([1.5, -0.5], "smallest number of -0.5"), ([float("nan"), 1.0], "sum to one")],
)
def test_weights_are_probabilities(graph: pc.CircuitGraph, row: list[float], message: str) -> None:
    last_sum(graph).weight = torch.tensor([row])
    with pytest.raises(ValueError, match=rf"node {graph.root}: rows of weights .*{message}"):
        pc.Circuit(graph)


def test_tables_are_probabilities(graph: pc.CircuitGraph) -> None:
    index = next(i for i, node in enumerate(graph.nodes) if node.kind == "input")
    graph.nodes[index].params = torch.ones(2, 3)
    other = pc.hclt(torch.tensor([-1, 0, 0]), 2, pc.Categorical(3))
    with pytest.raises(ValueError, match=rf"node {index} of graph 1: rows of params of Categorical"):
        pc.Circuit([other, graph])


def test_other_parameters_are_those_of_their_family(double_precision: None) -> None:
    graph = pc.hclt(torch.tensor([-1, 0]), 2, pc.Gaussian())
    next(node for node in graph.nodes if node.kind == "input").params[0, 1] = -1.0
    with pytest.raises(ValueError, match="Gaussian: params are"):
        pc.Circuit(graph)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_types_are_not_mixed(graph: pc.CircuitGraph, dtype: torch.dtype) -> None:
    """Kernels would read one as the other."""
    last_sum(graph).weight = last_sum(graph).weight.to(dtype)
    with pytest.raises(ValueError, match=f"float64 .*{str(dtype)[6:]} .node {graph.root} of graph 0"):
        pc.Circuit(graph)
    with pytest.raises(ValueError, match="one type"):
        pc.Circuit([pc.hclt(torch.tensor([-1, 0, 0]), 2, pc.Categorical(3)), graph])


def test_half_precision_is_refused(double_precision: None) -> None:
    graph = pc.hclt(torch.tensor([-1]), 2, pc.Categorical(3))
    for node in graph.nodes:
        node.weight = None if node.weight is None else node.weight.half()
        node.params = None if node.params is None else node.params.half()
    with pytest.raises(ValueError, match="float32 or float64, got float16"):
        pc.Circuit(graph)
