"""Progressive growing: prune circuits, reassign patches to heads, and give heads that explain theirs badly a copy.

Method of Liu, Liu, Van den Broeck and Liang, ICML 2023. Every function works on all circuits of a batch, each with its
own heads, tree and examples, and on several processes: each walks over its share of the training patches, sums are
taken over all, and every process comes to the same result.
"""

from lvd_lightning.growing.ancestry import HEADS_FILE, Ancestry, Head
from lvd_lightning.growing.clustering import first_heads, recluster
from lvd_lightning.growing.edits import grow_circuits, prune_circuits
from lvd_lightning.growing.examples import Examples
from lvd_lightning.growing.features import PatchFeatures
from lvd_lightning.growing.likelihood import best_heads, mean_log_probs
from lvd_lightning.growing.selection import select_heads
from lvd_lightning.growing.size import CircuitSize

__all__ = [
    "HEADS_FILE",
    "Ancestry",
    "CircuitSize",
    "Examples",
    "Head",
    "PatchFeatures",
    "best_heads",
    "first_heads",
    "grow_circuits",
    "mean_log_probs",
    "prune_circuits",
    "recluster",
    "select_heads",
]
