"""An exported folder does what the run does, and nothing in it is run."""

import json
from pathlib import Path

import pytest
import torch
from helpers.trained_runs import random_pictures, trained_run

import lvd_lightning.circuits as pc
from lvd_lightning.use.exporting import export
from lvd_lightning.use.folders import new_folder
from lvd_lightning.use.trained import from_pretrained, open_trained


@pytest.mark.parametrize("color", ["ycocg_r", "grey"])
def test_an_exported_circuit_is_the_circuit(tmp_path: Path, color: str) -> None:
    trained = trained_run(tmp_path / "run", color, side=8 if color == "grey" else 4, patch=2)
    export(trained, tmp_path / "out", license="cc0-1.0")
    found = open_trained(tmp_path / "out")
    assert (found.codes, found.shape, found.run) == (trained.codes, trained.shape, None)
    codes = trained.codes.encode(random_pictures(3, side=trained.size[0]))
    assert torch.equal(found.circuit.log_prob(codes), trained.circuit.log_prob(codes))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc0-1.0\n")
    assert f"{trained.circuit.num_parameters:,}" in card
    assert (tmp_path / "out" / "pictures" / "samples.png").is_file()
    again = tmp_path / "again"
    export(found, again)
    assert torch.equal(from_pretrained(again).circuit.log_prob(codes), found.circuit.log_prob(codes))


def test_figures_of_the_report_are_in_the_card(tmp_path: Path) -> None:
    trained = trained_run(tmp_path / "run", side=4, patch=2)
    (tmp_path / "run" / "report").mkdir()
    summary = {"test": {"bpd": 4.25, "num_parameters": 1234}, "protocol": {"color": "ycocg_r"}}
    (tmp_path / "run" / "report" / "summary.json").write_text(json.dumps(summary))
    export(trained, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| bpd | 4.2500 |" in card
    assert '"color": "ycocg_r"' in card
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.[jm]*"))


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    trained = trained_run(tmp_path / "run", side=4, patch=2)
    export(trained, tmp_path / "out")
    with pytest.raises(ValueError, match="out: is there and holds something"):
        export(trained, tmp_path / "out")
    with pytest.raises(ValueError, match="run is no exported folder: it holds no config.json"):
        from_pretrained(tmp_path / "run")
    config = tmp_path / "out" / "config.json"
    good = config.read_text()
    config.write_text(good.replace("pretrained.1", "pretrained.9"))
    with pytest.raises(ValueError, match=r"its format is 'lvd_lightning.pretrained.9', this program reads"):
        from_pretrained(tmp_path / "out")
    config.write_text(good.replace("ycocg_r", "cmyk"))
    with pytest.raises(ValueError, match="does not say how pictures are encoded"):
        from_pretrained(tmp_path / "out")
    config.write_text(good)
    weights = tmp_path / "out" / "prior.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="prior.safetensors"):
        from_pretrained(tmp_path / "out")


def test_a_folder_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    def stop_halfway() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stop_halfway()
    assert list(tmp_path.iterdir()) == []


def test_circuits_for_pyjuice(tmp_path: Path) -> None:
    pytest.importorskip("pyjuice")
    trained = trained_run(tmp_path / "run", side=4, patch=2)
    with pytest.raises(ValueError, match="DiscretizedLogistic"):
        export(trained, tmp_path / "out", pyjuice=True)
    assert not (tmp_path / "out").exists()


def test_pyjuice_reads_what_is_written_for_it(tmp_path: Path) -> None:
    """Circuits and heads are the same ones."""
    pyjuice = pytest.importorskip("pyjuice")
    trained = trained_run(tmp_path / "run", "grey", side=8, patch=2, family=pc.Categorical)
    export(trained, tmp_path / "out", pyjuice=True)
    conditional = trained.circuit.conditional
    x = torch.randint(17, (5, 4), generator=torch.Generator().manual_seed(0))
    for number, structure in enumerate(conditional.structures):
        loaded = pyjuice.load(str(tmp_path / "out" / "pyjuice" / f"conditional_{number}.jpc"))
        back = pc.Circuit(pc.from_pyjuice(loaded))
        assert back.num_heads == structure.num_heads
        for head in range(structure.num_heads):
            heads_GB = torch.zeros(conditional.num_circuits, len(x), dtype=torch.int64)
            heads_GB[number] = head
            expected = conditional.log_prob(x.expand(conditional.num_circuits, -1, -1), head=heads_GB)[number]
            torch.testing.assert_close(back.log_prob(x, head=head).flatten(), expected.flatten())
