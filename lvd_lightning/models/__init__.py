"""The circuit of an experiment in plain PyTorch: prior and conditionals, routing, evidence, priors over latents."""
