"""Two processes grow circuits as one does: this file, run as a script, is both of them.

The script imports everything, then forks the ranks, which see each other as torchrun's do.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import as_script, fork_ranks
from helpers.small_runs import Run, SmallImages

from callbacks import GrowClusters, Prune, ReassignClusters
from lvd_lightning.ranks import Ranks, check_agreement, from_first, summed
from lvd_lightning.runs.metrics_file import MetricsFile, read_metrics
from lvd_lightning.stages import ConditionalStudent
from lvd_lightning.strategies import EMStrategy

EPOCHS = 5


def train(folder: Path, name: str, ranks: Ranks) -> None:
    """Two rounds of all edits; leaves what came out of them."""
    data = SmallImages(num_train=163, num_val=23, batch_size=40, num_states=5)
    data.z = {split: (z >= 2).long() for split, z in data.z.items()}
    run = Run(folder / name, data, 2) if ranks.is_first else None
    ranks.wait()
    run = run or Run(folder / name, data, 2)
    module = ConditionalStudent(3, num_heads=2, min_examples=1, slots=4.0, val_images=20, round_epochs=2)
    module.begin_stage(run.context("conditional"))
    metrics = run.folder / "conditional" / "metrics.csv"
    if ranks.is_first:
        metrics.parent.mkdir(exist_ok=True)
    ranks.wait()
    trainer = run.trainer(
        "conditional",
        EPOCHS,
        devices=ranks.world_size,
        strategy=EMStrategy() if ranks.world_size > 1 else "auto",
        callbacks=[
            Prune(threshold=1e-3, every_n_epochs=2),
            ReassignClusters(every_n_epochs=2),
            GrowClusters(6, min_examples=10, every_n_epochs=2),
        ],
        logger=MetricsFile(metrics, lambda: 0.0),
    )
    trainer.fit(module, datamodule=run.data)
    checkpoint = {"state": module.state_dict(), "first": first_heads_of(run)}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, folder / f"{name}-{ranks.rank}.pt")
    ranks.wait()
    if ranks.is_first:
        results = module.finish_stage(run.context("conditional"))
        (folder / f"{name}.json").write_text(json.dumps(results))
    ranks.wait()


def first_heads_of(run: Any) -> torch.Tensor:
    """The heads that a stage begins with."""
    module = ConditionalStudent(3, num_heads=2, min_examples=1)
    module.begin_stage(run.context("conditional"))
    return module.heads_NP


def agreement(ranks: Ranks) -> dict[str, Any]:
    """What the processes' own functions do, on two of them."""
    number = ranks.rank + 1
    check_agreement("nothing", "same", [torch.arange(3)])
    disagreements = 0
    for text, tensors in ((str(number), []), ("same", [torch.tensor([number])])):
        try:
            check_agreement("numbers", text, tensors)
        except RuntimeError as error:
            disagreements += "the processes disagree on numbers" in str(error)
    return {
        "summed": summed(torch.tensor([number, 10])).tolist(),
        "from_first": from_first(torch.tensor([number])).tolist(),
        "disagreements": disagreements,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, by one process and by two."""
    folder = tmp_path_factory.mktemp("growing")
    result = as_script(__file__, str(folder))
    assert result.returncode == 0, result.stderr
    return folder


def left(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{name}.pt", weights_only=True)
    return found


def test_ranks_end_with_the_same_circuits_and_heads(folder: Path) -> None:
    first, second = (left(folder, f"two-{rank}") for rank in range(2))
    assert first["growing"]["round"] == second["growing"]["round"] == 2  # rounds of growth
    assert first["growing"]["structure"] == second["growing"]["structure"]
    assert torch.equal(first["growing"]["heads"], second["growing"]["heads"])
    for name, tensor in first["state"].items():
        if "tables" in name:
            assert torch.equal(tensor, second["state"][name]), name


def test_two_processes_grow_as_one(folder: Path) -> None:
    one, two = left(folder, "one-0"), left(folder, "two-0")
    assert torch.equal(one["first"], two["first"])
    assert one["growing"]["structure"] == two["growing"]["structure"]
    for name, tensor in one["growing"]["tensors"].items():
        assert torch.equal(tensor, two["growing"]["tensors"][name]), name
    assert torch.equal(one["growing"]["heads"], two["growing"]["heads"])
    for name, tensor in one["state"].items():
        if "tables" in name:
            torch.testing.assert_close(two["state"][name], tensor, rtol=1e-3, atol=1e-4)


def test_figures_are_those_of_one_process(folder: Path) -> None:
    one, two = (read_metrics(folder / name / "conditional" / "metrics.csv") for name in ("one", "two"))
    assert len(one) == len(two) > EPOCHS + 6
    for row, other in zip(one, two, strict=True):
        assert {name: float(value) for name, value in other.items() if value} == pytest.approx(
            {name: float(value) for name, value in row.items() if value}, rel=1e-3
        )
    assert any(float(row.get("GrowClusters/grown") or 0) > 0 for row in one)


def test_the_first_rank_finishes_alone(folder: Path) -> None:
    one, two = (json.loads((folder / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)
    assert (folder / "two" / "conditional" / "assignments_test.npy").is_file()


def test_sums_and_agreement(folder: Path) -> None:
    for rank in range(2):
        found = json.loads((folder / f"agreement-{rank}.json").read_text())
        assert found == {"summed": [3, 20], "from_first": [1], "disagreements": 2}


def test_a_single_process_agrees_with_itself() -> None:
    check_agreement("anything", "text")
    x = torch.arange(3)
    assert summed(x) is x
    assert from_first(x) is x


def run_rank(folder: Path, rank: int) -> None:
    ranks = Ranks({"accelerator": "cpu", "devices": 2})
    (folder / f"agreement-{rank}.json").write_text(json.dumps(agreement(ranks)))
    train(folder, "two", ranks)
    ranks.close()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    code = fork_ranks(partial(run_rank, folder))
    train(folder, "one", Ranks({"accelerator": "cpu", "devices": 1}))
    sys.exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
