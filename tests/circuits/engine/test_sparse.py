"""Sum nodes of which only live edges are stored do all that dense ones do; which nodes are."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine.layers import Layer
from lvd_lightning.circuits.engine.sparse import EdgeIndex, SparseEdges, pays

STRUCTURES = ("chain", "bush", "shared", "hmm", "ragged", "rat", "rat-kronecker", "rectangles", "trees", "embedded")


@pytest.fixture(params=["kernels", "pytorch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compiled kernels, where there are some, and PyTorch."""
    monkeypatch.setenv("LVD_LIGHTNING_NATIVE", "1" if request.param == "kernels" else "0")
    return str(request.param)


def thin_out(graph: pc.CircuitGraph, seed: int = 0, share: float = 0.5) -> pc.CircuitGraph:
    """Take edges from every sum that owns its weights; at least one of every row stays."""
    generator = torch.Generator().manual_seed(seed)
    for node in graph.nodes:
        if node.weight is not None and node.tied_to is None:
            live = torch.rand(node.weight.shape, generator=generator) < share
            live.scatter_(1, torch.randint(live.shape[1], (len(live), 1), generator=generator), True)
            node.mask = (
                live if node.mask is None else live & node.mask | (node.mask & ~(live & node.mask).any(1)[:, None])
            )
            node.weight = node.weight * node.mask
            node.weight = node.weight / node.weight.sum(1, keepdim=True)
    return graph


@pytest.fixture(params=STRUCTURES)
def pair(request: pytest.FixtureRequest, build_case: Callable[..., Any]) -> tuple[pc.Circuit, pc.Circuit, Any]:
    """A circuit with both layouts, and its case."""
    leaf = "bernoulli" if request.param in ("rat-kronecker", "embedded") else "categorical"
    case = build_case(request.param, leaf, 2)
    graph = thin_out(case.graph)
    return pc.Circuit(graph, layout="dense"), pc.Circuit(graph, layout="sparse"), case


def by_node(circuit: pc.Circuit, values: list[Tensor]) -> dict[tuple[int, int], Tensor]:
    """Numbers shaped like the parameters, by node; 0 where there is no edge."""
    out = {}
    for number, (group, found) in enumerate(zip(circuit.plan.groups, values, strict=True)):
        mask = circuit.engine.mask(number)
        dense = circuit.engine.dense(number, found) if mask is None else circuit.engine.dense(number, found) * mask
        for row, owner in enumerate(group.owners):
            node = circuit.structures[owner[0]].nodes[owner[1]]
            out[owner] = dense[row, : node.num_units]
    return out


def assert_same(circuits: tuple[pc.Circuit, pc.Circuit], values: list[list[Tensor]], rtol: float = 1e-9) -> None:
    """Numbers of both, node by node; padding may differ."""
    first, second = (by_node(circuit, found) for circuit, found in zip(circuits, values, strict=True))
    assert first.keys() == second.keys()
    for key, one in first.items():
        other = second[key]
        width = min(one.shape[1], other.shape[1])
        torch.testing.assert_close(one[:, :width], other[:, :width], rtol=rtol, atol=1e-12)


def num_sparse(circuit: pc.Circuit) -> int:
    return sum(len(group.owners) for group in circuit.plan.groups if group.edges is not None)


class TestIndex:
    def test_tables_and_edges_are_the_same_numbers(self) -> None:
        masks = [torch.tensor([[1, 0, 1], [0, 1, 0]]) > 0, torch.tensor([[0, 1]]) > 0]
        edges = SparseEdges(EdgeIndex.of(masks, outer=2, inner=3))
        table = torch.arange(12.0).view(2, 2, 3)
        values = edges.take(table)
        assert values.tolist() == [0.0, 2.0, 4.0, 7.0, 10.0]  # the row that pads has the edges of the first
        assert edges.dense(values).tolist() == [[[0, 0, 2], [0, 4, 0]], [[0, 7, 0], [0, 10, 0]]]
        assert edges.dense(values, 1, 2).tolist() == [[[0, 7, 0], [0, 10, 0]]]
        assert edges.row_sums(values).tolist() == [2.0, 4.0, 7.0, 10.0]
        assert edges.spread(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [1, 1, 2, 3, 4]

    def test_the_same_edges_by_column(self) -> None:
        mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.5
        index = EdgeIndex.of([mask, mask.flip(0)], 5, 7)
        for fold, live in enumerate([mask, mask.flip(0)]):
            first = index.start[fold * 5]
            for k in range(7):
                at = slice(index.by_column_start[fold * 7 + k], index.by_column_start[fold * 7 + k + 1])
                assert index.outer[at].tolist() == live[:, k].nonzero()[:, 0].tolist()
                assert (index.column[first + index.place[at]] == k).all()

    @pytest.mark.parametrize(
        ("shape", "share", "layout", "expected"),
        [
            ((64, 64), 0.4, "auto", True),
            ((64, 64), 0.7, "auto", False),
            ((8, 8), 0.1, "auto", False),
            ((8, 8), 0.9, "sparse", True),
            ((64, 64), 0.1, "dense", False),
        ],
    )
    def test_it_is_chosen_where_it_pays(self, shape: Any, share: float, layout: Any, expected: bool) -> None:
        mask = torch.arange(shape[0] * shape[1]).view(shape) < share * shape[0] * shape[1]
        assert pays(mask, layout) == expected
        assert not pays(None, layout)


class TestCircuit:
    def test_some_nodes_are_sparse_and_fewer_numbers_stored(self, pair: Any) -> None:
        dense, sparse, _ = pair
        assert num_sparse(dense) == 0
        assert num_sparse(sparse) > 0
        assert sum(map(torch.numel, sparse.tables)) < sum(map(torch.numel, dense.tables))
        assert sparse.num_parameters == dense.num_parameters

    def test_likelihoods_and_gradients(self, pair: Any, backend: str) -> None:
        dense, sparse, case = pair
        for observed in (None, case.observed):
            grads = []
            for circuit in (dense, sparse):
                circuit.zero_grad()
                log_p = circuit.log_prob(case.x, observed=observed)
                (log_p * torch.linspace(0.5, 2.0, log_p.numel()).view_as(log_p)).sum().backward()
                grads.append([log_p.detach(), [table.grad.clone() for table in circuit.tables]])
            torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-10, atol=1e-12)
            assert_same((dense, sparse), [grads[0][1], grads[1][1]])

    def test_sums_that_underflow(
        self, build_case: Callable[..., Any], backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mended, mend = [], Layer._mend_underflow
        monkeypatch.setattr(Layer, "_mend_underflow", lambda layer, *rest: (mended.append(layer), mend(layer, *rest)))
        graph = thin_out(build_case("bush", "categorical", 1).graph)
        for node in graph.nodes:
            if node.weight is not None:
                node.weight = node.weight * torch.logspace(-36, 0, node.weight.shape[1])
                node.weight = (node.weight / node.weight.sum(1, keepdim=True)).float()
            elif node.params is not None:
                node.params = torch.eye(3)[torch.arange(node.num_units) % 3].float()
        x = torch.cartesian_prod(*[torch.arange(3)] * graph.num_variables)
        found = []
        for layout in ("dense", "sparse"):
            circuit = pc.Circuit(graph, layout=layout)
            log_p = circuit.log_prob(x, head=0)
            log_p.where(log_p > -torch.inf, 0.0).sum().backward()
            found.append((circuit, log_p.detach(), [table.grad for table in circuit.tables]))
        assert any(layer.edges is not None for layer in mended)
        torch.testing.assert_close(found[0][1], found[1][1])
        assert_same((found[0][0], found[1][0]), [found[0][2], found[1][2]], rtol=1e-4)

    @pytest.mark.parametrize("rule", [pc.CircuitEM, pc.Anemone])
    def test_em(self, pair: Any, backend: str, rule: Any) -> None:
        dense, sparse, case = pair
        for circuit in (dense, sparse):
            optimizer = rule(circuit, lr=0.5, pseudocount=0.3)
            for head in (0, 1, 0):
                (-circuit.log_prob(case.x[: 5 + 9 * head], head=head).sum()).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert_same((dense, sparse), [list(dense.probabilities()), list(sparse.probabilities())])
        for circuit in (dense, sparse):
            again = pc.Circuit(circuit.to_graph(), layout="dense")
            torch.testing.assert_close(again.log_prob(case.x), circuit.log_prob(case.x))

    def test_top_down_probabilities(self, pair: Any, backend: str) -> None:
        dense, sparse, _ = pair
        share = torch.full(dense.engine.roots.shape, 0.5)
        found = []
        for circuit in pair[:2]:
            rows = _rows(circuit.engine.top_down(circuit.probabilities(), share))
            found.append(dict(zip(_owners(circuit), rows, strict=True)))
        for key, one in found[0].items():
            width = min(len(one), len(found[1][key]))
            torch.testing.assert_close(one[:width], found[1][key][:width])
        assert sparse.num_circuits == dense.num_circuits

    def test_queries(self, pair: Any) -> None:
        dense, sparse, case = pair
        x, observed = case.x[:7], case.observed[:7]
        samples = [
            circuit.sample(x=x, observed=observed, generator=torch.Generator().manual_seed(3)) for circuit in pair[:2]
        ]
        assert torch.equal(*samples)
        for one, other in zip(dense.mpe(x, observed), sparse.mpe(x, observed), strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(pc.entropy(dense), pc.entropy(sparse))
        torch.testing.assert_close(pc.kl(dense, sparse), torch.tensor(0.0), atol=1e-12, rtol=0)

    def test_flows_prune_and_grow(self, pair: Any) -> None:
        dense, sparse, case = pair
        graphs = []
        for circuit in (dense, sparse):
            flows = pc.Flows(circuit)
            flows.add(case.x, head=1)
            graphs.append(pc.prune(circuit, flows, threshold=1e-3))
            kronecker = any(node.kronecker for node in case.graph.nodes)
            if not kronecker and not any(node.tied_to is not None for node in case.graph.nodes):
                graphs.append(pc.grow(circuit, flows, heads=[1], generator=torch.Generator().manual_seed(0)))
        half = len(graphs) // 2
        for one, other in zip(graphs[:half], graphs[half:], strict=True):
            assert [node.num_units for node in one.nodes] == [node.num_units for node in other.nodes]
            torch.testing.assert_close(pc.Circuit(one).log_prob(case.x), pc.Circuit(other).log_prob(case.x))

    def test_copies_files_and_states(self, pair: Any, tmp_path: Path) -> None:
        _, sparse, case = pair
        expected = sparse.log_prob(case.x).detach()
        again = pc.Circuit(sparse.to_graph(), layout="sparse")
        assert num_sparse(again) == num_sparse(sparse)
        again.load_state_dict(sparse.state_dict())
        pc.save(sparse, tmp_path / "circuit")
        for circuit in (
            copy.deepcopy(sparse),
            again,
            pc.load(tmp_path / "circuit"),
            copy.deepcopy(sparse).float().double(),
        ):
            torch.testing.assert_close(circuit.log_prob(case.x).detach(), expected, rtol=1e-5, atol=1e-6)

    def test_many_circuits_of_which_some_are_pruned(self, build_case: Callable[..., Any], backend: str) -> None:
        graphs = [build_case("chain", "categorical", 1 + seed % 2, seed).graph for seed in range(4)]
        thin_out(graphs[1], 1), thin_out(graphs[3], 2, 0.3)
        x = build_case("chain", "categorical", 1).x
        dense, sparse = pc.Circuit(graphs, layout="dense"), pc.Circuit(graphs, layout="sparse")
        assert 0 < num_sparse(sparse) < sum(node.kind == "sum" for graph in graphs for node in graph.nodes)
        torch.testing.assert_close(sparse.log_prob(x), dense.log_prob(x))

    def test_wide_layers_in_blocks(self, backend: str) -> None:
        graph = thin_out(pc.hclt(torch.tensor([-1, 0, 1, 1]), 45, pc.Categorical(3)), share=0.3)
        x = torch.randint(3, (333, 4))
        found = []
        for layout in ("dense", "auto"):
            circuit = pc.Circuit(graph, layout=layout)
            circuit.log_prob(x, head=0).sum().backward()
            found.append((circuit, [table.grad for table in circuit.tables]))
        assert num_sparse(found[1][0]) == 3
        assert_same((found[0][0], found[1][0]), [found[0][1], found[1][1]])

    def test_refusals(self) -> None:
        graph = pc.hclt(torch.tensor([-1, 0]), 2, pc.Categorical(3))
        with pytest.raises(ValueError, match="layout: got 'csr', expected one of auto, dense, sparse"):
            pc.Circuit(graph, layout="csr")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="layout: got 'sparse', but logits"):
            pc.Circuit(graph, layout="sparse", parameterization="logits")


def _owners(circuit: pc.Circuit) -> list[tuple[int, int]]:
    return [owner for group in circuit.plan.groups for owner in group.owners]


def _rows(found: list[Tensor]) -> list[Tensor]:
    return [row for table in found for row in table]
