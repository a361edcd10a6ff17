"""Conditionals by the chain rule against ratios of a circuit's own marginals, on every structure.

Shapes: B worlds, D variables, U units of a variable, V values.
"""

import pytest
import torch
from helpers.cases import make_case
from helpers.structures import ALL

import lvd_lightning.circuits as pc
from lvd_lightning.coding.chain import Chain, Walk
from lvd_lightning.coding.leaf_tables import leaf_table
from lvd_lightning.coding.schedule import order_of_inputs, schedule


@pytest.mark.parametrize("structure", ALL)
def test_conditionals_multiply_to_the_likelihood(structure: str) -> None:
    case = make_case(structure, "categorical", 2)
    assert isinstance(case.graph, pc.CircuitGraph)
    order = order_of_inputs(case.graph)
    assert sorted(order) == list(range(case.graph.num_variables))
    graph = case.circuit.to_graph()
    assert isinstance(graph, pc.CircuitGraph)
    x_BD = case.x.long()[:: max(1, len(case.x) // 50)]
    heads = torch.tensor([[0.75], [0.25]], dtype=torch.float64).expand(-1, len(x_BD))
    log_p_B = case.circuit.double().log_prob(x_BD).add(heads.log().T).logsumexp(1)
    for chosen in (order, order[::-1]):
        chain = Chain([graph], chosen, torch.device("cpu"))
        walk = Walk(chain, heads)
        found_B = torch.zeros(len(x_BD), dtype=torch.float64)
        for variable in chosen:
            table_UV = torch.cat(
                [leaf_table(graph.nodes[n].distribution, graph.nodes[n].params) for _, n in chain.inputs[variable]]
            )
            mixed_BV = walk.coefficients().T @ table_UV
            share_BV = mixed_BV / mixed_BV.sum(1, keepdim=True)
            found_B += share_BV.gather(1, x_BD[:, variable, None])[:, 0].log()
            walk.observe(table_UV[:, x_BD[:, variable]])
        torch.testing.assert_close(found_B, log_p_B, rtol=0, atol=2e-4)
        values = walk.values()
        torch.testing.assert_close((values * heads).sum(0).log(), log_p_B, rtol=0, atol=2e-4)


def test_little_is_computed_again_along_a_tree() -> None:
    """Three steps down and one up for every variable, in the order of the tree; all nodes if every step were a pass."""
    graph = pc.hclt(torch.arange(40) - 1, 2, pc.Categorical(2))
    order = order_of_inputs(graph)
    assert order == list(range(40))
    assert max(len(steps) for steps in schedule(graph, order)[:-1]) <= 4
    assert len(graph.nodes) == 120
