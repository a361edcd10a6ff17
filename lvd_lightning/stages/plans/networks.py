"""What training a network takes: its module is made, and two examples go through it once.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from lvd_lightning.context import DONE_MARKER
from lvd_lightning.files import write_json
from lvd_lightning.planning import ESTIMATE, PlanRequest, StagePlan
from lvd_lightning.teachers.io import ARGUMENTS_FILE, WEIGHTS_FILE, save_teacher

__all__ = ["WORK", "measured_pass", "network_plan", "teacher_left"]

WORK = "floating point operations of matrix products and convolutions, forward and backward"
#: Examples that go through the network to see what one keeps for the backward pass.
FEW = 2


def network_plan(
    request: PlanRequest,
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    *,
    files: Mapping[str, int],
    leaves: Mapping[str, Any],
    beside: int = 0,
    counted: int = 0,
    averaged: bool = False,
) -> StagePlan:
    """The plan of a stage that trains `module` by Adam under DDP.

    loss: of examples (B, ...), a number; it is called once, forward and backward.
    files: what it leaves, bytes by name; checkpoints are added.
    beside: bytes that a step sends besides gradients.
    counted: numbers that are learnt, but not by gradients.
    averaged: whether a moving average of the parameters is kept.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    factor = request.bytes_per_number / trained[0].element_size()
    learnt = int(sum(parameter.nbytes for parameter in trained) * factor)
    kept, operations = measured_pass(module, loss, request.data.batch("train", torch.arange(FEW)))
    copies = learnt if averaged else 0
    checkpoint = 3 * learnt + copies
    return StagePlan(
        parameters=sum(parameter.numel() for parameter in trained) + counted,
        memory={
            "parameters": learnt + copies,
            "gradients": learnt,
            "averages of Adam": 2 * learnt,
            f"activations ({ESTIMATE})": int(kept * factor * request.share / FEW),
        },
        epochs=request.epochs,
        steps_per_epoch=request.steps_per_epoch,
        sent_per_step=request.sent(learnt + beside),
        files={**files, "best.ckpt": checkpoint, "last.ckpt": checkpoint},
        work=operations / FEW * request.epochs * request.num_examples("train"),
        work_is=WORK,
        leaves=leaves,
    )


def measured_pass(module: nn.Module, loss: Callable[[Tensor], Tensor], examples: Tensor) -> tuple[int, float]:
    """Bytes, besides parameters, that a forward pass keeps for the backward pass, and the operations of both."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        found = loss(examples)
        for parameter in module.parameters():
            seen.pop(parameter.untyped_storage().data_ptr(), None)
        kept = sum(seen.values())
        found.backward()
    return kept, float(counter.get_total_flops())


def teacher_left(teacher: nn.Module, request: PlanRequest) -> tuple[dict[str, int], dict[str, Any]]:
    """A teacher is written into the folder of the plan: bytes of its files, and what later stages have to know of it.

    That is how many features a part has (`size`), whether each is encoded in the context of others (`contextual`), and
    the operations of encoding an example.
    """
    folder = request.context.dir
    save_teacher(teacher, folder)
    write_json(folder / DONE_MARKER, {})
    files = {path.name: path.stat().st_size for path in (folder / WEIGHTS_FILE, folder / ARGUMENTS_FILE)}
    mode = teacher.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found = teacher.eval().features(request.data.batch("train", torch.arange(FEW)))  # type: ignore[operator]
    teacher.train(mode)
    operations = counter.get_total_flops() / FEW
    contextual = bool(getattr(teacher, "contextual", False))
    return files, {"size": found.shape[-1], "contextual": contextual, "operations": operations}
