"""Triton kernels of what is stored as tables: inputs of categories, and the M-steps of all tables.

Shapes: F folded nodes, K units, B batch, S categories; P parameter rows, X units, Y alternatives; V and E the row
spaces of `plan.py`. Everything is float32 but x, int64, and masks.
"""

import triton
import triton.language as tl

from lvd_lightning.circuits.engine.kernels.triton.layer_kernels import sum_of_rows

__all__ = ["average_flows", "backward_table", "look_up", "step_of_averages", "step_of_parameters"]

#: The smallest positive probability of a category, as in `distributions.tables`.
SMALLEST = tl.constexpr(1e-30)
#: The smallest positive number of single precision that keeps its precision.
LEAST = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def look_up(
    table,  # (P, K, S)
    parameter_rows,  # (F,)
    x,  # (F, B)
    observed,  # (F, B), or anything
    out,  # (F, K, B)
    num_units,
    size,  # S
    batch,
    MASKED: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """log2 p(x | unit); 0 where a variable is not observed."""
    tiles = tl.cdiv(num_units, UNITS)
    fold = (tl.program_id(0) // tiles).to(tl.int64)
    units = (tl.program_id(0) % tiles) * UNITS + tl.arange(0, UNITS)
    own = table + (tl.load(parameter_rows + fold) * num_units + units) * size
    for low in range(0, batch, COLUMNS):
        columns = low + tl.arange(0, COLUMNS)
        is_column = columns < batch
        inside = (units < num_units)[:, None] & is_column[None, :]
        x_B = tl.load(x + fold * batch + columns, mask=is_column, other=0)
        log = tl.log2(tl.load(own[:, None] + x_B[None, :], mask=inside, other=1.0))
        if MASKED:
            seen_B = tl.load(observed + fold * batch + columns, mask=is_column, other=0)
            log = tl.where((seen_B != 0)[None, :], log, 0.0)
        tl.store(out + (fold * num_units + units[:, None]) * batch + columns[None, :], log, mask=inside)


@triton.jit
def backward_table(
    gradient,  # (E, B)
    rows,
    first_row,  # (F,)
    num_rows,  # (F,)
    table,  # (P, K, S)
    parameter_rows,  # (F,)
    x,  # (F, B)
    observed,  # (F, B), or anything
    out,  # (P, K, S), 0 or what other nodes of the same parameters added
    num_units,
    size,  # S
    batch,
    MASKED: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add the gradients of probabilities: those of the log-likelihoods, over the probability."""
    tiles = tl.cdiv(num_units, UNITS)
    fold = (tl.program_id(0) // tiles).to(tl.int64)
    units = (tl.program_id(0) % tiles) * UNITS + tl.arange(0, UNITS)
    place = (tl.load(parameter_rows + fold) * num_units + units) * size
    own_rows, count = rows + tl.load(first_row + fold), tl.load(num_rows + fold)
    for low in range(0, batch, COLUMNS):
        columns = low + tl.arange(0, COLUMNS)
        is_column = columns < batch
        if MASKED:
            is_column &= tl.load(observed + fold * batch + columns, mask=is_column, other=0) != 0
        inside = (units < num_units)[:, None] & is_column[None, :]
        x_B = tl.load(x + fold * batch + columns, mask=is_column, other=0)
        at = place[:, None] + x_B[None, :]
        grad = sum_of_rows(gradient, own_rows, units, columns, count, num_units, batch)
        probability = tl.load(table + at, mask=inside, other=1.0)
        tl.atomic_add(out + at, grad / tl.maximum(probability, SMALLEST), mask=inside & (grad != 0), sem="relaxed")


@triton.jit
def step_of_parameters(
    theta,  # (P X, Y), changed in place
    grad,  # (P X, Y), of the loss: minus flow / probability
    live,  # (P X, Y), or anything
    num_rows,
    width,  # Y
    step,
    pseudocount,
    MASKED: tl.constexpr,
    FLOORED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The M-step of `CircuitEM`."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    live_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    for low in range(0, width, COLUMNS):
        columns = low + tl.arange(0, COLUMNS)
        inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
        at = rows[:, None] * width + columns[None, :]
        total_RC -= tl.load(theta + at, mask=inside, other=0.0) * tl.load(grad + at, mask=inside, other=0.0)
        if MASKED:
            live_RC += (tl.load(live + at, mask=inside, other=0) != 0).to(tl.float32)
    total = tl.sum(total_RC, 1)
    if MASKED:
        num_live = tl.sum(live_RC, 1)
    else:
        num_live = tl.full((ROWS,), 0.0, tl.float32) + width
    visited = total > 0
    rate = tl.where(visited, step / tl.maximum(total + pseudocount, LEAST), 0.0)
    keep = tl.where(visited, 1.0 - step, 1.0)
    extra = rate * pseudocount / tl.maximum(num_live, 1.0)
    for low in range(0, width, COLUMNS):
        columns = low + tl.arange(0, COLUMNS)
        inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
        at = rows[:, None] * width + columns[None, :]
        old = tl.load(theta + at, mask=inside, other=0.0)
        flow = -old * tl.load(grad + at, mask=inside, other=0.0)
        added = extra[:, None]
        if MASKED:
            added = tl.where(tl.load(live + at, mask=inside, other=0) != 0, added, 0.0)
        new = old * keep[:, None] + flow * rate[:, None] + added
        if FLOORED:
            new = tl.where((new > 0) & (new < SMALLEST), SMALLEST, new)
        tl.store(theta + at, new, mask=inside)


@triton.jit
def average_flows(
    flow,  # flat, changed in place
    theta,
    grad,
    size,
    momentum,
    forgotten,
    NUMBERS: tl.constexpr,
):
    """Moving averages of flows for `Anemone`; what is `forgotten` or less becomes 0."""
    at = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    inside = at < size
    found = tl.load(theta + at, mask=inside, other=0.0) * tl.load(grad + at, mask=inside, other=0.0)
    average = momentum * tl.load(flow + at, mask=inside, other=0.0) + (momentum - 1.0) * found
    tl.store(flow + at, tl.where(average > forgotten, average, 0.0), mask=inside)


@triton.jit
def step_of_averages(
    theta,  # (P X, Y), changed in place
    flow,  # (P X, Y), averages
    scale,  # (P X,), what the old parameters of a row weigh
    live,  # (P X, Y), or anything
    num_rows,
    width,  # Y
    step,
    pseudocount,
    MASKED: tl.constexpr,
    FLOORED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The M-step of `Anemone`."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    live_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    for low in range(0, width, COLUMNS):
        columns = low + tl.arange(0, COLUMNS)
        inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
        at = rows[:, None] * width + columns[None, :]
        total_RC += tl.load(flow + at, mask=inside, other=0.0)
        if MASKED:
            live_RC += (tl.load(live + at, mask=inside, other=0) != 0).to(tl.float32)
    total = tl.sum(total_RC, 1)
    if MASKED:
        num_live = tl.sum(live_RC, 1)
    else:
        num_live = tl.full((ROWS,), 0.0, tl.float32) + width
    old_weight = tl.load(scale + rows, mask=rows < num_rows, other=0.0)
    weight = tl.maximum(step * total + old_weight + pseudocount, LEAST)
    visited = total > 0
    keep = tl.where(visited, old_weight / weight, 1.0)
    rate = tl.where(visited, 1.0 / weight, 0.0)
    extra = rate * pseudocount / tl.maximum(num_live, 1.0)
    for low in range(0, width, COLUMNS):
        columns = low + tl.arange(0, COLUMNS)
        inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
        at = rows[:, None] * width + columns[None, :]
        found = tl.load(flow + at, mask=inside, other=0.0) * (step * rate)[:, None]
        added = extra[:, None]
        if MASKED:
            added = tl.where(tl.load(live + at, mask=inside, other=0) != 0, added, 0.0)
        new = tl.load(theta + at, mask=inside, other=0.0) * keep[:, None] + found + added
        if FLOORED:
            new = tl.where((new > 0) & (new < SMALLEST), SMALLEST, new)
        tl.store(theta + at, new, mask=inside)
