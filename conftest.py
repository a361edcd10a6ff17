"""Which modules pytest does not search for examples: those whose packages this machine lacks."""

from importlib.util import find_spec

# Triton's kernels are no Python that could run here.
collect_ignore = ["lvd_lightning/circuits/engine/kernels/triton"]
if find_spec("pyjuice") is None:
    collect_ignore.append("lvd_lightning/circuits/pyjuice.py")
