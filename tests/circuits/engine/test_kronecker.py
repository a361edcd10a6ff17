"""Kronecker products that are not stored: everything is as with stored ones, in float64, with fewer rows.

Shapes: B examples, D variables.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine import grids, layers
from lvd_lightning.circuits.engine.kronecker import KroneckerLayer

Compile = Callable[..., pc.Circuit]
VALUES = 4


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Compile:
    """A circuit whose products are stored."""
    return _compiler(monkeypatch, 1 << 40)


@pytest.fixture
def implicit(monkeypatch: pytest.MonkeyPatch) -> Compile:
    """The same, with factors alone however small they are."""
    return _compiler(monkeypatch, 1)


def _compiler(monkeypatch: pytest.MonkeyPatch, least: int) -> Compile:
    def make(graphs: Any, **settings: Any) -> pc.Circuit:
        with monkeypatch.context() as patch:
            patch.setattr(grids, "LEAST_UNITS", least)
            patch.setattr(grids, "LEAST_LINEAR", least)
            circuit = pc.Circuit(graphs, **settings)
        assert any(isinstance(layer, KroneckerLayer) for layer in circuit.engine.layers) == (least == 1)
        return circuit

    return make


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rat(leaf: pc.Distribution, repetitions: int = 2, heads: int = 2, size: int = 5, units: int = 3) -> pc.CircuitGraph:
    return pc.rat_spn(
        size,
        depth=3,
        num_repetitions=repetitions,
        num_sums=units,
        num_leaves=units,
        leaf=leaf,
        num_heads=heads,
        product="kronecker",
        generator=seeded(repetitions),
    )


def uneven(leaf: pc.Distribution) -> pc.CircuitGraph:
    """Factors of two and of three units, the second of which two products share; a sum that mixes two such grids."""
    generator, graph = seeded(3), pc.CircuitGraph()
    a, b, c = (graph.add_input(v, leaf, width, generator=generator) for v, width in enumerate((2, 3, 3)))
    ab = graph.add_sum([kronecker(graph, a, b)], 2, generator=generator)
    ac = graph.add_sum([kronecker(graph, a, c)], 2, generator=generator)
    graph.add_sum([kronecker(graph, ab, c), kronecker(graph, ac, b)], 3, generator=generator)
    return graph


def kronecker(graph: pc.CircuitGraph, first: int, second: int) -> int:
    sizes = [graph.nodes[child].num_units for child in (first, second)]
    return graph.add_product([first, second], torch.cartesian_prod(*map(torch.arange, sizes)))


def rectangles(leaf: pc.Distribution) -> pc.CircuitGraph:
    """Regions with one to four cuts."""
    return pc.poon_domingos(
        (3, 3, 1), delta=1, num_units=3, leaf=leaf, product="kronecker", num_heads=2, generator=seeded(1)
    )


def batch(leaf: pc.Distribution) -> list[pc.CircuitGraph]:
    """Circuits with one and three heads, of one and of three repetitions."""
    return [rat(leaf, 1, 1), rat(leaf, 3, 3), rat(leaf, 2, 1)]


STRUCTURES: dict[str, Callable[[pc.Distribution], Any]] = {
    "rat": rat,
    "tree": lambda leaf: rat(leaf, 1),
    "uneven": uneven,
    "rectangles": rectangles,
    "batch": batch,
}


@pytest.fixture(params=STRUCTURES)
def graphs(request: pytest.FixtureRequest) -> Any:
    return STRUCTURES[request.param](pc.Categorical(VALUES))


def examples(circuit: pc.Circuit, count: int = 7) -> Tensor:
    return torch.randint(VALUES, (count, circuit.num_variables), generator=seeded(0))


def some_observed(x: Tensor) -> Tensor:
    observed = torch.rand(x.shape, generator=seeded(1)) < 0.6
    observed[0], observed[1] = True, False
    return observed


def gradients(circuit: pc.Circuit, x: Tensor, **settings: Any) -> list[Tensor]:
    """What flows along all parameters, in the order of the nodes of the graphs."""
    circuit.zero_grad()
    log_p = circuit.log_prob(x, **settings)
    factors = torch.rand(log_p.shape, generator=seeded(2)).to(log_p.device)
    torch.where(log_p > -torch.inf, log_p * factors, 0.0).sum().backward()
    found = {}
    for group, table in zip(circuit.plan.groups, circuit.tables, strict=True):
        assert table.grad is not None
        for row, (g, index) in enumerate(group.owners):
            node = circuit.structures[g].nodes[index]
            width = sum(circuit.structures[g].nodes[child].num_units for child in node.children) or None
            found[g, index] = table.grad[row, : node.num_units, :width].clone()
    return [found[key] for key in sorted(found)]


def check_equal(one: pc.Circuit, other: pc.Circuit, x: Tensor, **settings: Any) -> None:
    torch.testing.assert_close(one.log_prob(x, **settings), other.log_prob(x, **settings), rtol=1e-11, atol=1e-11)
    for a, b in zip(gradients(one, x, **settings), gradients(other, x, **settings), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(one.log_prob(x, **settings), other.log_prob(x, **settings), rtol=1e-11, atol=1e-11)


def test_values_and_gradients(graphs: Any, stored: Compile, implicit: Compile) -> None:
    one, other = implicit(graphs), stored(graphs)
    x = examples(one)
    check_equal(one, other, x)
    check_equal(one, other, x, observed=some_observed(x))
    check_equal(one, other, x[:1])


@pytest.mark.parametrize("size", [1, 40, 300])
def test_pieces_of_any_size(
    graphs: Any, stored: Compile, implicit: Compile, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Some folds at once, one fold at once, and some examples of one fold; as on an accelerator, too."""
    monkeypatch.setattr(layers, "CACHE_SIZE", size)
    one, other = implicit(graphs), stored(graphs)
    check_equal(one, other, examples(one))


def test_normalised(implicit: Compile) -> None:
    circuit = implicit(rat(pc.Categorical(2)))
    worlds = torch.tensor(list(itertools.product(range(2), repeat=5)))
    torch.testing.assert_close(circuit.log_prob(worlds).exp().sum(0), torch.ones(2))


def test_the_sum_is_the_one_that_it_stands_for(implicit: Compile) -> None:
    """Two variables: sum_ij W[h, (i, j)] a_i b_j, spelt out."""
    graph = pc.CircuitGraph()
    a, b = (graph.add_input(v, pc.Categorical(VALUES), width) for v, width in enumerate((2, 3)))
    root = graph.add_sum([kronecker(graph, a, b)], 2)
    x = torch.cartesian_prod(torch.arange(VALUES), torch.arange(VALUES))
    first, second, weight = graph.nodes[a].params, graph.nodes[b].params, graph.nodes[root].weight
    assert first is not None
    assert second is not None
    assert weight is not None
    expected = torch.einsum("hij,ib,jb->bh", weight.view(2, 2, 3), first[:, x[:, 0]], second[:, x[:, 1]])
    torch.testing.assert_close(implicit(graph).log_prob(x), expected.log())


def test_layers_pad_products_and_heads(implicit: Compile) -> None:
    """What the comparisons above rest on: some nodes have fewer products, or units, than their layer has room for."""
    circuit = implicit(batch(pc.Categorical(VALUES)))
    found = set()
    for layer, plan in zip(circuit.engine.layers, circuit.plan.layers, strict=True):
        if isinstance(layer, KroneckerLayer):
            nodes = [circuit.structures[g].nodes[index] for g, index in plan.nodes]
            found |= {"products" for node in nodes if len(node.children) < layer.num_products}
            found |= {"heads" for node in nodes if node.num_units < layer.outer_units}
    assert found == {"products", "heads"}


@pytest.mark.parametrize("leaf", [pc.Gaussian(), pc.Bernoulli()])
def test_other_inputs(leaf: pc.Distribution, stored: Compile, implicit: Compile) -> None:
    graph = rat(leaf)
    one, other = implicit(graph), stored(graph)
    x = torch.randn(6, 5, generator=seeded(0)) if isinstance(leaf, pc.Gaussian) else examples(one) % 2
    check_equal(one, other, x)


def test_evidence_gets_its_gradient(stored: Compile, implicit: Compile) -> None:
    graph = rat(pc.SoftEvidence(3))
    found = []
    for circuit in (implicit(graph), stored(graph)):
        x = torch.randn(6, 5, 3, generator=seeded(0)).requires_grad_()
        log_p = circuit.log_prob(x)
        log_p.sum().backward()
        found.append((log_p.detach(), x.grad))
    torch.testing.assert_close(*found)


def test_impossible_examples_and_zero_weights(graphs: Any, stored: Compile, implicit: Compile) -> None:
    """Values that no unit, or one unit alone, can have; edges without weight; heads that nothing explains."""
    for graph in graphs if isinstance(graphs, list) else [graphs]:
        for number, node in enumerate(graph.nodes):
            if node.params is not None:
                node.params = node.params.clone()
                node.params[:, 0] = 0.0
                node.params[1:, 1] = 0.0
                node.params /= node.params.sum(1, keepdim=True)
            if node.weight is not None:
                keep = torch.rand(node.weight.shape, generator=seeded(number)) < 0.5
                keep[:, number % keep.shape[1]] = True
                node.weight = node.weight * keep / (node.weight * keep).sum(1, keepdim=True)
    one, other = implicit(graphs), stored(graphs)
    x = examples(one, 60)
    x[20:] = x[20:].clamp_min(1)
    log_p = one.log_prob(x)
    assert bool((log_p == -torch.inf).any())
    assert bool((log_p > -torch.inf).any())
    assert not bool(log_p.isnan().any())
    check_equal(one, other, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [1, 2])
def test_sums_that_underflow(dtype: torch.dtype, depth: int, stored: Compile, implicit: Compile) -> None:
    """The largest pair of units has no weight, and the others are far below what the type can hold beside it."""
    graph = pc.rat_spn(
        60,
        depth=depth,
        num_repetitions=3,
        num_sums=3,
        num_leaves=3,
        leaf=pc.Categorical(VALUES),
        num_heads=2,
        product="kronecker",
        generator=seeded(0),
    )
    for node in graph.nodes:
        if node.params is not None:  # a leaf has 15 variables, or 30
            node.params = node.params.clone()
            node.params[1:, :-1] = 1e-29
            node.params[1:, -1] = 1.0
            node.params = node.params.to(dtype)
        if node.weight is not None:
            node.weight = node.weight.clone()
            node.weight[:, ::9] = 0.0
            node.weight = (node.weight / node.weight.sum(1, keepdim=True)).to(dtype)
    one, other = implicit(graph), stored(graph)
    x = torch.randint(VALUES, (50, 60), generator=seeded(0))
    x[:25].clamp_max_(VALUES - 2)
    lease = one.engine.lease(len(x), keep=True)
    with torch.no_grad():
        one.engine.run_forward(one.prepare(x, None), list(one.tables), lease.space)
    assert any(isinstance(one.engine.layers[entry.layer], KroneckerLayer) for entry in lease.space.underflow)
    exact = 3e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(one.log_prob(x), other.log_prob(x), rtol=exact, atol=exact)
    for a, b, node in zip(gradients(one, x), gradients(other, x), _owners(graph), strict=True):
        value = node.params if node.weight is None else node.weight
        assert value is not None
        torch.testing.assert_close(a * value, b * value, rtol=exact, atol=exact)  # the gradient alone may be 1e29


def _owners(graph: pc.CircuitGraph) -> list[pc.Node]:
    return [node for node in graph.nodes if node.params is not None or node.weight is not None]


def test_flows_of_all_units_and_pruning(graphs: Any, stored: Compile, implicit: Compile) -> None:
    circuits = [implicit(graphs), stored(graphs)]
    x = examples(circuits[0], 30)
    flows = [pc.Flows(circuit) for circuit in circuits]
    for found in flows:
        found.add(x, chunk_size=11)
    for one, other in zip(*(found.all_units() for found in flows), strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), rtol=1e-9, atol=1e-10)
    for threshold in (0.01, 0.1):
        pruned = [pc.prune(circuit, found, threshold) for circuit, found in zip(circuits, flows, strict=True)]
        found = [pc.Circuit(some).log_prob(x) for some in pruned]
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_pruned_circuit_that_kept_its_pairs(stored: Compile, implicit: Compile) -> None:
    """Edges without weight, masked: dense where most are left."""
    graph = rat(pc.Categorical(VALUES))
    for number, node in enumerate(graph.nodes):
        if node.weight is not None:
            node.mask = torch.rand(node.weight.shape, generator=seeded(number)) < 0.9
            node.mask[:, 0] = True
            node.weight = node.weight * node.mask / (node.weight * node.mask).sum(1, keepdim=True)
    one, other = implicit(graph), stored(graph)
    x = examples(one)
    check_equal(one, other, x)
    for circuit in (one, other):
        optimizer = pc.CircuitEM(circuit, lr=0.5, pseudocount=0.1)
        (-circuit.log_prob(x).sum()).backward()
        optimizer.step()
    torch.testing.assert_close(one.log_prob(x), other.log_prob(x), rtol=1e-10, atol=1e-10)


def test_posteriors_of_pairs(graphs: Any, stored: Compile, implicit: Compile) -> None:
    if not isinstance(graphs, list) and not graphs.latents:
        products = [index for index, node in enumerate(graphs.nodes) if node.kind == "product"]
        graphs.latents.update(enumerate(products))
    one, other = implicit(graphs), stored(graphs)
    x = examples(one)
    latents = set.intersection(*(set(found.latents) for found in one.structures))
    assert latents
    for latent in latents:
        found = [circuit.posterior(x, latent, observed=some_observed(x)) for circuit in (one, other)]
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="node: 99 names no latent"):
        one.posterior(x, 99)


def test_other_queries(graphs: Any, stored: Compile, implicit: Compile) -> None:
    one, other = implicit(graphs), stored(graphs)
    x = examples(one)
    observed = some_observed(x)
    for found in zip(one.mpe(_for(one, x), _for(one, observed)), other.mpe(_for(one, x), _for(one, observed))):
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    for query in (pc.entropy, lambda circuit: pc.kl(circuit, circuit)):
        torch.testing.assert_close(query(one), query(other), rtol=1e-10, atol=1e-10)
    means = [
        pc.expectation(circuit, lambda value, variable: value, x=_for(one, x), observed=_for(one, observed))
        for circuit in (one, other)
    ]
    torch.testing.assert_close(*means, rtol=1e-10, atol=1e-10)


def _for(circuit: pc.Circuit, rows: Tensor) -> Tensor:
    """Rows given to every circuit of a batch."""
    return rows.expand(circuit.num_circuits, *rows.shape).clone() if circuit.batched else rows


def test_samples_have_the_distribution(implicit: Compile) -> None:
    """Of two variables given the third, chi-square."""
    circuit = implicit(uneven(pc.Categorical(3)))
    x = torch.zeros(20_000, 3, dtype=torch.int64)
    observed = torch.tensor([False, False, True]).expand(x.shape)
    drawn = circuit.sample(x=x, observed=observed, head=2, generator=seeded(4))
    worlds = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.zeros(1, dtype=torch.int64))
    expected = circuit.log_prob(worlds, head=2).softmax(0).detach() * len(x)
    counts = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9)
    assert float(((counts - expected) ** 2 / expected).sum()) < 27  # 8 degrees of freedom: 0.1 % are above 26.1


def test_steps_of_em_are_the_same(graphs: Any, stored: Compile, implicit: Compile) -> None:
    circuits = [implicit(graphs), stored(graphs)]
    x = examples(circuits[0], 40)
    for circuit in circuits:
        optimizer = pc.Anemone(circuit, lr=0.5)
        for _ in range(4):
            (-circuit.log_prob(x).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    found = [circuit.log_prob(x) for circuit in circuits]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_logits(stored: Compile, implicit: Compile) -> None:
    graph = rat(pc.Categorical(VALUES))
    one, other = (make(graph, parameterization="logits") for make in (implicit, stored))
    check_equal(one, other, examples(one))


def test_pieces_cover_everything_once(implicit: Compile) -> None:
    """All folds and examples, in scratch memory that is made for them, on whatever device."""
    circuit = implicit(rat(pc.Categorical(VALUES)))
    for layer in circuit.engine.layers:
        if isinstance(layer, KroneckerLayer):
            for device, batch in itertools.product((torch.device("cpu"), torch.device("cuda")), (1, 7, 100_000)):
                seen = torch.zeros(layer.num_folds, batch, dtype=torch.int64)
                for a, b, c, d in layer._pieces(batch, device):
                    seen[a:b, c:d] += 1
                    size = (b - a) * (d - c) * layer.inner_units
                    assert size <= layer.scratch_size(batch, device, backward=False)
                assert bool((seen == 1).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(graphs: Any, implicit: Compile) -> None:
    one, other = implicit(graphs), implicit(graphs).cuda()
    x = examples(one)
    torch.testing.assert_close(other.log_prob(x.cuda()).cpu(), one.log_prob(x), rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(one, x), gradients(other, x.cuda()), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-9, atol=1e-10)


def test_rows_grow_with_the_units_not_their_square() -> None:
    """Two partitions of the root, of six variables each: without stored products, at the sizes where that pays."""
    rows = {}
    for units in (4, 5, 16, 32):
        circuit = pc.Circuit(rat(pc.Categorical(2), size=6, units=units, heads=1))
        rows[units] = circuit.plan.num_edge_rows - 2
        parts = sum(len(node.children) for node in circuit.structures[0].nodes if node.kind == "sum")
        assert rows[units] >= parts * (units**2 if units == 4 else 2 * units)  # and padding
        assert bool(circuit.plan.implicit) == (units > 4)
    assert rows[32] == 2 * rows[16]


def test_trees_over_tables_keep_linear_values_as_long_as_these_are_faster() -> None:
    leaf = pc.Categorical(3)
    small, large = (pc.Circuit(rat(leaf, 1, 1, units=units)) for units in (8, 16))
    assert (small.engine.is_linear, bool(small.plan.implicit)) == (True, False)
    assert (large.engine.is_linear, bool(large.plan.implicit)) == (False, True)
    assert pc.Circuit(rat(pc.Gaussian(), 1, 1, units=8)).plan.implicit


def test_products_that_others_use_or_that_skip_pairs_are_stored(implicit: Compile, stored: Compile) -> None:
    """A product with two consumers, one without a pair of units, one with the pairs in another order, tied sums."""
    leaf, graph = pc.Categorical(VALUES), pc.CircuitGraph()
    a, b, c, d = (graph.add_input(v, leaf, 2) for v in range(4))
    shared = kronecker(graph, a, b)
    parts = [graph.add_sum([shared], 2) for _ in range(2)]
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    some = graph.add_sum([graph.add_product([c, d], grid[:3])], 2)
    turned = graph.add_sum([graph.add_product([c, d], grid.flip(0))], 2)
    tied = graph.add_sum([kronecker(graph, c, d)], 2)
    again = graph.add_sum([kronecker(graph, c, d)], 2, tied_to=tied)
    roots = [
        kronecker(graph, parts[0], some),
        kronecker(graph, parts[1], turned),
        kronecker(graph, parts[0], tied),
        kronecker(graph, parts[1], again),
    ]
    graph.add_sum(roots, 2)
    one, other = implicit(graph), stored(graph)
    assert {index for _, index in one.plan.implicit} == set(roots)
    check_equal(one, other, examples(one))
