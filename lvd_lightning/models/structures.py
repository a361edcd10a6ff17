"""Which structure a circuit over examples or parts has: what a config says, turned into graphs.

Shapes: N examples, D variables, those of an image (C, H, W) one channel after another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lvd_lightning import circuits as pc
from lvd_lightning.checks import check_choice, check_counts, expect
from lvd_lightning.circuits.structures.regions import ProductKind

__all__ = ["Leaf", "PartStructure", "StructureName", "num_outcomes"]

StructureName = Literal["hclt", "rat_spn", "poon_domingos"]
#: The settings that a structure has.
SETTINGS: dict[str, tuple[str, ...]] = {
    "hclt": (),
    "rat_spn": ("depth", "num_repetitions", "product"),
    "poon_domingos": ("delta", "product"),
}
#: One input distribution for all variables, or one for each.
Leaf = pc.Distribution | Sequence[pc.Distribution]


@dataclass(frozen=True)
class PartStructure:
    """A kind of circuit over the variables of a part, or of a whole example, of any shape.

    name: "hclt", "rat_spn" or "poon_domingos".
    depth: of a RAT-SPN; None: down to single variables, whose inputs all repetitions share.
    num_repetitions: of a RAT-SPN.
    delta: step, or steps, of a Poon-Domingos structure in pixels; None: a quarter of the longer side, halved down to 1.
    product: "hadamard", or "kronecker", which does not grow.
    """

    name: StructureName = "hclt"
    depth: int | None = None
    num_repetitions: int = 4
    delta: int | list[int] | None = None
    product: ProductKind = "hadamard"

    @classmethod
    def of(cls, structure: str, settings: Mapping[str, Any] | None) -> PartStructure:
        """From a config.

        Raises:
            ValueError: an unknown structure, a setting that it has not, or a value that the setting cannot have.
        """
        check_choice(SETTINGS, structure=structure)
        given = dict(settings or {})
        unknown = [name for name in given if name not in SETTINGS[structure]]
        if unknown:
            known = ", ".join(SETTINGS[structure]) or "none"
            raise ValueError(
                f"structure_settings: {structure} has no setting {unknown[0]!r}; its settings are: {known}"
            )
        found = cls(structure, **given)  # type: ignore[arg-type]
        found._check()
        return found

    @property
    def needs_tree(self) -> bool:
        """Whether it is built on a tree over the variables."""
        return self.name == "hclt"

    @property
    def grows(self) -> bool:
        """Whether `pc.grow` works on it."""
        return self.product == "hadamard"

    def graph(
        self,
        shape: tuple[int, ...],
        num_units: int,
        num_heads: int = 1,
        *,
        leaf: Leaf,
        parents: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> pc.CircuitGraph:
        """A graph over variables of this shape with random parameters; its random structure is drawn as well.

        shape: (C, H, W) of an image or patch, (1,) of a token.
        num_units: latent states of an HCLT, units of every region of the others.
        leaf: of the variables.
        parents: the tree (D,), if it needs one.

        Raises:
            ValueError: a Poon-Domingos structure over anything but an image.
        """
        if self.name == "hclt":
            assert parents is not None
            return pc.hclt(parents, num_units, leaf, num_heads, generator=generator)
        if self.name == "rat_spn":
            size = math.prod(shape)
            return pc.rat_spn(
                size,
                depth=max(1, (size - 1).bit_length()) if self.depth is None else self.depth,
                num_repetitions=self.num_repetitions,
                num_sums=num_units,
                num_leaves=num_units,
                leaf=leaf,
                num_heads=num_heads,
                product=self.product,
                generator=generator,
            )
        if len(shape) != 3:
            raise ValueError(f"structure: poon_domingos cuts images of (C, H, W), but parts have the shape {shape}")
        channels, height, width = shape
        return pc.poon_domingos(
            (height, width, channels),
            delta=_halves(max(height, width)) if self.delta is None else self.delta,
            num_units=num_units,
            leaf=leaf,
            num_heads=num_heads,
            product=self.product,
            generator=generator,
        )

    def graph_from_data(
        self,
        x: Tensor,
        shape: tuple[int, ...],
        num_units: int,
        num_heads: int = 1,
        *,
        leaf: Leaf,
        head: Tensor | None = None,
        parents: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> pc.CircuitGraph:
        """A graph whose first parameters are those of `hclt_from_data` or `regions_from_data`; x: (N, D).

        head: int (N,), the head of every example, if there are several.
        """
        if self.name == "hclt":
            assert parents is not None
            return pc.hclt_from_data(x, parents, num_units, leaf, num_heads=num_heads, head=head, generator=generator)
        graph = self.graph(shape, num_units, num_heads, leaf=leaf, generator=generator)
        return pc.regions_from_data(graph, x, head=head, generator=generator)

    def num_parameters(
        self, shape: tuple[int, ...], *, leaf: Leaf, generator: torch.Generator | None = None
    ) -> Counter[int]:
        """Free parameters as a polynomial in the number of units, for one head: coefficients by their powers.

        generator: in the state from which the structure will be drawn.
        """
        tree = torch.arange(-1, math.prod(shape) - 1)  # any tree has as many
        graph = self.graph(shape, 2, leaf=leaf, parents=tree, generator=generator)
        power = [node.num_units.bit_length() - 1 for node in graph.nodes]  # of 1, 2 and 4 units
        out: Counter[int] = Counter()
        for index, node in enumerate(graph.nodes):
            if node.distribution is not None:
                out[power[index]] += node.distribution.num_free
            elif node.kind == "sum":
                out.update(power[index] + power[child] for child in node.children)
                out[power[index]] -= 1
        return out

    def _check(self) -> None:
        counts = {"depth": self.depth, "num_repetitions": self.num_repetitions}
        check_counts(**{f"structure_settings.{name}": value for name, value in counts.items()})
        steps = [] if self.delta is None else self.delta if isinstance(self.delta, list) else [self.delta]
        is_delta = self.delta != [] and all(isinstance(step, int) and step >= 1 for step in steps)
        expect(is_delta, "structure_settings.delta", self.delta, "pixels, or a list of them")
        check_choice(get_args(ProductKind), **{"structure_settings.product": self.product})


def _halves(side: int) -> list[int]:
    """A quarter of the side, and halves of it down to 1."""
    steps = [max(1, side // 4)]
    while steps[-1] > 1:
        steps.append(steps[-1] // 2)
    return steps


def num_outcomes(leaf: Leaf) -> int | None:
    """How many values the variables have, of those that have the most; None if one of them is continuous."""
    leaves = [leaf] if isinstance(leaf, pc.Distribution) else leaf
    numbers = [found.num_outcomes for found in leaves]
    return None if None in numbers else max(number for number in numbers if number is not None)
