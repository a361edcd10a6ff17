"""Circuits as node graphs of PyJuice and back; those are evaluated here from their edges and parameters alone.

PyJuice compiles circuits for GPUs alone, but builds, initialises and saves their nodes anywhere.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import few_structures
from torch import Tensor

import lvd_lightning.circuits as pc

if sys.platform != "linux":
    pytest.skip("PyJuice needs Triton, which exists for Linux alone", allow_module_level=True)

import pyjuice

Leaf = pc.Distribution
ROOT = Path(__file__).parents[2]


def evaluate(root: Any, x_BD: Tensor) -> Tensor:
    """Log-likelihoods of all units of a node of PyJuice in float64, shape (B, N): its definition, edge by edge."""
    memo: dict[Any, Tensor] = {}

    def values(node: Any) -> Tensor:  # probabilities, (N, B)
        if node not in memo:
            memo[node] = leaf(node) if node.is_input() else product(node) if node.is_prod() else mixture(node)
        return memo[node]

    def leaf(node: Any) -> Tensor:
        params = node.get_source_ns().get_params().double().view(node.num_nodes, -1)
        x_B = x_BD[:, node.scope.to_list()[0]]
        if isinstance(node.dist, pyjuice.distributions.Gaussian):
            return torch.distributions.Normal(params[:, :1], params[:, 1:]).log_prob(x_B[None].double()).exp()
        if isinstance(node.dist, pyjuice.distributions.Bernoulli):
            params = torch.cat([1 - params, params], 1)
        return params[:, x_B.long()]

    def product(node: Any) -> Tensor:
        size = 1 if len(node.edge_ids) == node.num_nodes else node.block_size
        rows = []
        for k in range(node.num_nodes):
            edges = node.edge_ids[k // size].tolist()
            factors = [values(child)[j * size + k % size] for child, j in zip(node.chs, edges, strict=True)]
            rows.append(math.prod(factors))
        return torch.stack(rows)

    def mixture(node: Any) -> Tensor:
        below = torch.cat([values(child) for child in node.chs])
        params = node.get_source_ns().get_params().double()
        size, inner = params.shape[1:]
        out = torch.zeros(node.num_nodes, len(x_BD), dtype=torch.float64)
        for e, (i, j) in enumerate(node.edge_ids.T.tolist()):
            out[i * size : (i + 1) * size] += params[e] @ below[j * inner : (j + 1) * inner]
        return out

    return values(root).log().T


def wide(leaf: Leaf, heads: int) -> pc.CircuitGraph:
    """Widths that are multiples of 4, and everything that PyJuice puts differently.

    A Kronecker product, gathered units, a product of products, sums of sums and of inputs, a child that comes twice,
    ties between sums over one and over two children, whole and partial blocks of dead edges, uneven depths.
    """
    graph = pc.CircuitGraph()
    a, b, c, d = (graph.add_input(v, leaf, 4) for v in range(4))
    tied = graph.add_input(3, leaf, 4, tied_to=a)
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    kronecker = graph.add_product([a, b], grid)
    mask = torch.rand(8, 16) < 0.7
    mask[:4, :4], mask[4:, 8:12] = False, False
    mask[:, 7] = True
    ab = graph.add_sum([kronecker], 8, mask=mask)
    over_sum = graph.add_sum([ab], 8)
    mixed = graph.add_sum([d, tied], 4)
    twice = graph.add_sum([c, c], 4, tied_to=mixed)
    left = graph.add_product([over_sum, twice], torch.stack([torch.randperm(8), torch.arange(8) % 4], 1))
    right = graph.add_product([twice, mixed])
    nested = graph.add_product([left, mixed], torch.tensor([[k, (k + 1) % 4] for k in (7, 0, 2, 2)]))
    low = graph.add_product([ab, right], torch.stack([torch.arange(4) * 2, torch.arange(4)], 1))
    deeper = graph.add_sum([nested], 4)
    graph.root = graph.add_sum([nested, low, deeper, low], heads)
    return graph


def fitted(graph: pc.CircuitGraph) -> pc.Circuit:
    """A circuit in float64 whose parameters float32 can hold: what is lost then is not PyJuice's precision."""
    for node in graph.nodes:
        if node.kind == "input" and isinstance(node.distribution, pc.Gaussian) and node.tied_to is None:
            node.params[:, 1] = 0.5 + torch.rand(node.num_units)
    return pc.Circuit(graph).float().double()


def some_worlds(graph: pc.CircuitGraph) -> Tensor:
    leaf = graph.nodes[0].distribution
    if isinstance(leaf, pc.Gaussian):
        return torch.randn(20, graph.num_variables)
    return torch.randint(0, leaf.num_categories, (20, graph.num_variables))


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=1e-6)


@pytest.fixture
def single_precision() -> None:
    """PyJuice itself draws and normalises in float32 only."""
    torch.set_default_dtype(torch.float32)


def test_every_structure_there_and_back(case: Any) -> None:
    check_there_and_back(case, max_block_size=1024)


@few_structures
def test_blocks_of_one_unit(case: Any) -> None:
    check_there_and_back(case, max_block_size=1)


def check_there_and_back(case: Any, max_block_size: int) -> None:
    circuit = case.circuit.float().double()
    leaves = [node.distribution for node in case.graph.nodes if node.kind == "input"]
    if not all(isinstance(leaf, (pc.Categorical, pc.Gaussian)) for leaf in leaves):
        with pytest.raises(ValueError, match="has no counterpart; supported are Categorical, Bernoulli and Gaussian"):
            pc.to_pyjuice(circuit, max_block_size=max_block_size)
        return
    root = pc.to_pyjuice(circuit, max_block_size=max_block_size)
    expected, x = circuit.log_prob(case.x).detach()[-30:], case.x[-30:]
    assert_close(evaluate(root, x), expected)
    back = pc.Circuit(pc.from_pyjuice(root)).double()
    assert_close(back.log_prob(x).detach(), expected)
    assert back.num_parameters == circuit.num_parameters  # masks and ties have survived


@pytest.mark.parametrize("max_block_size", [1, 2, 4])
@pytest.mark.parametrize("leaf", [pc.Categorical(5), pc.Bernoulli(), pc.Gaussian(min_std=0.2)], ids=str)
def test_wide_blocks_there_and_back(leaf: Leaf, max_block_size: int) -> None:
    graph = wide(leaf, heads=6)
    circuit, x = fitted(graph), some_worlds(graph)
    root = pc.to_pyjuice(circuit, max_block_size=max_block_size)
    expected = circuit.log_prob(x).detach()
    assert_close(evaluate(root, x), expected)
    found = pc.from_pyjuice(root)
    back = pc.Circuit(found).double()
    assert_close(back.log_prob(x).detach(), expected)
    assert back.num_parameters == circuit.num_parameters
    assert {node.distribution for node in found.nodes if node.kind == "input"} == {leaf}


def test_nodes_alternate_in_blocks_of_one_size() -> None:
    """PyJuice's backward pass loses flow where products of several block sizes meet or sums have larger ones."""
    nodes = list(pc.to_pyjuice(fitted(wide(pc.Categorical(3), heads=6))))
    assert {node.block_size for node in nodes[:-1]} == {4}
    assert nodes[-1].block_size == 2  # six heads
    for node in nodes:
        assert all(child.is_prod() if node.is_sum() else not child.is_prod() for child in node.chs)
        assert len(set(node.chs)) == len(node.chs)
    assert pc.to_pyjuice(fitted(wide(pc.Categorical(3), heads=8))).block_size == 4


def test_blocks_without_live_edges_are_left_out_and_other_dead_edges_masked() -> None:
    graph = wide(pc.Categorical(3), heads=1)
    weighted = next(node for node in graph.nodes if node.mask is not None)
    root = pc.to_pyjuice(fitted(graph))
    masked = [node for node in root if node.is_sum() and node.get_zero_param_mask() is not None]
    assert len(masked) == 1
    sums = masked[0]
    assert {tuple(edge) for edge in sums.edge_ids.T.tolist()} == {(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 3)}
    assert int((~sums.get_zero_param_mask()).sum()) == int(weighted.mask.sum())
    assert not bool(sums.get_params()[sums.get_zero_param_mask()].any())
    by_unit = pc.to_pyjuice(fitted(graph), max_block_size=1)
    assert all(node.get_zero_param_mask() is None for node in by_unit if node.is_sum())


def test_blocks_fit_the_narrowest_node() -> None:
    graph = pc.CircuitGraph()
    six, four = graph.add_input(0, pc.Bernoulli(), 6), graph.add_input(1, pc.Bernoulli(), 4)
    graph.root = graph.add_sum([graph.add_product([six, four], torch.arange(8).view(4, 2) % 4)], 8)
    assert {node.block_size for node in pc.to_pyjuice(pc.Circuit(graph))} == {2}


@pytest.mark.parametrize("kind", ["plain", "pruned", "clash"])
def test_files_of_pyjuice_need_no_gpu(kind: str, tmp_path: Path) -> None:
    graph = pc.hclt(torch.tensor([-1, 0, 0, 1]), 8, pc.Categorical(3), 2)
    if kind == "pruned":
        graph = wide(pc.Categorical(3), heads=2)
    if kind == "clash":  # as many units as the first factor has blocks of two
        graph = pc.CircuitGraph()
        leaves = [graph.add_input(v, pc.Categorical(3), 4) for v in range(2)]
        graph.root = graph.add_sum([graph.add_product(leaves, torch.tensor([[0, 3], [1, 1]]))], 2)
    circuit, x = fitted(graph), some_worlds(graph)
    torch.set_default_dtype(torch.float32)
    pyjuice.save(str(tmp_path / "circuit.jpc"), pc.to_pyjuice(circuit))
    loaded = pyjuice.load(str(tmp_path / "circuit.jpc"))
    assert_close(evaluate(loaded, x), circuit.log_prob(x).detach())
    assert_close(pc.Circuit(pc.from_pyjuice(loaded)).double().log_prob(x).detach(), circuit.log_prob(x).detach())


def test_batch_of_circuits(build_case: Callable[..., Any]) -> None:
    names = (("chain", 2), ("ragged", 1), ("tied", 3))
    cases = [build_case(name, "categorical", heads, seed) for seed, (name, heads) in enumerate(names)]
    circuit, x = pc.Circuit([case.graph for case in cases]).float().double(), cases[0].x[:20]
    roots = pc.to_pyjuice(circuit)
    expected = circuit.log_prob(x).detach()
    assert [root.num_nodes for root in roots] == [2, 1, 3]
    for root, log_prob in zip(roots, expected, strict=True):
        assert_close(evaluate(root, x), log_prob[:, : root.num_nodes])


def test_logits_and_roots_of_any_kind() -> None:
    graph = pc.CircuitGraph()
    graph.add_product([graph.add_input(v, pc.Categorical(3), 2) for v in range(2)])
    circuit, x = pc.Circuit(graph, parameterization="logits"), some_worlds(graph)
    assert_close(evaluate(pc.to_pyjuice(circuit), x), circuit.log_prob(x).detach())


def test_exporting_leaves_the_circuit_alone() -> None:
    circuit = pc.Circuit(wide(pc.Categorical(3), heads=2)).float()
    before = [table.detach().clone() for table in circuit.tables]
    for node in pc.to_pyjuice(circuit):
        if node.get_params() is not None:
            node.get_params().fill_(0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, circuit.tables, strict=True))


def by_hand(first_source: bool) -> Any:
    """Blocks of several sizes, block and unit edges, ties; the source of a tie below or above the tied sum."""
    bernoulli, categorical = pyjuice.distributions.Bernoulli(), pyjuice.distributions.Categorical(num_cats=3)
    x0 = pyjuice.inputs(0, num_node_blocks=2, block_size=4, dist=categorical)
    x1 = x0.duplicate(1, tie_params=True)
    x2 = pyjuice.inputs(2, num_node_blocks=2, block_size=4, dist=bernoulli)
    x3 = pyjuice.inputs(3, num_node_blocks=2, block_size=4, dist=pyjuice.distributions.Gaussian(0.0, 1.0))
    edges = torch.tensor([[0, 0, 1], [0, 1, 1]])
    low = pyjuice.summate(x0, num_node_blocks=2, block_size=4, edge_ids=edges)  # an input below a sum
    m01 = pyjuice.multiply(low, x1, edge_ids=torch.tensor([[1, 0], [0, 1]]))
    if first_source:
        middle = low.duplicate(m01, tie_params=True)
    else:
        middle = pyjuice.summate(m01, num_node_blocks=2, block_size=4, edge_ids=edges)
        low.set_source_ns(middle)
    m = pyjuice.multiply(middle, x2, x3, edge_ids=torch.randint(0, 8, (12, 3)), sparse_edges=True)
    other = pyjuice.multiply(middle, x2, x3)
    return pyjuice.summate(m, other, num_node_blocks=3, block_size=1)


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize("first_source", [True, False])
def test_graphs_made_with_pyjuice(first_source: bool) -> None:
    root = by_hand(first_source)
    root.init_parameters()
    x = torch.cat([torch.randint(0, 2, (20, 3)).float(), torch.randn(20, 1)], 1)
    graph = pc.from_pyjuice(root)
    assert_close(pc.Circuit(graph).double().log_prob(x).detach(), evaluate(root, x))
    kinds = [node.kind for node in graph.nodes if node.tied_to is not None]
    assert sorted(kinds) == ["input", "sum"]
    before = evaluate(root, x)
    for node in graph.nodes:  # the graph shares no memory with PyJuice's nodes
        if node.kind != "product":
            (node.params if node.weight is None else node.weight).fill_(0.5)
    assert torch.equal(evaluate(root, x), before)


@pytest.mark.usefixtures("single_precision")
def test_long_hidden_markov_model_of_pyjuice() -> None:
    """Deeper than Python recurses; the expected value is that of the forward algorithm."""
    length, states = 400, 4
    transition, emission, first = (torch.rand(*size) + 0.1 for size in ((states, states), (states, 3), (states,)))
    transition, emission, first = (table / table.sum(-1, keepdim=True) for table in (transition, emission, first))
    root = pyjuice.structures.HMM(length, states, 3, block_size=2, alpha=transition, beta=emission, gamma=first)
    circuit = pc.Circuit(pc.from_pyjuice(root)).double()
    assert circuit.num_parameters == states * (states - 1) + states * 2 + states - 1  # each matrix is there once
    x_BT = torch.randint(0, 3, (4, length))
    log_BK = first.double().log().expand(4, -1)
    for t in range(length):
        log_BK = log_BK + emission.double().log().T[x_BT[:, t]]
        if t + 1 < length:
            log_BK = (log_BK[:, :, None] + transition.double().log()).logsumexp(1)
    torch.testing.assert_close(circuit.log_prob(x_BT)[:, 0].detach(), log_BK.logsumexp(1), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("single_precision")
def test_parallel_edges_add_up_and_weights_beat_masks() -> None:
    leaf = pyjuice.inputs(0, num_nodes=2, dist=pyjuice.distributions.Categorical(2), params=torch.eye(2))
    edges = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 0, 1]])
    sums = pyjuice.summate(leaf, num_node_blocks=2, edge_ids=edges)
    sums.set_params(torch.tensor([0.5, 0.2, 0.3, 0.6, 0.4]), normalize=False)
    sums.set_zero_param_mask(
        torch.tensor([0, 0, 0, 0, 1]).bool().view(5, 1, 1)
    )  # PyJuice evaluates the 0.4 all the same
    graph = pc.from_pyjuice(sums)
    torch.testing.assert_close(graph.nodes[graph.root].weight, torch.tensor([[0.5, 0.5], [0.6, 0.4]]))
    assert graph.nodes[graph.root].mask is None


def test_unsupported_circuits() -> None:
    evidence = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 3, pc.SoftEvidence(3), 1))
    with pytest.raises(ValueError, match="SoftEvidence.*supported are Categorical, Bernoulli and Gaussian"):
        pc.to_pyjuice(evidence)
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 3, pc.Bernoulli(), 1))
    for size in (0, 3):
        with pytest.raises(ValueError, match=f"max_block_size: got {size}, expected a power of two"):
            pc.to_pyjuice(circuit, max_block_size=size)


@pytest.mark.usefixtures("single_precision")
def test_unsupported_nodes_of_pyjuice() -> None:
    categorical = pyjuice.distributions.Categorical(3)
    with pytest.raises(ValueError, match="root: expected a node of PyJuice, got CircuitGraph"):
        pc.from_pyjuice(pc.CircuitGraph())
    with pytest.raises(ValueError, match="init_parameters"):
        pc.from_pyjuice(pyjuice.inputs(0, num_nodes=2, dist=categorical))
    with pytest.raises(ValueError, match="Literal; supported are Categorical"):
        pc.from_pyjuice(pyjuice.inputs(0, num_nodes=2, dist=pyjuice.distributions.Literal(lit=1)))
    with pytest.raises(ValueError, match=r"the variables \[0, 1\]; expected one"):
        pc.from_pyjuice(pyjuice.inputs([0, 1], num_nodes=2, dist=categorical))
    leaf = pyjuice.inputs(0, num_nodes=2, dist=categorical, params=torch.ones(6))
    lowrank = pyjuice.nodes.LowRankSumParams(rank=1)
    with pytest.raises(ValueError, match="ExternalParamsSumNodes"):
        pc.from_pyjuice(pyjuice.summate(leaf, num_node_blocks=2, external_params=lowrank))
    source = pyjuice.summate(leaf, num_node_blocks=2, edge_ids=torch.tensor([[0, 1], [0, 1]]))
    source.init_parameters()
    crossed = pyjuice.summate(leaf, num_node_blocks=2, edge_ids=torch.tensor([[0, 1], [1, 0]]), source_node=source)
    both = [pyjuice.multiply(found) for found in (source, crossed)]
    with pytest.raises(ValueError, match="tied sums have different edges"):
        pc.from_pyjuice(pyjuice.summate(*both, num_node_blocks=1))


def test_importing_circuits_does_not_import_pyjuice() -> None:
    program = "import sys, lvd_lightning.circuits; assert 'pyjuice' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_without_pyjuice(monkeypatch: pytest.MonkeyPatch) -> None:
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 3, pc.Bernoulli(), 1))
    monkeypatch.setitem(sys.modules, "pyjuice", None)
    with pytest.raises(ImportError, match="to_pyjuice: .*pip install pyjuice"):
        pc.to_pyjuice(circuit)
    with pytest.raises(ImportError, match="from_pyjuice: .*pip install pyjuice"):
        pc.from_pyjuice(None)
