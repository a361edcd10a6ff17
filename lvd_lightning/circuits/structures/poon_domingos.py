"""Poon-Domingos structures: all rectangles of an image, with all their cuts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lvd_lightning.circuits.checks import are_whole, check_counts, described
from lvd_lightning.circuits.distributions import Distribution
from lvd_lightning.circuits.graph import CircuitGraph
from lvd_lightning.circuits.structures.regions import ProductKind, region_circuit

__all__ = ["poon_domingos"]

Rectangle = tuple[int, int, int, int]  # top, left, bottom, right; the last two are outside


def poon_domingos(
    shape: tuple[int, int, int],
    *,
    delta: int | Sequence[int],
    num_units: int,
    leaf: Distribution | Sequence[Distribution],
    num_heads: int = 1,
    product: ProductKind = "hadamard",
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> CircuitGraph:
    """Rectangles of an image, each the mixture of all its cuts in two along the lines of a grid.

    Starting from the whole image, a rectangle is cut at every multiple of `delta` (counted from the image's corner)
    that lies inside of it, in rows and in columns. Rectangles that different cuts lead to are one region. Those without
    a line inside are leaves: products of one input node for each of their pixels and channels. There are
    O((H / delta)^2 (W / delta)^2) regions; choose delta accordingly.

    **Variables** are those of an image tensor of shape (C, H, W) that is flattened: channel c of the pixel in row h and
    column w is variable `(c * H + h) * W + w`, so `images.flatten(1)` of images (B, C, H, W) is what `log_prob` takes.

    Args:
        shape: (H, W, C), rows, columns and channels. All channels of a pixel stay together.
        delta: step of the grid in pixels. Of several steps, the first one with a line inside a rectangle decides,
            separately for rows and for columns: [8, 2] cuts at multiples of 8 first and goes on at multiples of 2.
        num_units: units of every region, except for the root.
        leaf: input distribution of every variable, or a list with one for each.
        num_heads: units of the root.
        product: "hadamard": unit k of a product multiplies unit k of both parts. "kronecker": a unit for every pair of
            units of the two parts, as published; such a circuit can be pruned but does not grow.
        generator: on the CPU.
        dtype: of all parameters, float32 or float64; the default type if not given.

    Returns:
        The graph; `latents[i]` is the product node of the i-th cut, smaller rectangles first. Cuts of one rectangle
        exclude each other, so posteriors are joint ones with reaching them.

    Raises:
        ValueError: a shape that is not three positive numbers, steps that are no positive numbers or all too large to
            cut the image, a count below 1, an unknown product, or a generator or type of another kind.

    References:
        Poon and Domingos, Sum-Product Networks: A New Deep Architecture, 2011, section 4; Peharz et al., Einsum
        Networks: Fast and Scalable Learning of Tractable Probabilistic Circuits, 2020 (arXiv 2004.06231), section 4.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> circuit = pc.Circuit(pc.poon_domingos((4, 4, 1), delta=2, num_units=3, leaf=pc.Categorical(16)))
        >>> images = torch.randint(16, (8, 1, 4, 4))
        >>> circuit.log_prob(images.flatten(1)).shape
        torch.Size([8, 1])
    """
    if not are_whole(shape) or len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"poon_domingos: shape: got {described(shape)}, expected (rows, columns, channels), each at least 1"
        )
    check_counts("poon_domingos", num_units=num_units)
    height, width, channels = shape
    steps = [delta] if isinstance(delta, int) else delta
    if not are_whole(steps):
        raise ValueError(f"poon_domingos: delta: got {described(delta)}, expected whole numbers, one or several")
    steps = list(steps)
    if not steps or min(steps) < 1 or min(steps) >= max(height, width, 2):
        raise ValueError(
            f"poon_domingos: delta must be at least 1 and one step smaller than a side of the image, "
            f"{height} x {width}; got {delta}"
        )

    def variables(region: Rectangle) -> list[int]:
        top, left, bottom, right = region
        return [
            (c * height + h) * width + w
            for c in range(channels)
            for h in range(top, bottom)
            for w in range(left, right)
        ]

    return region_circuit(
        "poon_domingos",
        _rectangles(height, width, steps),
        variables,
        num_sums=num_units,
        num_leaves=num_units,
        leaf=leaf,
        num_heads=num_heads,
        product=product,
        generator=generator,
        dtype=dtype,
    )


def _rectangles(height: int, width: int, steps: list[int]) -> dict[Rectangle, list[tuple[Rectangle, Rectangle]]]:
    """The cuts of every rectangle, smaller rectangles first."""
    todo: list[Rectangle] = [(0, 0, height, width)]
    cuts: dict[Rectangle, list[tuple[Rectangle, Rectangle]]] = {}
    while todo:
        region = todo.pop()
        if region in cuts:
            continue
        top, left, bottom, right = region
        rows = [((top, left, h, right), (h, left, bottom, right)) for h in _lines(top, bottom, steps)]
        columns = [((top, left, bottom, w), (top, w, bottom, right)) for w in _lines(left, right, steps)]
        cuts[region] = rows + columns
        todo.extend(part for parts in cuts[region] for part in parts)
    return {region: cuts[region] for region in sorted(cuts, key=lambda found: (_area(found), found))}


def _lines(low: int, high: int, steps: list[int]) -> list[int]:
    """Multiples of the first step that has some strictly between low and high."""
    for step in steps:
        found = list(range((low // step + 1) * step, high, step))
        if found:
            return found
    return []


def _area(region: Rectangle) -> int:
    top, left, bottom, right = region
    return (bottom - top) * (right - left)
