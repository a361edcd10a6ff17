"""Where a flow broke: the first layer by name."""

import torch

from lvd_lightning.faults import first_fault
from lvd_lightning.normalizing_flows import Glow, TabularFlow


def test_the_first_layer_that_gives_a_nan_is_named() -> None:
    glow, x = Glow((3, 8, 8), 3, 2, 4), torch.randn(2, 3, 8, 8)
    assert first_fault(glow, lambda: glow.encode(x)).startswith("every layer gives finite numbers")
    glow.level_steps(1)[2].coupling.last.bias.data[0] = float("nan")
    assert first_fault(glow, lambda: glow.encode(x)) == "levels.1.steps.2.coupling.last gives NaN"
    glow.level_steps(0)[1].norm.shift.data[0] = float("inf")
    assert first_fault(glow, lambda: glow.encode(x)) == "levels.0.steps.1.norm gives infinity"


def test_networks_of_a_table_are_named_too() -> None:
    flow = TabularFlow("maf", 3, [[0, 1, 2], [2, 1, 0]], hidden_size=4, num_hidden_layers=1)
    flow.steps[1].hyper[0].weight.data[:] = float("nan")
    assert first_fault(flow, lambda: flow.encode(torch.randn(2, 3))) == "steps.1.hyper.0 gives NaN"


def test_gradients_are_named_when_all_layers_are_well() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.weight.grad = torch.full((2, 2), float("inf"))
    assert first_fault(layer, lambda: layer(torch.ones(1, 2))) == "the gradient of weight has infinity"
