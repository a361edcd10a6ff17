"""log p(z) of trees over z by looking tables up, against the pass of the circuit."""

import pytest
import torch

import lvd_lightning.circuits as pc
from lvd_lightning.models.tree_lookup import TreeLookup

STATES, PARENTS = 4, [1, -1, 1, 0, 3]


def passed(prior: pc.Circuit, z: torch.Tensor) -> torch.Tensor:
    """By soft evidence that is certain."""
    certain = torch.full((*z.shape, STATES), -torch.inf).scatter_(2, z[..., None], 0.0)
    return prior.log_prob(certain)[:, 0].detach()


@pytest.mark.parametrize("parents", [PARENTS, [-1], [-1, 0, 0, 0], [3, 0, 1, -1]])
@pytest.mark.parametrize("parameterization", ["probabilities", "logits"])
def test_it_is_what_the_circuit_says(parents: list[int], parameterization: str) -> None:
    prior = pc.Circuit(pc.hclt(parents, STATES, pc.SoftEvidence(STATES)), parameterization=parameterization)  # type: ignore[arg-type]
    lookup = TreeLookup.of(prior)
    assert lookup is not None
    z = torch.randint(STATES, (30, len(parents)))
    with torch.no_grad():
        torch.testing.assert_close(lookup.log_prob(prior.probabilities(), z), passed(prior, z))


def test_other_circuits_have_none() -> None:
    hidden = pc.hclt(PARENTS, 3, pc.SoftEvidence(STATES))
    heads = pc.hclt(PARENTS, STATES, pc.SoftEvidence(STATES), num_heads=2)
    chain = pc.hmm(3, STATES, leaf=pc.SoftEvidence(STATES), homogeneous=True)
    assert TreeLookup.of(pc.Circuit(hidden)) is None
    assert TreeLookup.of(pc.Circuit(heads)) is None
    assert TreeLookup.of(pc.Circuit(chain)) is None


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_pruned_edges(layout: str) -> None:
    """Behind a mask they are zeros; where live edges alone are stored the circuit has to be asked."""
    graph = pc.hclt(PARENTS, STATES, pc.SoftEvidence(STATES))
    for node in graph.nodes:
        if node.kind == "sum" and node.num_units > 1:
            node.mask = torch.rand(STATES, STATES) < 0.6
            node.mask[:, 0] = True
            node.weight = node.weight * node.mask / (node.weight * node.mask).sum(1, keepdim=True)
    prior = pc.Circuit(graph, layout=layout)  # type: ignore[arg-type]
    lookup = TreeLookup.of(prior)
    assert (lookup is None) is (layout == "sparse")
    if lookup is not None:
        z = torch.cartesian_prod(*[torch.arange(STATES)] * len(PARENTS))
        expected = passed(prior, z)
        assert bool((expected == -torch.inf).any())
        torch.testing.assert_close(lookup.log_prob(prior.probabilities(), z), expected)
