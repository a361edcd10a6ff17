"""The stage that finds a latent variable for every patch of every image, or every word of a text."""

from functools import partial
from typing import ClassVar

from typing_extensions import override

from lvd_lightning.context import StageContext
from lvd_lightning.latents.assignments import load_latents_info
from lvd_lightning.latents.clusters import write_clusters
from lvd_lightning.latents.encode import encode_splits, remove_features
from lvd_lightning.latents.settings import LatentsSettings
from lvd_lightning.planning import PlanRequest, StagePlan
from lvd_lightning.ranks import on_first
from lvd_lightning.stages.plans.latents import latents_plan
from lvd_lightning.stages.stage import PlainStage

__all__ = ["Latents"]


class Latents(LatentsSettings, PlainStage):
    """Clusters the features of patches, or words, by K-means, or takes the codes that the teacher itself gives them.

    Features are a teacher's, or the pixels if no earlier stage leaves any. What an interrupted run left complete is
    used again if it was computed from the same teacher, data and settings. All ranks share the encoding and
    the clustering. Figures for the report: the number of clusters, the perplexity of their use, the smallest one's
    share of the training patches, and the mean squared distance of training patches from their centroids; of texts also
    the words encoded in a second, and the seconds that encoding and clustering took.

    Args: see `LatentsSettings`.

    Raises:
        ValueError: a setting is wrong, or there are fewer distinct patches than clusters.

    Example:
        >>> from lvd_lightning.stages import Latents
        >>> Latents(num_clusters=64).needs, Latents(method="codes").needs  # clusters may be those of pixels
        ((), ('features',))
    """

    leaves: ClassVar[tuple[str, ...]] = ("latents",)
    harmless: ClassVar[tuple[str, ...]] = ("batch_size", "keep_features", "cache_gb")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Codes are those of a teacher."""
        return ("features",) if self.method == "codes" else ()

    @override
    def plan(self, request: PlanRequest) -> StagePlan:
        return latents_plan(self, request)

    @override
    def run(self, context: StageContext) -> dict[str, float]:
        on_first(partial(context.dir.mkdir, parents=True, exist_ok=True))
        encoding = encode_splits(context, self)
        write_clusters(context, self, encoding)
        if not self.keep_features:
            on_first(partial(remove_features, context.dir))
        return {name: float(value) for name, value in load_latents_info(context.dir)["figures"].items()}
