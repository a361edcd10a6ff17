"""What arguments of the library have to be, said in one place: a wrong one is a ValueError that says what came.

Every message begins with `where`, the function and the argument, as in "hmm: leaf".
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lvd_lightning.circuits.distributions import Distribution

__all__ = [
    "are_whole",
    "as_indices",
    "as_tensor",
    "check_counts",
    "check_generator",
    "check_leaf",
    "check_number",
    "check_type",
    "described",
    "float_type",
    "is_whole",
    "plain_integers",
]

#: What to do where the one came and the other was expected.
_REMEDIES = {
    ("CircuitGraph", "Circuit"): "; compile it first: Circuit(graph)",
    ("Circuit", "CircuitGraph"): "; give its graph: circuit.to_graph()",
}


def described(value: Any) -> str:
    """A value as a message names it: never long, and a class is told from its instances."""
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if value is None or isinstance(value, (bool, int, float, str, list, tuple, torch.dtype, Distribution)):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:80]} ..."
    return type(value).__name__


def check_type(where: str, value: Any, kind: type) -> None:
    """Raise a ValueError unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        remedy = _REMEDIES.get((type(value).__name__, kind.__name__), "")
        name = "tensor" if kind is Tensor else kind.__name__
        raise ValueError(f"{where}: got {described(value)}, expected a {name}{remedy}")


def check_leaf(where: str, leaf: Any) -> None:
    """Raise a ValueError unless `leaf` is a distribution (and not its class)."""
    if not isinstance(leaf, Distribution):
        raise ValueError(f"{where}: got {described(leaf)}, expected a distribution such as Categorical(256)")


def check_generator(caller: str, generator: Any, device: torch.device | None = None) -> None:
    """Raise a ValueError unless this is None or a generator of the device, which is the CPU if not given."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"{caller}: generator: got {described(generator)}, expected a torch.Generator or None")
    kind = "cpu" if device is None else device.type
    if generator.device.type != kind:
        name = "the CPU" if kind == "cpu" else kind
        raise ValueError(f"{caller}: generator: got a generator of {generator.device}, expected a generator of {name}")


def check_counts(caller: str, **counts: Any) -> None:
    """Raise a ValueError that names the first argument that is no whole number of at least 1."""
    for name, count in counts.items():
        if not is_whole(count):
            raise ValueError(f"{caller}: {name}: got {described(count)}, expected a whole number of at least 1")
        if count < 1:
            raise ValueError(f"{caller}: {name}: got {count}, expected at least 1")


def float_type(caller: str, dtype: Any) -> torch.dtype:
    """The type that was asked for, the default type if none was.

    Raises:
        ValueError: it is none in which a circuit computes.
    """
    if dtype is None:
        return torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{caller}: dtype: got {described(dtype)}, expected torch.float32 or torch.float64")
    return dtype


def check_number(
    where: str, value: Any, low: float, high: float = math.inf, *, above_low: bool = False, meaning: str = ""
) -> None:
    """Raise a ValueError unless `value` is a number from `low` to `high`; NaN and infinity never are.

    above_low: `low` itself is not in the range. meaning: what the number is, for the message.
    """
    try:
        fits = (low < value if above_low else low <= value) and value <= high and value < math.inf
    except (TypeError, ValueError, RuntimeError):  # of text, arrays, tensors of several numbers
        fits = False
    if not fits or isinstance(value, bool):
        interval = f"{'(' if above_low else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}"
        raise ValueError(f"{where}: got {described(value)}, expected a number in {interval}{meaning}")


def are_whole(values: Any) -> bool:
    """Whether these are several whole numbers (of Python, or of arrays)."""
    return isinstance(values, Iterable) and not isinstance(values, str) and all(is_whole(value) for value in values)


def as_tensor(where: str, values: Any) -> Tensor:
    """Numbers from a tensor (itself), or copied from an array or from sequences.

    Raises:
        ValueError: these are no numbers, or not in rows of one length.
    """
    if isinstance(values, Tensor):
        return values
    try:
        return torch.as_tensor(values).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: got {described(values)}, expected a tensor of numbers") from error


def as_indices(where: str, values: Tensor | Sequence[int]) -> Tensor:
    """Whole numbers, from a tensor (whose device stays), an array or a sequence, as int64 (n,), n at least 1.

    Raises:
        ValueError: they are no whole numbers, or not of one dimension, or none at all.
    """
    found: Any = values
    is_row = isinstance(found, Iterable) and getattr(found, "ndim", 1) == 1
    if is_row and not isinstance(found, Tensor):
        found = list(found)
    if not is_row or not len(found) or not are_whole(found[:1] if isinstance(found, Tensor) else found):
        raise ValueError(f"{where}: got {described(values)}, expected a list or an integer tensor of shape (n,)")
    if isinstance(found, Tensor):
        return found.long()
    return torch.tensor([operator.index(value) for value in found], dtype=torch.int64)


def plain_integers(values: Any) -> Any:
    """Tensors of the unsigned types that PyTorch stores but hardly computes with, as int64; all else as it is."""
    if isinstance(values, Tensor) and values.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return values.to(torch.int64)
    return values


def is_whole(value: Any) -> bool:
    """Whether this is a whole number, of Python, of an array or in a tensor; False and True are not."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool) and not (isinstance(value, Tensor) and value.dtype == torch.bool)
