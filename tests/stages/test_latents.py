"""The latents stage from teacher to assignments: what it writes, what it uses again, what it refuses."""

import json
import os
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.pictures import Pictures
from torch import Tensor

from lvd_lightning.color import patchify
from lvd_lightning.context import DONE_MARKER, StageContext
from lvd_lightning.growing.features import PatchFeatures
from lvd_lightning.latents import load_assignments, load_latents_info
from lvd_lightning.latents.context import ancestor_mask
from lvd_lightning.latents.features import FeatureStore
from lvd_lightning.latents.kmeans import assign
from lvd_lightning.latents.sampling import sample_distinct
from lvd_lightning.stages import Latents
from lvd_lightning.teachers import MAE, VQVAE, load_teacher, save_teacher

SPLITS = ("train", "val", "test")


class Ramps(Pictures):
    """8 x 8 images that are smooth ramps; counts how often each split is read."""

    image_shape = (3, 8, 8)

    def __init__(self, sizes: tuple[int, int, int] = (40, 9, 7), seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.splits = {split: self._draw(size, generator) for split, size in zip(SPLITS, sizes)}

    @staticmethod
    def _draw(count: int, generator: torch.Generator) -> Tensor:
        slope = torch.rand(count, 3, 2, 1, generator=generator) * 16
        grid = torch.arange(8.0)
        return (slope[:, :, 0, :, None] * grid[:, None] + slope[:, :, 1, :, None] * grid).to(torch.uint8)

    def num_examples(self, split: str) -> int:
        return len(self.splits[split])

    def batch(self, split: str, indices: Tensor) -> Tensor:
        return self.splits[split][indices]


def _context(run_dir: Path, *, teacher: bool = True, seed: int = 0, data: Any = None) -> StageContext:
    if teacher and not (run_dir / "teacher").exists():
        torch.manual_seed(0)
        mae = MAE(image_size=8, patch_size=2, hidden_size=8, num_layers=1, num_heads=1, decoder_hidden_size=8)
        save_teacher(mae, run_dir / "teacher")
        (run_dir / "teacher" / DONE_MARKER).write_text("{}")
    earlier = {"teacher": ("features",)} if teacher else {}
    return StageContext(run_dir, "latents", seed, Ramps() if data is None else data, {}, earlier)


def test_a_teachers_features_become_latents(tmp_path: Path) -> None:
    context = _context(tmp_path)
    figures = Latents(num_clusters=5).run(context)
    info = load_latents_info(context.dir)
    assert info["num_clusters"] == 5
    assert (info["pooled"], info["source"], info["center"]) == (True, "teacher", "position")
    assert info["num_patches"] == 16
    # Each patch was encoded with its ancestors, and belongs to the centroid nearest to its centred feature.
    teacher = load_teacher(tmp_path / "teacher")
    visible = ancestor_mask(torch.tensor(info["parents"]))
    features = {
        s: teacher.features(context.data.batch(s, torch.arange(context.data.num_examples(s))), visible) for s in SPLITS
    }
    centroids = torch.from_numpy(np.load(context.dir / "centroids.npy"))
    assert centroids.shape == (5, 8)
    for split in SPLITS:
        stored = FeatureStore(context.dir / f"features_{split}.npy").read(0, 99)
        torch.testing.assert_close(stored, features[split], atol=2e-3, rtol=1e-3)
        mean = FeatureStore(context.dir / "features_train.npy").read(0, 99).mean(0)
        expected = assign((stored - mean).flatten(0, 1), centroids).view(-1, 16)
        labels = load_assignments(context.dir, split)
        assert labels.dtype == torch.int64
        assert (labels == expected).float().mean() > 0.99
    counts = load_assignments(context.dir, "train").flatten().bincount(minlength=5)
    assert counts.min() >= 1
    assert figures["num_clusters"] == 5
    assert figures["smallest_cluster_share"] == pytest.approx(counts.min().item() / counts.sum().item())
    assert 1 < figures["cluster_perplexity"] <= 5
    assert sorted(path.name for path in context.dir.iterdir()) == sorted(
        ["context.json", "centroids.json", "centroids.npy", "map.safetensors", "latents.json", "patches.safetensors"]
        + [f"assignments_{split}.npy" for split in SPLITS]
        + [f"features_{split}.{ending}" for split in SPLITS for ending in ("npy", "json")]
    )


def _vqvae_context(run_dir: Path, codebook_size: int = 24) -> StageContext:
    """A run whose teacher is a VQ-VAE that has not learned, but has placed its codes among features."""
    context = _context(run_dir, teacher=False)
    torch.manual_seed(0)
    sizes = {"channels": 8, "num_features": 6, "num_components": 1, "prior_hidden_size": 8, "prior_num_layers": 1}
    vqvae = VQVAE(8, 2, codebook_size=codebook_size, **sizes)
    images = context.data.splits["train"]
    vqvae.codebook.update(vqvae.features(images), vqvae.codes(images), torch.Generator().manual_seed(0))
    vqvae.codebook.codes[3] = 1e3  # a code that no patch has
    save_teacher(vqvae, run_dir / "teacher")
    (run_dir / "teacher" / DONE_MARKER).write_text("{}")
    return replace(context, earlier={"teacher": ("features",)})


def test_a_teacher_of_whole_images_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = _vqvae_context(tmp_path)
    counted: list[int] = []
    features = VQVAE.features
    monkeypatch.setattr(VQVAE, "features", lambda self, x, *rest: counted.append(len(x)) or features(self, x, *rest))
    Latents(num_clusters=5).run(context)
    assert sum(counted) == 40 + 9 + 7 + 3  # one image per file tells the shape
    info = load_latents_info(context.dir)
    # Its features mean the same at all positions, which are not told apart by their means.
    assert (info["context"], info["parents"], info["center"], info["num_clusters"]) == ("none", None, "none", 5)
    teacher = load_teacher(tmp_path / "teacher")
    stored = FeatureStore(context.dir / "features_val.npy").read(0, 99)
    torch.testing.assert_close(stored, teacher.features(context.data.splits["val"]), atol=2e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="a VQVAE encodes whole images"):
        Latents(num_clusters=5, context="tree").run(context)


@pytest.mark.parametrize("num_clusters", [None, 24])
def test_a_teachers_own_codes_may_be_the_latents(tmp_path: Path, num_clusters: int | None) -> None:
    context = _vqvae_context(tmp_path)
    figures = Latents(method="codes", num_clusters=num_clusters).run(context)
    teacher = load_teacher(tmp_path / "teacher")
    used = teacher.codes(context.data.splits["train"]).unique()
    assert 3 not in used
    centroids = torch.from_numpy(np.load(context.dir / "centroids.npy"))
    assert torch.equal(centroids, teacher.codebook.codes[used])
    info = load_latents_info(context.dir)
    assert info["num_clusters"] == figures["num_clusters"] == len(used) < 24
    assert (info["method"], info["center"]) == ("codes", "none")
    for split in SPLITS:
        codes, labels = teacher.codes(context.data.splits[split]), load_assignments(context.dir, split)
        known = torch.isin(codes, used)
        assert known.float().mean() > 0.9
        # Features are kept in half precision, so that a patch between two codes may change sides.
        assert (used[labels] == codes)[known].float().mean() > 0.99
    assert load_assignments(context.dir, "train").unique().tolist() == list(range(len(used)))


def test_codes_need_a_codebook_of_that_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no teacher with codes"):
        Latents(method="codes").run(_context(tmp_path / "mae"))
    with pytest.raises(ValueError, match="no teacher with codes"):
        Latents(method="codes").run(_context(tmp_path / "pixels", teacher=False))
    context = _vqvae_context(tmp_path / "vqvae")
    with pytest.raises(ValueError, match="num_clusters: got 5, but the teacher's codebook has 24 codes"):
        Latents(method="codes", num_clusters=5).run(context)
    for settings in (
        {"pooled": False},
        {"center": "position"},
        {"pca": 3},
        {"whiten": True},
        {"normalize": True},
        {"value_share": 0.1},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}: got .* with method codes"):
            Latents(method="codes", **settings).run(context)


def test_without_a_teacher_values_are_clustered(tmp_path: Path) -> None:
    context = _context(tmp_path, teacher=False)
    Latents(num_clusters=6).run(context)
    info = load_latents_info(context.dir)
    assert (info["source"], info["center"], info["parents"]) == ("values", "none", None)
    centroids = torch.from_numpy(np.load(context.dir / "centroids.npy"))
    patches = patchify(context.data.splits["val"], 2).float()
    assert torch.equal(load_assignments(context.dir, "val").flatten(), assign(patches.flatten(0, 1), centroids))
    assert not list(context.dir.glob("features_*"))


def test_pixels_are_clustered_beside_features(tmp_path: Path) -> None:
    context = _vqvae_context(tmp_path)
    Latents(num_clusters=6, value_share=0.3).run(context)
    info = load_latents_info(context.dir)
    features = FeatureStore(context.dir / "features_train.npy").read(0, 99).double()
    pixels = patchify(context.data.splits["train"], 2).double()
    assert torch.equal(features[..., -pixels.shape[2] :], pixels)  # whole levels, in half precision too
    deviation = features - features.flatten(0, 1).mean(0)
    size = info["num_features"] - pixels.shape[2]
    parts = [part / part.square().sum(2).mean().sqrt() for part in (deviation[..., :size], deviation[..., size:])]
    points = torch.cat([0.7**0.5 * parts[0], 0.3**0.5 * parts[1]], 2)
    centroids = torch.from_numpy(np.load(context.dir / "centroids.npy")).double()
    distance = (points[:, :, None] - centroids).square().sum(3)
    assert torch.equal(load_assignments(context.dir, "train"), distance.argmin(2))
    assert info["value_share"] == 0.3
    (context.dir / DONE_MARKER).write_text("{}")
    grown_by = PatchFeatures.of(replace(context, earlier={context.dir.name: ("latents",)}))
    torch.testing.assert_close(grown_by.gather(torch.arange(16)).double(), points[0], atol=1e-4, rtol=1e-4)


def test_pixels_are_a_share_beside_features_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"value_share: got 0.3, expected 0: without a teacher"):
        Latents(num_clusters=6, value_share=0.3).run(_context(tmp_path, teacher=False))
    with pytest.raises(ValueError, match=r"value_share: got 1.0, expected from 0 to less than 1"):
        Latents(num_clusters=6, value_share=1.0)


@pytest.mark.parametrize("teacher", [False, True])
def test_positions_may_have_clusters_of_their_own(tmp_path: Path, teacher: bool) -> None:
    context = _context(tmp_path, teacher=teacher)
    settings = {"num_clusters": 4, "pooled": False, "context": "none", "pca": 3, "whiten": True}
    Latents(**settings).run(context)
    assert np.load(context.dir / "centroids.npy").shape == (16, 4, 3)
    labels = load_assignments(context.dir, "train")
    assert all(labels[:, p].bincount(minlength=4).min() >= 1 for p in range(16))
    assert load_latents_info(context.dir)["parents"] is None


@pytest.mark.parametrize("pooled", [False, True])
def test_clusters_of_directions(tmp_path: Path, pooled: bool) -> None:
    context = _context(tmp_path)
    Latents(num_clusters=4, pooled=pooled, context="none", normalize=True).run(context)
    features = FeatureStore(context.dir / "features_val.npy").read(0, 99).double()
    mean = FeatureStore(context.dir / "features_train.npy").read(0, 99).double().mean(0) if pooled else 0.0
    directions = torch.nn.functional.normalize(features - mean, dim=2)
    centroids = torch.from_numpy(np.load(context.dir / "centroids.npy")).double()
    distance = (directions[:, :, None] - centroids).square().sum(3)
    assert torch.equal(load_assignments(context.dir, "val"), distance.argmin(2))
    assert (centroids.norm(dim=-1) < 1.001).all()
    assert load_latents_info(context.dir)["normalize"]
    (context.dir / DONE_MARKER).write_text("{}")
    grown_by = PatchFeatures.of(replace(context, earlier={context.dir.name: ("latents",)}))
    torch.testing.assert_close(grown_by.gather(torch.arange(16)).norm(dim=1), torch.ones(16))


def test_the_seed_decides(tmp_path: Path) -> None:
    labels = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        context = _context(tmp_path / name, seed=seed)
        Latents(num_clusters=8, max_points=100, context_images=10).run(context)
        labels.append(load_assignments(context.dir, "train"))
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


class CountingMAE:
    """Counts how many images are encoded, by what is visible; is interrupted after so many, if `limit` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: Counter[str] = Counter()
        self.limit: int | None = None
        features = MAE.features

        def count(mae: MAE, images: Tensor, visible: Tensor | None = None) -> Tensor:
            self.images["alone" if visible is None else "ancestors"] += len(images)
            if self.limit is not None and self.images.total() >= self.limit:
                raise KeyboardInterrupt
            return features(mae, images, visible)

        monkeypatch.setattr(MAE, "features", count)


def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"num_clusters": 5, "batch_size": 4}
    Latents(**settings).run(_context(tmp_path / "whole"))
    expected = {split: load_assignments(tmp_path / "whole" / "latents", split) for split in SPLITS}
    context = _context(tmp_path / "parts")
    counting = CountingMAE(monkeypatch)
    counting.limit = 41 + 41 + 6  # the alone pass and the training images are done, validation is not
    with pytest.raises(KeyboardInterrupt):
        Latents(**settings).run(context)
    assert not (context.dir / "latents.json").exists()
    counting.images.clear()
    counting.limit = None
    Latents(**settings).run(context)
    # One image per file tells the shape.
    assert counting.images == {"ancestors": (9 + 1) + (7 + 1)}
    for split in SPLITS:
        assert torch.equal(load_assignments(context.dir, split), expected[split])


def test_complete_files_are_used_again_unless_what_they_come_from_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = _context(tmp_path)
    Latents(num_clusters=5).run(context)
    before = {path.name: path.stat().st_mtime_ns for path in context.dir.iterdir()}
    counting = CountingMAE(monkeypatch)
    Latents(num_clusters=5, batch_size=3).run(context)
    unchanged = {path.name for path in context.dir.iterdir() if path.stat().st_mtime_ns == before[path.name]}
    assert unchanged == before.keys() - {"latents.json"}
    (context.dir / "assignments_val.npy").unlink()
    Latents(num_clusters=5).run(context)
    assert load_assignments(context.dir, "val").shape == (9, 16)
    Latents(num_clusters=4).run(context)  # the same features, other clusters
    assert not counting.images
    assert load_assignments(context.dir, "test").max() < 4
    save_teacher(MAE(image_size=8, patch_size=2, hidden_size=12, num_layers=1, num_heads=1), tmp_path / "teacher")
    Latents(num_clusters=4).run(context)
    assert counting.images["ancestors"] == 40 + 9 + 7 + 3
    assert load_latents_info(context.dir)["num_features"] == 12
    counting.images.clear()
    Latents(num_clusters=4).run(_context(tmp_path, data=Ramps(seed=1)))  # other images
    assert counting.images["ancestors"] == 40 + 9 + 7 + 3


def _run_on_rank(rank: int, run_dir: Path) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{run_dir}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    figures = Latents(num_clusters=5).run(_context(run_dir))
    (run_dir / f"figures{rank}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    figures = Latents(num_clusters=5).run(_context(tmp_path / "one"))
    _context(tmp_path / "two")  # its teacher is there before the ranks start
    mp.start_processes(_run_on_rank, args=(tmp_path / "two",), nprocs=2, start_method="fork")
    for rank in range(2):
        assert json.loads((tmp_path / "two" / f"figures{rank}.json").read_text()) == figures
    for split in SPLITS:
        one, two = (load_assignments(tmp_path / name / "latents", split) for name in ("one", "two"))
        assert torch.equal(one, two)


def test_features_need_not_be_kept(tmp_path: Path) -> None:
    context = _context(tmp_path)
    Latents(num_clusters=3, keep_features=False).run(context)
    assert not list(context.dir.glob("features_*"))
    assert load_assignments(context.dir, "train").shape == (40, 16)


def test_a_split_may_be_empty(tmp_path: Path) -> None:
    context = _context(tmp_path, data=Ramps((40, 9, 0)))
    Latents(num_clusters=3).run(context)
    assert load_assignments(context.dir, "test").shape == (0, 16)


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    context = _context(tmp_path)
    for settings, message in (
        ({}, "num_clusters: got None"),
        ({"num_clusters": 0}, "num_clusters: got 0"),
        ({"num_clusters": 4, "method": "means"}, "method: got 'means'"),
        ({"num_clusters": 4, "context": "trees"}, "context: got 'trees'"),
        ({"num_clusters": 4, "center": "mean"}, "center: got 'mean'"),
        ({"num_clusters": 4, "pca": 9}, "pca: got 9"),
        ({"num_clusters": 10_000}, "all positions: num_clusters: got 10000"),
    ):
        with pytest.raises(ValueError, match=message):
            Latents(**settings).run(context)


def test_damaged_or_missing_results_are_refused(tmp_path: Path) -> None:
    context = _context(tmp_path, teacher=False)
    with pytest.raises(FileNotFoundError, match="run stage latents first"):
        load_assignments(context.dir, "train")
    Latents(num_clusters=3).run(context)
    with pytest.raises(ValueError, match="split: got 'valid'"):
        load_assignments(context.dir, "valid")
    path = context.dir / "assignments_val.npy"
    labels = np.load(path)
    np.save(path, labels[:-1])
    with pytest.raises(ValueError, match=r"expected int32 \(9, 16\)"):
        load_assignments(context.dir, "val")
    np.save(path, np.full_like(labels, 3))
    with pytest.raises(ValueError, match=r"expected 0\.\.2"):
        load_assignments(context.dir, "val")
    os.truncate(path, 50)
    with pytest.raises(ValueError, match="cannot be read"):
        load_assignments(context.dir, "val")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="again"):
        load_assignments(context.dir, "val")


def test_results_are_plain_files(tmp_path: Path) -> None:
    context = _context(tmp_path, teacher=False)
    Latents(num_clusters=3).run(context)
    assert np.load(context.dir / "assignments_train.npy", allow_pickle=False).dtype == np.int32
    assert json.loads((context.dir / "latents.json").read_text())["num_examples"] == {"train": 40, "val": 9, "test": 7}


@pytest.mark.parametrize(("size", "count"), [(10, 10), (10, 20), (100, 60), (10_000, 50), (5, 1)])
def test_samples_are_distinct_and_sorted(size: int, count: int) -> None:
    drawn = sample_distinct(size, count, torch.Generator().manual_seed(0))
    assert len(drawn) == min(size, count)
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert drawn.min() >= 0
    assert drawn.max() < size


def test_samples_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack([sample_distinct(20, 4, generator).bincount(minlength=20) for _ in range(4000)]).sum(0)
    assert (counts / 4000 - 0.2).abs().max() < 0.03
