"""Routing: every example once where there is room, else samples whose expected weights are those of the examples."""

import pytest
import torch
from torch import Tensor

from lvd_lightning.circuits.engine.workspace import few_sizes
from lvd_lightning.models.routing import Routed, route, route_in_passes


def weight_of_examples(routed: Routed, count: int) -> Tensor:
    """What each example weighs over all slots."""
    weight = torch.zeros(count, dtype=torch.float64)
    return weight.index_add_(0, routed.index.flatten(), routed.weight.flatten().double())


@pytest.fixture
def circuit() -> Tensor:
    """30 examples for 4 circuits: 18, 0, 5 and 7 of them, mixed."""
    sizes = torch.tensor([18, 0, 5, 7])
    generator = torch.Generator().manual_seed(1)
    return torch.arange(4).repeat_interleave(sizes)[torch.randperm(30, generator=generator)]


@pytest.mark.parametrize("slots", [None, 18, 25])
def test_every_example_is_once_in_a_slot_of_its_circuit(circuit: Tensor, slots: int | None) -> None:
    routed = route(circuit, 4, slots=slots)
    assert routed.index.shape == (4, slots or 20)  # a few more than the busiest needs
    filled = routed.weight > 0
    assert routed.index[filled].sort().values.tolist() == list(range(30))
    of_slot = torch.arange(4)[:, None].expand_as(filled)
    assert torch.equal(circuit[routed.index[filled]], of_slot[filled])
    assert (routed.weight[filled] == 1).all()


def test_weights_of_examples_go_with_them(circuit: Tensor) -> None:
    weight = torch.rand(30, dtype=torch.float64) + 0.1
    torch.testing.assert_close(weight_of_examples(route(circuit, 4, weight=weight), 30), weight)


@pytest.mark.parametrize("weighted", [False, True])
def test_expected_weights_are_those_of_the_examples(circuit: Tensor, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(30, dtype=torch.float64) ** 4 + 0.01 if weighted else torch.ones(30, dtype=torch.float64)
    draws = torch.stack(
        [weight_of_examples(route(circuit, 4, slots=6, weight=weight, generator=generator), 30) for _ in range(4000)]
    )
    for g in range(4):  # no sum over a circuit changes at all
        mine = circuit == g
        torch.testing.assert_close(draws[:, mine].sum(1), weight[mine].sum().expand(4000))
    error = (draws.mean(0) - weight) / (draws.std(0) / 4000**0.5 + 1e-9)
    assert error.abs().max() < 4.5
    assert torch.equal(draws[0][circuit == 2], weight[circuit == 2].double())  # five of six slots: all are there


def test_equal_weights_are_drawn_at_most_once(circuit: Tensor) -> None:
    for seed in range(50):
        routed = route(circuit, 4, slots=6, generator=torch.Generator().manual_seed(seed))
        chosen = routed.index[routed.weight > 0]
        assert len(chosen.unique()) == len(chosen)


def test_large_weights_are_never_left_out(circuit: Tensor) -> None:
    weight = torch.full((30,), 0.01)
    weight[circuit.argsort()[[2, 11]]] = 1.0  # two of the eighteen of circuit 0
    for seed in range(50):
        routed = route(circuit, 4, slots=6, weight=weight, generator=torch.Generator().manual_seed(seed))
        found = weight_of_examples(routed, 30)[weight == 1]
        assert (found > 0.7).all()


def test_a_sample_is_a_function_of_the_generator(circuit: Tensor) -> None:
    one, same, other = (route(circuit, 4, slots=3, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one.index, same.index)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.index, other.index)


def test_where_there_is_room_nothing_is_drawn(circuit: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(route(circuit, 4, slots=20, generator=generator).index, route(circuit, 4).index)
    assert torch.equal(generator.get_state(), before)


def test_weights_of_zero_leave_circuits_empty() -> None:
    routed = route(torch.zeros(9, dtype=torch.int64), 2, slots=4, weight=torch.zeros(9))
    assert (routed.weight == 0).all()


@pytest.mark.parametrize("slots", [None, 3])
def test_nothing_to_route(slots: int | None) -> None:
    routed = route(torch.empty(0, dtype=torch.int64), 2, slots=slots)
    assert (routed.weight == 0).all()
    assert routed.weight.shape == (2, slots or 1)
    assert list(route_in_passes(torch.empty(0, dtype=torch.int64), 2, 4)) == []


@pytest.mark.parametrize("slots", [1, 4, 100])
def test_passes_hold_every_example_once(circuit: Tensor, slots: int) -> None:
    seen = []
    for index, filled in route_in_passes(circuit, 4, slots):
        assert index.shape[1] <= slots
        of_slot = torch.arange(4)[:, None].expand_as(filled)
        assert torch.equal(circuit[index[filled]], of_slot[filled])
        seen += index[filled].tolist()
    assert sorted(seen) == list(range(30))


def test_no_slots_are_refused(circuit: Tensor) -> None:
    with pytest.raises(ValueError, match="slots: got 0, expected a whole number of at least 1"):
        route(circuit, 4, slots=0)


def test_few_sizes_are_a_little_larger() -> None:
    sizes = [few_sizes(size) for size in range(1, 1001)]
    assert all(size <= found <= max(1.25 * size, 1) for size, found in enumerate(sizes, 1))
    assert len(set(sizes)) < 40
    assert few_sizes(0) == 1
