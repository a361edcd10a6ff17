"""The circuits over whole examples that training from scratch begins with."""

from __future__ import annotations

import torch
from torch import Tensor

from lvd_lightning import circuits as pc
from lvd_lightning.context import StageContext
from lvd_lightning.models.leaves import LeafChoice
from lvd_lightning.models.structures import PartStructure, num_outcomes
from lvd_lightning.parts import Parts, example_leaf

__all__ = ["training_sample", "whole_graph", "whole_tree"]


def training_sample(context: StageContext, max_examples: int) -> Tensor:
    """Random training examples, (N, D), in the order of their numbers: a function of the seed and the stage."""
    count = context.data.num_examples("train")
    order = torch.randperm(count, generator=context.generator("sample"))[:max_examples]
    found: Tensor = context.data.batch("train", order.sort().values)
    return found.flatten(1)


def whole_tree(structure: PartStructure, sample: Tensor, parts: Parts) -> Tensor | None:
    """The Chow-Liu tree of a sample (N, D), parents (D,); None for a structure that needs none."""
    return pc.chow_liu_tree(sample, num_outcomes(parts.leaf), max_examples=None) if structure.needs_tree else None


def whole_graph(
    parts: Parts,
    structure: PartStructure,
    leaf: LeafChoice,
    num_units: int,
    *,
    parents: Tensor | None = None,
    sample: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> pc.CircuitGraph:
    """A graph over all variables of an example.

    Args:
        parts: how examples fall into parts, whose variables say which distributions there are.
        num_units: hidden states of an HCLT, units of every region of another structure.
        parents: the tree, if the structure needs one.
        sample: examples (N, D) that first parameters come from; None: they are random.
        generator: of structure and parameters.
    """
    shape, leaves = parts.example_shape, leaf.over(example_leaf(parts))
    if sample is None:
        return structure.graph(shape, num_units, leaf=leaves, parents=parents, generator=generator)
    return structure.graph_from_data(sample, shape, num_units, leaf=leaves, parents=parents, generator=generator)
