"""What happens between epochs: Lightning callbacks, named in configs as `class_path: callbacks.LogSamples`."""

from callbacks.log_pictures import LogSamples

__all__ = ["LogSamples"]
