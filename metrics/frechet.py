"""Fréchet distance between two Gaussians fitted to features, in float64."""

import numpy as np


def feature_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D,D], float64, of features [N,D]; raises ValueError if N < 2."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features [N,D] of at least 2 samples expected, not {list(features.shape)}")
    features = features.astype(np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|² + Tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½) (Dowson and Landau 1982; Heusel et al. 2017).

    Means are [D], covariances [D,D]. With Σi = Ri Riᵀ, the eigenvalues of Σ1 Σ2 are the squared singular
    values of R1ᵀ R2, so the trace of the root is the sum of these singular values. It is always real, also for
    singular covariances. (The singular values of Σ1 Σ2 itself would be wrong, since it is not symmetric.)
    """
    trace_of_root = np.linalg.svd(_root(sigma1).T @ _root(sigma2), compute_uv=False).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)  # rounding may leave -1e-12 between equal sets


def frechet_distance_of_release(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """The distance as the paper's release computes it: with U √S Vᵀ for the root, where U S Vᵀ is the SVD of Σ1 Σ2.

    This is not the root unless Σ1 and Σ2 commute, so the distance is too large. Compare it with the paper's FID only.
    """
    u, s, vt = np.linalg.svd(sigma1 @ sigma2)
    trace = np.sum(u * np.sqrt(s) * vt.T)  # Tr(U √S Vᵀ)
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def _root(sigma: np.ndarray) -> np.ndarray:
    """R with R Rᵀ = sigma, for a symmetric, positive semi-definite sigma, up to rounding."""
    eigenvalues, eigenvectors = np.linalg.eigh(np.asarray(sigma, dtype=np.float64))
    return eigenvectors * np.sqrt(eigenvalues.clip(min=0))
