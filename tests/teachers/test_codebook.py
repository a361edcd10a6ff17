"""The codebook: nearest codes, moving averages by hand, dead codes, and two ranks that decide alike."""

import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lvd_lightning.teachers import codebook as module
from lvd_lightning.teachers.codebook import Codebook


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed))


def _placed(codes: Tensor, count: float = 5.0, **settings: float) -> Codebook:
    """A codebook whose codes are alive, and where they are."""
    codebook = Codebook(*codes.shape, **settings)
    codebook.codes.copy_(codes)
    codebook.count.fill_(count)
    codebook.total.copy_(count * codes)
    codebook.num_updates.fill_(10**6)
    return codebook


@pytest.mark.parametrize("chunk", [None, 20])
def test_codes_are_the_nearest(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunk is not None:
        monkeypatch.setattr(module, "_CHUNK_ENTRIES", chunk)
    codebook = Codebook(7, 3)
    vectors = _vectors(4, 9, 3, seed=5)
    expected = torch.cdist(vectors.double(), codebook.codes.double().expand(4, -1, -1)).argmin(-1)
    assert torch.equal(codebook.nearest(vectors), expected)
    codebook.codes[4] = codebook.codes[2] = vectors[0, 0]
    assert codebook.nearest(vectors)[0, 0] == 2  # the first of equally near ones


@pytest.mark.parametrize("updates", [0, 5, 10**6])
def test_codes_move_to_the_averages_of_their_vectors(updates: int) -> None:
    codebook = _placed(_vectors(4, 2), decay=0.9)
    codebook.num_updates.fill_(updates)
    count, total = codebook.count.clone(), codebook.total.clone()
    vectors = _vectors(3, 10, 2, seed=1)
    z = codebook.nearest(vectors)
    codebook.update(vectors, z, _generator())
    decay = min(0.9, (1 + updates) / (10 + updates))
    for k in range(4):
        chosen = vectors[z == k]
        n = decay * count[k] + (1 - decay) * len(chosen)
        s = decay * total[k] + (1 - decay) * chosen.sum(0)
        torch.testing.assert_close(codebook.codes[k], s / n)
    assert codebook.num_updates == updates + 1


def test_the_first_batch_places_the_codes() -> None:
    codebook = Codebook(20, 3)
    vectors = 100 + _vectors(50, 3)
    codebook.update(vectors, codebook.nearest(vectors), _generator())
    # At most a few codes, the nearest to all vectors, go to means; the others are on vectors of their own.
    on = (codebook.codes[:, None] == vectors).all(2)
    assert on.sum() >= 16
    assert on.sum(0).max() == 1
    assert (codebook.codes > 90).sum() == 60


def test_a_dead_code_goes_where_vectors_are_far_from_codes() -> None:
    codes = torch.tensor([[0.0, 0.0], [10.0, 0.0], [99.0, 99.0]])
    codebook = _placed(codes)
    codebook.count[2], codebook.total[2] = 0.1, 0.1 * codes[2]
    vectors = torch.tensor([[0.0, 0.0]] * 30 + [[10.0, 3.0]] * 30)
    codebook.update(vectors, codebook.nearest(vectors), _generator())
    assert torch.equal(codebook.codes[2], vectors[-1])  # vectors at distance zero are never drawn
    assert codebook.count[2] == 20
    assert torch.equal(codebook.total[2], 20 * vectors[-1])
    torch.testing.assert_close(codebook.codes[0], codes[0])


def test_places_are_drawn_in_proportion_to_squared_distances() -> None:
    vectors = torch.tensor([[1.0], [2.0], [3.0]])
    drawn = torch.zeros(3)
    generator = _generator()
    for _ in range(1200):
        codebook = _placed(torch.tensor([[0.0], [50.0]]))
        codebook.count[1] = 0.0
        codebook.update(vectors, torch.zeros(3, dtype=torch.int64), generator)
        drawn[round(codebook.codes[1].item()) - 1] += 1
    assert (drawn / 1200 - torch.tensor([1.0, 4.0, 9.0]) / 14).abs().max() < 0.04


def test_no_two_codes_go_to_one_vector() -> None:
    codebook = _placed(_vectors(10, 2), decay=0.5)
    codebook.count[2:] = 0.0
    vectors = 5 + _vectors(3, 2, seed=3)
    before = codebook.codes.clone()
    codebook.update(vectors, codebook.nearest(vectors), _generator())
    on = (codebook.codes[2:, None] == vectors).all(2)
    assert on.sum(0).tolist() == [1, 1, 1]
    assert (codebook.codes == before).all(1).sum() >= 5  # the other dead ones wait for the next batch


def test_what_is_used_enough_stays() -> None:
    codebook = _placed(_vectors(6, 2), dead_below=0.1)
    codebook.count[3] = 0.6
    vectors = _vectors(30, 2, seed=2)
    z = torch.arange(30) % 6
    z[z == 3] = 2
    before = codebook.codes[3].clone()
    codebook.total[3] = 0.6 * before
    codebook.update(vectors, z, _generator())
    torch.testing.assert_close(codebook.codes[3], before)  # its share is just above 0.1 of the average


def test_every_group_of_vectors_gets_a_code() -> None:
    centers = 10 * _vectors(16, 4)
    codebook, generator = Codebook(32, 4), _generator(1)
    for step in range(80):
        vectors = centers[torch.randint(16, (64,), generator=generator)] + 0.1 * _vectors(64, 4, seed=step)
        codebook.update(vectors, codebook.nearest(vectors), generator)
    assert torch.cdist(centers, codebook.codes).min(1).values.max() < 0.5
    assert len(codebook.nearest(centers).unique()) == 16


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_codes: got 0"):
        Codebook(0, 3)
    with pytest.raises(ValueError, match=r"decay: got 1\.0"):
        Codebook(2, 3, decay=1.0)
    with pytest.raises(ValueError, match=r"dead_below: got -1"):
        Codebook(2, 3, dead_below=-1.0)


SHARES = (slice(0, None, 2), slice(1, None, 2))  # of every batch, see `lvd_lightning.shares`


def _batch(step: int) -> Tensor:
    return 3 * step + _vectors(61, 3, seed=step)


def _train(rank: int | None, steps: int, seed: int) -> Codebook:
    torch.manual_seed(0)
    codebook = Codebook(8, 3, decay=0.8)
    for step in range(steps):
        vectors = _batch(step) if rank is None else _batch(step)[SHARES[rank]]
        codebook.update(vectors, codebook.nearest(vectors), _generator(math.comb(seed + 10, 2) + step))
    return codebook


def _run_on_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save(_train(rank, 6, seed=0).state_dict(), folder / f"trained{rank}.pt")
    codebook = _placed(_vectors(4, 3, seed=9), decay=0.5)  # alive codes, nothing to draw
    vectors = _batch(0)[SHARES[rank]]
    codebook.update(vectors, codebook.nearest(vectors), _generator(rank))
    torch.save(codebook.state_dict(), folder / f"averaged{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_keep_one_codebook(tmp_path: Path) -> None:
    mp.start_processes(_run_on_rank, args=(tmp_path,), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"trained{rank}.pt", weights_only=True) for rank in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    # The draws are those of one process, too.
    torch.testing.assert_close(first, dict(_train(None, 6, seed=0).state_dict()), rtol=1e-4, atol=1e-4)
    # Data move by three a step: without new places all codes would be left behind.
    assert torch.cdist(first["codes"], _batch(5)).min(1).values.median() < 2
    # Sums are those of one process that has all vectors.
    one = _placed(_vectors(4, 3, seed=9), decay=0.5)
    one.update(_batch(0), one.nearest(_batch(0)), _generator())
    for rank in range(2):
        averaged = torch.load(tmp_path / f"averaged{rank}.pt", weights_only=True)
        torch.testing.assert_close(averaged["codes"], one.codes)
        torch.testing.assert_close(averaged["count"], one.count)
