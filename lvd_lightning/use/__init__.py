"""What a trained circuit is for: every function here is a command of `train.py` by the same name."""

from lvd_lightning.lazy import lazy_names

__all__ = [
    "compress",
    "decompress",
    "explain",
    "export",
    "from_pretrained",
    "inpaint",
    "open_trained",
    "sample",
    "score",
]

# Imported when they are asked for: the command line answers `--help` without PyTorch.
__getattr__, _ = lazy_names(
    __name__,
    {
        "compress": "compressing",
        "decompress": "decompressing",
        "explain": "explaining",
        "export": "exporting",
        "from_pretrained": "trained",
        "inpaint": "inpainting",
        "open_trained": "trained",
        "sample": "sampling",
        "score": "scoring",
    },
)
