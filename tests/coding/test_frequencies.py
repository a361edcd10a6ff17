"""Frequencies of an assembled circuit: they are its conditionals, and the same however they are computed.

Shapes: B images, V values.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.assemblies import assembly
from helpers.trained_runs import random_pictures, trained_run
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.coding.frequencies import PRECISION, FrequencyTables
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.parts import ImagePatches

KINDS = ["tied", "untied", "heads", "both"]


def all_frequencies(circuit: AssembledCircuit, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every variable in turn its frequencies (B, V) and its values (B,)."""
    tables = FrequencyTables(circuit)
    coding, x_BPD = tables.begin(len(images)), circuit.split(images).long()
    for position, variable in tables.steps:
        values = x_BPD[:, position, variable]
        yield coding.frequencies(), values
        coding.observe(values)


@pytest.mark.parametrize("num_latents", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_shares_multiply_to_the_likelihood(
    double_precision: None, kind: str, num_latents: int | None, images: Tensor
) -> None:
    """With a tree over z as prior, and with one over hidden states."""
    circuit = assembly(kind, num_latents).circuit
    found_B = torch.zeros(len(images))
    for frequencies_BV, values in all_frequencies(circuit, images):
        assert torch.equal(frequencies_BV, frequencies_BV.round())
        assert float(frequencies_BV.sum(1).max()) <= 2**PRECISION
        share_BV = frequencies_BV / frequencies_BV.sum(1, keepdim=True)
        found_B += share_BV.gather(1, values[:, None])[:, 0].log()
    torch.testing.assert_close(found_B, circuit.log_prob(images).detach(), rtol=0, atol=5e-4)


def test_threads_company_and_order_change_no_bit(tmp_path: Path) -> None:
    trained = trained_run(tmp_path / "run", side=4, patch=2)
    images = trained.codes.encode(random_pictures(7, side=4))
    whole = [found for found, _ in all_frequencies(trained.circuit, images)]
    torch.set_num_threads(2)
    threads = [found for found, _ in all_frequencies(trained.circuit, images)]
    torch.set_num_threads(1)
    alone = [found for found, _ in all_frequencies(trained.circuit, images[4:5])]
    backwards = [found for found, _ in all_frequencies(trained.circuit, images.flip(0))]
    assert len(whole) == 4 * 12
    for number, found in enumerate(whole):
        assert torch.equal(threads[number], found)
        assert torch.equal(alone[number], found[4:5])
        assert torch.equal(backwards[number], found.flip(0))


def test_fingerprints_follow_the_numbers(tmp_path: Path) -> None:
    one, other = (trained_run(tmp_path / name, "grey", seed=seed).circuit for name, seed in (("a", 0), ("b", 1)))
    before = FrequencyTables(one).fingerprint
    assert FrequencyTables(one).fingerprint == before
    assert FrequencyTables(other).fingerprint != before
    with torch.no_grad():
        one.prior.tables[0].view(-1)[:2] = one.prior.tables[0].view(-1)[:2].flip(0)
    assert FrequencyTables(one).fingerprint != before


def test_an_impossible_picture_can_be_coded(tmp_path: Path) -> None:
    """What no unit allows leaves nothing of a posterior; coding goes on from there."""
    graph = pc.CircuitGraph()
    inputs = [graph.add_input(v, pc.Categorical(2), 1, params=[[1.0, 0.0]]) for v in range(4)]
    graph.add_sum([graph.add_product(inputs)], 1)
    parts = ImagePatches((1, 4, 4), 2, 2)
    prior = pc.hclt(torch.arange(4) - 1, 1, pc.SoftEvidence(1))
    circuit = AssembledCircuit(pc.Circuit(prior), pc.Circuit([graph]), parts)
    black = torch.ones(2, 1, 4, 4, dtype=torch.uint8)
    for frequencies_BV, _ in all_frequencies(circuit, black):
        assert torch.isfinite(frequencies_BV).all()


def test_continuous_variables_are_refused() -> None:
    chain = torch.arange(4) - 1
    prior = pc.Circuit(pc.hclt(chain, 2, pc.SoftEvidence(2)))
    conditional = pc.Circuit([pc.hclt(chain, 2, pc.Gaussian(), num_heads=2)])
    circuit = AssembledCircuit(prior, conditional, ImagePatches((1, 4, 4), 2))
    with pytest.raises(ValueError, match="has no list of values"):
        FrequencyTables(circuit)
