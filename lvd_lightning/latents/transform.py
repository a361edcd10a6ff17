"""A map of features before they are clustered: centring, shares, principal components, whitening, unit length.

Shapes: N images, P patches, E features, D features after the map, m rows; Q is P, or 1 if all patches share a map.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lvd_lightning.checks import expect
from lvd_lightning.latents.features import PatchVectors

__all__ = ["AffineMap", "fit_map"]

_CHUNK_ENTRIES = 2**23  # features held at once: 64 MiB of float64
_ROUNDING = 1e-10  # of variances, relative to mean squares
_SMALLEST_EIGENVALUE = 1e-6  # relative to the largest; what varies less is noise of float16 and is not blown up


class AffineMap(NamedTuple):
    """x -> (x - mean) matrix, of its own for every patch or shared; then, if wanted, to length 1.

    mean: float32 with shape (Q, E).
    matrix: float32 with shape (Q, E, D), or None for the identity.
    normalize: whether what comes out is divided by its length (0 stays 0).
    """

    mean: Tensor
    matrix: Tensor | None
    normalize: bool = False

    def of_images(self, x_NPE: Tensor) -> Tensor:
        """Maps the features of whole images, to shape (N, P, D)."""
        return self._of_length_1(self._affine_of_images(x_NPE))

    def of_patches(self, x_mE: Tensor, positions: Tensor) -> Tensor:
        """Maps the features of single patches of given positions, to shape (m, D)."""
        return self._of_length_1(self._affine_of_patches(x_mE, positions))

    def _of_length_1(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) if self.normalize else x

    def _affine_of_images(self, x_NPE: Tensor) -> Tensor:
        centered_NPE = x_NPE - self.mean
        if self.matrix is None:
            return centered_NPE
        return torch.einsum("npe,ped->npd", centered_NPE, self.matrix.expand(x_NPE.shape[1], -1, -1))

    def _affine_of_patches(self, x_mE: Tensor, positions: Tensor) -> Tensor:
        row = positions if len(self.mean) > 1 else torch.zeros_like(positions)
        centered_mE = x_mE - self.mean[row]
        if self.matrix is None:
            return centered_mE
        if len(self.matrix) == 1:
            return centered_mE @ self.matrix[0]
        mapped_mD = x_mE.new_empty(len(x_mE), self.matrix.shape[2])
        for p in positions.unique().tolist():
            mapped_mD[positions == p] = centered_mE[positions == p] @ self.matrix[p]
        return mapped_mD


def fit_map(
    vectors: PatchVectors,
    *,
    center: bool,
    per_position: bool,
    num_components: int | None = None,
    whiten: bool = False,
    values: tuple[int, float] | None = None,
    device: torch.device | str = "cpu",
) -> AffineMap:
    """Fit the map to all patches of all images, in one pass over them.

    Args:
        center: whether to subtract every position's own mean; principal components subtract a mean in any case, that of
            all patches if not this.
        per_position: whether every position has principal components of its own.
        num_components: the number of principal components to keep; None keeps the features as they are, or if they are
            whitened, all components.
        whiten: whether to scale the components to unit variance.
        values: so many numbers at the end of each vector, and their share of the variance: these, and the numbers
            before them, are scaled as a whole, so that together they vary by 1. None: nothing is scaled.

    Raises:
        ValueError: if all values or all features are constant; if there are fewer features than components.
    """
    num_features = vectors.shape[2]
    fits = num_components is None or 1 <= num_components <= num_features
    expect(fits, "pca", num_components, f"1 to the number of features, {num_features}")
    rotate = num_components is not None or whiten
    if not center and not rotate and values is None:
        return AffineMap(torch.zeros(1, num_features), None)
    mean_PE, moment_PEE = _moments(vectors, rotate or values is not None, device)
    shared = not (center or per_position)
    mean_QE = mean_PE.mean(0, keepdim=True) if shared else mean_PE
    if not rotate and values is None:
        return AffineMap(mean_QE.float(), None)
    if not per_position:
        # Within positions if these are centred, else around the common mean.
        correction_EE = torch.einsum("pe,pf->ef", mean_QE, mean_QE) / len(mean_QE)
        covariance_QEE = (moment_PEE.mean(0) - correction_EE)[None]
    else:
        covariance_QEE = moment_PEE - mean_QE[:, :, None] * mean_QE[:, None, :]
    scale_E = (
        torch.ones(num_features, dtype=torch.float64) if values is None else _scales(mean_QE, covariance_QEE, *values)
    )
    matrix_QED = scale_E.diag()[None]
    if rotate:
        covariance_QEE = scale_E[:, None] * covariance_QEE * scale_E
        matrix_QED = scale_E[:, None] * _components(covariance_QEE, num_components or num_features, whiten)
    return AffineMap(mean_QE.float(), matrix_QED.float())


def _scales(mean_QE: Tensor, covariance_QEE: Tensor, num_values: int, share: float) -> Tensor:
    """What features and, at the end, values are multiplied by, with shape (E,)."""
    variance_E = covariance_QEE.diagonal(dim1=1, dim2=2).mean(0)
    rounding_E = _ROUNDING * (mean_QE.square().mean(0) + variance_E)
    variance_E = torch.where(variance_E > rounding_E, variance_E, 0.0)
    num_features = len(variance_E) - num_values
    scales = []
    for variance, part, name in (
        (variance_E[:num_features], 1 - share, "features"),
        (variance_E[num_features:], share, "values"),
    ):
        expect(bool(variance.sum() > 0), "value_share", share, f"0, since all {name} are constant")
        scales.append((part / variance.sum()).sqrt().expand(len(variance)))
    return torch.cat(scales)


def _moments(vectors: PatchVectors, second: bool, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Means [P, E] and, if wanted, means of the outer products [P, E, E], in float64 on the CPU."""
    num_images, num_patches, num_features = vectors.shape
    mean_PE = torch.zeros(num_patches, num_features, dtype=torch.float64, device=device)
    moment_PEE = torch.zeros(
        num_patches, num_features, num_features if second else 0, dtype=torch.float64, device=device
    )
    step = max(1, _CHUNK_ENTRIES // (num_patches * num_features))
    for start in range(0, num_images, step):
        x_PNE = vectors.read(start, min(start + step, num_images)).to(device, torch.float64).transpose(0, 1)
        mean_PE += x_PNE.sum(1) / num_images
        if second:
            moment_PEE += x_PNE.mT @ x_PNE / num_images
    return mean_PE.cpu(), moment_PEE.cpu()


def _components(covariance_QEE: Tensor, num_components: int, whiten: bool) -> Tensor:
    """Leading eigenvectors as columns, with shape (Q, E, D), scaled to unit variance if wanted."""
    value_QE, vector_QEE = torch.linalg.eigh(covariance_QEE)
    value_QD = value_QE.flip(1)[:, :num_components]
    vector_QED = vector_QEE.flip(2)[:, :, :num_components]
    # An eigenvector's sign is arbitrary: its largest entry is made positive, whatever the linear algebra library.
    largest_Q1D = vector_QED.gather(1, vector_QED.abs().argmax(1, keepdim=True))
    vector_QED = vector_QED * largest_Q1D.sign()
    if whiten:
        kept_QD = value_QD > _SMALLEST_EIGENVALUE * value_QD[:, :1]
        vector_QED = vector_QED * torch.where(kept_QD, value_QD.clamp_min(1e-30).rsqrt(), 0.0)[:, None, :]
    return vector_QED
