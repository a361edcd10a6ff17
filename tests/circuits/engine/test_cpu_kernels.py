"""The compiled kernels against PyTorch, which does the same where they are missing; and when they are missing."""

import copy
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine.kernels import cpu as cpu_kernels
from lvd_lightning.circuits.engine.kernels.cpu import compiler as building
from lvd_lightning.circuits.engine.kernels.cpu import passes
from lvd_lightning.circuits.engine.kernels.cpu.edges import pass_edges
from lvd_lightning.circuits.engine.linear import inexact
from lvd_lightning.circuits.engine.sparse import EdgeIndex

NO_COMPILER = all(shutil.which(name) is None for name in ("cc", "gcc", "clang")) and "CC" not in os.environ
needs_compiler = pytest.mark.skipif(NO_COMPILER or sys.platform != "linux", reason="no C compiler on this machine")
TOLERANCE = {torch.float64: (1e-10, 1e-12), torch.float32: (2e-3, 2e-5)}


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Turn the kernels on or off."""
    return lambda on: monkeypatch.setenv("LVD_LIGHTNING_NATIVE", "1" if on else "0")


@pytest.fixture
def fresh_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache directory, and a process that has not loaded any kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LVD_LIGHTNING_NATIVE", "1")
    monkeypatch.setattr(cpu_kernels, "_load", cpu_kernels._load.__wrapped__)
    monkeypatch.setattr(cpu_kernels, "_reported", set())
    return tmp_path / "lvd_lightning"


def evaluate(circuit: pc.Circuit, x: torch.Tensor, observed: torch.Tensor | None) -> list[torch.Tensor]:
    """Log-likelihoods under all heads and the gradient of a weighted sum of them."""
    circuit.zero_grad()
    circuit.engine.gradient_pool = {n: torch.full_like(table, torch.nan) for n, table in enumerate(circuit.tables)}
    log_p = circuit.log_prob(x, observed=observed)
    weight = torch.linspace(0.5, 2.0, log_p.numel(), dtype=log_p.dtype).view_as(log_p)
    (weight * log_p.where(log_p > -torch.inf, 0.0)).sum().backward()
    return [log_p.detach(), *(parameter.grad.clone() for parameter in circuit.parameters())]


def compare(circuit: pc.Circuit, x: torch.Tensor, observed: torch.Tensor | None, switch: Any) -> None:
    switch(True)
    assert passes.applies(circuit.engine, circuit.probabilities())
    first = evaluate(circuit, x, observed)
    assert any(isinstance(space, passes.FusedWorkspace) for _, space in circuit.engine.pool.free)
    switch(False)
    assert not passes.applies(circuit.engine, circuit.probabilities())
    second = evaluate(circuit, x, observed)
    rtol, atol = TOLERANCE[circuit.dtype]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol * float(1 + b[b.isfinite()].abs().max()))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [True, False])
def test_passes_agree(discrete: Any, switch: Any, dtype: torch.dtype, masked: bool) -> None:
    if not discrete.circuit.engine.is_linear:
        pytest.skip("only the general pass takes this circuit")
    circuit = discrete.circuit.to(dtype)
    compare(circuit, discrete.x, discrete.observed if masked else None, switch)


@needs_compiler
@pytest.mark.parametrize("size", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("num_latents", [1, 7, 33])
@pytest.mark.parametrize("parameterization", ["probabilities", "logits"])
def test_sizes_of_all_kinds(switch: Any, size: int, num_latents: int, parameterization: Any) -> None:
    """Widths and batches that blocks, strips and tiles divide or not; several circuits, heads that some lack."""
    trees = [torch.tensor([-1, 0, 0, 1, 2, 2]), torch.tensor([1, -1, 1, 1, 1, 1]), torch.tensor([-1, 0, 1, 2, 3, 4])]
    graphs = [pc.hclt(tree, num_latents, pc.Categorical(5), num_heads=1 + g) for g, tree in enumerate(trees)]
    circuit = pc.Circuit(graphs, parameterization=parameterization)
    compare(circuit, torch.randint(5, (3, size, 6)), torch.rand(3, size, 6) < 0.7, switch)


def ragged_tree(leaf: pc.Distribution) -> pc.CircuitGraph:
    """Widths so different that nodes are padded; products that skip units, and repeat them."""
    graph = pc.CircuitGraph()
    sums = []
    for v, width in enumerate((3, 4, 5, 6, 7, 9, 11)):
        product = graph.add_product([graph.add_input(v, leaf, width)], torch.randint(width - 1, (width, 1)))
        sums.append(graph.add_sum([product], width + 1))
    units = torch.stack([torch.randint(0, graph.nodes[child].num_units, (12,)) for child in sums], 1)
    graph.root = graph.add_sum([graph.add_product(sums, units)], 2)
    return graph


@needs_compiler
def test_ragged_trees(switch: Any) -> None:
    circuit = pc.Circuit(ragged_tree(pc.Categorical(4)))
    switch(True)
    assert not all(passes.FusedWorkspace(circuit.engine, 1, keep=True).is_read)
    compare(circuit, torch.randint(4, (50, 7)), None, switch)


@needs_compiler
def test_parameters_that_are_zero(switch: Any) -> None:
    graph = pc.hclt(torch.tensor([-1, 0, 1]), 3, pc.Categorical(4))
    for node in graph.nodes:
        if node.kind == "input":
            node.params[:, 1] = 0
            node.params[1] = torch.tensor([0.0, 0.0, 0.5, 0.5])
            node.params /= node.params.sum(1, keepdim=True)
    x = torch.tensor([0, 2, 3])[torch.randint(3, (30, 3))]
    compare(pc.Circuit(graph), x, None, switch)


@needs_compiler
def test_numbers_that_are_too_small_take_the_general_pass(switch: Any) -> None:
    """p(x) is below what single precision holds: the kernels notice. See test_linear.py."""
    graph = pc.hclt(torch.tensor([-1, 0, 0, 0]), 2, pc.Categorical(2))
    for index, node in enumerate(graph.nodes):
        if node.kind == "input":
            node.params = torch.tensor([[1 - 1e-20, 1e-20], [1e-20, 1 - 1e-20]])
        elif node.kind == "sum" and index != graph.root:
            node.weight = torch.eye(2)
    x = torch.tensor([[0, 1, 1, 0]])
    expected = pc.Circuit(graph).log_prob(x)
    switch(True)
    circuit = pc.Circuit(graph).float()
    space = passes.FusedWorkspace(circuit.engine, 1, keep=False)
    batch, tables = circuit.prepare(x, None), circuit.probabilities()
    space.forward(batch, tables)
    assert inexact(circuit.engine, batch, tables, space) is not None
    torch.testing.assert_close(circuit.log_prob(x).double(), expected, rtol=1e-4, atol=0)


MANY: dict[str, Callable[[], tuple[pc.Circuit, torch.Tensor]]] = {
    "trees": lambda: (
        pc.Circuit([pc.hclt(torch.tensor([-1, 0, 0, 1]), 16, pc.Categorical(80)) for _ in range(8)]),
        torch.randint(80, (8, 300, 4)),
    ),
    "tied": lambda: (pc.Circuit(pc.hmm(6, 16, num_tokens=2100, homogeneous=True)), torch.randint(2100, (400, 6))),
}


@needs_compiler
@pytest.mark.parametrize("kind", MANY)
def test_more_threads_change_nothing(kind: str, switch: Any) -> None:
    """Values, gradients and a step of EM, of so many numbers that threads share them."""
    circuit, x = MANY[kind]()
    switch(True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            one = copy.deepcopy(circuit)
            found.append(evaluate(one, x, None))
            optimizer = pc.CircuitEM(one)
            (-one.log_prob(x, head=0).sum()).backward()
            optimizer.step()
            found[-1] += [table.detach() for table in one.tables]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_compiler
def test_more_threads_pass_the_same_down_live_edges(switch: Any) -> None:
    switch(True)
    index = EdgeIndex.of(list(torch.rand(20, 64, 64) < 0.5), outer=64, inner=64)
    weight, above = torch.rand(len(index.column)), torch.rand(20, 64, 1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(torch.full((20, 64, 1), torch.nan))
            assert pass_edges(index, weight, above, found[-1], 0)
    finally:
        torch.set_num_threads(before)
    assert found[0].isfinite().all()
    assert torch.equal(*found)


@needs_compiler
def test_a_graph_kept_for_two_backward_passes(build_case: Callable[..., Any], switch: Any) -> None:
    """Two forward passes alive at once, and two backward passes through one of them."""
    case = build_case("bush", "categorical", 2)
    switch(True)
    tables = list(case.circuit.parameters())
    first, second = case.circuit.log_prob(case.x).sum(), case.circuit.log_prob(case.x, head=1).sum()
    one = torch.autograd.grad(first, tables, retain_graph=True)
    torch.autograd.grad(second, tables)
    for a, b in zip(one, torch.autograd.grad(first, tables), strict=True):
        assert torch.equal(a, b)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pseudocount", [0.0, 0.3])
@pytest.mark.parametrize("rule", [pc.CircuitEM, pc.Anemone])
@pytest.mark.parametrize(
    ("structure", "leaf"),
    [*((name, "categorical") for name in ("sparse", "tied", "ragged", "shared")), ("tied", "ordered")],
)
def test_updates_agree(
    build_case: Callable[..., Any],
    switch: Any,
    structure: str,
    leaf: str,
    rule: Any,
    pseudocount: float,
    dtype: torch.dtype,
) -> None:
    """From equal gradients, with masks, ties, padding, and a unit without any flow; long enough to forget old flows."""
    case = build_case(structure, leaf, 2)
    circuits = [case.circuit.to(dtype), copy.deepcopy(case.circuit).to(dtype)]
    optimizers = [rule(circuit, lr=0.3, pseudocount=pseudocount) for circuit in circuits]
    start = [parameter.detach().clone() for parameter in circuits[0].parameters()]
    for _step in range(18):
        switch(False)
        log_p = circuits[0].log_prob(case.x)
        (-log_p.where(log_p > -torch.inf, 0.0).sum()).backward()
        for table, other in zip(*(circuit.tables for circuit in circuits), strict=True):
            table.grad[0, 0] = 0
            other.grad = table.grad.clone()
        for optimizer, on in zip(optimizers, (False, True), strict=True):
            switch(on)
            optimizer.step()
            optimizer.zero_grad()
        rtol, atol = TOLERANCE[dtype]
        for (a, b), old in zip(zip(*(list(c.parameters()) for c in circuits), strict=True), start, strict=True):
            torch.testing.assert_close(b, a, rtol=rtol, atol=atol)
            torch.testing.assert_close(b[0, 0], old[0, 0], rtol=1e-6, atol=0)
        for a, b in zip(circuits[0].parameters(), circuits[1].parameters(), strict=True):
            b.data.copy_(a.data)  # so that differences do not add up over the steps


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("size", "width"), [(1, 1.0), (2, 3.0), (9, 0.3), (40, 1.0), (256, 2.0), (511, 30.0)])
@pytest.mark.parametrize("constant", [0.0, 5.0])
def test_priors_agree(switch: Any, size: int, width: float, constant: float, dtype: torch.dtype) -> None:
    """Steps of both rules with smooth priors, to the last bit the same on three threads."""
    torch.set_default_dtype(dtype)
    leaf = pc.OrderedCategorical(size, share=0.3, width=width, constant=constant)
    graph = pc.hclt([-1, 0, 0], 37, leaf)
    x, before = torch.randint(0, size, (20, 3)), torch.get_num_threads()
    for rule in (pc.CircuitEM, pc.Anemone):
        found = []
        for on, threads in ((False, 1), (True, 1), (True, 3)):
            switch(True)
            circuit = pc.Circuit(graph)
            optimizer = rule(circuit, lr=0.3, pseudocount=0.1)
            (-circuit.log_prob(x).sum()).backward()
            switch(on)
            torch.set_num_threads(threads)
            try:
                optimizer.step()
            finally:
                torch.set_num_threads(before)
            found.append([table.detach() for table in circuit.tables])
        for plain, fused, shared in zip(*found, strict=True):
            torch.testing.assert_close(fused, plain, rtol=TOLERANCE[dtype][0], atol=TOLERANCE[dtype][1])
            assert torch.equal(fused, shared)


@needs_compiler
def test_values_changed_before_the_backward_pass_are_refused(build_case: Callable[..., Any], switch: Any) -> None:
    case = build_case("chain", "categorical", 1)
    switch(True)
    optimizer = pc.CircuitEM(case.circuit)
    stale = case.circuit.log_prob(case.x).sum()
    (-case.circuit.log_prob(case.x).sum()).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_other_tensors_are_left_to_pytorch(build_case: Callable[..., Any], switch: Any) -> None:
    case = build_case("chain", "categorical", 1)
    switch(True)
    tables = [table.detach() for table in case.circuit.tables]
    assert cpu_kernels.suits(tables)
    assert not cpu_kernels.suits([tables[0].transpose(1, 2)])
    assert not cpu_kernels.suits([torch.empty(2, device="meta")])
    assert cpu_kernels.library(torch.bfloat16) is None
    gaussian = build_case("chain", "gaussian", 1)
    assert not passes.applies(gaussian.circuit.engine, gaussian.circuit.probabilities())


def test_switched_off(switch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_load", lambda real: pytest.fail("looked for the kernels"))
    switch(False)
    assert cpu_kernels.library(torch.float32) is None


def failing_compiler(folder: Path) -> str:
    path = folder / "broken-cc"
    path.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such thing' >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is compiled")
@pytest.mark.parametrize("fault", ["fails", "missing", "none", "cache", "home"])
def test_without_a_compiler_pytorch_does_it(
    fault: str,
    fresh_build: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    build_case: Callable[..., Any],
) -> None:
    case = build_case("bush", "categorical", 1)
    if fault == "fails":
        monkeypatch.setenv("CC", failing_compiler(tmp_path))
    elif fault == "missing":
        monkeypatch.setenv("CC", str(tmp_path / "nothing"))
    elif fault == "none":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    elif fault == "cache":
        fresh_build.write_text("a file where the directory should be")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    with caplog.at_level(logging.DEBUG, cpu_kernels.__name__):
        assert cpu_kernels.library(torch.float64) is None
        assert cpu_kernels.library(torch.float32) is None
        found = evaluate(case.circuit, case.x, None)[0]
    (record,) = caplog.records  # however often kernels are asked for
    assert record.levelname == ("INFO" if fault == "none" else "WARNING")
    reason = {
        "fails": "no such thing",
        "missing": "CC names .*nothing, which is not there",
        "none": "found no C compiler",
        "cache": "lvd_lightning",
        "home": "no home directory",
    }[fault]
    assert re.search(f"without compiled kernels, .*slower.*{reason}", record.getMessage(), re.DOTALL)
    assert ("LVD_LIGHTNING_NATIVE=0" in record.getMessage()) == (fault != "none")
    assert not any(isinstance(space, passes.FusedWorkspace) for _, space in case.circuit.engine.pool.free)
    torch.testing.assert_close(found.exp().sum(), torch.tensor(1.0))


@needs_compiler
@pytest.mark.parametrize("size", [0, 10, 5000])
def test_files_that_were_cut_off_are_made_again(fresh_build: Path, size: int) -> None:
    """A process that loads a library that is not whole may be killed: so this one only asks for the file."""
    compiler, path = building._compiler(), fresh_build / "kernels.so"
    options = [*building.OPTIONS, "-DREAL=float", "-DBITS=uint32_t"]
    assert not building._is_whole(path)
    building._compile(compiler, options, path)
    assert building._is_whole(path)
    path.write_bytes(path.read_bytes()[:size])
    assert not building._is_whole(path)
    building._compile(compiler, options, path)
    assert building._is_whole(path)


@needs_compiler
def test_the_cache_is_used_and_mended(fresh_build: Path) -> None:
    building.build("double")
    (path,) = fresh_build.iterdir()
    whole, made = path.read_bytes(), path.stat().st_mtime_ns
    building.build("double")
    assert path.stat().st_mtime_ns == made
    path.unlink()
    path.write_bytes(whole[:-1])
    building.build("double")
    assert building._is_whole(path)
    assert list(fresh_build.iterdir()) == [path]


@needs_compiler
def test_the_key_covers_what_the_result_depends_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = building._key(["cc"], ["-O3"])
    assert key == building._key(["cc"], ["-O3"])
    others = [building._key(["cc"], ["-O2"])]
    monkeypatch.setattr(building, "_cpu", lambda: ["another"])
    others.append(building._key(["cc"], ["-O3"]))
    source = tmp_path / "kernels.c"
    source.write_text("int x;")
    monkeypatch.setattr(building, "SOURCE", source)
    others.append(building._key(["cc"], ["-O3"]))
    assert len({key, *others}) == 4


@needs_compiler
def test_two_processes_at_once(fresh_build: Path) -> None:
    """Both compile, into one cache, and both get kernels that run."""
    program = (
        "import torch, lvd_lightning.circuits as pc\n"
        "from lvd_lightning.circuits.engine.kernels import cpu as cpu_kernels\n"
        "assert cpu_kernels.library(torch.float32) is not None\n"
        "circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 2, pc.Categorical(3)))\n"
        "print(circuit.log_prob(torch.cartesian_prod(torch.arange(3), torch.arange(3))).exp().sum().item())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(2)
    ]
    for process in running:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert float(out) == pytest.approx(1.0, abs=1e-5)
    (path,) = fresh_build.iterdir()
    assert building._is_whole(path)
