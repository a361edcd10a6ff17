"""CircuitEM and Anemone against NumPy, and across two processes."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.processes import free_port
from torch import Tensor

import lvd_lightning.circuits as pc


def assert_parameters(circuit: pc.Circuit, references: list[Any], rtol: float = 1e-8) -> None:
    graphs = circuit.to_graph()
    for graph, reference in zip(graphs if isinstance(graphs, list) else [graphs], references, strict=True):
        for index, expected in reference.params.items():
            node = graph.nodes[index]
            found = (node.weight if node.kind == "sum" else node.params).numpy()
            np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12, err_msg=f"node {index}")


def batches(case: Any, num_steps: int, num_examples: int = 13) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Rows, masks, heads and weights of some steps; among them weight 0."""
    out = []
    for _ in range(num_steps):
        rows = torch.randint(0, len(case.x), (num_examples,))
        heads = torch.randint(0, case.graph.num_heads, (num_examples,))
        weights = torch.rand(num_examples) + 0.1
        weights[0] = 0.0
        out.append((case.x[rows], case.observed[rows], heads, weights))
    return out


def per_head(case: Any, heads: Tensor, weights: Tensor) -> np.ndarray:
    return (torch.nn.functional.one_hot(heads, case.graph.num_heads) * weights[:, None]).numpy()


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("lr", [0.3, 1.0])
@pytest.mark.parametrize("pseudocount", [0.0, 0.5])
def test_circuit_em(case: Any, lr: float, pseudocount: float) -> None:
    optimizer = pc.CircuitEM(case.circuit, lr=lr, pseudocount=pseudocount)
    for x, observed, heads, weights in batches(case, 3):
        step(optimizer, -(weights * case.circuit.log_prob(x, head=heads, observed=observed)).sum())
        case.reference.em_step(case.reference.flows(x, per_head(case, heads, weights), observed), lr, pseudocount)
        assert_parameters(case.circuit, [case.reference])


@pytest.mark.parametrize("pseudocount", [0.0, 1e-6, 0.5])
def test_anemone(case: Any, anemone_reference: Callable[..., Any], pseudocount: float) -> None:
    optimizer = pc.Anemone(case.circuit, lr=0.4, momentum=0.9, pseudocount=pseudocount)
    reference = anemone_reference([case.reference], 0.4, 0.9, pseudocount)
    for x, observed, heads, weights in batches(case, 4):
        step(optimizer, -(weights * case.circuit.log_prob(x, head=heads, observed=observed)).sum())
        shares = per_head(case, heads, weights)
        reference.step([case.reference.flows(x, shares, observed)], [shares.sum(0)])
        assert_parameters(case.circuit, [case.reference])


@pytest.mark.parametrize("rule", ["em", "anemone"])
def test_batch_of_circuits(rule: str, build_case: Callable[..., Any], anemone_reference: Callable[..., Any]) -> None:
    """Each circuit has its own examples and weights; Anemone's N is that of the whole batch."""
    names = (
        *(("chain", 2), ("star", 1), ("sparse", 3), ("tied", 1), ("shared", 2), ("ragged", 1)),
        *(("rat", 2), ("rectangles", 1), ("mixed", 2)),
    )
    cases = [build_case(name, "categorical", heads, seed) for seed, (name, heads) in enumerate(names)]
    circuit, references = pc.Circuit([case.graph for case in cases]), [case.reference for case in cases]
    if rule == "em":
        optimizer: torch.optim.Optimizer = pc.CircuitEM(circuit, lr=0.5, pseudocount=0.1)
    else:
        optimizer = pc.Anemone(circuit, lr=0.5, momentum=0.8, pseudocount=0.1)
        anemone = anemone_reference(references, 0.5, 0.8, 0.1)
    for _ in range(3):
        parts = [batches(case, 1)[0] for case in cases]
        x, observed, heads, weights = (torch.stack(part) for part in zip(*parts, strict=True))
        weights[1] = 0.0  # a circuit without examples
        step(optimizer, -(weights * circuit.log_prob(x, head=heads, observed=observed)).sum())
        shares = [per_head(case, heads[g], weights[g]) for g, case in enumerate(cases)]
        flows = [r.flows(x[g], shares[g], observed[g]) for g, r in enumerate(references)]
        if rule == "em":
            for reference, flow in zip(references, flows, strict=True):
                reference.em_step(flow, 0.5, 0.1)
        else:
            anemone.step(flows, [share.sum(0) for share in shares])
        assert_parameters(circuit, references)


def optimizers(circuit: pc.Circuit) -> list[torch.optim.Optimizer]:
    return [pc.CircuitEM(circuit, lr=0.7, pseudocount=0.5), pc.Anemone(circuit, lr=0.7, pseudocount=0.5)]


@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
def test_what_has_no_flow_keeps_its_parameters(kind: int, build_case: Callable[..., Any]) -> None:
    """A head that is not used, a unit that no edge leads to, and a variable that nobody observes."""
    case = build_case("sparse", "categorical", 3)
    observed = torch.ones(case.x.shape, dtype=torch.bool)
    observed[:, 2] = False
    before = case.circuit.to_graph()
    optimizer = optimizers(case.circuit)[kind]
    for _ in range(2):
        step(optimizer, -case.circuit.log_prob(case.x, head=1, observed=observed).sum())
    after = case.circuit.to_graph()
    flows = case.reference.flows(case.x, np.eye(3)[[1] * len(case.x)], observed.numpy())
    stayed = moved = 0
    for index, flow in flows.items():
        for unit, total in enumerate(flow.sum(1)):
            pair = [
                (n.weight if n.kind == "sum" else n.params)[unit] for n in (before.nodes[index], after.nodes[index])
            ]
            assert torch.equal(*pair) == (total == 0) or (pair[0] > 0).sum() == 1
            stayed, moved = stayed + (total == 0), moved + (total > 0)
    assert stayed > 3
    assert moved > 3


@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
def test_structural_zeros_stay_and_rows_stay_normalised(kind: int, discrete: Any) -> None:
    optimizer = optimizers(discrete.circuit)[kind]
    for _ in range(3):
        step(optimizer, -discrete.circuit.log_prob(discrete.x).sum())
    for node in discrete.circuit.to_graph().nodes:
        if node.kind == "sum":
            assert node.mask is None or not node.weight[~node.mask].any()
            torch.testing.assert_close(node.weight.sum(1), torch.ones(node.num_units))
    np.testing.assert_allclose(discrete.circuit.log_prob(discrete.x).exp().sum(0).detach(), 1, rtol=1e-8)


@pytest.mark.parametrize("masked", [False, True], ids=["complete", "masked"])
def test_full_batch_em_never_lowers_the_likelihood(case: Any, masked: bool) -> None:
    x = case.x[torch.randint(0, len(case.x), (30,))]
    observed = torch.rand(x.shape) < 0.7 if masked else None
    heads = torch.randint(0, case.graph.num_heads, (30,))
    optimizer = pc.CircuitEM(case.circuit, lr=1.0, pseudocount=0.0)
    values = []
    for _ in range(15):
        loss = -case.circuit.log_prob(x, head=heads, observed=observed).sum()
        values.append(-loss.item())
        step(optimizer, loss)
    assert (np.diff(values) > -1e-7).all()
    assert values[-1] > values[0]


@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
def test_a_weight_counts_like_repetition(kind: int, case: Any) -> None:
    other = copy.deepcopy(case.circuit)
    rules = [optimizers(circuit)[kind] for circuit in (case.circuit, other)]
    for _ in range(2):
        counts = torch.randint(0, 4, (len(case.x),))
        step(rules[0], -(counts * case.circuit.log_prob(case.x, head=0)).sum())
        step(rules[1], -other.log_prob(case.x.repeat_interleave(counts, 0), head=0).sum())
    for first, second in zip(case.circuit.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_full_batch_em_in_parts(case: Any) -> None:
    """Gradients of a whole data set, gathered part by part, and one step of size 1: the step in NumPy on all of it."""
    optimizer = pc.CircuitEM(case.circuit, lr=1.0, pseudocount=0.0)
    for _ in range(2):
        for x, observed in zip(case.x.split(5), case.observed.split(5), strict=True):
            (-case.circuit.log_prob(x, observed=observed).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        shares = np.ones((len(case.x), case.graph.num_heads))
        case.reference.em_step(case.reference.flows(case.x, shares, case.observed), 1.0, 0.0)
        assert_parameters(case.circuit, [case.reference])


@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
def test_missing_values_may_be_anything(kind: int, case: Any, anemone_reference: Callable[..., Any]) -> None:
    """Learning with variables left out, whatever stands in their place, is EM in NumPy with them summed out."""
    junk = torch.tensor([torch.nan, torch.inf, -7.0, 1e30, 0.5])
    x = torch.where(case.observed, case.x.double(), junk[torch.arange(case.x.numel()).view(case.x.shape) % 5])
    optimizer, anemone = optimizers(case.circuit)[kind], anemone_reference([case.reference], 0.7, 0.9, 0.5)
    shares = np.ones((len(x), case.graph.num_heads))
    for _ in range(2):
        step(optimizer, -case.circuit.log_prob(x, observed=case.observed).sum())
        flows = case.reference.flows(case.x, shares, case.observed)
        if kind == 0:
            case.reference.em_step(flows, 0.7, 0.5)
        else:
            anemone.step([flows], [shares.sum(0)])
        assert_parameters(case.circuit, [case.reference])


@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
def test_a_step_without_examples_changes_nothing(kind: int, case: Any) -> None:
    before = [parameter.detach().clone() for parameter in case.circuit.parameters()]
    step(optimizers(case.circuit)[kind], -case.circuit.log_prob(case.x[:0]).sum())
    for first, second in zip(before, case.circuit.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
def test_flows_accumulate_over_backward_passes(kind: int, case: Any) -> None:
    other = copy.deepcopy(case.circuit)
    half = len(case.x) // 3
    (-case.circuit.log_prob(case.x[:half]).sum()).backward()
    with torch.no_grad():
        case.circuit.log_prob(case.x)  # a validation pass in between leaves no trace
    step(optimizers(case.circuit)[kind], -case.circuit.log_prob(case.x[half:]).sum())
    step(optimizers(other)[kind], -other.log_prob(case.x).sum())
    for first, second in zip(case.circuit.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
@pytest.mark.parametrize("who", ["optimizer", "module"])
def test_zero_grad_forgets_flows(kind: int, who: str, case: Any) -> None:
    other = copy.deepcopy(case.circuit)
    optimizer = optimizers(case.circuit)[kind]
    (-case.circuit.log_prob(case.x[:3]).sum()).backward()
    (optimizer if who == "optimizer" else case.circuit).zero_grad()
    step(optimizer, -case.circuit.log_prob(case.x[3:]).sum())
    step(optimizers(other)[kind], -other.log_prob(case.x[3:]).sum())
    for first, second in zip(case.circuit.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
def test_an_interrupted_optimizer_continues_bit_for_bit(kind: int, case: Any, tmp_path: Path) -> None:
    optimizer = optimizers(case.circuit)[kind]
    for _ in range(2):
        step(optimizer, -case.circuit.log_prob(case.x).sum())
    torch.save({"circuit": case.circuit.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    other = pc.Circuit(case.graph)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state["circuit"])
    resumed = optimizers(other)[kind]
    resumed.load_state_dict(state["optimizer"])
    for circuit, rule in ((case.circuit, optimizer), (other, resumed)):
        step(rule, -circuit.log_prob(case.x[::2]).sum())
    for first, second in zip(case.circuit.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("leaf", ["gaussian", "binomial", "logistic", "mixed"])
def test_single_precision_is_continued_bit_for_bit(leaf: str, build_case: Callable[..., Any]) -> None:
    """Averaged statistics of inputs are double precision, also where parameters are not."""
    case = build_case("shared", leaf, 1)
    circuit = case.circuit.float()
    optimizer = pc.Anemone(circuit)
    for part in case.x.float().split(3)[:3]:
        step(optimizer, -circuit.log_prob(part).sum())
    other = copy.deepcopy(circuit)
    resumed = pc.Anemone(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for found, rule in ((circuit, optimizer), (other, resumed)):
        step(rule, -found.log_prob(case.x.float()).sum())
    for first, second in zip(circuit.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("rule", [pc.CircuitEM, pc.Anemone])
def test_groups_have_step_sizes_of_their_own(rule: type, build_case: Callable[..., Any]) -> None:
    """Two circuits in one optimizer learn as under two; its state holds the step sizes that a scheduler has changed."""
    cases, rates = [build_case("chain", "mixed", 1), build_case("sparse", "categorical", 2)], (0.7, 0.2)
    alone = [copy.deepcopy(case.circuit) for case in cases]
    optimizer = rule([{"params": case.circuit, "lr": lr} for case, lr in zip(cases, rates, strict=True)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda epoch: 0.5**epoch, lambda epoch: 0.9**epoch])
    rules = [rule(circuit, lr=lr) for circuit, lr in zip(alone, rates, strict=True)]
    for number in range(4):
        if number == 2:  # an interruption
            state, learnt = copy.deepcopy(optimizer.state_dict()), [copy.deepcopy(case.circuit) for case in cases]
            optimizer = rule([{"params": circuit} for circuit in learnt])
            optimizer.load_state_dict(state)
            for case, circuit in zip(cases, learnt, strict=True):
                case.circuit = circuit
        step(optimizer, -sum(case.circuit.log_prob(case.x[number:]).sum() for case in cases))
        for case, circuit, one in zip(cases, alone, rules, strict=True):
            step(one, -circuit.log_prob(case.x[number:]).sum())
        if number == 0:
            scheduler.step()
            for one, factor in zip(rules, (0.5, 0.9), strict=True):
                one.param_groups[0]["lr"] *= factor
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.35, 0.18])
    for case, circuit in zip(cases, alone, strict=True):
        for first, second in zip(case.circuit.parameters(), circuit.parameters(), strict=True):
            torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


def test_learning_rate_schedulers_set_the_step(case: Any) -> None:
    optimizer = pc.CircuitEM(case.circuit, lr=0.8, pseudocount=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    shares = np.ones((len(case.x), case.graph.num_heads))
    for epoch in range(3):
        step(optimizer, -case.circuit.log_prob(case.x).sum())
        scheduler.step()
        case.reference.em_step(case.reference.flows(case.x, shares), 0.8 * 0.5**epoch, 0.1)
    assert_parameters(case.circuit, [case.reference])


def test_every_circuit_of_a_module_learns(build_case: Callable[..., Any]) -> None:
    """A prior over a conditional: one loss, one optimizer, the flows of the conditional are posteriors."""
    conditional = build_case("chain", "categorical", 3)
    prior = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 3, pc.SoftEvidence(3), 1))
    module = torch.nn.ModuleDict({"prior": prior, "conditional": conditional.circuit})
    x = torch.randint(0, 3, (40, 2, 4))
    optimizer = pc.CircuitEM(module, lr=1.0, pseudocount=0.0)
    values = []
    for _ in range(10):
        evidence = conditional.circuit.log_prob(x.view(80, 4)).view(40, 2, 3)
        loss = -prior.log_prob(evidence).sum()
        values.append(-loss.item())
        step(optimizer, loss)
    assert (np.diff(values) > -1e-8).all()
    assert values[-1] > values[0] + 1e-3


def test_a_category_that_was_nearly_forgotten_comes_back() -> None:
    """Without pseudocounts a probability halves with every step that lacks its category, down to a denormal number."""
    torch.set_default_dtype(torch.float32)
    for kind in (pc.CircuitEM, pc.Anemone):
        for rare in (1e-36, 1e-38, 1e-41):
            graph = pc.hclt(torch.tensor([-1, 0]), 2, pc.Categorical(3), 1)
            for node in graph.nodes:
                if node.kind == "input":
                    node.params = torch.tensor([[0.5, 0.5, rare], [0.3, 0.7, rare]])
            circuit = pc.Circuit(graph)
            step(kind(circuit, lr=0.5, pseudocount=0.0), -circuit.log_prob(torch.full((64, 2), 2)).sum())
            for node in circuit.to_graph().nodes:
                if node.kind == "input":
                    torch.testing.assert_close(node.params.sum(1), torch.ones(2), rtol=1e-5, atol=0)
                    assert (node.params[:, 2] > 0.4).any()


def test_a_deviation_has_a_floor() -> None:
    graph = pc.hclt(torch.tensor([-1]), 1, pc.Gaussian(min_std=0.01), 1)
    circuit = pc.Circuit(graph)
    optimizer = pc.CircuitEM(circuit, lr=1.0, pseudocount=0.0)
    for _ in range(3):
        step(optimizer, -circuit.log_prob(torch.full((5, 1), 0.3)).sum())
    torch.testing.assert_close(circuit.to_graph().nodes[0].params, torch.tensor([[0.3, 0.01]]))


def test_tiny_pseudocounts_keep_single_precision_finite() -> None:
    """Leaves that have become one-hot meet a category they had never seen."""
    torch.set_default_dtype(torch.float32)
    for kind in (pc.CircuitEM, pc.Anemone):
        circuit = pc.Circuit(pc.hclt(torch.arange(200) - 1, 4, pc.Categorical(64), 1))
        optimizer = kind(circuit, lr=1.0, pseudocount=1e-6)
        for value in (3, 3, 60, 7):
            step(optimizer, -circuit.log_prob(torch.full((8, 200), value)).sum())
            assert all(parameter.isfinite().all() for parameter in circuit.parameters())
        found = circuit.log_prob(torch.tensor([[3] * 200, [60] * 200, [5] * 200]))
        assert found.isfinite().all()
        torch.testing.assert_close(
            found.double(),
            copy.deepcopy(circuit).double().log_prob(torch.tensor([[3] * 200, [60] * 200, [5] * 200])),
            rtol=1e-4,
            atol=1e-3,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lr": 0.0}, "lr"), ({"lr": 1.5}, "lr"), ({"pseudocount": -1.0}, "pseudocount")],
)
def test_bad_settings_are_named(settings: dict[str, float], message: str, build_case: Callable[..., Any]) -> None:
    for kind in (pc.CircuitEM, pc.Anemone):
        with pytest.raises(ValueError, match=message):
            kind(build_case("pair", "categorical", 1).circuit, **settings)
    with pytest.raises(ValueError, match="momentum"):
        pc.Anemone(build_case("pair", "categorical", 1).circuit, momentum=1.0)


def test_a_module_without_circuits_is_refused() -> None:
    with pytest.raises(ValueError, match="Circuit"):
        pc.CircuitEM(torch.nn.Linear(2, 2))


def test_tensors_are_refused(build_case: Callable[..., Any]) -> None:
    circuit = build_case("pair", "categorical", 1).circuit
    for given in (circuit.parameters(), [{"params": list(circuit.parameters())}], [{"lr": 0.1}]):
        with pytest.raises(ValueError, match="Anemone: expected a module"):
            pc.Anemone(given)


# Two processes.

SPLITS = {"uneven": (9, 4), "one-empty": (13, 0)}
DISTRIBUTED_LEAVES = {
    "categorical": pc.Categorical(3),
    "gaussian": pc.Gaussian(),
    "binomial": pc.Binomial(2),
    "logistic": pc.DiscretizedLogistic(3),
    "single": pc.Binomial(2),  # parameters in single precision beside statistics in double
}
RULES = ("CircuitEM", "Anemone")


def distributed_circuit(leaf: str) -> pc.Circuit:
    torch.manual_seed(0)
    distribution = DISTRIBUTED_LEAVES[leaf]
    parents = ([-1, 0, 1], [1, -1, 1])
    return pc.Circuit(
        [pc.hclt(torch.tensor(p), 3, distribution, heads) for p, heads in zip(parents, (1, 2), strict=True)]
    )


def distributed_data(leaf: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 3, (2, 2, 13, 3), generator=generator)  # (steps, G, B, D)
    return (x + 0.5 * torch.rand(x.shape, generator=generator) if leaf == "gaussian" else x), torch.rand(2, 13)


def train(rule: str, leaf: str, part: slice) -> torch.nn.Module:
    """Two steps on a part of the examples; of two circuits under one optimizer the second rests in the second step."""
    circuit, beside = distributed_circuit(leaf), distributed_circuit(leaf)
    if leaf == "single":
        circuit, beside = circuit.float(), beside.float()
    module = torch.nn.ModuleDict({"learning": circuit, "resting": beside})
    optimizer = getattr(pc, rule)(module, lr=0.5, pseudocount=0.1)
    x, weights = distributed_data(leaf)
    for number in range(2):
        found = circuit.log_prob(x[number, :, part], head=0)
        if number == 0:
            found = found + beside.log_prob(x[number, :, part], head=0)
        step(optimizer, -(weights[number, part] * found).sum())
    return module


def train_part(rank: int, port: int, folder: str) -> None:
    """One process of two: trains on its part of every batch, for every split, leaf and rule."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = {}
    for (name, sizes), leaf, rule in itertools.product(SPLITS.items(), DISTRIBUTED_LEAVES, RULES):
        part = slice(rank * sizes[0], rank * sizes[0] + sizes[rank])
        results[f"{name}-{leaf}-{rule}"] = train(rule, leaf, part).state_dict()
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two processes has learnt, per split, leaf and rule."""
    folder = tmp_path_factory.mktemp("ranks")
    port = free_port()
    torch.multiprocessing.spawn(train_part, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("circuit", ["learning", "resting"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("leaf", DISTRIBUTED_LEAVES)
@pytest.mark.parametrize("split", SPLITS)
def test_two_processes_equal_one(split: str, leaf: str, rule: str, circuit: str, two_ranks: list[Any]) -> None:
    """Steps on unevenly split examples, or with an empty part, are the steps on all of them in one process."""
    first, second = (part[f"{split}-{leaf}-{rule}"] for part in two_ranks)
    expected = {key: v for key, v in train(rule, leaf, slice(0, 13)).state_dict().items() if key.startswith(circuit)}
    assert expected
    for key, value in expected.items():
        assert torch.equal(first[key], second[key])
        rtol, atol = (1e-4, 1e-6) if leaf == "single" else (1e-9, 1e-12)
        torch.testing.assert_close(first[key], value, rtol=rtol, atol=atol)
