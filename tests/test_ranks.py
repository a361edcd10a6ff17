"""What the processes of a job do together, with two of them; and alone, where nothing is sent."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.processes import free_port, one_of_two

from lvd_lightning import ranks
from lvd_lightning.traffic import TRAFFIC


def together(rank: int, port: int, folder: str) -> None:
    """As rank 0 or 1: write down what every function gives."""
    made: list[object] = []
    new_group = dist.new_group
    dist.new_group = lambda *given, **named: made.append(1) or new_group(*given, **named)  # type: ignore[assignment]
    with one_of_two(rank, port):
        called = Path(folder, f"called{rank}")
        large = torch.full((3, 1 << 16), 1.0 + rank).T  # beyond a bucket, and not in one piece
        ranks.sum_in_place([large, *(found := [torch.full((1 << 16,), rank * 2.0) for _ in range(3)])])
        sent = TRAFFIC.num_bytes, TRAFFIC.num_messages, bool((large == 3).all()), [float(x[-1]) for x in found]
        number = ranks.on_first(lambda: called.write_text("x"))
        for _ in range(3):
            ranks.wait()
        tensors = [torch.full((2,), 1.0 + rank), torch.full((1,), 10 + rank)]
        ranks.sum_in_place(tensors)
        found = {
            "size": ranks.rank_and_size(),
            "on_first": number,
            "summed": ranks.summed(torch.tensor([1.0 + rank])).tolist(),
            "in_place": [tensor.tolist() for tensor in tensors],
            "any": ranks.any_rank([rank == 1, False]),
            "gathered": ranks.gathered(torch.tensor([rank])).tolist(),
            "from_first": ranks.from_first(torch.tensor([5 + rank])).tolist(),
            "groups": len(made),
            "sent": sent,
        }
        ranks.check_agreement("what is equal", "same", [torch.ones(3)])
        try:
            ranks.check_agreement("the rank", "same", [torch.tensor([rank])])
        except RuntimeError as error:
            found["error"] = str(error)
    torch.save(found, Path(folder, f"rank{rank}.pt"))


def test_two_ranks_agree_and_make_one_group_for_waiting(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(together, (free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert (first.pop("size"), second.pop("size")) == ((0, 2), (1, 2))
    assert first == second
    assert [path.name for path in tmp_path.glob("called*")] == ["called0"]
    expected = {"on_first": 1, "summed": [3.0], "in_place": [[3.0, 3.0], [21]], "any": [True, False], "groups": 1}
    assert first | expected == first
    assert first["sent"] == (6 * 8 << 16, 3, True, [2.0, 2.0, 2.0])  # the small ones in two messages
    assert (first["gathered"], first["from_first"]) == ([0, 1], [5])
    assert "the processes disagree on the rank: rank 1 has something else than rank 0" in first["error"]
    assert "in 1 of 2 parts, first in tensor 0" in first["error"]


def test_alone_nothing_is_sent() -> None:
    x = torch.arange(3)
    assert ranks.rank_and_size() == (0, 1)
    assert ranks.on_first(lambda: 7) == 7
    assert ranks.summed(x) is x
    assert ranks.from_first(x) is x
    assert ranks.any_rank([True, False]) == [True, False]
    ranks.wait()
    ranks.check_agreement("anything", "", [x])
    with pytest.raises(ZeroDivisionError):
        ranks.on_first(lambda: 1 // 0)
