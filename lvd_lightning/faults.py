"""Where a network that is not finite any more broke first."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["first_fault"]


@torch.no_grad()
def first_fault(module: nn.Module, run: Callable[[], object]) -> str:
    """The first layer whose output has a NaN or an infinity while `run` runs the module, or what else is not finite.

    Args:
        module: whose layers are named as `named_modules` does.
        run: calls it on what it failed on.

    Returns:
        A phrase such as "levels.0.steps.1.coupling.last gives NaN"; parameters and gradients are looked at when all
        layers are well.

    Example:
        >>> layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = nn.init.constant_(layers[1].weight, float("nan"))
        >>> first_fault(layers, lambda: layers(torch.ones(1, 2)))
        '1 gives NaN'
    """
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            fault = _fault(_tensors(output)) if not found else ""
            if fault:
                found.append(f"{name} gives {fault}")

        return hook

    handles = [layer.register_forward_hook(look(name)) for name, layer in module.named_modules() if name]
    try:
        run()
    except (ValueError, RuntimeError) as error:  # a library may look at what it is given
        found.append(str(error))
    finally:
        for handle in handles:
            handle.remove()
    for kind, named in (
        ("parameter", module.named_parameters()),
        ("gradient of", ((name, p.grad) for name, p in module.named_parameters() if p.grad is not None)),
    ):
        found += [f"the {kind} {name} has {fault}" for name, tensor in named if (fault := _fault([tensor]))]
    return found[0] if found else "every layer gives finite numbers on this process; another one may not"


def _fault(tensors: Iterable[Tensor]) -> str:
    """ "NaN", "infinity" or nothing."""
    for tensor in tensors:
        if bool(tensor.isnan().any()):
            return "NaN"
        if bool(tensor.isinf().any()):
            return "infinity"
    return ""


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []
