"""How work is divided over ranks: over three, which this file is when it is run as a script, and over one alone."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import as_script, fork_ranks, free_port, one_of_two

from lvd_lightning import shares
from lvd_lightning.models.routing import Routed, route
from lvd_lightning.models.shared_routing import route_batch
from lvd_lightning.teachers.batch_noise import batch_noise

BATCH, CIRCUITS, SIZE = 11, 3, 3


def examples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a batch: circuits, weights, and activations that are not in one piece."""
    generator = torch.Generator().manual_seed(0)
    circuit = torch.randint(CIRCUITS, (BATCH,), generator=generator) // 2  # the first gets most of them
    return circuit, torch.rand(BATCH, generator=generator), torch.rand(5, BATCH, 4, generator=generator)


def dropped(x: torch.Tensor) -> torch.Tensor:
    """What a layer with dropout makes of activations, and attention with dropout of these."""
    torch.manual_seed(3)
    x = torch.nn.functional.dropout(x, 0.4) + torch.rand(len(x), 1, 1, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.3)


def routed_batch(rank: int, size: int, slots: float) -> Routed:
    circuit, weight, _ = (found[rank::size] if found.dim() == 1 else found for found in examples())
    order = torch.arange(rank, BATCH, size)
    generator = torch.Generator().manual_seed(1)
    return route_batch(circuit, CIRCUITS, slots=slots, order=order, weight=weight, generator=generator)


def together(rank: int, port: int, folder: Path) -> None:
    with one_of_two(rank, port, SIZE):
        generator = torch.Generator().manual_seed(2)
        own = torch.arange(BATCH)[rank::SIZE]
        activations = examples()[2].transpose(0, 1)[rank::SIZE]
        with batch_noise(len(own)):
            noisy = dropped(activations)
        found = {
            "chunks": list(shares.own_chunks(10, 4)),
            "total": shares.batch_total(len(own)),
            "drawn": shares.drawn_for_batch(lambda count: torch.rand(count, 2, generator=generator), len(own)),
            "batch": shares.whole_batch(own),
            "rows": shares.gathered_rows(torch.full((rank, 2), rank)),
            "noisy": noisy,
        }
        for slots in (0.5, 3.0):
            routed = routed_batch(rank, SIZE, slots)
            found[f"routed {slots}"] = (routed.index * SIZE + rank, routed.weight)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks has got."""
    folder = tmp_path_factory.mktemp("three")
    result = as_script(__file__, str(folder))
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


def weights(found: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The weight that every example of a batch has in every circuit."""
    total = torch.zeros(CIRCUITS, BATCH, dtype=torch.float64)
    for index, weight in found:
        filled = weight > 0
        circuit = torch.arange(CIRCUITS)[:, None].expand_as(index)
        total.index_put_((circuit[filled], index[filled]), weight[filled].double(), accumulate=True)
    return total


def test_three_ranks_divide_what_one_has(found: list[dict[str, Any]]) -> None:
    assert [rows["chunks"] for rows in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    generator = torch.Generator().manual_seed(2)
    drawn = torch.rand(BATCH, 2, generator=generator, dtype=torch.float64)
    for rank, rows in enumerate(found):
        assert rows["total"] == BATCH
        assert torch.equal(rows["drawn"], drawn[rank::SIZE])
        assert rows["batch"].tolist() == list(range(BATCH))
        assert rows["rows"][:, 0].tolist() == [1, 2, 2]


def test_dropout_does_not_depend_on_the_number_of_ranks(found: list[dict[str, Any]]) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        x = examples()[2].transpose(0, 1)
        with batch_noise(BATCH):
            alone = dropped(x)
    finally:
        torch.set_default_dtype(torch.float32)
    for rank in range(SIZE):
        torch.testing.assert_close(found[rank]["noisy"], alone[rank::SIZE], rtol=1e-12, atol=1e-12)


def test_a_batch_is_routed_alike_on_any_number_of_ranks(found: list[dict[str, Any]]) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        for slots in (0.5, 3.0):
            alone = routed_batch(0, 1, slots)
            parts = [rows[f"routed {slots}"] for rows in found]
            torch.testing.assert_close(weights(parts), weights([(alone.index, alone.weight)]), rtol=1e-12, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_one_process_has_all_and_routes_as_always() -> None:
    circuit, weight, _ = examples()
    x = torch.arange(4)
    assert shares.own_chunks(10, 4) == range(10)
    assert shares.whole_batch(x) is x
    assert shares.gathered_rows(x) is x
    found = routed_batch(0, 1, 0.5)
    expected = route(circuit, CIRCUITS, slots=2, weight=weight, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found.index, expected.index)
    assert torch.equal(found.weight, expected.weight)


if __name__ == "__main__":
    port = free_port()
    sys.exit(fork_ranks(lambda rank: together(rank, port, Path(sys.argv[1])), SIZE))
