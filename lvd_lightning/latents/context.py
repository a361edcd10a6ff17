"""Which patches help to encode which: a tree over patches from the similarity of their features.

Shapes: N images, P patches, E features, I features of a block of patches.
"""

import torch
from torch import Tensor

from lvd_lightning.circuits.structures.chow_liu import center_root, maximum_spanning_tree
from lvd_lightning.latents.features import PatchVectors
from lvd_lightning.stopping import stop_if_requested

__all__ = ["ancestor_mask", "context_tree", "linear_cka"]

_BLOCK_ENTRIES = 2**24  # cross-covariances held at once: 128 MiB of float64
_CHUNK_IMAGES = 512


def linear_cka(vectors: PatchVectors, device: torch.device | str = "cpu") -> Tensor:
    """Linear centred kernel alignment of the features of every pair of patches over all images.

    CKA(i, j) = |X_i' X_j|^2 / (|X_i' X_i| |X_j' X_j|) with centred X_i [N, E] and Frobenius norms: 1 for features equal
    up to rotation and scale, 0 for uncorrelated ones. The sums run over chunks of images, for a block of patches
    against all others at a time, so memory grows with P and E and not with N.

    Returns:
        float64 with shape (P, P), symmetric; a patch whose features never change has similarity 0 with all others.

    Raises:
        ValueError: if there are fewer than two images.

    References:
        Kornblith et al., Similarity of Neural Network Representations Revisited, 2019, arXiv:1905.00414.
    """
    num_images, num_patches, num_features = vectors.shape
    if num_images < 2:
        raise ValueError(f"the similarity of patches needs at least 2 images, got {num_images}")
    mean_PE = torch.zeros(num_patches, num_features, dtype=torch.float64, device=device)
    for start in range(0, num_images, _CHUNK_IMAGES):
        stop_if_requested()
        mean_PE += vectors.read(start, start + _CHUNK_IMAGES).to(device).sum(0, dtype=torch.float64) / num_images
    norm_PP = torch.zeros(num_patches, num_patches, dtype=torch.float64, device=device)
    patches = torch.arange(num_patches)
    for block in patches.split(max(1, _BLOCK_ENTRIES // (num_patches * num_features**2))):
        stop_if_requested()
        first, last = int(block[0]), int(block[-1]) + 1
        norm_PP[first:last, first:] = _cross_covariance_norms(vectors, mean_PE, first, last)
    norm_PP = norm_PP.triu() + norm_PP.triu(1).T
    scale_P = norm_PP.diagonal().sqrt()
    scale_PP = scale_P[:, None] * scale_P
    return torch.where(scale_PP > 0, norm_PP / scale_PP, 0.0).cpu()


def context_tree(similarity: Tensor) -> Tensor:
    """The spanning tree of largest total similarity, rooted at its centre; its ties go to the lower index.

    Args:
        similarity: finite and symmetric, with shape (P, P); the diagonal is ignored.

    Returns:
        The parent of every patch, int64 with shape (P,), -1 at the root.
    """
    return center_root(maximum_spanning_tree(similarity))


def ancestor_mask(parents: Tensor) -> Tensor:
    """For every patch, itself and its ancestors: the `visible` of a teacher's features, bool with shape (P, P).

    Args:
        parents: the parent of every patch, with shape (P,), -1 at the root.
    """
    visible_PP = torch.eye(len(parents), dtype=torch.bool)
    above_P = parents.clone()  # the ancestor that each patch has reached; -1 beyond the root
    for _ in range(len(parents)):
        if (above_P < 0).all():
            return visible_PP
        rows = (above_P >= 0).nonzero()[:, 0]
        visible_PP[rows, above_P[rows]] = True
        above_P[rows] = parents[above_P[rows]]
    raise ValueError(f"parents {parents.tolist()} hold a cycle, expected a tree with -1 at its root")


def _cross_covariance_norms(vectors: PatchVectors, mean_PE: Tensor, first: int, last: int) -> Tensor:
    """Squared Frobenius norms of X_i' X_j for i = first..last-1 and j = first..P-1."""
    num_images, num_patches, num_features = vectors.shape
    rows, columns = (last - first) * num_features, (num_patches - first) * num_features
    covariance_IJ = torch.zeros(rows, columns, dtype=torch.float64, device=mean_PE.device)
    for start in range(0, num_images, _CHUNK_IMAGES):
        stop_if_requested()
        x_NPE = vectors.read(start, start + _CHUNK_IMAGES).to(mean_PE.device) - mean_PE.float()
        x_NJ = x_NPE[:, first:].flatten(1)
        covariance_IJ += x_NJ[:, :rows].T @ x_NJ
    blocks = covariance_IJ.view(last - first, num_features, num_patches - first, num_features)
    return blocks.square().sum(dim=(1, 3))
