"""The forward pass with linear values against the general one, and when it gives way to it."""

from typing import Any

import pytest
import torch
from helpers.cases import few_structures

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine import log_prob
from lvd_lightning.circuits.engine.kernels.cpu import passes
from lvd_lightning.circuits.engine.linear import inexact, largest_inputs, run_linear
from lvd_lightning.circuits.engine.log_prob import Lease
from lvd_lightning.circuits.engine.workspace import LinearWorkspace


def gradients(circuit: pc.Circuit, x: torch.Tensor, observed: torch.Tensor) -> list[torch.Tensor]:
    circuit.zero_grad()
    log_p = circuit.log_prob(x, observed=observed)
    log_p.where(log_p > -torch.inf, 0.0).sum().backward()
    return [log_p.detach(), *(parameter.grad.clone() for parameter in circuit.parameters())]


def test_both_passes_agree(case: Any) -> None:
    if not case.circuit.engine.is_linear:
        pytest.skip("only the general pass takes this circuit")
    linear = gradients(case.circuit, case.x, case.observed)
    case.circuit.engine.is_linear = False
    general = gradients(case.circuit, case.x, case.observed)
    for first, second in zip(linear, general, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("rare", "is_enough"), [(1e-3, True), (1e-20, False)])
def test_numbers_that_are_too_small_are_found(rare: float, is_enough: bool) -> None:
    """A star whose states never change, and leaves that contradict each other: p(x) is the square of `rare`."""
    torch.set_default_dtype(torch.float32)
    graph = pc.hclt(torch.tensor([-1, 0, 0, 0]), 2, pc.Categorical(2))
    for index, node in enumerate(graph.nodes):
        if node.kind == "input":
            node.params = torch.tensor([[1 - rare, rare], [rare, 1 - rare]])
        elif node.kind == "sum" and index != graph.root:
            node.weight = torch.eye(2)
    circuit = pc.Circuit(graph)
    x = torch.tensor([[0, 1, 1, 0]])
    with torch.no_grad():
        space = Lease(circuit.engine, LinearWorkspace, 1, keep=True).space
        batch, tables = circuit.prepare(x, None), circuit.probabilities()
        run_linear(circuit.engine, batch, tables, space)
        assert (inexact(circuit.engine, batch, tables, space) is None) is is_enough
        expected = pc.Circuit(graph).double().log_prob(x)
        torch.testing.assert_close(circuit.log_prob(x).double(), expected, rtol=1e-4, atol=0)


def contradictions(rare: float = 1e-20) -> list[pc.CircuitGraph]:
    """Three stars whose states never change; in each, one variable may contradict the others at little cost."""
    graphs = []
    for seed in range(3):
        graph = pc.hclt(torch.tensor([-1, 0, 0, 0, 0]), 2, pc.Categorical(2), num_heads=2)
        for index, node in enumerate(graph.nodes):
            if node.kind == "input":
                p = rare if node.variable != seed else 0.4
                node.params = torch.tensor([[1 - p, p], [p, 1 - p]])
            elif node.kind == "sum" and index != graph.root:
                node.weight = torch.eye(2)
        graphs.append(graph)
    return graphs


WORLDS = torch.cartesian_prod(*[torch.arange(2)] * 5)


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def any_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear values by the compiled kernels (where there is a compiler) and without them; single precision."""
    torch.set_default_dtype(torch.float32)
    if not request.param:
        monkeypatch.setattr(passes, "applies", lambda *_: False)


def general_passes(circuit: pc.Circuit, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that the general pass is given, or the one in double precision, as they come."""
    sizes: list[int] = []
    run_forward, run_wide = circuit.engine.run_forward, passes.WideWorkspace.forward

    def forward(space: passes.WideWorkspace, batch: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(batch.size)
        return run_wide(space, batch, *rest)

    monkeypatch.setattr(
        circuit.engine, "run_forward", lambda batch, *rest: (sizes.append(batch.size), run_forward(batch, *rest))
    )
    monkeypatch.setattr(passes.WideWorkspace, "forward", forward)
    return sizes


@pytest.mark.usefixtures("any_pass")
@pytest.mark.parametrize("training", [False, True])
def test_only_what_is_too_small_is_computed_again(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three circuits, each with contradictions of its own: the general pass sees these pairs alone."""
    graphs = contradictions()
    circuit, exact = pc.Circuit(graphs), pc.Circuit(graphs).double()
    observed = torch.ones_like(WORLDS, dtype=torch.bool)
    observed[5, 1] = False
    sizes = general_passes(circuit, monkeypatch)
    weight = torch.rand(3, len(WORLDS), 2)
    with torch.set_grad_enabled(training):
        expected = exact.log_prob(WORLDS, observed=observed)
        found = circuit.log_prob(WORLDS, observed=observed)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert len(sizes) == 1
    assert 0 < sizes[0] < len(WORLDS) / 2
    if training:
        (weight * found).sum().backward()
        (weight.double() * expected).sum().backward()
        for parameter, reference in zip(circuit.parameters(), exact.parameters(), strict=True):
            flow, expected_flow = parameter * parameter.grad, reference * reference.grad
            torch.testing.assert_close(flow.double(), expected_flow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("is_held", [True, False])
def test_double_precision_comes_before_the_general_pass(
    is_held: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many pairs it is. What it does not hold takes the general pass: alone, or in training with the rest."""
    torch.set_default_dtype(torch.float32)
    graphs = contradictions()
    circuit, exact = pc.Circuit(graphs), pc.Circuit(graphs).double()
    if not passes.applies(circuit.engine, circuit.probabilities()):
        pytest.skip("there are no compiled kernels")
    log_p = exact.log_prob(WORLDS)[0, :, 0]
    x = torch.cat([WORLDS[log_p < -90], WORLDS[log_p > -30][:2]])
    general: list[int] = []
    run_forward = circuit.engine.run_forward
    monkeypatch.setattr(
        circuit.engine, "run_forward", lambda batch, *rest: (general.append(batch.size), run_forward(batch, *rest))
    )

    def inexact_too(engine: Any, batch: Any, tables: Any, space: Any, *rest: Any) -> torch.Tensor | None:
        found = inexact(engine, batch, tables, space, *rest)
        if isinstance(space, passes.WideWorkspace) and not is_held:
            assert found is None
            found = torch.zeros(3, batch.size, dtype=torch.bool)
            found[0, 4] = True
        return found

    monkeypatch.setattr(log_prob, "inexact", inexact_too)
    with torch.set_grad_enabled(training):
        found = circuit.log_prob(x)
    torch.testing.assert_close(found.double(), exact.log_prob(x), rtol=1e-4, atol=1e-4)
    assert general == ([] if is_held else [len(x) - 2 if training else 1])


@pytest.mark.usefixtures("any_pass")
@pytest.mark.parametrize("rare", [1e-20, 0.0])
def test_what_is_not_wanted_is_not_computed_again(rare: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it disturb the gradient of the rest, even where an example is impossible."""
    graphs = contradictions(rare)
    circuit, exact = pc.Circuit(graphs), pc.Circuit(graphs).double()
    sizes = general_passes(circuit, monkeypatch)
    expected = exact.log_prob(WORLDS)
    likely = expected > -30
    found = circuit.log_prob(WORLDS, wanted=likely)
    assert sizes == []
    assert bool((found[~likely] == 0).all())
    torch.testing.assert_close(found[likely].double(), expected[likely], rtol=1e-4, atol=1e-4)
    found.sum().backward()
    expected[likely].sum().backward()
    for parameter, reference in zip(circuit.parameters(), exact.parameters(), strict=True):
        flow, expected_flow = parameter * parameter.grad, reference * reference.grad
        torch.testing.assert_close(flow.double(), expected_flow, rtol=1e-4, atol=1e-4)


def test_one_head_of_each_example_is_wanted_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that hardly explains an example does not matter to another one that does."""
    torch.set_default_dtype(torch.float32)
    graph = pc.hclt(torch.tensor([-1, 0]), 2, pc.Categorical(2), num_heads=2)
    for node in graph.nodes:
        if node.kind == "input":
            node.params = torch.tensor([[1 - 1e-25, 1e-25], [1e-25, 1 - 1e-25]])
        elif node.kind == "sum":
            node.weight = torch.eye(2)
    circuit = pc.Circuit(graph)
    sizes = general_passes(circuit, monkeypatch)
    x = torch.tensor([[0, 0], [1, 1]])
    torch.testing.assert_close(circuit.log_prob(x, head=torch.tensor([0, 1])), torch.zeros(2))
    assert sizes == []
    circuit.log_prob(x)
    assert sizes == [2]


@pytest.mark.usefixtures("any_pass")
def test_what_is_far_below_the_best_may_come_out_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never higher, and what is near enough is exact."""
    graphs = contradictions(1e-18)
    circuit, exact = pc.Circuit(graphs), pc.Circuit(graphs).double()
    sizes = general_passes(circuit, monkeypatch)
    with torch.no_grad():
        expected = exact.log_prob(WORLDS)
        best = expected.amax((0, 2), keepdim=True)
        given = []
        for margin in (20.0, 40.0, 400.0):
            found = circuit.log_prob(WORLDS, margin=margin).double()
            near = expected > best - margin
            torch.testing.assert_close(found[near], expected[near], rtol=1e-4, atol=1e-4)
            assert bool((found <= expected + 1e-4).all())
            given.append(sum(sizes))
            sizes.clear()
    assert given[0] < given[1] < given[2]
    with pytest.raises(ValueError, match="margin"):
        circuit.log_prob(WORLDS, margin=10.0)


@few_structures
def test_wanted_results_are_those_of_all(case: Any) -> None:
    """Values and gradients, for every structure; the rest is 0."""
    wanted = torch.rand(len(case.x), case.circuit.num_heads) < 0.5
    whole = case.circuit.log_prob(case.x)
    expected = torch.autograd.grad(whole[wanted & (whole > -torch.inf)].sum(), list(case.circuit.parameters()))
    found = case.circuit.log_prob(case.x, wanted=wanted)
    torch.testing.assert_close(found, torch.where(wanted, whole, 0.0))
    found = found[found > -torch.inf].sum()
    for first, second in zip(torch.autograd.grad(found, list(case.circuit.parameters())), expected, strict=True):
        torch.testing.assert_close(first, second)
    one = case.circuit.log_prob(case.x, head=0, wanted=wanted[:, 0])
    torch.testing.assert_close(one, torch.where(wanted[:, 0], whole[:, 0], 0.0))


def test_wanted_has_the_shape_of_the_result() -> None:
    circuit = pc.Circuit(contradictions())
    for head, wanted in ((None, torch.ones(3, 32)), (None, torch.ones(32, 2) > 0), (0, torch.ones(3, 32, 2) > 0)):
        with pytest.raises(ValueError, match="wanted: got .*expected a bool tensor of shape"):
            circuit.log_prob(WORLDS, head=head, wanted=wanted)


def test_only_trees_over_tables_are_linear() -> None:
    tree = torch.tensor([-1, 0, 0])
    star = torch.tensor([-1] + [0] * 40)
    assert pc.Circuit(pc.hclt(tree, 2, pc.Bernoulli())).engine.is_linear
    assert not pc.Circuit(pc.hclt(tree, 2, pc.Gaussian())).engine.is_linear
    assert not pc.Circuit(pc.hclt(tree, 2, pc.SoftEvidence(2))).engine.is_linear
    assert not pc.Circuit(pc.hclt(star, 2, pc.Bernoulli())).engine.is_linear  # a product of 41 factors
    mixture = pc.CircuitGraph()
    leaves = [mixture.add_input(0, pc.Categorical(3), 2) for _ in range(2)]
    mixture.add_sum(leaves, 1)
    assert not pc.Circuit(mixture).engine.is_linear


@pytest.mark.usefixtures("any_pass")
def test_circuits_without_such_examples_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three circuits explain every example; the third one alone is computed again for one of them."""
    graphs = contradictions()
    circuit, exact = pc.Circuit(graphs), pc.Circuit(graphs).double()
    few = torch.tensor([[0, 0, 1, 1, 1]] + [[0, 0, 0, 0, 0]] * 7)
    sizes = general_passes(circuit, monkeypatch)
    for _ in range(2):  # buffers that were used before
        circuit.zero_grad()
        exact.zero_grad()
        found, expected = circuit.log_prob(few), exact.log_prob(few)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        found.sum().backward()
        expected.sum().backward()
        for parameter, reference in zip(circuit.parameters(), exact.parameters(), strict=True):
            flow, expected_flow = parameter * parameter.grad, reference * reference.grad
            torch.testing.assert_close(flow.double(), expected_flow, rtol=1e-4, atol=1e-4)
    assert sizes
    assert max(sizes) < len(few)


def wide_batch(size: int) -> tuple[pc.Circuit, torch.Tensor]:
    """Three random trees over values of which some lie far out in the tails of all units."""
    torch.manual_seed(0)
    graphs = [pc.hclt(torch.tensor([-1, 0, 0, 1, 2, 2]), 5, pc.DiscretizedLogistic(256), num_heads=2) for _ in range(3)]
    circuit = pc.Circuit(graphs)
    x = torch.randint(0, 256, (3, size, 6))
    x[:, ::3] = 128
    return circuit, x


def needs_kernels(circuit: pc.Circuit) -> None:
    if not passes.applies(circuit.engine, circuit.probabilities()):
        pytest.skip("there are no compiled kernels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_the_bound_of_the_error_is_the_same_in_the_kernels(dtype: torch.dtype, masked: bool) -> None:
    torch.set_default_dtype(dtype)
    circuit, x = wide_batch(70)
    needs_kernels(circuit)
    observed = torch.rand(x.shape) < 0.8 if masked else None
    engine, batch = circuit.engine, circuit.prepare(x, observed)
    tables = [table.detach() for table in circuit.probabilities()]
    fused = Lease(engine, passes.FusedWorkspace, 70, keep=False).space
    run_linear(engine, batch, tables, fused)
    inputs = largest_inputs(engine, batch, tables, fused)
    found = fused.error(engine.error_bound(), inputs)
    peaks, largest = fused._columns(fused.peaks_JNC), fused._columns(fused.largest_JNC)
    expected = engine.error_bound().error(peaks.double(), largest.double(), inputs.double())
    smallest = torch.finfo(dtype).tiny / torch.finfo(torch.float64).tiny
    torch.testing.assert_close(found, expected * smallest, rtol=1e-6, atol=0)
    assert bool((found > 0).all())
    assert inputs.shape == (3 * 6, 70)
    if masked:
        hidden = torch.cat([~seen for seen in batch.observed])
        assert bool((inputs[hidden] == 1).all())


def test_circuits_compute_the_columns_that_they_need() -> None:
    """The first of 130 examples: all, three, none; the rest counts for nothing in the gradients."""
    torch.set_default_dtype(torch.float32)
    circuit, x = wide_batch(130)
    needs_kernels(circuit)
    engine, batch = circuit.engine, circuit.prepare(x, None)
    tables = [table.detach() for table in circuit.probabilities()]
    columns, wanted = torch.tensor([130, 3, 0]), torch.zeros(3, 2, 130)
    for g, count in enumerate(columns.tolist()):
        wanted[g, :, :count] = torch.rand(2, count)
    found = []
    for counts in (None, columns):
        space = Lease(engine, passes.WideWorkspace, 130, keep=True).space
        for buffer in (space.sums_JVC, space.inner_JEC, space.scaled_JVC, space.peaks_JNC):
            buffer.fill_(torch.nan if counts is not None else 0.0)
        log_p, _ = space.forward(batch, tables, counts)
        grads = [torch.empty_like(table) for table in tables]
        sums = [engine.statistics_of(layer.group, tables[layer.group]) for layer in engine.leaf_layers()]
        space.backward(batch, tables, grads, wanted, sums)
        found.append((log_p.where(wanted > 0, 0.0), grads))
    (log_p, grads), (fewer_log_p, fewer_grads) = found
    assert torch.equal(log_p, fewer_log_p)
    for grad, fewer in zip(grads, fewer_grads, strict=True):
        torch.testing.assert_close(grad, fewer, rtol=1e-6, atol=1e-30)
