"""The engine room of circuits: plans, folded layers, passes, buffers and kernels; no door for users."""
