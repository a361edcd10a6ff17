"""What clustering takes: features on disk, and points in memory.

Shapes: N examples, P parts, E features, K clusters.
"""

from __future__ import annotations

import math

from lvd_lightning.latents.settings import LatentsSettings
from lvd_lightning.planning import PlanRequest, StagePlan

__all__ = ["latents_plan"]

_POINTS_PER_CLUSTER = 1024


def latents_plan(settings: LatentsSettings, request: PlanRequest) -> StagePlan:
    """The plan of `Latents`."""
    parts, features = request.data.parts, request.left.get("features") or {}
    num_train, num_all = request.num_examples("train"), request.num_examples()
    size = features.get("size") if features else math.prod(parts.shape)
    states = features.get("num_codes") if settings.method == "codes" else settings.num_clusters
    if settings.num_clusters is not None and states is not None:
        states = min(states, settings.num_clusters)
    notes = ["codes that no patch has are left out"] if settings.method == "codes" else []
    assigned = num_all * parts.num_parts * 4
    leaves = {"latents": None if states is None else {"num_states": states}}
    if size is None or states is None:
        notes.append("how many features there are is unknown")
        return StagePlan(files={"assignments": assigned}, leaves=leaves, notes=tuple(notes))
    files, sets = {"assignments": assigned}, 1 if settings.pooled else parts.num_parts
    on_disk = num_all * parts.num_parts * size * 2
    if features and settings.cache_gb is not None and on_disk > settings.cache_gb * 1e9:
        notes.append(f"features would take {on_disk / 1e9:.3g} GB, more than cache_gb: they are computed when read")
    elif features:
        files["features"] = on_disk
    clustered = settings.pca or size
    files["centroids.npy"] = sets * states * clustered * 4
    available = num_train * (parts.num_parts if settings.pooled else 1)
    points = min(available, settings.max_points or _POINTS_PER_CLUSTER * states)
    distances = points * states * clustered * settings.iterations * sets + assigned // 4 * states * clustered
    contextual = bool(features.get("contextual")) and settings.context != "none"
    if contextual:
        notes.append("each patch is encoded in its context: that work depends on the tree")
    encoding = features.get("operations") if features else 0.0
    known = encoding is not None and not contextual
    return StagePlan(
        memory={"points": points * clustered * 4, "distances": 2 * points * 4},
        sent_per_step=request.sent((states * clustered + states) * 8),
        steps_per_epoch=settings.iterations * sets,
        epochs=1,
        files=files,
        work=2.0 * distances + num_all * encoding if known and encoding is not None else None,
        work_is="floating point operations of the teacher, forward, and of distances",
        leaves=leaves,
        notes=(*notes, "steps are iterations of K-means, at most"),
    )
