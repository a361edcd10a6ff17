"""Arguments of a wrong type or range: a ValueError that names the argument, what came and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.checks import as_indices, check_number, described

LEAF = pc.Categorical(3)
PARENTS = torch.tensor([-1, 0, 1])
RAT_SPN: dict[str, Any] = {"num_vars": 4, "depth": 1, "num_repetitions": 1, "num_sums": 2, "num_leaves": 2}
POON: dict[str, Any] = {"shape": (4, 4, 1), "delta": 2, "num_units": 2, "leaf": LEAF}


def graph() -> pc.CircuitGraph:
    return pc.hclt(PARENTS, 2, LEAF)


def circuit() -> pc.Circuit:
    return pc.Circuit(graph())


def flows(of: pc.Circuit) -> pc.Flows:
    found = pc.Flows(of)
    found.add(torch.zeros(2, 3, dtype=torch.int64))
    return found


def prune(threshold: Any) -> Any:
    made = circuit()
    return pc.prune(made, flows(made), threshold)


STRUCTURES: list[tuple[Callable[[], Any], str]] = [
    (lambda: pc.hclt(None, 2, LEAF), "hclt: parents: got None, expected a list or an integer tensor"),
    (lambda: pc.hclt(["a", "b"], 2, LEAF), r"parents: got \['a', 'b'\], expected a list"),
    (lambda: pc.hclt([-1, 0.5], 2, LEAF), r"parents: got \[-1, 0.5\], expected a list"),
    (lambda: pc.hclt([-1, 0, 7], 2, LEAF), "parents: variable 2 has parent 7, expected -1 .the root. or 0..2"),
    (lambda: pc.hclt([-1, -2, 0], 2, LEAF), "parents: variable 1 has parent -2, expected -1 .the root. or 0..2"),
    (
        lambda: pc.hclt(PARENTS, 2, pc.Categorical),
        "hclt: leaf: got the class Categorical itself.*expected a distribution",
    ),
    (lambda: pc.hclt(PARENTS, 2, [LEAF, LEAF, pc.Gaussian]), "hclt: leaf: .*variable 2.*the class Gaussian itself"),
    (lambda: pc.hclt(PARENTS, 2, 3), "hclt: leaf: got 3, expected a distribution"),
    (lambda: pc.hclt(PARENTS, 2.5, LEAF), "hclt: num_latents: got 2.5, expected a whole number"),
    (lambda: pc.hclt(PARENTS, None, LEAF), "hclt: num_latents: got None, expected a whole number"),
    (lambda: pc.hclt_from_data([[1, 2, 0]], PARENTS, 2, LEAF), "hclt_from_data: x: got .*expected a tensor"),
    (lambda: pc.hmm(3, 2, num_tokens=LEAF), r"hmm: num_tokens: got Categorical.*, expected a whole number; .*leaf="),
    (
        lambda: pc.hmm(3, 2, leaf=pc.Categorical),
        "hmm: leaf: got the class Categorical itself.*expected a distribution",
    ),
    (lambda: pc.hmm(None, 2, 4), "hmm: length: got None, expected a whole number"),
    (lambda: pc.rat_spn(**{**RAT_SPN, "num_vars": None}, leaf=LEAF), "rat_spn: num_vars: got None, expected a whole"),
    (lambda: pc.rat_spn(**{**RAT_SPN, "depth": 1.5}, leaf=LEAF), "rat_spn: depth: got 1.5, expected a whole number"),
    (
        lambda: pc.rat_spn(**RAT_SPN, leaf=pc.Bernoulli),
        "rat_spn: leaf: got the class Bernoulli.*expected a distribution",
    ),
    (lambda: pc.poon_domingos(**{**POON, "delta": 1.5}), "poon_domingos: delta: got 1.5, expected whole numbers"),
    (lambda: pc.poon_domingos(**{**POON, "delta": [2, 1.5]}), r"poon_domingos: delta: got \[2, 1.5\], expected whole"),
    (lambda: pc.poon_domingos(**{**POON, "delta": None}), "poon_domingos: delta: got None, expected whole numbers"),
    (lambda: pc.poon_domingos(**{**POON, "shape": 4}), "poon_domingos: shape: got 4, expected "),
    (lambda: pc.poon_domingos(**{**POON, "shape": (4, 4.0, 1)}), r"poon_domingos: shape: got \(4, 4.0, 1\), expected "),
    (lambda: pc.poon_domingos(**{**POON, "leaf": None}), "poon_domingos: leaf: got None, expected a distribution"),
    (lambda: pc.mixture([circuit()]), r"mixture: graphs\[0\]: got Circuit, expected a CircuitGraph; .*to_graph\(\)"),
    (lambda: pc.mixture(graph()), "mixture: graphs: got CircuitGraph, expected a list of graphs"),
    (lambda: pc.mixture([graph()] * 2, [-1, 2]), r"mixture: weights: got \[-1.0, 2.0\], expected finite"),
    (lambda: pc.mixture([graph()] * 2, [float("nan"), 2]), "mixture: weights: got .nan, 2.0., expected finite"),
    (lambda: pc.mixture([graph()] * 2, "ab"), "mixture: weights: got 'ab', expected numbers"),
    (lambda: pc.mixture([graph()] * 2, [[1], [1, 2]]), r"mixture: weights: got \[\[1\], \[1, 2\]\], expected numbers"),
    (lambda: pc.chow_liu_tree([[1, 2]]), "x: got .*expected a tensor"),
]

CIRCUITS: list[tuple[Callable[[], Any], str]] = [
    (lambda: pc.Circuit(circuit()), r"Circuit: graph: got Circuit, .*; give its graph: circuit.to_graph\(\)"),
    (lambda: pc.Circuit([circuit()]), r"Circuit: graph\[0\]: got Circuit, expected a CircuitGraph"),
    (lambda: pc.Circuit(None), "Circuit: graph: .*got None"),
    (lambda: pc.Flows(graph()), r"Flows: circuit: got CircuitGraph, expected a Circuit; .*Circuit\(graph\)"),
    (lambda: pc.entropy(graph()), r"entropy: circuit: got CircuitGraph, expected a Circuit; .*Circuit\(graph\)"),
    (lambda: pc.kl(circuit(), graph()), "kl: q: got CircuitGraph, expected a Circuit"),
    (lambda: pc.kl(graph(), circuit()), "kl: p: got CircuitGraph, expected a Circuit"),
    (lambda: pc.expectation(graph(), torch.zeros(3, 3)), "expectation: circuit: got CircuitGraph, expected a Circuit"),
    (lambda: pc.expectation(circuit(), None), "expectation: f: expected a tensor .* or a function.*got None"),
    (lambda: pc.save(graph(), "x"), "save: circuit: got CircuitGraph, expected a Circuit"),
    (lambda: pc.to_pyjuice(graph()), "to_pyjuice: circuit: got CircuitGraph, expected a Circuit"),
    (lambda: prune(1.5), r"threshold: got 1.5, expected a number in .0, 1."),
    (lambda: prune(-0.1), r"threshold: got -0.1, expected a number in .0, 1."),
    (lambda: prune(float("nan")), r"threshold: got nan, expected a number in .0, 1."),
    (lambda: prune(None), r"threshold: got None, expected a number in .0, 1."),
    (lambda: pc.prune(graph(), flows(circuit())), "prune: circuit: got CircuitGraph, expected a Circuit"),
    (lambda: pc.prune(circuit(), torch.zeros(3)), r"prune: flows: got a tensor of shape \(3,\).*, expected a Flows"),
    (lambda: pc.grow(graph(), flows(circuit()), [0]), "grow: circuit: got CircuitGraph, expected a Circuit"),
    (lambda: pc.grow(circuit(), None, [0]), "grow: flows: got None, expected a Flows"),
    (lambda: pc.grow(circuit(), flows(circuit()), [0], sigma="a"), "sigma: got 'a', expected "),
]

OPTIMIZERS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda kind: kind(torch.nn.Linear(2, 2)), "found no Circuit in Linear; its tables are all that .* trains"),
    (lambda kind: kind([]), "found no Circuit in an empty list"),
    (lambda kind: kind(graph()), "got CircuitGraph, expected a module"),
    (lambda kind: kind(None), "got None, expected a module"),
    (lambda kind: kind(circuit(), lr="fast"), "lr: .*got 'fast'"),
    (lambda kind: kind(circuit(), pseudocount=None), "pseudocount: .*got None"),
]


@pytest.mark.parametrize(("call", "message"), [*STRUCTURES, *CIRCUITS])
def test_what_came_and_what_was_expected(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        call()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", [pc.CircuitEM, pc.Anemone])
@pytest.mark.parametrize(("call", "message"), OPTIMIZERS)
def test_optimizers_need_circuits_and_numbers(kind: Any, call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(kind)


def test_parents_may_be_a_list_or_an_array() -> None:
    """Whatever holds them, parents are the same tree; here, and in what counts from data."""
    x = torch.randint(0, 3, (40, 3), generator=torch.Generator().manual_seed(0))
    for parents in ([-1, 0, 1], (-1, 0, 1), np.array([-1, 0, 1]), [np.int64(-1), 0, torch.tensor(1)], PARENTS.int()):
        for make in (lambda found: pc.hclt(found, 2, LEAF), lambda found: pc.hclt_from_data(x, found, 2, LEAF)):
            torch.manual_seed(0)
            expected = pc.Circuit(make(PARENTS))
            torch.manual_seed(0)
            assert torch.equal(pc.Circuit(make(parents)).log_prob(x), expected.log_prob(x))


def test_flows_to_which_nothing_was_added_decide_nothing() -> None:
    made, many = circuit(), pc.Circuit([graph(), graph()])
    for change in (
        lambda: pc.prune(made, pc.Flows(made)),
        lambda: pc.grow(made, pc.Flows(made), [0]),
        lambda: pc.grow(many, pc.Flows(many), [[0], []]),
    ):
        with pytest.raises(ValueError, match=r"flows: no examples were added.*flows\.add\(x\)"):
            change()
    pc.grow(made, pc.Flows(made), [])  # nothing grows: nothing to decide by


def test_examples_of_weight_0_are_examples() -> None:
    made = circuit()
    found = pc.Flows(made)
    found.add(torch.zeros(2, 3, dtype=torch.int64), weight=torch.zeros(2))
    assert pc.grow(made, found, [0]).num_heads == 2
    assert pc.prune(made, found).num_heads == 1


def test_circuits_of_a_batch_without_examples_are_left_alone() -> None:
    many = pc.Circuit([graph(), graph()])
    for pruned, before in zip(pc.prune(many, pc.Flows(many)), many.to_graph(), strict=True):
        for node, old in zip(pruned.nodes, before.nodes, strict=True):
            assert node.weight is None or torch.equal(node.weight, old.weight)


def test_a_directory_is_no_circuit_file(tmp_path: Path) -> None:
    pc.save(circuit(), tmp_path / "circuit")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} is a directory.*circuit.safetensors"):
        pc.load(tmp_path)
    (tmp_path / "named.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"named.safetensors is a directory, .*file"):
        pc.load(tmp_path / "named.safetensors")
    with pytest.raises(ValueError, match="is a directory"):
        pc.save(circuit(), tmp_path / "named.safetensors")


def test_a_file_beside_a_directory_of_its_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "circuit").mkdir()
    pc.save(circuit(), tmp_path / "circuit")
    assert pc.load(tmp_path / "circuit").num_variables == 3


def test_masks_and_states_of_a_wrong_type() -> None:
    x = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"observed: got \[True\], expected a bool tensor of shape \(2, 3\)"):
        circuit().log_prob(x, observed=[True])
    for head in ("a", 0.5, None):
        with pytest.raises(ValueError, match="head: got .*expected an int or an integer tensor"):
            circuit().sample(x=x, observed=torch.ones_like(x, dtype=torch.bool), head=head)


def test_described_is_short() -> None:
    assert described(torch.zeros(2, 3).int()) == "a tensor of shape (2, 3) and torch.int32"
    assert len(described(list(range(1000)))) < 100
    assert described(pc.Gaussian) == "the class Gaussian itself"


def test_numbers_and_indices() -> None:
    for wrong in (True, "1", None, float("nan"), 2.0, torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match="where: got .*expected a number in .0, 1., a share"):
            check_number("where", wrong, 0, 1, meaning=", a share")
    check_number("where", np.float32(0.5), 0, 1)
    for wrong in ([], [True], torch.zeros(2), torch.zeros(1, 1, dtype=torch.int64), torch.tensor(1), "12", 3):
        with pytest.raises(ValueError, match="where: got .*expected a list or an integer tensor of shape"):
            as_indices("where", wrong)
    for wrong in (np.array([0.5]), np.array(3), np.zeros((1, 1), dtype=np.int64), torch.tensor([True])):
        with pytest.raises(ValueError, match="where: got .*expected a list or an integer tensor of shape"):
            as_indices("where", wrong)
    for right in (range(3), (number for number in range(3)), np.arange(3), torch.arange(3).short()):
        assert as_indices("where", right).tolist() == [0, 1, 2]
