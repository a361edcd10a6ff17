"""Chow-Liu trees: pairwise mutual information, maximum spanning tree, rooted at its centre.

Shapes: G data sets, N examples, D variables, C categories (after binning).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lvd_lightning.circuits.checks import check_type, plain_integers

__all__ = ["center_root", "chow_liu_tree", "chow_liu_trees", "maximum_spanning_tree", "mutual_information"]

_BLOCK_COLUMNS = 4096  # one-hot columns of a block of variables: a block of joint counts takes 64 MiB
_CHUNK_EXAMPLES = 4095  # examples per matrix product: a one-hot block takes 64 MiB, and counts stay below 2^12


def chow_liu_tree(
    x: Tensor,
    num_categories: int | None = None,
    num_bins: int = 16,
    max_examples: int | None = 5000,
    *,
    weights: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """The tree over the variables that keeps the most mutual information, rooted at its centre.

    Args:
        x: integers from 0, with shape (N, D).
        num_categories: the number of values a variable can take; one more than the largest in the data by default.
            Pixels are better given their 256, so that bins do not move with the brightest one.
        num_bins: variables with more categories than this are binned to as many equal-width bins.
        max_examples: at most this many rows, drawn with `seed`, enter the statistics; None takes all.
        weights: non-negative weight of each row, with shape (N,).
        seed: the same data and seed give the same tree.

    Returns:
        The parent of every variable, int64 with shape (D,), -1 at the root.

    Raises:
        ValueError: if the data hold no example, are not integers, or leave the range.

    References:
        Chow and Liu, Approximating discrete probability distributions with dependence trees, 1968.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> row = torch.arange(1000)
        >>> first, flips = row % 2, (row % 10 == 0).long()
        >>> x = torch.stack([first, first ^ flips, first ^ flips ^ (row % 7 == 0).long()], 1)  # a chain
        >>> pc.chow_liu_tree(x)
        tensor([ 1, -1,  1])
    """
    return chow_liu_trees(
        [x], num_categories, num_bins, max_examples, weights=None if weights is None else [weights], seed=seed
    )[0]


def chow_liu_trees(
    x_list: Sequence[Tensor] | Tensor,
    num_categories: int | None = None,
    num_bins: int = 16,
    max_examples: int | None = 5000,
    *,
    weights: Sequence[Tensor] | Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """One Chow-Liu tree per data set, as `chow_liu_tree`, the spanning trees found side by side.

    Args:
        x_list: G integer tensors with shapes (N_g, D), N_g may differ, or one with shape (G, N, D).
        weights: the rows' weights, G tensors with shapes (N_g,) or one with shape (G, N).

    Returns:
        The parents, int64 with shape (G, D), -1 at the roots.
    """
    x_list = [plain_integers(x_ND) for x_ND in x_list]
    if len(x_list) == 0:
        raise ValueError("x_list holds no data set: pass at least one tensor of shape (N, D)")
    if weights is not None and len(weights) != len(x_list):
        raise ValueError(f"weights holds {len(weights)} tensors, expected one per data set ({len(x_list)})")
    for x_ND in x_list:
        check_type("x", x_ND, Tensor)
    if num_categories is None:
        num_categories = 1 + max([0, *(int(x.max()) for x in x_list if x.numel())])
    mi_list = []
    for g, x_ND in enumerate(x_list):
        w_N = None if weights is None else weights[g]
        _check_data(x_ND, w_N, num_categories)
        if max_examples is not None and len(x_ND) > max_examples:
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randperm(len(x_ND), generator=generator)[:max_examples].to(x_ND.device)
            x_ND, w_N = x_ND[rows], None if w_N is None else w_N[rows]
        mi_list.append(mutual_information(x_ND, num_categories, num_bins, weights=w_N))
    if len({mi.shape for mi in mi_list}) > 1:
        raise ValueError(f"the data sets have {sorted({len(mi) for mi in mi_list})} variables, expected one number")
    parents_GD = maximum_spanning_tree(torch.stack(mi_list))
    return torch.stack([center_root(parents_D) for parents_D in parents_GD])


def mutual_information(
    x: Tensor, num_categories: int = 256, num_bins: int | None = None, *, weights: Tensor | None = None
) -> Tensor:
    """Mutual information of every pair of variables in nats, of the empirical distribution of the rows.

    Joint counts are products of one-hot matrices in float32, exact up to 2^24 examples, in blocks of variables, so that
    memory stays bounded whatever D is.

    Args:
        x: integers in 0..num_categories-1, with shape (N, D).
        num_bins: bin to as many equal-width bins if there are more categories than this; None keeps the values.
        weights: non-negative weight of each row, with shape (N,).

    Returns:
        A symmetric float32 matrix with shape (D, D); its diagonal is the variables' entropies.

    Raises:
        ValueError: if the data hold no example, are not integers, or leave the range.
    """
    x = plain_integers(x)
    _check_data(x, weights, num_categories)
    if num_bins is not None and num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}, expected at least 1")
    x_ND = x.long()
    if num_bins is not None and num_categories > num_bins:
        x_ND, num_categories = x_ND * num_bins // num_categories, num_bins
    blocks = torch.arange(x.shape[1], device=x.device).split(max(1, _BLOCK_COLUMNS // num_categories))
    joint_entropy_DD = x_ND.new_zeros((x.shape[1], x.shape[1]), dtype=torch.float32)
    for i, rows in enumerate(blocks):
        for columns in blocks[i:]:
            entropy = _joint_entropy(x_ND[:, rows], x_ND[:, columns], num_categories, weights)
            joint_entropy_DD[rows[:, None], columns] = entropy
            joint_entropy_DD[columns[:, None], rows] = entropy.T
    entropy_D = joint_entropy_DD.diagonal()
    return (entropy_D[:, None] + entropy_D - joint_entropy_DD).clamp_min_(0.0)


def maximum_spanning_tree(weights: Tensor) -> Tensor:
    """Prim's algorithm on dense matrices: spans whatever the weights are, zeros, ties and negative ones included.

    Args:
        weights: finite symmetric weights, with shape (D, D), or (G, D, D) for G graphs side by side; the diagonal is
            ignored.

    Returns:
        Parents of the tree rooted at variable 0, int64 with shape (D,) or (G, D), -1 at the root.
    """
    if weights.dim() not in (2, 3) or weights.shape[-1] != weights.shape[-2] or weights.shape[-1] == 0:
        raise ValueError(f"weights has shape {tuple(weights.shape)}, expected (D, D) or (G, D, D)")
    if not weights.isfinite().all():
        raise ValueError("weights holds NaN or infinite values, expected finite ones")
    weights_GDD = weights if weights.dim() == 3 else weights[None]
    each = torch.arange(len(weights_GDD), device=weights.device)
    best_GD = weights_GDD[:, 0].clone()  # the heaviest edge from the tree so far to each variable
    parents_GD = torch.zeros_like(best_GD, dtype=torch.int64)
    outside_GD = torch.ones_like(best_GD, dtype=torch.bool)
    outside_GD[:, 0] = False
    for _ in range(weights.shape[-1] - 1):
        new_G = best_GD.masked_fill(~outside_GD, float("-inf")).argmax(1)
        outside_GD[each, new_G] = False
        row_GD = weights_GDD.gather(1, new_G[:, None, None].expand(-1, 1, weights.shape[-1]))[:, 0]
        better_GD = outside_GD & (row_GD > best_GD)
        best_GD = torch.where(better_GD, row_GD, best_GD)
        parents_GD = torch.where(better_GD, new_G[:, None], parents_GD)
    parents_GD[:, 0] = -1
    return parents_GD if weights.dim() == 3 else parents_GD[0]


def center_root(parents: Tensor) -> Tensor:
    """The same tree rooted at its centre, where its height is lowest; of two centres the one with the lower index.

    Args:
        parents: the parent of every variable, -1 at the root, with shape (D,).

    Returns:
        Parents of the re-rooted tree, int64 with shape (D,), on the device of the given ones.

    Raises:
        ValueError: if the parents are not one tree.
    """
    parent_list = [int(p) for p in parents.tolist()]
    neighbours: list[list[int]] = [[] for _ in parent_list]
    for child, parent in enumerate(parent_list):
        if not -1 <= parent < len(parent_list):
            raise ValueError(f"parents[{child}] is {parent}, expected -1 or a variable below {len(parent_list)}")
        if parent >= 0:
            neighbours[child].append(parent)
            neighbours[parent].append(child)
    if parent_list.count(-1) != 1 or len(_breadth_first(neighbours, 0)) != len(parent_list):
        raise ValueError("parents is not one tree: expected one root (-1) that every variable leads to")
    # The two ends of a longest path; its middle is the centre.
    one_end = list(_breadth_first(neighbours, 0))[-1]
    parent_of = _breadth_first(neighbours, one_end)
    path = [list(parent_of)[-1]]
    while path[-1] != one_end:
        path.append(parent_of[path[-1]])
    root = min(path[(len(path) - 1) // 2], path[len(path) // 2])
    parent_of = _breadth_first(neighbours, root)
    return torch.tensor([parent_of[v] for v in range(len(parent_list))], dtype=torch.int64, device=parents.device)


def _breadth_first(neighbours: list[list[int]], root: int) -> dict[int, int]:
    """Parents of the variables reached from the root, in the order of their depth."""
    parent_of = {root: -1}
    queue = [root]
    for v in queue:
        for u in neighbours[v]:
            if u not in parent_of:
                parent_of[u] = v
                queue.append(u)
    return parent_of


def _joint_entropy(x_NI: Tensor, x_NJ: Tensor, num_categories: int, weights: Tensor | None) -> Tensor:
    """Entropies in nats of the pairs (i, j), with shape (I, J), of two blocks of variables."""
    if weights is None:
        joint = _joint_counts(x_NI, x_NJ, num_categories).div_(len(x_NI))
    else:
        joint = _joint_weights(x_NI, x_NJ, num_categories, weights).div_(weights.sum())
    # log 0 is avoided by a floor far below 1 / 2^24; p log p is then 0 at p = 0.
    p_log_p = joint.clamp_min(1e-30).log_().mul_(joint)
    num_i, num_j = x_NI.shape[1], x_NJ.shape[1]
    return -p_log_p.view(-1, num_i, num_categories, num_j, joint.shape[-1] // num_j).sum((0, 2, 4))


def _joint_counts(x_NI: Tensor, x_NJ: Tensor, num_categories: int) -> Tensor:
    """Joint counts with shape (2, I * C, J * ceil(C / 2)): the lower and the upper half of the categories of j.

    One product counts both halves, for half the work: the upper one is counted in units of 4096, so that with fewer
    examples than this in a product both are exact digits of a float32 integer.
    """
    half = (num_categories + 1) // 2
    unit = _CHUNK_EXAMPLES + 1
    shape = (2, x_NI.shape[1] * num_categories, x_NJ.shape[1] * half)
    joint = torch.zeros(shape, dtype=torch.float32, device=x_NI.device)
    for left_NI, right_NJ in zip(x_NI.split(_CHUNK_EXAMPLES), x_NJ.split(_CHUNK_EXAMPLES), strict=True):
        digits = torch.where(right_NJ < half, 1.0, unit).float().repeat_interleave(half, 1)
        both = _one_hot(left_NI, num_categories).T @ _one_hot(right_NJ % half, half).mul_(digits)
        upper = (both / unit).floor_()
        joint[1] += upper
        joint[0] += both.sub_(upper, alpha=unit)
    return joint


def _joint_weights(x_NI: Tensor, x_NJ: Tensor, num_categories: int, weights: Tensor) -> Tensor:
    """Joint sums of weights, with shape (I * C, J * C)."""
    shape = (x_NI.shape[1] * num_categories, x_NJ.shape[1] * num_categories)
    joint = torch.zeros(shape, dtype=torch.float32, device=x_NI.device)
    chunks = zip(x_NI.split(_CHUNK_EXAMPLES), x_NJ.split(_CHUNK_EXAMPLES), weights.split(_CHUNK_EXAMPLES), strict=True)
    for left_NI, right_NJ, w_N in chunks:
        left = _one_hot(left_NI, num_categories).mul_(w_N[:, None])
        joint.addmm_(left.T, _one_hot(right_NJ, num_categories))
    return joint


def _one_hot(x_NI: Tensor, num_categories: int) -> Tensor:
    """One-hot rows in float32, with shape (N, I * C)."""
    return (x_NI[:, :, None] == torch.arange(num_categories, device=x_NI.device)).flatten(1).float()


def _check_data(x: Tensor, weights: Tensor | None, num_categories: int) -> None:
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (N, D) with at least one example and one variable")
    if x.is_floating_point() or x.is_complex():
        raise ValueError(f"x is {x.dtype}, expected integers: bin continuous variables first")
    low, high = int(x.min()), int(x.max())  # as Python integers: 256 compared with a uint8 tensor wraps to 0
    if low < 0 or high >= num_categories:
        raise ValueError(f"x holds {low}..{high}, expected values in 0..{num_categories - 1}")
    if weights is not None:
        if weights.shape != x.shape[:1]:
            raise ValueError(f"weights has shape {tuple(weights.shape)}, expected one weight per row ({len(x)},)")
        if not (weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0):
            raise ValueError("weights holds negative, infinite or NaN values, or sums to zero")
