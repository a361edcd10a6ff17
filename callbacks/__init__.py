"""What happens between epochs: Lightning callbacks, named in configs as `class_path: callbacks.GrowClusters`."""

from callbacks.grow_clusters import GrowClusters
from callbacks.log_growth import LogGrowth
from callbacks.log_pictures import LogSamples
from callbacks.prune import Prune
from callbacks.reassign_clusters import ReassignClusters

__all__ = ["GrowClusters", "LogGrowth", "LogSamples", "Prune", "ReassignClusters"]
