"""Losses that look at samples: what a circuit learns of, beside likelihoods.

All of them take images (B, C, H, W) as floating point numbers in -1..1, through which gradients flow.
"""
