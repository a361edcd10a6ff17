"""The fused kernels for a GPU: in Triton's interpreter against float64, compiled without a device, and on one.

Triton decides when it is imported whether it interprets kernels, so that tests of their numbers run in a process of
their own, with TRITON_INTERPRET=1; `test_in_the_interpreter` starts it.
"""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lvd_lightning.circuits as pc
from lvd_lightning.circuits import kernel_check
from lvd_lightning.circuits.engine import bad_flows
from lvd_lightning.circuits.engine import batch as batches
from lvd_lightning.circuits.engine.kernels import triton as triton_kernels
from lvd_lightning.circuits.engine.kronecker import KroneckerLayer
from lvd_lightning.circuits.engine.layers import Layer
from lvd_lightning.circuits.engine.workspace import Workspace

interpreted = pytest.mark.skipif(
    not triton_kernels.interprets(), reason="runs in a process of its own, see the docstring"
)
compiled = pytest.mark.skipif(triton_kernels.interprets(), reason="Triton interprets kernels in this process")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a small circuit has several in every direction."""
    passes = pytest.importorskip("lvd_lightning.circuits.engine.kernels.triton.passes")
    monkeypatch.setattr(passes, "TILES", passes.Tiles(units=16, columns=16, depth=16))
    monkeypatch.setattr(passes, "MOVED", 16)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check values behind the computation, as on a GPU."""
    monkeypatch.setattr(batches, "is_late", lambda device: True)
    monkeypatch.setattr(bad_flows, "is_late", lambda device: True)


@compiled
def test_in_the_interpreter() -> None:
    """All tests that are marked so, with the numbers of the kernels."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(Path(__file__))]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def evaluate(circuit: pc.Circuit, x: Tensor, observed: Tensor | None = None) -> list[Tensor]:
    """Log-likelihoods under all heads and, with them, flows: parameters times the gradient of a weighted sum."""
    circuit.zero_grad()
    circuit.engine.gradient_pool = {n: torch.full_like(table, torch.nan) for n, table in enumerate(circuit.tables)}
    log_p = circuit.log_prob(x, observed=observed)
    weight = torch.linspace(0.5, 2.0, log_p.numel(), dtype=log_p.dtype, device=log_p.device).view_as(log_p)
    (weight * log_p.where(log_p > -torch.inf, 0.0)).sum().backward()
    return [log_p.detach(), *(table.grad * table.detach() for table in circuit.tables)]


def compare(circuit: pc.Circuit, x: Tensor, observed: Tensor | None = None, tolerance: float = 2e-5) -> pc.Circuit:
    """The kernels, in float32, against PyTorch in float64; returns the circuit in float32."""
    single = copy.deepcopy(circuit).float()
    with triton_kernels.switched(True):
        found = evaluate(single, x, observed)
    with triton_kernels.switched(False):
        expected = evaluate(copy.deepcopy(single).double(), x, observed)
    for a, b in zip(found, expected, strict=True):
        size = float(1 + b[b.isfinite()].abs().max())
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * size)
    return single


@interpreted
@pytest.mark.parametrize(
    ("structure", "leaf", "heads"),
    [
        ("sparse", "categorical", 1),
        ("shared", "categorical", 3),
        ("tied", "bernoulli", 2),
        ("ragged", "categorical", 2),
        ("shared", "gaussian", 1),
        ("embedded", "categorical", 2),
    ],
)
def test_structures(build_case: Callable[..., Any], structure: str, leaf: str, heads: int) -> None:
    """Ragged, shared, tied, masked; with and without unobserved variables."""
    case = build_case(structure, leaf, heads)
    rows = torch.randperm(len(case.x))[:4]
    compare(case.circuit, case.x[rows], case.observed[rows] if heads == 2 else None)


@interpreted
@pytest.mark.parametrize("rule", [pc.CircuitEM, pc.Anemone])
@pytest.mark.usefixtures("late")
def test_live_edges_alone(build_case: Callable[..., Any], rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that store no others: values, gradients, and a step in which no number is read."""
    case = build_case("sparse", "categorical", 2)
    circuit = pc.Circuit(case.graph, layout="sparse")
    assert any(group.edges is not None for group in circuit.plan.groups)
    compare(circuit, case.x[:4], case.observed[:4])
    single, optimizer = circuit.float(), rule(circuit)
    monkeypatch.setattr("lvd_lightning.circuits.em.may_ask", lambda tensor: False)
    monkeypatch.setattr("lvd_lightning.circuits.engine.bad_flows.may_ask", lambda tensor: False)
    with triton_kernels.switched(True), NoHostReads():
        (-single.log_prob(case.x[:4].float(), head=0).sum()).backward()
        optimizer.step()


@interpreted
def test_kronecker_products_that_are_not_stored() -> None:
    """PyTorch has these layers, the kernels those around them."""
    circuit = pc.Circuit(
        pc.rat_spn(8, depth=2, num_repetitions=2, num_sums=5, num_leaves=5, leaf=pc.Categorical(3), product="kronecker")
    )
    kinds = {type(layer) for layer in circuit.engine.layers}
    assert kinds == {Layer, KroneckerLayer}
    compare(circuit, torch.randint(3, (3, 8)), torch.rand(3, 8) < 0.8)


@interpreted
@pytest.mark.parametrize(("num_latents", "size"), [(1, 1), (18, 20), (16, 32)])
@pytest.mark.usefixtures("small_tiles")
def test_sizes_that_tiles_divide_or_not(num_latents: int, size: int) -> None:
    """Several circuits and heads, one of which a circuit lacks."""
    graphs = [pc.hclt(torch.tensor([-1, 0]), num_latents, pc.Categorical(5), num_heads=1 + g) for g in range(2)]
    compare(pc.Circuit(graphs), torch.randint(5, (2, size, 2)), torch.rand(2, size, 2) < 0.7)


def contradictory(tied: bool = False) -> tuple[pc.Circuit, Tensor]:
    """Variables that pull latents towards states that the tree keeps apart: sums far below their largest term."""
    parents = torch.tensor([-1, 0, 1])
    graph = pc.hclt(parents, 3, pc.Categorical(4), num_heads=2)
    for node in graph.nodes:
        if node.kind == "input":
            low = 1e-25
            node.params = torch.full((3, 4), low) + torch.eye(3, 4) * (1 - 3 * low)
        elif node.weight is not None and node.weight.shape == (3, 3):
            node.weight = torch.eye(3) + 1e-36 * torch.tensor([[0, 1, 0], [1, 0, 100], [0, 30, 0]])
    if tied:
        sums = [index for index, node in enumerate(graph.nodes) if node.kind == "sum" and index != graph.root]
        graph.nodes[sums[1]].tied_to, graph.nodes[sums[1]].weight = sums[0], None
    x = torch.cartesian_prod(*[torch.arange(3)] * 3)
    return pc.Circuit(graph), x


@interpreted
@pytest.mark.parametrize("tied", [False, True])
def test_sums_that_underflow(tied: bool) -> None:
    """They are computed in log space: in the same launch, with the same gradients."""
    circuit, x = contradictory(tied)
    single = compare(circuit, x, tolerance=1e-4)
    spaces = [space for _, space in single.engine.pool.free if isinstance(space, Workspace) and space.keep]
    assert any(bool((space.sums < 0).any()) for space in spaces)


@interpreted
@pytest.mark.usefixtures("small_tiles")
def test_underflow_in_some_tiles_only() -> None:
    circuit, x = contradictory()
    same = torch.zeros(40, 3, dtype=torch.int64)
    same[20:30] = x[:10]
    compare(circuit, same, tolerance=1e-4)


@interpreted
def test_examples_without_support() -> None:
    """log p is -inf, and neither it nor the gradients of others turn into NaN."""
    graph = pc.hclt(torch.tensor([-1, 0, 0]), 3, pc.Categorical(4))
    for node in graph.nodes:
        if node.kind == "input":
            node.params[:, 1] = 0
            node.params[1] = torch.tensor([0.0, 0.0, 0.5, 0.5])
            node.params /= node.params.sum(1, keepdim=True)
    circuit = pc.Circuit(graph).float()
    x = torch.tensor([[0, 1, 0], [0, 0, 0], [2, 3, 2]])
    compare(circuit, x)
    with triton_kernels.switched(True):
        log_p = circuit.log_prob(x, head=0)
        log_p.sum().backward()
    assert log_p[0] == -torch.inf
    assert log_p[1:].isfinite().all()
    assert all(table.grad.isfinite().all() for table in circuit.tables)


@interpreted
@pytest.mark.parametrize(
    ("structure", "leaf", "rule"),
    [
        *(("sparse", "categorical", rule) for rule in ("em", "anemone")),
        ("shared", "categorical", "em without pseudocount"),
        *(("tied", "ordered", rule) for rule in ("anemone", "em without pseudocount")),
    ],
)
def test_steps_of_em(build_case: Callable[..., Any], structure: str, leaf: str, rule: str) -> None:
    case = build_case(structure, leaf, 2)
    x = case.x[:3]
    rules = {
        "em": lambda circuit: pc.CircuitEM(circuit, lr=0.3),
        "anemone": pc.Anemone,
        "em without pseudocount": lambda circuit: pc.CircuitEM(circuit, lr=1, pseudocount=0),
    }
    results = []
    for on in (True, False):
        circuit = copy.deepcopy(case.circuit).float()
        optimizer = rules[rule](circuit)
        for _ in range(2):
            with triton_kernels.switched(on):
                optimizer.zero_grad()
                (-circuit.log_prob(x, head=0).sum()).backward()
                optimizer.step()
        results.append([table.detach() for table in circuit.tables])
    for a, b, start in zip(*results, case.circuit.tables, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert not torch.equal(a, start.float())


@interpreted
def test_updates_forget_and_keep_a_floor() -> None:
    """The kernels of M-steps, number by number; see `cpu.updates.update_table`."""
    from lvd_lightning.circuits.engine.kernels.triton.updates import update_table

    settings = {"step": 0.5, "floor": True}
    theta = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    theta[0, 0, 0] = 1e-31
    grad = torch.tensor([[[0.0, -2.0, 0.0], [0.0, 0.0, -3.0]]])
    with triton_kernels.switched(True):
        theta, grad = theta.float(), grad.float()
        assert update_table(theta, grad, None, pseudocount=0.0, **settings)
        flow = torch.tensor([[[1e-31, 2.0, 0.0]]]).float()
        kept, gradient = torch.tensor([[[0.2, 0.3, 0.5]]]).float(), torch.tensor([[[0.0, -1.0, 0.0]]]).float()
        assert update_table(
            kept, gradient, None, flow_PXY=flow, momentum=0.9, forgotten=1e-30, pseudocount=0.0, **settings
        )
        live = torch.tensor([[[True, True, False]]])
        scale = torch.tensor([[[4.0]]]).float()
        assert update_table(kept, None, live, flow_PXY=flow, scale_PX1=scale, pseudocount=0.2, **settings)
    assert theta[0].tolist() == [[pytest.approx(1e-30), pytest.approx(0.75), 0.0], [1.0, 0.0, 0.0]]
    assert flow.flatten().tolist() == [0.0, pytest.approx(1.83), 0.0]
    numerators = [4 * p + 0.5 * f + a for p, f, a in ((0.2, 0, 0.1), (0.3, 1.83, 0.1), (0.5, 0, 0))]
    expected = [number / (0.5 * 1.83 + 4.2) for number in numerators]
    assert kept.flatten().tolist() == pytest.approx(expected)


@interpreted
def test_flows_and_posteriors(build_case: Callable[..., Any]) -> None:
    case = build_case("chain", "categorical", 1)
    circuit, x = copy.deepcopy(case.circuit).float(), case.x[:5]
    results = []
    for on in (True, False):
        with triton_kernels.switched(on):
            flows = pc.Flows(circuit)
            flows.add(x)
            results.append([flows.inner_E, *flows.tables[1:], circuit.posterior(x, 1)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@interpreted
def test_precisions_differ_as_they_should() -> None:
    """Fewer bits, more error: 24 of them, 11 and 8."""
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0, 0]), 20, pc.Categorical(4))).float()
    x = torch.randint(4, (16, 3))
    exact = copy.deepcopy(circuit).double().log_prob(x, head=0)
    error = {}
    for precision in ("ieee", "tf32", "bf16"):
        circuit.matmul_precision = precision
        with torch.no_grad(), triton_kernels.switched(True):
            error[precision] = float((circuit.log_prob(x, head=0) - exact).abs().max())
    assert error["ieee"] < 2e-6 < error["tf32"] < 2e-3
    assert 2 * error["tf32"] < error["bf16"] < 2e-2


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any, launches: list[str]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        self.launches.append(str(self.kernel))
        return self.kernel[grid]


@interpreted
def test_launches_are_bounded_by_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight for every level of sums, whatever the number of variables."""
    from lvd_lightning.circuits.engine.kernels.triton import layer_kernels

    launches: list[str] = []
    names = ("multiply", "mix", "mend_sums", "pull", "backward_inner", "mend_inner", "backward_weight", "mend_weight")
    for name in names:
        monkeypatch.setattr(layer_kernels, name, Counted(getattr(layer_kernels, name), launches))
    found = []
    for tree in ([-1, 0], [-1, *[0] * 9], [-1, 0, 1]):
        circuit = pc.Circuit(pc.hclt(torch.tensor(tree), 2, pc.Categorical(3))).float()
        launches.clear()
        with triton_kernels.switched(True):
            circuit.log_prob(torch.zeros(1, len(tree)).long(), head=0).sum().backward()
        found.append((len(launches), circuit.plan.num_levels))
    assert found == [(16, 3), (16, 3), (24, 4)]


class NoHostReads(TorchDispatchMode):
    """Fails where the host would have to wait for numbers from the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.NAMES, name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


def train(circuit: pc.Circuit, x: Tensor, optimizer: torch.optim.Optimizer, head: Tensor, observed: Tensor) -> None:
    """A step with everything that a step can have."""
    optimizer.zero_grad()
    weight = torch.ones(head.shape, device=x.device)
    (-(weight * circuit.log_prob(x, head=head, observed=observed)).sum()).backward()
    optimizer.step()


STEPS = [("chain", "categorical", 2), ("shared", "gaussian", 2), ("sparse", "categorical", 2), ("tied", "logistic", 1)]


def test_host_reads_are_noticed() -> None:
    for read in (torch.Tensor.item, torch.Tensor.nonzero, bool, lambda x: x[x > 0]):
        with pytest.raises(AssertionError), NoHostReads():
            read(torch.ones(1))


@interpreted
@pytest.mark.parametrize(
    ("structure", "leaf", "heads", "rule"),
    [(*step, (pc.CircuitEM, pc.Anemone)[n % 2]) for n, step in enumerate([*STEPS, STEPS[0]])],
)
@pytest.mark.usefixtures("late")
def test_no_number_is_read_in_a_step(
    build_case: Callable[..., Any], structure: str, leaf: str, heads: int, rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = build_case(structure, leaf, heads)
    circuit, x, observed = copy.deepcopy(case.circuit).float(), case.x[:2].float(), case.observed[:2]
    head, optimizer = torch.randint(heads, (2,)), rule(circuit)
    # What looks at the device to go on as on a GPU.
    monkeypatch.setattr("lvd_lightning.circuits.em.may_ask", lambda tensor: False)
    monkeypatch.setattr("lvd_lightning.circuits.engine.bad_flows.may_ask", lambda tensor: False)
    monkeypatch.setattr("lvd_lightning.circuits.distributions.tables.may_ask", lambda tensor: False)
    with triton_kernels.switched(True):
        train(circuit, x, optimizer, head, observed)  # makes what is made once
        with NoHostReads():
            train(circuit, x, optimizer, head, observed)
        with NoHostReads(), torch.no_grad():
            circuit.log_prob(x)


@interpreted
def test_a_failing_check_warns_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """... and PyTorch does the work."""

    def fail(device: torch.device) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(triton_kernels, "_check", fail)
    monkeypatch.setattr("lvd_lightning.circuits.engine.kernels.triton.passes.forward", fail)
    triton_kernels._is_usable.cache_clear()
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 3, pc.Categorical(4))).float()
    x = torch.randint(4, (5, 2))
    with caplog.at_level(logging.WARNING):
        found = evaluate(circuit, x)
        evaluate(circuit, x)
    triton_kernels._is_usable.cache_clear()
    assert [record.getMessage().count("no such instruction") for record in caplog.records] == [1]
    torch.testing.assert_close(found[0].double(), copy.deepcopy(circuit).double().log_prob(x), rtol=1e-5, atol=1e-5)


@interpreted
def test_the_check_passes_and_notices_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_check.compare(torch.device("cpu"))
    from lvd_lightning.circuits.engine.kernels.triton import passes

    forward = passes._forward_sums

    def wrong(layer: Any, space: Any, *rest: Any) -> None:
        forward(layer, space, *rest)
        space.bound[layer.number][0].sums.mul_(1.05)

    monkeypatch.setattr(passes, "_forward_sums", wrong)
    with pytest.raises(RuntimeError, match="gradient . differs"):
        kernel_check.compare(torch.device("cpu"))


@interpreted
def test_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_kernels.applies(torch.device("cpu"), torch.float32)
    assert not triton_kernels.applies(torch.device("cpu"), torch.float64)
    monkeypatch.setenv("LVD_LIGHTNING_TRITON", "0")
    assert not triton_kernels.applies(torch.device("cpu"), torch.float32)


@compiled
def test_the_cpu_has_kernels_of_its_own() -> None:
    assert not triton_kernels.applies(torch.device("cpu"), torch.float32)


def test_precision_is_checked() -> None:
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 2, pc.Categorical(4)))
    assert circuit.matmul_precision == "ieee"
    circuit.matmul_precision = "tf32"
    assert copy.deepcopy(circuit).matmul_precision == "tf32"
    with pytest.raises(ValueError, match="matmul_precision: got 'half', expected one of ieee, tf32x3, tf32, bf16"):
        circuit.matmul_precision = "half"


def products(precision: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kernels with matrix products, and the constants that a large circuit gives them."""
    arithmetic = {"PRECISION": precision, "EMULATE": False, "DEPTH": 32}
    yield "mix", {"KEEP": True, **arithmetic, "OUTER": 64, "COLUMNS": 64}
    yield "backward_inner", {**arithmetic, "INNER": 64, "COLUMNS": 64}
    yield "backward_weight", {**arithmetic, "OUTER": 64, "INNER": 64}


def others() -> Iterator[tuple[str, dict[str, Any]]]:
    """All other kernels, and a root with one head: Triton makes whole numbers of 1 constants."""
    yield "mix", {**dict(products("tf32"))["mix"], "OUTER": 16, "num_outer": 1}
    yield "mend_sums", {"KEEP": True, "OUTER": 64, "COLUMNS": 64}
    yield "mend_inner", {"INNER": 64, "COLUMNS": 64}
    yield "mend_weight", {"OUTER": 64, "INNER": 64, "COLUMNS": 64}
    yield "multiply", {"SCALED": True, "UNITS": 32, "COLUMNS": 32}
    yield "multiply", {"SCALED": False, "UNITS": 32, "COLUMNS": 32}
    yield "pull", {"IS_SUM": True, "UNITS": 32, "COLUMNS": 64}
    yield "pull", {"IS_SUM": False, "UNITS": 16, "COLUMNS": 16, "width": 1}
    yield "look_up", {"MASKED": True, "UNITS": 16, "COLUMNS": 32}
    yield "backward_table", {"MASKED": True, "UNITS": 16, "COLUMNS": 32}
    yield "step_of_parameters", {"MASKED": True, "FLOORED": True, "ROWS": 8, "COLUMNS": 256}
    yield "step_of_parameters", {"MASKED": False, "FLOORED": False, "ROWS": 2, "COLUMNS": 1024}
    yield "step_of_averages", {"MASKED": False, "FLOORED": True, "ROWS": 8, "COLUMNS": 256}
    yield "step_of_averages", {"MASKED": True, "FLOORED": False, "ROWS": 2048, "COLUMNS": 1}
    yield "average_flows", {"NUMBERS": 2048}


LAUNCHES = [
    *((name, constants, 80) for name, constants in others()),
    *((*found, 90) for found in products("tf32")),
    *((*next(products(precision)), number) for precision, number in (("ieee", 75), ("tf32x3", 80), ("bf16", 100))),
]


@compiled
@pytest.mark.parametrize(
    ("name", "constants", "capability"), LAUNCHES, ids=[f"{name}-{number}" for name, _, number in LAUNCHES]
)
def test_kernels_compile_for_a_gpu(name: str, constants: dict[str, Any], capability: int) -> None:
    """To machine code, for which no device is needed; in as much shared memory as every GPU since 2018 has."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from lvd_lightning.circuits.engine.kernels.triton import layer_kernels, table_kernels

    kernel = getattr(layer_kernels, name, None) or getattr(table_kernels, name)
    whole = ("width", "batch", "num_outer", "num_inner", "num_units", "size")
    types = dict.fromkeys(whole, "i32") | dict.fromkeys(("step", "pseudocount", "momentum", "forgotten"), "fp32")
    types |= dict.fromkeys(("parameter_rows", "out_rows", "first_row", "first_gradient_row", "x"), "*i64")
    types |= dict.fromkeys(("rows", "gradient_rows", "num_gradient_rows", "lost"), "*i32")
    types |= {"observed": "*i1", "live": "*i1", "num_rows": "i32" if name.startswith("step") else "*i32"}
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "*fp32") for arg in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (arg, kind) in enumerate(signature.items())
        if kind.startswith("*") or (arg in whole and arg not in constants)
    }
    source = ASTSource(kernel, signature, constants, aligned)
    found = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 3})
    assert found.metadata.shared <= 64 * 1024
    instructions = {75: "fma", 80: ".tf32.", 90: "wgmma", 100: "tcgen05.mma"}
    if "DEPTH" in constants:
        assert instructions[capability] in found.asm["ptx"]


@needs_gpu
@compiled
@pytest.mark.parametrize(("structure", "leaf", "heads"), STEPS)
def test_a_gpu_agrees_with_float64(build_case: Callable[..., Any], structure: str, leaf: str, heads: int) -> None:
    case = build_case(structure, leaf, heads)
    assert triton_kernels.applies(torch.device("cuda", torch.cuda.current_device()), torch.float32)
    compare(case.circuit.cuda(), case.x.cuda(), case.observed.cuda(), tolerance=1e-3)


@needs_gpu
@compiled
def test_a_gpu_computes_what_underflows() -> None:
    circuit, x = contradictory()
    compare(circuit.cuda(), x.cuda(), tolerance=1e-3)


@needs_gpu
@compiled
@pytest.mark.parametrize("rule", [pc.CircuitEM, pc.Anemone])
@pytest.mark.parametrize(("structure", "leaf", "heads"), STEPS)
def test_a_step_does_not_wait_for_the_gpu(
    build_case: Callable[..., Any], structure: str, leaf: str, heads: int, rule: Any
) -> None:
    case = build_case(structure, leaf, heads)
    circuit = copy.deepcopy(case.circuit).float().cuda()
    x, observed = case.x[:8].float().cuda(), case.observed[:8].cuda()
    head, optimizer = torch.randint(heads, (8,)).cuda(), rule(circuit)
    for _ in range(2):
        train(circuit, x, optimizer, head, observed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train(circuit, x, optimizer, head, observed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    circuit.check_inputs()


@needs_gpu
@compiled
def test_a_step_can_be_captured() -> None:
    """A CUDA graph of a step does what the step does."""
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0, 0]), 20, pc.Categorical(4))).float().cuda()
    other = copy.deepcopy(circuit)
    x, observed, head = torch.randint(4, (32, 3)).cuda(), torch.rand(32, 3).cuda() < 0.8, torch.zeros(32).long().cuda()
    optimizer, graph = pc.CircuitEM(circuit), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train(circuit, x, optimizer, head, observed)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        train(circuit, x, optimizer, head, observed)
    graph.replay()
    optimizer = pc.CircuitEM(other)
    for _ in range(4):
        train(other, x, optimizer, head, observed)
    for a, b in zip(circuit.tables, other.tables, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@interpreted
def test_the_roofline_knows_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks/roofline.py` counts the launches that a step really makes, kernel by kernel."""
    from lvd_lightning.circuits.engine.kernels.triton import layer_kernels, table_kernels

    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    monkeypatch.setenv("LVD_LIGHTNING_NATIVE", "0")  # or the kernels for the CPU do the M-step
    import roofline

    made: list[str] = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            made.append(self.name)
            return self.kernel[grid]

    for module, names in ((layer_kernels, layer_kernels.__all__), (table_kernels, table_kernels.__all__)):
        for name in set(names) - {"sum_of_rows"}:
            monkeypatch.setattr(module, name, Counted(name, getattr(module, name)))
    graph = pc.hclt(torch.tensor([-1, 0, 0, 1]), roofline.PLANNED, pc.Categorical(4))
    circuit = pc.Circuit(graph).float()
    optimizer = pc.CircuitEM(circuit, lr=0.5)
    for _ in range(2):  # before the first one kernels are checked
        made.clear()
        optimizer.zero_grad()
        (-circuit.log_prob(torch.randint(0, 4, (8, 4)), head=0).sum()).backward()
        optimizer.step()
    expected = [launch.kernel for launch in roofline.launches_of(circuit.plan, roofline.PLANNED, 8)]
    assert sorted(made) == sorted(name for name in expected if name != "zero")
    wider = list(roofline.launches_of(circuit.plan, 2 * roofline.PLANNED, 8))
    same = pc.Circuit(pc.hclt(torch.tensor([-1, 0, 0, 1]), 2 * roofline.PLANNED, pc.Categorical(4)))
    assert wider == list(roofline.launches_of(same.plan, 2 * roofline.PLANNED, 8))
    lines = roofline.compared({"mix": 1.0, "fill": 2.0}, wider, "tf32", "NVIDIA H200")
    assert len(lines) == 4
    assert "H200" in lines[0]
    assert "| everything else | 2000.000 |" in lines[-1]
