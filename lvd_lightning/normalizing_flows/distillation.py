"""What a flow of few steps learns of one with more: partners among the steps, what is inherited, distances.

Shapes: B examples, K steps of the teacher, J of the student.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lvd_lightning.checks import check_counts
from lvd_lightning.normalizing_flows.flow_pass import FlowPass, draw_latents
from lvd_lightning.normalizing_flows.glow import Glow
from lvd_lightning.normalizing_flows.tabular import TabularFlow

__all__ = [
    "hidden_distance",
    "inherit_permutations",
    "inherit_weights",
    "inherited_orders",
    "latent_distance",
    "partners",
    "synthesis_distance",
]

Map = Glow | TabularFlow


def partners(num_teacher: int, num_student: int) -> list[int]:
    """The step of the teacher (from 0) that each step of the student has as its partner: evenly spread, the last first.

    Raises:
        ValueError: a student of more steps than its teacher.

    Example:
        >>> from lvd_lightning.normalizing_flows.distillation import partners
        >>> partners(5, 3), partners(32, 8), partners(4, 1)
        ([0, 2, 4], [0, 4, 9, 13, 18, 22, 27, 31], [3])
    """
    check_counts(num_teacher=num_teacher, num_student=num_student)
    if num_student > num_teacher:
        raise ValueError(
            f"num_steps: got {num_student} for a student of a flow of {num_teacher} steps, expected as many at most"
        )
    if num_student == 1:
        return [num_teacher - 1]
    return [round(step * (num_teacher - 1) / (num_student - 1)) for step in range(num_student)]


@torch.no_grad()
def inherit_permutations(student: Glow, teacher: Glow) -> None:
    """Give the student's convolutions the permutations of the teacher's, multiplied from partner to partner.

    They are copied: the teacher stays as it is.

    References:
        Walton et al., Distilling Normalizing Flows, 2025 (arXiv 2506.21003).
    """
    for level in range(len(student.levels)):
        theirs, ours = teacher.level_steps(level), student.level_steps(level)
        last = [-1, *partners(len(theirs), len(ours))]
        for step, (before, partner) in zip(ours, pairwise(last), strict=True):
            product = torch.arange(len(step.convolution.permutation), device=step.convolution.permutation.device)
            for number in range(before + 1, partner + 1):
                product = product[theirs[number].convolution.permutation.to(product.device)]
            step.convolution.permutation.copy_(product)


def inherited_orders(teacher: TabularFlow, num_steps: int) -> list[list[int]]:
    """The orders of a student's steps: those of their partners.

    An order here is the product of all permutations up to its step, so this is the product between partners.
    """
    orders: list[list[int]] = teacher.orders[partners(len(teacher.steps), num_steps)].tolist()
    return orders


@torch.no_grad()
def inherit_weights(student: Map, teacher: Map) -> None:
    """Let the student begin with the parameters of its partners, copied; splits and scales of data included.

    What a convolution permutes, and the order of a tabular step, are not among them.

    Raises:
        ValueError: sizes differ in something else than the number of steps.
    """
    theirs, ours = teacher.state_dict(), student.state_dict()
    if isinstance(student, Glow) and isinstance(teacher, Glow):
        lengths = [
            (f"levels.{level}.steps", len(teacher.level_steps(level)), len(student.level_steps(level)))
            for level in range(len(student.levels))
        ]
    else:
        lengths = [("steps", len(teacher.steps), len(student.steps))]  # type: ignore[arg-type]
    renamed = {
        f"{name}.{step}.": f"{name}.{partner}."
        for name, num_teacher, num_student in lengths
        for step, partner in enumerate(partners(num_teacher, num_student))
    }
    for name, tensor in ours.items():
        if name.endswith((".permutation", ".mask", ".order")) or name == "orders":
            continue
        prefix = next((own for own in renamed if name.startswith(own)), "")
        source = renamed.get(prefix, "") + name.removeprefix(prefix)
        if source not in theirs or theirs[source].shape != tensor.shape:
            found = tuple(theirs[source].shape) if source in theirs else "none"
            raise ValueError(
                f"inherit_weights: {name} has shape {tuple(tensor.shape)} and the teacher's {source} {found}: give the "
                "student the teacher's hidden_size, or set inherit_weights: false"
            )
        tensor.copy_(theirs[source])


def latent_distance(student: FlowPass, teacher: FlowPass) -> Tensor:
    """The mean squared difference of the latents, over examples and dimensions; a number."""
    return _mean_square(student.latents, teacher.latents)


def hidden_distance(student: FlowPass, teacher: FlowPass) -> Tensor:
    """The mean squared difference of what both hold on the way; a number.

    Of Glow at every squeeze, where there are as many; of tables after every step of the student and its partner's.
    """
    theirs = [teacher.hidden[number] for number in partners(len(teacher.hidden), len(student.hidden))]
    return _mean_square(student.hidden, theirs)


def synthesis_distance(
    student: Map,
    teacher: Map,
    count: int,
    temperature: float,
    of_features: bool,
    like: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """How far the examples are that both make of the same latents; a number.

    Args:
        student, teacher: of the same latents; gradients are the student's.
        count: latents.
        temperature: their standard deviation.
        of_features: the mean squared difference of what the teacher holds on the way from the examples to its latents,
            instead of the mean absolute difference of the examples, in standard deviations of the data for tables.
        like: says the type and the place of numbers.
        generator: of the latents.
    """
    z = draw_latents(student.latent_shapes, count, temperature, like, generator)
    made = student.decode(z)
    with torch.no_grad():
        wanted = teacher.decode(z)
    if not of_features:
        return ((made - wanted) / teacher.data_scale).abs().mean()
    with torch.no_grad():
        hidden = teacher.encode(wanted).hidden
    return _mean_square(teacher.encode(made).hidden, hidden)


def _mean_square(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Over all numbers of all parts."""
    sums = torch.stack([(our - their).square().sum() for our, their in zip(ours, theirs, strict=True)])
    return sums.sum() / sum(our.numel() for our in ours)
