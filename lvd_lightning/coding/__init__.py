"""Lossless coding with a circuit: its conditional probabilities, computed to the last bit alike wherever that is done.

Encoder and decoder have to agree on every probability. Sums of floating point numbers depend on their order, and so on
threads, batch size and device. Here the terms of every sum are whole numbers below 2^53 altogether, which float64 holds
exactly in any order; what is no sum is one operation after the other, each rounded as IEEE 754 says. See `exact.py`.
"""
