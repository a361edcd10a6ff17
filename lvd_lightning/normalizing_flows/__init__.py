"""Normalizing flows: invertible maps between data and independent normal latents, with exact densities.

Not to be taken for `lvd_lightning.circuits.flows`, whose flows are what EM counts. The maps know nothing of files,
stages or circuits: `teachers/image_flow.py` and `teachers/table_flow.py` make models of them.

Every map here has `encode(x)`, which returns a `FlowPass`, and `decode(latents)`, its inverse.
"""

from lvd_lightning.lazy import lazy_names

_HOMES = {
    "Dequantizer": "dequantize",
    "FlowPass": "flow_pass",
    "Glow": "glow",
    "TabularFlow": "tabular",
}

__all__ = ["Dequantizer", "FlowPass", "Glow", "TabularFlow"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
