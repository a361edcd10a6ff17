"""Two processes train as one: this file, run as a script, is both of them.

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
from torch import Tensor

from lvd_lightning.models.evidence import EvidenceCache
from lvd_lightning.ranks import Ranks
from lvd_lightning.stages import CircuitBaseline, ConditionalStudent, FinetuneStudent, PriorStudent
from lvd_lightning.strategies import EMStrategy

STAGES = ("conditional", "prior", "finetune", "baseline")
EPOCHS = 2


def students() -> dict[str, Any]:
    """Stages whose steps leave nothing out, however a batch is shared."""
    return {
        "conditional": ConditionalStudent(2, slots=4.0, val_images=20),
        "prior": PriorStudent(num_units=3, hard_epochs=1, candidates=2, val_images=20),
        "finetune": FinetuneStudent(margin=1e4, posterior_floor=0.0, slots=20.0, val_images=20),
        "baseline": CircuitBaseline(num_units=2, seconds=0.1, batch_size=51, val_images=20),
    }


def train_all(run: Any, ranks: Ranks) -> dict[str, Any]:
    """All stages one after another as the pipeline runs them; what the last one of each metric was."""
    metrics: dict[str, Any] = {}
    for stage, module in students().items():
        context = run.context(stage)
        if ranks.is_first:
            context.dir.mkdir(parents=True, exist_ok=True)
        ranks.wait()
        module.begin_stage(context)
        if stage == "baseline":
            metrics["plan"] = module.steps
            module.steps = {"em": 4, "anemone": 3}
        if ranks.rank == 1:  # the strategy has to give this rank the parameters of the other
            for parameter in module.parameters():
                parameter.data.mul_(0.5)
        trainer = run.trainer(
            stage, EPOCHS, devices=ranks.world_size, strategy=EMStrategy() if ranks.world_size > 1 else "auto"
        )
        trainer.fit(module, datamodule=None if stage == "baseline" else run.data)
        metrics[stage] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        state = {name: tensor for name, tensor in module.state_dict().items() if "tables" in name}
        torch.save(state, run.folder / f"{stage}-{ranks.rank}.pt")
        ranks.wait()
        if ranks.is_first:
            run.finish(stage, module.finish_stage(context))
        ranks.wait()
    return metrics


def new_run(folder: Path) -> Run:
    return Run(folder, SmallImages(num_train=63, num_val=23, batch_size=20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, by one process and by two."""
    folder = tmp_path_factory.mktemp("strategies")
    result = as_script(__file__, str(folder))
    assert result.returncode == 0, result.stderr
    return folder


def state(folder: Path, run: str, stage: str, rank: int = 0) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / run / f"{stage}-{rank}.pt", weights_only=True)
    assert len(found) > 1
    return found


def metrics(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_have_the_same_parameters(folder: Path, stage: str) -> None:
    first, second = (state(folder, "two", stage, rank) for rank in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_are_those_of_one_process(folder: Path, stage: str) -> None:
    one, two = (state(folder, run, stage) for run in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_are_those_of_one_process_on_every_rank(folder: Path, stage: str) -> None:
    one, *two = (metrics(folder, name)[stage] for name in ("one", "two-0", "two-1"))
    assert any("val" in name for name in one)
    for found in two:
        assert found == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_rank_finishes_stages_alone(folder: Path, stage: str) -> None:
    one, two = (json.loads((folder / name / stage / "done.json").read_text()) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)


def test_ranks_share_the_evidence(folder: Path) -> None:
    index = torch.arange(63)
    one, two = (EvidenceCache.open(folder / name / "prior" / "evidence" / "train") for name in ("one", "two"))
    assert one is not None
    assert two is not None
    torch.testing.assert_close(two.evidence(index, "cpu"), one.evidence(index, "cpu"), rtol=1e-3, atol=1e-2)


def test_ranks_agree_on_the_plan(folder: Path) -> None:
    written = json.loads((folder / "two" / "baseline" / "plan.json").read_text())
    assert metrics(folder, "two-0")["plan"] == metrics(folder, "two-1")["plan"] == written["steps"]


def run_rank(folder: Path, rank: int) -> None:
    ranks = Ranks({"accelerator": "cpu", "devices": 2})
    run = new_run(folder / "two") if rank == 0 else None
    ranks.wait()
    run = run or new_run(folder / "two")
    (folder / f"two-{rank}.json").write_text(json.dumps(train_all(run, ranks)))
    ranks.close()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    code = fork_ranks(partial(run_rank, folder))
    found = train_all(new_run(folder / "one"), Ranks({"accelerator": "cpu", "devices": 1}))
    (folder / "one.json").write_text(json.dumps(found))
    sys.exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
