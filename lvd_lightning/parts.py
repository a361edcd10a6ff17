"""How an example falls into the parts that have a latent variable each: patches, tokens, columns of a table.

Shapes: B examples, P parts, D variables of a part, C channels, H x W pixels, p patch side, T tokens, V words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lvd_lightning.checks import check_counts, expect
from lvd_lightning.circuits.distributions import Categorical, Distribution, Gaussian
from lvd_lightning.color import patchify, unpatchify

__all__ = [
    "Columns",
    "ImagePatches",
    "Parts",
    "Tokens",
    "WholeExample",
    "describe_parts",
    "example_leaf",
    "parts_from",
    "register_parts",
    "variable_type",
]


@runtime_checkable
class Parts(Protocol):
    """How examples fall into parts; owned by the datamodule.

    num_parts: P. shape: of one part, (C, p, p) for a patch, (1,) for a token; D is its product.
    example_shape: of one example.
    leaf: the distribution of a part's variables, or a sequence with one for each of the D variables.
    arguments: the constructor's, plain values all, so that a saved circuit can say what it is a circuit of.
    """

    @property
    def num_parts(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def example_shape(self) -> tuple[int, ...]: ...
    @property
    def leaf(self) -> Distribution | Sequence[Distribution]: ...
    @property
    def arguments(self) -> dict[str, Any]: ...

    def split(self, x: Tensor) -> Tensor:
        """Examples (B, *example_shape), of any dtype, to their parts (B, P, D)."""

    def join(self, parts: Tensor) -> Tensor:
        """The inverse of `split`."""


class ImagePatches:
    """Square patches that tile an image, row by row; inside a patch channel, then row, then column.

    Args:
        shape: of an image, (C, H, W).
        patch_size: side p of a patch, in pixels; it divides H and W.
        num_categories: values of a pixel, 0..n-1: one number, or one for each channel.

    Raises:
        ValueError: patches of this size do not tile the image, or the numbers of categories are not one per channel.

    Example:
        >>> patches = ImagePatches((1, 4, 6), patch_size=2, num_categories=17)
        >>> patches.num_parts, patches.shape, patches.leaf
        (6, (1, 2, 2), Categorical(num_categories=17))
        >>> image = torch.arange(24).view(1, 1, 4, 6)
        >>> patches.split(image)[0, 1].tolist()
        [2, 3, 8, 9]
        >>> bool((patches.join(patches.split(image)) == image).all())
        True
    """

    def __init__(self, shape: Sequence[int], patch_size: int, num_categories: int | Sequence[int] = 256) -> None:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape: got {tuple(shape)}, expected positive (channels, height, width)")
        channels, height, width = shape
        if patch_size < 1 or height % patch_size or width % patch_size:
            raise ValueError(
                f"patch_size: {patch_size} does not tile images of {height} x {width}; choose a divisor of both"
            )
        numbers = [num_categories] * channels if isinstance(num_categories, int) else list(num_categories)
        fits = len(numbers) == channels and min(numbers) >= 2
        expect(fits, "num_categories", num_categories, "2 or more, or one such for each channel")
        self.example_shape: tuple[int, ...] = (channels, height, width)
        self.patch_size = patch_size
        self.num_categories = tuple(numbers)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        _, height, width = self.example_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_parts(self) -> int:
        """Patches of an image."""
        return math.prod(self.grid)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, p, p)."""
        return self.example_shape[0], self.patch_size, self.patch_size

    @property
    def leaf(self) -> Distribution | list[Distribution]:
        """A categorical distribution over the values of every pixel's channel."""
        if len(set(self.num_categories)) == 1:
            return Categorical(self.num_categories[0])
        return [Categorical(number) for number in self.num_categories for _ in range(self.patch_size**2)]

    @property
    def arguments(self) -> dict[str, Any]:
        """Plain values that make the same patches."""
        return {
            "shape": list(self.example_shape),
            "patch_size": self.patch_size,
            "num_categories": list(self.num_categories),
        }

    def split(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), of any dtype, to patches (B, P, C p p).

        Raises:
            ValueError: images of another shape.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != self.example_shape:
            expected = ", ".join(map(str, self.example_shape))
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected images (batch, {expected})")
        return patchify(x, self.patch_size)

    def join(self, parts: Tensor) -> Tensor:
        """Patches (B, P, C p p) to images (B, C, H, W).

        Raises:
            ValueError: patches of another shape.
        """
        if parts.ndim != 3 or tuple(parts.shape[1:]) != (self.num_parts, math.prod(self.shape)):
            raise ValueError(
                f"parts: got shape {tuple(parts.shape)}, expected (batch, {self.num_parts}, {math.prod(self.shape)})"
            )
        return unpatchify(parts, self.patch_size, *self.example_shape[1:])


class Tokens:
    """The tokens of a text, or of a window of it: each is a part of one variable.

    Args:
        length: tokens of an example, T.
        vocabulary: how many tokens there are to choose from, V; a token is a number 0..V-1.

    Raises:
        ValueError: a length below 1, or fewer than 2 words.

    Example:
        >>> tokens = Tokens(4, vocabulary=10)
        >>> tokens.num_parts, tokens.shape, tokens.leaf
        (4, (1,), Categorical(num_categories=10))
        >>> tokens.split(torch.tensor([[3, 1, 4, 1]])).tolist()
        [[[3], [1], [4], [1]]]
    """

    shape: tuple[int, ...] = (1,)

    def __init__(self, length: int, vocabulary: int) -> None:
        check_counts(length=length, vocabulary=vocabulary)
        expect(vocabulary >= 2, "vocabulary", vocabulary, "2 words or more")
        self.num_parts = length
        self.vocabulary = vocabulary

    @property
    def example_shape(self) -> tuple[int, ...]:
        """(T,)."""
        return (self.num_parts,)

    @property
    def leaf(self) -> Distribution:
        """A categorical distribution over the words."""
        return Categorical(self.vocabulary)

    @property
    def arguments(self) -> dict[str, Any]:
        """Plain values that make the same parts."""
        return {"length": self.num_parts, "vocabulary": self.vocabulary}

    def split(self, x: Tensor) -> Tensor:
        """Windows (B, T), of any dtype, to tokens (B, T, 1).

        Raises:
            ValueError: windows of another length.
        """
        if x.ndim != 2 or x.shape[1] != self.num_parts:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected windows (batch, {self.num_parts})")
        return x[..., None]

    def join(self, parts: Tensor) -> Tensor:
        """Tokens (B, T, 1) to windows (B, T).

        Raises:
            ValueError: tokens of another shape.
        """
        if parts.ndim != 3 or tuple(parts.shape[1:]) != (self.num_parts, 1):
            raise ValueError(f"parts: got shape {tuple(parts.shape)}, expected (batch, {self.num_parts}, 1)")
        return parts[..., 0]


class Columns:
    """The real-valued columns of a row of a table: each is a part of one variable.

    Args:
        num_columns: D.

    Raises:
        ValueError: no column.

    Example:
        >>> Columns(3).num_parts, Columns(3).split(torch.zeros(5, 3)).shape
        (3, torch.Size([5, 3, 1]))
    """

    shape: tuple[int, ...] = (1,)

    def __init__(self, num_columns: int) -> None:
        check_counts(num_columns=num_columns)
        self.num_parts = num_columns

    @property
    def example_shape(self) -> tuple[int, ...]:
        """(D,)."""
        return (self.num_parts,)

    @property
    def leaf(self) -> Distribution:
        """A normal distribution."""
        return Gaussian()

    @property
    def arguments(self) -> dict[str, Any]:
        """Plain values that make the same parts."""
        return {"num_columns": self.num_parts}

    def split(self, x: Tensor) -> Tensor:
        """Rows (B, D), of any dtype, to columns (B, D, 1).

        Raises:
            ValueError: rows of another length.
        """
        if x.ndim != 2 or x.shape[1] != self.num_parts:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected rows (batch, {self.num_parts})")
        return x[..., None]

    def join(self, parts: Tensor) -> Tensor:
        """Columns (B, D, 1) to rows (B, D).

        Raises:
            ValueError: columns of another shape.
        """
        if parts.ndim != 3 or tuple(parts.shape[1:]) != (self.num_parts, 1):
            raise ValueError(f"parts: got shape {tuple(parts.shape)}, expected (batch, {self.num_parts}, 1)")
        return parts[..., 0]


class WholeExample:
    """One part: the whole example, flattened. A circuit over it needs no latent values.

    Args:
        parts: how the same examples fall into smaller parts, as `describe_parts` gives it.

    Example:
        >>> whole = WholeExample(describe_parts(ImagePatches((1, 2, 4), patch_size=2, num_categories=17)))
        >>> whole.num_parts, whole.shape, whole.split(torch.arange(8).view(1, 1, 2, 4)).tolist()
        (1, (1, 2, 4), [[[0, 1, 2, 3, 4, 5, 6, 7]]])
    """

    num_parts = 1

    def __init__(self, parts: Mapping[str, Any]) -> None:
        smaller = parts_from(parts)
        self.arguments: dict[str, Any] = {"parts": dict(parts)}
        self.example_shape: tuple[int, ...] = tuple(smaller.example_shape)
        self.shape = self.example_shape
        self.leaf = example_leaf(smaller)

    def split(self, x: Tensor) -> Tensor:
        """Examples (B, ...), of any dtype, to (B, 1, D).

        Raises:
            ValueError: examples of another shape.
        """
        if tuple(x.shape[1:]) != self.example_shape:
            expected = ", ".join(map(str, self.example_shape))
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected examples (batch, {expected})")
        return x.flatten(1)[:, None]

    def join(self, parts: Tensor) -> Tensor:
        """(B, 1, D) to examples (B, ...).

        Raises:
            ValueError: parts of another shape.
        """
        if parts.ndim != 3 or tuple(parts.shape[1:]) != (1, math.prod(self.shape)):
            raise ValueError(f"parts: got shape {tuple(parts.shape)}, expected (batch, 1, {math.prod(self.shape)})")
        return parts.view(len(parts), *self.example_shape)


_KNOWN: dict[str, type] = {
    "Columns": Columns,
    "ImagePatches": ImagePatches,
    "Tokens": Tokens,
    "WholeExample": WholeExample,
}


def register_parts(kind: type) -> type:
    """Let saved circuits name a class of parts; usable as a decorator.

    Files name classes from a list, so that loading one runs no code of its own.
    """
    _KNOWN[kind.__name__] = kind
    return kind


def describe_parts(parts: Parts) -> dict[str, Any]:
    """Plain values from which `parts_from` makes the same parts.

    Raises:
        ValueError: parts of a class that is not registered.
    """
    name = type(parts).__name__
    if _KNOWN.get(name) is not type(parts):
        raise ValueError(f"parts: {name} is not known to saved circuits; call register_parts({name}) first")
    return {"class": name, "arguments": parts.arguments}


def parts_from(description: Mapping[str, Any]) -> Parts:
    """The parts that `describe_parts` described.

    Raises:
        ValueError: a class that is not registered.
    """
    name = description["class"]
    if name not in _KNOWN:
        raise ValueError(f"parts: the class {name!r} is unknown, expected one of {', '.join(sorted(_KNOWN))}")
    parts: Parts = _KNOWN[name](**description["arguments"])
    return parts


def variable_type(parts: Parts) -> torch.dtype:
    """The smallest type that holds the values of all variables; the default float type if one is continuous."""
    leaves = [parts.leaf] if isinstance(parts.leaf, Distribution) else parts.leaf
    sizes = [leaf.num_outcomes for leaf in leaves]
    if None in sizes:
        return torch.get_default_dtype()
    largest = max(size for size in sizes if size is not None)
    return torch.uint8 if largest <= 256 else torch.int16 if largest <= 1 << 15 else torch.int32


def example_leaf(parts: Parts) -> Distribution | list[Distribution]:
    """The distribution of the variables of a whole example, flattened, or one for each: those of its parts."""
    if isinstance(parts.leaf, Distribution):
        return parts.leaf
    place_PD = torch.arange(len(parts.leaf)).expand(1, parts.num_parts, -1)
    return [parts.leaf[int(place)] for place in parts.join(place_PD).flatten()]
