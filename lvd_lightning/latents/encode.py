"""The features of all splits: each patch encoded together with its ancestors in a tree over the patches."""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvd_lightning.checks import expect
from lvd_lightning.files import read_json, write_json
from lvd_lightning.latents.context import ancestor_mask, context_tree, linear_cka
from lvd_lightning.latents.features import ComputedFeatures, FeatureStore, PartValues, PatchVectors, write_features
from lvd_lightning.latents.keys import key_of, stored_key
from lvd_lightning.latents.sampling import sample_distinct
from lvd_lightning.latents.settings import SPLITS, LatentsContext, LatentsSettings, float64_device
from lvd_lightning.parts import Tokens, describe_parts
from lvd_lightning.ranks import on_first, rank_and_size, wait

__all__ = ["Encoding", "encode_splits", "remove_features"]

_SECONDS_BETWEEN_LINES = 10.0


class Encoding(NamedTuple):
    """A vector for every patch of every split.

    vectors: by split; key: says what they were computed from; source: "teacher", or "values" of the parts themselves;
    parents: of the tree over patches whose ancestors a patch was encoded with, -1 at the root, or None.
    positional: whether the vectors tell positions; codebook: of a teacher whose codes are wanted, with shape (K, E).
    num_values: at the end of each vector that are the part's own and not a feature.
    clock: how long the teacher took, for its features of texts.
    """

    vectors: dict[str, PatchVectors]
    key: str
    source: str
    parents: list[int] | None
    positional: bool = False
    codebook: Tensor | None = None
    num_values: int = 0
    clock: "Clock | None" = None


@dataclass
class Clock:
    """What a teacher has encoded: parts, and the seconds that it took."""

    num_parts: int = 0
    seconds: float = 0.0

    def add(self, num_parts: int, seconds: float) -> None:
        self.num_parts, self.seconds = self.num_parts + num_parts, self.seconds + seconds


def encode_splits(context: LatentsContext, settings: LatentsSettings) -> Encoding:
    """The features of the experiment's teacher, or the values of parts if it has none; all ranks have to call."""
    teacher_dir = context.artefact("features")
    _check_value_share(context, settings, teacher_dir)
    data_keys = [data_key(context.data, split) for split in SPLITS]
    if teacher_dir is None:
        _codebook(None, settings)
        values: dict[str, PatchVectors] = {split: PartValues(context.data, split) for split in SPLITS}
        return Encoding(values, key_of("values", *data_keys), "values", None)
    # Imported here: without a teacher nobody waits for the library of transformers.
    from lvd_lightning.teachers import load_teacher
    from lvd_lightning.teachers.io import ARGUMENTS_FILE, WEIGHTS_FILE

    teacher: Any = load_teacher(teacher_dir).to(context.device)
    files = [(teacher_dir / name).read_bytes() for name in (ARGUMENTS_FILE, WEIGHTS_FILE)]
    teacher_key = key_of(*(hashlib.sha256(f).hexdigest() for f in files))
    num_values = math.prod(context.data.parts.shape) if settings.value_share else 0
    encoder = _Encoder(context, teacher, key_of(teacher_key, num_values) if num_values else teacher_key, settings)
    codebook = _codebook(teacher, settings)
    parents = encoder.context_parents() if _in_context(teacher, settings) else None
    visible = None if parents is None else ancestor_mask(torch.tensor(parents))
    vectors: dict[str, PatchVectors] = {}
    stored = encoder.fits_on_disk(visible)
    for split, split_key in zip(SPLITS, data_keys):
        if not stored:
            vectors[split] = encoder.computed(split, visible)
            continue
        images = torch.arange(context.data.num_examples(split))
        key = key_of(encoder.key, parents, split_key)
        vectors[split] = encoder.features(f"features_{split}.npy", split, images, visible, key)
    key = key_of(encoder.key, parents, *data_keys)
    clock = encoder.clock if isinstance(context.data.parts, Tokens) else None
    return Encoding(vectors, key, "teacher", parents, teacher.positional, codebook, num_values, clock)


def remove_features(folder: Path) -> None:
    """Delete the features of all splits, which a later run would compute again."""
    for split in SPLITS:
        _remove(folder / f"features_{split}.npy")


def _check_value_share(context: LatentsContext, settings: LatentsSettings, teacher_dir: Path | None) -> None:
    if not settings.value_share:
        return
    expect(
        teacher_dir is not None,
        "value_share",
        settings.value_share,
        "0: without a teacher all that is clustered is values",
    )
    is_text = isinstance(context.data.parts, Tokens)
    expect(not is_text, "value_share", settings.value_share, "0: the number of a word is not a quantity")


def _in_context(teacher: Any, settings: LatentsSettings) -> bool:
    """Whether patches are encoded together with their ancestors in a tree."""
    if settings.context == "tree" and not teacher.contextual:
        raise ValueError(
            f"context: got 'tree', but a {type(teacher).__name__} encodes whole images: leave it away or say none"
        )
    return bool(teacher.contextual) and settings.context != "none"


def _codebook(teacher: Any, settings: LatentsSettings) -> Tensor | None:
    """The teacher's codebook, if its codes are wanted."""
    if settings.method != "codes":
        return None
    if not hasattr(teacher, "codes"):
        raise ValueError("method: got 'codes', but there is no teacher with codes: train a VQVAE, or say kmeans")
    codebook: Tensor = teacher.codebook.codes.cpu()
    if settings.num_clusters not in (None, len(codebook)):
        raise ValueError(
            f"num_clusters: got {settings.num_clusters}, but the teacher's codebook has {len(codebook)} codes: "
            "with method codes say the same number, or null"
        )
    return codebook


@dataclass(frozen=True)
class _Encoder:
    """A teacher (see `lvd_lightning.teachers`) at work in the stage's folder. key: says which teacher it is."""

    context: LatentsContext
    teacher: Any
    key: str
    settings: LatentsSettings
    clock: Clock = field(default_factory=Clock)

    def fits_on_disk(self, visible: Tensor | None) -> bool:
        """Whether the features of all splits may be kept; says so if they may not."""
        if self.settings.cache_gb is None:
            return True
        data = self.context.data
        _, num_parts, num_features = self._encode("train", torch.zeros(1, dtype=torch.int64), visible).shape
        needed = 2 * num_parts * num_features * sum(data.num_examples(split) for split in SPLITS) / 1e9
        if needed > self.settings.cache_gb and rank_and_size()[0] == 0:
            print(
                f"latents: features would take {needed:.3g} GB, cache_gb allows {self.settings.cache_gb:.3g}: they are "
                "computed whenever they are read",
                flush=True,
            )
        return needed <= self.settings.cache_gb

    def computed(self, split: str, visible: Tensor | None) -> ComputedFeatures:
        """The features of a split, computed whenever they are read."""
        data = self.context.data

        def compute(images: Tensor) -> Tensor:
            return self._timed(lambda: self._encode(split, images, visible), len(images) * data.parts.num_parts)

        def compute_at(images: Tensor, positions: Tensor) -> Tensor:
            batch, device = data.batch(split, images), self.context.device
            at = partial(self.teacher.features_at, batch.to(device), positions.to(device))
            return self._timed(at, len(images))

        _, num_parts, num_features = self._encode(split, torch.zeros(1, dtype=torch.int64), visible).shape
        shape = (data.num_examples(split), num_parts, num_features)
        has_one = visible is None and hasattr(self.teacher, "features_at")
        return ComputedFeatures(shape, compute, compute_at if has_one else None, self.settings.batch_size)

    def _timed(self, compute: Callable[[], Tensor], num_parts: int) -> Tensor:
        begun = time.monotonic()
        found = compute().cpu()
        self.clock.add(num_parts, time.monotonic() - begun)
        return found

    def _encode(self, split: str, images: Tensor, visible: Tensor | None, alone: bool = False) -> Tensor:
        """Features (n, P, E) of images of a split, and the values of their parts if these are clustered too."""
        batch = self.context.data.batch(split, images).to(self.context.device)
        features: Tensor = self.teacher.features(batch, visible)
        if alone or not self.settings.value_share:
            return features
        return torch.cat([features, self.context.data.parts.split(batch).to(features)], dim=-1)

    def context_parents(self) -> list[int]:
        """First pass: some training images, each patch alone; parents of the tree over patches with like features."""
        data, path = self.context.data, self.context.dir / "context.json"
        num_images = data.num_examples("train")
        num_drawn = min(num_images, self.settings.context_images)
        drawn = sample_distinct(num_images, num_drawn, self.context.generator("context"))
        key = key_of(self.key, data_key(data, "train"), drawn.tolist())
        if stored_key(path) != key:
            alone = self.features("features_alone.npy", "train", drawn, None, key, alone=True)

            def learn() -> None:
                parents = context_tree(linear_cka(alone, float64_device(self.context.device)))
                write_json(path, {"key": key, "parents": parents.tolist()})

            on_first(learn)
        on_first(partial(_remove, self.context.dir / "features_alone.npy"))
        parents: list[int] = read_json(path)["parents"]
        return parents

    def features(
        self, name: str, split: str, images: Tensor, visible: Tensor | None, key: str, alone: bool = False
    ) -> FeatureStore:
        """The features of some images of a split, from disk if they are there; alone: without values of parts."""
        path = self.context.dir / name
        complete = FeatureStore.is_complete(path, key)
        wait()  # every rank looks before any writes, so that all decide alike
        if complete:
            return self._noted(FeatureStore(path))

        def compute(start: int, stop: int) -> Tensor:
            return self._encode(split, images[start:stop], visible, alone)

        _, num_patches, num_features = compute(0, 1).shape
        store = write_features(
            path,
            (len(images), num_patches, num_features),
            compute,
            key=key,
            chunk_size=self.settings.batch_size,
            progress=self._progress(path.stem) if rank_and_size()[0] == 0 else None,
        )
        return self._noted(store)

    def _noted(self, store: FeatureStore) -> FeatureStore:
        self.clock.add(store.shape[0] * store.shape[1], store.seconds or 0.0)
        return store

    def _progress(self, what: str) -> Callable[[int, int], None]:
        parts = self.context.data.parts
        if isinstance(parts, Tokens):
            return _progress_lines(what, "windows", parts.num_parts)
        return _progress_lines(what)


def data_key(data: Any, split: str) -> str:
    """Says which images features belong to: what the datamodule says of them, and the pixels of a few."""
    count = data.num_examples(split)
    few = torch.linspace(0, count - 1, min(count, 16)).long()
    values = data.batch(split, few).numpy().tobytes() if count else b""
    return key_of(split, count, describe_parts(data.parts), data.protocol, hashlib.sha256(values).hexdigest())


def _remove(path: Path) -> None:
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _progress_lines(what: str, examples: str = "images", words: int = 0) -> Callable[[int, int], None]:
    """Prints how far a computation is, every few seconds, for terminals that are files.

    examples: what is counted; words: of each, whose number in a second is told too.
    """
    start = last = time.monotonic()
    before: int | None = None  # what an earlier process had done

    def show(done: int, total: int) -> None:
        nonlocal last, before
        if before is None:
            before = done
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_LINES:
            last = now
            rate = f"  {words * (done - before) / (now - start):,.0f} words/s" if words else ""
            print(f"latents: {what} {done}/{total} {examples}  {now - start:.0f} s{rate}", flush=True)

    return show
