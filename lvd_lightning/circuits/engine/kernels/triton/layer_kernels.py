"""Triton kernels of sum and product layers: log-matmul-exp forward and backward.

Shapes: F folded nodes, H outer units, K inner units, B batch; V and E the row spaces of `plan.py`. Everything is
float32. Values are logarithms to base 2; a node's inner units are divided by the largest of them, its peak, before they
become linear. Rows to be added up come as in `rows.RowTable`.

A sum below `TINY` relative to the peak has lost precision. It is marked, and a kernel of its own (`mend_...`), which is
always launched and ends at once where nothing is marked, computes it in log space: the host is never asked. In the same
kernel the rare case would take the registers that the common one needs. For the backward pass such a sum is stored as
-1, and one without any support as infinity, so that a gradient divided by it is 0.
"""

# Triton reads annotations as objects: no `from __future__ import annotations` here.

import triton
import triton.language as tl

__all__ = [
    "backward_inner",
    "backward_weight",
    "mend_inner",
    "mend_sums",
    "mend_weight",
    "mix",
    "multiply",
    "pull",
    "sum_of_rows",
]

#: As in `layers.py`.
TINY = tl.constexpr(1e-30)
FLOOR = tl.constexpr(-1e30)


@triton.jit
def sum_of_rows(source, rows, units, columns, count, width, batch):
    """For each of `units` of a node the sum of its `count` rows of `source`, (units, columns); 0 outside."""
    inside = (units < width)[:, None] & (columns < batch)[None, :]
    row = tl.load(rows + units, mask=units < width, other=0).to(tl.int64)
    total = tl.load(source + row[:, None] * batch + columns[None, :], mask=inside, other=0.0)
    for slot in range(1, count):
        row = tl.load(rows + slot * width + units, mask=units < width, other=0).to(tl.int64)
        total += tl.load(source + row[:, None] * batch + columns[None, :], mask=inside, other=0.0)
    return total


@triton.jit
def _tf32(x):
    """Rounded to 10 bits of mantissa."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _add_product(total, a, b, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """total + a b. EMULATE: Triton's interpreter multiplies in float32 whatever it is told, so round before."""
    if EMULATE:
        if PRECISION == "bf16":
            total = tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32), total)
        elif PRECISION == "tf32":
            total = tl.dot(_tf32(a), _tf32(b), total)
        else:
            total = tl.dot(a, b, total)
    elif PRECISION == "bf16":
        total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def multiply(
    values,  # (V, B)
    rows,
    first_row,  # (F,)
    num_rows,  # (F,)
    out,  # (F, K, B)
    peak,  # (F, B)
    width,  # K
    batch,
    SCALED: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Products of factors: their logarithms, or with SCALED linear values divided by the peak, and the peak."""
    tiles = tl.cdiv(batch, COLUMNS)
    fold = (tl.program_id(0) // tiles).to(tl.int64)
    columns = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    own = rows + tl.load(first_row + fold)
    count = tl.load(num_rows + fold)
    largest = tl.full((COLUMNS,), FLOOR, tl.float32)
    for low in range(0, width, UNITS):
        units = low + tl.arange(0, UNITS)
        inside = (units < width)[:, None] & (columns < batch)[None, :]
        total = sum_of_rows(values, own, units, columns, count, width, batch)
        if SCALED:
            largest = tl.maximum(largest, tl.max(tl.where(inside, total, FLOOR), 0))
        else:
            tl.store(out + (fold * width + units[:, None]) * batch + columns[None, :], total, mask=inside)
    if SCALED:
        tl.store(peak + fold * batch + columns, largest, mask=columns < batch)
        for low in range(0, width, UNITS):
            units = low + tl.arange(0, UNITS)
            inside = (units < width)[:, None] & (columns < batch)[None, :]
            total = sum_of_rows(values, own, units, columns, count, width, batch)
            linear = tl.exp2(total - largest[None, :])
            tl.store(out + (fold * width + units[:, None]) * batch + columns[None, :], linear, mask=inside)


@triton.jit
def mix(
    inner,  # (F, K, B)
    peak,  # (F, B)
    weight,  # (P, H, K)
    parameter_rows,  # (F,)
    sums,  # (F, H, B)
    out,  # (F, H, B)
    lost,  # (programs,)
    num_outer,  # H
    num_inner,  # K
    batch,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
    OUTER: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Weighted sums of inner units: their logarithms and, with KEEP, linear values for the backward pass.

    A sum that got too small becomes NaN, for `mend_sums`; `lost` says whether a program had any.
    """
    tiles_b, tiles_h = tl.cdiv(batch, COLUMNS), tl.cdiv(num_outer, OUTER)
    columns = (tl.program_id(0) % tiles_b) * COLUMNS + tl.arange(0, COLUMNS)
    units = (tl.program_id(0) // tiles_b % tiles_h) * OUTER + tl.arange(0, OUTER)
    fold = (tl.program_id(0) // (tiles_b * tiles_h)).to(tl.int64)
    own_weight = weight + tl.load(parameter_rows + fold) * num_outer * num_inner
    own_inner = inner + fold * num_inner * batch
    is_unit, is_column = units < num_outer, columns < batch
    total = tl.zeros((OUTER, COLUMNS), tl.float32)
    for low in range(0, num_inner, DEPTH):
        below = low + tl.arange(0, DEPTH)
        is_below = below < num_inner
        weight_HK = tl.load(
            own_weight + units[:, None] * num_inner + below[None, :],
            mask=is_unit[:, None] & is_below[None, :],
            other=0.0,
        )
        inner_KB = tl.load(
            own_inner + below[:, None] * batch + columns[None, :],
            mask=is_below[:, None] & is_column[None, :],
            other=0.0,
        )
        total = _add_product(total, weight_HK, inner_KB, PRECISION, EMULATE)
    scale = tl.load(peak + fold * batch + columns, mask=is_column, other=FLOOR)
    inside = is_unit[:, None] & is_column[None, :]
    is_small = inside & (total < TINY)
    unsure = is_small & (scale > FLOOR)[None, :]
    place = (fold * num_outer + units[:, None]) * batch + columns[None, :]
    log = tl.log2(tl.where(is_small, 0.0, total)) + scale[None, :]
    tl.store(out + place, tl.where(unsure, float("nan"), log), mask=inside)
    if KEEP:
        mark = tl.where(unsure, -1.0, float("inf"))
        tl.store(sums + place, tl.where(is_small, mark, total), mask=inside)
    tl.store(lost + tl.program_id(0), tl.max(unsure.to(tl.int32)))


@triton.jit
def mend_sums(
    weight,  # (P, H, K)
    parameter_rows,  # (F,)
    values,  # (V, B)
    rows,
    first_row,  # (F,)
    num_rows,  # (F,)
    sums,  # (F, H, B)
    out,  # (F, H, B)
    lost,  # (programs,)
    num_outer,  # H
    num_inner,  # K
    batch,
    KEEP: tl.constexpr,
    OUTER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute what `mix` made NaN term by term in log space, each relative to the largest term so far."""
    if tl.load(lost + tl.program_id(0)) > 0:
        tiles_b, tiles_h = tl.cdiv(batch, COLUMNS), tl.cdiv(num_outer, OUTER)
        columns = (tl.program_id(0) % tiles_b) * COLUMNS + tl.arange(0, COLUMNS)
        units = (tl.program_id(0) // tiles_b % tiles_h) * OUTER + tl.arange(0, OUTER)
        fold = (tl.program_id(0) // (tiles_b * tiles_h)).to(tl.int64)
        own_weight = weight + tl.load(parameter_rows + fold) * num_outer * num_inner
        own_rows, count = rows + tl.load(first_row + fold), tl.load(num_rows + fold)
        largest = tl.full((OUTER, COLUMNS), -float("inf"), tl.float32)
        total = tl.zeros((OUTER, COLUMNS), tl.float32)
        for below in range(0, num_inner):
            one = below + tl.arange(0, 1)
            log_1B = sum_of_rows(values, own_rows, one, columns, count, num_inner, batch)
            weight_H = tl.load(own_weight + units * num_inner + below, mask=units < num_outer, other=0.0)
            term = tl.log2(weight_H)[:, None] + log_1B
            higher = tl.maximum(largest, term)
            base = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp2(largest - base) + tl.exp2(term - base)
            largest = higher
        log = tl.log2(total) + tl.where(largest == -float("inf"), 0.0, largest)
        inside = (units < num_outer)[:, None] & (columns < batch)[None, :]
        place = (fold * num_outer + units[:, None]) * batch + columns[None, :]
        found = tl.load(out + place, mask=inside, other=0.0)
        unsure = inside & (found != found)
        tl.store(out + place, log, mask=unsure)
        if KEEP:
            tl.store(sums + place, tl.where(log > -float("inf"), -1.0, float("inf")), mask=unsure)


@triton.jit
def pull(
    gradient,  # (E, B)
    rows,
    first_row,  # (F,)
    num_rows,  # (F,)
    sums,  # (F, H, B)
    scaled,  # (F, H, B)
    lost,  # (F, column tiles)
    width,  # H
    batch,
    IS_SUM: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients of outer units, divided by their sums; `lost`: whether a tile has a sum that was stored as -1.

    Without IS_SUM, of product layers: the gradients as they are.
    """
    tiles = tl.cdiv(batch, COLUMNS)
    fold = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    own = rows + tl.load(first_row + fold)
    count = tl.load(num_rows + fold)
    found = tl.zeros((COLUMNS,), tl.int32)
    for low in range(0, width, UNITS):
        units = low + tl.arange(0, UNITS)
        inside = (units < width)[:, None] & (columns < batch)[None, :]
        place = (fold * width + units[:, None]) * batch + columns[None, :]
        total = sum_of_rows(gradient, own, units, columns, count, width, batch)
        if IS_SUM:
            sum_HB = tl.load(sums + place, mask=inside, other=1.0)
            found = tl.maximum(found, tl.max((sum_HB < 0).to(tl.int32), 0))
            total = tl.where(sum_HB < 0, 0.0, total / sum_HB)
        tl.store(scaled + place, total, mask=inside)
    if IS_SUM:
        tl.store(lost + fold * tiles + tile, tl.max(found, 0))


@triton.jit
def backward_inner(
    scaled,  # (F, H, B)
    inner,  # (F, K, B)
    weight,  # (P, H, K)
    parameter_rows,  # (F,)
    out,  # (F, K, B)
    num_outer,  # H
    num_inner,  # K
    batch,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
    INNER: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients of the logarithms of inner units, without what sums that were lost add."""
    tiles_b, tiles_k = tl.cdiv(batch, COLUMNS), tl.cdiv(num_inner, INNER)
    columns = (tl.program_id(0) % tiles_b) * COLUMNS + tl.arange(0, COLUMNS)
    units = (tl.program_id(0) // tiles_b % tiles_k) * INNER + tl.arange(0, INNER)
    fold = (tl.program_id(0) // (tiles_b * tiles_k)).to(tl.int64)
    own_weight = weight + tl.load(parameter_rows + fold) * num_outer * num_inner
    own_scaled = scaled + fold * num_outer * batch
    is_unit, is_column = units < num_inner, columns < batch
    total = tl.zeros((INNER, COLUMNS), tl.float32)
    for low in range(0, num_outer, DEPTH):
        above = low + tl.arange(0, DEPTH)
        is_above = above < num_outer
        weight_KH = tl.load(
            own_weight + above[None, :] * num_inner + units[:, None],
            mask=is_unit[:, None] & is_above[None, :],
            other=0.0,
        )
        scaled_HB = tl.load(
            own_scaled + above[:, None] * batch + columns[None, :],
            mask=is_above[:, None] & is_column[None, :],
            other=0.0,
        )
        total = _add_product(total, weight_KH, scaled_HB, PRECISION, EMULATE)
    inside = is_unit[:, None] & is_column[None, :]
    place = (fold * num_inner + units[:, None]) * batch + columns[None, :]
    tl.store(out + place, total * tl.load(inner + place, mask=inside, other=0.0), mask=inside)


@triton.jit
def backward_weight(
    scaled,  # (F, H, B)
    inner,  # (F, K, B)
    out,  # (rows, H, K)
    out_rows,  # (F,)
    num_outer,  # H
    num_inner,  # K
    batch,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Gradients of weights, without what sums that were lost add.

    `out_rows` are the rows of `out` that the nodes' gradients go to, each to one of its own.
    """
    tiles_k, tiles_h = tl.cdiv(num_inner, INNER), tl.cdiv(num_outer, OUTER)
    below = (tl.program_id(0) % tiles_k) * INNER + tl.arange(0, INNER)
    units = (tl.program_id(0) // tiles_k % tiles_h) * OUTER + tl.arange(0, OUTER)
    fold = (tl.program_id(0) // (tiles_k * tiles_h)).to(tl.int64)
    own_scaled, own_inner = scaled + fold * num_outer * batch, inner + fold * num_inner * batch
    is_below, is_unit = below < num_inner, units < num_outer
    total = tl.zeros((OUTER, INNER), tl.float32)
    for low in range(0, batch, DEPTH):
        columns = low + tl.arange(0, DEPTH)
        is_column = columns < batch
        scaled_HB = tl.load(
            own_scaled + units[:, None] * batch + columns[None, :],
            mask=is_unit[:, None] & is_column[None, :],
            other=0.0,
        )
        inner_BK = tl.load(
            own_inner + below[None, :] * batch + columns[:, None],
            mask=is_column[:, None] & is_below[None, :],
            other=0.0,
        )
        total = _add_product(total, scaled_HB, inner_BK, PRECISION, EMULATE)
    own_out = out + tl.load(out_rows + fold) * num_outer * num_inner
    place = units[:, None] * num_inner + below[None, :]
    tl.store(own_out + place, total, mask=is_unit[:, None] & is_below[None, :])


@triton.jit
def mend_inner(
    lost,  # (F, column tiles)
    weight,  # (P, H, K)
    parameter_rows,  # (F,)
    out,  # (F, K, B)
    values,  # (V, B)
    rows,
    first_row,  # (F,)
    num_rows,  # (F,)
    gradient,  # (E, B)
    gradient_rows,
    first_gradient_row,  # (F,)
    num_gradient_rows,  # (F,)
    sums,  # (F, H, B)
    log_sums,  # (F, H, B)
    num_outer,  # H
    num_inner,  # K
    batch,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add to the gradients of inner units what sums that were lost pass on: flows, which are never too large."""
    tiles_b, tiles_k = tl.cdiv(batch, COLUMNS), tl.cdiv(num_inner, INNER)
    tile = tl.program_id(0) % tiles_b
    fold = (tl.program_id(0) // (tiles_b * tiles_k)).to(tl.int64)
    if tl.load(lost + fold * tiles_b + tile) > 0:
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        units = (tl.program_id(0) // tiles_b % tiles_k) * INNER + tl.arange(0, INNER)
        is_unit, is_column = units < num_inner, columns < batch
        inside = is_unit[:, None] & is_column[None, :]
        own_weight = weight + tl.load(parameter_rows + fold) * num_outer * num_inner
        own_rows, count = rows + tl.load(first_row + fold), tl.load(num_rows + fold)
        own_above = gradient_rows + tl.load(first_gradient_row + fold)
        count_above = tl.load(num_gradient_rows + fold)
        log_KB = sum_of_rows(values, own_rows, units, columns, count, num_inner, batch)
        total = tl.zeros((INNER, COLUMNS), tl.float32)
        for above in range(0, num_outer):
            at = (fold * num_outer + above) * batch + columns
            is_lost = tl.load(sums + at, mask=is_column, other=1.0) < 0
            log_B = tl.load(log_sums + at, mask=is_lost, other=0.0)
            one = above + tl.arange(0, 1)
            grad_1B = sum_of_rows(gradient, own_above, one, columns, count_above, num_outer, batch)
            weight_K = tl.load(own_weight + above * num_inner + units, mask=is_unit, other=0.0)
            term = tl.log2(weight_K)[:, None] + (log_KB - log_B[None, :])
            total += tl.exp2(tl.where(is_lost[None, :], term, -float("inf"))) * grad_1B
        place = (fold * num_inner + units[:, None]) * batch + columns[None, :]
        tl.store(out + place, tl.load(out + place, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def mend_weight(
    lost,  # (F, column tiles)
    weight,  # (P, H, K)
    parameter_rows,  # (F,)
    out,  # (rows, H, K)
    out_rows,  # (F,)
    values,  # (V, B)
    rows,
    first_row,  # (F,)
    num_rows,  # (F,)
    gradient,  # (E, B)
    gradient_rows,
    first_gradient_row,  # (F,)
    num_gradient_rows,  # (F,)
    sums,  # (F, H, B)
    log_sums,  # (F, H, B)
    num_outer,  # H
    num_inner,  # K
    batch,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add to the gradients of weights what sums that were lost contribute: flow / weight. COLUMNS is that of `lost`."""
    tiles_k, tiles_h = tl.cdiv(num_inner, INNER), tl.cdiv(num_outer, OUTER)
    tiles_b = tl.cdiv(batch, COLUMNS)
    fold = (tl.program_id(0) // (tiles_k * tiles_h)).to(tl.int64)
    num_lost = 0
    for tile in range(0, tiles_b):
        num_lost += tl.load(lost + fold * tiles_b + tile)
    if num_lost > 0:
        below = (tl.program_id(0) % tiles_k) * INNER + tl.arange(0, INNER)
        units = (tl.program_id(0) // tiles_k % tiles_h) * OUTER + tl.arange(0, OUTER)
        is_below, is_unit = below < num_inner, units < num_outer
        inside = is_unit[:, None] & is_below[None, :]
        own_weight = weight + tl.load(parameter_rows + fold) * num_outer * num_inner
        own_rows, count = rows + tl.load(first_row + fold), tl.load(num_rows + fold)
        own_above = gradient_rows + tl.load(first_gradient_row + fold)
        count_above = tl.load(num_gradient_rows + fold)
        place = units[:, None] * num_inner + below[None, :]
        weight_HK = tl.load(own_weight + place, mask=inside, other=0.0)
        log_weight_HK = tl.log2(weight_HK)
        total = tl.zeros((OUTER, INNER), tl.float32)
        for column in range(0, batch):
            if tl.load(lost + fold * tiles_b + column // COLUMNS) > 0:
                one = column + tl.arange(0, 1)
                at = (fold * num_outer + units) * batch + column
                is_lost = tl.load(sums + at, mask=is_unit, other=1.0) < 0
                log_H = tl.load(log_sums + at, mask=is_lost, other=0.0)
                grad_H1 = sum_of_rows(gradient, own_above, units, one, count_above, num_outer, batch)
                log_K1 = sum_of_rows(values, own_rows, below, one, count, num_inner, batch)
                term = log_weight_HK + (tl.trans(log_K1) - log_H[:, None])
                total += tl.exp2(tl.where(is_lost[:, None], term, -float("inf"))) * grad_H1
        own_out = out + tl.load(out_rows + fold) * num_outer * num_inner
        added = tl.where(weight_HK > 0, total / tl.maximum(weight_HK, TINY), 0.0)
        tl.store(own_out + place, tl.load(own_out + place, mask=inside, other=0.0) + added, mask=inside)
