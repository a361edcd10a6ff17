"""The VQ-VAE's stage: it learns, resumes exactly, logs what it says, hands on what it learned, on one rank or two."""

import csv
import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from helpers.pictures import Pictures
from helpers.processes import free_port
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image

from lvd_lightning.color import decode_color
from lvd_lightning.ranks import Ranks
from lvd_lightning.stages import VQVAETeacher
from lvd_lightning.stages.vqvae_teacher import code_sheet
from lvd_lightning.teachers import VQVAE, load_teacher

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders

SMALL: dict[str, Any] = {
    **{"channels": 8, "num_residual_blocks": 1, "num_features": 6, "codebook_size": 9, "num_components": 2},
    **{"prior_hidden_size": 8, "prior_num_layers": 1, "prior_num_heads": 2, "lr": 2e-2, "num_pictures": 3},
}


class Killed(Exception):
    """What stands for a lost machine."""


class KillAtEpoch(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise Killed


def test_the_elbo_rises_and_codes_are_used(run: Any) -> None:
    module = VQVAETeacher(**SMALL, final_lr=1e-3, warmup=0.1)
    before = run.begin("teacher", module).finish_stage(run.context("teacher"))
    trainer = run.train("teacher", module, epochs=12)
    metrics = trainer.callback_metrics
    assert metrics["val/elbo_bpd"] < before["val_elbo_bpd"] - 1.5
    assert metrics["val/codes_used"] > 0.5
    assert metrics["val/elbo_bpd"].item() == pytest.approx(
        (metrics["val/reconstruction_bpd"] + metrics["val/prior_bpd"]).item(), rel=1e-5
    )
    assert metrics["val/loss"] > metrics["val/elbo_bpd"]
    assert 1 < metrics["val/code_perplexity"] <= 9


def test_an_interrupted_run_ends_like_an_uninterrupted_one(run: Any) -> None:
    def trainer(name: str, *callbacks: Callback) -> Trainer:
        saving = ModelCheckpoint(run.folder / name, filename="{epoch}", save_top_k=-1)
        return run.trainer("teacher", 3, enable_checkpointing=True, callbacks=[saving, *callbacks])

    # Dropout draws from the global generator, which the pipeline seeds at every epoch.
    settings = SMALL | {"final_lr": 0.0, "prior_dropout": 0.0}
    whole, module = VQVAETeacher(**settings), VQVAETeacher(**settings)
    trainer("whole").fit(run.begin("teacher", whole), datamodule=run.data)
    with pytest.raises(Killed):
        trainer("parts", KillAtEpoch(2)).fit(run.begin("teacher", module), datamodule=run.data)
    torch.manual_seed(99)
    module = VQVAETeacher(**settings)
    checkpoint = run.folder / "parts" / "epoch=1.ckpt"
    torch.load(checkpoint, weights_only=True)
    trainer("parts").fit(run.begin("teacher", module), datamodule=run.data, ckpt_path=checkpoint)
    for name, tensor in whole.teacher.state_dict().items():
        assert torch.equal(tensor, module.teacher.state_dict()[name]), name


def test_the_seed_decides(make_run: Any, tmp_path: Path) -> None:
    teachers = []
    for number, seed in enumerate([0, 0, 1]):
        module = VQVAETeacher(**SMALL)
        make_run(tmp_path / str(number), seed=seed).train("teacher", module)
        teachers.append(module.teacher)
    assert torch.equal(teachers[0].codebook.codes, teachers[1].codebook.codes)
    assert not torch.equal(teachers[0].codebook.codes, teachers[2].codebook.codes)


def test_the_stage_hands_on_the_teacher_and_its_figures(run: Any) -> None:
    module = VQVAETeacher(**SMALL, decoder="convolutional")
    trainer = run.train("teacher", module)
    context = run.context("teacher")
    figures = module.finish_stage(context)
    for name in ("elbo_bpd", "reconstruction_bpd", "prior_bpd", "loss", "code_perplexity", "codes_used"):
        assert figures[f"val_{name}"] == pytest.approx(trainer.callback_metrics[f"val/{name}"].item(), rel=1e-5)
    loaded = load_teacher(context.dir)
    assert isinstance(loaded, VQVAE)
    images = run.data.splits["val"]
    assert figures["val_elbo_bpd"] == pytest.approx(-loaded.elbo(images).mean().item() / (48 * math.log(2)), rel=1e-5)
    codes = module.teacher.codebook
    assert figures["num_parameters"] == sum(p.numel() for p in module.teacher.parameters()) + codes.codes.numel()
    used = loaded.codes(images).unique()
    assert figures["val_codes_used"] == pytest.approx(len(used) / 9)


def test_figures_of_every_epoch_are_logged(run: Any) -> None:
    run.train("teacher", VQVAETeacher(**SMALL), epochs=2, logger=CSVLogger(run.folder, name="csv", version=""))
    with (run.folder / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for split in ("train", "val"):
        for name in ("elbo_bpd", "reconstruction_bpd", "prior_bpd", "loss", "code_perplexity", "codes_used"):
            assert len([row for row in rows if row[f"{split}/{name}"]]) == 2, (split, name)


@pytest.mark.parametrize("decoder", ["independent", "convolutional"])
def test_pictures_are_written_every_epoch(run: Any, decoder: str) -> None:
    run.train("teacher", VQVAETeacher(**SMALL, decoder=decoder), epochs=2)
    pictures = {path.name: Image.open(path).size for path in (run.folder / "teacher" / "pictures").iterdir()}
    expected = {f"epoch_00{epoch}.png": (3 * 4, 2 * 4) for epoch in range(2)}
    if decoder == "independent":
        expected |= {f"codes_epoch_00{epoch}.png": (32 * 2, 2) for epoch in range(2)}
    assert pictures == expected


@pytest.mark.parametrize(
    ("part", "loss", "layer"), [("prior", "prior", "prior"), ("decoder", "reconstruction", "decoder")]
)
def test_one_that_explodes_says_which_loss_and_where(run: Any, part: str, loss: str, layer: str) -> None:
    class Explodes(VQVAETeacher):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                with torch.no_grad():
                    next(getattr(self.teacher, part).parameters()).fill_(torch.inf)

    module = Explodes(**SMALL)
    expected = rf"^stage teacher: loss '{loss}' is .* in step 1 \(epoch 1\), first for training example \d+ \({layer}"
    with pytest.raises(ValueError, match=expected):
        run.train("teacher", module)


def test_pictures_go_to_wandb(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logged: list[str] = []
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images, **kwargs: logged.append(key))
    run.train("teacher", VQVAETeacher(**SMALL), logger=WandbLogger(save_dir=run.folder, mode="disabled"))
    assert logged == ["reconstructions", "codes"]


def test_the_code_sheet_shows_the_most_used_first() -> None:
    torch.manual_seed(0)
    sizes = {name: SMALL[name] for name in ("channels", "num_features", "num_components", "prior_hidden_size")}
    teacher = VQVAE(4, 2, codebook_size=35, prior_num_heads=2, **sizes).eval().requires_grad_(False)
    teacher.codebook.count.copy_(torch.arange(35.0))
    data = Pictures()
    data.image_shape, data.color = (3, 4, 4), "ycocg_r"
    sheet = code_sheet(teacher, data).permute(2, 0, 1)
    assert sheet.shape == (3, 4, 64)
    for place, code in ((0, 34), (31, 3), (32, 2), (34, 0)):
        top, left = 2 * (place // 32), 2 * (place % 32)
        patch = teacher.reconstruct(torch.full((1, 4), code))[:, :, :2, :2]
        assert torch.equal(sheet[:, top : top + 2, left : left + 2], decode_color(patch.to(torch.uint8), "ycocg_r")[0])
    assert (sheet[:, 2:, 6:] == 0).all()


def test_the_learning_rate_rises_and_falls(run: Any) -> None:
    rates: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    # 3 batches an epoch; the rates are those of the steps to come.
    run.train("teacher", VQVAETeacher(**(SMALL | {"lr": 1.0}), final_lr=0.2, warmup=0.3), 3, callbacks=[Watch()])
    assert rates[:3] == pytest.approx([0.5, 0.75, 1.0])
    assert all(a > b for a, b in pairwise(rates[2:]))
    assert rates[-1] == pytest.approx(0.2)
    rates.clear()
    run.train("teacher", VQVAETeacher(**(SMALL | {"lr": 1.0})), 1, callbacks=[Watch()])
    assert rates == [1.0] * 3


def test_wrong_arguments_are_named(run: Any) -> None:
    with pytest.raises(ValueError, match=r"commitment: got -1"):
        VQVAETeacher(commitment=-1.0)
    with pytest.raises(ValueError, match=r"final_lr: got 0\.2, expected 0 to 0\.1"):
        VQVAETeacher(lr=0.1, final_lr=0.2)
    with pytest.raises(ValueError, match=r"warmup: got 1\.0"):
        VQVAETeacher(warmup=1.0)
    with pytest.raises(ValueError, match="decoder: got 'dense'"):
        run.begin("teacher", VQVAETeacher(decoder="dense"))
    with pytest.raises(ValueError, match="set max_epochs"):
        run.train("teacher", VQVAETeacher(**SMALL, final_lr=0.0), -1)


def _train_on_rank(rank: int, folder: Path, kind: Any, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        TORCHELASTIC_RUN_ID="test",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2"),
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        GROUP_RANK="0",
    )
    ranks = Ranks({"accelerator": "cpu", "devices": 2})
    module = VQVAETeacher(**SMALL)
    # Without the broadcast of buffers before every pass, codebooks that went different ways would stay apart.
    strategy = DDPStrategy(broadcast_buffers=False)
    trainer = kind(folder).train("teacher", module, epochs=2, devices=2, strategy=strategy)
    torch.save(module.teacher.state_dict(), folder / f"teacher{rank}.pt")
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if ranks.is_first:
        metrics["handed on"] = module.finish_stage(kind(folder).context("teacher"))["val_elbo_bpd"]
    (folder / f"metrics{rank}.json").write_text(json.dumps(metrics))
    ranks.close()


def test_two_ranks_train_one_teacher(make_run: Any, tmp_path: Path) -> None:
    make_run(tmp_path)
    port = free_port()
    mp.start_processes(_train_on_rank, args=(tmp_path, make_run, port), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"teacher{rank}.pt", weights_only=True) for rank in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert first["codebook.num_updates"] == 6
    one, two = (json.loads((tmp_path / f"metrics{rank}.json").read_text()) for rank in range(2))
    assert one.pop("handed on") == pytest.approx(one["val/elbo_bpd"], rel=1e-5)
    assert one == two
